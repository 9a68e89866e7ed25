// Division of a launch into work items, the scratch memory of its threads, and the store of packed K and V tiles.
#pragma once

#include <stdlib.h>
#include <string.h>

#include "jitgen/cpu_types.h"

extern "C" int omp_get_max_threads();
extern "C" int omp_get_thread_num();

namespace jg {

constexpr int kErrorNoMemory = 1, kErrorNoTiles = 4;
static inline const char* error_string(int code) {
  switch (code) {
    case kErrorNoMemory: return "out of memory for the scratch of the CPU threads";
    case kErrorNoTiles: return "the system does not let this process use the tile registers of AMX; see JITGEN_CPU_ISA";
    default: return "unknown error";
  }
}

constexpr int kMaxHeadsPerItem = 16;
// Items that a thread gets, at least, before their blocks become fewer: those that finish last differ little.
constexpr int kItemsPerThread = 8;
// Up to this many queries per KV head K and V are read in place: packing a tile costs about as much as eight rows.
constexpr int kMaxDirectRows = 8;
// Packed tiles are kept for a wave of KV heads at a time: few, so that the second-level caches hold them, or as many as all
// threads need. 24 MiB: below the size (32 MiB) from which glibc returns every freed block to the system, so repeated calls do
// not fault the pages in again.
constexpr int64_t kWaveBytes = int64_t{4} << 20, kMaxWaveBytes = int64_t{24} << 20;

// ---- work items ----
struct Item {
  int b, kv_h, first_head, num_heads, first_row, num_rows;

  // The i-th of its blocks of tile_q rows.
  Item block(int i, int tile_q) const {
    const int left = num_rows - i * tile_q;
    return {b, kv_h, first_head, num_heads, first_row + i * tile_q, left < tile_q ? left : tile_q};
  }
};

// Items are numbered KV head by KV head, in each the last rows first: under a causal mask these cost most.
struct Schedule {
  int num_kv_heads, group, q_len;
  int heads_per_item, rows_per_item;
  int64_t head_blocks, row_blocks, pairs;

  int64_t items_per_pair() const { return head_blocks * row_blocks; }
  int64_t items() const { return pairs * items_per_pair(); }
  Item item(int64_t index) const {
    const int64_t pair = index / items_per_pair(), rest = index % items_per_pair();
    const int first_row = static_cast<int>(row_blocks - 1 - rest / head_blocks) * rows_per_item;
    const int first_in_group = static_cast<int>(rest % head_blocks) * heads_per_item;
    const int kv_h = static_cast<int>(pair % num_kv_heads);
    const int left = q_len - first_row, heads_left = group - first_in_group;
    return {static_cast<int>(pair / num_kv_heads), kv_h, kv_h * group + first_in_group,
            heads_left < heads_per_item ? heads_left : heads_per_item, first_row, left < rows_per_item ? left : rows_per_item};
  }
};

// Short queries of several heads that share K and V are gathered into one item, and up to max_blocks blocks of tile_q rows of
// long ones, unless that leaves threads idle.
static inline Schedule make_schedule(int64_t batch, int64_t num_q_heads, int64_t num_kv_heads, int64_t q_len, int tile_q,
                              int max_blocks, int threads) {
  Schedule s;
  s.num_kv_heads = static_cast<int>(num_kv_heads);
  s.group = static_cast<int>(num_q_heads / num_kv_heads);
  s.q_len = static_cast<int>(q_len);
  s.pairs = batch * num_kv_heads;
  int blocks = max_blocks;
  while (blocks > 1 && s.pairs * s.group * ceil_div(q_len, blocks * tile_q) < int64_t{kItemsPerThread} * threads) blocks /= 2;
  s.rows_per_item = s.q_len < blocks * tile_q ? s.q_len : blocks * tile_q;
  s.row_blocks = ceil_div(q_len, s.rows_per_item);
  int heads = s.rows_per_item < tile_q ? tile_q / s.rows_per_item : 1;
  heads = heads < kMaxHeadsPerItem ? heads : kMaxHeadsPerItem;
  heads = heads < s.group ? heads : s.group;
  while (heads > 1 && s.pairs * ceil_div(s.group, heads) * s.row_blocks < threads) heads = (heads + 1) / 2;
  s.heads_per_item = heads;
  s.head_blocks = ceil_div(s.group, heads);
  return s;
}

// A wave is a run of KV heads whose packed tiles are kept at the same time.
struct Waves {
  int64_t count, pairs_per_wave, items_per_pair, items;
  int64_t num_states, store_bytes;   // 0 when no tile is read twice

  int64_t first_item(int64_t wave) const {
    const int64_t first = wave * pairs_per_wave * items_per_pair;
    return first < items ? first : items;
  }
  int64_t slot(int64_t wave, int64_t item) const { return item / items_per_pair - wave * pairs_per_wave; }
};

static inline Waves make_waves(const Schedule& schedule, int64_t num_tiles, int64_t tile_floats, int threads) {
  const int64_t per_pair = schedule.items_per_pair(), pair_bytes = num_tiles * tile_floats * 4;
  if (per_pair == 1 || num_tiles == 0) return {1, schedule.pairs, per_pair, schedule.items(), 0, 0};
  const int64_t needed = ceil_div(int64_t{kItemsPerThread} * threads, per_pair), most = kMaxWaveBytes / pair_bytes;
  int64_t pairs = kWaveBytes / pair_bytes;
  pairs = pairs > needed ? pairs : needed < most ? needed : most;
  pairs = pairs < 1 ? 1 : pairs < schedule.pairs ? pairs : schedule.pairs;
  return {ceil_div(schedule.pairs, pairs), pairs, per_pair, schedule.items(), pairs * num_tiles, pairs * pair_bytes};
}

// ---- floating point ----
// While a thread works, results below 2^-126 become 0: what a row has accumulated falls that low whenever its maximum leaps,
// as under ALiBi, and arithmetic with denormal numbers takes a hundred times as long. They may still be read: float16 needs it.
struct FlushDenormals {
#if defined(__SSE2__)
  static constexpr unsigned kFlushToZero = 0x8000;
  unsigned before = __builtin_ia32_stmxcsr();
  FlushDenormals() { __builtin_ia32_ldmxcsr(before | kFlushToZero); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(before); }
#else
  FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;
};

// ---- memory ----
struct Block {
  void* data;
  explicit Block(int64_t bytes)
      : data(bytes > 0 ? aligned_alloc(kScratchAlign, static_cast<size_t>(round_up(bytes, kScratchAlign))) : nullptr) {}
  ~Block() { free(data); }
  Block(const Block&) = delete;
};

// ---- packed tiles ----
struct Strides { int64_t b, h, s, d; };
struct PackedTile { const float *k, *v; };

// Packed tiles of K and V, packed by the first thread that needs one and read by all others of the wave. A thread that
// meets a tile another one is still packing makes its own copy rather than wait.
// Stored: the elements of K and V in memory, of rows of kHeadDim and kHeadDimV, where the products have others.
template <class Products, int kTileKv, class Stored = typename Products::Element, int kHeadDim = 0, int kHeadDimV = 0>
struct TileStore {
  using Element = typename Products::Element;
  static constexpr int64_t kTileFloats = Products::kTileFloats, kValues = int64_t{kTileKv} * Products::kKeyFloats;

  Strides k_stride, v_stride;
  int64_t num_tiles;
  float* tiles;      // [pairs of a wave][num_tiles]; null: every thread packs for itself
  int* states;       // per tile: 2 * wave + 1 while it is packed, 2 * wave + 2 once it is ready

  PackedTile pack(const Stored* k, const Stored* v, int keys, float* tile) const {
    if constexpr (kHeadDim > 0) {
      pack_converted(k, v, keys, tile);
    } else {
      Products::pack_keys(StridedRows<Stored>{k, k_stride.s}, k_stride.d, keys, tile);
      Products::pack_values(StridedRows<Stored>{v, v_stride.s}, v_stride.d, keys, tile + kValues);
    }
    return {tile, tile + kValues};
  }

  // A panel of keys at a time, whose converted rows stay in the first-level cache until they are packed.
  void pack_converted(const Stored* k, const Stored* v, int keys, float* tile) const {
    alignas(64) Element rows[kPanel * (kHeadDim > kHeadDimV ? kHeadDim : kHeadDimV)];
    for (int first = 0; first < keys; first += kPanel, k += kPanel * k_stride.s, v += kPanel * v_stride.s) {
      const int count = keys - first < kPanel ? keys - first : kPanel;
      for (int j = 0; j < count; ++j) convert_row<kHeadDim>(k + j * k_stride.s, k_stride.d, rows + j * kHeadDim);
      Products::pack_keys(StridedRows<Element>{rows, kHeadDim}, 1, count, tile + first * Products::kKeyFloats);
      for (int j = 0; j < count; ++j) convert_row<kHeadDimV>(v + j * v_stride.s, v_stride.d, rows + j * kHeadDimV);
      Products::pack_values(StridedRows<Element>{rows, kHeadDimV}, 1, count, tile + kValues + first * Products::kValueFloats);
    }
  }

  bool is_packed(int wave, int64_t slot, int64_t tile) const {
    return tiles && __atomic_load_n(states + slot * num_tiles + tile, __ATOMIC_RELAXED) > 2 * wave;
  }

  // k, v: first key of the tile. slot: number of the KV head within the wave. own: memory of this thread for one tile.
  PackedTile get(int wave, int64_t slot, int64_t tile, const Stored* k, const Stored* v, int keys, float* own) const {
    if (!tiles) return pack(k, v, keys, own);
    const int64_t index = slot * num_tiles + tile;
    const int packing = 2 * wave + 1, ready = 2 * wave + 2;
    float* shared = tiles + index * kTileFloats;
    int state = __atomic_load_n(states + index, __ATOMIC_ACQUIRE);
    if (state < packing &&
        __atomic_compare_exchange_n(states + index, &state, packing, false, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE)) {
      const PackedTile view = pack(k, v, keys, shared);
      __atomic_store_n(states + index, ready, __ATOMIC_RELEASE);
      return view;
    }
    return state == ready ? PackedTile{shared, shared + kValues} : pack(k, v, keys, own);
  }
};

}  // namespace jg
