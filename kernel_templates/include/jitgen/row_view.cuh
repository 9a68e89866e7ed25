// A row of K, V or Q in the registers of a team of lanes, as the functions of a transform see it.
//
// A row is cut into chunks of kVec elements; a lane of a team has two of them, those that are rotated together if there is a
// rotation.
#pragma once

#include "jitgen/cuda_math.cuh"
#include "jitgen/turns.h"

namespace jg {

// ---- shape of a row ----
constexpr int power_above(int n) { return n <= 1 ? 1 : 2 * power_above((n + 1) / 2); }

template <class S> struct Shape {
  static constexpr int kVec = S::kVec, kChunks = S::kHeadDim / kVec;
  static constexpr int kTurned = S::kRotary / (2 * kVec);          // pairs of chunks that are rotated
  static constexpr int kRest = (kChunks - 2 * kTurned + 1) / 2;   // pairs of the others, the last one perhaps half
  static constexpr int kPairs = kTurned + kRest;
  static constexpr int kLanes = power_above(kPairs) < 32 ? power_above(kPairs) : 32;   // of a team
  static constexpr int kRepeat = (kPairs + kLanes - 1) / kLanes;                       // pairs of a lane
  static constexpr bool kWhole = kPairs == kLanes * kRepeat && kChunks % 2 == 0;   // every lane has all of its chunks
  static constexpr int kAhead = S::kAhead;   // heads that are loaded before one is worked on
  static_assert(S::kHeadDim % kVec == 0 && S::kRotary % (2 * kVec) == 0, "chunks do not fit the row");

  // First element of one of the two chunks of a pair.
  JITGEN_FN static int first(int pair, int which) {
    if (pair < kTurned) return (S::kInterleave ? 2 * pair + which : pair + which * kTurned) * kVec;
    return (kTurned + pair + which * kRest) * kVec;
  }
  JITGEN_FN static bool has(int pair, int which) {
    return kWhole || (pair < kPairs && (which == 0 || pair < kTurned || kTurned + pair + kRest < kChunks));
  }
};

// Place of an element: in the row, and among those of its lane.
struct Element {
  int index, repeat, which, i;
  JITGEN_FN operator int() const { return index; }
};

// What the functions of a transform see of a row: the elements of this lane, and sums over the team.
template <class S> struct RowView {
  using Row = Shape<S>;
  float x[Row::kRepeat][2][S::kVec];
  float constants[S::kConstants > 0 ? S::kConstants : 1][Row::kRepeat][2][S::kVec];   // this lane's of captured rows
  int lane;
  unsigned team;   // mask of its lanes

  JITGEN_FN float constant(int number, Element at) const { return constants[number][at.repeat][at.which][at.i]; }
  template <class Args> JITGEN_FN void load_constants(const Args& args) {
#pragma unroll
    for (int number = 0; number < S::kConstants; ++number)
      each([&](float&, Element at) { constants[number][at.repeat][at.which][at.i] = S::constant(args, number, at.index); });
  }

  template <class F> JITGEN_FN void each(F f) {
#pragma unroll
    for (int r = 0; r < Row::kRepeat; ++r)
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const int pair = lane + r * Row::kLanes, first = Row::first(pair, which);
        if (!Row::has(pair, which)) continue;
#pragma unroll
        for (int i = 0; i < S::kVec; ++i) f(x[r][which][i], Element{first + i, r, which, i});
      }
  }
  template <class F> JITGEN_FN float sum(F f) {
    float total = 0.0f;
    each([&](float v, Element i) { total += f(v, i); });
#pragma unroll
    for (int step = Row::kLanes / 2; step > 0; step /= 2) total += __shfl_xor_sync(team, total, step);
    return total;
  }
  template <class F> JITGEN_FN float max(F f) {
    float most = -INFINITY;
    each([&](float v, Element i) { most = jg::max(most, f(v, i)); });
#pragma unroll
    for (int step = Row::kLanes / 2; step > 0; step /= 2) most = jg::max(most, __shfl_xor_sync(team, most, step));
    return most;
  }
  // Pairs of elements, in each pair of chunks that is rotated.
  JITGEN_FN void rotate(const float (&cosine)[Row::kRepeat][S::kVec], const float (&sine)[Row::kRepeat][S::kVec]) {
#pragma unroll
    for (int r = 0; r < Row::kRepeat; ++r) {
      if (lane + r * Row::kLanes >= Row::kTurned) continue;
#pragma unroll
      for (int i = 0; i < S::kVec; ++i) {
        float& first = S::kInterleave ? x[r][2 * i / S::kVec][2 * i % S::kVec] : x[r][0][i];
        float& second = S::kInterleave ? x[r][(2 * i + 1) / S::kVec][(2 * i + 1) % S::kVec] : x[r][1][i];
        const float turned = first * cosine[r][i] - second * sine[r][i];
        second = second * cosine[r][i] + first * sine[r][i];
        first = turned;
      }
    }
  }
};

}  // namespace jg
