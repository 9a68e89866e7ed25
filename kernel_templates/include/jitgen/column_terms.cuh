// Terms of keys: what the logits of a tile's columns begin from on wgmma. The producer shares them with each K.
#pragma once
#include "jitgen/sm90_ptx.cuh"
#include "jitgen/sm90_wgmma.cuh"

namespace jg {

// The terms of a tile in a warp, lane by lane, 32 columns at a time.
template <int kColumns> struct ColumnTerms {
  float value[(kColumns + 31) / 32];

  template <class Evaluate> JITGEN_FN void read(Evaluate evaluate) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int base = 0; base < kColumns; base += 32) value[base / 32] = evaluate(base + lane);
  }
  // Stores all without the greatest of them, and that one at `start_address`: it may be large, as sums of gates are, and S is to keep
  // the bits of the products. Any other could be the number that stands for a hidden key, beside which all bits would be lost.
  template <class Store> JITGEN_FN void share(unsigned start_address, Store store) const {
    const int lane = threadIdx.x & 31;
    float top = value[0];
#pragma unroll
    for (int base = 32; base < kColumns; base += 32) top = ::fmaxf(top, value[base / 32]);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) top = ::fmaxf(top, __shfl_xor_sync(0xffffffffu, top, distance));
    const float start = ::fabsf(top) < INFINITY ? top : 0.0f;
#pragma unroll
    for (int base = 0; base < kColumns; base += 32)
      if (base + lane < kColumns) store(base + lane, value[base / 32] - start);
    store_shared_if(lane == 0, start_address, __float_as_int(start));
  }
};

// Read into S by each thread, two columns at a time.
template <int kColumns> struct ReadTerms : ColumnTerms<kColumns> {
  static constexpr int kStartAt = 4 * kColumns, kBytes = kStartAt + 16;

  JITGEN_FN void share(unsigned address) const {
    ColumnTerms<kColumns>::share(address + kStartAt, [&](int column, float x) { store_shared(address + 4 * column, __float_as_int(x)); });
  }
  static JITGEN_FN void fill(float (&s)[kColumns / 8][4], unsigned address) {
    const unsigned own = address + 8 * (threadIdx.x & 3);
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) load_shared_pair(own + 32 * j, s[j][2 * half], s[j][2 * half + 1]);
  }
};

// Added by one step of wgmma before Q K^T: a term is three bfloat16, which hold all of its bits, in the first rows of a B; the row of A
// that begins with three ones adds them up. A block of 8 columns has as its other rows the terms of the blocks after it, times zero: so
// all are finite, and behind the last lie zeros. Shared memory moves 128 bytes a clock, which kernels of hd128 use up: this takes
// 32 clocks of a group's tile of 128 keys, reading into S 132.
template <int kColumns> struct ProductTerms : ColumnTerms<kColumns> {
  static constexpr int kBlockBytes = 3 * 16, kStartAt = kColumns / 8 * kBlockBytes + 5 * 16, kBytes = kStartAt + 16;

  JITGEN_FN void share(unsigned address) const {
    ColumnTerms<kColumns>::share(address + kStartAt, [&](int column, float x) { store(address + column / 8 * kBlockBytes + column % 8 * 2, x); });
    fence_async_proxy();
  }
  // An infinity as three of the greatest finite number, whose sum it is.
  static JITGEN_FN void store(unsigned address, float x) {
    const float first = cut(x), second = cut(x - first), third = x - first - second;
    const bool is_infinite = ::fabsf(x) == INFINITY;
    const int most = (__float_as_int(x) >> 16 & 0x8000) | 0x7f7f;
    store_shared_half(address, is_infinite ? most : __float_as_int(first) >> 16);
    store_shared_half(address + 16, is_infinite ? most : __float_as_int(second) >> 16);
    store_shared_half(address + 32, is_infinite ? most : __float_as_int(third) >> 16);
  }
  static JITGEN_FN float cut(float x) { return __int_as_float(__float_as_int(x) & 0xffff0000); }

  static JITGEN_FN unsigned long long descriptor(unsigned address) { return block_descriptor(address, kBlockBytes); }
  // S = the terms, as the first step of a batch.
  static JITGEN_FN void start(float (&s)[kColumns / 8][4], unsigned long long terms) {
    const int quad = stay(static_cast<int>(threadIdx.x)) & 3;
    const unsigned ones = quad == 0 ? 0x3f803f80u : quad == 1 ? 0x3f80u : 0u;   // elements 2 quad and 2 quad + 1 of 1, 1, 1, 0, 0, ...
    const unsigned a[4] = {ones, ones, 0, 0};
    Wgmma<kColumns>::template registers<bfloat16>(s, a, terms, 0);
  }
};

}  // namespace jg
