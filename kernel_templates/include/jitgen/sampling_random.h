// Random numbers and status codes of the sampling kernels, the same on CPU and GPU.
//
// Stream layout: Philox4x32-10 (Salmon et al. 2011), key = seed, counter = (position, subsequence), 64 bits each.
// position = offset + number of the draw within the call; subsequence = 0 with a seed per row, the row with one seed for all.
#pragma once

constexpr int kDrawsPerCall = 64;   // by which advance=True moves an offset

// Why a row has no token.
constexpr int kRowOk = 0;
constexpr int kRowNan = 1;
constexpr int kRowInfinite = 2;
constexpr int kRowEmpty = 3;      // nothing has weight: all masked, or all zero
constexpr int kRowNegative = 4;   // a probability below zero
constexpr int kRowNoIndex = 5;    // indices names a row that does not exist

namespace jg {

struct Stream { unsigned long long seed, position, subsequence; };

// The stream of a row, from a kernel's arguments.
template <class Args> JITGEN_FN Stream row_stream(const Args& args, int row) {
  return {(unsigned long long)(args.seed ? args.seed[row] : args.seed_value),
          (unsigned long long)(args.offset ? args.offset[row] : args.offset_value), (unsigned long long)(args.seed ? 0 : row)};
}

// Uniform in (0, 1), 53 bits, neither end included.
JITGEN_FN double uniform(Stream stream, unsigned int draw) {
  unsigned long long position = stream.position + draw;
  unsigned int c0 = (unsigned int)position, c1 = (unsigned int)(position >> 32);
  unsigned int c2 = (unsigned int)stream.subsequence, c3 = (unsigned int)(stream.subsequence >> 32);
  unsigned int k0 = (unsigned int)stream.seed, k1 = (unsigned int)(stream.seed >> 32);
  for (int i = 0; i < 10; ++i) {
    const unsigned long long even = 0xD2511F53ull * c0, odd = 0xCD9E8D57ull * c2;
    c0 = (unsigned int)(odd >> 32) ^ c1 ^ k0;
    c1 = (unsigned int)odd;
    c2 = (unsigned int)(even >> 32) ^ c3 ^ k1;
    c3 = (unsigned int)even;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const unsigned long long bits = ((unsigned long long)c0 << 32 | c1) >> 11;
  return ((double)bits + 0.5) * 0x1p-53;
}

}  // namespace jg
