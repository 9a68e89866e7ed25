// Online softmax on accumulator fragments (Milakov and Gimelshein 2018), and the row view that norm and output hooks see.
//
// Legend: a thread holds rows group and group + 8 of each 16-row tile; element e of column tile j is row half e / 2,
// column 8 j + 2 quad + e % 2. "Units": what the logits are multiplied by to become exponents of two.
#pragma once
#include "jitgen/sm80_ptx.cuh"

namespace jg {

template <int kRowTiles, int kTiles> JITGEN_FN void scale_rows(float (&x)[kRowTiles][kTiles][4], const float (&factor)[kRowTiles][2]) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[i][j][e] *= factor[i][e / 2];
}

// Logits are to be understood as what a tile holds plus the offset of their row in this thread.
struct NoOffsets {};
JITGEN_FN float with_offset(float x, NoOffsets, int, int) { return x; }
template <int kRowTiles> JITGEN_FN float with_offset(float x, const float (&offsets)[kRowTiles][2], int i, int half) { return x + offsets[i][half]; }

// Row maximum and denominator of the rows of one thread. The maximum is agreed by the quad at every tile, the
// denominator stays a partial sum of the thread's own columns until `finish`.
template <int kRowTiles> struct OnlineSoftmax {
  float row_max[kRowTiles][2];
  float row_sum[kRowTiles][2];

  JITGEN_FN void init() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) row_max[i][0] = row_max[i][1] = -INFINITY, row_sum[i][0] = row_sum[i][1] = 0.0f;
  }
  // Largest logit of a row of the tile.
  template <int kColTiles, class Offsets = NoOffsets>
  JITGEN_FN float top_of(const float (&s)[kRowTiles][kColTiles][4], int i, int half, const Offsets& offsets = {}) const {
    float top = ::fmaxf(s[i][0][2 * half], s[i][0][2 * half + 1]);
#pragma unroll
    for (int j = 1; j < kColTiles; ++j) top = ::fmaxf(top, ::fmaxf(s[i][j][2 * half], s[i][j][2 * half + 1]));
    return quad_max(with_offset(top, offsets, i, half));
  }
  // What is taken from the exponents of a row: 0 where it has seen nothing.
  JITGEN_FN float shift(int i, int half, float units) const {
    return shift_from(row_max[i][half] * units);
  }
  JITGEN_FN float shift(int i, int half, float units, NoOffsets) const { return shift(i, half, units); }
  JITGEN_FN float shift(int i, int half, float units, const float (&offsets)[kRowTiles][2]) const {   // the difference is exact
    const float taken = (row_max[i][half] - offsets[i][half]) * units;
    return taken < kHidden ? -offsets[i][half] * units : taken;
  }
  // Brings the maximum of a row to `top`; returns whether it moved, and in `factor` what O must be multiplied by then. The old
  // one is kept until it is exceeded by more than kSlack (in exponents of two): most tiles leave O alone, and weights may
  // reach 2^kSlack.
  JITGEN_FN bool raise(int i, int half, float top, float units, float& factor) {
    constexpr float kSlack = 8.0f;
    const float before = row_max[i][half], now = top * units <= before * units + kSlack ? before : top;
    row_max[i][half] = now;
    factor = exp2(before * units - shift(i, half, units));
    row_sum[i][half] *= factor;
    return now != before;
  }
  // Turns the logits of a row into weights.
  template <int kColTiles, class Offsets = NoOffsets>
  JITGEN_FN void weigh(float (&s)[kRowTiles][kColTiles][4], int i, int half, float units, const Offsets& offsets = {}) {
    const float taken = shift(i, half, units, offsets);
    float tile_sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kColTiles; ++j)
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        s[i][j][e] = exp2(::fmaf(s[i][j][e], units, -taken));
        tile_sum += s[i][j][e];
      }
    row_sum[i][half] += tile_sum;
  }
  // For logits whose exponents are known to stay within +-reach, and weights of the range of fp32: the maxima of the first tile
  // of a warp are kept for good, where no weight can reach 2^kRoom then. All rows; returns as above, and sets `factor` if so.
  template <int kColTiles>
  JITGEN_FN bool raise_within(float reach, const float (&s)[kRowTiles][kColTiles][4], float (&factor)[kRowTiles][2], float units) {
    constexpr float kRoom = 80.0f, kLargestReach = 90.0f;   // exp2(kRoom - 2 * kLargestReach) is a normal number still
    const bool keeps = reach <= kLargestReach;
    if (keeps && row_max[0][0] != -INFINITY) return false;
    bool moved = false;
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
      moved |= raise(r / 2, r % 2, top_of(s, r / 2, r % 2), units, factor[r / 2][r % 2]);
      if (keeps) row_max[r / 2][r % 2] = ::fmaxf(row_max[r / 2][r % 2], (reach - kRoom) / units);
    }
    return moved;
  }
  template <int kColTiles> JITGEN_FN void weigh(float (&s)[kRowTiles][kColTiles][4], float units) {
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) weigh(s, r / 2, r % 2, units);
  }
  // A tile of logits becomes weights: returns whether a maximum moved, and what O must be multiplied by then.
  template <int kColTiles, class Offsets = NoOffsets>
  JITGEN_FN bool update(float (&s)[kRowTiles][kColTiles][4], float (&factor)[kRowTiles][2], float units, const Offsets& offsets = {}) {
    bool moved = false;
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
      moved |= raise(r / 2, r % 2, top_of(s, r / 2, r % 2, offsets), units, factor[r / 2][r % 2]);
      weigh(s, r / 2, r % 2, units, offsets);
    }
    return moved;
  }
  // The same, and O is brought to the new maxima.
  template <int kColTiles, int kOutTiles, class Offsets = NoOffsets>
  JITGEN_FN void update(float (&s)[kRowTiles][kColTiles][4], float (&o)[kRowTiles][kOutTiles][4], float units, const Offsets& offsets = {}) {
    float factor[kRowTiles][2];
    const bool moved = update(s, factor, units, offsets);
    if (__any_sync(0xffffffffu, moved)) scale_rows(o, factor);
  }
  // Denominator over the whole row; returns the natural-log LSE. `factor` is what the O row must be multiplied by.
  // `sink` is an extra logit without a value, in natural units (-inf: none).
  JITGEN_FN float finish(int i, int half, float units, float sink, float& factor) {
    const float total = quad_sum(row_sum[i][half]);
    const float largest = total == 0.0f ? -INFINITY : row_max[i][half] * (units * kLn2);   // back to natural units; -inf: no key
    const float top = ::fmaxf(largest, sink);
    const bool has_keys = top != -INFINITY;   // selected, not branched on: the rows of a thread overlap
    const float taken = has_keys ? top : 0.0f, old = exp(largest - taken), denominator = total * old + exp(sink - taken);
    factor = has_keys ? old * reciprocal(denominator) : 0.0f;
    return has_keys ? top + log(denominator) : -INFINITY;
  }
};

// Calls f with the constants 0 and 1: the row halves, where a template argument needs them.
template <int kValue> struct Constant { static constexpr int value = kValue; };
template <class F> JITGEN_FN void for_each_half(F f) { f(Constant<0>()); f(Constant<1>()); }

// One row of a fragment as norm_update, norm_finalize and output_row see it: the four lanes of a quad call together.
// kHalf picks row group (0) or group + 8 (1); kReverse visits columns from last to first.
template <int kColTiles, int kHalf, bool kReverse> struct FragmentRow {
  float (&x)[kColTiles][4];
  int first;                            // kv_idx or d of column 2 * quad
  float inclusive[2 * kColTiles];       // side buffer of cumsum, dead unless it is called

  JITGEN_FN FragmentRow(float (&x)[kColTiles][4], int first) : x(x), first(first) {}

  template <class F> JITGEN_FN void visit(F f) {   // f(element, column, position in the side buffer)
#pragma unroll
    for (int step = 0; step < 2 * kColTiles; ++step) {
      const int at = kReverse ? 2 * kColTiles - 1 - step : step, j = at / 2, c = at % 2;
      f(x[j][2 * kHalf + c], first + 8 * j + c, at);
    }
  }
  template <class F> JITGEN_FN void each(F f) { visit([&](float& e, int i, int) { f(e, i); }); }
  template <class F> JITGEN_FN float sum(F f) {
    float total = 0.0f;
    visit([&](float& e, int i, int) { total += f(e, i); });
    return quad_sum(total);
  }
  template <class F> JITGEN_FN float max(F f) {
    float top = -INFINITY;
    visit([&](float& e, int i, int) { top = ::fmaxf(top, f(e, i)); });
    return quad_max(top);
  }
  // Inclusive prefix sum in visiting order: pairs inside the lane, the quad by two exchanges, column tiles in sequence.
  template <class F> JITGEN_FN void cumsum(F f) {
    const int quad = threadIdx.x & 3, place = kReverse ? 3 - quad : quad;
    float before = 0.0f;
#pragma unroll
    for (int step = 0; step < kColTiles; ++step) {
      const int j = kReverse ? kColTiles - 1 - step : step, lead = kReverse ? 1 : 0, trail = 1 - lead;
      const float one = f(x[j][2 * kHalf + lead], first + 8 * j + lead);
      const float two = one + f(x[j][2 * kHalf + trail], first + 8 * j + trail);
      const float neighbour = quad_xor(two, 1), pair = two + neighbour;
      const float other = quad_xor(pair, 2);
      const float start = before + ((place & 1) ? neighbour : 0.0f) + ((place & 2) ? other : 0.0f);
      inclusive[2 * j + lead] = start + one;
      inclusive[2 * j + trail] = start + two;
      before += pair + other;
    }
  }
  template <class F> JITGEN_FN void each_with_cumsum(F f) {
    visit([&](float& e, int i, int at) { f(e, i, inclusive[at]); });
  }
};

}  // namespace jg
