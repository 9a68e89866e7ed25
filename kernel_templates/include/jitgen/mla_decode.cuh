// Latent attention with keys on the M side of the products: columns of a tile are rows of a request.
//
// Accumulators are those of sm90_wgmma.cuh, transposed: element e of column tile j of a thread is key, or column of O,
// 16 warp + lane / 4 + 8 (e / 2), and row 8 j + 2 (lane % 4) + e % 2.
#pragma once
#include "jitgen/decode_ptx.cuh"
#include "jitgen/mla_partial.cuh"
#include "jitgen/sm80_serving.cuh"
#include "jitgen/sm90_softmax.cuh"

namespace jg {

// Calls f with the constants 0, 1 and 2.
template <class F> JITGEN_FN void for_each_part(F f) { f(Constant<0>()); f(Constant<1>()); f(Constant<2>()); }

// ---- reductions over the M side ----
JITGEN_FN float down_max(float x) {
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) x = ::fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}
JITGEN_FN float down_sum(float x) {
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// ---- weights as the second operand: [rows][64 keys], 128-byte swizzle ----
// Where this lane's addresses of store_weights begin in a tile.
JITGEN_FN unsigned weights_offset(int warp, int lane) {
  const int row = lane / 16 * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
  return row * 128 + ((chunk ^ row & 7) << 4);
}
template <class Element, int kColTiles> JITGEN_FN void store_weights(unsigned address, const float (&s)[kColTiles][4]) {
  unsigned p[kColTiles][2];
#pragma unroll
  for (int j = 0; j < kColTiles; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) p[j][half] = Element::pack(s[j][2 * half], s[j][2 * half + 1]);
  if constexpr (kColTiles == 1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(address), "r"(p[0][0]), "r"(p[0][1]) : "memory");
  } else {
#pragma unroll
    for (int j = 0; j < kColTiles; j += 2)
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
                   ::"r"(address + j * 1024), "r"(p[j][0]), "r"(p[j][1]), "r"(p[j + 1][0]), "r"(p[j + 1][1]) : "memory");
  }
}

// ---- the end of a row ----
// RowSoftmax::finish for a row whose denominator is known.
JITGEN_FN float finish_row(float row_max, float total, float units, float sink, float& factor) {
  const float largest = total == 0.0f ? -INFINITY : row_max * (units * kLn2), top = ::fmaxf(largest, sink);
  const bool has_keys = top != -INFINITY;   // selected, not branched on: the rows of a thread overlap
  const float taken = has_keys ? top : 0.0f, old = exp(largest - taken), denominator = total * old + exp(sink - taken);
  factor = has_keys ? old * reciprocal(denominator) : 0.0f;
  return has_keys ? top + log(denominator) : -INFINITY;
}
// O^T times a factor of each row, as rows of type To: `row_of(n)` is where row n begins (null: nowhere) from this group's columns on.
template <class To, int kBlocks, int kColTiles, class RowOf>
JITGEN_FN void store_rows(const float (&o)[kBlocks][kColTiles][4], const float (&factor)[kColTiles][2], int warp, int lane, RowOf row_of) {
  static_assert(kBlocks % 2 == 0, "a lane of a quad takes one of four blocks of 8 columns");
#pragma unroll
  for (int j = 0; j < kColTiles; ++j) {
    char* const row = row_of(8 * j + lane / 4);
#pragma unroll
    for (int block = 0; block < kBlocks; block += 2) {
      unsigned words[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float (&x)[4] = o[block + k / 2][j];
        words[k] = transpose_matrix(To::pack(x[k % 2 * 2] * factor[j][0], x[k % 2 * 2 + 1] * factor[j][1]));
      }
      transpose_quad(words, lane % 4);
      const int column = 64 * (block + lane % 4 / 2) + 16 * warp + lane % 2 * 8;
      if (row) *reinterpret_cast<uint4*>(row + 2 * column) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// ---- partial results of items that were cut ----
// Rows of O in half precision, as parts of the largest element that a warp group has of the row, then for each of the two groups
// and each row {row_max, row_sum, largest, -}.
template <int kRows, int kCols> struct RowPartial {
  static constexpr int kRowQuads = kCols / 8;
  static constexpr long long kQuads = kRows * (kRowQuads + 2ll);   // of a slot

  static JITGEN_FN float4* row(void* workspace, int slot, int n) { return static_cast<float4*>(workspace) + slot * kQuads + n * kRowQuads; }
  static JITGEN_FN float4* state(void* workspace, int slot, int group, int n) {
    return static_cast<float4*>(workspace) + slot * kQuads + kRows * kRowQuads + group * kRows + n;
  }
  // What elements are multiplied by: rows of smaller ones become zero, as their reciprocal might be infinite.
  static JITGEN_FN float part_of(float largest) { return largest > 1e-30f ? reciprocal(largest) : 0.0f; }
};

// Eight elements of a row of O, joined of the pieces of a row.
struct JoinedRow {
  float row_max = -INFINITY, row_sum = 0.0f, o[8] = {};

  JITGEN_FN void add(const float4& state, const float4& parts, float units) {
    const float now = ::fmaxf(row_max, state.x), shift = shift_from(now * units);
    const float old = exp2(row_max * units - shift), fresh = exp2(state.x * units - shift), unit = fresh * state.z;
    row_max = now;
    row_sum = row_sum * old + state.y * fresh;
    const float words[4] = {parts.x, parts.y, parts.z, parts.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const unsigned both = __float_as_uint(words[k]);
      o[2 * k] = o[2 * k] * old + widen_half(both) * unit;
      o[2 * k + 1] = o[2 * k + 1] * old + widen_half(both >> 16) * unit;
    }
  }
  // Adds what the lane has whose number differs in the bit `distance`.
  JITGEN_FN void join_lane(int distance, float units) {
    const float other = __shfl_xor_sync(0xffffffffu, row_max, distance), now = ::fmaxf(row_max, other), shift = shift_from(now * units);
    const float old = exp2(row_max * units - shift), fresh = exp2(other * units - shift);
    row_max = now;
    row_sum = row_sum * old + __shfl_xor_sync(0xffffffffu, row_sum, distance) * fresh;
#pragma unroll
    for (int i = 0; i < 8; ++i) o[i] = o[i] * old + __shfl_xor_sync(0xffffffffu, o[i], distance) * fresh;
  }
};

}  // namespace jg
