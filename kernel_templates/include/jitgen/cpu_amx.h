// Products of bfloat16 tiles on AMX, the counterpart of cpu_vector.h.
//
// A tile register holds 16 rows of 64 bytes. One instruction adds A[16][32] B[32][16] to C[16][16]: A and B in bfloat16, C in
// float32, and B as 16 rows of pairs, B[2i][n] beside B[2i + 1][n]. Memory is counted in floats; one holds such a pair.
//
// Packed layout, a register's 1 KiB at a time. K of a tile: [kTileKv / 16][head_dim / 32]. V of a tile: [head_dim_v / 16]
// [kTileKv / 32]. The weights of a row lie in the first half of the memory of its logits.
//
// Instructions are written out, so that a compiler needs no option for them and <immintrin.h> need not be parsed.
#pragma once

#include <string.h>
#include <unistd.h>

#define JITGEN_FAST_TANH 1
#include "jitgen/cpu_gemm.h"
#include "jitgen/cpu_pack.h"
#include "jitgen/cpu_rows.h"

namespace jg::amx {

static_assert(kVec == 16 && kPanel == 32, "a panel is one step of the depth of P V");
constexpr int kTileRows = 16, kTileDepth = 32;       // bfloat16 of a row
constexpr int kTileFloats = 256, kRowFloats = 16;    // of a register, of its row

// ---- instructions ----
template <int kTile> JITGEN_FN void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(kTile)); }
template <int kTile> JITGEN_FN void tile_load(const float* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,4), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile> JITGEN_FN void tile_store(float* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,4)" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB> JITGEN_FN void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

// x - floor(x), 0 for -inf
JITGEN_FN Vec fraction(Vec x) {
  Vec y;
  asm("vreduceps $9, %1, %0" : "=v"(y) : "v"(x));
  return y;
}
// x * 2^floor(n)
JITGEN_FN Vec scale_by_power(Vec x, Vec n) {
  Vec y;
  asm("vscalefps %2, %1, %0" : "=v"(y) : "v"(x), "v"(n));
  return y;
}
// 32 floats as bfloat16
JITGEN_FN Vec to_bfloat16(Vec low, Vec high) {
  Vec y;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(y) : "v"(high), "v"(low));
  return y;
}

// ---- the tile registers of a thread ----
struct Registers {
  Registers() {
    struct alignas(64) { uint8_t palette, start_row, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = kTileRows;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Registers() { asm volatile("tilerelease"); }   // or every switch to another thread would save them
  Registers(const Registers&) = delete;

  // Whether this process may use them. It must ask once, for all its threads: they add to what a signal handler saves.
  static bool are_usable() {
    constexpr long kArchPrctl = 158, kRequestPermission = 0x1023, kTileData = 18;
    static int answer = 0;   // 1: yes, 2: no
    int known = __atomic_load_n(&answer, __ATOMIC_RELAXED);
    if (known == 0) {
      known = syscall(kArchPrctl, kRequestPermission, kTileData) == 0 ? 1 : 2;
      __atomic_store_n(&answer, known, __ATOMIC_RELAXED);
    }
    return known == 1;
  }
};

// ---- matrix products ----
// The accumulators kFirst.. (+)= A[16 * kBlocks][32 * steps] B[32 * steps][16], kBlocks <= 3, from and for C[16 * kBlocks][16].
// lda, ldc: floats between rows.
template <int kFirst, int kBlocks, bool kAccumulate>
JITGEN_FN void multiply_blocks(const float* a, int64_t lda, const float* b, int steps, const float* c, int64_t ldc) {
  constexpr int kA = 6, kB = 7;
  const float *a1 = a + kTileRows * lda, *a2 = a1 + kTileRows * lda;
  const float *c1 = c + kTileRows * ldc, *c2 = c1 + kTileRows * ldc;
  if constexpr (kAccumulate) tile_load<kFirst>(c, ldc);
  else tile_zero<kFirst>();
  if constexpr (kBlocks > 1) kAccumulate ? tile_load<kFirst + 1>(c1, ldc) : tile_zero<kFirst + 1>();
  if constexpr (kBlocks > 2) kAccumulate ? tile_load<kFirst + 2>(c2, ldc) : tile_zero<kFirst + 2>();
#pragma GCC unroll 8
  for (int i = 0; i < steps; ++i) {
    tile_load<kB>(b + i * kTileFloats, kRowFloats);
    tile_load<kA>(a + i * kRowFloats, lda);
    tile_multiply<kFirst, kA, kB>();
    if constexpr (kBlocks > 1) tile_load<kA>(a1 + i * kRowFloats, lda), tile_multiply<kFirst + 1, kA, kB>();
    if constexpr (kBlocks > 2) tile_load<kA>(a2 + i * kRowFloats, lda), tile_multiply<kFirst + 2, kA, kB>();
  }
}

template <int kFirst, int kBlocks> JITGEN_FN void store_blocks(float* c, int64_t ldc) {
  tile_store<kFirst>(c, ldc);
  if constexpr (kBlocks > 1) tile_store<kFirst + 1>(c + kTileRows * ldc, ldc);
  if constexpr (kBlocks > 2) tile_store<kFirst + 2>(c + 2 * kTileRows * ldc, ldc);
}

// The same for `columns` blocks of 16 columns and `groups` of kBlocks row blocks. ldb: floats between the blocks of B. Results
// wait in three of six accumulators while the others fill: a store at once would wait for the last product.
template <int kBlocks, bool kAccumulate>
JITGEN_FN void multiply_groups(int groups, int columns, const float* a, int64_t lda, const float* b, int64_t ldb, int steps,
                               float* c, int64_t ldc) {
  float* waiting = nullptr;
  bool odd = false;
  for (int n = 0; n < columns; ++n)
    for (int m = 0; m < groups; ++m, odd = !odd) {
      const float *a_m = a + m * kBlocks * kTileRows * lda, *b_n = b + n * ldb;
      float* c_mn = c + m * kBlocks * kTileRows * ldc + n * kTileRows;
      if (odd) {
        multiply_blocks<3, kBlocks, kAccumulate>(a_m, lda, b_n, steps, c_mn, ldc);
        store_blocks<0, kBlocks>(waiting, ldc);
      } else {
        multiply_blocks<0, kBlocks, kAccumulate>(a_m, lda, b_n, steps, c_mn, ldc);
        if (waiting) store_blocks<3, kBlocks>(waiting, ldc);
      }
      waiting = c_mn;
    }
  if (odd) store_blocks<0, kBlocks>(waiting, ldc);
  else if (waiting) store_blocks<3, kBlocks>(waiting, ldc);
}

// The same for any number of rows, widened to whole blocks.
template <bool kAccumulate>
JITGEN_FN void multiply_rows(int rows, int columns, const float* a, int64_t lda, const float* b, int64_t ldb, int steps, float* c,
                             int64_t ldc) {
  const int blocks = static_cast<int>(ceil_div(rows, kTileRows)), groups = blocks / 3, done = groups * 3 * kTileRows;
  multiply_groups<3, kAccumulate>(groups, columns, a, lda, b, ldb, steps, c, ldc);
  a += done * lda, c += done * ldc;
  if (blocks % 3 == 2) multiply_groups<2, kAccumulate>(1, columns, a, lda, b, ldb, steps, c, ldc);
  if (blocks % 3 == 1) multiply_groups<1, kAccumulate>(1, columns, a, lda, b, ldb, steps, c, ldc);
}

// ---- bfloat16 in memory ----
typedef uint16_t Bits16 __attribute__((may_alias));
JITGEN_FN Vec4 load_pairs(const bf16_16* p) { return *reinterpret_cast<const Vec4Unaligned*>(p); }   // 8 elements
JITGEN_FN VecU32 load_bits(const bf16_16* p) {
  return __builtin_convertvector(*reinterpret_cast<const VecU16Unaligned*>(p), VecU32);
}

// ---- weights ----
// 2^x for x <= 0, relative error below 3e-6: what rounding to bfloat16 leaves of it is 2e-3. -inf gives exactly 0.
JITGEN_FN Vec exp2_weight(Vec x) {
  const Vec f = fraction(x);
  Vec p = splat(0.0134266843f);                       // (2^f - 1) / f on [0, 1)
  p = p * f + splat(0.0522424742f);
  p = p * f + splat(0.241280205f);
  p = p * f + splat(0.693044845f);
  return scale_by_power(p * f + splat(1.0f), x);
}

JITGEN_FN Vec larger(Vec x, Vec y) { return x > y ? x : y; }   // y where x is NaN
JITGEN_FN float max_lanes(Vec v) {
  float max = -INFINITY;
#pragma omp simd reduction(max : max)
  for (int i = 0; i < kVec; ++i) max = v[i] > max ? v[i] : max;
  return max;
}

// Products of bfloat16 elements: see cpu_vector.h for what the names mean.
template <class T, int kHeadDim, int kHeadDimV, int kTileKv> struct Products {
  using Element = T;
  static constexpr int kBlockRows = kTileRows;
  static constexpr int kDepthSteps = static_cast<int>(ceil_div(kHeadDim, kTileDepth));
  static constexpr int kQueryFloats = kDepthSteps * kRowFloats;
  static constexpr int kKeyFloats = kDepthSteps * kRowFloats;
  static constexpr int kValueFloats = kTileRows / 2;
  static constexpr int kPaddedDimV = static_cast<int>(round_up(kHeadDimV, kPanel));
  static constexpr int kValueBlockFloats = kTileKv * kValueFloats;   // V of 16 columns
  // A line more than needed: in rows a power of two apart, the blocks of 16 rows would share few sets of the L1 cache.
  static constexpr int kLogitFloats = kTileKv + kRowFloats;
  static constexpr int64_t kTileFloats = int64_t{kTileKv} * (kKeyFloats + kPaddedDimV / 2);

  // Queries stay as they are, up to the sign of the scale; its magnitude belongs to the float32 logits.
  static float query_factor(float scale) { return scale > 0.0f ? 1.0f : scale < 0.0f ? -1.0f : scale; }
  static float logit_factor(float scale) { return scale == 0.0f ? 1.0f : __builtin_fabsf(scale); }

  static void load_query(const T* row, int64_t stride_d, float factor, float* out) {
    Bits16* bits = reinterpret_cast<Bits16*>(out);
    const uint16_t keep = factor == 0.0f ? 0 : 0xffff, flip = factor < 0.0f ? 0x8000 : 0;
    if (stride_d == 1)
#pragma omp simd
      for (int d = 0; d < kHeadDim; ++d) bits[d] = (row[d].bits & keep) ^ flip;
    else
      for (int d = 0; d < kHeadDim; ++d) bits[d] = (row[d * stride_d].bits & keep) ^ flip;
    for (int d = kHeadDim; d < kDepthSteps * kTileDepth; ++d) bits[d] = 0;
  }

  // Keys [0, keys) as [16 keys][depth / 2] pairs, transposed; zeros up to a whole block of 16.
  template <class Rows> static void pack_keys(Rows k, int64_t stride_d, int keys, float* packed) {
    constexpr int kPairs = kHeadDim / 2;
    for (int first = 0; first < keys; first += kTileRows, packed += kTileRows * kKeyFloats) {
      memset(packed + kPairs * kRowFloats, 0, sizeof(float) * (kKeyFloats - kPairs) * kRowFloats);
      for (int j = 0; j < kTileRows; j += 4) {
        prefetch_rows<4, kHeadDim>(k, first + j + kKeysAhead, keys);
        if (first + j + 4 <= keys && stride_d == 1) {
          const T *k0 = k(first + j), *k1 = k(first + j + 1), *k2 = k(first + j + 2), *k3 = k(first + j + 3);
#pragma GCC unroll 4
          for (int d = 0; d < kHeadDim; d += 8) {
            const Vec4 in[4] = {load_pairs(k0 + d), load_pairs(k1 + d), load_pairs(k2 + d), load_pairs(k3 + d)};
            Vec4 out[4];
            transpose4(in, out);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) *reinterpret_cast<Vec4Unaligned*>(packed + (d / 2 + i) * kRowFloats + j) = out[i];
          }
          continue;
        }
        Bits16* bits = reinterpret_cast<Bits16*>(packed);
        for (int i = j; i < j + 4; ++i)
          for (int d = 0; d < kHeadDim; ++d)
            bits[(d / 2 * kRowFloats + i) * 2 + d % 2] = first + i < keys ? k(first + i)[d * stride_d].bits : 0;
      }
    }
  }

  // Rows [0, keys) of V, two and two interleaved; zeros up to a whole step of 32 keys and in the columns past kHeadDimV.
  template <class Rows> static void pack_values(Rows v, int64_t stride_d, int keys, float* packed) {
    constexpr int kWhole = kHeadDimV / kTileRows * kTileRows;
    for (int j = 0; j < round_up(keys, kTileDepth); j += 2, packed += kRowFloats) {
      prefetch_rows<2, kHeadDimV>(v, j + kKeysAhead, keys);
      int d = 0;
      if (j + 2 <= keys && stride_d == 1)
#pragma GCC unroll 8
        for (const T *v0 = v(j), *v1 = v(j + 1); d < kWhole; d += kTileRows)
          store_vec(packed + d / kTileRows * kValueBlockFloats, (Vec)(load_bits(v1 + d) << 16 | load_bits(v0 + d)));
      for (; d < round_up(kHeadDimV, kTileRows); ++d) {
        Bits16* pair = reinterpret_cast<Bits16*>(packed + d / kTileRows * kValueBlockFloats + d % kTileRows);
        for (int i = 0; i < 2; ++i) pair[i] = j + i < keys && d < kHeadDimV ? v(j + i)[d * stride_d].bits : 0;
      }
    }
  }

  // Logits of `rows` queries against the keys [begin, end) of a tile, widened to whole blocks of 16.
  static void scores(const float* q, const float* k, int rows, int begin, int end, float* logits) {
    multiply_rows<false>(rows, static_cast<int>(ceil_div(end - begin, kTileRows)), q, kQueryFloats, k + begin * kKeyFloats,
                         kTileRows * kKeyFloats, kDepthSteps, logits + begin, kLogitFloats);
  }

  // O = factor * O + P V over the columns [begin, end) of a tile; the weights up to a whole step are 0.
  static void values(const float* weights, const float* v, int rows, int begin, int end, float* out, const float* factor) {
    for (int r = 0; r < rows; ++r)
      if (factor[r] != 1.0f)
        for (int d = 0; d < kPaddedDimV; d += kVec)
          store_vec(out + r * kPaddedDimV + d, load_vec(out + r * kPaddedDimV + d) * splat(factor[r]));
    multiply_rows<true>(rows, static_cast<int>(ceil_div(kHeadDimV, kTileRows)), weights + begin / 2, kLogitFloats,
                        v + begin * kValueFloats, kValueBlockFloats, static_cast<int>(ceil_div(end - begin, kTileDepth)), out,
                        kPaddedDimV);
  }

  // As jg::softmax_rows, of logits that are still to be multiplied with factor > 0; the weights become bfloat16.
  static void softmax_rows(float* logits, int rows, int begin, int end, float factor, SoftmaxState* states, float* rescale,
                           Ahead& ahead) {
    const int whole_end = static_cast<int>(round_up(end, kTileDepth));
    float tile_max[kSoftmaxRows], base[kSoftmaxRows], sum[kSoftmaxRows];
    for (int r = 0; r < rows; ++r) {
      float* row = logits + r * kLogitFloats;
      for (int j = end; j < whole_end; ++j) row[j] = -INFINITY;
      Vec max0 = splat(-INFINITY), max1 = max0;
      for (int j = begin; j < whole_end; j += kTileDepth) {
        max0 = larger(load_vec(row + j), max0);
        max1 = larger(load_vec(row + j + kVec), max1);
      }
      tile_max[r] = max_lanes(larger(max0, max1)) * factor;
    }
    raise_maxima(rows, tile_max, states, base, rescale);
    const Vec factor_log2 = splat(factor * kLog2E);
    for (int r = 0; r < rows; ++r) {
      float* row = logits + r * kLogitFloats;
      ahead.ask();
      const Vec base_log2 = splat(base[r] * kLog2E);
      Vec sum0 = {}, sum1 = {};
      for (int j = begin; j < whole_end; j += kTileDepth) {
        const Vec weight0 = exp2_weight(load_vec(row + j) * factor_log2 - base_log2);
        const Vec weight1 = exp2_weight(load_vec(row + j + kVec) * factor_log2 - base_log2);
        store_vec(row + j / 2, to_bfloat16(weight0, weight1));
        sum0 += weight0, sum1 += weight1;
      }
      sum[r] = sum_lanes(sum0 + sum1);
    }
    add_sums(rows, sum, rescale, states);
  }

  static void scale_logits(float* logits, int begin, int end, float factor) {
#pragma omp simd
    for (int j = begin; j < end; ++j) logits[j] *= factor;
  }

  // Weights [begin, end) of a row to bfloat16.
  static void store_weights(float* weights, int begin, int end) {
    const int whole_end = static_cast<int>(round_up(end, kTileDepth));
    for (int j = end; j < whole_end; ++j) weights[j] = 0.0f;
    for (int j = begin; j < whole_end; j += kTileDepth)
      store_vec(weights + j / 2, to_bfloat16(load_vec(weights + j), load_vec(weights + j + kVec)));
  }
};

}  // namespace jg::amx
