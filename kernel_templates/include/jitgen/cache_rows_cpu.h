// Rows of K, V or Q on the CPU: read as float, transformed, rotated, quantised, written. One row at a time.
#pragma once

#include "jitgen/cpu_math.h"
#include "jitgen/cache_place.h"

extern "C" int omp_get_max_threads();

namespace jg {

constexpr int kErrorPlace = 1;
constexpr int64_t kRowsPerThread = 32;   // fewer are not worth waking a thread for

JITGEN_FN void from_float(float x, float8_e4m3fn& out) { out = to_e4m3(x); }
JITGEN_FN void from_float(float x, float8_e5m2& out) { out = to_e5m2(x); }
JITGEN_FN void from_float(float x, int8& out) {
  const float inside = x != x ? 0.0f : x < -127.0f ? -127.0f : x > 127.0f ? 127.0f : x;
  out.value = static_cast<signed char>(__builtin_rintf(inside));
}

// Cosine and sine of a pair at a position.
JITGEN_FN void turn(Turns turns, int position, float& cosine, float& sine) {
  const double angle = position * (static_cast<double>(turns.high) + turns.low);
  const double rest = 6.283185307179586 * (angle - __builtin_rint(angle));
  cosine = static_cast<float>(__builtin_cos(rest));
  sine = static_cast<float>(__builtin_sin(rest));
}

// What the functions of a transform see of a row.
template <int kDim> struct RowView {
  float* x;
  template <class F> JITGEN_FN_MEMBER void each(F f) {
    for (int i = 0; i < kDim; ++i) f(x[i], i);
  }
  template <class F> JITGEN_FN_MEMBER float sum(F f) {
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < kDim; ++i) total += f(x[i], i);
    return total;
  }
  template <class F> JITGEN_FN_MEMBER float max(F f) {
    float most = -INFINITY;
    for (int i = 0; i < kDim; ++i) most = jg::max(most, f(x[i], i));
    return most;
  }
};

// All heads of a token, for the stream S of the generated file.
template <class S, class Args> static inline void move_token(const Args& args, const Place& place, int64_t token) {
  using In = typename S::In;
  using Out = typename S::Out;
  const Rows rows = S::rows(args);
  float x[S::kHeadDim], cosine[S::kRotary / 2 + 1], sine[S::kRotary / 2 + 1];
  const int position = S::position(args, place.b, 0, place.pos);   // that of all heads
  for (int i = 0; i < S::kRotary / 2; ++i) S::angle(args, position, i, cosine[i], sine[i]);
  for (int64_t h = 0; h < rows.num_heads; ++h) {
    const int64_t by_token = token * rows.x_stride_t + h * rows.x_stride_h;
    const int64_t by_place = place.page * rows.out_stride_p + place.offset * rows.out_stride_s + h * rows.out_stride_h;
    const In* const from = static_cast<const In*>(rows.x) + (kGathers<S::kPlaces> ? by_place : by_token);
    Out* const to = static_cast<Out*>(rows.out) + (kGathers<S::kPlaces> ? by_token : by_place);
    for (int i = 0; i < S::kHeadDim; ++i) x[i] = to_float(from[i]);
    if constexpr (S::kScale == Scale::kRead) {
      const float scale = read_scale(rows, place, h);
      for (int i = 0; i < S::kHeadDim; ++i) x[i] *= scale;
    }
    RowView<S::kHeadDim> row = {x};
    S::before(args, row, place.b, static_cast<int>(h), place.pos);
    for (int i = 0; i < S::kRotary / 2; ++i) {
      float& first = x[S::kInterleave ? 2 * i : i];
      float& second = x[S::kInterleave ? 2 * i + 1 : i + S::kRotary / 2];
      const float turned = first * cosine[i] - second * sine[i];
      second = second * cosine[i] + first * sine[i];
      first = turned;
    }
    S::after(args, row, place.b, static_cast<int>(h), place.pos);
    if constexpr (S::kScale == Scale::kGiven || S::kScale == Scale::kStored) {
      float* const scale = rows.scale + place.slot * rows.scale_stride_s + h * rows.scale_stride_h;
      if constexpr (S::kScale == Scale::kStored) {
        const float most = row.max([](float v, int) { return v < 0.0f ? -v : v; });
        *scale = most > 0.0f ? most / kLargest<Out> : 1.0f;
      }
      const float inverse = 1.0f / (rows.scale ? *scale : rows.scale_value);
      for (int i = 0; i < S::kHeadDim; ++i) x[i] *= inverse;
    }
    for (int i = 0; i < S::kHeadDim; ++i) from_float(x[i], to[i]);
  }
}

}  // namespace jg
