// Serving kernels on mma.sync: packed query rows, keys that lie in pages, and partial results of items that were cut.
#pragma once
#include "jitgen/divisor.cuh"
#include "jitgen/sm80_softmax.cuh"
#include "jitgen/sm80_tile.cuh"

namespace jg {

// ---- packed rows ----
// A tile of queries holds 2^shift heads that share their keys: packed row r is query r >> shift of head r % 2^shift of the
// group. The rows of a thread are 8 apart, so with up to 8 heads they all belong to one.
JITGEN_FN int packed_query(int row, int shift) { return row >> shift; }
JITGEN_FN int packed_head(int row, int shift) { return row & ((1 << shift) - 1); }

// Heads in a packed row, as a power of two: the largest that divides the group and is at most 8, or 2^most.
inline int packing_shift(long long group_size, int most = 3) {
  int shift = 0;
  while (shift < most && (group_size >> shift) % 2 == 0) ++shift;
  return shift;
}

// Where the packed rows of a request and head group are in a [rows, heads, columns] tensor; strides in bytes.
struct PackedRows {
  char* base;
  long long query_bytes, head_bytes;
  int shift;
  JITGEN_FN char* row(int r) const { return base + packed_query(r, shift) * query_bytes + packed_head(r, shift) * head_bytes; }
};

// Copies packed rows [first, first + kRows) to the tile at `address`; rows from `limit` on become zero.
template <int kRows, int kCols, int kThreads, int kSpanRows = 0>
JITGEN_FN void copy_packed_rows(unsigned address, const PackedRows& rows, int first, int limit, int thread) {
  using Tile = SwizzledTile<kCols>;
  constexpr int kRowStep = kThreads / Tile::kSpan;
  static_assert(kRowStep % 8 == 0 && kRows % kRowStep == 0, "every thread copies the same rows of the swizzle");
  const int row = thread / Tile::kSpan, chunk = thread % Tile::kSpan;
#pragma unroll 2
  for (int r = row; r < kRows; r += kRowStep) {
    const bool valid = first + r < limit;
    const char* from = rows.row(valid ? first + r : first) + chunk * 16;
#pragma unroll
    for (int span = 0; span < Tile::kSpans; ++span)
      cp_async_16(address + SpanPlaces<kCols, kSpanRows>::offset(r, chunk) + span * SpanPlaces<kCols, kSpanRows>::kSpanStep,
                  from + span * Tile::kSpan * 16, valid);
  }
}

// ---- rows of O ----
// 4 x 4 words among the lanes of a quad: word j of lane q becomes word q of lane j.
JITGEN_FN void transpose_quad(unsigned (&words)[4], int lane) {
#pragma unroll
  for (int step = 2; step > 0; step /= 2)
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const int low = step == 2 ? pair : 2 * pair, high = low + step;
      const bool upper = lane & step;
      const unsigned other = __shfl_xor_sync(0xffffffffu, upper ? words[low] : words[high], step);
      (upper ? words[low] : words[high]) = other;
    }
}
// Writes the row of half kHalf that a quad holds, 16 bytes a lane; all lanes of the warp call together. `lane`: of the quad.
template <class Element, int kHalf, int kOutTiles> JITGEN_FN void store_row(const float (&o)[kOutTiles][4], char* row, int lane, bool is_row) {
  static_assert(kOutTiles % 4 == 0, "a lane of a quad takes one column tile of four");
#pragma unroll
  for (int j = 0; j < kOutTiles; j += 4) {
    unsigned words[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) words[k] = Element::pack(o[j + k][2 * kHalf], o[j + k][2 * kHalf + 1]);
    transpose_quad(words, lane);
    if (is_row) *reinterpret_cast<uint4*>(row + (j + lane) * 16) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}
// The same in float: a row that is to be merged with others.
template <int kHalf, int kOutTiles> JITGEN_FN void store_float_row(const float (&o)[kOutTiles][4], float* row, int lane, bool is_row) {
  if (!is_row) return;
#pragma unroll
  for (int j = 0; j < kOutTiles; ++j)
    *reinterpret_cast<float2*>(row + 8 * j + 2 * lane) = make_float2(o[j][2 * kHalf], o[j][2 * kHalf + 1]);
}

// ---- pages ----
// Where K and V of a key are, in bytes from row 0 of page 0; negative: nowhere.
struct alignas(16) KeyPlace { long long k, v; };
constexpr int kNoPage = -1;

// Page of a key, kNoPage behind the last one. A list may have negative numbers itself, for pages that a mask hides.
JITGEN_FN int look_up_page(const int* pages, const Divisor& page_size, int key, int kv_len) {
  return key < kv_len ? __ldg(pages + page_size.divide(key)) : kNoPage;
}
// Strides in elements.
struct PageStrides { long long k_page, k_row, v_page, v_row; };
JITGEN_FN KeyPlace place_key(int page, const Divisor& page_size, int key, const PageStrides& strides) {
  if (page < 0) return {-1, -1};
  const int inside = key - page_size.divide(key) * static_cast<int>(page_size.value);
  return {(page * strides.k_page + inside * strides.k_row) * 2, (page * strides.v_page + inside * strides.v_row) * 2};
}

JITGEN_FN void store_place(unsigned address, const KeyPlace& place) {
  asm volatile("st.shared.v2.b64 [%0], {%1, %2};" ::"r"(address), "l"(place.k), "l"(place.v) : "memory");
}
JITGEN_FN long long load_shared_64(unsigned address) {
  long long value;
  asm volatile("ld.shared.b64 %0, [%1];" : "=l"(value) : "r"(address) : "memory");
  return value;
}

// TileCopy for keys in pages: `places` is the shared-memory address of the first row's place in K, or in V. Rows that are
// nowhere become zero.
template <int kCols, int kThreads, int kSpanRows = 0> struct PagedCopy {
  using Tile = SwizzledTile<kCols>;
  using Places = SpanPlaces<kCols, kSpanRows>;
  static constexpr int kRowStep = kThreads / Tile::kSpan;
  static_assert(kRowStep % 8 == 0, "rows of one thread must share the swizzle");

  const char* src;   // this thread's chunk in row 0 of page 0
  int dst, row;

  JITGEN_FN PagedCopy(const void* base, int thread) : row(thread / Tile::kSpan) {
    const int chunk = thread % Tile::kSpan;
    src = static_cast<const char*>(base) + chunk * 16;
    dst = Places::offset(row, chunk);
  }
  template <int kRows> JITGEN_FN void start(unsigned address, unsigned places) const {
    static_assert(kRows % kRowStep == 0, "every thread copies the same number of rows");
    const unsigned to = address + stay(dst), mine = places + stay(row) * static_cast<int>(sizeof(KeyPlace));
#pragma unroll
    for (int i = 0; i < kRows / kRowStep; ++i) {
      const long long offset = load_shared_64(mine + i * kRowStep * sizeof(KeyPlace));
      const char* from = src + offset;
#pragma unroll
      for (int span = 0; span < Tile::kSpans; ++span)
        cp_async_16(to + i * kRowStep * Places::kPitch + span * Places::kSpanStep, from + span * Tile::kSpan * 16, offset >= 0);
    }
  }
};

// ---- partial results ----
// O and the softmax of a piece of an item as the threads hold them, 16 bytes at a time: for each 16-row tile the kOutTiles
// quads of O, then {row_max, row_sum}, or kStateQuads of another state. A warp of the merge takes one 16-row tile.
template <int kRowTiles, int kOutTiles, int kThreads, int kStateQuads = 1> struct Partial {
  static constexpr int kTileQuads = kOutTiles + kStateQuads;
  static constexpr long long kQuads = static_cast<long long>(kRowTiles) * kTileQuads * kThreads;   // of a slot

  static JITGEN_FN float4* quad(void* workspace, int slot, int i, int j, int thread) {
    return static_cast<float4*>(workspace) + slot * kQuads + (i * kTileQuads + j) * kThreads + thread;
  }
  static JITGEN_FN void store(void* workspace, int slot, int thread, const float (&o)[kRowTiles][kOutTiles][4], const OnlineSoftmax<kRowTiles>& softmax) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kOutTiles; ++j)
        *quad(workspace, slot, i, j, thread) = make_float4(o[i][j][0], o[i][j][1], o[i][j][2], o[i][j][3]);
      *quad(workspace, slot, i, kOutTiles, thread) =
          make_float4(softmax.row_max[i][0], softmax.row_max[i][1], softmax.row_sum[i][0], softmax.row_sum[i][1]);
    }
  }
  // Adds column tiles from `first` on of row tile i of a piece to what `o` and `softmax` hold of other keys.
  template <int kTiles>
  static JITGEN_FN void add(void* workspace, int slot, int i, int first, int thread, float (&o)[1][kTiles][4], OnlineSoftmax<1>& softmax, float units) {
    const float4 state = *quad(workspace, slot, i, kOutTiles, thread);
    const float piece_max[2] = {state.x, state.y}, piece_sum[2] = {state.z, state.w};
    float old[2], fresh[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float before = softmax.row_max[0][half], now = ::fmaxf(before, piece_max[half]);
      const float shift = now == -INFINITY ? 0.0f : now * units;   // a row without keys so far: weights 0, not NaN
      old[half] = exp2(before * units - shift);
      fresh[half] = exp2(piece_max[half] * units - shift);
      softmax.row_max[0][half] = now;
      softmax.row_sum[0][half] = softmax.row_sum[0][half] * old[half] + piece_sum[half] * fresh[half];
    }
    add_output(workspace, slot, i, first, thread, o, old, fresh);
  }
  // O times `old`, and of the piece times `fresh`, by halves.
  template <int kTiles>
  static JITGEN_FN void add_output(void* workspace, int slot, int i, int first, int thread, float (&o)[1][kTiles][4], const float (&old)[2], const float (&fresh)[2]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const float4 part = *quad(workspace, slot, i, first + j, thread);
      o[0][j][0] = o[0][j][0] * old[0] + part.x * fresh[0];
      o[0][j][1] = o[0][j][1] * old[0] + part.y * fresh[0];
      o[0][j][2] = o[0][j][2] * old[1] + part.z * fresh[1];
      o[0][j][3] = o[0][j][3] * old[1] + part.w * fresh[1];
    }
  }
};

// The same of a norm, whose State is a struct of floats: those of the two rows of a thread, one after the other.
template <class State, int kRowTiles, int kOutTiles, int kThreads>
struct NormPartial : Partial<kRowTiles, kOutTiles, kThreads, (2 * static_cast<int>(sizeof(State) / 4) + 3) / 4> {
  static constexpr int kValues = sizeof(State) / 4, kStateQuads = (2 * kValues + 3) / 4;
  using Base = Partial<kRowTiles, kOutTiles, kThreads, kStateQuads>;

  static JITGEN_FN void store(void* workspace, int slot, int thread, const float (&o)[kRowTiles][kOutTiles][4], const State (&state)[kRowTiles][2]) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kOutTiles; ++j)
        *Base::quad(workspace, slot, i, j, thread) = make_float4(o[i][j][0], o[i][j][1], o[i][j][2], o[i][j][3]);
      float values[4 * kStateQuads + 1] = {};   // the last one only so that there is one
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < kValues; ++n) values[half * kValues + n] = reinterpret_cast<const float*>(&state[i][half])[n];
#pragma unroll
      for (int j = 0; j < kStateQuads; ++j)
        *Base::quad(workspace, slot, i, kOutTiles + j, thread) = make_float4(values[4 * j], values[4 * j + 1], values[4 * j + 2], values[4 * j + 3]);
    }
  }
  // The states of the two rows that a thread has of row tile i.
  static JITGEN_FN void load_states(void* workspace, int slot, int i, int thread, State (&state)[2]) {
    float values[4 * kStateQuads + 1];
#pragma unroll
    for (int j = 0; j < kStateQuads; ++j) {
      const float4 quad = *Base::quad(workspace, slot, i, kOutTiles + j, thread);
      values[4 * j] = quad.x, values[4 * j + 1] = quad.y, values[4 * j + 2] = quad.z, values[4 * j + 3] = quad.w;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < kValues; ++n) reinterpret_cast<float*>(&state[half])[n] = values[half * kValues + n];
  }
};

}  // namespace jg
