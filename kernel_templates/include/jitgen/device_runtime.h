// The part of CUDA's device headers that kernels use: 150 lines in place of the 30 000 which nvcc puts in front of every source
// and whose reading is a sixth of the time that it takes for a kernel. Names and meanings are CUDA's; a kernel compiles to the
// same machine code with either (tests/compile/test_device_runtime.py).
//
// The compiler knows the functions marked JITGEN_BUILTIN by name.
#pragma once

#define __host__ __attribute__((host))
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __shared__ __attribute__((shared))
#define __constant__ __attribute__((constant))
#define __grid_constant__ __attribute__((grid_constant))
#define __launch_bounds__(...) __attribute__((launch_bounds(__VA_ARGS__)))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))

#pragma nv_diag_suppress 114   // functions of the host are declared here, and defined in the host's part
#include "jitgen/cuda_api.h"

#define NAN __builtin_nanf("")
#define JITGEN_BUILTIN extern __device__ __attribute__((device_builtin))
#define JITGEN_DEVICE static __device__ __forceinline__

// ---- where a thread is ----
struct __attribute__((device_builtin)) uint3 { unsigned x, y, z; };
extern const __attribute__((device_builtin)) __device__ uint3 threadIdx, blockIdx;
extern const __attribute__((device_builtin)) __device__ dim3 blockDim, gridDim;

// nvcc makes of kernel<<<...>>>(...) a call of it; the host's part has its own way
extern "C" unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes = 0, CUstream_st* stream = nullptr);

// ---- vectors ----
JITGEN_DEVICE int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
JITGEN_DEVICE uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
JITGEN_DEVICE uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
JITGEN_DEVICE float2 make_float2(float x, float y) { return {x, y}; }
JITGEN_DEVICE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern "C" {
// ---- arithmetic ----
JITGEN_BUILTIN float fabsf(float), floorf(float), ceilf(float), truncf(float), rintf(float), erff(float);
JITGEN_BUILTIN float fmaxf(float, float), fminf(float, float), fmodf(float, float), copysignf(float, float);
JITGEN_BUILTIN float fmaf(float, float, float), __sinf(float), __cosf(float);
JITGEN_BUILTIN void sincospif(float, float* sine, float* cosine);
JITGEN_BUILTIN int __clz(int), __ffs(int), __popc(unsigned), __popcll(unsigned long long);
JITGEN_BUILTIN unsigned __byte_perm(unsigned, unsigned, unsigned selector);
JITGEN_BUILTIN unsigned __float_as_uint(float);
JITGEN_BUILTIN int __float_as_int(float);
JITGEN_BUILTIN float __uint_as_float(unsigned), __int_as_float(int);

// ---- threads of a block, of a warp; memory ----
JITGEN_BUILTIN void __syncthreads();
JITGEN_BUILTIN int __syncthreads_and(int), __syncthreads_or(int);
JITGEN_BUILTIN void __nvvm_bar_warp_sync(unsigned mask);
JITGEN_BUILTIN int __nvvm_vote_all_sync(unsigned mask, int), __nvvm_vote_any_sync(unsigned mask, int);
JITGEN_BUILTIN unsigned __nvvm_vote_ballot_sync(unsigned mask, int);
JITGEN_BUILTIN unsigned __nvvm_shfl_idx_sync(unsigned mask, unsigned, unsigned, unsigned);
JITGEN_BUILTIN unsigned __nvvm_shfl_up_sync(unsigned mask, unsigned, unsigned, unsigned);
JITGEN_BUILTIN unsigned __nvvm_shfl_down_sync(unsigned mask, unsigned, unsigned, unsigned);
JITGEN_BUILTIN unsigned __nvvm_shfl_bfly_sync(unsigned mask, unsigned, unsigned, unsigned);
JITGEN_BUILTIN int __reduce_min_sync_signed_impl(unsigned mask, int);
JITGEN_BUILTIN int __iAtomicAdd(int*, int), __iAtomicMin(int*, int), __iAtomicMax(int*, int);
JITGEN_BUILTIN unsigned long long __ullAtomicAdd(unsigned long long*, unsigned long long);
__device__ size_t __nv_cvta_generic_to_shared_impl(const void*);
__device__ void* __nv_cvta_shared_to_generic_impl(size_t);
}

JITGEN_DEVICE void __syncwarp(unsigned mask = ~0u) { __nvvm_bar_warp_sync(mask); }
JITGEN_DEVICE int __all_sync(unsigned mask, int x) { return __nvvm_vote_all_sync(mask, x); }
JITGEN_DEVICE int __any_sync(unsigned mask, int x) { return __nvvm_vote_any_sync(mask, x); }
JITGEN_DEVICE unsigned __ballot_sync(unsigned mask, int x) { return __nvvm_vote_ballot_sync(mask, x); }
JITGEN_DEVICE int __reduce_min_sync(unsigned mask, int x) { return __reduce_min_sync_signed_impl(mask, x); }
JITGEN_DEVICE int atomicAdd(int* p, int x) { return __iAtomicAdd(p, x); }
JITGEN_DEVICE unsigned long long atomicAdd(unsigned long long* p, unsigned long long x) { return __ullAtomicAdd(p, x); }
JITGEN_DEVICE int atomicMin(int* p, int x) { return __iAtomicMin(p, x); }
JITGEN_DEVICE int atomicMax(int* p, int x) { return __iAtomicMax(p, x); }
JITGEN_DEVICE size_t __cvta_generic_to_shared(const void* p) { return __nv_cvta_generic_to_shared_impl(p); }
JITGEN_DEVICE void* __cvta_shared_to_generic(size_t p) { return __nv_cvta_shared_to_generic_impl(p); }

// Shuffles, for whole warps; of 64 bits in two halves. `clamp`: the last lane whose value may be had, for those that go down 0.
#define JITGEN_SHUFFLE(name, function, clamp)                                                                                  \
  JITGEN_DEVICE unsigned name(unsigned mask, unsigned x, unsigned lane) { return function(mask, x, lane, clamp); }             \
  JITGEN_DEVICE int name(unsigned mask, int x, unsigned lane) { return function(mask, x, lane, clamp); }                       \
  JITGEN_DEVICE float name(unsigned mask, float x, unsigned lane) {                                                            \
    return __uint_as_float(function(mask, __float_as_uint(x), lane, clamp));                                                   \
  }                                                                                                                            \
  JITGEN_DEVICE long long name(unsigned mask, long long x, unsigned lane) {                                                    \
    unsigned low, high;                                                                                                        \
    asm volatile("mov.b64 {%0, %1}, %2;" : "=r"(low), "=r"(high) : "l"(x));                                                    \
    high = function(mask, high, lane, clamp), low = function(mask, low, lane, clamp);                                          \
    asm volatile("mov.b64 %0, {%1, %2};" : "=l"(x) : "r"(low), "r"(high));                                                     \
    return x;                                                                                                                  \
  }                                                                                                                            \
  JITGEN_DEVICE double name(unsigned mask, double x, unsigned lane) {                                                          \
    unsigned low, high;                                                                                                        \
    asm volatile("mov.b64 {%0, %1}, %2;" : "=r"(low), "=r"(high) : "d"(x));                                                    \
    high = function(mask, high, lane, clamp), low = function(mask, low, lane, clamp);                                          \
    asm volatile("mov.b64 %0, {%1, %2};" : "=d"(x) : "r"(low), "r"(high));                                                     \
    return x;                                                                                                                  \
  }
JITGEN_SHUFFLE(__shfl_sync, __nvvm_shfl_idx_sync, 31)
JITGEN_SHUFFLE(__shfl_up_sync, __nvvm_shfl_up_sync, 0)
JITGEN_SHUFFLE(__shfl_down_sync, __nvvm_shfl_down_sync, 31)
JITGEN_SHUFFLE(__shfl_xor_sync, __nvvm_shfl_bfly_sync, 31)

// Loads of what nobody writes meanwhile. Volatile, as in CUDA 13.0: kernels were tuned with the order they are written in.
#define JITGEN_LDG(type, instruction, letter, word)                                                                            \
  JITGEN_DEVICE type __ldg(const type* p) {                                                                                    \
    word x;                                                                                                                    \
    asm volatile("ld.global.nc." instruction " %0, [%1];" : letter(x) : "l"(p));                                               \
    return (type)x;                                                                                                            \
  }
JITGEN_LDG(signed char, "s8", "=r", int)
JITGEN_LDG(unsigned char, "u8", "=r", unsigned)
JITGEN_LDG(short, "s16", "=h", short)
JITGEN_LDG(unsigned short, "u16", "=h", unsigned short)
JITGEN_LDG(int, "s32", "=r", int)
JITGEN_LDG(unsigned, "u32", "=r", unsigned)
JITGEN_LDG(long, "s64", "=l", long)
JITGEN_LDG(long long, "s64", "=l", long long)
JITGEN_LDG(float, "f32", "=f", float)
JITGEN_LDG(double, "f64", "=d", double)
JITGEN_DEVICE int4 __ldg(const int4* p) {
  int4 v;
  asm volatile("ld.global.nc.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
JITGEN_DEVICE uint4 __ldg(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
