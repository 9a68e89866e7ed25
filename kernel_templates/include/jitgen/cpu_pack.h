// Moving tiles between tensors of any stride and element type and the float32 scratch of a kernel.
#pragma once

#include "jitgen/cpu_types.h"

namespace jg {

// ---- query and output rows ----
template <class T> static void load_row(const T* row, int64_t stride_d, int dim, float factor, float* out) {
  if (stride_d == 1 && dim % kVec == 0) {
    for (int d = 0; d < dim; d += kVec) store_vec(out + d, load_vec(row + d) * splat(factor));
    return;
  }
  for (int d = 0; d < dim; ++d) out[d] = to_float(row[d * stride_d]) * factor;
}

template <class T> static void store_row(const float* row, int64_t stride_d, int dim, T* out, float factor = 1.0f) {
  if (stride_d == 1) {
    int d = 0;
    for (; d + kVec <= dim; d += kVec) store_vec(out + d, load_vec(row + d) * splat(factor));
    for (; d < dim; ++d) from_float(row[d] * factor, out[d]);
    return;
  }
  for (int d = 0; d < dim; ++d) from_float(row[d] * factor, out[d * stride_d]);
}

// ---- key panels: transposed ----
// Four elements of two vectors; those of the second are numbered from 4.
template <int k0, int k1, int k2, int k3> JITGEN_FN Vec4 pick(Vec4 a, Vec4 b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, k0, k1, k2, k3);
#else   // GCC before 12
  typedef int Places __attribute__((vector_size(16)));
  return __builtin_shuffle(a, b, Places{k0, k1, k2, k3});
#endif
}

JITGEN_FN void transpose4(const Vec4 (&in)[4], Vec4 (&out)[4]) {
  const Vec4 a = pick<0, 4, 1, 5>(in[0], in[1]), b = pick<0, 4, 1, 5>(in[2], in[3]);
  const Vec4 c = pick<2, 6, 3, 7>(in[0], in[1]), d = pick<2, 6, 3, 7>(in[2], in[3]);
  out[0] = pick<0, 1, 4, 5>(a, b);
  out[1] = pick<2, 3, 6, 7>(a, b);
  out[2] = pick<0, 1, 4, 5>(c, d);
  out[3] = pick<2, 3, 6, 7>(c, d);
}

// keys valid rows of K -> panels [kHeadDim][kPanel], zeros up to the end of the last panel.
template <int kHeadDim, class Rows>
static void pack_keys(Rows k, int64_t stride_d, int keys, float* panels) {
  for (int first = 0; first < keys; first += kPanel, panels += kPanel * kHeadDim)
    for (int j = 0; j < kPanel; j += 4) {
      prefetch_rows<4, kHeadDim>(k, first + j + kKeysAhead, keys);
      if (first + j + 4 <= keys && stride_d == 1) {
        const auto *k0 = k(first + j), *k1 = k(first + j + 1), *k2 = k(first + j + 2), *k3 = k(first + j + 3);
#pragma GCC unroll 4
        for (int d = 0; d < kHeadDim; d += 4) {
          const Vec4 in[4] = {load_vec4(k0 + d), load_vec4(k1 + d), load_vec4(k2 + d), load_vec4(k3 + d)};
          Vec4 out[4];
          transpose4(in, out);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) *reinterpret_cast<Vec4Unaligned*>(panels + (d + i) * kPanel + j) = out[i];
        }
        continue;
      }
      for (int i = 0; i < 4; ++i)
        for (int d = 0; d < kHeadDim; ++d)
          panels[d * kPanel + j + i] = first + j + i < keys ? to_float(k(first + j + i)[d * stride_d]) : 0.0f;
    }
}

// keys rows of V -> panels [kTileKv][kPanel] per kPanel value columns, zeros in the columns past kHeadDimV.
template <int kHeadDimV, int kTileKv, class Rows>
static void pack_values(Rows v, int64_t stride_d, int keys, float* panels) {
  constexpr int kWhole = kHeadDimV / kVec * kVec;
  for (int j = 0; j < keys; ++j) {
    prefetch_rows<1, kHeadDimV>(v, j + kKeysAhead, keys);
    const auto* row = v(j);
    int d = 0;
    if (stride_d == 1)
#pragma GCC unroll 8
      for (; d < kWhole; d += kVec) store_vec(panels + (d / kPanel * kTileKv + j) * kPanel + d % kPanel, load_vec(row + d));
    for (; d < round_up(kHeadDimV, kPanel); ++d)
      panels[(d / kPanel * kTileKv + j) * kPanel + d % kPanel] = d < kHeadDimV ? to_float(row[d * stride_d]) : 0.0f;
  }
}

}  // namespace jg
