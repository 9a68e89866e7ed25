// Softmax, P and O on wgmma accumulators (layout: sm90_wgmma.cuh). Row views for hooks come from sm80_softmax.cuh: the
// accumulators of a warp are the same in both families.
#pragma once
#include "jitgen/sm80_softmax.cuh"
#include "jitgen/sm90_geometry.cuh"

namespace jg {

// Online softmax of the two rows of a thread. The maximum is agreed by the quad, the denominator is this thread's share.
struct RowSoftmax {
  float row_max[2], row_sum[2];

  JITGEN_FN explicit RowSoftmax(float least = -INFINITY) : row_max{least, least}, row_sum{0.0f, 0.0f} {}
  // Natural-log LSE of a row; `factor` is what its O must be multiplied by. `sink`: an extra logit without a value.
  JITGEN_FN float finish(int half, float units, float sink, float& factor) const {
    const float total = quad_sum(row_sum[half]), largest = total == 0.0f ? -INFINITY : row_max[half] * (units * kLn2), top = ::fmaxf(largest, sink);
    if (top == -INFINITY) { factor = 0.0f; return -INFINITY; }
    const float old = exp(largest - top), denominator = total * old + exp(sink - top);
    factor = old * reciprocal(denominator);
    return top + log(denominator);
  }
};

// What turns logits into exponents of two, if they are still to be multiplied by `factor`. One that is not positive would
// turn the maximum into the minimum: the logits are multiplied by it beforehand.
JITGEN_FN float exponent_units(float factor) { return factor > 0.0f ? factor * kLog2E : kLog2E; }

// For scores within +-1, to be multiplied by `factor`, and weights of the range of fp32: where no weight can reach 2^kRoom, the
// maxima of the first KV tile of a query tile are kept for good. None is below least_maximum then.
constexpr float kRoom = 80.0f, kLargestReach = 90.0f;   // exp2(kRoom - 2 * kLargestReach) is a normal number still
JITGEN_FN float reach_of(float factor) { return ::fabsf(factor) * kLog2E; }
JITGEN_FN bool keeps_maximum(float factor) { return reach_of(factor) <= kLargestReach; }
JITGEN_FN float least_maximum(float factor) {
  return keeps_maximum(factor) ? (reach_of(factor) - kRoom) * reciprocal(exponent_units(factor)) : -INFINITY;
}

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
    origin[half] = kMaybeEmpty && (kOffset ? top - offset[half] : top) * units < kHidden ? 0.0f : top;
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
// Exponents of two of a tile: x * units + addend.
struct Linear {
  float units;
  JITGEN_FN float at(float x, float addend) const { return ::fmaf(x, units, addend); }
};
// Logits become weights. All by the exp2 unit: polynomials for some, as other kernels have them, cost more issue slots than
// the unit is short of (one in eight: 2 to 5 % slower for every head dim, 1 % with a soft cap).
template <int kColTiles, class Exponents>
JITGEN_FN void weigh_columns(RowSoftmax& state, float (&s)[kColTiles][4], const Exponents& exponents, const float (&shift)[2]) {
#pragma unroll
  for (int j = 0; j < kColTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[j][e] = exp2(exponents.at(s[j][e], -shift[e / 2]));
      state.row_sum[e / 2] += s[j][e];
    }
}
template <int kColTiles>
JITGEN_FN void weigh_columns(RowSoftmax& state, float (&s)[kColTiles][4], float units, const float (&shift)[2]) {
  weigh_columns(state, s, Linear{units}, shift);
}

// The same, one row after the other: more of the multiplications find `shift` in the reuse cache, whichever registers it lies in (H200,
// kernels with half tiles: hd64 0.8 to 2 %, hd128 0.1 to 1 %; other masks 0.996 to 1.003, ALiBi 0.975).
template <int kColTiles> JITGEN_FN void weigh_rows(RowSoftmax& state, float (&s)[kColTiles][4], float units, const float (&shift)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int column = 0; column < 2 * kColTiles; ++column) {
      float& x = s[column / 2][2 * half + column % 2];
      x = exp2(::fmaf(x, units, -shift[half]));
      state.row_sum[half] += x;
    }
}

// Logits become exponents of two, and these weights.
template <int kColTiles> JITGEN_FN void make_exponents(float (&s)[kColTiles][4], float units, const float (&shift)[2]) {
#pragma unroll
  for (int j = 0; j < kColTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) s[j][e] = ::fmaf(s[j][e], units, -shift[e / 2]);
}
template <int kColTiles> JITGEN_FN void weigh_exponents(RowSoftmax& state, float (&s)[kColTiles][4]) {
#pragma unroll
  for (int j = 0; j < kColTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) state.row_sum[e / 2] += s[j][e] = exp2(s[j][e]);
}

// A soft cap: what becomes of a tile's logits x is tanh(scale * x). The unit that has tanh has the exponentials too, and both
// together take as long as the products: where no logit of a warp is near the cap, it is a polynomial.
struct Cap {
  static constexpr float kLow = 0.4f, kMiddle = 0.75f;   // to there the polynomials are as good as tanh.approx: 2^-11, 2^-12
  float scale;
  bool is_low;                                 // |scale * x| is at most kLow in the whole warp
  bool stays = false;                          // no maximum rises by this tile: exponents are made at once, as
  float weight = 1.0f, shift[2] = {0.0f, 0.0f};   // weight * tanh(scale * x) - shift

  template <int kColTiles> JITGEN_FN Cap(const float (&s)[kColTiles][4], float scale) : scale(scale), is_low(is_within(s, kLow)) {}
  // Compared one by one: that reads one register an element and writes none, where the products in flight leave few ports of the
  // register file. A scale whose powers are no normal numbers takes tanh.
  template <int kColTiles> JITGEN_FN bool is_within(const float (&s)[kColTiles][4], float limit) const {
    const float size = ::fabsf(scale), most = size > 1e-7f && size < 1e7f ? limit * reciprocal(size) : -1.0f;
    bool beyond[4] = {false, false, false, false};
#pragma unroll
    for (int j = 0; j < kColTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) beyond[e] |= ::fabsf(s[j][e]) > most;
    return JITGEN_FAST_TANH && !__any_sync(0xffffffffu, beyond[0] | beyond[1] | beyond[2] | beyond[3]);
  }
  // Finds whether the maxima stay; logits are to be multiplied by `factor` once they are capped. kBounded: weights have the range of
  // fp32 (keeps_maximum).
  template <int kSlack, bool kBounded> JITGEN_FN void settle(const RowSoftmax& state, float factor) {
    const float units = exponent_units(factor), least = ::fminf(state.row_max[0], state.row_max[1]) * units + kSlack;
    stays = (kBounded && keeps_maximum(factor)) || __all_sync(0xffffffffu, (is_low ? kLow : 1.0f) * reach_of(factor) <= least);
    if (!stays) return;
    weight = factor * kLog2E;
    shift[0] = state.row_max[0] * units, shift[1] = state.row_max[1] * units;
  }
  JITGEN_FN float first() const { return weight * scale; }
  JITGEN_FN float third() const { return weight * scale * scale * scale; }
  // The polynomial up to kLow.
  struct Cubic {
    float a, b;
    JITGEN_FN explicit Cubic(const Cap& cap) : a(cap.first() * 0.99960173f), b(cap.third() * -0.31317315f) {}
    JITGEN_FN float at(float x, float shift) const { return ::fmaf(x, ::fmaf(x * x, b, a), -shift); }
  };
};
template <int kColTiles> JITGEN_FN void cap_logits(float (&s)[kColTiles][4], const Cap& cap) {
  const auto bend = [&](auto bent) {
#pragma unroll
    for (int j = 0; j < kColTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j][e] = bent(s[j][e], cap.shift[e / 2]);
  };
  if (cap.is_low) {
    const Cap::Cubic cubic(cap);
    bend([&](float x, float shift) { return cubic.at(x, shift); });
  } else if (cap.is_within(s, Cap::kMiddle)) {
    const float a = cap.first() * 0.99978514f, b = cap.third() * -0.32629587f, c = cap.third() * cap.scale * cap.scale * 0.09735367f;
    bend([=](float x, float shift) {
      const float square = x * x;
      return ::fmaf(x, ::fmaf(square, ::fmaf(square, c, b), a), -shift);
    });
  } else {
    bend([&](float x, float shift) { return ::fmaf(tanh(x * cap.scale), cap.weight, -shift); });
  }
}
// Logits far from the cap to weights, where the maxima stay: the polynomial runs under the exponentials.
template <int kColTiles> JITGEN_FN void weigh_low(RowSoftmax& state, float (&s)[kColTiles][4], const Cap& cap) {
  const Cap::Cubic cubic(cap);
#pragma unroll
  for (int j = 0; j < kColTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) state.row_sum[e / 2] += s[j][e] = exp2(cubic.at(s[j][e], cap.shift[e / 2]));
}

// A tile of a captured tensor, 64 rows of elements T as the copy engine writes them, each to where wgmma has that element of S.
// `row`: the first of the warp's 16.
template <class T, int kColTiles, class Evaluate>
JITGEN_FN void fill_tile(float (&s)[kColTiles][4], unsigned address, int row, int lane, Evaluate evaluate) {
  using Copied = SpanTile<8 * kColTiles>;
  constexpr int kSteps = Copied::kSpan / 16;
  const unsigned first = address + Copied::chunk_offset(row + (lane & 15), lane >> 4, 64);
#pragma unroll
  for (int step = 0; step < kColTiles / 2; ++step) {
    unsigned words[4];
    load_matrix(words, (first ^ step % kSteps * 32) + step / kSteps * 64 * Copied::kSpanBytes);
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) s[2 * step + r / 2][r % 2 * 2 + odd] = evaluate(Pair<T>{words[r]}.at(odd));
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
// Writes a packed 64-row tile of a warp group to shared memory in the layout of the copy engine and of wgmma. The swizzle makes
// the addresses of a span differ in single bits: they are worked out here, and only the first takes a register through the KV loop.
template <int kCols> JITGEN_FN void store_tile(unsigned address, const unsigned (*p)[4], int warp, int lane) {
  constexpr int kSteps = SpanTile<kCols>::kSpan / 16;
  const unsigned first = stay(static_cast<int>(address + SpanTile<kCols>::chunk_offset(warp * 16 + (lane & 15), lane >> 4, 64)));
#pragma unroll
  for (int step = 0; step < kCols / 16; ++step)
    store_matrix((first ^ step % kSteps * 32) + step / kSteps * 64 * SpanTile<kCols>::kSpanBytes, p[step]);
}

}  // namespace jg
