// Filters of a row and the order in which they are tried: top-k, top-p, min-p and their combinations, on CPU and GPU.
//
// Row: kProbs; measure results Measure {top, total}, Mass {total}, Pick {token, value};
// evaluate<kCount>(pivots, hi, f, least), mass_from(threshold), rank_of(x, count, mass), whole_mass(measure),
// draw(mass, threshold, u), announce(pick).
#pragma once

#include "jitgen/sampling_search.h"

#ifdef __CUDACC__
#define JITGEN_METHOD __device__ __forceinline__
#else
#define JITGEN_METHOD inline __attribute__((always_inline))
#endif

namespace jg {

constexpr float kLeastPositive = 1.40129846e-45f;
constexpr float kLeastTarget = 1.17549435e-38f;   // a target of 0 keeps the largest value

// Parameters of one row. A filter that keeps everything is off: top_k >= vocab, top_p >= 1, min_p <= 0.
struct RowFilters {
  int top_k;
  float top_p, min_p;
  bool greedy;         // only the largest value
};

// The filters of a row, from a kernel's arguments.
template <class Args> JITGEN_FN RowFilters row_filters(const Args& args, int row, float temperature) {
  RowFilters f;
  f.top_k = args.top_k ? args.top_k[row] : static_cast<int>(args.top_k_value);
  if (f.top_k <= 0) f.top_k = static_cast<int>(args.vocab);
  f.top_p = args.top_p ? args.top_p[row] : static_cast<float>(args.top_p_value);
  f.min_p = args.min_p ? args.min_p[row] : static_cast<float>(args.min_p_value);
  f.greedy = !(temperature > 0.0f);
  return f;
}

// Which filters a kernel has, and whether top-p counts from what top-k left.
template <bool kTopK_, bool kTopP_, bool kMinP_, bool kTopKFirst_> struct FilterSet {
  static constexpr bool kTopK = kTopK_, kTopP = kTopP_, kMinP = kMinP_, kTopKFirst = kTopKFirst_;
};

template <class Set, class Row> struct Filtering {
  Row& row;
  const typename Row::Measure& measure;
  const RowFilters filters;
  const int vocab;

  JITGEN_METHOD bool has_top_k() const { return Set::kTopK && filters.top_k < vocab; }
  JITGEN_METHOD bool has_top_p() const { return Set::kTopP && filters.top_p < 1.0f; }
  JITGEN_METHOD bool has_min_p() const { return Set::kMinP && filters.min_p > 0.0f; }
  JITGEN_METHOD bool keeps_all() const { return !(has_top_k() || has_top_p() || has_min_p() || filters.greedy); }

  // Least value that min-p keeps, never above the largest.
  JITGEN_METHOD float min_p_threshold() const {
    const float share = min(filters.min_p, 1.0f);
    return Row::kProbs ? share * measure.top : measure.top + log2(share) * kLn2;
  }
  JITGEN_METHOD Bracket whole(float f_lo) const {
    return {Row::kProbs ? kLeastPositive : kLowest, next_up(measure.top), f_lo, 0.0f, false};
  }

  // The largest value of the row with F(value) >= target, F counting values or adding up their weights.
  template <bool kCount> JITGEN_METHOD float search(Bracket bracket, float target) const {
    target = max(target, kLeastTarget);
#pragma unroll 1
    for (int round = 0; round < kMaxRounds && is_open(bracket); ++round) {
      const Pivots pivots = choose_pivots<Row::kProbs>(bracket, target, measure.top, round);
      float f[kPivots], least[kPivots];
      row.template evaluate<kCount>(pivots, bracket.hi, f, least);
      for (int i = 0; i < kPivots; ++i) f[i] += bracket.f_hi;
      narrow_bracket(bracket, target, pivots, f, least);
    }
    return bracket.lo;
  }

  // Least value that all filters keep. `k` and `p` bracket the thresholds of top-k and top-p, where these are to be found.
  JITGEN_METHOD float threshold(Bracket k, Bracket p, bool search_k, bool search_p) const {
    float least = has_min_p() ? min_p_threshold() : -INFINITY, total = measure.total;
    if (Set::kTopK && search_k) {
      const float kth = search<true>(k, static_cast<float>(filters.top_k));
      if (Set::kTopKFirst && Set::kTopP && search_p) {
        total = row.mass_from(kth).total;
        p.lo = kth;
        p.f_lo = total;
      }
      least = max(least, kth);
    }
    if (Set::kTopP && search_p) least = max(least, search<false>(p, filters.top_p * total));
    return min(least, measure.top);
  }
  JITGEN_METHOD float threshold() const {
    if (filters.greedy) return measure.top;
    return threshold(whole(static_cast<float>(vocab)), whole(measure.total), has_top_k(), has_top_p());
  }

  // Draws from the whole row first. A value inside of all filters is a fair draw from what they keep; one outside tells where
  // to look for the threshold, and the second draw is from the filtered row. Two uniform numbers are always enough.
  JITGEN_METHOD typename Row::Pick sample(const double* uniforms) const {
        Bracket k = whole(static_cast<float>(vocab)), p = whole(measure.total);
    bool search_k = has_top_k(), search_p = has_top_p();
    if (!filters.greedy && !(Set::kTopKFirst && search_k && search_p)) {
      auto pick = row.draw(row.whole_mass(measure), -INFINITY, uniforms[0]);
      if (keeps_all()) return pick;
      row.announce(pick);
      if (!has_min_p() || pick.value >= min(min_p_threshold(), measure.top)) {
        if (search_k || search_p) row.rank_of(pick.value, k.f_lo, p.f_lo);
        search_k = search_k && k.f_lo >= static_cast<float>(filters.top_k);
        search_p = search_p && p.f_lo >= filters.top_p * measure.total;
        if (!search_k && !search_p) return pick;
        k.lo = p.lo = next_up(pick.value);
      }
    }
    const float least = filters.greedy ? measure.top : threshold(k, p, search_k, search_p);
    return row.draw(row.mass_from(least), least, uniforms[1]);
  }
};

}  // namespace jg
