// Partial results of latent attention: pieces of items that were cut, in 16 bits.
#pragma once
#include "jitgen/sm80_softmax.cuh"

namespace jg {

// The half-precision number in the low bits.
JITGEN_FN float widen_half(unsigned bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<unsigned short>(bits)));
  return value;
}

// O and the softmax of a piece as the threads hold them, 16 bytes at a time: O as half-precision parts of the largest element that
// the thread has of the row, two column tiles a quad; then {row_max, row_sum}, and what the parts are of. In float they are
// twice as long: 59 in place of 56 us for one request of 64k keys on an H100, 275 in place of 271 for 128 of all lengths.
template <int kOutTiles, int kThreads> struct ScaledPartial {
  static constexpr int kOutQuads = kOutTiles / 2;
  static constexpr long long kQuads = (kOutQuads + 2ll) * kThreads;   // of a slot

  static JITGEN_FN float4* quad(void* workspace, int slot, int i, int thread) {
    return static_cast<float4*>(workspace) + slot * kQuads + i * kThreads + thread;
  }
  static JITGEN_FN void store(void* workspace, int slot, int thread, const float (&o)[kOutTiles][4], const float (&row_max)[2], const float (&row_sum)[2]) {
    constexpr float kLeast = 1e-30f;   // rows of smaller ones become zero: their reciprocal might be infinite
    float largest[2] = {}, part[2];
#pragma unroll
    for (int e = 0; e < 4 * kOutTiles; ++e) largest[e % 4 / 2] = ::fmaxf(largest[e % 4 / 2], ::fabsf(o[e / 4][e % 4]));
#pragma unroll
    for (int half = 0; half < 2; ++half) part[half] = largest[half] > kLeast ? reciprocal(largest[half]) : 0.0f;
    const auto pack = [&](int j, int half) {
      return __uint_as_float(float16::pack(o[j][2 * half] * part[half], o[j][2 * half + 1] * part[half]));
    };
#pragma unroll
    for (int i = 0; i < kOutQuads; ++i)
      *quad(workspace, slot, i, thread) = make_float4(pack(2 * i, 0), pack(2 * i, 1), pack(2 * i + 1, 0), pack(2 * i + 1, 1));
    *quad(workspace, slot, kOutQuads, thread) = make_float4(row_max[0], row_max[1], row_sum[0], row_sum[1]);
    *quad(workspace, slot, kOutQuads + 1, thread) = make_float4(largest[0], largest[1], 0.0f, 0.0f);
  }
  // Adds column tiles from `first`, which is even, on of a piece to what `o` and the softmax hold of other keys.
  template <int kTiles>
  static JITGEN_FN void add(void* workspace, int slot, int first, int thread, float (&o)[kTiles][4], float (&row_max)[2], float (&row_sum)[2], float units) {
    const float4 state = *quad(workspace, slot, kOutQuads, thread), largest = *quad(workspace, slot, kOutQuads + 1, thread);
    const float piece_max[2] = {state.x, state.y}, piece_sum[2] = {state.z, state.w};
    float old[2], fresh[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float before = row_max[half], now = ::fmaxf(before, piece_max[half]);
      const float shift = now == -INFINITY ? 0.0f : now * units;   // a row without keys so far: weights 0, not NaN
      old[half] = exp2(before * units - shift);
      fresh[half] = exp2(piece_max[half] * units - shift);
      row_max[half] = now;
      row_sum[half] = row_sum[half] * old[half] + piece_sum[half] * fresh[half];
    }
    fresh[0] *= largest.x, fresh[1] *= largest.y;
#pragma unroll
    for (int i = 0; i < kTiles / 2; ++i) {
      const float4 parts = *quad(workspace, slot, first / 2 + i, thread);
      const float words[4] = {parts.x, parts.y, parts.z, parts.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const unsigned both = __float_as_uint(words[k]);
        float (&to)[4] = o[2 * i + k / 2];
        const int half = k % 2;
        to[2 * half] = to[2 * half] * old[half] + widen_half(both) * fresh[half];
        to[2 * half + 1] = to[2 * half + 1] * old[half] + widen_half(both >> 16) * fresh[half];
      }
    }
  }
};

}  // namespace jg
