// Maths that the variant section of a CPU kernel calls. Every function is branch-free, so a loop over hook calls
// vectorises; the error bounds are measured over the finite range against float64.
//
// Coefficients are minimax fits (Remez exchange) of our own, named by the quotient they approximate.
#pragma once

#include "jitgen/cpu_types.h"

#ifndef JITGEN_FAST_TANH
#define JITGEN_FAST_TANH 0   // jg::tanh is tanh_approx: set where weights are bfloat16 anyhow
#endif

namespace jg {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
// ln 2 in two floats: the first has 9 significant bits, so its product with an exponent is exact.
constexpr float kLn2High = 0.693359375f;
constexpr float kLn2Low = -2.12194440054690583e-4f;
constexpr float kRoundMagic = 12582912.0f;   // 1.5 * 2^23: adding it rounds to an integer held in the low bits

// ---- comparison-like ----
// min and max propagate NaN as torch.minimum and torch.maximum do.
JITGEN_FN float min(float a, float b) { return a < b || a != a ? a : b; }
JITGEN_FN float max(float a, float b) { return a > b || a != a ? a : b; }
JITGEN_FN float abs(float x) { return __builtin_fabsf(x); }
JITGEN_FN float floor(float x) { return __builtin_floorf(x); }
JITGEN_FN float ceil(float x) { return __builtin_ceilf(x); }
JITGEN_FN float trunc(float x) { return __builtin_truncf(x); }
JITGEN_FN float round(float x) { return __builtin_rintf(x); }   // half to even, as torch.round
JITGEN_FN float sqrt(float x) { return __builtin_sqrtf(x); }
JITGEN_FN float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
JITGEN_FN float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x; }
JITGEN_FN bool isnan(float x) { return x != x; }
JITGEN_FN bool isinf(float x) { return __builtin_fabsf(x) == INFINITY; }
JITGEN_FN bool isfinite(float x) { return __builtin_fabsf(x) < INFINITY; }
JITGEN_FN float copy_sign(float magnitude, float sign) {
  return bits_float((float_bits(magnitude) & 0x7fffffff) | (float_bits(sign) & static_cast<int>(0x80000000u)));
}

// ---- exponentials ----
// 2^n * e^r for |r| <= ln(2) / 2. `rounded` is n + kRoundMagic: its low bits are added to the exponent field.
JITGEN_FN float exp_scaled(float r, float rounded) {
  float p = 0.00138146f;                       // (e^r - 1 - r) / r^2
  p = p * r + 0.00836872f;
  p = p * r + 0.04166839f;
  p = p * r + 0.16666521f;
  p = p * r + 0.49999993f;
  const float value = p * (r * r) + r + 1.0f;
  const uint32_t exponent = static_cast<uint32_t>(float_bits(rounded)) << 23;
  return bits_float(static_cast<int>(static_cast<uint32_t>(float_bits(value)) + exponent));
}
JITGEN_FN float exp_in_range(float x) {
  const float rounded = x * kLog2E + kRoundMagic;
  const float n = rounded - kRoundMagic;
  return exp_scaled((x - n * kLn2High) - n * kLn2Low, rounded);
}
// e^x, relative error below 1.2e-7. Results under 2^-126 become 0.
JITGEN_FN float exp(float x) {
  const float value = exp_in_range(x);
  return x < -87.33654f ? 0.0f : x <= 88.72283f ? value : x + INFINITY;   // the sum keeps NaN
}
// The weight e^x of a logit that lies x <= 0 under its row maximum; a masked one (-inf) gives exactly 0.
JITGEN_FN float exp_weight(float x) {
  const float value = exp_in_range(x);
  return x < -87.33654f ? 0.0f : value;
}
JITGEN_FN float exp2(float x) {
  const float rounded = x + kRoundMagic;
  const float value = exp_scaled((x - (rounded - kRoundMagic)) * kLn2, rounded);
  return x < -126.0f ? 0.0f : x < 128.0f ? value : x + INFINITY;
}

// ---- logarithms ----
// Relative error below 1.5e-7, denormals included.
JITGEN_FN float log(float x) {
  const bool denormal = x < 0x1p-126f;
  const int bits = float_bits(denormal ? x * 0x1p23f : x) - 0x3f3504f3;     // offset of sqrt(1/2)
  const float exponent = static_cast<float>((bits >> 23) - (denormal ? 23 : 0));
  const float f = bits_float((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;        // in [sqrt(1/2) - 1, sqrt(2) - 1]
  float p = -0.0763450f;                       // (log(1 + f) - f + f^2 / 2) / f^3
  p = p * f + 0.12761578f;
  p = p * f - 0.13160182f;
  p = p * f + 0.14201758f;
  p = p * f - 0.16623357f;
  p = p * f + 0.20001227f;
  p = p * f - 0.25000821f;
  p = p * f + 0.33333332f;
  const float square = f * f;
  const float tail = p * f * square + exponent * kLn2Low - 0.5f * square;
  const float value = exponent * kLn2High + (tail + f);
  const float edge = x == 0.0f ? -INFINITY : __builtin_nanf("");
  return x > 0.0f ? (x < INFINITY ? value : x) : edge;
}
JITGEN_FN float log2(float x) { return log(x) * kLog2E; }
JITGEN_FN float log1p(float x) {
  const float u = 1.0f + x;
  const float lost = u > 0.0f && u < INFINITY ? (x - (u - 1.0f)) / u : 0.0f;   // what rounding of 1 + x dropped
  return log(u) + lost;
}

// ---- sigmoids ----
// 1 / x for x in [2^-100, 2^100]: half the time of a division. Subtracting the bits of x from a constant leaves r with
// e = 1 - x * r within 0.0506 of 0, and 1 / x = r / (1 - e) = r (1 + e) (1 + e^2) (1 + e^4) ... Relative error below 7e-6 of
// the first, 3e-7 of the second.
JITGEN_FN float rough_inverse(float x) {
  const float r = bits_float(0x7ef31000 - float_bits(x)), e = 1.0f - x * r, half = r + r * e;
  return half + half * (e * e);
}
JITGEN_FN float quick_inverse(float x) {
  const float r = bits_float(0x7ef31000 - float_bits(x)), e = 1.0f - x * r, half = r + r * e, square = e * e;
  const float inverse = half + half * square;
  return inverse + inverse * (square * square);
}
// tanh: value, where the square of x is at most limit, else 1 with the sign of x.
JITGEN_FN float saturated(float value, float x, float square, float limit) { return square > limit ? copy_sign(1.0f, x) : value; }

// Rational fits in z = x^2, up to where tanh rounds to 1, relative error below 4.1e-7; and up to 6.2, where it is within 1e-5 of
// 1, relative error below 1.6e-5: what rounding weights to bfloat16 leaves of that is little even where it is multiplied by 50.
JITGEN_FN float tanh_exact(float x) {
  const float z = x * x;
  float p = 1.33546497e-8f;
  p = p * z + 2.060907285e-5f;
  p = p * z + 3.495587502e-3f;
  p = p * z + 1.338102509e-1f;
  p = p * z + 0.99999998f;
  float q = 7.776553206e-7f;
  q = q * z + 3.285633833e-4f;
  q = q * z + 2.587697976e-2f;
  q = q * z + 4.671434068e-1f;
  q = q * z + 1.0f;
  return saturated(x * p * quick_inverse(q), x, z, 81.0f);
}
JITGEN_FN float tanh_approx(float x) {
  const float z = x * x;
  float p = 1.490088435e-3f;
  p = p * z + 1.144508242e-1f;
  p = p * z + 9.999909285e-1f;
  float q = 5.471989099e-5f;
  q = q * z + 1.746724487e-2f;
  q = q * z + 4.477235784e-1f;
  q = q * z + 1.0f;
  return saturated(x * p * rough_inverse(q), x, z, 38.44f);
}
JITGEN_FN float tanh(float x) { return JITGEN_FAST_TANH ? tanh_approx(x) : tanh_exact(x); }
JITGEN_FN float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }
JITGEN_FN float softplus(float x) { return max(x, 0.0f) + log1p(exp(-abs(x))); }
JITGEN_FN float logsigmoid(float x) { return -softplus(-x); }
JITGEN_FN float silu(float x) { return x * sigmoid(x); }
// Relative error below 3e-7.
JITGEN_FN float erf(float x) {
  const float z = x * x;
  float p = 7.85803198e-5f;                    // erf(x) / x on [0, 1]
  p = p * z - 8.01156076e-4f;
  p = p * z + 5.18850034e-3f;
  p = p * z - 2.68539168e-2f;
  p = p * z + 1.12835883e-1f;
  p = p * z - 3.76126262e-1f;
  p = p * z + 1.12837917f;
  const float a = abs(x) > 4.0f ? 4.0f : abs(x);
  float r = 1.04328977e-5f;                    // -log(1 - erf(a)) / a on [0.9, 4]
  r = r * a - 3.14856055e-4f;
  r = r * a + 3.61033404e-3f;
  r = r * a - 2.36945502e-2f;
  r = r * a + 1.06159032e-1f;
  r = r * a + 6.35198044e-1f;
  r = r * a + 1.12863707f;
  return abs(x) < 1.0f ? x * p : copy_sign(1.0f - exp(-a * r), x);
}
JITGEN_FN float gelu(float x) { return 0.5f * x * (1.0f + erf(x * 0.70710678118654752f)); }
JITGEN_FN float gelu_tanh(float x) { return 0.5f * x * (1.0f + tanh(0.79788456f * (x + 0.044715f * x * x * x))); }

// ---- trigonometry ----
// The quarter turn is removed in double precision: absolute error near 1e-7 for |x| up to 1e9.
struct QuarterTurn { float rest; int turns; };
JITGEN_FN QuarterTurn quarter_turn(float x) {
  constexpr double kMagic = 6755399441055744.0;   // 1.5 * 2^52
  const double rounded = x * 0.63661977236758134 + kMagic;
  const double n = rounded - kMagic;
  const int turns = static_cast<int>(__builtin_bit_cast(int64_t, rounded));
  return {static_cast<float>(x - n * 1.57079632679489662), turns};
}
JITGEN_FN float sin_turned(QuarterTurn t) {
  const float z = t.rest * t.rest;
  const float sine = t.rest + t.rest * z * ((-0.000195172347f * z + 0.00833217769f) * z - 0.166666549f);
  const float cosine = 1.0f - 0.5f * z + z * z * ((2.44330827e-5f * z - 0.00138873156f) * z + 0.0416666457f);
  const float value = t.turns & 1 ? cosine : sine;
  return t.turns & 2 ? -value : value;
}
JITGEN_FN float sin(float x) { return sin_turned(quarter_turn(x)); }
JITGEN_FN float cos(float x) {
  const QuarterTurn t = quarter_turn(x);
  return sin_turned({t.rest, t.turns + 1});
}

// ---- powers and integers ----
JITGEN_FN float pow(float x, int n) {
  float result = 1.0f;
  for (uint32_t left = n < 0 ? 0u - static_cast<uint32_t>(n) : n; left; left >>= 1, x *= x) result *= left & 1 ? x : 1.0f;
  return n < 0 ? 1.0f / result : result;
}
JITGEN_FN int min(int a, int b) { return a < b ? a : b; }
JITGEN_FN int max(int a, int b) { return a > b ? a : b; }
JITGEN_FN int abs(int a) { return a < 0 ? -a : a; }
JITGEN_FN long long min(long long a, long long b) { return a < b ? a : b; }
JITGEN_FN long long max(long long a, long long b) { return a > b ? a : b; }
JITGEN_FN long long abs(long long a) { return a < 0 ? -a : a; }

// Floor semantics of Python for any sign; a zero divisor yields 0. No vector unit divides integers, double does so
// exactly for 32 bits: a quotient that is not whole is at least 1 / |b| away from the next integer.
JITGEN_FN int floor_div(int a, int b) {
  const double quotient = __builtin_floor(static_cast<double>(a) / static_cast<double>(b));
  return b == 0 ? 0 : static_cast<int>(quotient < 2147483647.0 ? quotient : 2147483647.0);
}
JITGEN_FN int floor_mod(int a, int b) {
  const uint32_t product = static_cast<uint32_t>(floor_div(a, b)) * static_cast<uint32_t>(b);
  return b == 0 ? 0 : static_cast<int>(static_cast<uint32_t>(a) - product);
}
JITGEN_FN long long floor_div(long long a, long long b) {
  const long long divisor = b == 0 ? 1 : b, quotient = a / divisor;
  return b == 0 ? 0 : quotient - (a % divisor != 0 && (a < 0) != (b < 0));
}
JITGEN_FN long long floor_mod(long long a, long long b) {
  const long long divisor = b == 0 ? 1 : b, rest = a % divisor;
  return b == 0 ? 0 : rest + (rest != 0 && (rest < 0) != (b < 0) ? b : 0);
}
JITGEN_FN float ffloor_div(float a, float b) { return floor(a / b); }
JITGEN_FN float ffloor_mod(float a, float b) {
  const double quotient = __builtin_floor(static_cast<double>(a) / static_cast<double>(b));
  return static_cast<float>(a - quotient * b);
}
JITGEN_FN int popcount(int a) {
  uint32_t v = static_cast<uint32_t>(a);       // pairwise sums: __builtin_popcount does not vectorise on AVX2
  v = v - (v >> 1 & 0x55555555u);
  v = (v & 0x33333333u) + (v >> 2 & 0x33333333u);
  return static_cast<int>(((v + (v >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24);
}
JITGEN_FN int popcount(long long a) { return popcount(static_cast<int>(a)) + popcount(static_cast<int>(a >> 32)); }
JITGEN_FN int shl(int a, int n) { return static_cast<int>(static_cast<uint32_t>(a) << (n & 31)); }
JITGEN_FN int shr(int a, int n) { return a >> min(n & 63, 31); }
JITGEN_FN long long shl(long long a, int n) {
  return static_cast<long long>(static_cast<unsigned long long>(a) << (n & 63));
}
JITGEN_FN long long shr(long long a, int n) { return a >> (n & 63); }

}  // namespace jg
