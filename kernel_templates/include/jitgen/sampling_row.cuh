// One row of logits or probabilities, shared out over a team: passes over it, thresholds, and draws from what is left.
//
// The row is read from memory once. Filters need further passes, so each CTA keeps its slice in shared memory as float32; what
// does not fit is read again. Without filters the row streams through. A thread owns every kThreads-th group of kGroup values
// of a slice, and the cumulative distribution runs over slices, threads and their values in that order, whatever the batch.
#pragma once

#include "jitgen/sampling_team.cuh"
#include "jitgen/sampling_filter.h"
#include "jitgen/sampling_memory.cuh"
#include "jitgen/sampling_random.h"
#include "jitgen/sampling_ranked.cuh"

namespace jg {

// ---- what a row holds ----
constexpr float kLeastTop = -2.3e38f;   // a row of which no logit reaches this is masked, be it with the least float

// Source: kGroup values are a group, kAhead groups are in flight; fetch(first) -> Raw; decode(Raw, first, float (&)[kGroup])
// with kAbsent for what lies past the row; one(token).
// kRanks_: the maxima of its parts are kept, from which the largest values can be listed.
template <class Source, bool kProbs_, bool kStreamed, bool kRanks_ = false> struct Row {
  static constexpr bool kProbs = kProbs_, kRanks = kRanks_;
  static constexpr int kGroup = Source::kGroup;
  static constexpr float kAbsent = kProbs ? 0.0f : -INFINITY;
  static constexpr int kAhead = Source::kAhead;

  struct Mass { float total, own; float4 parts; };   // of the row; of this thread; of four warps, see Team::take
  struct Measure { float top, total, own; float4 parts; int status; };   // top: the largest value
  struct Pick { bool known; int token; float value; };   // known: to this warp

  const Source& source;
  Team& team;
  float* held;          // the first held_length values of the slice
  int held_length;
  const int vocab, slice_length;
  int begin, length;    // of the slice at hand
  float base;           // log2(e) x top: what a logit's weight is relative to
  float own_top;        // the largest value of this thread, once measured; unknown where rows stream through
  float* own_masses;    // where rows stream through: the mass of each thread in each slice
  Ranked* ranked;

  JITGEN_FN Row(const Source& source, Team& team, float* held, int held_length, int vocab, int slice_length,
                float* own_masses = nullptr, Ranked* ranked = nullptr)
      : source(source), team(team), held(held), held_length(held_length), vocab(vocab), slice_length(slice_length), base(0.0f),
        own_top(INFINITY), own_masses(own_masses), ranked(ranked) {
    select(team.rank);
  }

  JITGEN_FN void select(int slice) {
    begin = slice * slice_length;
    const int left = vocab - begin;
    length = left < 0 ? 0 : left < slice_length ? left : slice_length;
  }
  // f(slice) for each slice of this CTA, with that slice at hand.
  template <class F> JITGEN_FN void each_slice(F f) {
    if (!kStreamed) {
      f(team.rank);
    } else {
#pragma unroll 1
      for (int slice = team.rank; slice < team.slices; slice += team.size) {
        select(slice);
        f(slice);
      }
    }
  }

  JITGEN_FN float& own_mass_in(int slice) { return own_masses[slice * kThreads + threadIdx.x]; }
  JITGEN_FN float weight(float x) const { return kProbs ? x : exp2(::fmaf(x, kLog2E, -base)); }

  // ---- passes ----
  // f(values, index of the first in the row) for each group of this thread; values of the slice stay in shared memory.
  template <bool kHold, class F> JITGEN_FN void read(F f) const {
    for (int group = threadIdx.x; group * kGroup < length; group += kAhead * kThreads) {
      typename Source::Raw raw[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if ((group + i * kThreads) * kGroup < length) raw[i] = source.fetch(begin + (group + i * kThreads) * kGroup);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int first = (group + i * kThreads) * kGroup;
        if (first >= length) break;
        float x[kGroup];
        source.decode(raw[i], begin + first, x);
        if (kHold && first < held_length) {
#pragma unroll
          for (int j = 0; j < kGroup; j += 4)
            *reinterpret_cast<float4*>(held + first + j) = make_float4(x[j], x[j + 1], x[j + 2], x[j + 3]);
        }
        f(x, begin + first);
      }
    }
  }
  template <class F> JITGEN_FN void revisit(F f) const {
    for (int first = threadIdx.x * kGroup; first < length; first += kThreads * kGroup) {
      float x[kGroup];
      if (first < held_length) {
#pragma unroll
        for (int j = 0; j < kGroup; j += 4) {
          const float4 four = *reinterpret_cast<const float4*>(held + first + j);
          x[j] = four.x, x[j + 1] = four.y, x[j + 2] = four.z, x[j + 3] = four.w;
        }
      } else {
        source.decode(source.fetch(begin + first), begin + first, x);
      }
      f(x, begin + first);
    }
  }
  JITGEN_FN float value(int offset) const { return offset < held_length ? held[offset] : source.one(begin + offset); }

  static JITGEN_FN float largest(const float (&x)[kGroup]) {
    float top = x[0];
#pragma unroll
    for (int i = 1; i < kGroup; ++i) top = ::fmaxf(top, x[i]);
    return top;
  }

  // ---- the first pass: maximum and mass ----
  template <bool kHold> JITGEN_FN Measure measure() { return kProbs ? measure_probs<kHold>() : measure_logits<kHold>(); }

  // The sum of weights is kept relative to the maximum so far (Milakov & Gimelshein 2018). NaN and +inf reach it as NaN.
  template <bool kHold> JITGEN_FN Measure measure_logits() {
    float sum, warp_top;
    team.open();
    each_slice([&](int slice) {
      float top = -INFINITY, scaled = 0.0f;   // scaled: log2(e) x top, 0 while there is none
      sum = 0.0f;
      read<kHold>([&](const float (&x)[kGroup], int) {
        const float peak = largest(x);
        if (peak > top) {
          const float next = peak * kLog2E;
          sum *= exp2(top == -INFINITY ? -INFINITY : scaled - next);
          top = peak, scaled = next;
        }
#pragma unroll
        for (int i = 0; i < kGroup; ++i) sum += exp2(::fmaf(x[i], kLog2E, -scaled));
      });
      warp_top = warp_max(top);
      if (top > -INFINITY) sum *= exp2(scaled - warp_top * kLog2E);
      const float warps[2] = {warp_top, warp_sum(sum)};
      team.put(slice, warps);
      keep_own(slice, top, sum);
    });
    team.sync();
    Measure m;
    const float4 tops = team.take(0, -INFINITY), sums = team.take(1, 0.0f);
    m.top = team.max_of(tops);
    base = m.top * kLog2E;
    const auto rescaled = [&](float sum, float top) { return top == -INFINITY ? sum : sum * exp2(top * kLog2E - base); };
    m.parts = {rescaled(sums.x, tops.x), rescaled(sums.y, tops.y), rescaled(sums.z, tops.z), rescaled(sums.w, tops.w)};
    m.total = team.sum_of(m.parts);
    m.own = rescaled(sum, warp_top);
    if (kStreamed)
      for (int slice = team.rank; slice < team.slices; slice += team.size)
        own_mass_in(slice) = rescaled(own_mass_in(slice), team.of_warp(0, slice));
    m.status = base == INFINITY ? kRowInfinite : m.total != m.total ? kRowNan : m.top < kLeastTop ? kRowEmpty : kRowOk;
    return m;
  }
  template <bool kHold> JITGEN_FN Measure measure_probs() {
    float sum;
    team.open();
    each_slice([&](int slice) {
      float top = -INFINITY, least = INFINITY;
      sum = 0.0f;
      read<kHold>([&](const float (&x)[kGroup], int) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          sum += x[i];
          top = ::fmaxf(top, x[i]);
          least = ::fminf(least, x[i]);
        }
      });
      const float warps[3] = {warp_sum(sum), warp_max(top), warp_min(least)};
      team.put(slice, warps);
      keep_own(slice, top, sum);
    });
    team.sync();
    Measure m;
    m.parts = team.take(0, 0.0f);
    m.total = team.sum_of(m.parts);
    m.top = team.max_of(team.take(1, -INFINITY));
    m.own = sum;
    const float lowest = team.min_of(team.take(2, INFINITY));
    m.status = lowest < 0.0f ? kRowNegative : m.top == INFINITY ? kRowInfinite : m.total != m.total ? kRowNan
               : m.total == 0.0f ? kRowEmpty : m.total == INFINITY ? kRowInfinite : kRowOk;
    return m;
  }

  JITGEN_FN void keep_own(int slice, float top, float mass) {
    if (kStreamed)
      own_mass_in(slice) = mass;
    else
      own_top = top;
    if (kRanks) ranked->put_tops(top);
  }

  // ---- thresholds ----
  // Mass of the values >= threshold that this thread has in the slice at hand.
  JITGEN_FN float own_mass(float threshold) const {
    float own = 0.0f;
    if (own_top < threshold) return own;
    const auto add = [&](const float (&x)[kGroup], int) {
      if (largest(x) >= threshold) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) own += x[i] >= threshold ? weight(x[i]) : 0.0f;
      }
    };
    if (kStreamed)
      read<false>(add);   // from memory: several loads at a time
    else
      revisit(add);
    return own;
  }
  // Mass of the values >= threshold.
  JITGEN_FN Mass mass_from(float threshold) {
    float own;
    team.open();
    each_slice([&](int slice) {
      own = own_mass(threshold);
      if (kStreamed) own_mass_in(slice) = own;
      const float warps[1] = {warp_sum(own)};
      team.put(slice, warps);
    });
    team.sync();
    const float4 parts = team.take(0, 0.0f);
    return {team.sum_of(parts), own, parts};
  }

  // Count and mass of the values > x.
  JITGEN_FN Mass mass_above(float x, float& count) {
    float own_count = 0.0f, own = 0.0f;
    if (own_top > x)
      revisit([&](const float (&v)[kGroup], int) {
        if (largest(v) > x) {
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            own_count += v[i] > x ? 1.0f : 0.0f;
            own += v[i] > x ? weight(v[i]) : 0.0f;
          }
        }
      });
    const float warps[2] = {warp_sum(own), warp_sum(own_count)};
    team.open();
    team.put(team.rank, warps);
    team.sync();
    const float4 parts = team.take(0, 0.0f);
    count = team.sum_of(team.take(1, 0.0f));
    return {team.sum_of(parts), own, parts};
  }

  // Of the values from each pivot up to hi: their count or the sum of their weights, and the smallest.
  JITGEN_FN void evaluate(const Pivots& pivots, float hi, bool counts, float (&f)[kPivots], float (&least)[kPivots]) const {
    static_assert(kPivots == 4, "sum_and_least");
#pragma unroll
    for (int i = 0; i < kPivots; ++i) f[i] = 0.0f, least[i] = INFINITY;
    if (own_top >= pivots.at[0]) revisit([&](const float (&x)[kGroup], int) {
      float inside[kGroup];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) inside[j] = x[j] < hi ? x[j] : -INFINITY;
      if (largest(inside) < pivots.at[0]) return;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const float w = counts ? 1.0f : weight(x[j]);
#pragma unroll
        for (int i = 0; i < kPivots; ++i)
          if (inside[j] >= pivots.at[i]) f[i] += w, least[i] = ::fminf(least[i], inside[j]);
      }
    });
    team.sum_and_least(f, least);
  }

  // Lists the k largest values and a few more, for all CTAs or the first alone; false, to all, where that takes a search.
  template <bool kAll> JITGEN_FN bool rank_largest(int k) const {
    if (k > kMostRanked) return false;
    const float bound = ranked->bound_of(k);
    if (!(bound > kAbsent)) return false;
    return ranked->template make<kAll>(bound, [&](auto found) {
      if (own_top < bound) return;
      revisit([&](const float (&x)[kGroup], int first) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
          if (x[i] >= bound) found(x[i], first + i);
      });
    });
  }

  // ---- drawing ----
  JITGEN_FN Mass whole_mass(const Measure& m) const { return {m.total, m.own, m.parts}; }
  // Lets every thread of the team know a pick.
  JITGEN_FN void announce(Pick& pick) const { team.announce(pick.known, pick.token, pick.value); }

  // The value at `point` of the cumulative mass of the values >= threshold. Called by all; one warp comes to know it.
  JITGEN_FN Pick draw(const Mass& mass, float threshold, double u) {
    const Team::Place place = team.find_warp(mass.parts, u * static_cast<double>(mass.total));
    const int slice = place.warp / kWarps;
    Pick pick = {slice % team.size == team.rank && place.warp % kWarps == team.warp, 0, 0.0f};
    if (!pick.known) return pick;
    if (kStreamed) select(slice);
    const Share thread = find_share(kStreamed ? own_mass_in(slice) : mass.own, place.rest, team.lane);
    double rest = thread.rest;
    const int owner = team.warp * 32 + thread.lane;
    for (int step = 0; (owner + step / kGroup * kThreads) * kGroup < length; step += 32) {
      const int index = step + team.lane, offset = (owner + index / kGroup * kThreads) * kGroup + index % kGroup;
      const float x = offset < length ? value(offset) : kAbsent;
      const float w = offset < length && x >= threshold ? weight(x) : 0.0f;
      const unsigned any = __ballot_sync(~0u, w > 0.0f);
      if (any == 0) continue;
      const Share one = find_share(w, rest, team.lane);
      pick.token = begin + __shfl_sync(~0u, offset, one.lane);
      pick.value = __shfl_sync(~0u, x, one.lane);
      const float share = __shfl_sync(~0u, w, one.lane);
      if (one.rest < share) break;   // else the point lies further on, or rounding put it past the end
      rest = one.rest - share;
    }
    return pick;
  }
};

}  // namespace jg
