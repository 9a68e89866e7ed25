// How a warp of the decode kernel walks its share of the plan, and how it loads K and V for itself.
//
// Every warp owns a ring of stages and issues its own copies: units of 16 keys of one key head. No warp waits for another
// until an item ends. A stage is one mbarrier, and K and V as span tiles, whichever of two ways they come:
//   - boxes of the copy engine (sm_90 and up; ragged keys, or a page size that is a multiple of 16): one for K, one for V;
//   - 16-byte cp.async (any page size): lane i looks up the page of key i, shuffles hand it to the lanes that copy it.
// Rows are given in columns of 16 bits, whatever their elements are. 8-bit ones may have a scale for each key: those of a
// stage, 16 of K and 16 of V, come by cp.async too.
#pragma once
#include "jitgen/decode_tile.cuh"
#include "jitgen/divisor.cuh"
#include "jitgen/plan.cuh"

namespace jg {

// What the host decides for a launch. First, and together, what is read before the first copy: each line of 64 bytes of the
// parameters costs the start of the kernel a miss.
struct DecodeSetup {
  const void* plan;
  const int* pages;           // as in Args
  const int* kv_start;
  int page_list_stride, head_list_stride, batch;
  PlanShape shape;
  Divisor page_size;          // keys; 1 when ragged
  Divisor group_size;         // query heads of a key head
  int heads, kv_warps;        // key heads of a CTA, and warps that share the keys of each
  int tensor_copies;          // 1: by the copy engine
  int evict_first;            // 1: K and V are more than L2 holds
  int slot_scales;            // 1: each key has scales
  Operand keys, values;       // tensor maps, for the copy engine
};

// The units of a share, one after the other.
struct UnitCursor {
  PlanTile tile;
  int number, group, unit, units;   // number: of the tile
  unsigned line;                    // place of the unit

  JITGEN_FN UnitCursor(const Share& share, const PlanShape& shape)
      : tile(share.first), number(share.tile), group(share.group), unit(share.unit), line(share.line) {
    units = units_of({tile.begin, tile.end}, shape.unit_keys);
  }
  JITGEN_FN bool ends_item() const { return unit + 1 == units; }
  // Whether the unit after this one is of another share.
  JITGEN_FN bool ends_share(const PlanShape& shape, unsigned end) const {
    return line + 1 + (ends_item() ? shape.fixed_cost : 0) >= end;
  }
  // To the next unit; not past the end of the share.
  JITGEN_FN void advance(const void* plan, const PlanShape& shape) {
    const bool item_ends = ends_item();
    line += 1 + (item_ends ? shape.fixed_cost : 0);
    ++unit;
    if (!item_ends) return;
    const int before = number;
    unit = 0;
    next_item(tile, shape.groups, number, group);
    if (number == before) return;
    tile = plan_tiles_of(plan, shape.shares)[number];
    units = units_of({tile.begin, tile.end}, shape.unit_keys);
  }
  // First key of the part of the unit that warp `slice` of a head takes.
  template <bool kReverse> JITGEN_FN int first_key(const PlanShape& shape, int slice) const {
    return first_unit_key(tile.begin) + (kReverse ? units - 1 - unit : unit) * shape.unit_keys + slice * kUnitKeys;
  }
};

// The same keys of a piece, divided so that each warp of a head takes a run of them: for states that are joined in the order of
// visits. At each unit of the plan a warp is at a unit of 16 keys of its own run.
struct PieceRuns {
  int first, units;   // of the piece, on the plan's line

  JITGEN_FN PieceRuns(const UnitCursor& at, unsigned end)   // at the first unit of a piece
      : first(at.unit), units(min(at.units - at.unit, static_cast<int>(end - at.line))) {}
  template <bool kReverse> JITGEN_FN int first_key(const UnitCursor& at, const PlanShape& shape, int slice) const {
    const int warps = shape.unit_keys / kUnitKeys, place = first * warps + slice * units + at.unit - first;   // in order of visits
    return first_unit_key(at.tile.begin) + (kReverse ? at.units * warps - 1 - place : place) * kUnitKeys;
  }
};

// Where the key of a lane is; the copy engine needs that of the unit's first key. page < 0: not to be read; head < 0: no unit.
struct KeyPlace { int page, row, head; };

constexpr unsigned kScaleBytes = 2 * kUnitKeys * 4;   // of a stage

// kKeyCols and kValueCols: 16-bit columns of a row; kBytes: of an element.
template <int kKeyCols, int kValueCols, int kBytes, int kStages, bool kTensorCopies> struct UnitLoader {
  static constexpr unsigned kKeyBytes = kUnitKeys * kKeyCols * 2;
  static constexpr unsigned kStageBytes = kKeyBytes + kUnitKeys * kValueCols * 2;

  unsigned ring, barriers, scales;   // of this warp; scales: only of 8-bit elements
  int lane;
  unsigned long long policy;
  const float* own_scales;           // those that this lane copies: of K in lanes 0 to 15, of V in the others; null: all 1
  int scale_stride_s, scale_stride_h;
  unsigned slots;                    // of the cache

  template <class Args>
  JITGEN_FN UnitLoader(unsigned ring, unsigned barriers, unsigned scales, int lane, const DecodeSetup& setup, const Args& args)
      : ring(ring), barriers(barriers), scales(scales), lane(lane) {
    policy = setup.evict_first ? policy_evict_first() : policy_evict_normal();
    if constexpr (kBytes == 1) {
      own_scales = lane < 16 ? args.k_scale : args.v_scale;
      scale_stride_s = static_cast<int>(lane < 16 ? args.k_scale_stride_s : args.v_scale_stride_s);
      scale_stride_h = static_cast<int>(lane < 16 ? args.k_scale_stride_h : args.v_scale_stride_h);
      slots = static_cast<unsigned>(args.num_pages) * setup.page_size.value;
    }
    if (lane == 0) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) barrier_init(barriers + 8 * stage, arrivals(setup));
      if constexpr (kTensorCopies) {
        barrier_init_fence();
        prefetch_tensor_map(setup.keys);
        prefetch_tensor_map(setup.values);
      }
    }
    __syncwarp();
  }
  static JITGEN_FN bool by_engine(const DecodeSetup& setup) { return kTensorCopies && setup.tensor_copies; }
  static JITGEN_FN bool has_slot_scales(const DecodeSetup& setup) { return kBytes == 1 && setup.slot_scales; }
  static JITGEN_FN int arrivals(const DecodeSetup& setup) {
    return by_engine(setup) ? 1 + (has_slot_scales(setup) ? 32 : 0) : 32;
  }

  // Reads the page number, which is waited for where the place is used: a unit later.
  JITGEN_FN KeyPlace find(const DecodeSetup& setup, const PlanTile& tile, int first, int kv_first, int head) const {
    const bool whole = by_engine(setup);
    const int key = whole ? first : first + (lane & 15);
    const bool valid = key < tile.end && (whole || key >= tile.begin);
    KeyPlace place = {-1, 0, head};
    if (setup.pages) {
      const int index = setup.page_size.divide(key);
      place.row = key - index * static_cast<int>(setup.page_size.value);
      if (valid) place.page = __ldg(setup.pages + kv_first + head * setup.head_list_stride + index);
    } else {
      place.row = kv_first + key;
      if (valid) place.page = 0;
    }
    return place;
  }
  template <class Args>
  JITGEN_FN void start(const Args& args, const DecodeSetup& setup, int stage, const KeyPlace& place) const {
    const unsigned to = ring + stage * kStageBytes, barrier = barriers + 8 * stage;
    if constexpr (kTensorCopies) {
      if (setup.tensor_copies) {
        if (lane == 0) {
          barrier_expect(barrier, place.page >= 0 ? kStageBytes : 0);
          if (place.page >= 0 && setup.evict_first) {
            tensor_load(to, setup.keys, barrier, place.row, place.head, place.page, policy);
            tensor_load(to + kKeyBytes, setup.values, barrier, place.row, place.head, place.page, policy);
          } else if (place.page >= 0) {   // to say that it is to be kept as usual would cost 8 requests of 4k keys 7 % on an H200
            tensor_load(to, setup.keys, barrier, place.row, place.head, place.page);
            tensor_load(to + kKeyBytes, setup.values, barrier, place.row, place.head, place.page);
          }
        }
        if (has_slot_scales(setup)) {
          copy_scales(setup, stage, {place.page, place.row + (lane & 15), place.head});
          barrier_arrive_on_copies(barrier);
        }
        return;
      }
    }
    // A number outside of the cache is not followed: the key reads as zeros.
    const int bound = static_cast<int>(args.num_pages);
    const bool valid = place.page >= 0 && (setup.pages ? place.page : place.row) < bound;
    const long long k_at = valid ? place.page * (args.k_stride_p * kBytes) + place.row * (args.k_stride_s * kBytes) : -1;
    const long long v_at = valid ? place.page * (args.v_stride_p * kBytes) + place.row * (args.v_stride_s * kBytes) : -1;
    copy_rows<kKeyCols>(to, static_cast<const char*>(args.k) + place.head * (args.k_stride_h * kBytes), k_at);
    copy_rows<kValueCols>(to + kKeyBytes, static_cast<const char*>(args.v) + place.head * (args.v_stride_h * kBytes), v_at);
    if (has_slot_scales(setup)) copy_scales(setup, stage, place);
    barrier_arrive_on_copies(barrier);
  }
  // Scales of the keys of a unit, of which this lane's is at `place`.
  JITGEN_FN void copy_scales(const DecodeSetup& setup, int stage, const KeyPlace& place) const {
    const unsigned to = scales + stage * kScaleBytes + lane * 4;
    if (!own_scales) {
      store_shared_float(to, 1.0f);
      return;
    }
    const unsigned slot = place.page * setup.page_size.value + place.row;
    const bool valid = place.page >= 0 && slot < slots;
    cp_async_4(to, own_scales + place.head * scale_stride_h + static_cast<long long>(valid ? slot : 0) * scale_stride_s, valid);
  }
  // The 16 rows of a tile, `at` bytes behind the base; lane i has that of row i, negative for one that reads as zeros.
  template <int kCols> JITGEN_FN void copy_rows(unsigned to, const char* base, long long at) const {
    using Tile = SpanTile<kCols>;
    constexpr int kChunks = kCols / 8, kRows = 32 / kChunks;   // rows that the warp copies at a time
    if constexpr (32 % kChunks == 0) {
      // Through a shuffle, so that it is one register: of a sum of a register and a uniform one ptxas 13.0 makes a copy that
      // is an illegal instruction (LDGSTS [R + UR], seen for head_dim 256).
      const unsigned own = __shfl_sync(0xffffffffu, to + Tile::chunk_offset(lane / kChunks, lane % kChunks, kUnitKeys), lane);
      const char* const chunk = base + lane % kChunks * 16;
#pragma unroll
      for (int row = 0; row < kUnitKeys; row += kRows) {   // whose swizzle differs from that of the first rows by constant bits
        const long long row_at = __shfl_sync(0xffffffffu, at, row + lane / kChunks);
        cp_async_16((own + row * Tile::kSpanBytes) ^ (row & 7) * 16, chunk + (row_at >= 0 ? row_at : 0), row_at >= 0, policy);
      }
    } else {
#pragma unroll
      for (int i = lane; i < kUnitKeys * kChunks; i += 32) {
        const long long row_at = __shfl_sync(0xffffffffu, at, i / kChunks);
        const char* const from = base + (row_at >= 0 ? row_at : 0) + i % kChunks * 16;
        cp_async_16(to + Tile::chunk_offset(i / kChunks, i % kChunks, kUnitKeys), from, row_at >= 0, policy);
      }
    }
  }
  JITGEN_FN void wait(int stage, unsigned parity) const {
    if constexpr (kTensorCopies) barrier_wait(barriers + 8 * stage, parity);
    else barrier_poll(barriers + 8 * stage, parity);
  }
};

}  // namespace jg
