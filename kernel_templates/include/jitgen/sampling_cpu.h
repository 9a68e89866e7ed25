// One row of logits or probabilities on the CPU: passes over it, thresholds, and draws from what is left.
//
// The row is copied once, as float32, into memory that stays in the second-level cache. It is summed up in chunks of a fixed
// length whose sums are added in order, so results depend neither on the number of threads nor on who does which chunk.
#pragma once

#include <stdlib.h>

#include "jitgen/cpu_math.h"
#include "jitgen/sampling_filter.h"
#include "jitgen/sampling_random.h"

extern "C" int omp_get_max_threads();
extern "C" int omp_get_thread_num();

namespace jg {

constexpr int kErrorNoMemory = 1;
constexpr int kChunk = 4096;        // values; 16 kB of float32
constexpr float kLeastTop = -2.3e38f;   // a row of which no logit reaches this is masked, be it with the least float
constexpr int kRowsPerThread = 1;   // fewer rows than this for each thread: the threads share every row

// ---- loops over one chunk ----
// Free functions of plain values: what a loop reads through a closure or a member keeps it from being vectorised.
template <bool kProbs> JITGEN_FN float weight_of(float x, float top) { return kProbs ? x : exp_weight(x - top); }

struct ChunkRange { float largest, least; bool has_nan; };
template <class Value> static inline ChunkRange fill_chunk(float* __restrict__ out, int begin, int end, const Value value) {
  float largest = -INFINITY, least = INFINITY;
  int nan = 0;
#pragma omp simd reduction(max : largest) reduction(min : least) reduction(| : nan)
  for (int i = begin; i < end; ++i) {
    const float v = value(i);
    out[i] = v;
    largest = v > largest ? v : largest;
    least = v < least ? v : least;
    nan |= v != v;
  }
  return {largest, least, nan != 0};
}

template <bool kProbs> static inline float chunk_mass(const float* x, int begin, int end, float threshold, float top) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int i = begin; i < end; ++i) {
    const float w = weight_of<kProbs>(x[i], top);
    sum += x[i] >= threshold ? w : 0.0f;
  }
  return sum;
}

struct ChunkRank { float count, mass; };
template <bool kProbs> static inline ChunkRank chunk_rank(const float* x, int begin, int end, float than, float top) {
  float count = 0.0f, sum = 0.0f;
#pragma omp simd reduction(+ : count, sum)
  for (int i = begin; i < end; ++i) {
    const float w = weight_of<kProbs>(x[i], top);
    count += x[i] > than ? 1.0f : 0.0f;
    sum += x[i] > than ? w : 0.0f;
  }
  return {count, sum};
}

// out: of the values from each of the four pivots up to hi the count or mass, then the smallest.
template <bool kProbs, bool kCount>
static inline void evaluate_chunk(const float* x, int begin, int end, Pivots pivots, float hi, float top, float* out) {
  static_assert(kPivots == 4, "one accumulator each");
  const float p0 = pivots.at[0], p1 = pivots.at[1], p2 = pivots.at[2], p3 = pivots.at[3];
  float f0 = 0.0f, f1 = 0.0f, f2 = 0.0f, f3 = 0.0f, l0 = INFINITY, l1 = INFINITY, l2 = INFINITY, l3 = INFINITY;
#pragma omp simd reduction(+ : f0, f1, f2, f3) reduction(min : l0, l1, l2, l3)
  for (int i = begin; i < end; ++i) {
    const float w = kCount ? 1.0f : weight_of<kProbs>(x[i], top);
    const float v = x[i] < hi ? x[i] : -INFINITY;
    f0 += v >= p0 ? w : 0.0f, f1 += v >= p1 ? w : 0.0f, f2 += v >= p2 ? w : 0.0f, f3 += v >= p3 ? w : 0.0f;
    const float v0 = v >= p0 ? v : INFINITY, v1 = v >= p1 ? v : INFINITY;
    const float v2 = v >= p2 ? v : INFINITY, v3 = v >= p3 ? v : INFINITY;
    l0 = v0 < l0 ? v0 : l0, l1 = v1 < l1 ? v1 : l1, l2 = v2 < l2 ? v2 : l2, l3 = v3 < l3 ? v3 : l3;
  }
  out[0] = f0, out[1] = f1, out[2] = f2, out[3] = f3, out[4] = l0, out[5] = l1, out[6] = l2, out[7] = l3;
}

template <bool kProbs_> struct Row {
  static constexpr bool kProbs = kProbs_, kRanks = false;
  static constexpr float kAbsent = kProbs ? 0.0f : -INFINITY;
  struct Mass { float total, threshold; };
  struct Measure { float top, total; int status; };
  struct Pick { int token; float value; };

  float* values;       // [vocab]
  double* partials;    // [chunks]: mass of each chunk, as of the last pass that adds up masses
  float* extra;        // [chunks * 2 * kPivots]
  int vocab, chunks, threads;
  float top;

  static int chunks_of(int64_t vocab) { return static_cast<int>((vocab + kChunk - 1) / kChunk); }
  static int64_t scratch_floats(int64_t vocab) {
    return (vocab + 15) / 16 * 16 + int64_t{chunks_of(vocab)} * (2 + 2 * kPivots);
  }

  Row(float* scratch, int vocab, int threads)
      : values(scratch), partials(reinterpret_cast<double*>(scratch + (vocab + 15) / 16 * 16)),
        extra(reinterpret_cast<float*>(partials + chunks_of(vocab))), vocab(vocab), chunks(chunks_of(vocab)),
        threads(threads), top(0.0f) {}

  JITGEN_METHOD float weight(float x) const { return weight_of<kProbs>(x, top); }

  // f(chunk, first value, last value + 1); chunks in parallel where the threads share the row.
  template <class F> void each_chunk(F f) const {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int begin = chunk * kChunk;
      f(chunk, begin, vocab - begin < kChunk ? vocab : begin + kChunk);
    }
  }

  // ---- the first passes: values, maximum, mass ----
  // value(token) for every token.
  template <class Value> Measure fill(Value value) {
    each_chunk([&](int chunk, int begin, int end) {
      const ChunkRange range = fill_chunk(values, begin, end, value);
      extra[3 * chunk] = range.largest, extra[3 * chunk + 1] = range.least, extra[3 * chunk + 2] = range.has_nan;
    });
    float least = INFINITY, nan = 0.0f;
    top = -INFINITY;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      top = max(top, extra[3 * chunk]);
      least = min(least, extra[3 * chunk + 1]);
      nan += extra[3 * chunk + 2];
    }
    const bool infinite = top == INFINITY, empty = kProbs ? !(top > 0.0f) : top < kLeastTop;
    const bool negative = kProbs && least < 0.0f;
    const int status = infinite ? kRowInfinite : nan > 0.0f ? kRowNan : negative ? kRowNegative : empty ? kRowEmpty : kRowOk;
    if (status != kRowOk) return {top, 0.0f, status};
    const float total = mass_from(-INFINITY).total;
    return {top, total, total == INFINITY ? kRowInfinite : kRowOk};
  }

  // ---- thresholds ----
  // Mass of the values >= threshold; leaves the masses of the chunks in `partials`.
  Mass mass_from(float threshold) const {
    each_chunk([&](int chunk, int begin, int end) {
      partials[chunk] = chunk_mass<kProbs>(values, begin, end, threshold, top);
    });
    double total = 0.0;
    for (int chunk = 0; chunk < chunks; ++chunk) total += partials[chunk];
    return {static_cast<float>(total), threshold};
  }
  Mass whole_mass(const Measure& m) const { return {m.total, -INFINITY}; }

  // Count and mass of the values > x; leaves the masses of the chunks in `partials`.
  Mass mass_above(float x, float& count) const {
    each_chunk([&](int chunk, int begin, int end) {
      const ChunkRank rank = chunk_rank<kProbs>(values, begin, end, x, top);
      extra[chunk] = rank.count, partials[chunk] = rank.mass;
    });
    double counts = 0.0, total = 0.0;
    for (int chunk = 0; chunk < chunks; ++chunk) counts += extra[chunk], total += partials[chunk];
    count = static_cast<float>(counts);
    return {static_cast<float>(total), x};
  }

  // Of the values from each pivot up to hi: their count or the sum of their weights, and the smallest.
  void evaluate(const Pivots& pivots, float hi, bool counts, float (&f)[kPivots], float (&least)[kPivots]) const {
    each_chunk([&](int chunk, int begin, int end) {
      const auto evaluate = counts ? evaluate_chunk<kProbs, true> : evaluate_chunk<kProbs, false>;
      evaluate(values, begin, end, pivots, hi, top, extra + chunk * 2 * kPivots);
    });
    for (int i = 0; i < kPivots; ++i) {
      double sum = 0.0;
      least[i] = INFINITY;
      for (int chunk = 0; chunk < chunks; ++chunk) {
        sum += extra[chunk * 2 * kPivots + i];
        least[i] = min(least[i], extra[chunk * 2 * kPivots + kPivots + i]);
      }
      f[i] = static_cast<float>(sum);
    }
  }

  // ---- drawing ----
  // The value at `point` of the cumulative mass of the values >= threshold, of which `partials` has the masses. Where rounding
  // puts the point past the end it is the last value with a mass.
  Pick draw(const Mass& mass, float threshold, double u) const {
    double total = 0.0;
    for (int chunk = 0; chunk < chunks; ++chunk) total += partials[chunk];
    double rest = u * total;
    int chosen = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (!(partials[chunk] > 0.0)) continue;
      chosen = chunk;
      if (rest < partials[chunk]) break;
      rest -= partials[chunk];
    }
    const int end = vocab - chosen * kChunk < kChunk ? vocab : (chosen + 1) * kChunk;
    int token = -1;
    for (int i = chosen * kChunk; i < end; ++i) {
      const float w = values[i] >= threshold ? weight(values[i]) : 0.0f;
      if (!(w > 0.0f)) continue;
      token = i;
      if (rest < w) break;
      rest -= w;
    }
    return {token, values[token]};
  }
  void announce(const Pick&) const {}
};

// Memory for the rows that are worked on at a time.
struct Scratch {
  float* data;
  explicit Scratch(int64_t floats)
      : data(static_cast<float*>(aligned_alloc(64, static_cast<size_t>((floats * 4 + 63) / 64 * 64)))) {}
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
};

// work(row number, threads for it, scratch memory): rows in parallel where there are enough, else each row by all threads.
template <class Work> int each_row(int64_t batch, int64_t scratch_floats, int64_t num_threads, Work work) {
  const int threads = num_threads > 0 ? static_cast<int>(num_threads) : omp_get_max_threads();
  const bool by_rows = batch >= int64_t{threads} * kRowsPerThread;
  const int64_t stride = (scratch_floats + 15) / 16 * 16;
  const Scratch scratch(stride * (by_rows ? threads : 1));
  if (!scratch.data) return kErrorNoMemory;
#pragma omp parallel for num_threads(threads) if (by_rows && threads > 1) schedule(dynamic)
  for (int64_t row = 0; row < batch; ++row)
    work(static_cast<int>(row), by_rows ? 1 : threads, scratch.data + (by_rows ? omp_get_thread_num() * stride : 0));
  return 0;
}

}  // namespace jg
