// Search of the threshold that a top-k or top-p filter puts on a row, the same on CPU and GPU.
//
// F(t) is the count or the mass of the values >= t. It falls as t rises, also in floating point: a sum in a fixed order
// cannot grow when one of its terms becomes zero. Wanted is the largest value of the row with F(value) >= target. Each round
// evaluates F at a few pivots in one pass over the values of the bracket, and the smallest value at or above each, to which the
// bracket shrinks: ties end the search as soon as they fill it. No value is moved and nothing is sorted.
#pragma once

namespace jg {

constexpr int kPivots = 4;
constexpr int kFreeRounds = 14;   // after these every round quarters the bracket's bit patterns: 16 more are always enough
constexpr int kMaxRounds = kFreeRounds + 18;
constexpr float kSpread = 0.125f;    // share of the bracket between the pivots of a guess
constexpr float kWide = 64.0f;        // logits: a bracket this wide is not divided evenly but by proportion
constexpr float kLowest = -3.402823466e38f;

// Floats in the order of signed integers.
JITGEN_FN int to_key(float x) {
  const int bits = float_bits(x);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}
JITGEN_FN float from_key(int key) { return bits_float(key < 0 ? key ^ 0x7fffffff : key); }
JITGEN_FN float next_up(float x) { return from_key(to_key(x) + (x == 0.0f && float_bits(x) < 0 ? 2 : 1)); }

struct Bracket {
  float lo, hi;       // the threshold lies in [lo, hi)
  float f_lo, f_hi;   // F(lo) >= target > F(hi)
  bool missed;        // the last round's guess left most of the bracket
};

JITGEN_FN bool is_open(const Bracket& b) { return next_up(b.lo) < b.hi; }

struct Pivots { float at[kPivots]; };

// Where a straight line, or an exponential where F changes by much, reaches the target; as a share of the bracket.
JITGEN_FN float expected_share(const Bracket& b, float target) {
  const float low = max(b.f_hi, 0.25f * target);   // F(hi) may be 0
  const float share = b.f_lo > 4.0f * low ? log2(b.f_lo / target) / log2(b.f_lo / low) : (b.f_lo - target) / (b.f_lo - low);
  return min(max(share, 0.0f), 1.0f);
}

// The float at a share of the bracket: of its values, or of its bit patterns, which divides by proportion.
JITGEN_FN float at_share(const Bracket& b, float share, bool by_key) {
  if (!by_key) return b.lo + (b.hi - b.lo) * share;
  const unsigned lo = (unsigned)to_key(b.lo), width = (unsigned)to_key(b.hi) - lo;
  return from_key((int)(lo + (unsigned)((float)width * share)));
}

// Pivots of a round, ascending; the first is the next float after lo, which tells whether lo is the answer. The others are
// close to where the threshold is expected, or quarter the bracket after a guess that missed. Probabilities go by proportion.
template <bool kProbs> JITGEN_FN Pivots choose_pivots(const Bracket& b, float target, float top, int round) {
  Pivots p;
  p.at[0] = next_up(b.lo);
  const bool guessed = round < kFreeRounds && !b.missed;
  const bool by_key = kProbs || round >= kFreeRounds || (b.missed && b.hi - b.lo > kWide);
  const float centre = guessed ? expected_share(b, target) : 0.5f, spread = guessed ? kSpread : 0.25f;
  const float below = from_key(to_key(b.hi) - 1);
  for (int i = 1; i < kPivots; ++i) {
    const float share = min(max(centre + (float)(i - 2) * spread, 0.0f), 1.0f);
    // at first nothing is known of logits: 16, 8, 4 below the top
    float x = !kProbs && round == 0 && b.lo == kLowest ? top - (float)(4 << (kPivots - 1 - i)) : at_share(b, share, by_key);
    x = x < below ? x : below;
    p.at[i] = x > p.at[i - 1] ? x : p.at[i - 1];   // also where x is NaN
  }
  return p;
}

// The bracket after a round: f[i] = F(at[i]), least[i] = smallest value of the row >= at[i].
JITGEN_FN void narrow_bracket(Bracket& b, float target, const Pivots& p, const float* f, const float* least) {
  float lo = b.lo, hi = p.at[0], f_lo = b.f_lo, f_hi = f[0];
  for (int i = 0; i < kPivots; ++i) {
    const bool last = i + 1 == kPivots;
    if (f[i] >= target) {
      lo = least[i];
      f_lo = f[i];
      hi = last ? b.hi : p.at[last ? i : i + 1];
      f_hi = last ? b.f_hi : f[last ? i : i + 1];
    }
  }
  const float before = b.hi - b.lo;
  b = {lo, hi, f_lo, f_hi, !b.missed && hi - lo > 0.25f * before};
}

}  // namespace jg
