// A team: the CTAs that work on one row, a cluster where the device has clusters, else a single CTA.
//
// A row is cut into slices by its length alone. Mostly each CTA has one; rows that are only streamed through leave several to a
// CTA where there are many rows. Partial results are kept by slice and warp, so the cut into CTAs does not show in them.
// Sums and maxima over the row are trees of a fixed shape: within a warp by shuffles, then every warp hands its result to all
// CTAs of the team, whose warps all add up the same numbers in the same order. One barrier is the whole price.
// The kernel that includes this says before how many threads its CTAs have: jg::kThreads.
#pragma once

#include "jitgen/cuda_math.cuh"

namespace jg {

JITGEN_FN int float_bits(float x) { return __float_as_int(x); }
JITGEN_FN float bits_float(int bits) { return __int_as_float(bits); }

constexpr int kMaxTeam = 8;      // CTAs and slices; larger clusters need an opt-in and leave multiprocessors idle
constexpr int kWarps = kThreads / 32;
constexpr int kTeamWarps = kMaxTeam * kWarps;
constexpr int kSlots = 8;        // numbers that one exchange can carry

struct alignas(16) TeamShared {
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
// Four numbers of each lane, each folded over the warp: lanes 8 i to 8 i + 7 return number i. Six shuffles instead of twenty.
template <class Op> JITGEN_FN float warp_fold(const float (&x)[4], int lane, Op op) {
  const bool upper = lane & 16, odd = lane & 8;
  const float a = op(upper ? x[2] : x[0], __shfl_xor_sync(~0u, upper ? x[0] : x[2], 16));
  const float b = op(upper ? x[3] : x[1], __shfl_xor_sync(~0u, upper ? x[1] : x[3], 16));
  float y = op(odd ? b : a, __shfl_xor_sync(~0u, odd ? a : b, 8));
#pragma unroll
  for (int i = 4; i > 0; i >>= 1) y = op(y, __shfl_xor_sync(~0u, y, i));
  return y;
}
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
  int rank, size;      // of this CTA; CTAs
  int slices;          // of the row; slice s is the work of CTA s modulo size
  int lane, warp;
  unsigned parity;
  bool started;        // all CTAs of the team are known to run, so that their shared memory may be written

  JITGEN_FN Team(TeamShared& shared, int slices)
      : shared(shared), rank(0), size(1), slices(slices), lane(threadIdx.x % 32), warp(threadIdx.x / 32), parity(0),
        started(false) {
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    if (size > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");   // wait_started waits for it
#endif
  }
  JITGEN_FN void wait_started() {
#if __CUDA_ARCH__ >= 900
    if (size > 1 && !started) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
    started = true;
  }
  JITGEN_FN void sync() const {
    __syncwarp();   // the barrier wants whole warps
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
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "one store");
#if __CUDA_ARCH__ >= 900
    if (size > 1) {
      unsigned own = static_cast<unsigned>(__cvta_generic_to_shared(place)), remote;
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(own), "r"(to));
      if constexpr (sizeof(T) == 4)
        asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(remote), "r"(__builtin_bit_cast(unsigned, value)) : "memory");
      else
        asm volatile("st.shared::cluster.b64 [%0], %1;" ::"r"(remote), "l"(__builtin_bit_cast(unsigned long long, value))
                     : "memory");
      return;
    }
#endif
    *place = value;
  }

  // An exchange: open(), then put() of numbers that are the same in all lanes of a warp, for each slice; after sync() every
  // warp of the team may take() them.
  JITGEN_FN void open() { parity ^= 1; }
  template <int kCount> JITGEN_FN void put(int slice, const float (&values)[kCount]) {
    static_assert(kCount <= kSlots, "slots");
    wait_started();
    if (lane < size)
#pragma unroll
      for (int i = 0; i < kCount; ++i) store(&shared.slots[parity][i][slice * kWarps + warp], values[i], lane);
  }
  // Numbers of four warps: lane i has those of the warps 4 i to 4 i + 3, counted over slices, and `absent` past the last.
  JITGEN_FN float4 take(int slot, float absent) const {
    if (4 * lane >= slices * kWarps) return make_float4(absent, absent, absent, absent);
    return *reinterpret_cast<const float4*>(&shared.slots[parity][slot][4 * lane]);
  }

  // The number that this warp put for a slice.
  JITGEN_FN float of_warp(int slot, int slice) const { return shared.slots[parity][slot][slice * kWarps + warp]; }

  // Sums of four numbers and minima of four others over the team, of what each thread has, one slice to a CTA.
  JITGEN_FN void sum_and_least(float (&sums)[4], float (&least)[4]) {
    const auto add = [](float a, float b) { return a + b; };
    const auto smaller = [](float a, float b) { return ::fminf(a, b); };
    const float sum = warp_fold(sums, lane, add), low = warp_fold(least, lane, smaller);
    const int number = lane / 8, part = lane % 8;   // each lane now has one of the four numbers
    open();
    if (part < size) {
      store(&shared.slots[parity][number][rank * kWarps + warp], sum, part);
      store(&shared.slots[parity][4 + number][rank * kWarps + warp], low, part);
    }
    sync();
    float total = 0.0f, lowest = INFINITY;
    if (part < size) {   // the warps of one CTA
#pragma unroll
      for (int i = 0; i < kWarps; i += 4) {
        const float4 a = *reinterpret_cast<const float4*>(&shared.slots[parity][number][part * kWarps + i]);
        const float4 b = *reinterpret_cast<const float4*>(&shared.slots[parity][4 + number][part * kWarps + i]);
        total += (a.x + a.y) + (a.z + a.w);
        lowest = ::fminf(lowest, ::fminf(::fminf(b.x, b.y), ::fminf(b.z, b.w)));
      }
    }
#pragma unroll
    for (int i = 4; i > 0; i >>= 1) {
      total += __shfl_xor_sync(~0u, total, i);
      lowest = ::fminf(lowest, __shfl_xor_sync(~0u, lowest, i));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[i] = __shfl_sync(~0u, total, 8 * i);
      least[i] = __shfl_sync(~0u, lowest, 8 * i);
    }
  }

  // Sums over the team of what each thread has, one slice to a CTA.
  template <int kCount> JITGEN_FN void sum(float (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = warp_sum(values[i]);
    open();
    put(rank, values);
    sync();
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = sum_of(take(i, 0.0f));
  }
  JITGEN_FN float sum_of(float4 v) const { return warp_sum((v.x + v.y) + (v.z + v.w)); }
  JITGEN_FN float max_of(float4 v) const { return warp_max(::fmaxf(::fmaxf(v.x, v.y), ::fmaxf(v.z, v.w))); }
  JITGEN_FN float min_of(float4 v) const { return warp_min(::fminf(::fminf(v.x, v.y), ::fminf(v.z, v.w))); }

  // The warp, counted over slices, that holds `point` of the cumulative mass; v: the masses of all warps, as take() has them.
  struct Place { int warp; double rest; };
  JITGEN_FN Place find_warp(float4 v, double point) const {
    const float shares[4] = {v.x, v.y, v.z, v.w};
    const Share four = find_share((static_cast<double>(v.x) + v.y) + (static_cast<double>(v.z) + v.w), point, lane);
    double rest = four.rest;
    int own = 0;
    bool found = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (found || !(shares[i] > 0.0f)) continue;
      found = rest < shares[i];
      own = i;   // the last with a share, where rounding put the point past the end
      rest -= found ? 0.0 : shares[i];
    }
    if (!found) rest = INFINITY;   // its last value
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
