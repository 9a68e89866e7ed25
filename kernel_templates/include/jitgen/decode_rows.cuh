// Rows of K and V that are transformed where they have landed in shared memory, between the arrival of a unit and its products.
//
// A team of lanes takes a row: it reads its chunks, goes through the functions of the transform in float, and writes the
// chunks back where they were, rounded. Other lanes see them after the fence.
#pragma once
#include "jitgen/decode_tile.cuh"
#include "jitgen/row_view.cuh"

namespace jg {

// Cosine and sine of a pair at a position. The fraction of a turn is exact to 1e-7 at any position; the special function unit
// adds 5e-7, which is nothing beside the rounding of the rotated row.
JITGEN_FN void turn(Turns turns, float p, float p_rest, float& cosine, float& sine) {
  constexpr float kMagic = 12582912.0f;   // adding it rounds to an integer
  const float whole = ::fmaf(p, turns.high, kMagic) - kMagic;
  const float part = ::fmaf(p_rest, turns.high, ::fmaf(p, turns.low, ::fmaf(p, turns.high, -whole)));
  const float angle = 6.28318530718f * part;
  cosine = __cosf(angle);
  sine = __sinf(angle);
}
JITGEN_FN void turn(Turns turns, int position, float& cosine, float& sine) {
  const float p = static_cast<float>(position);
  turn(turns, p, static_cast<float>(position - static_cast<int>(p)), cosine, sine);
}

JITGEN_FN void unpack(bf16_16, unsigned both, float& low, float& high) {
  low = __uint_as_float(both << 16), high = __uint_as_float(both & 0xffff0000u);
}
JITGEN_FN void unpack(half16, unsigned both, float& low, float& high) {
  low = widen(half16{static_cast<unsigned short>(both)}), high = widen(half16{static_cast<unsigned short>(both >> 16)});
}

// S: the functions of the generated file. Stored: bf16_16 or half16. Element: what packs two of them.
template <class S, class Stored, class Element> struct UnitRows {
  using Row = Shape<S>;
  static constexpr int kAtOnce = 32 / Row::kLanes;   // rows that the warp works on
  static constexpr int kSpeeds = S::kHasSpeeds ? S::kVec : 1;
  static_assert(S::kVec == 8 && Row::kRepeat == 1, "a lane has two chunks of 16 bytes");

  Turns speeds[kSpeeds];   // of this lane's pairs, the same in every row
  int lane;

  template <class Args> JITGEN_FN UnitRows(const Args& args, int lane) : lane(lane) {
    const int pair = lane % Row::kLanes;
    if constexpr (S::kHasSpeeds) {
#pragma unroll
      for (int i = 0; i < kSpeeds; ++i) speeds[i] = S::speed(args, (pair < Row::kTurned ? pair : 0) * S::kVec + i);
    }
  }
  // The 16 rows of the tile at `tile`: those of keys from `first` on.
  template <class Args> JITGEN_FN void transform(const Args& args, unsigned tile, int first, int b, int kv_h) const {
    RowView<S> row;
    row.lane = lane % Row::kLanes;
    row.team = Row::kLanes == 32 ? ~0u : ((1u << (Row::kLanes % 32)) - 1) << (lane / Row::kLanes * Row::kLanes);
#pragma unroll 2
    for (int at = lane / Row::kLanes; at < kUnitKeys; at += kAtOnce) {
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        if (!Row::has(row.lane, which)) continue;
        const uint4 chunk = load_shared_128(place_of(tile, at, row.lane, which));
        const unsigned words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) unpack(Stored{}, words[i], row.x[0][which][2 * i], row.x[0][which][2 * i + 1]);
      }
      S::before(args, row, b, kv_h, first + at);
      if constexpr (S::kRotary > 0) rotate(args, row, S::position(args, b, kv_h, first + at));
      S::after(args, row, b, kv_h, first + at);
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        if (!Row::has(row.lane, which)) continue;
        unsigned words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = Element::pack(row.x[0][which][2 * i], row.x[0][which][2 * i + 1]);
        store_shared(place_of(tile, at, row.lane, which), uint4{words[0], words[1], words[2], words[3]});
      }
    }
  }

 private:
  static JITGEN_FN unsigned place_of(unsigned tile, int row, int pair, int which) {
    return tile + SpanTile<S::kHeadDim>::chunk_offset(row, Row::first(pair, which) / S::kVec, kUnitKeys);
  }
  template <class Args> JITGEN_FN void rotate(const Args& args, RowView<S>& row, int position) const {
    float cosine[1][S::kVec], sine[1][S::kVec];
    const float p = static_cast<float>(position), p_rest = static_cast<float>(position - static_cast<int>(p));
#pragma unroll
    for (int i = 0; i < S::kVec; ++i) {
      if constexpr (S::kHasSpeeds) turn(speeds[i], p, p_rest, cosine[0][i], sine[0][i]);
      else if (row.lane < Row::kTurned) S::angle(args, position, row.lane * S::kVec + i, cosine[0][i], sine[0][i]);
    }
    row.rotate(cosine, sine);
  }
};

}  // namespace jg
