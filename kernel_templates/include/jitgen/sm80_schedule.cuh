// Which KV tiles a CTA visits.
#pragma once
#include "jitgen/cuda_math.cuh"

namespace jg {

// Read as volatile, so that it is found again instead of kept in registers through the KV loop.
JITGEN_FN int cta_index() { int i; asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(i)); return i; }
JITGEN_FN int thread_index() { int i; asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i)); return i; }

// ---- KV tiles to visit ----
// A visit is tile * 4 + kind in one register (kTileNone: the warp only takes part in the barriers), -1 after the last.

// Without a mask: all of them.
template <bool kDescending> struct AllTiles {
  int num_tiles, left;
  JITGEN_FN explicit AllTiles(int num_tiles) : num_tiles(num_tiles), left(num_tiles) {}
  JITGEN_FN bool find() const { return left > 0; }
  JITGEN_FN int next_tile() const { return kDescending ? left - 1 : num_tiles - left; }
  JITGEN_FN void classify() const {}
  JITGEN_FN bool is_done() const { return left <= 0; }
  JITGEN_FN int take() {
    --left;
    return (kDescending ? left : num_tiles - 1 - left) * 4 + kTileFull;
  }
  JITGEN_FN int next() { return is_done() ? -1 : take(); }
};

// Under a mask: classifies 32 tiles at a time, one per lane. Every warp does so for itself: the tiles of the CTA decide what is
// loaded (the same words in all warps), the tiles of its own rows what the warp may leave out.
template <bool kDescending, class Span, class CtaSpan, class WarpSpan, class KindOf> struct MaskedTiles {
  CtaSpan cta_span;
  WarpSpan warp_span;
  KindOf kind_of;
  bool has_rows;                    // of this warp, below q_len
  int num_tiles, base;              // base: first tile of the current group of 32
  unsigned visit, low, high;        // bit i: tile base + i is loaded; the bits of its kind for this warp
  int kind;                         // of the lane's tile, for all rows of the CTA
  Span own;                         // rows of this warp

  JITGEN_FN MaskedTiles(int num_tiles, bool has_rows, CtaSpan cta, WarpSpan warp, KindOf kind)
      : cta_span(cta), warp_span(warp), kind_of(kind), num_tiles(num_tiles), low(0), high(0) {
    restart(has_rows);
  }
  JITGEN_FN void restart(bool warp_has_rows) {
    has_rows = warp_has_rows, visit = 0;
    base = kDescending ? (num_tiles + 31) / 32 * 32 : -32;
  }
  JITGEN_FN bool has_group() const { return base >= 0 && base < num_tiles; }
  // Goes on to the next group with a tile to load; false after the last.
  JITGEN_FN bool find() {
    constexpr int kStep = kDescending ? -32 : 32;
    base += kStep;
    if (!has_group()) return false;
    const Span span = cta_span();   // by the whole warp
    own = warp_span();              // here, so that what the two read arrives together
    for (; has_group(); base += kStep) {
      const int tile = base + (threadIdx.x & 31);
      kind = tile < num_tiles ? kind_of(span, tile) : kTileNone;
      visit = __ballot_sync(0xffffffffu, kind != kTileNone);
      if (visit != 0) return true;
    }
    return false;
  }
  // After find: what the tiles of the group are to this warp. Full for all rows of the CTA is full for those of the warp.
  JITGEN_FN void classify() {
    if (kind != kTileNone && kind != kTileFull) kind = kind_of(own, base + (threadIdx.x & 31));
    low = __ballot_sync(0xffffffffu, has_rows && kind & 1);
    high = __ballot_sync(0xffffffffu, has_rows && kind & 2);
  }
  JITGEN_FN int next_bit() const { return kDescending ? 31 - __clz(visit) : __ffs(visit) - 1; }
  JITGEN_FN int next_tile() const { return base + next_bit(); }
  JITGEN_FN void refill() {
    if (visit == 0 && find()) classify();
  }
  JITGEN_FN bool is_done() const { return visit == 0; }   // behind refill: there is no other tile
  JITGEN_FN bool has_several() const { return (visit & (visit - 1)) != 0; }
  JITGEN_FN int next() {
    refill();
    return is_done() ? -1 : take();
  }
  JITGEN_FN int take() {
    const int bit = next_bit();
    visit &= ~(1u << bit);
    return (base + bit) * 4 + static_cast<int>((low >> bit & 1) + 2 * (high >> bit & 1));
  }
};

}  // namespace jg
