// Rows of float32, bfloat16 or float16 in memory, read and written 16 bytes at a time.
#pragma once

#include "jitgen/cuda_math.cuh"

namespace jg {

// ---- elements ----
using float32 = float;
using bfloat16 = bf16_16;
using float16 = half16;

template <class T> struct Group { static constexpr int kSize = 16 / sizeof(T); };

template <class T> union alignas(16) Packet { T values[Group<T>::kSize]; uint4 words; };

JITGEN_FN bool is_aligned(const void* row) { return reinterpret_cast<unsigned long long>(row) % 16 == 0; }

// Rows in memory. Groups are one access each where the row begins at a multiple of 16 bytes.
template <class T> struct Input {
  const T* row;
  int length;
  bool aligned;

  JITGEN_FN Input(const T* row, int length) : row(row), length(length), aligned(is_aligned(row)) {}

  JITGEN_FN Packet<T> fetch(int first) const {
    Packet<T> packet;
    if (aligned && first + Group<T>::kSize <= length) {
      packet.words = __ldg(reinterpret_cast<const uint4*>(row + first));
    } else {
#pragma unroll
      for (int i = 0; i < Group<T>::kSize; ++i) packet.values[i] = row[first + i < length ? first + i : length - 1];
    }
    return packet;
  }
};

template <class T> struct Output {
  T* row;
  int length;
  bool aligned;

  JITGEN_FN Output(T* row, int length) : row(row), length(length), aligned(is_aligned(row)) {}

  template <int kSize> JITGEN_FN void write(int first, const float (&x)[kSize]) const {
    constexpr int kWidth = Group<T>::kSize, kPart = kSize < kWidth ? kSize : kWidth;
#pragma unroll
    for (int part = 0; part < kSize; part += kPart) {
      if (kPart == kWidth && aligned && first + part + kPart <= length) {
        Packet<T> packet;
#pragma unroll
        for (int i = 0; i < kPart; ++i) round_to(x[part + i], packet.values[i]);
        *reinterpret_cast<uint4*>(row + first + part) = packet.words;
      } else {
#pragma unroll
        for (int i = 0; i < kPart; ++i)
          if (first + part + i < length) round_to(x[part + i], row[first + part + i]);
      }
    }
  }
};

}  // namespace jg
