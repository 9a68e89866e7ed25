// Thin wrappers of the sm_90a instructions: mbarriers, bulk tensor copies, named barriers, setmaxnreg, stmatrix.
// Barriers and tiles are named by their 32-bit shared-memory address.
#pragma once
#include "jitgen/cuda_math.cuh"

namespace jg {

// Opaque CUtensorMap: 128 bytes, written by the driver, read by the copy engine through a __grid_constant__ parameter.
struct alignas(64) TensorMap { unsigned long long words[16]; };

// A tensor as the kernel sees it. An axis of stride 0 is encoded with length 1, and its step is 0 instead of 1.
struct Operand {
  TensorMap map;
  int head_step, batch_step;
};

// ---- mbarriers ----
JITGEN_FN void barrier_init(unsigned barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
JITGEN_FN void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
JITGEN_FN void barrier_arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// The same under a condition, without a branch: a divergent one keeps addresses out of uniform registers after it.
JITGEN_FN void barrier_arrive_if(bool condition, unsigned barrier) {
  asm volatile("{\n.reg .pred arrives;\nsetp.ne.b32 arrives, %1, 0;\n@arrives mbarrier.arrive.shared::cta.b64 _, [%0];\n}"
               ::"r"(barrier), "r"(static_cast<int>(condition)) : "memory");
}
// Arrives and announces `bytes` that the copy engine will deliver in this phase.
JITGEN_FN void barrier_expect(unsigned barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Returns once the phase of this parity is complete; a fresh barrier counts parity 1 as complete.
JITGEN_FN void barrier_wait(unsigned barrier, unsigned parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"   // suspends in hardware: no sleep needed
      "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

// Whether that phase is complete, without waiting.
JITGEN_FN bool barrier_test(unsigned barrier, unsigned parity) {
  int done;
  asm volatile("{\n.reg .pred done;\nmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.s32 %0, 1, 0, done;\n}"
               : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  return done;
}

// ---- named barriers (ids 1 to 15; `threads` counts arrivers and waiters) ----
// racecheck (13.0) reports what two groups exchange around a named barrier of theirs once they have passed different numbers of others,
// also in a kernel that has nothing but these barriers.
JITGEN_FN void named_sync(unsigned id, unsigned threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
JITGEN_FN void named_arrive(unsigned id, unsigned threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Whether the condition holds in any of the threads, the same for all of them.
JITGEN_FN bool named_any(unsigned id, unsigned threads, bool condition) {
  int any;
  asm volatile("{\n.reg .pred own, any;\nsetp.ne.b32 own, %3, 0;\nbar.red.or.pred any, %1, %2, own;\nselp.s32 %0, 1, 0, any;\n}"
               : "=r"(any) : "r"(id), "r"(threads), "r"(static_cast<int>(condition)) : "memory");
  return any;
}

// ---- bulk tensor copies; coordinates are {element in span, row, span, head, batch} ----
JITGEN_FN void prefetch_tensor_map(const Operand& t) { asm volatile("prefetch.tensormap [%0];" ::"l"(&t.map) : "memory"); }
JITGEN_FN void tensor_load(unsigned dst, const Operand& t, unsigned barrier, int row, int head, int batch, unsigned long long policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %3, %5, %6}], [%2], %7;"
      ::"r"(dst), "l"(&t.map), "r"(barrier), "r"(0), "r"(row), "r"(head * t.head_step), "r"(batch * t.batch_step), "l"(policy)
      : "memory");
}
// A box of a captured tensor; coordinates are {key, row, two more}.
JITGEN_FN void captured_load(unsigned dst, const TensorMap& map, unsigned barrier, int key, int row, int third, int fourth) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      ::"r"(dst), "l"(&map), "r"(barrier), "r"(key), "r"(row), "r"(third), "r"(fourth) : "memory");
}
JITGEN_FN void tensor_store(const Operand& t, unsigned src, int row, int span, int head, int batch) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];"
               ::"l"(&t.map), "r"(src), "r"(0), "r"(row), "r"(span), "r"(head), "r"(batch) : "memory");
}
JITGEN_FN void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
JITGEN_FN void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// Orders ordinary writes to shared memory before reads by the copy engine and the tensor cores.
JITGEN_FN void fence_async_proxy() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
JITGEN_FN unsigned long long policy_evict_first() {
  unsigned long long p;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p));
  return p;
}
JITGEN_FN unsigned long long policy_evict_last() {
  unsigned long long p;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(p));
  return p;
}

// ---- registers ----
template <int kRegisters> JITGEN_FN void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters)); }
template <int kRegisters> JITGEN_FN void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters)); }

// ---- shared memory ----
JITGEN_FN void store_matrix(unsigned address, const unsigned (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
               ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
JITGEN_FN void store_shared_half(unsigned address, int value) {   // its lower 16 bits
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(static_cast<short>(value)) : "memory");
}
JITGEN_FN void store_shared(unsigned address, int value) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory"); }
JITGEN_FN void store_shared_if(bool condition, unsigned address, int value) {   // without a branch, as barrier_arrive_if
  asm volatile("{\n.reg .pred stores;\nsetp.ne.b32 stores, %2, 0;\n@stores st.shared.b32 [%0], %1;\n}"
               ::"r"(address), "r"(value), "r"(static_cast<int>(condition)) : "memory");
}
JITGEN_FN int load_shared(unsigned address) {
  int value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
// The same value in all lanes, in a form the compiler knows to be uniform.
JITGEN_FN int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
// What lane 0 of a warp reads, for all of its lanes. Where lane 0 also lets go of what it read, no other read has to come before it.
JITGEN_FN int load_shared_by(bool is_lane_0, unsigned address) {
  int value;
  asm volatile("{\n.reg .pred loads;\nsetp.ne.b32 loads, %2, 0;\nmov.b32 %0, 0;\n@loads ld.shared.b32 %0, [%1];\n}"
               : "=r"(value) : "r"(address), "r"(static_cast<int>(is_lane_0)) : "memory");
  return uniform(value);
}
// A struct of one word as that word, and back.
template <class T> JITGEN_FN int bits_of(const T& x) { int bits; __builtin_memcpy(&bits, &x, 4); return bits; }
template <class T> JITGEN_FN T from_bits(int bits) { T x; __builtin_memcpy(&x, &bits, 4); return x; }
JITGEN_FN void store_shared(unsigned address, int4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
JITGEN_FN void load_shared_pair(unsigned address, float& x, float& y) {
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x), "=f"(y) : "r"(address) : "memory");
}
JITGEN_FN int4 load_shared_int4(unsigned address) {
  int4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}

// Position in a ring of kStages buffers. The parity flips at each lap: consumers begin at 0, producers at 1.
template <int kStages> struct RingPosition {
  unsigned stage, parity;
  JITGEN_FN explicit RingPosition(unsigned parity) : stage(0), parity(parity) {}
  JITGEN_FN void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  JITGEN_FN RingPosition before() const {
    RingPosition at(stage == 0 ? parity ^ 1 : parity);
    at.stage = (stage == 0 ? kStages : stage) - 1;
    return at;
  }
};

// ---- programmatic dependent launch: no effect in a launch without the attribute ----
JITGEN_FN void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
JITGEN_FN void start_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace jg
