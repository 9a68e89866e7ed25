// Matrix kernels of the CPU target: packed panels for tiles of queries, dot products and sums of rows for few queries.
//
// Packed layout. K of a tile: one panel per kPanel keys, [head_dim][kPanel]. V of a tile: one panel per kPanel value
// columns, [tile_kv][kPanel]. Both products then read one operand as full vectors and broadcast the other by row, and a
// panel (8 KiB at depth 128 on AVX2) stays in the L1 cache while every row block of the tile passes over it.
#pragma once

#include "jitgen/cpu_types.h"

namespace jg {

// C[kBlockRows][kPanel] = factor * C + A[kBlockRows][depth] B[depth][kPanel]; without factors C is overwritten.
template <int kLda, bool kAccumulate>
static inline void multiply_block(const float* a, const float* panel, int depth, float* c, int ldc, const float* factor) {
  Vec sum[kBlockRows][kPanelVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kBlockRows; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < kPanelVecs; ++n)
      sum[r][n] = kAccumulate ? load_vec(c + r * ldc + n * kVec) * splat(factor[r]) : Vec{};
  for (int i = 0; i < depth; ++i) {
    Vec b[kPanelVecs];
#pragma GCC unroll 4
    for (int n = 0; n < kPanelVecs; ++n) b[n] = load_vec(panel + i * kPanel + n * kVec);
#pragma GCC unroll 16
    for (int r = 0; r < kBlockRows; ++r) {
      const Vec x = splat(a[r * kLda + i]);
#pragma GCC unroll 4
      for (int n = 0; n < kPanelVecs; ++n) sum[r][n] += x * b[n];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kBlockRows; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < kPanelVecs; ++n) store_vec(c + r * ldc + n * kVec, sum[r][n]);
}

// Logits of `blocks` row blocks against the keys [begin, end) of a tile, widened to whole panels: S = Q K^T.
template <int kHeadDim, int kTileKv>
static void score_panels(const float* q, const float* k_panels, int blocks, int begin, int end, float* logits) {
  for (int p = begin / kPanel; p * kPanel < end; ++p)
    for (int block = 0; block < blocks; ++block)
      multiply_block<kHeadDim, false>(q + block * kBlockRows * kHeadDim, k_panels + static_cast<int64_t>(p) * kPanel * kHeadDim,
                                      kHeadDim, logits + block * kBlockRows * kTileKv + p * kPanel, kTileKv, nullptr);
}

// O = factor * O + P V over the columns [begin, end) of a tile.
template <int kPaddedDimV, int kTileKv>
static void value_panels(const float* weights, const float* v_panels, int blocks, int begin, int end, float* out,
                  const float* factor) {
  for (int p = 0; p < kPaddedDimV / kPanel; ++p)
    for (int block = 0; block < blocks; ++block)
      multiply_block<kTileKv, true>(weights + block * kBlockRows * kTileKv + begin,
                                    v_panels + (static_cast<int64_t>(p) * kTileKv + begin) * kPanel, end - begin,
                                    out + block * kBlockRows * kPaddedDimV + p * kPanel, kPaddedDimV,
                                    factor + block * kBlockRows);
}

// ---- few query rows: K and V are read where they lie ----
JITGEN_FN float sum_lanes(Vec v) {
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int i = 0; i < kVec; ++i) total += v[i];
  return total;
}

template <int kRows, int kKeys, int kHeadDim, int kTileKv, class Rows>
JITGEN_FN void dot_block(const float* q, const Rows& k, int first, float* logits) {
  Vec sum[kRows][kKeys] = {};
#pragma GCC unroll 4
  for (int d = 0; d < kHeadDim; d += kVec) {
    Vec key[kKeys];
#pragma GCC unroll 4
    for (int j = 0; j < kKeys; ++j) key[j] = load_vec(k(first + j) + d);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec x = load_vec(q + r * kHeadDim + d);
#pragma GCC unroll 4
      for (int j = 0; j < kKeys; ++j) sum[r][j] += x * key[j];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kKeys; ++j) logits[r * kTileKv + j] = sum_lanes(sum[r][j]);
}

// Elements of 8 bits take ten instructions to be read: more rows share one reading, as far as there are registers.
template <class Rows> constexpr bool kReadsBytes = sizeof(*Rows()(0)) == 1;

// Logits of `rows` queries against the keys [begin, end) of a tile.
template <int kHeadDim, int kTileKv, class Rows>
static void score_rows(const float* q, Rows k, int rows, int begin, int end, float* logits) {
  int j = begin;
  for (; j + 4 <= end; j += 4) {
    prefetch_rows<4, kHeadDim>(k, j + kKeysAhead, end);
    int r = 0;
    if constexpr (kReadsBytes<Rows> && kVec == 16)
      for (; r + 4 <= rows; r += 4)
        dot_block<4, 4, kHeadDim, kTileKv>(q + r * kHeadDim, k, j, logits + r * kTileKv + j);
    for (; r + 2 <= rows; r += 2)
      dot_block<2, 4, kHeadDim, kTileKv>(q + r * kHeadDim, k, j, logits + r * kTileKv + j);
    if (r < rows) dot_block<1, 4, kHeadDim, kTileKv>(q + r * kHeadDim, k, j, logits + r * kTileKv + j);
  }
  for (; j < end; ++j)
    for (int r = 0; r < rows; ++r)
      dot_block<1, 1, kHeadDim, kTileKv>(q + r * kHeadDim, k, j, logits + r * kTileKv + j);
}

// O = factor * O + P V over the keys [begin, end); four keys share one pass over an output row.
template <int kHeadDimV, int kPaddedDimV, int kTileKv, class Rows>
static void value_rows(const float* weights, Rows v, int rows, int begin, int end, float* out, const float* factor) {
  for (int r = 0; r < rows; ++r)
    if (factor[r] != 1.0f)
      for (int d = 0; d < kHeadDimV; d += kVec)
        store_vec(out + r * kPaddedDimV + d, load_vec(out + r * kPaddedDimV + d) * splat(factor[r]));
  int j = begin;
  for (; j + 4 <= end; j += 4) {
    prefetch_rows<4, kHeadDimV>(v, j + kKeysAhead, end);
    if constexpr (kReadsBytes<Rows>) {
      const auto *v0 = v(j), *v1 = v(j + 1), *v2 = v(j + 2), *v3 = v(j + 3);
      for (int d = 0; d < kHeadDimV; d += kVec) {
        const Vec x0 = load_vec(v0 + d), x1 = load_vec(v1 + d), x2 = load_vec(v2 + d), x3 = load_vec(v3 + d);
        for (int r = 0; r < rows; ++r) {
          const float* w = weights + r * kTileKv + j;
          float* o = out + r * kPaddedDimV + d;
          store_vec(o, load_vec(o) + splat(w[0]) * x0 + splat(w[1]) * x1 + splat(w[2]) * x2 + splat(w[3]) * x3);
        }
      }
      continue;
    }
    for (int r = 0; r < rows; ++r) {
      const float* w = weights + r * kTileKv + j;
      const auto *v0 = v(j), *v1 = v(j + 1), *v2 = v(j + 2), *v3 = v(j + 3);
      float* o = out + r * kPaddedDimV;
      const Vec w0 = splat(w[0]), w1 = splat(w[1]), w2 = splat(w[2]), w3 = splat(w[3]);
#pragma GCC unroll 4
      for (int d = 0; d < kHeadDimV; d += kVec)
        store_vec(o + d, load_vec(o + d) + w0 * load_vec(v0 + d) + w1 * load_vec(v1 + d) + w2 * load_vec(v2 + d) +
                             w3 * load_vec(v3 + d));
    }
  }
  for (; j < end; ++j)
    for (int r = 0; r < rows; ++r)
      for (int d = 0; d < kHeadDimV; d += kVec) {
        float* o = out + r * kPaddedDimV + d;
        store_vec(o, load_vec(o) + splat(weights[r * kTileKv + j]) * load_vec(v(j) + d));
      }
}

}  // namespace jg
