// Softmax, P and O on wgmma accumulators (layout: sm90_wgmma.cuh). Row views for hooks come from sm80_softmax.cuh: the
// accumulators of a warp are the same in both families.
#pragma once
#include "jitgen/sm80_softmax.cuh"
#include "jitgen/sm90_geometry.cuh"

namespace jg {

// Online softmax of the two rows of a thread. The maximum is agreed by the quad, the denominator is this thread's share.
struct RowSoftmax {
  float row_max[2], row_sum[2];

  JITGEN_FN RowSoftmax() : row_max{-INFINITY, -INFINITY}, row_sum{0.0f, 0.0f} {}
  // Natural-log LSE of a row; `factor` is what its O must be multiplied by. `sink`: an extra logit without a value.
  JITGEN_FN float finish(int half, float units, float sink, float& factor) const {
    const float largest = row_max[half] * (units * kLn2), total = quad_sum(row_sum[half]), top = ::fmaxf(largest, sink);
    if (top == -INFINITY) { factor = 0.0f; return -INFINITY; }
    const float old = exp(largest - top), denominator = total * old + exp(sink - top);
    factor = old * reciprocal(denominator);
    return top + log(denominator);
  }
};

// What turns logits into exponents of two, if they are still to be multiplied by `factor`. One that is not positive would
// turn the maximum into the minimum: the logits are multiplied by it beforehand.
JITGEN_FN float exponent_units(float factor) { return factor > 0.0f ? factor * kLog2E : kLog2E; }

// Brings the maximum of both rows up to date; returns whether one moved in any row of the warp. `shift` is what exponents
// are measured from, `factor` what O so far must be multiplied by.
// The old maximum is kept until the new one exceeds it by more than kSlack (in exponents of two), which spares most
// rescales of O; weights may then reach 2^kSlack. kMaybeEmpty: a row may have no finite logit, and must not yield NaN.
// kOffset: logits are to be understood as s plus the `offset` of their row in this thread.
template <bool kMaybeEmpty, int kSlack, bool kOffset, int kColTiles>
JITGEN_FN bool update_maximum_from(RowSoftmax& state, const float (&s)[kColTiles][4], float units, const float (&offset)[2],
                                   float (&shift)[2], float (&factor)[2]) {
  float before[2], origin[2];
  bool moved = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    before[half] = state.row_max[half];
    float top = kOffset ? -INFINITY : before[half];
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) top = ::fmaxf(top, ::fmaxf(s[j][2 * half], s[j][2 * half + 1]));
    if (kOffset) top = ::fmaxf(before[half], top + offset[half]);
    top = quad_max(top);
    top = (top - before[half]) * units <= kSlack ? before[half] : top;
    moved |= top != before[half];
    state.row_max[half] = top;
    origin[half] = kMaybeEmpty && top == -INFINITY ? 0.0f : top;
    shift[half] = (kOffset ? origin[half] - offset[half] : origin[half]) * units;
  }
  moved = __any_sync(0xffffffffu, moved);
  if (moved) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      factor[half] = exp2((before[half] - origin[half]) * units);   // exactly 1 where the maximum stays, 0 for the first tile
      state.row_sum[half] *= factor[half];
    }
  }
  return moved;
}
template <bool kMaybeEmpty, int kSlack, int kColTiles>
JITGEN_FN bool update_maximum(RowSoftmax& state, const float (&s)[kColTiles][4], float units, float (&shift)[2], float (&factor)[2]) {
  const float none[2] = {0.0f, 0.0f};
  return update_maximum_from<kMaybeEmpty, kSlack, false>(state, s, units, none, shift, factor);
}
template <bool kMaybeEmpty, int kSlack, int kColTiles>
JITGEN_FN bool update_maximum(RowSoftmax& state, const float (&s)[kColTiles][4], float units, const float (&offset)[2], float (&shift)[2], float (&factor)[2]) {
  return update_maximum_from<kMaybeEmpty, kSlack, true>(state, s, units, offset, shift, factor);
}
// The same for a tile in which every row has a maximum already and no logit is -inf by a mask; `s` is left as exponents of two.
// A new maximum is rare, so all that is asked of most tiles is whether an exponent exceeds kSlack: exponents compare as integers
// where it matters, and the integer maximum takes three operands (7 to 10 % of the loop of hd128 and hd64).
template <int kSlack, bool kOffset, int kColTiles>
JITGEN_FN bool lift_maximum_from(RowSoftmax& state, float (&s)[kColTiles][4], float units, const float (&offset)[2], float (&factor)[2]) {
  float shift[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) shift[half] = (kOffset ? state.row_max[half] - offset[half] : state.row_max[half]) * units;
  int top = __float_as_int(0.0f);
#pragma unroll
  for (int j = 0; j < kColTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      s[j][e] = ::fmaf(s[j][e], units, -shift[e / 2]);
      s[j][e + 1] = ::fmaf(s[j][e + 1], units, -shift[e / 2]);
      top = max(max(top, __float_as_int(s[j][e])), __float_as_int(s[j][e + 1]));
    }
  const bool moved = __any_sync(0xffffffffu, top > __float_as_int(static_cast<float>(kSlack)));
  if (moved) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float rise = 0.0f;
#pragma unroll
      for (int j = 0; j < kColTiles; ++j) rise = ::fmaxf(rise, ::fmaxf(s[j][2 * half], s[j][2 * half + 1]));
      rise = quad_max(rise);
      const float before = state.row_max[half], now = rise > kSlack ? before + rise * reciprocal(units) : before;
      const float lifted = (now - before) * units;
      state.row_max[half] = now;
#pragma unroll
      for (int j = 0; j < kColTiles; ++j) s[j][2 * half] -= lifted, s[j][2 * half + 1] -= lifted;
      factor[half] = exp2(-lifted);
      state.row_sum[half] *= factor[half];
    }
  }
  return moved;
}
template <int kSlack, int kColTiles> JITGEN_FN bool lift_maximum(RowSoftmax& state, float (&s)[kColTiles][4], float units, float (&factor)[2]) {
  const float none[2] = {0.0f, 0.0f};
  return lift_maximum_from<kSlack, false>(state, s, units, none, factor);
}
template <int kSlack, int kColTiles>
JITGEN_FN bool lift_maximum(RowSoftmax& state, float (&s)[kColTiles][4], float units, const float (&offset)[2], float (&factor)[2]) {
  return lift_maximum_from<kSlack, true>(state, s, units, offset, factor);
}
// Whether every row of the warp has a maximum.
JITGEN_FN bool is_settled(const RowSoftmax& state) {
  return !__any_sync(0xffffffffu, (state.row_max[0] == -INFINITY) | (state.row_max[1] == -INFINITY));
}

// ---- weights ----
// Logits become exponents of two, and those weights. All by the exp2 unit: polynomials for some, as other kernels have them, cost
// more issue slots than the unit is short of (one in eight: 2 to 5 % slower for every head dim; with a soft cap 1 %).
template <int kColTiles> JITGEN_FN void measure_exponents(float (&s)[kColTiles][4], float units, const float (&shift)[2]) {
#pragma unroll
  for (int j = 0; j < kColTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) s[j][e] = ::fmaf(s[j][e], units, -shift[e / 2]);
}
template <int kColTiles> JITGEN_FN void weigh_exponents(RowSoftmax& state, float (&s)[kColTiles][4]) {
#pragma unroll
  for (int j = 0; j < kColTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[j][e] = exp2(s[j][e]);
      state.row_sum[e / 2] += s[j][e];
    }
}
template <int kColTiles> JITGEN_FN void weigh_columns(RowSoftmax& state, float (&s)[kColTiles][4], float units, const float (&shift)[2]) {
  measure_exponents(s, units, shift);
  weigh_exponents(state, s);
}

template <int kColTiles> JITGEN_FN void scale_logits(float (&s)[kColTiles][4], float scale) {
#pragma unroll
  for (int j = 0; j < kColTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) s[j][e] *= scale;
}
// Logits of columns at or past `limit` (counted like first_kv, the column of element 0) never count.
template <int kColTiles> JITGEN_FN void mask_tail(float (&s)[kColTiles][4], int first_kv, int limit) {
#pragma unroll
  for (int j = 0; j < kColTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (8 * j + e % 2 >= limit - first_kv) s[j][e] = -INFINITY;
}
// O *= factor by rows.
template <int kOutTiles> JITGEN_FN void rescale_output(float (&o)[kOutTiles][4], const float (&factor)[2]) {
#pragma unroll
  for (int j = 0; j < kOutTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) o[j][e] *= factor[e / 2];
}
// Accumulators as 16-bit A operands: no shuffle, the layouts agree.
template <class Element, int kColTiles> JITGEN_FN void pack_tile(unsigned (&p)[kColTiles / 2][4], const float (&s)[kColTiles][4]) {
#pragma unroll
  for (int step = 0; step < kColTiles / 2; ++step)
#pragma unroll
    for (int r = 0; r < 4; ++r) p[step][r] = Element::pack(s[2 * step + r / 2][r % 2 * 2], s[2 * step + r / 2][r % 2 * 2 + 1]);
}
// Writes a packed 64-row tile of a warp group to shared memory in the layout of the copy engine and of wgmma.
template <int kCols> JITGEN_FN void store_tile(unsigned address, const unsigned (*p)[4], int warp, int lane) {
#pragma unroll
  for (int step = 0; step < kCols / 16; ++step)
    store_matrix(address + SpanTile<kCols>::chunk_offset(warp * 16 + (lane & 15), 2 * step + (lane >> 4), 64), p[step]);
}

}  // namespace jg
