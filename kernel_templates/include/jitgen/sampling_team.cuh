// A team: the CTAs that work on one row, a cluster where the device has clusters, else a single CTA.
//
// Sums and maxima over the row are trees of a fixed shape: within a warp by shuffles, then every warp hands its result to all
// CTAs of the team, whose warps all add up the same numbers in the same order. One barrier is the whole price.
#pragma once

#include "jitgen/cuda_math.cuh"

namespace jg {

JITGEN_FN int float_bits(float x) { return __float_as_int(x); }
JITGEN_FN float bits_float(int bits) { return __int_as_float(bits); }

constexpr int kMaxTeam = 8;      // CTAs; larger clusters need an opt-in and leave multiprocessors idle
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kTeamWarps = kMaxTeam * kWarps;
constexpr int kSlots = 8;        // numbers that one exchange can carry

struct TeamShared {
  // Two sets, used in turns: whoever writes a set has passed the barrier after which nobody reads it any more.
  float slots[2][kSlots][kTeamWarps];
  float picked_value[2];
  int picked_index[2];
};

// ---- one warp ----
JITGEN_FN float warp_sum(float x) {
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) x += __shfl_xor_sync(~0u, x, i);
  return x;
}
JITGEN_FN float warp_max(float x) {
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) x = ::fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x;
}
JITGEN_FN float warp_min(float x) { return -warp_max(-x); }
JITGEN_FN double warp_scan(double x, int lane) {   // inclusive
#pragma unroll
  for (int i = 1; i < 32; i <<= 1) {
    const double left = __shfl_up_sync(~0u, x, i);
    x += lane >= i ? left : 0.0;
  }
  return x;
}

// The lane whose share of a cumulative sum holds `point`, and what is left of the point before that share. Rounding may put
// the point past the end: then it is the last lane with a share. Lane 0 if no lane has one.
struct Share { int lane; double rest; };
JITGEN_FN Share find_share(double share, double point, int lane) {
  const double through = warp_scan(share, lane);
  const unsigned holds = __ballot_sync(~0u, share > 0.0 && through > point), any = __ballot_sync(~0u, share > 0.0);
  const int found = holds ? __ffs(holds) - 1 : any ? 31 - __clz(any) : 0;
  return {found, point - __shfl_sync(~0u, through - share, found)};
}

// ---- the team ----
struct Team {
  TeamShared& shared;
  int rank, size;      // of this CTA
  int lane, warp;
  unsigned parity;

  JITGEN_FN Team(TeamShared& shared) : shared(shared), rank(0), size(1), lane(threadIdx.x % 32), warp(threadIdx.x / 32), parity(0) {
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    if (size > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");   // waited for before the first store
#endif
  }
  // All CTAs of the team have started: their shared memory may be written.
  JITGEN_FN void wait_started() const {
#if __CUDA_ARCH__ >= 900
    if (size > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }
  JITGEN_FN void sync() const {
#if __CUDA_ARCH__ >= 900
    if (size > 1) {
      asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
      return;
    }
#endif
    __syncthreads();
  }
  // Store into the same place of the shared memory of CTA `to`.
  template <class T> JITGEN_FN void store(T* place, T value, int to) const {
    static_assert(sizeof(T) == 4, "one register");
#if __CUDA_ARCH__ >= 900
    if (size > 1) {
      unsigned own = static_cast<unsigned>(__cvta_generic_to_shared(place)), remote;
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(own), "r"(to));
      asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(remote), "r"(__builtin_bit_cast(unsigned, value)) : "memory");
      return;
    }
#endif
    *place = value;
  }

  JITGEN_FN int own_warp() const { return rank * kWarps + warp; }

  // Hands `count` numbers, the same in all lanes of a warp, to every warp of the team; take() reads them.
  template <int kCount> JITGEN_FN void exchange(const float (&values)[kCount]) {
    static_assert(kCount <= kSlots, "slots");
    parity ^= 1;
    if (lane < size)
#pragma unroll
      for (int i = 0; i < kCount; ++i) store(&shared.slots[parity][i][own_warp()], values[i], lane);
    sync();
  }
  // Numbers of four warps of the team: lane i has those of the warps 4 i to 4 i + 3, and `absent` past the last warp.
  JITGEN_FN float4 take(int slot, float absent) const {
    if (4 * lane >= size * kWarps) return make_float4(absent, absent, absent, absent);
    return *reinterpret_cast<const float4*>(&shared.slots[parity][slot][4 * lane]);
  }

  // Sums over the team of what each thread has.
  template <int kCount> JITGEN_FN void sum(float (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = warp_sum(values[i]);
    exchange(values);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = sum_of(take(i, 0.0f));
  }
  JITGEN_FN float sum_of(float4 v) const { return warp_sum((v.x + v.y) + (v.z + v.w)); }
  JITGEN_FN float max_of(float4 v) const { return warp_max(::fmaxf(::fmaxf(v.x, v.y), ::fmaxf(v.z, v.w))); }
  JITGEN_FN float min_of(float4 v) const { return warp_min(::fminf(::fminf(v.x, v.y), ::fminf(v.z, v.w))); }

  // The warp of the team that holds `point` of the cumulative mass, given the masses of all warps as take() returns them.
  struct Place { int warp; double rest; };
  JITGEN_FN Place find_warp(float4 v, double point) const {
    const double shares[4] = {v.x, v.y, v.z, v.w};
    const Share four = find_share((shares[0] + shares[1]) + (shares[2] + shares[3]), point, lane);
    double rest = four.rest;
    int own = -1, last = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (shares[i] > 0.0) last = i;
      if (own < 0 && shares[i] > 0.0 && rest < shares[i]) own = i;
      if (own < 0) rest -= shares[i];
    }
    if (own < 0) own = last, rest = shares[last];   // rounding: past the end, so its last value
    return {4 * four.lane + __shfl_sync(~0u, own, four.lane), __shfl_sync(~0u, rest, four.lane)};
  }

  // Tells the whole team an index and a value that one warp knows.
  JITGEN_FN void announce(bool knows, int& index, float& value) {
    parity ^= 1;
    if (knows && lane < size) {
      store(&shared.picked_index[parity], index, lane);
      store(&shared.picked_value[parity], value, lane);
    }
    sync();
    index = shared.picked_index[parity];
    value = shared.picked_value[parity];
  }
};

}  // namespace jg
