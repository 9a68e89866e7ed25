// Merging what warps and CTAs found of the same rows, inside the launch.
//
// A thread merges four dims of one column: first over the warps of the CTA through shared memory, then, for an item that was
// cut, over the CTAs that hold its pieces. Each piece but the first is published in words that only one thread of the CTA
// with the first piece reads. The words are their own flags: they are all ones, a NaN that no instruction produces, until
// they are written, and the reader puts the ones back. No fence, counter or reset, and always the same order of additions.
//
// Pieces are added in a tree: of each group of CTAs the first adds what the others have to its own before it hands that on.
// A CTA waits for CTAs with a higher index only, and its share begins with its only piece that is not a first one, so no two
// wait for each other as long as CTAs are started in order.
#pragma once
#include "jitgen/decode_tile.cuh"

namespace jg {

// O and softmax of four dims of a column, in exponents of two.
struct PartialSum {
  static constexpr int kPairs = 1;   // of floats, besides O
  float4 o;
  float top, sum;

  JITGEN_FN float2 pair(int) const { return make_float2(top, sum); }
  JITGEN_FN void scale(float factor) { o.x *= factor, o.y *= factor, o.z *= factor, o.w *= factor, sum *= factor; }
  JITGEN_FN void add(const float4& other, const float2 (&state)[1]) {
    const float now = ::fmaxf(top, state[0].x), shift = shift_of(now), factor = exp2(state[0].x - shift);
    scale(exp2(top - shift));
    top = now;
    sum += factor * state[0].y;
    o.x += factor * other.x, o.y += factor * other.y, o.z += factor * other.z, o.w += factor * other.w;
  }
};

// The partial results of all CTAs: a float4 and Part::kPairs pairs of floats for each thread that merges one.
template <class Part> struct PartBoxes {
  float4* values;
  float2* states;
  long long per_cta, all;

  JITGEN_FN PartBoxes(void* workspace, long long per_cta, int num_ctas, long long own)
      : values(static_cast<float4*>(workspace) + own),
        states(reinterpret_cast<float2*>(static_cast<float4*>(workspace) + per_cta * num_ctas) + own),
        per_cta(per_cta), all(per_cta * num_ctas) {}
  JITGEN_FN float2* state(int cta, int pair) const { return states + pair * all + cta * per_cta; }
  JITGEN_FN void publish(int cta, const Part& part) const {
    send(values + cta * per_cta, part.o);
#pragma unroll
    for (int i = 0; i < Part::kPairs; ++i) send(state(cta, i), part.pair(i));
  }
  static JITGEN_FN bool blank(float x) { return __float_as_uint(x) == 0xffffffffu; }
  static JITGEN_FN bool blank(const float4& v) { return blank(v.x) | blank(v.y) | blank(v.z) | blank(v.w); }

  // Adds up the pieces of CTAs [first, last], of which `into` is that of CTA `own`: the result is in the first one. Called by
  // whole warps, of which the active lanes have a mailbox. A group of 8 is read at once; 16 pieces need no second level.
  template <int kInFlight> JITGEN_FN void join(Part& into, int own, int first, int last, bool active) const {
    const int shift = last - first < 16 ? 4 : 3, members = (1 << shift) - 1, place = own - first;
#pragma unroll 1
    for (int level = 0; 1 << level <= last - first && (place & members << level) == 0; level += shift) {
      const int step = 1 << level;
      collect<kInFlight>(into, own + step, jg::min(last, own + members * step), step, active);
    }
    if (place != 0 && active) publish(own, into);
  }

  // Adds the pieces of CTAs first, first + step, ... up to `last`. kInFlight of them are asked for at a time: the reads of more
  // would be wasted while pieces are on their way.
  template <int kInFlight> JITGEN_FN void collect(Part& into, int first, int last, int step, bool active) const {
    const float ones = __uint_as_float(0xffffffffu);
#pragma unroll 1
    for (int cta = first; cta <= last; cta += kInFlight * step) {
      float4 value[kInFlight];
      float2 pairs[kInFlight][Part::kPairs];
      bool missing;
      do {
        missing = false;
#pragma unroll
        for (int i = 0; i < kInFlight; ++i)
          if (active && cta + i * step <= last) {
            value[i] = look_at(values + (cta + i * step) * per_cta);
#pragma unroll
            for (int p = 0; p < Part::kPairs; ++p) pairs[i][p] = look_at(state(cta + i * step, p));
          }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i)
          if (active && cta + i * step <= last) {
            bool blanks = blank(value[i]);
#pragma unroll
            for (int p = 0; p < Part::kPairs; ++p) blanks = blanks | blank(pairs[i][p].x) | blank(pairs[i][p].y);
            missing |= blanks;
          }
      } while (__any_sync(0xffffffffu, missing));
#pragma unroll
      for (int i = 0; i < kInFlight; ++i)
        if (active && cta + i * step <= last) {
          send(values + (cta + i * step) * per_cta, make_float4(ones, ones, ones, ones));
#pragma unroll
          for (int p = 0; p < Part::kPairs; ++p) send(state(cta + i * step, p), make_float2(ones, ones));
          into.add(value[i], pairs[i]);
        }
    }
  }
};

using Mailboxes = PartBoxes<PartialSum>;

// The state of a norm, a struct of floats, as pairs of them: zeros behind the last.
template <class State> JITGEN_FN float2 state_pair(const State& state, int pair) {
  constexpr int kValues = sizeof(State) / 4;
  const float* const values = reinterpret_cast<const float*>(&state);
  return make_float2(2 * pair < kValues ? values[2 * pair] : 0.0f, 2 * pair + 1 < kValues ? values[2 * pair + 1] : 0.0f);
}
template <class State, int kPairs> JITGEN_FN State state_of(const float2 (&pairs)[kPairs]) {
  State state;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(State) / 4); ++i)
    reinterpret_cast<float*>(&state)[i] = i % 2 ? pairs[i / 2].y : pairs[i / 2].x;
  return state;
}

// Where the warps of a head put kDims dims of the O of one column tile: [warp][8 columns][kPitch] floats, and the softmax of
// the columns. The pitch spreads the eight groups and four quads of a fragment over all banks.
template <int kDims> struct MergeBuffer {
  static constexpr int kPitch = kDims + 4;
  static constexpr unsigned kBytes = 8 * kPitch * 4;   // of a warp

  // Dims from `part` * kDims on; columns from `columns` on hold nothing. kPaired: the halves of a fragment are dims 2 group and 2 group + 1 of a slice, not
  // group and group + 8.
  template <bool kPaired, int kSlices, int kTiles>
  static JITGEN_FN void put(unsigned address, const float (&o)[kSlices][kTiles][4], int tile, int part, int columns, int lane) {
    const int group = lane / 4, quad = lane % 4;
    if (2 * quad >= columns) return;
    const unsigned to = address + (2 * quad * kPitch + (kPaired ? 2 * group : group)) * 4;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      if (n == tile) {
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (slice * 16 / kDims != part) continue;
            const unsigned at = to + (slice * 16 % kDims + e * kPitch) * 4;
            if constexpr (kPaired) {
              store_shared(at, make_float2(o[slice][n][e], o[slice][n][e + 2]));
            } else {
              store_shared_float(at, o[slice][n][e]);
              store_shared_float(at + 32, o[slice][n][e + 2]);
            }
          }
      }
  }
  // Sum over the warps of a head. `values` and `states`: this thread's dims and column in those of the first warp.
  template <int kMaxWarps> static JITGEN_FN PartialSum sum(unsigned values, unsigned states, unsigned state_pitch, int warps) {
    float2 state[kMaxWarps];
    PartialSum all = {make_float4(0.0f, 0.0f, 0.0f, 0.0f), -INFINITY, 0.0f};
#pragma unroll
    for (int w = 0; w < kMaxWarps; ++w) {
      state[w] = w < warps ? load_shared_float2(states + w * state_pitch) : make_float2(-INFINITY, 0.0f);
      all.top = ::fmaxf(all.top, state[w].x);
    }
    const float shift = shift_of(all.top);
#pragma unroll
    for (int w = 0; w < kMaxWarps; ++w)
      if (w < warps) {
        const float factor = exp2(state[w].x - shift);
        const float4 part = load_shared_float4(values + w * kBytes);
        all.sum += factor * state[w].y;
        all.o.x += factor * part.x, all.o.y += factor * part.y, all.o.z += factor * part.z, all.o.w += factor * part.w;
      }
    return all;
  }
};

}  // namespace jg
