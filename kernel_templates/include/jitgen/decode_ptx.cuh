// Instructions of the decode kernels beyond those of sm80_ptx.cuh and sm90_ptx.cuh: copies that arrive on a barrier, the
// transpose of a fragment, and words that CTAs hand to each other through global memory.
#pragma once
#include "jitgen/sm80_ptx.cuh"
#include "jitgen/sm90_ptx.cuh"

namespace jg {

// ---- L2 policies ----
JITGEN_FN unsigned long long policy_evict_normal() {
  unsigned long long p;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(p));
  return p;
}

// ---- asynchronous copies ----
// 16 bytes to shared memory; when !valid nothing is read and the destination is zeroed.
JITGEN_FN void cp_async_16(unsigned dst, const void* src, bool valid, unsigned long long policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;"
               ::"r"(dst), "l"(src), "r"(valid ? 16 : 0), "l"(policy) : "memory");
}
// 4 bytes, through L1 as they must.
JITGEN_FN void cp_async_4(unsigned dst, const void* src, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src), "r"(valid ? 4 : 0) : "memory");
}
// A box by the copy engine, which L2 keeps as it does by default; see the one with a policy in sm90_ptx.cuh.
JITGEN_FN void tensor_load(unsigned dst, const Operand& t, unsigned barrier, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %3, %5, %6}], [%2];"
      ::"r"(dst), "l"(&t.map), "r"(barrier), "r"(0), "r"(row), "r"(head * t.head_step), "r"(batch * t.batch_step) : "memory");
}
// The calling thread arrives once all its copies so far have landed.
JITGEN_FN void barrier_arrive_on_copies(unsigned barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// barrier_wait for every architecture: before sm_90 a thread has to ask again and again.
JITGEN_FN void barrier_poll(unsigned barrier, unsigned parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

// ---- fragments ----
// An 8 x 8 block of 16-bit elements, two a lane, transposed.
JITGEN_FN unsigned transpose_matrix(unsigned x) {
  unsigned r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
  return r;
}
JITGEN_FN void store_shared_float(unsigned address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
JITGEN_FN float load_shared_float(unsigned address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}
JITGEN_FN void store_shared(unsigned address, float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
JITGEN_FN void store_shared(unsigned address, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
JITGEN_FN float4 load_shared_float4(unsigned address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
  return v;
}
JITGEN_FN void store_shared(unsigned address, float2 v) {
  asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(address), "f"(v.x), "f"(v.y) : "memory");
}
JITGEN_FN float2 load_shared_float2(unsigned address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}

// ---- words between CTAs ----
JITGEN_FN void send(float4* to, float4 v) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1,%2,%3,%4};"
               ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
JITGEN_FN void send(float2* to, float2 v) {
  asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1,%2};" ::"l"(to), "f"(v.x), "f"(v.y) : "memory");
}
JITGEN_FN float4 look_at(const float4* from) {
  float4 v;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from) : "memory");
  return v;
}
JITGEN_FN float2 look_at(const float2* from) {
  float2 v;
  asm volatile("ld.relaxed.gpu.global.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(from) : "memory");
  return v;
}

}  // namespace jg
