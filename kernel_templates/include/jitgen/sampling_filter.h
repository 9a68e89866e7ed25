// Filters of a row and the order in which they are tried: top-k, top-p, min-p and their combinations, on CPU and GPU.
//
// Row: kProbs; measure results Measure {top, total}, Mass {total}, Pick {token, value};
// evaluate(pivots, hi, counts, f, least), mass_from(threshold), mass_above(x, count), whole_mass(measure),
// draw(mass, threshold, u), announce(pick). kRanks: rank_largest<kAll>(k) and what draw_ranked uses of `ranked`.
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
constexpr int kTries = 6;   // draws from a row before the threshold is searched

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
  JITGEN_METHOD float search(Bracket bracket, float target, bool counts) const {
    target = max(target, kLeastTarget);
#pragma unroll 1
    for (int round = 0; round < kMaxRounds && is_open(bracket); ++round) {
      const Pivots pivots = choose_pivots<Row::kProbs>(bracket, target, measure.top, round);
      float f[kPivots], least[kPivots];
      row.evaluate(pivots, bracket.hi, counts, f, least);
      for (int i = 0; i < kPivots; ++i) f[i] += bracket.f_hi;
      narrow_bracket(bracket, target, pivots, f, least);
    }
    return bracket.lo;
  }

  // Least value that all filters keep. `k` and `p` bracket the thresholds of top-k and top-p, where these are to be found; `kth`
  // is that of top-k where it is known, else -inf.
  JITGEN_METHOD float threshold(Bracket k, Bracket p, bool search_k, bool search_p, float kth) const {
    float total = measure.total;
#pragma unroll 1
    for (int filter = Set::kTopK ? 0 : 1; filter < (Set::kTopP ? 2 : 1); ++filter) {   // one loop: half of the code
      const bool counts = filter == 0;
      if (counts ? search_k : search_p) {
        const float found = search(counts ? k : p, counts ? static_cast<float>(filters.top_k) : filters.top_p * total, counts);
        kth = max(kth, found);
      }
      if (Set::kTopKFirst && Set::kTopP && counts && search_p && kth > -INFINITY) {
        total = row.mass_from(kth).total;
        p.lo = kth;
        p.f_lo = total;
      }
    }
    if (has_min_p()) kth = max(kth, min_p_threshold());
    return min(kth, measure.top);
  }
  JITGEN_METHOD float threshold() const {
    if (filters.greedy) return measure.top;
    float kth = -INFINITY;
    if constexpr (Row::kRanks)
      if (has_top_k() && row.template rank_largest<true>(filters.top_k)) kth = row.ranked->value(filters.top_k - 1);
    return threshold(whole(static_cast<float>(vocab)), whole(measure.total), has_top_k() && kth == -INFINITY, has_top_p(), kth);
  }

  // The draw from a list of the largest values, of which top-k keeps the first.
  JITGEN_METHOD typename Row::Pick draw_ranked(double uniform) const {
    typename Row::Pick pick = {row.team.rank == 0 && row.team.warp == 0, 0, 0.0f};
    if (!pick.known) return pick;
    row.ranked->add_up([&](float x) { return row.weight(x); });
    float least = row.ranked->value(filters.top_k - 1);
    const double total = Set::kTopKFirst ? row.ranked->mass_from(least) : static_cast<double>(measure.total);
    if (has_min_p()) least = max(least, min_p_threshold());
    if (has_top_p()) least = max(least, row.ranked->reach(max(static_cast<float>(filters.top_p * total), kLeastTarget)));
    const int count = row.ranked->count_from(min(least, measure.top));
    const auto found = row.ranked->at(uniform * row.ranked->through[count - 1], count);
    pick.token = found.token(), pick.value = found.value();
    return pick;
  }

  // Draws from the row first, if need be from what lies above the last draw. A value inside of all filters is a fair draw from
  // what they keep; one outside bounds their thresholds. After kTries the threshold is searched, and the last draw is from the
  // filtered row.
  JITGEN_METHOD typename Row::Pick sample(const double* uniforms) const {
    bool search_k = has_top_k(), search_p = has_top_p();
    if constexpr (Row::kRanks)
      if (search_k && !filters.greedy && row.template rank_largest<false>(filters.top_k)) return draw_ranked(uniforms[0]);
    Bracket k = whole(static_cast<float>(vocab)), p = whole(measure.total);
    float least = -INFINITY;
    auto mass = row.whole_mass(measure);
    const bool tries = !filters.greedy && !(Set::kTopKFirst && search_k && search_p);
#pragma unroll 1
    for (int draw = 0;; ++draw) {
      if (draw == kTries || (draw == 0 && (!tries || has_min_p()))) {
        const bool search = draw == kTries || !tries;
        least = filters.greedy ? measure.top : threshold(k, p, search && search_k, search && search_p, -INFINITY);
        mass = row.mass_from(least);
        search_k = search_k && !search, search_p = search_p && !search;
      }
      auto pick = row.draw(mass, least, uniforms[draw]);
      if (search_k || search_p) {
        row.announce(pick);
        mass = row.mass_above(pick.value, k.f_lo);
        p.f_lo = mass.total;
        search_k = search_k && k.f_lo >= static_cast<float>(filters.top_k);
        search_p = search_p && p.f_lo >= filters.top_p * measure.total;
      }
      if (!search_k && !search_p) return pick;
      k.lo = p.lo = least = next_up(pick.value);
    }
  }
};

}  // namespace jg
