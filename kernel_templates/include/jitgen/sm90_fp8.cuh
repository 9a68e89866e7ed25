// Attention on 8-bit operands (e4m3): wgmma of 32 columns, P in e4m3, V transposed, and where all of it lies.
//
// wgmma takes 8-bit operands with the summed index contiguous in shared memory. Q and K lie so; V does not, and
// transpose_values writes a copy of it once for each launch: tiles [kHeadDimV][kTileKv], one after the other.
//
// In that copy the keys of each 16 are reordered, so that the accumulators of S are the A operand of P V without a shuffle.
// A thread of S holds columns 8 j + 2 quad + {0, 1}, one of an 8-bit A operand four columns 4 quad + {0, 1, 2, 3}: position
// 4 quad + i of the copy is key 2 quad + i of the first 8 for i < 2, and 2 quad + i - 2 of the second 8 for i >= 2.
//
// An 8-bit tile is moved and addressed as one of half as many 16-bit columns: SpanTile<columns / 2>.
#pragma once
#include "jitgen/decode_ptx.cuh"
#include "jitgen/sm90_host.cuh"
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
// those below 2^-13 vanish; without slack O is rescaled in half of the tiles.
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
// Column tiles 2 `pair` and 2 `pair` + 1 of S become weights, the A operand of P V. kSummed: and are added to the sums.
template <bool kSummed, int kColTiles>
JITGEN_FN void weigh_pair(RowSoftmax& state, const float (&s)[kColTiles][4], unsigned (&p)[kColTiles / 4][4], int pair,
                          bool by_polynomial, float units, const float (&shift)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float(&first)[4] = s[2 * pair], (&second)[4] = s[2 * pair + 1];
    const float logits[4] = {first[2 * half], first[2 * half + 1], second[2 * half], second[2 * half + 1]};
    unsigned& packed = p[pair / 2][pair % 2 * 2 + half];
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = ::fmaf(logits[i], units, by_polynomial ? kFixedPoint - shift[half] : -shift[half]);
    if (by_polynomial) {
      const unsigned low = exp2_pair(x[0], x[1]), high = exp2_pair(x[2], x[3]);
      if (kSummed) {
        const float2 sums = from_half2(add_half2(low, high));
        state.row_sum[half] += sums.x + sums.y;
      }
      packed = pack_e4m3(low, high);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = exp2(x[i]);
        if (kSummed) state.row_sum[half] += x[i];
      }
      packed = pack_e4m3(x[0], x[1], x[2], x[3]);
    }
  }
}
// All of a tile's, one pair in `kEvery` by polynomials: two weights take 5 issue slots more and spare the exp2 unit 16 cycles. More
// of them were slower on an H100, and so were polynomials in fp32. kStored: they go to shared memory as well, 32 columns at a time,
// so that those done leave their registers to the rest.
template <int kEvery, bool kStored, bool kSummed, int kColTiles>
JITGEN_FN void weigh_tile(RowSoftmax& state, const float (&s)[kColTiles][4], unsigned (&p)[kColTiles / 4][4], unsigned p_shared,
                          int warp, int lane, float units, const float (&shift)[2]) {
  using Weights = SpanTile<kColTiles * 4>;
  constexpr int kSteps = Weights::kSpan / 16;
  unsigned first = 0;   // as in store_tile
  if (kStored) first = stay(static_cast<int>(p_shared + Weights::chunk_offset(warp * 16 + (lane & 15), lane >> 4, 64)));
#pragma unroll
  for (int step = 0; step < kColTiles / 4; ++step) {
#pragma unroll
    for (int pair = 2 * step; pair < 2 * step + 2; ++pair)
      weigh_pair<kSummed>(state, s, p, pair, pair % kEvery == kEvery - 1, units, shift);
    if (kStored) store_matrix((first ^ step % kSteps * 32) + step / kSteps * 64 * Weights::kSpanBytes, p[step]);
  }
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
// Four rows of four bytes become four columns of four.
JITGEN_FN void transpose_bytes(const unsigned (&rows)[4], unsigned (&columns)[4]) {
  const unsigned a = __byte_perm(rows[0], rows[1], 0x5140), b = __byte_perm(rows[2], rows[3], 0x5140);
  const unsigned c = __byte_perm(rows[0], rows[1], 0x7362), d = __byte_perm(rows[2], rows[3], 0x7362);
  columns[0] = __byte_perm(a, b, 0x5410), columns[1] = __byte_perm(a, b, 0x7632);
  columns[2] = __byte_perm(c, d, 0x5410), columns[3] = __byte_perm(c, d, 0x7632);
}

// V of one KV head: `rows` is its first row, `stride` in bytes. A CTA writes one tile; keys past kv_len become zeros, as a
// weight of 0 would not hide a NaN. A thread takes 32 keys of four columns, so that a warp reads whole rows; the tile leaves
// by way of shared memory, so that it writes whole lines.
template <int kHeadDimV, int kTileKv> struct TransposeValues {
  static constexpr int kLanes = kHeadDimV / 4, kThreads = kLanes * (kTileKv / 32), kTileBytes = kHeadDimV * kTileKv;
  static constexpr int kChunks = kTileKv / 16;   // of 16 bytes, in a row of the tile
  static_assert(kTileKv % 64 == 0 && kThreads <= 1024, "unsupported tile");

  // Chunks trade places so that neither a warp's writes nor its reads meet in a bank.
  static JITGEN_FN unsigned chunk_offset(int row, int chunk) { return row * kTileKv + (chunk ^ (row / 4 & (kChunks - 1))) * 16; }

  static JITGEN_FN void run(const char* rows, long long stride, int first_key, int kv_len, char* tile) {
    __shared__ __align__(16) char memory[kTileBytes];
    const unsigned shared = shared_address(memory);
    const int column = threadIdx.x % kLanes * 4, place = threadIdx.x / kLanes * 32;
    unsigned values[32];
#pragma unroll
    for (int key = 0; key < 32; ++key) {
      const int at = first_key + place + key;
      values[key] = at < kv_len ? __ldg(reinterpret_cast<const unsigned*>(rows + at * stride + column)) : 0;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unsigned out[4][4];   // [quad][column]
#pragma unroll
      for (int quad = 0; quad < 4; ++quad) {
        const int key = 16 * half + 2 * quad;
        transpose_bytes({values[key], values[key + 1], values[key + 8], values[key + 9]}, out[quad]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        store_shared(shared + chunk_offset(column + i, place / 16 + half), make_uint4(out[0][i], out[1][i], out[2][i], out[3][i]));
    }
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kTileBytes / 16 / kThreads; ++step) {
      const int i = threadIdx.x + step * kThreads;
      *reinterpret_cast<uint4*>(tile + i * 16) = load_shared_128(shared + chunk_offset(i / kChunks, i % kChunks));
    }
  }
};

// ---- shared memory and registers of a CTA: sm90_geometry.cuh for 8-bit operands ----
// kSearches: the producer classifies tiles by captured tensors, and spills with 24 registers.
template <int kHeadDim, int kTileQ, int kTileKv, int kStages, bool kSearches> struct Fp8Geometry {
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
  static constexpr int kControlAt = kOutputAt + kGroups * kGroupOBytes;
  static constexpr int kSharedBytes = kControlAt + static_cast<int>(sizeof(ControlBlock<kStages>));
  static_assert(kSharedBytes <= 232448, "tile does not fit in shared memory");   // 227 KiB
  static_assert(kTileBytes % 1024 == 0 && kGroupQBytes % 1024 == 0, "tiles must stay 1024-byte aligned");
};

}  // namespace jg
