// Thin wrappers of the sm_80 instructions the attention kernels use: cp.async, ldmatrix, mma.sync and shuffles.
#pragma once
#include "jitgen/cuda_math.cuh"

namespace jg {

JITGEN_FN unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// ---- asynchronous copies ----
// 16 bytes to shared memory; when !valid nothing is read and the destination is zeroed.
JITGEN_FN void cp_async_16(unsigned dst, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0) : "memory");
}
JITGEN_FN void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
JITGEN_FN void cp_async_wait_all() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// ---- shared memory ----
JITGEN_FN void load_matrix(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
JITGEN_FN void load_matrix_transposed(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
JITGEN_FN void store_shared_32(unsigned address, unsigned value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
JITGEN_FN void store_shared_128(unsigned address, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
JITGEN_FN uint4 load_shared_128(unsigned address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}

// ---- tensor core: c (16 x 8, fp32) += a (16 x 16) * b (16 x 8) ----
struct bfloat16 {
  static JITGEN_FN void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static JITGEN_FN unsigned pack(float low, float high) {   // cvt takes the upper half first
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
};
struct float16 {
  static JITGEN_FN void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static JITGEN_FN unsigned pack(float low, float high) {
    unsigned r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
};

// ---- the four lanes that share an accumulator row ----
JITGEN_FN float quad_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
JITGEN_FN float quad_sum(float x) { x += quad_xor(x, 1); return x + quad_xor(x, 2); }
JITGEN_FN float quad_max(float x) { x = ::fmaxf(x, quad_xor(x, 1)); return ::fmaxf(x, quad_xor(x, 2)); }

}  // namespace jg
