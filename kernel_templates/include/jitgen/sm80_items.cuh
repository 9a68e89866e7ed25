// Which query tiles a CTA works on: as many CTAs as run at once take them as they finish others.
#pragma once
#include "jitgen/divisor.cuh"
#include "jitgen/sm80_ptx.cuh"
#include "jitgen/tile_counter.cuh"

namespace jg {

// As many CTAs as run at once take items as they finish others, so that nothing is loaded anew but Q: the first tile of the next
// item is on its way while the last one of the present is multiplied.
// Heads are taken in sections whose K and V stay in L2; inside a section all heads of the last query tile come first,
// because under a causal mask the last rows are the longest and should not be left for the end.
struct Item { int batch, head, query_tile; };

// The order as a launch fixes it: query heads of a section, items of a section, heads of a request, query heads of a KV head.
// Divisions by them as such would be a sixth of the instructions before the first copy.
struct ItemOrder {
  int num_query_tiles, num_items;
  int counter;   // index of the tile counter; -1: none, each CTA has one item
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
inline ItemOrder item_order(long long num_query_tiles, long long section, long long num_heads, long long num_q_heads, long long group_size, int counter = -1) {
  const auto divisor = [](long long value) { return make_divisor(static_cast<unsigned>(value)); };
  return {static_cast<int>(num_query_tiles), static_cast<int>(num_query_tiles * num_heads), counter,
          divisor(section), divisor(section * num_query_tiles), divisor(num_q_heads), divisor(group_size)};
}
JITGEN_FN Item item_at(const ItemOrder& order, int index) {
  const int section = order.per_section.divide(index), inside = index - section * static_cast<int>(order.per_section.value);
  const int tile = order.section.divide(inside), head = (section - tile) * static_cast<int>(order.section.value) + inside;
  const int batch = order.num_q_heads.divide(head);
  return {batch, head - batch * static_cast<int>(order.num_q_heads.value), order.num_query_tiles - 1 - tile};
}

// Indices of the items of a CTA by turn, in shared memory because no register is free through the KV loop. Thread 0 takes an
// item one barrier before all read it; three are alive at most.
struct TakenItems {
  static constexpr unsigned kBytes = 16;
  unsigned address;

  JITGEN_FN int at(int turn) const { return static_cast<int>(load_shared_32(address + (turn & 3) * 4)); }
  JITGEN_FN void put(int turn, int item) const { store_shared_32(address + (turn & 3) * 4, static_cast<unsigned>(item)); }
  JITGEN_FN void take(int turn, const ItemOrder& order) const {
    put(turn, order.counter < 0 ? order.num_items : atomicAdd(&tile_counters[order.counter][0], 1) + static_cast<int>(gridDim.x));
  }
};
// By one thread of each CTA, behind its last item: the counter is ready for the next launch.
JITGEN_FN void release_counter(int counter) {
  if (counter < 0) return;
  int* const counts = tile_counters[counter];
  if (atomicAdd(&counts[1], 1) == static_cast<int>(gridDim.x) - 1) counts[0] = counts[1] = 0;
}

}  // namespace jg
