// Types and maths that the variant section of a CUDA kernel calls. No includes: nvcc injects the runtime header.
//
// Precision: logits and weights end in a 16-bit output, so transcendental functions use the hardware approximations
// (ex2, lg2, rcp, sin, cos: 1 to 4 ulp of fp32 on their native range, with range reduction where torch has it).
// jg::tanh is tanh.approx (relative error 2^-11, below half a bf16 ulp of the logit it bends); build with
// -DJITGEN_FAST_TANH=0 for the two-instruction form that is good to about 1e-6.
#pragma once

#define JITGEN_FN __device__ __forceinline__

#ifndef JITGEN_FAST_TANH
#define JITGEN_FAST_TANH 1
#endif

constexpr int kTileNone = 0;      // no visible element: the tile is not loaded
constexpr int kTilePartial = 1;   // mask_elem decides each element
constexpr int kTileFull = 2;      // every element visible: mask_elem is not called

namespace jg {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct half16 { unsigned short bits; };
struct bf16_16 { unsigned short bits; };

// The same value, but of unknown origin: expressions of it are not moved out of the KV loop, where no register is free.
JITGEN_FN int stay(int x) { asm volatile("" : "+r"(x)); return x; }
JITGEN_FN float stay(float x) { asm volatile("" : "+f"(x)); return x; }
JITGEN_FN long long stay(long long x) { asm volatile("" : "+l"(x)); return x; }
JITGEN_FN const char* stay(const char* x) { asm volatile("" : "+l"(x)); return x; }

// The 128 bytes around it come into L2.
JITGEN_FN void prefetch_line(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// ---- columns ----
// A column of the logits as hooks get it: the index, and the same as a float. Counting in floats costs an addition; a
// conversion of each column would run on the unit that computes the exponentials, and wait for nothing, so its results
// would fill the registers early. Exact below 2^24.
struct Column {
  int index;
  float start, step;   // the index as a sum: what varies by thread and tile, and a constant
  int first, offset;   // the same as integers
  JITGEN_FN operator int() const { return index; }
};
// Comparisons with a row's bound: it is brought to the thread's first column once, and compared with constants.
#define JITGEN_COLUMN_RELATION(relation)                                                                                       \
  JITGEN_FN bool operator relation(Column column, int x) { return column.offset relation x - column.first; }                   \
  JITGEN_FN bool operator relation(int x, Column column) { return x - column.first relation column.offset; }                   \
  JITGEN_FN bool operator relation(Column column, long long x) { return static_cast<long long>(column.index) relation x; }     \
  JITGEN_FN bool operator relation(long long x, Column column) { return x relation static_cast<long long>(column.index); }
JITGEN_COLUMN_RELATION(<)
JITGEN_COLUMN_RELATION(<=)
JITGEN_COLUMN_RELATION(>)
JITGEN_COLUMN_RELATION(>=)
JITGEN_FN float as_float(int x) { return static_cast<float>(x); }
JITGEN_FN float as_float(Column x) { return x.start + x.step; }
// In this order, because start - x is the same for all columns of a row.
JITGEN_FN float minus(Column column, float x) { return column.start - x + column.step; }
JITGEN_FN float minus(float x, Column column) { return x - column.start - column.step; }

// Columns of one thread, counted from its first one in a tile.
struct ColumnCounter {
  int first, last;   // `last`: that of the keys
  float first_value;
  JITGEN_FN ColumnCounter(int first, int kv_len) : first(first), last(kv_len - 1), first_value(static_cast<float>(first)) {}
  JITGEN_FN Column at(int offset) const { return {first + offset, first_value, static_cast<float>(offset), first, offset}; }
  // The index of columns past the end is that of the last one, so that hooks read nothing outside of what they capture. The
  // other forms go on: what comes of them is masked, and one more operation an element would be felt.
  JITGEN_FN Column clamped(int offset) const {
    Column c = at(offset);
    c.index = c.index < last ? c.index : last;
    return c;
  }
};

// ---- loads of captured tensors ----
JITGEN_FN float load(const float* p, long long i) { return __ldg(p + i); }
JITGEN_FN float load(const double* p, long long i) { return static_cast<float>(__ldg(p + i)); }
JITGEN_FN long long load(const long long* p, long long i) { return __ldg(p + i); }
JITGEN_FN long long load(const long* p, long long i) { return __ldg(reinterpret_cast<const long long*>(p) + i); }
JITGEN_FN int load(const int* p, long long i) { return __ldg(p + i); }
JITGEN_FN int load(const short* p, long long i) { return __ldg(p + i); }
JITGEN_FN int load(const signed char* p, long long i) { return __ldg(p + i); }
JITGEN_FN int load(const unsigned char* p, long long i) { return __ldg(p + i); }
JITGEN_FN int load(const bool* p, long long i) { return __ldg(reinterpret_cast<const unsigned char*>(p) + i) != 0; }
JITGEN_FN float load(const bf16_16* p, long long i) {
  return __uint_as_float(static_cast<unsigned>(__ldg(reinterpret_cast<const unsigned short*>(p) + i)) << 16);
}
JITGEN_FN float load(const half16* p, long long i) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(__ldg(reinterpret_cast<const unsigned short*>(p) + i)));
  return value;
}
// Two neighbouring elements of a row, as they lie in memory.
template <class T> struct Pair;
template <> struct Pair<float> {
  float2 values;
  JITGEN_FN float at(int odd) const { return odd ? values.y : values.x; }
};
template <> struct Pair<bf16_16> {
  unsigned bits;
  JITGEN_FN float at(int odd) const { return __uint_as_float(odd ? bits & 0xffff0000u : bits << 16); }
};
template <> struct Pair<half16> {
  unsigned bits;
  JITGEN_FN float at(int odd) const {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<unsigned short>(odd ? bits >> 16 : bits)));
    return value;
  }
};
// Whether elements 2 i and 2 i + 1 of all rows are an aligned word.
template <class T, class... Strides> JITGEN_FN bool is_paired(const T* p, Strides... strides) {
  return reinterpret_cast<unsigned long long>(p) % (2 * sizeof(T)) == 0 && ((strides % 2 == 0) & ... & true);
}
// Elements i and i + 1 of a row whose last one is `last`, where i = first + step is even; constant steps become part of the
// instruction. Volatile: read where it is written, long before it is used. A word whose second half is past the end of the row
// is still inside of an allocation.
template <bool kPaired> JITGEN_FN Pair<float> load_pair(const float* p, int first, int step, int last) {
  Pair<float> pair;
  p = p + first + step;
  if (kPaired) {
    asm volatile("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(pair.values.x), "=f"(pair.values.y) : "l"(p));
  } else {
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(pair.values.x) : "l"(p));
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(pair.values.y) : "l"(p + (first + step < last)));
  }
  return pair;
}
template <bool kPaired> JITGEN_FN unsigned load_pair_bits(const unsigned short* p, int first, int step, int last) {
  unsigned bits;
  p = p + first + step;
  if (kPaired) {
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(bits) : "l"(p));
  } else {
    unsigned short low, high;
    asm volatile("ld.global.nc.b16 %0, [%1];" : "=h"(low) : "l"(p));
    asm volatile("ld.global.nc.b16 %0, [%1];" : "=h"(high) : "l"(p + (first + step < last)));
    asm("mov.b32 %0, {%1, %2};" : "=r"(bits) : "h"(low), "h"(high));
  }
  return bits;
}
template <bool kPaired, class T> JITGEN_FN Pair<T> load_pair(const T* p, int first, int step, int last) {
  return {load_pair_bits<kPaired>(reinterpret_cast<const unsigned short*>(p), first, step, last)};
}
JITGEN_FN long long clamp_index(long long i, long long size) { return i < 0 ? 0 : (i < size ? i : size - 1); }
JITGEN_FN long long wrap_index(long long i, long long size) { return i < 0 ? i + size : i; }

// ---- elements to and from float ----
JITGEN_FN float widen(float x) { return x; }
JITGEN_FN float widen(bf16_16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
JITGEN_FN float widen(half16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
JITGEN_FN void round_to(float x, float& y) { y = x; }
JITGEN_FN void round_to(float x, bf16_16& y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
JITGEN_FN void round_to(float x, half16& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

// ---- hardware approximations ----
JITGEN_FN float exp2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
JITGEN_FN float log2(float x) { float y; asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
JITGEN_FN float tanh_approx(float x) { float y; asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
JITGEN_FN float reciprocal(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
JITGEN_FN float sqrt(float x) { float y; asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
JITGEN_FN float rsqrt(float x) { float y; asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

// min and max propagate NaN as torch.minimum and torch.maximum do; fminf and fmaxf would drop it.
JITGEN_FN float min(float a, float b) { float y; asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b)); return y; }
JITGEN_FN float max(float a, float b) { float y; asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b)); return y; }
JITGEN_FN float abs(float x) { return ::fabsf(x); }
JITGEN_FN float floor(float x) { return ::floorf(x); }
JITGEN_FN float ceil(float x) { return ::ceilf(x); }
JITGEN_FN float trunc(float x) { return ::truncf(x); }
JITGEN_FN float round(float x) { return ::rintf(x); }   // half to even, as torch.round
JITGEN_FN float sign(float x) { return x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : x); }
JITGEN_FN bool isnan(float x) { return x != x; }
JITGEN_FN bool isinf(float x) { return ::fabsf(x) == INFINITY; }
JITGEN_FN bool isfinite(float x) { return ::fabsf(x) < INFINITY; }

// ---- exponential family ----
JITGEN_FN float exp(float x) { return exp2(x * kLog2E); }
// What the exponents of a row are measured from, by the greatest of them. Below kHidden they are rounded by more than weights have
// room for, and belong to keys that are hidden by large numbers (-1e9, -1e30): a row of such keys, as one of none, has weights 0, not NaN.
constexpr float kHidden = -0x1p27f;
JITGEN_FN float shift_from(float greatest) { return greatest < kHidden ? 0.0f : greatest; }
JITGEN_FN float log(float x) { return log2(x) * kLn2; }
// 2^-8: below it the cubic series is exact to fp32, above it lg2 of 1 + x keeps 14 bits or more of the result.
JITGEN_FN float log1p(float x) {
  return ::fabsf(x) < 0.00390625f ? x * (1.0f - x * (0.5f - x * 0.33333333f)) : log(1.0f + x);
}
JITGEN_FN float tanh_exact(float x) {
  const float far = 1.0f - 2.0f * reciprocal(exp2(::fabsf(x) * (2.0f * kLog2E)) + 1.0f);
  const float square = x * x;   // 0.1: where the quintic series and the cancellation of 1 - 2 / (e + 1) meet, near 1e-6
  const float near = x * (1.0f + square * (-0.33333333f + square * (0.13333333f - square * 0.05396825f)));
  return ::fabsf(x) < 0.1f ? near : ::copysignf(far, x);
}
JITGEN_FN float tanh(float x) { return JITGEN_FAST_TANH ? tanh_approx(x) : tanh_exact(x); }
JITGEN_FN float sigmoid(float x) { return reciprocal(1.0f + exp2(-x * kLog2E)); }
JITGEN_FN float softplus(float x) { return ::fmaxf(x, 0.0f) + log1p(exp2(-::fabsf(x) * kLog2E)); }
JITGEN_FN float logsigmoid(float x) { return -softplus(-x); }
JITGEN_FN float silu(float x) { return x * sigmoid(x); }
JITGEN_FN float erf(float x) { return ::erff(x); }
JITGEN_FN float gelu(float x) { return 0.5f * x * (1.0f + ::erff(x * 0.70710678f)); }
JITGEN_FN float gelu_tanh(float x) { return 0.5f * x * (1.0f + tanh(0.79788456f * (x + 0.044715f * x * x * x))); }

// ---- trigonometry ----
// One period is removed in two steps (2 pi split in two floats), so positions up to 1e5 keep an error near 1e-6;
// the library's own slow path would put a stack frame into the kernel.
JITGEN_FN float reduce_period(float x) {
  const float turns = ::rintf(x * 0.15915494f);
  return ::fmaf(turns, 1.7484556e-7f, ::fmaf(turns, -6.2831855f, x));
}
JITGEN_FN float sin(float x) { return ::__sinf(reduce_period(x)); }
JITGEN_FN float cos(float x) { return ::__cosf(reduce_period(x)); }

// ---- powers and integers ----
JITGEN_FN float pow(float x, int n) {
  float result = 1.0f;
  for (unsigned left = n < 0 ? 0u - static_cast<unsigned>(n) : n; left; left >>= 1, x *= x) result *= (left & 1) ? x : 1.0f;
  return n < 0 ? 1.0f / result : result;
}
JITGEN_FN int min(int a, int b) { return a < b ? a : b; }
JITGEN_FN int max(int a, int b) { return a > b ? a : b; }
JITGEN_FN int abs(int a) { return a < 0 ? -a : a; }
JITGEN_FN long long min(long long a, long long b) { return a < b ? a : b; }
JITGEN_FN long long max(long long a, long long b) { return a > b ? a : b; }
JITGEN_FN long long abs(long long a) { return a < 0 ? -a : a; }

// Floor semantics of Python for any sign; a zero divisor yields 0 instead of a trap.
template <class T> JITGEN_FN T floor_div_impl(T a, T b) {
  if (b == 0) return 0;
  const T quotient = a / b;
  return quotient - ((a % b != 0) && ((a < 0) != (b < 0)));
}
template <class T> JITGEN_FN T floor_mod_impl(T a, T b) {
  if (b == 0) return 0;
  const T rest = a % b;
  return rest + ((rest != 0) && ((rest < 0) != (b < 0)) ? b : 0);
}
JITGEN_FN int floor_div(int a, int b) { return floor_div_impl(a, b); }
JITGEN_FN int floor_mod(int a, int b) { return floor_mod_impl(a, b); }
JITGEN_FN long long floor_div(long long a, long long b) { return floor_div_impl(a, b); }
JITGEN_FN long long floor_mod(long long a, long long b) { return floor_mod_impl(a, b); }
JITGEN_FN float ffloor_div(float a, float b) { return ::floorf(a / b); }
JITGEN_FN float ffloor_mod(float a, float b) {
  const float rest = ::fmodf(a, b);
  return rest != 0.0f && ((rest < 0.0f) != (b < 0.0f)) ? rest + b : rest;
}
JITGEN_FN int popcount(int a) { return __popc(a); }
JITGEN_FN int popcount(long long a) { return __popcll(a); }
JITGEN_FN int shl(int a, int n) { return static_cast<int>(static_cast<unsigned>(a) << (n & 31)); }
JITGEN_FN int shr(int a, int n) { return a >> min(n & 63, 31); }
JITGEN_FN long long shl(long long a, int n) {
  return static_cast<long long>(static_cast<unsigned long long>(a) << (n & 63));
}
JITGEN_FN long long shr(long long a, int n) { return a >> (n & 63); }

}  // namespace jg
