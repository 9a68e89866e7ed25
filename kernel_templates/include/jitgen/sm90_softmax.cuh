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
// Whether update_maximum has anything to do: whether a row has no maximum yet, or a logit may exceed it by more than kSlack. Most
// tiles raise none. Positive floats compare as integers do, negative ones stay below every positive limit, and the integer
// maximum takes three operands: half the instructions of update_maximum, and no shuffle (8 % of hd64, 2 to 3 % of hd128).
// `shift` is set as update_maximum would leave it.
template <int kSlack, bool kOffset, int kColTiles>
JITGEN_FN bool may_rise_from(const RowSoftmax& state, const float (&s)[kColTiles][4], float units, const float (&offset)[2], float (&shift)[2]) {
  bool rises = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float origin = kOffset ? state.row_max[half] - offset[half] : state.row_max[half], limit = origin + kSlack * reciprocal(units);
    shift[half] = origin * units;
    int top = 0;
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) top = max(max(top, __float_as_int(s[j][2 * half])), __float_as_int(s[j][2 * half + 1]));
    rises |= !(limit > 0.0f) | (top > __float_as_int(limit));
  }
  return __any_sync(0xffffffffu, rises);
}
template <int kSlack, int kColTiles>
JITGEN_FN bool may_rise(const RowSoftmax& state, const float (&s)[kColTiles][4], float units, float (&shift)[2]) {
  const float none[2] = {0.0f, 0.0f};
  return may_rise_from<kSlack, false>(state, s, units, none, shift);
}
template <int kSlack, int kColTiles>
JITGEN_FN bool may_rise(const RowSoftmax& state, const float (&s)[kColTiles][4], float units, const float (&offset)[2], float (&shift)[2]) {
  return may_rise_from<kSlack, true>(state, s, units, offset, shift);
}

// Logits become weights. All by the exp2 unit: polynomials for some, as other kernels have them, cost more issue slots than
// the unit is short of (one in eight: 2 to 5 % slower for every head dim, 1 % with a soft cap).
template <int kColTiles>
JITGEN_FN void weigh_columns(RowSoftmax& state, float (&s)[kColTiles][4], float units, const float (&shift)[2]) {
#pragma unroll
  for (int j = 0; j < kColTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[j][e] = exp2(::fmaf(s[j][e], units, -shift[e / 2]));
      state.row_sum[e / 2] += s[j][e];
    }
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
