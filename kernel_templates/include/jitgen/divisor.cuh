// Division by a number that only the host knows.
#pragma once
#include "jitgen/cuda_math.cuh"

namespace jg {

// Exact for dividends from 0 to 2^31 - 1.
struct Divisor {
  unsigned value, magic;
  int shift;
  JITGEN_FN int divide(int x) const { return static_cast<int>(static_cast<unsigned long long>(x) * magic >> shift); }
  JITGEN_FN int remainder(int x) const { return x - divide(x) * static_cast<int>(value); }
};
inline Divisor make_divisor(unsigned value) {
  int bits = 0;
  while (bits < 31 && 1u << bits < value) ++bits;
  return {value, static_cast<unsigned>(((1ull << (31 + bits)) + value - 1) / value), 31 + bits};
}

}  // namespace jg
