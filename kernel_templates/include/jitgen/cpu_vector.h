// Products of float32 panels in vector registers, as the CPU kernels call them: everything but bfloat16 on AMX.
//
// Products, here and in cpu_amx.h, is how a kernel multiplies a tile of queries with a tile of keys: the layouts of its
// operands, how they are packed, and the softmax, whose weights are an operand. All memory is counted in floats.
#pragma once

#include "jitgen/cpu_gemm.h"
#include "jitgen/cpu_pack.h"
#include "jitgen/cpu_rows.h"

namespace jg::vector {

struct Registers {};   // nothing to set up

template <class T, int kHeadDim, int kHeadDimV, int kTileKv> struct Products {
  using Element = T;
  static constexpr int kBlockRows = jg::kBlockRows;   // rows of queries come in multiples of it
  static constexpr int kQueryFloats = kHeadDim;       // of a row
  static constexpr int kKeyFloats = kHeadDim;         // of a packed key; they lie panel by panel
  static constexpr int kValueFloats = kPanel;         // of a packed value row within its panel
  static constexpr int kPaddedDimV = static_cast<int>(round_up(kHeadDimV, kPanel));
  static constexpr int kLogitFloats = kTileKv;        // from one row of logits to the next
  static constexpr int64_t kTileFloats = int64_t{kTileKv} * (kKeyFloats + kPaddedDimV);   // packed K, then packed V

  // What queries are multiplied with, and what remains to be multiplied into the logits.
  static constexpr float query_factor(float scale) { return scale; }
  static constexpr float logit_factor(float) { return 1.0f; }

  static void load_query(const T* row, int64_t stride_d, float factor, float* out) {
    load_row(row, stride_d, kHeadDim, factor, out);
  }
  template <class Rows> static void pack_keys(Rows k, int64_t stride_d, int keys, float* packed) {
    jg::pack_keys<kHeadDim>(k, stride_d, keys, packed);
  }
  template <class Rows> static void pack_values(Rows v, int64_t stride_d, int keys, float* packed) {
    jg::pack_values<kHeadDimV, kTileKv>(v, stride_d, keys, packed);
  }
  static void scores(const float* q, const float* k, int rows, int begin, int end, float* logits) {
    score_panels<kHeadDim, kTileKv>(q, k, static_cast<int>(ceil_div(rows, kBlockRows)), begin, end, logits);
  }
  static void values(const float* weights, const float* v, int rows, int begin, int end, float* out, const float* factor) {
    value_panels<kPaddedDimV, kTileKv>(weights, v, static_cast<int>(ceil_div(rows, kBlockRows)), begin, end, out, factor);
  }
  static void softmax_rows(float* logits, int rows, int begin, int end, float, SoftmaxState* states, float* rescale, Ahead& ahead) {
    for (int r = 0; r < rows; ++r) ahead.ask();
    jg::softmax_rows<kLogitFloats>(logits, rows, begin, end, states, rescale);
  }
  static void scale_logits(float*, int, int, float) {}
  static void store_weights(float*, int, int) {}
};

}  // namespace jg::vector
