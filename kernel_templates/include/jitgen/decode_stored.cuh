// Products of decode for K and V stored in 8 bits: read as bytes, turned into 16-bit elements in registers, then as in
// decode_tile.cuh.
//
// K is multiplied in half precision, which holds every 8-bit number: neighbouring bytes become a pair in one to three instructions.
// Rows of Q in bfloat16 become half precision too, each brought below 2^15 by a power of two, which is exact but for elements
// 2^-29 of the largest. A word of a row is dims 4 q to 4 q + 3 of 16, and Q lies in shared memory in that order (`store_query_pair`).
//
// V stays in the type of Q, as its scales may be any numbers. A word is two neighbouring dims for two keys. Its even and its odd
// bytes make a pair of elements each, two keys of one dim:
//   - floats: sign, exponent and mantissa move to their places; what is left is a constant factor (kFactor), as the exponents
//     have different biases. That holds for denormals too; codes of NaN and infinity are not told apart from numbers.
//   - integers: the low seven bits become the mantissa of 2^n + m, from which 2^n, or 2^n + 128 for a negative one, is taken.
// Rows group and group + 8 of a slice of O^T are its dims 2 group and 2 group + 1.
#pragma once
#include "jitgen/decode_tile.cuh"

namespace jg {

// ---- formats ----
// Bytes of a word in the order of the digits of kOrder, the lowest last; a digit 8 + i is the sign of byte i, eight times.
template <unsigned kOrder> JITGEN_FN unsigned take_bytes(unsigned w, unsigned others = 0) {
  unsigned r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(w), "r"(others), "n"(kOrder));
  return r;
}
// Even bytes of a word as a pair, and odd ones; kShift is how far the magnitude moves up.
template <int kShift> struct MovedBits {
  static constexpr unsigned kBits = 0x007f007fu << kShift | 0x80008000u;
  static JITGEN_FN unsigned even(unsigned w) { return (kShift < 8 ? take_bytes<0xa280>(w) : w) << kShift & kBits; }
  static JITGEN_FN unsigned odd(unsigned w) { return (kShift < 8 ? take_bytes<0xb391>(w) << kShift : w) & kBits; }
};
JITGEN_FN unsigned add_pairs(bfloat16, unsigned a, unsigned b) {
  unsigned r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x3f803f80u), "r"(b));   // 1 a + b: add is of sm_90
  return r;
}
JITGEN_FN unsigned add_pairs(float16, unsigned a, unsigned b) {
  unsigned r;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
// (w & mask) | set as one instruction: with two constants the compiler makes it two, 4 of 11 in each word of integers.
JITGEN_FN unsigned masked_or(unsigned w, unsigned mask, unsigned set) {
  unsigned r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(w), "r"(mask), "r"(set));
  return r;
}
// kBase: 2^7 in bfloat16, 2^10 in float16, where one unit of the mantissa is 1.
template <class Element, unsigned kBase> struct CountedBits {
  static JITGEN_FN unsigned even(unsigned w) {
    return add_pairs(Element(), masked_or(w, 0x007f007fu, kBase), masked_or(w, 0x00800080u, kBase | 0x80008000u));
  }
  static JITGEN_FN unsigned odd(unsigned w) { return even(w >> 8); }
};

// The bytes of a word as two pairs in half precision; of the numbers times 1 / kKeyFactor.
struct HalvesOfE4m3 {
#if __CUDA_ARCH__ >= 890
  static constexpr float kKeyFactor = 1.0f;
  static JITGEN_FN void halves(unsigned w, unsigned& low, unsigned& high) {
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.rn.f16x2.e4m3x2 %0, l;\ncvt.rn.f16x2.e4m3x2 %1, h;\n}"
        : "=r"(low), "=r"(high) : "r"(w));
  }
#else
  static constexpr float kKeyFactor = 0x1p8f;
  static JITGEN_FN void halves(unsigned w, unsigned& low, unsigned& high) {
    low = take_bytes<0x9180>(w) << 7 & 0xbf80bf80u, high = take_bytes<0xb3a2>(w) << 7 & 0xbf80bf80u;
  }
#endif
};
struct HalvesOfE5m2 {
  static constexpr float kKeyFactor = 1.0f;
  static JITGEN_FN void halves(unsigned w, unsigned& low, unsigned& high) { low = take_bytes<0x1404>(w), high = take_bytes<0x3424>(w); }
};
struct HalvesOfInt8 {
  static constexpr float kKeyFactor = 1.0f;
  static JITGEN_FN void halves(unsigned w, unsigned& low, unsigned& high) {
    constexpr unsigned kBase = 0x64646464u, kMinus = 0xe480e480u;   // upper bytes of 1024, where a bit is 1; -(1024 + 128)
    const unsigned positive = w ^ 0x80808080u;
    low = add_pairs(float16(), take_bytes<0x4140>(positive, kBase), kMinus);
    high = add_pairs(float16(), take_bytes<0x4342>(positive, kBase), kMinus);
  }
};

// kSlotFactor multiplies weights together with the scale of their slot, about the largest value over the largest element, which
// would leave float16 no room: weights are at most 2^8.
template <class Element> struct float8_e4m3fn;
template <> struct float8_e4m3fn<bfloat16> : HalvesOfE4m3, MovedBits<4> {
  static constexpr float kFactor = 0x1p120f, kSlotFactor = 1.0f;
};
template <> struct float8_e4m3fn<float16> : HalvesOfE4m3, MovedBits<7> {
  static constexpr float kFactor = 0x1p8f, kSlotFactor = 0x1p5f;
};
template <class Element> struct float8_e5m2;
template <> struct float8_e5m2<bfloat16> : HalvesOfE5m2, MovedBits<5> {
  static constexpr float kFactor = 0x1p112f, kSlotFactor = 1.0f;
};
template <> struct float8_e5m2<float16> : HalvesOfE5m2, MovedBits<8> {
  static constexpr float kFactor = 1.0f, kSlotFactor = 0x1p12f;
};
template <class Element> struct int8;
template <> struct int8<bfloat16> : HalvesOfInt8, CountedBits<bfloat16, 0x43004300u> {
  static constexpr float kFactor = 1.0f, kSlotFactor = 1.0f;
};
template <> struct int8<float16> : HalvesOfInt8, CountedBits<float16, 0x64006400u> {
  static constexpr float kFactor = 1.0f, kSlotFactor = 0x1p4f;
};

// ---- Q ----
// What brings the largest element of a row, given without its sign in bfloat16, to [2^14, 2^15), and back: powers of two.
struct RowFactors { float to, back; };
JITGEN_FN RowFactors row_factors(int largest) {
  const int exponent = max(largest >> 7, 15);   // both factors are numbers then
  return {__int_as_float((268 - exponent) << 23), __int_as_float((exponent - 14) << 23)};
}
// Largest element of a pair in bfloat16, without its sign.
JITGEN_FN int largest_of(unsigned pair) { return max(static_cast<int>(pair & 0x7fffu), static_cast<int>(pair >> 16 & 0x7fffu)); }
JITGEN_FN unsigned as_halves(unsigned pair, float factor) {
  return float16::pack(__uint_as_float(pair << 16) * factor, __uint_as_float(pair & 0xffff0000u) * factor);
}
// 16 dims of a row of Q, in the order of the pairs of K.
JITGEN_FN void store_query_pair(unsigned first, unsigned second, const uint4& low, const uint4& high) {
  store_shared(first, uint4{low.x, low.z, high.x, high.z});
  store_shared(second, uint4{low.y, low.w, high.y, high.w});
}

// ---- products: see multiply_keys and multiply_values ----
// S^T / kKeyFactor of a unit, of rows of Q as they are in shared memory.
template <class Stored, int kHeadDim, int kTiles>
JITGEN_FN void multiply_stored_keys(float (&s)[kTiles][4], unsigned keys, unsigned query) {
  float odd[4] = {};   // of a single tile: two sums, because one would wait for each product
#pragma unroll
  for (int n = 0; n < kTiles; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; step += 2) {
    unsigned w[4];   // keys group and group + 8 of 16 dims; then of the next 16
    load_matrix(w, along<kHeadDim / 2, kUnitKeys>(keys, step));
    unsigned a[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) Stored::halves(w[i], a[i / 2][i % 2], a[i / 2][i % 2 + 2]);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      unsigned b[4];
      load_matrix(b, along<kHeadDim, 8 * kTiles>(query + n * 8 * SpanTile<kHeadDim>::kSpanBytes, 2 * step));
      float16::mma(s[n], a[0], b[0], b[1]);
      float16::mma(kTiles == 1 ? odd : s[n], a[1], b[2], b[3]);
    }
  }
  if constexpr (kTiles == 1) s[0][0] += odd[0], s[0][1] += odd[1], s[0][2] += odd[2], s[0][3] += odd[3];
}

// O^T += V^T P^T / kFactor.
template <class Element, class Stored, int kSlices, int kTiles>
JITGEN_FN void multiply_stored_values(float (&o)[kSlices][kTiles][4], const float (&p)[kTiles][4], unsigned values) {
  unsigned b[kTiles][2];
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) b[n][half] = transpose_matrix(Element::pack(p[n][2 * half], p[n][2 * half + 1]));
#pragma unroll
  for (int slice = 0; slice < kSlices; slice += 2) {
    unsigned w[4];   // slices `slice` and the next for the first 8 keys; then for the others
    load_matrix_transposed(w, along<8 * kSlices, kUnitKeys>(values, slice));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned a[4] = {Stored::even(w[i]), Stored::odd(w[i]), Stored::even(w[i + 2]), Stored::odd(w[i + 2])};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) Element::mma(o[slice + i][n], a, b[n][0], b[n][1]);
    }
  }
}

}  // namespace jg
