// The transposed products of decode: S^T = K Q^T and O^T = V^T P^T, 16 keys and 8 packed query rows at a time.
//
// With keys on the long side of the instruction, 8 rows fill it: the 1 to 8 query heads that share a key head waste nothing.
// Legend: "column" is a packed query row, one of kColumns; lane l has group = l / 4, quad = l % 4. Of column tile n a lane
// holds columns 8 n + 2 quad + {0, 1}, for keys (in S^T) or dims of a slice of 16 (in O^T) group and group + 8:
// element e of a fragment is column e % 2 and key or dim half e / 2.
#pragma once
#include "jitgen/decode_ptx.cuh"
#include "jitgen/sm90_geometry.cuh"

namespace jg {

constexpr int kUnitKeys = 16;   // keys of a warp's load and of its two products

// Address of the chunk (16 bytes) `chunks` further along the rows of a span tile. `chunks` is a multiple of a power of two
// above the chunk at `address`, so the swizzled bits change by one xor.
template <int kCols, int kRows> JITGEN_FN unsigned along(unsigned address, int chunks) {
  constexpr int kChunks = SpanTile<kCols>::kSpan / 8;
  return (address ^ (chunks % kChunks * 16)) + chunks / kChunks * (kRows * SpanTile<kCols>::kSpanBytes);
}

// ---- lane addresses of the fragments ----
template <int kHeadDim> JITGEN_FN unsigned key_fragment(int lane) {
  return SpanTile<kHeadDim>::chunk_offset(lane & 15, lane >> 4, kUnitKeys);
}
template <int kHeadDimV> JITGEN_FN unsigned value_fragment(int lane) {
  return SpanTile<kHeadDimV>::chunk_offset((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1, kUnitKeys);
}
template <int kHeadDim, int kColumns> JITGEN_FN unsigned query_fragment(int lane) {
  return SpanTile<kHeadDim>::chunk_offset(lane & 7, lane >> 3, kColumns);
}

// ---- products ----
// S^T of a unit. Addresses: this lane's key fragment in the K tile, its query fragment in the Q tile.
template <class Element, int kHeadDim, int kTiles>
JITGEN_FN void multiply_keys(float (&s)[kTiles][4], unsigned keys, unsigned query) {
  float odd[4] = {};   // of a single tile: two sums, because one would wait for each product
#pragma unroll
  for (int n = 0; n < kTiles; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; step += 2) {
    unsigned a[2][4];
    load_matrix(a[0], along<kHeadDim, kUnitKeys>(keys, 2 * step));
    load_matrix(a[1], along<kHeadDim, kUnitKeys>(keys, 2 * step + 2));
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      unsigned b[4];
      load_matrix(b, along<kHeadDim, 8 * kTiles>(query + n * 8 * SpanTile<kHeadDim>::kSpanBytes, 2 * step));
      Element::mma(s[n], a[0], b[0], b[1]);
      Element::mma(kTiles == 1 ? odd : s[n], a[1], b[2], b[3]);
    }
  }
  if constexpr (kTiles == 1) s[0][0] += odd[0], s[0][1] += odd[1], s[0][2] += odd[2], s[0][3] += odd[3];
}

// O^T += V^T P^T; weights come as S^T left them and are transposed on the way.
template <class Element, int kSlices, int kTiles>
JITGEN_FN void multiply_values(float (&o)[kSlices][kTiles][4], const float (&p)[kTiles][4], unsigned values) {
  unsigned b[kTiles][2];
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) b[n][half] = transpose_matrix(Element::pack(p[n][2 * half], p[n][2 * half + 1]));
#pragma unroll
  for (int slice = 0; slice < kSlices; ++slice) {
    unsigned a[4];
    load_matrix_transposed(a, along<16 * kSlices, kUnitKeys>(values, 2 * slice));
#pragma unroll
    for (int n = 0; n < kTiles; ++n) Element::mma(o[slice][n], a, b[n][0], b[n][1]);
  }
}

// Zeroes rows outside [low, high) of a V tile: a weight of zero must not meet a NaN that lies in memory.
template <int kHeadDimV> JITGEN_FN void zero_rows(unsigned values, int low, int high, int lane) {
  constexpr int kChunks = kHeadDimV / 8;
  for (int i = lane; i < kUnitKeys * kChunks; i += 32) {
    const int row = i / kChunks;
    const unsigned at = values + SpanTile<kHeadDimV>::chunk_offset(row, i % kChunks, kUnitKeys);
    if (row < low || row >= high) store_shared(at, uint4{0, 0, 0, 0});
  }
  fence_async_proxy();   // the copy engine writes here next
  __syncwarp();
}

// ---- softmax over keys, which are spread over the groups of lanes ----
JITGEN_FN float group_xor(float x, int groups) { return __shfl_xor_sync(0xffffffffu, x, 4 * groups); }
JITGEN_FN float group_sum(float x) { x += group_xor(x, 1); x += group_xor(x, 2); return x + group_xor(x, 4); }
JITGEN_FN float group_max(float x) {
  x = ::fmaxf(x, group_xor(x, 1));
  x = ::fmaxf(x, group_xor(x, 2));
  return ::fmaxf(x, group_xor(x, 4));
}

// What a maximum is subtracted as: that of a column without keys so far is -inf, and would make NaN.
JITGEN_FN float shift_of(float top) { return top == -INFINITY ? 0.0f : top; }

// Maximum and denominator of each column of a lane, in exponents of two. The maximum follows the keys only when they exceed
// it by more than kSlack, so O is rescaled about once per request; the denominator is a sum over the lane's own keys.
template <int kTiles> struct ColumnSoftmax {
  static constexpr float kSlack = 8.0f;
  float top[kTiles][2], sum[kTiles][2];

  JITGEN_FN void init() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) top[n][0] = top[n][1] = -INFINITY, sum[n][0] = sum[n][1] = 0.0f;
  }
  // Turns exponents into weights, and brings O to a new maximum where there is one.
  template <int kSlices> JITGEN_FN void update(float (&s)[kTiles][4], float (&o)[kSlices][kTiles][4]) {
    bool exceeds = false;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) exceeds |= ::fmaxf(s[n][e], s[n][e + 2]) > top[n][e] + kSlack;
    if (__any_sync(0xffffffffu, exceeds)) raise(s, o);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[n][e] = exp2(s[n][e] - shift_of(top[n][e % 2]));
        sum[n][e % 2] += s[n][e];
      }
  }
  template <int kSlices> JITGEN_FN void raise(const float (&s)[kTiles][4], float (&o)[kSlices][kTiles][4]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float factor[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float before = top[n][e];
        top[n][e] = ::fmaxf(before, group_max(::fmaxf(s[n][e], s[n][e + 2])));
        factor[e] = exp2(before - shift_of(top[n][e]));
        sum[n][e] *= factor[e];
      }
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[slice][n][e] *= factor[e % 2];
    }
  }
};

// One column of S^T as norm_update sees it: the eight lanes that share it call together. kOdd: which of a lane's two columns
// of a tile; kReverse visits keys from last to first.
template <int kOdd, bool kReverse> struct ColumnView {
  float (&x)[4];
  int first;              // kv_idx of the element of half 0
  float inclusive[2];     // side buffer of cumsum, dead unless it is called

  JITGEN_FN ColumnView(float (&x)[4], int first) : x(x), first(first) {}

  template <class F> JITGEN_FN void each(F f) {
#pragma unroll
    for (int half = 0; half < 2; ++half) f(x[2 * half + kOdd], first + 8 * half);
  }
  template <class F> JITGEN_FN float sum(F f) {
    float total = 0.0f;
    each([&](float& e, int i) { total += f(e, i); });
    return group_sum(total);
  }
  template <class F> JITGEN_FN float max(F f) {
    float top = -INFINITY;
    each([&](float& e, int i) { top = ::fmaxf(top, f(e, i)); });
    return group_max(top);
  }
  // Inclusive prefix sum in visiting order: groups of lanes inside a half, then the other half.
  template <class F> JITGEN_FN void cumsum(F f) {
    const int lane = threadIdx.x & 31, group = kReverse ? 7 - lane / 4 : lane / 4;
    float before = 0.0f;
#pragma unroll
    for (int visit = 0; visit < 2; ++visit) {
      const int half = kReverse ? 1 - visit : visit;
      const float own = f(x[2 * half + kOdd], first + 8 * half);
      float sum = own;
#pragma unroll
      for (int step = 1; step < 8; step *= 2) {
        float earlier;   // sum of the lanes visited before
        if constexpr (kReverse) earlier = __shfl_down_sync(0xffffffffu, sum, 4 * step);
        else earlier = __shfl_up_sync(0xffffffffu, sum, 4 * step);
        sum += group >= step ? earlier : 0.0f;
      }
      inclusive[half] = before + sum;
      before += group_sum(own);
    }
  }
  template <class F> JITGEN_FN void each_with_cumsum(F f) {
#pragma unroll
    for (int half = 0; half < 2; ++half) f(x[2 * half + kOdd], first + 8 * half, inclusive[half]);
  }
};

// One finished row of O as norm_finalize and output_row see it: a warp holds dims lane + 32 i.
template <int kHeadDimV> struct OutputView {
  float (&x)[kHeadDimV / 32];

  JITGEN_FN explicit OutputView(float (&x)[kHeadDimV / 32]) : x(x) {}

  template <class F> JITGEN_FN void each(F f) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < kHeadDimV / 32; ++i) f(x[i], lane + 32 * i);
  }
  template <class F> JITGEN_FN float sum(F f) {
    float total = 0.0f;
    each([&](float& e, int i) { total += f(e, i); });
#pragma unroll
    for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
    return total;
  }
  template <class F> JITGEN_FN float max(F f) {
    float top = -INFINITY;
    each([&](float& e, int i) { top = ::fmaxf(top, f(e, i)); });
#pragma unroll
    for (int step = 16; step > 0; step /= 2) top = ::fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
    return top;
  }
};

}  // namespace jg
