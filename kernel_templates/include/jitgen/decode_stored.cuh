// Products of decode for K and V stored in 8 bits: read as bytes, turned into 16-bit elements in registers, then as in
// decode_tile.cuh.
//
// A word of a row is four neighbouring dims of K, or two neighbouring dims of V for two keys. Its even and its odd bytes make
// a pair of 16-bit elements each, by shifts and masks alone:
//   - floats: sign, exponent and mantissa move to their places; what is left is a constant factor (kFactor), as the exponents
//     have different biases. That holds for denormals too; codes of NaN and infinity are not told apart from numbers.
//   - integers: the low seven bits become the mantissa of 2^n + m, from which 2^n, or 2^n + 128 for a negative one, is taken.
// Pairs of K are dims {4 q, 4 q + 2} and {4 q + 1, 4 q + 3} of each 16: Q lies in shared memory in that order
// (`store_query_pair`). Pairs of V are two keys of one dim; rows group and group + 8 of a slice of O^T are its dims 2 group and
// 2 group + 1.
#pragma once
#include "jitgen/decode_tile.cuh"

namespace jg {

// ---- formats ----
// Even bytes of a word as a pair, and odd ones; kShift is how far the magnitude moves up.
template <int kShift> struct MovedBits {
  static constexpr unsigned kMagnitude = 0x007f007fu << kShift, kSign = 0x80008000u;
  static JITGEN_FN unsigned even(unsigned w) { return (w << 8 & kSign) | (w << kShift & kMagnitude); }
  static JITGEN_FN unsigned odd(unsigned w) { return (w & kSign) | ((kShift < 8 ? w >> (8 - kShift) : w) & kMagnitude); }
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

// kSlotFactor multiplies weights together with the scale of their slot, about the largest value over the largest element, which
// would leave float16 no room: weights are at most 2^8.
template <class Element> struct float8_e4m3fn;
template <> struct float8_e4m3fn<bfloat16> : MovedBits<4> { static constexpr float kFactor = 0x1p120f, kSlotFactor = 1.0f; };
template <> struct float8_e4m3fn<float16> : MovedBits<7> { static constexpr float kFactor = 0x1p8f, kSlotFactor = 0x1p5f; };
template <class Element> struct float8_e5m2;
template <> struct float8_e5m2<bfloat16> : MovedBits<5> { static constexpr float kFactor = 0x1p112f, kSlotFactor = 1.0f; };
template <> struct float8_e5m2<float16> : MovedBits<8> { static constexpr float kFactor = 1.0f, kSlotFactor = 0x1p12f; };
template <class Element> struct int8;
template <> struct int8<bfloat16> : CountedBits<bfloat16, 0x43004300u> { static constexpr float kFactor = 1.0f, kSlotFactor = 1.0f; };
template <> struct int8<float16> : CountedBits<float16, 0x64006400u> { static constexpr float kFactor = 1.0f, kSlotFactor = 0x1p4f; };

// ---- Q ----
// 16 dims of a row of Q, given as its chunks `low` and `high`, in the order of the pairs of K.
JITGEN_FN void store_query_pair(unsigned first, unsigned second, uint4 low, uint4 high) {
  const auto even = [](unsigned a, unsigned b) { return __byte_perm(a, b, 0x5410); };   // their lower halves
  const auto odd = [](unsigned a, unsigned b) { return __byte_perm(a, b, 0x7632); };
  store_shared(first, uint4{even(low.x, low.y), even(low.z, low.w), even(high.x, high.y), even(high.z, high.w)});
  store_shared(second, uint4{odd(low.x, low.y), odd(low.z, low.w), odd(high.x, high.y), odd(high.z, high.w)});
}

// ---- products: see multiply_keys and multiply_values ----
// S^T / kFactor of a unit.
template <class Element, class Stored, int kHeadDim, int kTiles>
JITGEN_FN void multiply_stored_keys(float (&s)[kTiles][4], unsigned keys, unsigned query) {
  float odd[4] = {};   // of a single tile: two sums, because one would wait for each product
#pragma unroll
  for (int n = 0; n < kTiles; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; step += 2) {
    unsigned w[4];   // keys group and group + 8 of 16 dims; then of the next 16
    load_matrix(w, along<kHeadDim / 2, kUnitKeys>(keys, step));
    const unsigned a[2][4] = {{Stored::even(w[0]), Stored::even(w[1]), Stored::odd(w[0]), Stored::odd(w[1])},
                              {Stored::even(w[2]), Stored::even(w[3]), Stored::odd(w[2]), Stored::odd(w[3])}};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      unsigned b[4];
      load_matrix(b, along<kHeadDim, 8 * kTiles>(query + n * 8 * SpanTile<kHeadDim>::kSpanBytes, 2 * step));
      Element::mma(s[n], a[0], b[0], b[1]);
      Element::mma(kTiles == 1 ? odd : s[n], a[1], b[2], b[3]);
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
