// Rows of a tile: online softmax, and the row accessors that variant hooks use.
#pragma once

#include "jitgen/cpu_math.h"

namespace jg {

// Columns of a KV tile to visit, relative to its first key; mask_elem runs on [mask_begin, mask_end) only.
struct Columns {
  int begin, end, mask_begin, mask_end;
  bool empty() const { return begin >= end; }
};

// Columns of a tile that a query block visits. classify(first, last) gives the kind of the columns [first, last); it is
// asked for the whole tile, then panel by panel from both ends.
template <class Classify> static inline Columns visible_columns(int keys, Classify classify) {
  const int kind = classify(0, keys);
  if (kind != kTilePartial) return {0, kind == kTileNone ? 0 : keys, 0, 0};
  const auto next = [&](int j) { return j / kPanel * kPanel + kPanel < keys ? j / kPanel * kPanel + kPanel : keys; };
  const auto previous = [&](int j) { return (j - 1) / kPanel * kPanel; };
  int begin = 0, end = keys;
  while (begin < end && classify(begin, next(begin)) == kTileNone) begin = next(begin);
  while (begin < end && classify(previous(end), end) == kTileNone) end = previous(end);
  int mask_begin = begin, mask_end = end;
  while (mask_begin < mask_end && classify(mask_begin, next(mask_begin)) == kTileFull) mask_begin = next(mask_begin);
  while (mask_begin < mask_end && classify(previous(mask_end), mask_end) == kTileFull) mask_end = previous(mask_end);
  return {begin, end, mask_begin, mask_end};
}

// Running maximum and sum of one query row (Milakov & Gimelshein 2018).
struct SoftmaxState { float max = -INFINITY, sum = 0.0f; };

// Finite stand-in for the maximum of a row that has seen nothing: exp(-inf - 0) is 0, exp(-inf + inf) would be NaN.
JITGEN_FN float finite_max(float max) { return max == -INFINITY ? 0.0f : max; }

// Rows whose softmax goes on together, so that none waits for the reductions of another; a row of a tile is about 1 KiB.
constexpr int kSoftmaxRows = 16;

// Maxima of some rows in a tile -> what their logits are relative to, and the factors for what the rows have accumulated.
static inline void raise_maxima(int rows, const float* tile_max, SoftmaxState* states, float* base, float* rescale) {
#pragma omp simd
  for (int r = 0; r < rows; ++r) {
    const float before = states[r].max, max = tile_max[r] > before ? tile_max[r] : before;
    states[r].max = max;
    base[r] = finite_max(max);
    rescale[r] = exp_weight(before - base[r]);
  }
}
static inline void add_sums(int rows, const float* sum, const float* rescale, SoftmaxState* states) {
#pragma omp simd
  for (int r = 0; r < rows; ++r) states[r].sum = states[r].sum * rescale[r] + sum[r];
}

// Replaces the logits [begin, end) of up to kSoftmaxRows rows by their weights; rescale gets the factors for what the rows
// have accumulated.
template <int kLogitFloats>
static inline void softmax_rows(float* logits, int rows, int begin, int end, SoftmaxState* states, float* rescale) {
  float tile_max[kSoftmaxRows], base[kSoftmaxRows], sum[kSoftmaxRows];
  for (int r = 0; r < rows; ++r) {
    const float* row = logits + r * kLogitFloats;
    float max = -INFINITY;
#pragma omp simd reduction(max : max)
    for (int j = begin; j < end; ++j) max = row[j] > max ? row[j] : max;
    tile_max[r] = max;
  }
  raise_maxima(rows, tile_max, states, base, rescale);
  for (int r = 0; r < rows; ++r) {
    float* row = logits + r * kLogitFloats;
    const float row_base = base[r];
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int j = begin; j < end; ++j) {
      const float weight = exp_weight(row[j] - row_base);
      row[j] = weight;
      total += weight;
    }
    sum[r] = total;
  }
  add_sums(rows, sum, rescale, states);
}

// Adds a sink logit, which has weight and no value; returns the factor for the output row.
static inline float softmax_sink(float logit, SoftmaxState& state) {
  const float max = logit > state.max ? logit : state.max, base = finite_max(max);
  const float factor = exp_weight(state.max - base);
  state.sum = state.sum * factor + exp_weight(logit - base);
  state.max = max;
  return factor;
}

// What rows of two parts of the keys come to, each times a factor of its own; the sum is in `out`.
template <int kPaddedDim> static inline void add_rows(const float* part, float added, float* out, float before) {
  for (int d = 0; d < kPaddedDim; d += kVec) store_vec(out + d, load_vec(out + d) * splat(before) + load_vec(part + d) * splat(added));
}

// Adds a row of another part of the keys, not normalised, to one that is seen as the parts before it.
template <int kPaddedDim> static inline void merge_row(const float* part, SoftmaxState part_state, float* out, SoftmaxState& state) {
  const float max = part_state.max > state.max ? part_state.max : state.max, base = finite_max(max);
  const float before = exp_weight(state.max - base), added = exp_weight(part_state.max - base);
  add_rows<kPaddedDim>(part, added, out, before);
  state = {max, state.sum * before + part_state.sum * added};
}

// ln of the sum of exponentials; an empty row gives -inf.
static inline float softmax_lse(const SoftmaxState& state) {
  return state.max == -INFINITY ? -INFINITY : state.max + log(state.sum);
}

// One row as hooks see it: values[j] for j in [begin, end), index j + offset (kv_idx, or d for an output row).
template <bool kReverse> class Row {
 public:
  Row(float* values, float* scan, int begin, int end, int offset)
      : values_(values), scan_(scan), begin_(begin), end_(end), offset_(offset) {}

  template <class F> __attribute__((always_inline)) void each(F f) {
#pragma omp simd
    for (int j = begin_; j < end_; ++j) {
      float x = values_[j];
      f(x, j + offset_);
      values_[j] = x;
    }
  }
  template <class F> __attribute__((always_inline)) float sum(F f) const {
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int j = begin_; j < end_; ++j) total += f(values_[j], j + offset_);
    return total;
  }
  template <class F> __attribute__((always_inline)) float max(F f) const {
    float best = -INFINITY;
#pragma omp simd reduction(max : best)
    for (int j = begin_; j < end_; ++j) {
      const float x = f(values_[j], j + offset_);
      best = x > best ? x : best;
    }
    return best;
  }
  // Inclusive sums in visiting order, kept for each_with_cumsum.
  template <class F> __attribute__((always_inline)) void cumsum(F f) {
#pragma omp simd
    for (int j = begin_; j < end_; ++j) scan_[j] = f(values_[j], j + offset_);
    prefix_sums();
  }
  template <class F> __attribute__((always_inline)) void each_with_cumsum(F f) {
#pragma omp simd
    for (int j = begin_; j < end_; ++j) {
      float x = values_[j];
      f(x, j + offset_, scan_[j]);
      values_[j] = x;
    }
  }

 private:
  // Four chains at once hide the latency of the additions; their totals are added afterwards.
  void prefix_sums() {
    const int count = end_ - begin_, part = (count + 3) / 4;
    float* first = kReverse ? scan_ + end_ - 1 : scan_ + begin_;
    constexpr int kStep = kReverse ? -1 : 1;
    float run[4] = {};
    for (int i = 0; i < part; ++i)
      for (int c = 0; c < 4; ++c)
        if (c * part + i < count) run[c] = first[(c * part + i) * kStep] += run[c];
    float before = 0.0f;
    for (int c = 1; c < 4; ++c) {
      before += run[c - 1];
#pragma omp simd
      for (int i = c * part; i < (c + 1) * part; ++i)
        if (i < count) first[i * kStep] += before;
    }
  }

  float *values_, *scan_;
  int begin_, end_, offset_;
};

}  // namespace jg
