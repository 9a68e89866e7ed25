// Two warps that share 16 rows which are too long for one (head dims above 256): each multiplies half of the columns of Q and K,
// and has half of those of O. They add up what they have of S, so both have whole rows of logits and the same weights.
//
// Threads of the two warps with the same lane hold the same rows. kApart: how far apart their numbers are, 1 or, in warp groups, 4.
#pragma once
#include "jitgen/sm80_softmax.cuh"
#include "jitgen/sm80_tile.cuh"

namespace jg {

// Number of the 16 rows that a warp has with another one; which of the two it is.
template <int kApart> JITGEN_FN int shared_rows(int warp) { return kApart == 1 ? warp / 2 : warp % kApart; }
template <int kApart> JITGEN_FN int half_of(int warp) { return kApart == 1 ? warp % 2 : warp / kApart; }
// Waits for the other warp.
template <int kApart> JITGEN_FN void sync_halves(int warp) {
  asm volatile("bar.sync %0, 64;" ::"r"(1 + shared_rows<kApart>(warp)) : "memory");
}
// What warps tell each other of rows of O, a value of each thread.
template <int kThreads> JITGEN_FN float* told() { __shared__ float values[kThreads]; return values; }

// kTiles: column tiles of S that are exchanged at a time.
template <int kTiles, int kApart> struct WarpHalves {
  static constexpr unsigned kWarpBytes = kTiles * 512;
  unsigned mine, other;   // shared-memory addresses, of this lane

  JITGEN_FN WarpHalves(unsigned address, int thread)
      : mine(address + thread / 32 * kWarpBytes + thread % 32 * 16), other(address + (thread / 32 ^ kApart) * kWarpBytes + thread % 32 * 16) {}

  template <int kColTiles> JITGEN_FN void put(const float (&s)[1][kColTiles][4], int first = 0) const {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const float (&tile)[4] = s[0][first + j];
      store_shared_128(mine + j * 512, {__float_as_uint(tile[0]), __float_as_uint(tile[1]), __float_as_uint(tile[2]), __float_as_uint(tile[3])});
    }
  }
  // Once the other warp has put its part: the sums are the same in both, bit by bit.
  template <int kColTiles> JITGEN_FN void add(float (&s)[1][kColTiles][4], int first = 0) const {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const uint4 words = load_shared_128(other + j * 512);
      float (&tile)[4] = s[0][first + j];
      tile[0] += __uint_as_float(words.x), tile[1] += __uint_as_float(words.y);
      tile[2] += __uint_as_float(words.z), tile[3] += __uint_as_float(words.w);
    }
  }
};

// One row of O as norm_finalize and output_row see it: both warps call together. `told`: a float for each thread of the CTA.
template <int kOutTiles, int kHalf, int kApart> struct HalvedRow : FragmentRow<kOutTiles, kHalf, false> {
  using Part = FragmentRow<kOutTiles, kHalf, false>;
  float* told;

  JITGEN_FN HalvedRow(float (&x)[kOutTiles][4], int first, float* told) : Part(x, first), told(told) {}

  JITGEN_FN float of_other(float own) {
    const int thread = static_cast<int>(threadIdx.x);
    told[thread] = own;
    sync_halves<kApart>(thread / 32);
    const float others = told[thread ^ 32 * kApart];
    sync_halves<kApart>(thread / 32);   // it may be told the next
    return others;
  }
  template <class F> JITGEN_FN float sum(F f) {
    const float own = Part::sum(f);
    return own + of_other(own);
  }
  template <class F> JITGEN_FN float max(F f) {
    const float own = Part::max(f);
    return ::fmaxf(own, of_other(own));
  }
};

}  // namespace jg
