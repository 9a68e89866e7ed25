// Which CTA works on which query tile, and which KV tiles it visits.
#pragma once
#include "jitgen/cuda_math.cuh"
#include "jitgen/divisor.cuh"

namespace jg {

// ---- order of the CTAs ----
// Heads are taken in sections whose K and V stay in L2; inside a section all heads of the last query tile come first,
// because under a causal mask the last rows are the longest and should not be left for the end.
struct CtaWork { int batch, head, query_tile; };

// The order as a launch fixes it: query heads of a section, CTAs of a section, heads of a request, query heads of a KV head.
// Divisions by them as such would be a sixth of the instructions before the first copy.
struct CtaOrder {
  int num_query_tiles;
  Divisor section, per_section, num_q_heads, group_size;
};

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
inline CtaOrder cta_order(long long num_query_tiles, long long section, long long num_q_heads, long long group_size) {
  const auto divisor = [](long long value) { return make_divisor(static_cast<unsigned>(value)); };
  return {static_cast<int>(num_query_tiles), divisor(section), divisor(section * num_query_tiles), divisor(num_q_heads), divisor(group_size)};
}
// Read as volatile, so that the epilogue finds its place again instead of keeping it in registers through the KV loop.
JITGEN_FN int cta_index() { int i; asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(i)); return i; }
JITGEN_FN int thread_index() { int i; asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i)); return i; }

JITGEN_FN CtaWork cta_work(const CtaOrder& order) {
  const int cta = cta_index(), section = order.per_section.divide(cta), inside = cta - section * static_cast<int>(order.per_section.value);
  const int tile = order.section.divide(inside), head = (section - tile) * static_cast<int>(order.section.value) + inside;
  const int batch = order.num_q_heads.divide(head);
  return {batch, head - batch * static_cast<int>(order.num_q_heads.value), order.num_query_tiles - 1 - tile};
}

// ---- KV tiles to visit ----
// A visit is tile * 4 + kind in one register (kTileNone: the warp only takes part in the barriers), -1 after the last.

// Without a mask: all of them.
template <bool kDescending> struct AllTiles {
  int num_tiles, left;
  JITGEN_FN explicit AllTiles(int num_tiles) : num_tiles(num_tiles), left(num_tiles) {}
  JITGEN_FN bool find() const { return left > 0; }
  JITGEN_FN int next_tile() const { return kDescending ? left - 1 : num_tiles - left; }
  JITGEN_FN void classify() const {}
  JITGEN_FN int next() {
    if (left <= 0) return -1;
    --left;
    return (kDescending ? left : num_tiles - 1 - left) * 4 + kTileFull;
  }
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
      : cta_span(cta), warp_span(warp), kind_of(kind), has_rows(has_rows), num_tiles(num_tiles), visit(0), low(0), high(0) {
    base = kDescending ? (num_tiles + 31) / 32 * 32 : -32;
  }
  // Goes on to the next group with a tile to load; false after the last.
  JITGEN_FN bool find() {
    const Span span = cta_span();   // by the whole warp
    own = warp_span();              // here, so that what the two read arrives together
    do {
      base += kDescending ? -32 : 32;
      if (base < 0 || base >= num_tiles) return false;
      const int tile = base + (threadIdx.x & 31);
      kind = tile < num_tiles ? kind_of(span, tile) : kTileNone;
      visit = __ballot_sync(0xffffffffu, kind != kTileNone);
    } while (visit == 0);
    return true;
  }
  // After find: what the tiles of the group are to this warp. Full for all rows of the CTA is full for those of the warp.
  JITGEN_FN void classify() {
    if (kind != kTileNone && kind != kTileFull) kind = kind_of(own, base + (threadIdx.x & 31));
    low = __ballot_sync(0xffffffffu, has_rows && kind & 1);
    high = __ballot_sync(0xffffffffu, has_rows && kind & 2);
  }
  JITGEN_FN int next_bit() const { return kDescending ? 31 - __clz(visit) : __ffs(visit) - 1; }
  JITGEN_FN int next_tile() const { return base + next_bit(); }
  JITGEN_FN int next() {
    if (visit == 0) {
      if (!find()) return -1;
      classify();
    }
    const int bit = next_bit();
    visit &= ~(1u << bit);
    return (base + bit) * 4 + static_cast<int>((low >> bit & 1) + 2 * (high >> bit & 1));
  }
};

}  // namespace jg
