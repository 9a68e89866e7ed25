// Rows of K, V or Q on the GPU: read 16 bytes at a time, transformed, rotated, quantised, written.
//
// A row is cut into chunks of kVec elements. A lane of a team has two of them, those that are rotated together if there is a
// rotation; a team goes through heads of one token, so the angles of its pairs are computed once for all of them.
#pragma once

#include "jitgen/cuda_math.cuh"
#include "jitgen/cache_place.h"
#include "jitgen/row_view.cuh"

namespace jg {

using float32 = float;
using bfloat16 = bf16_16;
using float16 = half16;

constexpr int kThreads = 256;

// ---- elements ----
template <int kBytes> struct WordOf;
template <> struct WordOf<1> { using Type = unsigned char; };
template <> struct WordOf<2> { using Type = unsigned short; };
template <> struct WordOf<4> { using Type = unsigned; };
template <> struct WordOf<8> { using Type = uint2; };
template <> struct WordOf<16> { using Type = uint4; };

// kVec elements that are one access to memory.
template <class T, int kVec> struct Chunk {
  using Word = typename WordOf<kVec * sizeof(T)>::Type;
  union { Word word; T values[kVec]; unsigned short pairs[(kVec * sizeof(T) + 1) / 2]; };
  JITGEN_FN static Chunk load(const T* p) {
    Chunk chunk;
    chunk.word = *reinterpret_cast<const Word*>(p);
    return chunk;
  }
  JITGEN_FN void store(T* p) const { *reinterpret_cast<Word*>(p) = word; }
};

JITGEN_FN void round_to(float x, int8& y) {
  int rounded;   // NaN becomes 0
  asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  y.value = static_cast<signed char>(rounded < -127 ? -127 : rounded);
}

// 8-bit elements: exponent and mantissa in their places of a float, whose exponent has another bias. Codes of NaN and infinity
// are not told apart from numbers.
JITGEN_FN float widen(float8_e4m3fn x) {
  return __uint_as_float((x.bits & 0x7fu) << 20 | (x.bits & 0x80u) << 24) * 0x1p120f;
}
JITGEN_FN float widen(float8_e5m2 x) { return __uint_as_float((x.bits & 0x7fu) << 21 | (x.bits & 0x80u) << 24) * 0x1p112f; }
JITGEN_FN float widen(int8 x) { return static_cast<float>(x.value); }

// Two values at once, as the conversion units take them.
template <class T> JITGEN_FN void round_pair(float a, float b, T& first, T& second) {
  round_to(a, first);
  round_to(b, second);
}
JITGEN_FN void round_pair(float a, float b, bf16_16& first, bf16_16& second) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
  first.bits = static_cast<unsigned short>(both);
  second.bits = static_cast<unsigned short>(both >> 16);
}
JITGEN_FN void round_pair(float a, float b, half16& first, half16& second) {
  unsigned both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
  first.bits = static_cast<unsigned short>(both);
  second.bits = static_cast<unsigned short>(both >> 16);
}
// 8-bit elements that the conversion units give in pairs. Taken apart into bytes, they would have to be joined again.
template <class T> struct Pairs { static constexpr bool kJoined = false; };
#if __CUDA_ARCH__ >= 890
template <> struct Pairs<float8_e4m3fn> {
  static constexpr bool kJoined = true;
  JITGEN_FN static unsigned short round(float a, float b) {
    unsigned short both;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(b), "f"(a));
    return both;
  }
};
template <> struct Pairs<float8_e5m2> {
  static constexpr bool kJoined = true;
  JITGEN_FN static unsigned short round(float a, float b) {
    unsigned short both;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(both) : "f"(b), "f"(a));
    return both;
  }
};
#endif
JITGEN_FN void round_to(float x, float8_e4m3fn& y) { y = to_e4m3(x); }
JITGEN_FN void round_to(float x, float8_e5m2& y) { y = to_e5m2(x); }

// Cosine and sine of a pair at a position. The fraction of a turn is exact to about 1e-7 at any position.
JITGEN_FN void turn(Turns turns, int position, float& cosine, float& sine) {
  const float p = static_cast<float>(position), p_rest = static_cast<float>(position - static_cast<int>(p));
  const float product = p * turns.high;
  const float rest = ::fmaf(p, turns.high, -product) + ::fmaf(p, turns.low, p_rest * turns.high);
  sincospif(2.0f * ((product - ::rintf(product)) + rest), &sine, &cosine);
}

// ---- the rows of a CTA, for the stream S of the generated file ----
template <class S> JITGEN_FN void store_row(const RowView<S>& row, typename S::Out* to) {
  using Row = Shape<S>;
#pragma unroll
  for (int r = 0; r < Row::kRepeat; ++r)
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int pair = row.lane + r * Row::kLanes;
      if (!Row::has(pair, which)) continue;
      Chunk<typename S::Out, S::kVec> chunk;
      if constexpr (S::kVec == 1) {
        round_to(row.x[r][which][0], chunk.values[0]);
      } else {
#pragma unroll
        for (int i = 0; i < S::kVec; i += 2) {
          const float a = row.x[r][which][i], b = row.x[r][which][i + 1];
          if constexpr (Pairs<typename S::Out>::kJoined)
            chunk.pairs[i / 2] = Pairs<typename S::Out>::round(a, b);
          else
            round_pair(a, b, chunk.values[i], chunk.values[i + 1]);
        }
      }
      chunk.store(to + Row::first(pair, which));
    }
}

template <class S> JITGEN_FN void scale_row(const Rows& rows, RowView<S>& row, const Place& place, int64_t h) {
  if constexpr (S::kScale == Scale::kGiven || S::kScale == Scale::kStored) {
    float* const where = rows.scale + place.slot * rows.scale_stride_s + h * rows.scale_stride_h;
    float inverse;   // no division: its slow path is a branch, and would keep the heads of a batch one after the other
    if constexpr (S::kScale == Scale::kStored) {
      constexpr float kMost = kLargest<typename S::Out>, kLeast = 0x1p-116f;   // below it, the scale would be no normal number
      const float most = row.max([](float v, int) { return ::fabsf(v); });
      if (row.lane == 0) *where = most > kLeast ? most * (1.0f / kMost) : 1.0f;
      inverse = most > kLeast ? kMost * reciprocal(most) : 1.0f;
    } else {
      inverse = reciprocal(rows.scale ? *where : rows.scale_value);
    }
    row.each([&](float& v, int) { v *= inverse; });
  }
}

// A kernel that waits for the end of this one itself may be launched by now.
JITGEN_FN void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <class S, class Args> JITGEN_FN void move_rows(const Args& args, int64_t block) {
  using Row = Shape<S>;
  using Input = Chunk<typename S::In, S::kVec>;
  const Rows rows = S::rows(args);
  const int64_t unit = (block * kThreads + threadIdx.x) / Row::kLanes;
  const int64_t units_per_token = (rows.num_heads + rows.heads_per_unit - 1) / rows.heads_per_unit;
  const int64_t token = units_per_token == 1 ? unit : unit / units_per_token;
  if (token >= args.num_tokens) return;
  RowView<S> row;
  row.lane = static_cast<int>(threadIdx.x) % Row::kLanes;
  row.team = Row::kLanes == 32 ? ~0u : ((1u << (Row::kLanes % 32)) - 1) << (threadIdx.x % 32 / Row::kLanes * Row::kLanes);
  const int64_t begin = (unit - token * units_per_token) * rows.heads_per_unit;
  const int64_t end = begin + rows.heads_per_unit < rows.num_heads ? begin + rows.heads_per_unit : rows.num_heads;

  constexpr bool kReadsPlaces = kGathers<S::kPlaces>;
  const auto* from = static_cast<const typename S::In*>(rows.x) + token * rows.x_stride_t;
  const int64_t from_stride_h = kReadsPlaces ? rows.out_stride_h : rows.x_stride_h;
  Input ahead[Row::kAhead][Row::kRepeat][2];
  const auto load = [&](Input (&chunks)[Row::kRepeat][2], int64_t h) {
#pragma unroll
    for (int r = 0; r < Row::kRepeat; ++r)
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const int pair = row.lane + r * Row::kLanes;
        if (Row::has(pair, which)) chunks[r][which] = Input::load(from + h * from_stride_h + Row::first(pair, which));
      }
  };
  // New rows are on their way while their place and angles are found, and those of a batch of heads while the one before is
  // worked on. Gathered rows have no address yet, and lanes that hold captured rows no registers.
  constexpr bool kEarly = !kReadsPlaces && S::kConstants == 0;
  if (kEarly && begin + Row::kAhead <= end) {
#pragma unroll
    for (int a = 0; a < Row::kAhead; ++a) load(ahead[a], begin + a);
  }
  const Place place = find_place<S::kPlaces>(args, token);
  if (!place.exists) return;
  const int64_t by_token = token * rows.x_stride_t, by_place = place.page * rows.out_stride_p + place.offset * rows.out_stride_s;
  auto* const to = static_cast<typename S::Out*>(rows.out) + (kReadsPlaces ? by_token : by_place);
  const int64_t to_stride_h = kReadsPlaces ? rows.x_stride_h : rows.out_stride_h;
  if (kReadsPlaces) from = static_cast<const typename S::In*>(rows.x) + by_place;

  if constexpr (S::kConstants > 0) row.load_constants(args);

  float cosine[Row::kRepeat][S::kVec], sine[Row::kRepeat][S::kVec];
  if constexpr (S::kRotary > 0) {
    const int position = S::position(args, place.b, 0, place.pos);   // that of all heads
#pragma unroll
    for (int r = 0; r < Row::kRepeat; ++r) {
      const int pair = row.lane + r * Row::kLanes;
#pragma unroll
      for (int i = 0; i < S::kVec; ++i)
        if (pair < Row::kTurned) S::angle(args, position, pair * S::kVec + i, cosine[r][i], sine[r][i]);
    }
  }

  const auto work = [&](const Input (&chunks)[Row::kRepeat][2], int64_t h) {
#pragma unroll
    for (int r = 0; r < Row::kRepeat; ++r)
#pragma unroll
      for (int which = 0; which < 2; ++which)
#pragma unroll
        for (int i = 0; i < S::kVec; ++i) row.x[r][which][i] = widen(chunks[r][which].values[i]);
    if constexpr (S::kScale == Scale::kRead) {
      const float scale = read_scale(rows, place, h);
      row.each([&](float& v, int) { v *= scale; });
    }
    S::before(args, row, place.b, static_cast<int>(h), place.pos);
    if constexpr (S::kRotary > 0) row.rotate(cosine, sine);
    S::after(args, row, place.b, static_cast<int>(h), place.pos);
    scale_row(rows, row, place, h);
    store_row<S>(row, to + h * to_stride_h);
  };
  int64_t h = begin;
  while (h + Row::kAhead <= end) {
    const int64_t next = h + Row::kAhead;
    const bool has_next = next + Row::kAhead <= end;
    if (!kEarly) {
#pragma unroll
      for (int a = 0; a < Row::kAhead; ++a) load(ahead[a], h + a);
    }
#pragma unroll
    for (int a = 0; a < Row::kAhead; ++a) {
      work(ahead[a], h + a);
      if (kEarly && has_next) load(ahead[a], next + a);
    }
    h = next;
  }
  for (; h < end; ++h) {
    load(ahead[0], h);
    work(ahead[0], h);
  }
}

// ---- host side ----
// CTAs for the rows of a stream.
template <class S> int64_t num_blocks(const Rows& rows, int64_t num_tokens) {
  const int64_t units_per_token = (rows.num_heads + rows.heads_per_unit - 1) / rows.heads_per_unit;
  const int64_t teams = kThreads / Shape<S>::kLanes;
  return (num_tokens * units_per_token + teams - 1) / teams;
}

}  // namespace jg
