// Element types, the vector type and captured loads of the CPU kernels.
//
// Vectors are GCC/Clang vector extensions, so one source serves AVX-512, AVX2, SSE, NEON and anything else: the width is
// chosen from predefined macros. <immintrin.h> is avoided on purpose: parsing it costs a second per module.
#pragma once

#include <stdint.h>

#define JITGEN_FN static inline __attribute__((always_inline))
#define JITGEN_FN_MEMBER inline __attribute__((always_inline))

#ifndef INFINITY
#define INFINITY (__builtin_inff())
#endif
#ifndef NAN
#define NAN (__builtin_nanf(""))
#endif

constexpr int kTileNone = 0;      // no visible element: K and V of the tile are not touched
constexpr int kTilePartial = 1;   // mask_elem decides each element
constexpr int kTileFull = 2;      // every element visible: mask_elem is not called

namespace jg {

// ---- vector width and register block ----
// The micro-kernel keeps kBlockRows x kPanelVecs accumulators, kPanelVecs operands and a broadcast in registers:
// 15 of 16 registers on AVX2, 27 of 32 on AVX-512 and on NEON.
#if defined(__AVX512F__)
constexpr int kVec = 16, kPanelVecs = 2, kBlockRows = 12;
#elif defined(__AVX__)
constexpr int kVec = 8, kPanelVecs = 2, kBlockRows = 6;
#elif defined(__aarch64__)
constexpr int kVec = 4, kPanelVecs = 4, kBlockRows = 6;
#else
constexpr int kVec = 4, kPanelVecs = 2, kBlockRows = 6;
#endif
constexpr int kPanel = kVec * kPanelVecs;   // columns of a packed panel
constexpr int kScratchAlign = 64;           // cache line, and the widest vector

typedef float Vec __attribute__((vector_size(kVec * 4)));
typedef float VecUnaligned __attribute__((vector_size(kVec * 4), aligned(4), may_alias));
typedef uint32_t VecU32 __attribute__((vector_size(kVec * 4)));
typedef int32_t VecI32 __attribute__((vector_size(kVec * 4)));
typedef uint16_t VecU16 __attribute__((vector_size(kVec * 2)));
typedef uint8_t VecU8 __attribute__((vector_size(kVec)));
typedef uint8_t VecU8Unaligned __attribute__((vector_size(kVec), aligned(1), may_alias));
typedef int8_t VecI8 __attribute__((vector_size(kVec)));
typedef int16_t VecI16 __attribute__((vector_size(kVec * 2)));
typedef uint16_t VecU16Unaligned __attribute__((vector_size(kVec * 2), aligned(2), may_alias));
typedef float Vec4 __attribute__((vector_size(16)));
typedef int32_t Vec4I32 __attribute__((vector_size(16)));
typedef uint32_t Vec4U32 __attribute__((vector_size(16)));
typedef float Vec4Unaligned __attribute__((vector_size(16), aligned(4), may_alias));

// A column of the logits as hooks get it. On CUDA it carries its value as a float too.
using Column = int;
JITGEN_FN float as_float(int x) { return static_cast<float>(x); }
JITGEN_FN float minus(int column, float x) { return static_cast<float>(column) - x; }
JITGEN_FN float minus(float x, int column) { return x - static_cast<float>(column); }

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

JITGEN_FN int float_bits(float x) { return __builtin_bit_cast(int, x); }
JITGEN_FN float bits_float(int bits) { return __builtin_bit_cast(float, bits); }

// ---- 16-bit elements ----
struct half16 { uint16_t bits; };
struct bf16_16 { uint16_t bits; };
using float32 = float;
using bfloat16 = bf16_16;
using float16 = half16;

JITGEN_FN float to_float(float x) { return x; }
JITGEN_FN float to_float(bf16_16 x) { return bits_float(static_cast<int>(static_cast<uint32_t>(x.bits) << 16)); }
JITGEN_FN float to_float(half16 x) {
  // Shifting the exponent into place and multiplying by 2^112 rebiases normal and denormal numbers alike.
  const int magnitude = (x.bits & 0x7fff) << 13;
  const int special = magnitude >= 0x0f800000 ? 0x7f800000 | magnitude : 0;   // infinity or NaN
  const int normal = float_bits(bits_float(magnitude) * 0x1p112f);
  return bits_float((special ? special : normal) | (x.bits & 0x8000) << 16);
}

// ---- 8-bit elements of a cache; codes of NaN and infinity are not told apart from numbers ----
struct float8_e4m3fn { uint8_t bits; };
struct float8_e5m2 { uint8_t bits; };
struct int8 { int8_t value; };

// Exponent and mantissa in their places of a float, whose exponent has another bias.
JITGEN_FN float to_float(float8_e4m3fn x) { return bits_float((x.bits & 0x7f) << 20 | (x.bits & 0x80) << 24) * 0x1p120f; }
JITGEN_FN float to_float(float8_e5m2 x) { return bits_float((x.bits & 0x7f) << 21 | (x.bits & 0x80) << 24) * 0x1p112f; }
JITGEN_FN float to_float(int8 x) { return x.value; }

// As float8_e4m3fn, with NaN: what a caller gives as q, k and v.
struct e4m3_or_nan { uint8_t bits; };
JITGEN_FN float to_float(e4m3_or_nan x) { return (x.bits & 0x7f) == 0x7f ? NAN : to_float(float8_e4m3fn{x.bits}); }

JITGEN_FN void from_float(float x, float& out) { out = x; }
JITGEN_FN void from_float(float x, bf16_16& out) {
  const uint32_t bits = static_cast<uint32_t>(float_bits(x));
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;          // to nearest, ties to even
  out.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}
JITGEN_FN void from_float(float x, half16& out) {
  const int bits = float_bits(x), magnitude = bits & 0x7fffffff;
  // Below 2^-14 the result is denormal: adding 0.5 leaves it, correctly rounded, in the low bits of the sum.
  const int denormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  const int normal = (magnitude - (112 << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const int finite = magnitude < (113 << 23) ? denormal : normal < 0x7c00 ? normal : 0x7c00;
  out.bits = static_cast<uint16_t>((magnitude > 0x7f800000 ? 0x7e00 : finite) | (bits >> 16 & 0x8000));
}

// ---- vector loads and stores of elements ----
JITGEN_FN Vec splat(float x) { return x - Vec{}; }
JITGEN_FN Vec load_vec(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
JITGEN_FN Vec load_vec(const bf16_16* p) {
  const VecU16 bits = *reinterpret_cast<const VecU16Unaligned*>(p);
  return (Vec)(__builtin_convertvector(bits, VecU32) << 16);
}
// Bytes are widened in two steps: GCC takes one step of that width element by element.
template <int kShift> JITGEN_FN Vec moved_bits(const void* p, float factor) {
  const VecU8 bytes = *static_cast<const VecU8Unaligned*>(p);
  const VecU32 bits = __builtin_convertvector(__builtin_convertvector(bytes, VecU16), VecU32);
  return (Vec)((bits & 0x7f) << kShift | (bits & 0x80) << 24) * splat(factor);
}
JITGEN_FN Vec load_vec(const float8_e5m2* p) { return moved_bits<21>(p, 0x1p112f); }
JITGEN_FN Vec load_vec(const int8* p) {
  const VecI8 bytes = (VecI8)*reinterpret_cast<const VecU8Unaligned*>(p);
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(bytes, VecI16), VecI32), Vec);
}
JITGEN_FN void store_vec(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }

// Conversions of 16-bit elements: one instruction where the CPU has it, else as the scalar functions above.
JITGEN_FN VecU32 chosen(VecI32 mask, VecU32 yes, VecU32 no) { return ((VecU32)mask & yes) | (~(VecU32)mask & no); }
JITGEN_FN void store_bits(void* p, VecU32 bits) { *static_cast<VecU16Unaligned*>(p) = __builtin_convertvector(bits, VecU16); }
#if defined(__AVX512BF16__)
JITGEN_FN void store_vec(bf16_16* p, Vec v) {
  VecU16 bits;
  asm("vcvtneps2bf16 %1, %0" : "=v"(bits) : "v"(v));
  *reinterpret_cast<VecU16Unaligned*>(p) = bits;
}
#else
JITGEN_FN void store_vec(bf16_16* p, Vec v) {
  const VecU32 bits = (VecU32)v;
  store_bits(p, chosen(v != v, VecU32{} + 0x7fc0, (bits + 0x7fff + (bits >> 16 & 1)) >> 16));
}
#endif
#if defined(__AVX512F__) || (defined(__AVX__) && defined(__F16C__))
JITGEN_FN Vec of_halves(VecU16 bits) {
  Vec v;
  asm("vcvtph2ps %1, %0" : "=v"(v) : "vm"(bits));
  return v;
}
JITGEN_FN Vec load_vec(const half16* p) { return of_halves(*reinterpret_cast<const VecU16Unaligned*>(p)); }
// By way of float16, as multiplying the bits of small ones, which are denormal as floats, takes a hundred times as long.
JITGEN_FN Vec load_vec(const float8_e4m3fn* p) {
  const VecU16 bits = __builtin_convertvector(*reinterpret_cast<const VecU8Unaligned*>(p), VecU16);
  return of_halves((bits & 0x7f) << 7 | (bits & 0x80) << 8) * splat(0x1p8f);
}
JITGEN_FN Vec load_vec(const e4m3_or_nan* p) {
  const VecU16 bits = __builtin_convertvector(*reinterpret_cast<const VecU8Unaligned*>(p), VecU16);
  const VecU16 special = (VecU16)((bits & 0x7f) == 0x7f) & 0x7c00;   // the exponent of a NaN
  return of_halves((bits & 0x7f) << 7 | (bits & 0x80) << 8 | special) * splat(0x1p8f);
}
JITGEN_FN void store_vec(half16* p, Vec v) {
  VecU16 bits;
  asm("vcvtps2ph $0, %1, %0" : "=v"(bits) : "v"(v));   // 0: to nearest, ties to even
  *reinterpret_cast<VecU16Unaligned*>(p) = bits;
}
#else
JITGEN_FN Vec load_vec(const float8_e4m3fn* p) { return moved_bits<20>(p, 0x1p120f); }
JITGEN_FN Vec load_vec(const e4m3_or_nan* p) {
  const Vec number = moved_bits<20>(p, 0x1p120f);
  return (Vec)chosen((VecI32)(((VecU32)number & 0x7fffffff) == 0x43f00000), VecU32{} + 0x7fc00000, (VecU32)number);   // 480
}
JITGEN_FN Vec load_vec(const half16* p) {
  const VecU32 bits = __builtin_convertvector(*reinterpret_cast<const VecU16Unaligned*>(p), VecU32);
  const VecU32 magnitude = (bits & 0x7fff) << 13;
  const VecU32 normal = (VecU32)((Vec)magnitude * splat(0x1p112f));
  return (Vec)(chosen(magnitude >= 0x0f800000, magnitude | 0x7f800000, normal) | (bits & 0x8000) << 16);
}
JITGEN_FN void store_vec(half16* p, Vec v) {
  const VecU32 bits = (VecU32)v, magnitude = bits & 0x7fffffff, largest = VecU32{} + 0x7c00;
  const VecU32 denormal = (VecU32)((Vec)magnitude + splat(0.5f)) - float_bits(0.5f);
  const VecU32 normal = (magnitude - (112 << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const VecU32 number = chosen(magnitude < (113 << 23), denormal, chosen(normal < largest, normal, largest));
  store_bits(p, chosen(v != v, VecU32{} + 0x7e00, number) | (bits >> 16 & 0x8000));
}
#endif

// ---- rows of K or V: row(j) is the address of key j ----
template <class T> struct StridedRows {
  const T* base;
  int64_t stride;
  JITGEN_FN_MEMBER const T* operator()(int64_t j) const { return base + j * stride; }
  StridedRows from(int64_t j) const { return {base + j * stride, stride}; }
};
template <class T> struct ListedRows {   // keys that lie in pages
  const T* const* rows;
  JITGEN_FN_MEMBER const T* operator()(int64_t j) const { return rows[j]; }
  ListedRows from(int64_t j) const { return {rows + j}; }
};

// Asks for kKeys rows of K or V that will be read soon. A row is a few cache lines, and rows that lie apart by more than a
// few kB, or in pages, are no stream to the processor's own prefetcher.
constexpr int kKeysAhead = 16;
template <int kKeys, int kDim, class Rows> JITGEN_FN void prefetch_rows(const Rows& rows, int first, int end) {
  if (first + kKeys > end) return;
#pragma GCC unroll 4
  for (int j = 0; j < kKeys; ++j) {
    const auto* row = rows(first + j);
    constexpr int kLine = 64 / sizeof(*row);
#pragma GCC unroll 16
    for (int d = 0; d < kDim; d += kLine) __builtin_prefetch(row + d);
  }
}

// Rows of memory that will be needed later.
struct RowsAhead {
  const char* next = nullptr;
  int64_t stride = 0;   // bytes
  int left = 0, row_bytes = 0;

  template <class T> static RowsAhead of(const T* first, int64_t stride, int rows, int dim) {
    return {reinterpret_cast<const char*>(first), stride * static_cast<int64_t>(sizeof(T)), rows, dim * static_cast<int>(sizeof(T))};
  }
  JITGEN_FN_MEMBER void ask(int rows) {
    for (; rows > 0 && left > 0; --rows, --left, next += stride)
      for (int i = 0; i < row_bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
  }
};
// What a thread will read and write after the tile at hand. It asks for a little of it with every row of the softmax: a
// processor waits for a dozen cache lines at once, and more requests in a row would stop it.
struct Ahead {
  RowsAhead k, v, out;
  JITGEN_FN_MEMBER void ask() { k.ask(2), v.ask(2), out.ask(1); }
};

// A row in another type that has all of its values.
template <int kDim, class T, class Out> JITGEN_FN void convert_row(const T* row, int64_t stride_d, Out* out) {
  int d = 0;
  if (stride_d == 1)
#pragma GCC unroll 4
    for (; d < kDim / kVec * kVec; d += kVec) store_vec(out + d, load_vec(row + d));
  for (; d < kDim; ++d) from_float(to_float(row[d * stride_d]), out[d]);
}

JITGEN_FN Vec4 load_vec4(const float* p) { return *reinterpret_cast<const Vec4Unaligned*>(p); }
template <class T> JITGEN_FN Vec4 load_vec4(const T* p) {
  return Vec4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
#if defined(__AVX__) && defined(__F16C__)
JITGEN_FN Vec4 load_vec4(const half16* p) {
  Vec4 v;
  asm("vcvtph2ps %1, %0" : "=x"(v) : "m"(*reinterpret_cast<const half16(*)[4]>(p)));
  return v;
}
JITGEN_FN Vec4 load_vec4(const float8_e4m3fn* p) {
  Vec4U32 bits;
  asm("vpmovzxbd %1, %0" : "=x"(bits) : "m"(*reinterpret_cast<const float8_e4m3fn(*)[4]>(p)));
  bits = (bits & 0x7f) << 7 | (bits & 0x80) << 8;
  Vec4 v;
  asm("vpackusdw %1, %1, %0\n\tvcvtph2ps %0, %0" : "=x"(v) : "x"(bits));
  return v * 0x1p8f;
}
#endif
#if defined(__AVX__)
JITGEN_FN Vec4 load_vec4(const int8* p) {
  Vec4I32 integers;
  asm("vpmovsxbd %1, %0" : "=x"(integers) : "m"(*reinterpret_cast<const int8(*)[4]>(p)));
  return __builtin_convertvector(integers, Vec4);
}
#endif

// ---- captured tensors ----
JITGEN_FN float load(const float* p, long long i) { return p[i]; }
JITGEN_FN float load(const double* p, long long i) { return static_cast<float>(p[i]); }
JITGEN_FN float load(const half16* p, long long i) { return to_float(p[i]); }
JITGEN_FN float load(const bf16_16* p, long long i) { return to_float(p[i]); }
JITGEN_FN long long load(const long long* p, long long i) { return p[i]; }
JITGEN_FN long long load(const long* p, long long i) { return p[i]; }
JITGEN_FN int load(const int* p, long long i) { return p[i]; }
JITGEN_FN int load(const short* p, long long i) { return p[i]; }
JITGEN_FN int load(const signed char* p, long long i) { return p[i]; }
JITGEN_FN int load(const unsigned char* p, long long i) { return p[i]; }
JITGEN_FN int load(const bool* p, long long i) { return p[i]; }

JITGEN_FN long long clamp_index(long long i, long long size) { return i < 0 ? 0 : i < size ? i : size - 1; }
JITGEN_FN long long wrap_index(long long i, long long size) { return i < 0 ? i + size : i; }

}  // namespace jg
