// Attention on 8-bit operands (e4m3): wgmma of 32 columns, P in e4m3, V transposed, and where all of it lies.
//
// wgmma takes 8-bit operands with the summed index contiguous in shared memory. Q and K lie so; V does not, and each launch
// writes a copy of it: tiles [kHeadDimV][kTileKv], one after the other. transpose_values does so for the heads that come first,
// idle warps of the attention kernel for the others.
//
// In that copy the keys of each 16 are reordered, so that the accumulators of S are the A operand of P V without a shuffle.
// A thread of S holds columns 8 j + 2 quad + {0, 1}, one of an 8-bit A operand four columns 4 quad + {0, 1, 2, 3}: position
// 4 quad + i of the copy is key 2 quad + i of the first 8 for i < 2, and 2 quad + i - 2 of the second 8 for i >= 2.
//
// An 8-bit tile is moved and addressed as one of half as many 16-bit columns: SpanTile<columns / 2>.
#pragma once
#include "jitgen/decode_ptx.cuh"
#include "jitgen/sm90_host.cuh"
#include "jitgen/sm90_schedule.cuh"
#include "jitgen/sm90_softmax.cuh"
#include "jitgen/sm90_wgmma.cuh"

namespace jg {

// ---- wgmma: D[64, N] += A[64, 32] * B[32, N] in e4m3; operands as of Wgmma (sm90_wgmma.cuh) ----
#define JG_DEFINE_FP8_WGMMA(kN, kCount, o0, o1, o2, o3, o4, o5)                                                             \
  template <> struct Fp8Wgmma<kN> {                                                                                         \
    static JITGEN_FN void shared(float (&d)[kN / 8][4], unsigned long long a, unsigned long long b, int add) {              \
      asm volatile(JG_BEGIN(#kN "k32.f32.e4m3.e4m3", o2) " {" JG_TEXT_##kCount "}, %" o0 ", %" o1 ", add, 1, 1;\n}"         \
                   : JG_ACC_##kCount : "l"(a), "l"(b), "r"(add));                                                           \
    }                                                                                                                       \
    static JITGEN_FN void registers(float (&d)[kN / 8][4], const unsigned (&a)[4], unsigned long long b, int add) {         \
      asm volatile(JG_BEGIN(#kN "k32.f32.e4m3.e4m3", o5) " {" JG_TEXT_##kCount "}, {%" o0 ",%" o1 ",%" o2 ",%" o3 "}, %" o4 ", add, 1, 1;\n}" \
                   : JG_ACC_##kCount : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                       \
    }                                                                                                                       \
    template <int kPending> static JITGEN_FN void wait(float (&d)[kN / 8][4]) {                                             \
      asm volatile("wgmma.wait_group.sync.aligned %" o0 ";" : JG_ACC_##kCount : "n"(kPending) : "memory");                  \
    }                                                                                                                       \
  };
template <int kN> struct Fp8Wgmma;
#define JG_TEXT_36 JG_TEXT_30 ",%30,%31,%32,%33,%34,%35"
#define JG_TEXT_68 JG_TEXT_60 ",%60,%61,%62,%63,%64,%65,%66,%67"
#define JG_ACC_36 JG_ACC_32, JG_ACC(8)
#define JG_ACC_68 JG_ACC_64, JG_ACC(16)
JG_DEFINE_FP8_WGMMA(64, 32, "32", "33", "34", "35", "36", "37")
JG_DEFINE_FP8_WGMMA(72, 36, "36", "37", "38", "39", "40", "41")
JG_DEFINE_FP8_WGMMA(128, 64, "64", "65", "66", "67", "68", "69")
JG_DEFINE_FP8_WGMMA(136, 68, "68", "69", "70", "71", "72", "73")
JG_DEFINE_FP8_WGMMA(192, 96, "96", "97", "98", "99", "100", "101")
JG_DEFINE_FP8_WGMMA(256, 128, "128", "129", "130", "131", "132", "133")

// A value that all lanes have, in a uniform register: no ordinary one is free through the KV loop.
JITGEN_FN int to_uniform_register(int x) {
  int r;
  asm volatile("redux.sync.max.s32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(x));
  return r;
}

// ---- P ----
// Weights reach 448, the largest e4m3: exponents are counted from the row maximum plus kWeightBits, and the maximum is kept
// until another exceeds it by kSlackBits. 4 + 4: weights below 2^-10 (at worst, else 2^-14) of the largest lose precision,
// those below 2^-13 vanish; without slack O is rescaled in half of the tiles. Where kernels look at weights in place of logits
// (WeightCheck), the slack is what e4m3 has room for, 4.75 bits.
constexpr int kWeightBits = 4, kSlackBits = 4;
constexpr float kWeightUnit = 1.0f / (1 << kWeightBits);   // what sums of weights must be multiplied by

JITGEN_FN unsigned pack_e4m3(float x0, float x1, float x2, float x3) {   // cvt takes the upper half first
  unsigned r;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}" : "=r"(r) : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
  return r;
}
JITGEN_FN unsigned pack_e4m3(unsigned low, unsigned high) {   // of pairs in half precision
  unsigned r;
  asm("{\n.reg .b16 a, b;\n"
      "cvt.rn.satfinite.e4m3x2.f16x2 a, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f16x2 b, %2;\n"
      "mov.b32 %0, {a, b};\n}" : "=r"(r) : "r"(low), "r"(high));
  return r;
}

// Accumulators as 8-bit A operands.
template <int kColTiles> JITGEN_FN void pack_fp8_tile(unsigned (&p)[kColTiles / 4][4], const float (&s)[kColTiles][4]) {
#pragma unroll
  for (int step = 0; step < kColTiles / 4; ++step)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float(&first)[4] = s[4 * step + r / 2 * 2], (&second)[4] = s[4 * step + r / 2 * 2 + 1];
      p[step][r] = pack_e4m3(first[r % 2 * 2], first[r % 2 * 2 + 1], second[r % 2 * 2], second[r % 2 * 2 + 1]);
    }
}

// ---- exponentials ----
JITGEN_FN unsigned fma_half2(unsigned a, unsigned b, unsigned c) {
  unsigned r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
JITGEN_FN unsigned mul_half2(unsigned a, unsigned b) {
  unsigned r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
JITGEN_FN unsigned add_half2(unsigned a, unsigned b) {
  unsigned r;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
JITGEN_FN float2 from_half2(unsigned x) {
  float2 r;
  asm("{\n.reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.f32.f16 %0, low;\n"
      "cvt.f32.f16 %1, high;\n}" : "=f"(r.x), "=f"(r.y) : "r"(x));
  return r;
}
JITGEN_FN unsigned max_unsigned(unsigned a, unsigned b) {
  unsigned r;
  asm("max.u32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
JITGEN_FN float max_nan(float a, float b) {   // a NaN stays
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// 2^x of two numbers below 16 in half precision and without the exp2 unit. `y` is x + kFixedPoint: its low 16 bits are x + 15 in
// fixed point with 10 bits of fraction. Read as a number, those are 2^n m for x = n + m - 1, 1 <= m < 2. 2^(m - 1) is taken as
// (m^2 + 2) / 3, which is exact at m = 1 (rows of one key stay exact) and else within 0.26 %, 0.02 % on average; e4m3 rounds by
// up to 6 %. x below -15 becomes 0, a NaN stays. LSE was off by up to 6e-4 on an H100, by 5e-4 without polynomials.
constexpr float kFixedPoint = 12288.0f + 15.0f;
JITGEN_FN unsigned exp2_pair(float y0, float y1) {
  const unsigned number = __byte_perm(__float_as_uint(max_nan(y0, 12288.0f)), __float_as_uint(max_nan(y1, 12288.0f)), 0x5410);
  const unsigned power = number & 0xfc00fc00u;   // 2^n
  unsigned mantissa;                             // (number ^ power) | 1.0: one constant an instruction, as no register is free
  asm("lop3.b32 %0, %1, 0x3c003c00, %2, 0xde;" : "=r"(mantissa) : "r"(number), "r"(power));
  return fma_half2(number, mul_half2(mantissa, 0x35503550u), mul_half2(power, 0x39593959u));
}
// Whether weights are too large for e4m3: whether one becomes 448, which all larger ones do, or is a NaN.
struct WeightCheck {
  static constexpr float kLargest = 8.75f;   // log2 of a number between 416 and 448, by polynomials
  unsigned bytes = 0;
  int exponent = 0;   // + kFixedPoint, of those by polynomials: floats above 0 compare as integers do
  JITGEN_FN void add(unsigned weights) { bytes |= weights + 0x02020202u; }   // 448 is 0x7e, a NaN 0x7f
  JITGEN_FN void add(float y0, float y1) { exponent = max(max(exponent, __float_as_int(y0)), __float_as_int(y1)); }
  JITGEN_FN bool fails() const {   // in any lane
    return __any_sync(0xffffffffu, (bytes & 0x80808080u) != 0 | exponent > __float_as_int(kFixedPoint + kLargest));
  }
};
// Exponents of a tile are Linear, or under a soft cap x * (units + third * x^2) + addend, with `third` 0 for what is capped already.
struct Curve {
  float units, third;
  JITGEN_FN float at(float x, float addend) const { return ::fmaf(x, ::fmaf(x * x, third, units), addend); }
};
// Hidden logits as numbers whose square is finite: a Curve takes them.
template <int kColTiles> JITGEN_FN void make_finite(float (&s)[kColTiles][4]) {
#pragma unroll
  for (int j = 0; j < kColTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) s[j][e] = max_nan(s[j][e], -1e18f);
}
// Column tiles 2 `pair` and 2 `pair` + 1 of S become weights, the A operand of P V. kSummed: and are added to the sums.
template <bool kSummed, int kColTiles, class Exponents>
JITGEN_FN void weigh_pair(RowSoftmax& state, const float (&s)[kColTiles][4], unsigned (&p)[kColTiles / 4][4], int pair,
                          bool by_polynomial, const Exponents& exponents, const float (&shift)[2], WeightCheck& check) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float(&first)[4] = s[2 * pair], (&second)[4] = s[2 * pair + 1];
    const float logits[4] = {first[2 * half], first[2 * half + 1], second[2 * half], second[2 * half + 1]};
    unsigned& packed = p[pair / 2][pair % 2 * 2 + half];
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = exponents.at(logits[i], by_polynomial ? kFixedPoint - shift[half] : -shift[half]);
    if (by_polynomial) {
      const unsigned low = exp2_pair(x[0], x[1]), high = exp2_pair(x[2], x[3]);
      if (kSummed) {
        const float2 sums = from_half2(add_half2(low, high));
        state.row_sum[half] += sums.x + sums.y;
      }
      packed = pack_e4m3(low, high);
      check.add(x[0], x[1]), check.add(x[2], x[3]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = exp2(x[i]);
        if (kSummed) state.row_sum[half] += x[i];
      }
      packed = pack_e4m3(x[0], x[1], x[2], x[3]);
      check.add(packed);
    }
  }
}
// All of a tile's, one pair in `kEvery` by polynomials: two weights take 5 issue slots more and spare the exp2 unit 16 cycles. More
// of them were slower on an H100, and so were polynomials in fp32. kStored: they go to shared memory as well, 32 columns at a time,
// so that those done leave their registers to the rest.
template <int kEvery, bool kStored, bool kSummed, int kColTiles, class Exponents>
JITGEN_FN WeightCheck weigh_tile(RowSoftmax& state, const float (&s)[kColTiles][4], unsigned (&p)[kColTiles / 4][4], unsigned p_shared,
                                 int warp, int lane, const Exponents& exponents, const float (&shift)[2]) {
  WeightCheck check;
  using Weights = SpanTile<kColTiles * 4>;
  constexpr int kSteps = Weights::kSpan / 16;
  unsigned first = 0;   // as in store_tile
  if (kStored) first = stay(static_cast<int>(p_shared + Weights::chunk_offset(warp * 16 + (lane & 15), lane >> 4, 64)));
#pragma unroll
  for (int step = 0; step < kColTiles / 4; ++step) {
#pragma unroll
    for (int pair = 2 * step; pair < 2 * step + 2; ++pair)
      weigh_pair<kSummed>(state, s, p, pair, pair % kEvery == kEvery - 1, exponents, shift, check);
    if (kStored) store_matrix((first ^ step % kSteps * 32) + step / kSteps * 64 * Weights::kSpanBytes, p[step]);
  }
  return check;
}

// ---- a soft cap ----
// A look at the values of S under a soft cap: whether all of a warp are far from it, and no maximum rises by more than kSlackBits.
// Then they become exponents at once: `curve`. The largest and the least value of a row tell both, and integer maxima of three
// operands find them: as signed integers floats have their largest value last, as unsigned ones the least of the negative ones.
// No kBounded as of Cap: weights have a range of 8 bits, so maxima must be real ones.
struct CapLook {
  Curve curve;
  bool is_free;
  template <int kColTiles>
  JITGEN_FN CapLook(const RowSoftmax& state, const float (&s)[kColTiles][4], float scale, float factor, float (&shift)[2]) {
    const float units = exponent_units(factor), weight = factor * kLog2E * scale, size = ::fabsf(scale);
    curve = {weight * 0.99960173f, weight * scale * scale * -0.31317315f};
    const float most = size > 1e-7f && size < 1e7f && weight > 0.0f ? Cap::kLow * reciprocal(size) : -1.0f;
    bool is_beyond = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int top = 0;
      unsigned bottom = 0;
#pragma unroll
      for (int j = 0; j < kColTiles; ++j) {
        top = max(max(top, __float_as_int(s[j][2 * half])), __float_as_int(s[j][2 * half + 1]));
        bottom = max_unsigned(max_unsigned(bottom, __float_as_uint(s[j][2 * half])), __float_as_uint(s[j][2 * half + 1]));
      }
      const float origin = state.row_max[half] * units;
      shift[half] = origin;
      is_beyond |= !(::fmaxf(__int_as_float(top), ::fabsf(__uint_as_float(bottom))) <= most) | !(curve.at(__int_as_float(top), 0.0f) <= origin + kSlackBits);
    }
    is_free = JITGEN_FAST_TANH && !__any_sync(0xffffffffu, is_beyond);
  }
};

// All other tiles take tanh.
struct Capped {
  static constexpr bool stays = false;
  float scale;
};
template <int kColTiles> JITGEN_FN void cap_logits(float (&s)[kColTiles][4], const Capped& cap) {
#pragma unroll
  for (int j = 0; j < kColTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) s[j][e] = tanh(s[j][e] * cap.scale);
}

// ---- O in fp32 ----
// The tensor cores add 8-bit products to a short accumulator and cut off the rest: with V of mean 1 and deviation 1, 16k keys
// lose 18 % of O. Every kHeldKeys keys the accumulators are therefore added to sums in shared memory, kept with the row
// maxima they are measured from: 1 % is lost then (every 512: 0.5 %, 5 to 7 % slower; every 2048: 2.3 %, 0 to 4 % faster).
constexpr int kHeldKeys = 1024;

struct Sums { unsigned values, maxima; };   // addresses of one thread

// Sums in fp32, or in bfloat16 where O is large: what rounding takes off those stays in the accumulators, where it is too small to
// cost others their bits, so that they are as exact. They leave head dim 256 room for tiles of 128 keys (of 64: 15 to 28 % slower).
// A thread has 16 bytes of each 2 KiB of the sums, and 8 for the maxima.
template <bool kShort> struct SumsOf;

template <> struct SumsOf<false> {
  static constexpr int kBytes = 4;
  static constexpr bool kLeavesRest = false;   // O is to be overwritten by the next product
  template <int kOutTiles> static JITGEN_FN void add(float (&o)[kOutTiles][4], unsigned values, float upper, float lower) {
#pragma unroll
    for (int j = 0; j < kOutTiles; ++j) {
      const float4 sum = load_shared_float4(values + 2048 * j);
      o[j][0] = ::fmaf(sum.x, upper, o[j][0]), o[j][1] = ::fmaf(sum.y, upper, o[j][1]);
      o[j][2] = ::fmaf(sum.z, lower, o[j][2]), o[j][3] = ::fmaf(sum.w, lower, o[j][3]);
    }
  }
  template <int kOutTiles> static JITGEN_FN void store(float (&o)[kOutTiles][4], unsigned values) {
#pragma unroll
    for (int j = 0; j < kOutTiles; ++j) store_shared(values + 2048 * j, make_float4(o[j][0], o[j][1], o[j][2], o[j][3]));
  }
};

template <> struct SumsOf<true> {
  static constexpr int kBytes = 2;
  static constexpr bool kLeavesRest = true;
  // A word is two numbers. The second is read as it stands, with the bits of the first behind its own: one instruction less, and
  // what the accumulators keep is measured from the same.
  static JITGEN_FN float first(unsigned word) { return __uint_as_float(word << 16); }
  static JITGEN_FN float second(unsigned word) { return __uint_as_float(word); }
  static JITGEN_FN unsigned take_off(float& a, float& b) {
    const unsigned word = bfloat16::pack(a, b);
    a -= first(word), b -= second(word);
    return word;
  }
  template <int kOutTiles> static JITGEN_FN void add(float (&o)[kOutTiles][4], unsigned values, float upper, float lower) {
#pragma unroll
    for (int j = 0; j < kOutTiles; j += 2) {
      const uint4 sum = load_shared_128(values + 1024 * j);
      o[j][0] = ::fmaf(first(sum.x), upper, o[j][0]), o[j][1] = ::fmaf(second(sum.x), upper, o[j][1]);
      o[j][2] = ::fmaf(first(sum.y), lower, o[j][2]), o[j][3] = ::fmaf(second(sum.y), lower, o[j][3]);
      o[j + 1][0] = ::fmaf(first(sum.z), upper, o[j + 1][0]), o[j + 1][1] = ::fmaf(second(sum.z), upper, o[j + 1][1]);
      o[j + 1][2] = ::fmaf(first(sum.w), lower, o[j + 1][2]), o[j + 1][3] = ::fmaf(second(sum.w), lower, o[j + 1][3]);
    }
  }
  template <int kOutTiles> static JITGEN_FN void store(float (&o)[kOutTiles][4], unsigned values) {
#pragma unroll
    for (int j = 0; j < kOutTiles; j += 2) {
      const unsigned a = take_off(o[j][0], o[j][1]), b = take_off(o[j][2], o[j][3]);
      const unsigned c = take_off(o[j + 1][0], o[j + 1][1]), d = take_off(o[j + 1][2], o[j + 1][3]);
      store_shared(values + 1024 * j, make_uint4(a, b, c, d));
    }
  }
};

// O += sums
template <class Kept, int kOutTiles>
JITGEN_FN void add_sums(float (&o)[kOutTiles][4], Sums sums, const float (&row_max)[2], float units) {
  const float2 before = load_shared_float2(sums.maxima);
  const float upper = before.x == row_max[0] ? 1.0f : exp2((before.x - row_max[0]) * units);   // equal: both may be -inf
  const float lower = before.y == row_max[1] ? 1.0f : exp2((before.y - row_max[1]) * units);
  Kept::add(o, sums.values, upper, lower);
}
// sums = O, and O = what they have no bits for, if anything.
template <class Kept, int kOutTiles> JITGEN_FN void store_sums(float (&o)[kOutTiles][4], Sums sums, const float (&row_max)[2]) {
  store_shared(sums.maxima, make_float2(row_max[0], row_max[1]));
  Kept::store(o, sums.values);
}

// ---- V ----
// Copies are made by squares of 64 keys by 64 columns, the early ones before attention, the later ones while it runs. heads: of a
// request, that have copies of their own; first_later: number of the first copy that comes later, or more than there are. counters:
// later squares that are taken; then for each copy its later squares that are done.
struct Copies { int* counters; int heads, first_later, squares_per_copy, num_early, num_later; };

// Those that the first query tiles read, two of them for each SM, are early: a quarter of V for 4 x 4096 and 16 heads. (H100, time
// of hd128, full and causal, 4 x 4096 and 1 x 16384: 0.981 0.970 0.993 0.991 of that with all of them early, hd64 0.971 0.975 0.978.)
// may_wait: whether others may be later. Two query tiles must read each: with 384 rows and 32 x 4096 keys 0.956, with 192 1.154.
inline void share_copies(Copies& copies, long long num_copies, const Schedule& schedule, long long group_size, int num_sms, bool may_wait) {
  const long long per_section = schedule.section * (schedule.num_query_tiles - schedule.num_late);
  const long long first = per_section ? (2 * num_sms + per_section - 1) / per_section * schedule.section / group_size : num_copies;
  const bool has_later = may_wait && first < num_copies && schedule.num_query_tiles * group_size >= 2;
  copies.first_later = has_later ? static_cast<int>(first) : 0x7fffffff;
  copies.num_early = static_cast<int>((has_later ? first : num_copies) * copies.squares_per_copy);
  copies.num_later = static_cast<int>(num_copies * copies.squares_per_copy) - copies.num_early;
}

// A square as the copy engine writes it becomes [columns][keys] in its own place, by one warp. Blocks of 16 x 16 trade places with
// those across the diagonal, two by two. ldmatrix turns pairs of bytes; two rows of keys together have the four bytes of a column,
// in the order above. Even and odd columns are written crosswise, so that the eight rows of a matrix lie in different banks.
struct SquareTranspose {
  static constexpr int kSide = 64, kBytes = kSide * kSide, kBlocks = kSide / 16, kPairs = kBlocks * kBlocks / 2, kAhead = 4;
  using Rows = SpanTile<kSide / 2>;
  static constexpr unsigned kDown = 16 * kSide, kBoth = kDown + 16;   // bytes to the next block below, and to that beside it

  // A pair is the blocks (i, i ^ x) and (i ^ x, i), or for x = 0 (i, i) and (i ^ 1, i ^ 1). Offsets are xored together.
  struct Pair { unsigned from, to, other; };   // of the first block, where it goes, and what leads to the second from either
  static constexpr __host__ __device__ Pair pair(int n) {
    const unsigned x = n / (kBlocks / 2), across = x == 0 ? 1 : x, lowest = across & -across, k = n % (kBlocks / 2);
    const unsigned i = k / lowest * 2 * lowest + k % lowest;   // all without the lowest bit of `across`
    return {x * 16 ^ i * kBoth, x * kDown ^ i * kBoth, across * kBoth};
  }

  static JITGEN_FN void turn(unsigned square) {
    // Worked out for each square: through the loop over them the addresses would take more registers than there are.
    const unsigned lane = stay(static_cast<int>(threadIdx.x)) & 31, upper = lane < 16 ? 0u : ~0u, row = lane & 7;
    const unsigned column = 2 * row + (row / 4 ^ lane / 8 & 1);   // of the block: the row that this lane addresses
    const unsigned from = Rows::chunk_offset(lane & 15, 0, kSide), to = Rows::chunk_offset(column, 0, kSide);
    const unsigned even_first = upper ? 0x7531 : 0x6420;
    unsigned rows[kAhead][4];
#pragma unroll
    for (int n = 0; n < kPairs + kAhead; ++n) {
      if (n >= kAhead) {
        const Pair p = pair(n - kAhead);
        const unsigned(&r)[4] = rows[n % kAhead];
        const unsigned columns[4] = {__byte_perm(r[0], r[1], even_first), __byte_perm(r[0], r[1], even_first ^ 0x1111),
                                     __byte_perm(r[2], r[3], even_first), __byte_perm(r[2], r[3], even_first ^ 0x1111)};
        store_matrix(square + ((to ^ (upper & p.other)) ^ p.to), columns);
      }
      if (n < kPairs) {
        const Pair p = pair(n);
        load_matrix_transposed(rows[n % kAhead], square + ((from ^ (upper & p.other)) ^ p.from));
      }
    }
  }
};

// ---- copies that other CTAs wait for ----
JITGEN_FN void tensor_load_span(unsigned dst, const Operand& t, unsigned barrier, int row, int span, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
      ::"r"(dst), "l"(&t.map), "r"(barrier), "r"(0), "r"(row), "r"(span), "r"(head * t.head_step), "r"(batch * t.batch_step) : "memory");
}
JITGEN_FN void bulk_wait_written() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Counts one more, behind all that this thread has seen written.
JITGEN_FN void add_released(int* counter) { asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory"); }
// Waits for `count`, and orders reads of the copy engine behind it.
JITGEN_FN void wait_for_count(const int* counter, int count) {
  int seen;
  do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  while (seen < count);
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// ---- shared memory and registers of a CTA: sm90_geometry.cuh for 8-bit operands ----
// kSearches: the producer classifies tiles by captured tensors, and spills with 24 registers. kIdle: warps beside the producer that may
// copy V; kExtraBytes: of what a kernel has behind the control block.
template <int kHeadDim, int kTileQ, int kTileKv, int kStages, bool kSearches, int kIdle = 3, int kExtraBytes = 0> struct Fp8Geometry {
  static constexpr int kGroups = kTileQ / 64;   // consumer warp groups, 64 query rows each
  static constexpr int kThreads = 128 * (kGroups + 1);
  static_assert(kTileQ % 64 == 0 && kGroups >= 2 && kGroups <= 3 && kTileKv % 64 == 0, "unsupported tile");

  static constexpr int kProducerRegs = kGroups == 2 ? (kSearches ? 40 : 24) : 32;
  static constexpr int kConsumerRegs = kGroups == 2 ? (kSearches ? 232 : 240) : 160;
  static constexpr bool kSharedP = kGroups == 3 && kHeadDim >= 128;   // S and O leave no room for P in 160 registers

  // V stages, each with its ones, K stages, Q, P, then sums of O and their maxima, over which O leaves in 16 bits, control
  static constexpr int kGroupQBytes = 64 * kHeadDim;
  static constexpr int kTileBytes = kTileKv * kHeadDim;   // of a stage of K, and of V
  static constexpr int kGroupPBytes = 64 * kTileKv;
  using Kept = SumsOf<(kHeadDim > 128)>;
  static constexpr int kGroupSumBytes = 64 * kHeadDim * Kept::kBytes;
  static constexpr int kGroupOBytes = kGroupSumBytes + 1024;
  static constexpr int kOutputCols = kHeadDim;   // that leave at a time
  static constexpr int kOnesBytes = kHeadDim <= 128 ? 1024 : 0;   // eight rows of ones below those of V, as far as there is room
  static constexpr int kValueBytes = kTileBytes + kOnesBytes;
  static_assert(kTileKv <= 128, "the ones follow the rows of one span");
  static constexpr int kKeyAt = kStages * kValueBytes;
  static constexpr int kQueryAt = kKeyAt + kStages * kTileBytes;
  static constexpr int kPAt = kQueryAt + kGroups * kGroupQBytes;
  static constexpr int kOutputAt = kPAt + (kSharedP ? kGroups * kGroupPBytes : 0);
  // Warps beside the producer that copy V of later heads, with a square each. Two groups leave them 24 registers, or head dim 256
  // no memory, and they spill where the producer does.
  static constexpr int kCopiers = kGroups == 3 && !kSearches ? kIdle : 0;
  static constexpr int kSquareAt = kOutputAt + kGroups * kGroupOBytes;
  static constexpr int kControlAt = kSquareAt + kCopiers * SquareTranspose::kBytes;
  static constexpr int kArrivedAt = kControlAt + static_cast<int>(sizeof(ControlBlock<kStages>));   // their barriers
  static constexpr int kExtraAt = (kArrivedAt + 8 * kCopiers + 15) / 16 * 16;
  static constexpr int kSharedBytes = kExtraBytes > 0 ? kExtraAt + kExtraBytes : kArrivedAt + 8 * kCopiers;
  static_assert(kSharedBytes <= 232448, "tile does not fit in shared memory");   // 227 KiB
  static_assert(kTileBytes % 1024 == 0 && kGroupQBytes % 1024 == 0, "tiles must stay 1024-byte aligned");
};

}  // namespace jg
