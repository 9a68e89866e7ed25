// The few largest values of a row in falling order, for top-k filters with a small k.
//
// The k-th largest of the maxima of disjoint parts of a row never lies above the k-th largest value. What lies at or above it
// is k values and a few more, unless the large ones share few parts: these are gathered and ranked by comparing each with each.
// Threshold, mass and draw then come from the ranked list, without a search. Where the list would be too long, the caller
// searches. Only integers are added atomically, and the order in which values are gathered does not show in the list.
#pragma once

#include "jitgen/sampling_team.cuh"
#include "jitgen/sampling_search.h"

namespace jg {

constexpr int kParts = 128;         // of a row, whatever its team
constexpr int kMostRanked = 100;    // the largest k: 1.5 values are then expected from each part
constexpr int kCandidates = 512;    // of a row
constexpr int kSharers = kThreads / kParts;   // threads that compare one maximum with the others
static_assert(kThreads % kParts == 0 && (kSharers & (kSharers - 1)) == 0, "bound_of");

// A value and its token as one number: the order of numbers is that of values, and of equal values the first token is largest.
struct Candidate {
  unsigned long long bits;

  static JITGEN_FN Candidate of(float value, int token) {
    const unsigned key = static_cast<unsigned>(to_key(value)) ^ 0x80000000u;
    return {static_cast<unsigned long long>(key) << 32 | ~static_cast<unsigned>(token)};
  }
  JITGEN_FN float value() const { return from_key(static_cast<int>(static_cast<unsigned>(bits >> 32) ^ 0x80000000u)); }
  JITGEN_FN int token() const { return static_cast<int>(~static_cast<unsigned>(bits)); }
};

struct alignas(16) RankedShared {
  float tops[kParts];
  Candidate found[kCandidates];   // first by the CTA that holds them, each with a share of the list; then in falling order
  int counts[kMaxTeam];
  int count, bound;
};

struct Ranked {
  static constexpr int kOwn = kCandidates / kThreads;   // places of the list that are a thread's

  RankedShared& shared;
  Team& team;
  int length;        // of the list
  double* through;   // mass of the values up to and with each: in the slots of the team, which exchanges nothing any more

  JITGEN_FN Ranked(RankedShared& shared, Team& team)
      : shared(shared), team(team), length(0), through(reinterpret_cast<double*>(team.shared.slots)) {
    static_assert(sizeof(team.shared.slots) >= kCandidates * sizeof(double), "room for the masses");
    if (threadIdx.x == 0) shared.count = 0, shared.bound = 0x7fffffff;   // read after the first exchange
  }

  // Tells the team the maxima of the parts that this warp has; part of an exchange, after put().
  JITGEN_FN void put_tops(float top) {
    const int width = 32 * team.slices * kWarps / kParts;   // lanes of a part
#pragma unroll
    for (int i = 1; i < 32; i <<= 1) {
      const float other = __shfl_xor_sync(~0u, top, i);
      if (i < width) top = ::fmaxf(top, other);
    }
    const int parts = 32 / width, part = team.lane % parts, to = team.lane / parts;
    top = __shfl_sync(~0u, top, part * width);
    if (to < team.size) team.store(&shared.tops[(team.rank * kWarps + team.warp) * parts + part], top, to);
  }

  // The k-th largest of the maxima.
  JITGEN_FN float bound_of(int k) {
    const float own = shared.tops[threadIdx.x / kSharers];
    int above = 0;
#pragma unroll 4
    for (int i = threadIdx.x % kSharers; i < kParts / 4; i += kSharers) {
      const float4 other = reinterpret_cast<const float4*>(shared.tops)[i];
      above += (other.x > own) + (other.y > own) + (other.z > own) + (other.w > own);
    }
#pragma unroll
    for (int i = 1; i < kSharers; i <<= 1) above += __shfl_xor_sync(~0u, above, i);
    const int key = __reduce_min_sync(~0u, above < k ? to_key(own) : 0x7fffffff);
    if (team.lane == 0) atomicMin(&shared.bound, key);
    __syncthreads();
    return from_key(shared.bound);
  }

  // Makes the list of the values >= the bound of k, for all CTAs or the first alone. False where it would be too long, to all;
  // each(f) calls f(value, token) for the values of this thread that are at or above a bound.
  template <bool kAll, class Each> JITGEN_FN bool make(float bound, Each each) {
    const int capacity = kCandidates / team.size;
    each([&](float value, int token) {
      const int place = atomicAdd(&shared.count, 1);
      if (place >= capacity) return;
#pragma unroll 1
      for (int cta = 0; cta < (kAll ? team.size : 1); ++cta)
        team.store(&shared.found[team.rank * capacity + place], Candidate::of(value, token), cta);
    });
    __syncthreads();
    if (threadIdx.x < team.size) team.store(&shared.counts[team.rank], shared.count, threadIdx.x);
    team.sync();
    int most = 0;
    for (int cta = 0; cta < team.size; ++cta) {
      most = most > shared.counts[cta] ? most : shared.counts[cta];
      length += shared.counts[cta];
    }
    if (most > capacity) return false;
    if (kAll || team.rank == 0) {
      close_gaps(capacity);
      rank();
    }
    return true;
  }

  // Moves the shares of the CTAs together.
  JITGEN_FN void close_gaps(int capacity) {
    Candidate own[kOwn];
    int place[kOwn];   // -1: nobody has left a candidate there
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int at = threadIdx.x + i * kThreads, from = at / capacity, number = at - from * capacity;
      own[i] = shared.found[at];
      place[i] = number < shared.counts[from] ? number : -1;
      if (place[i] >= 0)
        for (int cta = 0; cta < from; ++cta) place[i] += shared.counts[cta];
    }
    write(own, place);
  }
  // Sorts by comparing each with each: the lists are short.
  JITGEN_FN void rank() {
    Candidate own[kOwn];
    int place[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int at = threadIdx.x + i * kThreads;
      place[i] = -1;
      if (at >= length) continue;
      own[i] = shared.found[at];
      int above = 0;
#pragma unroll 8
      for (int j = 0; j < length; ++j) above += shared.found[j].bits > own[i].bits;
      place[i] = above;
    }
    write(own, place);
  }
  JITGEN_FN void write(const Candidate (&own)[kOwn], const int (&place)[kOwn]) {
    __syncthreads();   // everybody has read
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (place[i] >= 0) shared.found[place[i]] = own[i];
    __syncthreads();
  }

  // ---- the list ----
  JITGEN_FN float value(int place) const { return shared.found[place].value(); }

  // The rest is called by one warp. Adds up weight(value).
  template <class Weight> JITGEN_FN void add_up(Weight weight) {
    double before = 0.0;
#pragma unroll 1
    for (int first = 0; first < length; first += 32) {
      const int i = first + team.lane;
      const double sum = before + warp_scan(i < length ? weight(shared.found[i].value()) : 0.0f, team.lane);
      if (i < length) through[i] = sum;
      before = __shfl_sync(~0u, sum, 31);
    }
    __syncwarp();
  }
  // How many places, from the first on, pass: passes(place).
  template <class Passes> JITGEN_FN int count_while(Passes passes) const {
    int count = 0;
#pragma unroll 1
    for (int first = 0; first < length; first += 32) {
      const int i = first + team.lane;
      const int passing = __popc(__ballot_sync(~0u, i < length && passes(i)));
      count += passing;
      if (passing < 32) break;
    }
    return count;
  }
  JITGEN_FN double mass_from(float threshold) const { return through[count_from(threshold) - 1]; }
  JITGEN_FN int count_from(float threshold) const {
    return count_while([&](int i) { return shared.found[i].value() >= threshold; });
  }
  // The largest value with at least this mass at and above it; the least of the list where its mass is smaller.
  JITGEN_FN float reach(double mass) const {
    const int place = count_while([&](int i) { return through[i] < mass; });
    return value(place < length ? place : length - 1);
  }
  // The value at a point of the cumulative mass of the first `count`; rounding may put the point past their end.
  JITGEN_FN Candidate at(double point, int count) const {
    int place = count_while([&](int i) { return through[i] <= point; });
    if (place >= count) place = count_while([&](int i) { return through[i] < through[count - 1]; });
    return shared.found[place];
  }
};

}  // namespace jg
