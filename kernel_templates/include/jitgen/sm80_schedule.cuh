// Which CTA works on which query tile, and which KV tiles it visits.
#pragma once
#include "jitgen/cuda_math.cuh"

namespace jg {

// ---- order of the CTAs ----
// Heads are taken in sections whose K and V stay in L2; inside a section all heads of the last query tile come first,
// because under a causal mask the last rows are the longest and should not be left for the end.
struct CtaWork { int batch, head, query_tile; };

// Bytes of K and V per section: within 3 % of the best section on an H100 (50 MB L2) for lengths 1k to 16k. The last section
// should be several waves of CTAs where they differ in length: one wave ends with its longest, which for documents of mixed
// lengths took 10 to 15 % of the time.
constexpr long long kEvenSection = 16ll << 20, kMaskedSection = 64ll << 20, kUnevenSection = 128ll << 20;

// Query heads (counted over the whole batch) per section: a divisor of num_heads, a power of two of KV heads.
inline int section_heads(long long section_bytes, long long kv_head_bytes, long long num_heads, long long group_size) {
  long long kv_heads = 1;
  while (kv_heads * 2 * kv_head_bytes <= section_bytes && num_heads % (kv_heads * 2 * group_size) == 0) kv_heads *= 2;
  return static_cast<int>(kv_heads * group_size);
}
// Read as volatile, so that the epilogue finds its place again instead of keeping it in registers through the KV loop.
JITGEN_FN int cta_index() { int i; asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(i)); return i; }
JITGEN_FN int thread_index() { int i; asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i)); return i; }

JITGEN_FN CtaWork cta_work(int num_query_tiles, int num_q_heads, int section) {
  const int cta = cta_index(), per_section = section * num_query_tiles;
  const int inside = cta % per_section, head = cta / per_section * section + inside % section;
  return {head / num_q_heads, head % num_q_heads, num_query_tiles - 1 - inside / section};
}

// ---- KV tiles to visit ----
// A visit is tile * 4 + kind in one register (kTileNone: the warp only takes part in the barriers), -1 after the last.

// Without a mask: all of them.
template <bool kDescending> struct AllTiles {
  int num_tiles, left;
  JITGEN_FN explicit AllTiles(int num_tiles) : num_tiles(num_tiles), left(num_tiles) {}
  JITGEN_FN int next() {
    if (left <= 0) return -1;
    --left;
    return (kDescending ? left : num_tiles - 1 - left) * 4 + kTileFull;
  }
};

// Under a mask: classifies 32 tiles at a time, one per lane. Every warp does so for itself: the tiles of the CTA decide what is
// loaded (the same words in all warps), the tiles of its own rows what the warp may leave out.
template <bool kDescending, class CtaSpan, class WarpSpan, class KindOf> struct MaskedTiles {
  CtaSpan cta_span;
  WarpSpan warp_span;
  KindOf kind_of;
  bool has_rows;                    // of this warp, below q_len
  int num_tiles, base;              // base: first tile of the current group of 32
  unsigned visit, compute, full;    // bit i: tile base + i is loaded; has work for this warp; needs no mask in this warp

  JITGEN_FN MaskedTiles(int num_tiles, bool has_rows, CtaSpan cta, WarpSpan warp, KindOf kind)
      : cta_span(cta), warp_span(warp), kind_of(kind), has_rows(has_rows), num_tiles(num_tiles), visit(0), compute(0), full(0) {
    base = kDescending ? (num_tiles + 31) / 32 * 32 : -32;
  }
  JITGEN_FN int next() {
    while (visit == 0) {
      base += kDescending ? -32 : 32;
      if (base < 0 || base >= num_tiles) return -1;
      const int tile = base + (threadIdx.x & 31);
      int kind = kTileNone;
      {
        const auto span = cta_span();   // by the whole warp
        if (tile < num_tiles) kind = kind_of(span, tile);
      }
      visit = __ballot_sync(0xffffffffu, kind != kTileNone);
      const auto span = warp_span();
      if (kind == kTilePartial) kind = kind_of(span, tile);   // full for all rows of the CTA is full for those of the warp
      compute = __ballot_sync(0xffffffffu, has_rows && kind != kTileNone);
      full = __ballot_sync(0xffffffffu, has_rows && kind == kTileFull);
    }
    const int bit = kDescending ? 31 - __clz(visit) : __ffs(visit) - 1;
    visit &= ~(1u << bit);
    return (base + bit) * 4 + static_cast<int>((compute >> bit & 1) + (full >> bit & 1));   // full implies compute
  }
};

}  // namespace jg
