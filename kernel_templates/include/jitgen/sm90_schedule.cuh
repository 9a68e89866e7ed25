// Who does what and when: query tiles handed out to CTAs, and the KV tiles a query tile visits.
#pragma once
#include "jitgen/divisor.cuh"
#include "jitgen/sm90_ptx.cuh"

namespace jg {

// ---- query tiles ----
// Heads are taken in sections whose K and V stay in L2; inside a section all heads of the last query tile come first, as it
// is the longest under a causal mask. CTAs take tiles as they finish others: 2 to 12 % faster than a fixed assignment.
// Tiles end with the last row, so the one with rows missing is the first: it is the shortest under a causal mask, the last
// one would be the longest (7 % of hd128 causal 4k, where 4096 rows are 21 tiles of 192 and a third).
// Under a causal mask the first query tiles of all heads come late: they are the shortest, and CTAs finish together (H100, hd128,
// against sections alone: 4k causal and windows 2 %, documents 6 % faster; 16k windows 1 %, causal 1 to 4 %, documents 11 %; 1k
// 0 to 2 %). Only as many as have their keys in L2 together, and none where tiles are alike: their keys are all (1k: 17 % slower).
struct Schedule {
  int num_query_tiles, num_tiles, num_heads, section;   // num_heads: over the whole batch
  int absent_rows;                                      // of tile 0, before the first row
  int counter;                                          // index of the tile counter, -1: none
  int num_late;                                         // first query tiles of a head that are left for the end; after mix_tiles, short
};
struct QueryTile { int tile, head, batch; };

// 16 MiB of K and V per section: within 3 % of the best section on an H100 (50 MB L2) for lengths 1k to 16k.
constexpr long long kSectionBytes = 16ll << 20;
// K and V of late tiles, which all SMs read at the same time.
constexpr long long kLateBytes = 26ll << 20;

// Query heads (counted over the whole batch) per section: whole groups, and a divisor of num_heads.
inline int section_heads(long long kv_head_bytes, long long num_heads, long long group_size) {
  long long kv_heads = 1;
  while (kv_heads * 2 * kv_head_bytes <= kSectionBytes && num_heads % (kv_heads * 2 * group_size) == 0) kv_heads *= 2;
  return static_cast<int>(kv_heads * group_size);
}
// How many query tiles of each head come late: two for each SM, unless their keys are too many.
inline long long num_late_tiles(long long num_query_tiles, long long num_heads, long long key_bytes, int num_sms) {
  long long count = (2ll * num_sms + num_heads / 2) / num_heads;
  if (count * key_bytes > kLateBytes) count = kLateBytes / key_bytes;
  return count < num_query_tiles ? count : num_query_tiles;
}
// `num_heads`: over the whole batch; `row_bytes`: of K and V for one key.
inline Schedule make_schedule(long long q_len, long long kv_len, long long tile_q, long long row_bytes, long long num_heads,
                              long long group_size, bool is_causal, int counter, int num_sms) {
  const long long num_query_tiles = (q_len + tile_q - 1) / tile_q, key_bytes = num_heads / group_size * tile_q * row_bytes;
  const long long num_late = is_causal ? num_late_tiles(num_query_tiles, num_heads, key_bytes, num_sms) : 0;
  return {static_cast<int>(num_query_tiles), static_cast<int>(num_query_tiles * num_heads), static_cast<int>(num_heads),
          section_heads(kv_len * row_bytes, num_heads, group_size), static_cast<int>(num_query_tiles * tile_q - q_len), counter,
          static_cast<int>(num_late)};
}

// What the host works out of it: a division takes thirty instructions, which no cache holds when a launch begins (H100, 16 x 1k:
// ALiBi, distances and a bias per key 2 to 3 % faster, 8 bits 1.5 to 3.5 %). early_tiles: the query tiles of a section that are not
// late; num_q_heads: or the requests, where those of a head come one after the other; group: query heads of a KV head.
struct Divisors { Divisor section, early_tiles, num_late, num_heads, num_q_heads, group; };
inline Divisors make_divisors(const Schedule& schedule, long long num_q_heads, long long group_size) {
  const auto make = [](long long value) { return make_divisor(static_cast<unsigned>(value > 0 ? value : 1)); };
  return {make(schedule.section), make((schedule.num_query_tiles - schedule.num_late) * schedule.section), make(schedule.num_late),
          make(schedule.num_heads), make(num_q_heads), make(group_size)};
}
// kMixes: late tiles are short and come head by head, as all have the same keys and SMs read those of a head together.
template <bool kMixes> JITGEN_FN QueryTile query_tile_at(int index, const Schedule& schedule, const Divisors& by) {
  const int num_early = (schedule.num_query_tiles - schedule.num_late) * schedule.num_heads;
  int tile, head;
  if (index < num_early) {
    const int section = by.early_tiles.divide(index), inside = index - section * static_cast<int>(by.early_tiles.value);
    const int down = by.section.divide(inside);
    tile = schedule.num_query_tiles - 1 - down, head = section * schedule.section + inside - down * schedule.section;
  } else if (kMixes) {
    const int inside = index - num_early;
    head = by.num_late.divide(inside), tile = schedule.num_late - 1 - (inside - head * schedule.num_late);
  } else {
    const int inside = index - num_early, down = by.num_heads.divide(inside);
    tile = schedule.num_late - 1 - down, head = inside - down * schedule.num_heads;
  }
  const int batch = by.num_q_heads.divide(head);
  return {tile, head - batch * static_cast<int>(by.num_q_heads.value), batch};
}

// ---- query tiles of two sizes ----
// The last tiles of a launch keep few SMs busy: 1408 tiles that take as long are 11 for 88 of 132 SMs, and 10 for the others. So the
// first tiles of a head, which come late, may be short: without the first of three warp groups. One takes 3/4 of the time of a whole
// tile (1.5 us in place of 2.0 for a KV tile, hd128 on an H100); with one group alone it is taken for half.
constexpr int kGroupRows = 64, kWholeCost = 4, kShortCost = 3, kSingleCost = 2;
constexpr int kMostShort = 32, kMostRounds = 32;   // short tiles of a head; tiles of an SM, from where on one is too little to gain

// When the last of num_sms SMs is done with whole tiles and then with others.
inline long long end_of_tiles(long long num_whole, long long num_others, int cost, long long num_sms) {
  const long long ahead = num_whole % num_sms, behind = num_sms - ahead;   // SMs with a whole tile more than the others
  long long early = num_whole / num_sms * kWholeCost, late = early + kWholeCost, end = ahead ? late : early;
  while (num_others > 0) {
    const bool takes_early = early <= late || ahead == 0;
    long long& free = takes_early ? early : late;
    free += cost, num_others -= takes_early ? behind : ahead;
    if (free > end) end = free;
  }
  return end;
}
// How many tiles of a head are to be short for the launch to end first. Up to two microseconds.
inline int best_num_short(const Schedule& schedule, long long q_len, int tile_q, int num_sms) {
  if (schedule.num_tiles > kMostRounds * num_sms) return 0;
  const long long num_heads = schedule.num_heads, short_rows = tile_q - kGroupRows;
  const int first_groups = (tile_q - schedule.absent_rows + kGroupRows - 1) / kGroupRows;
  const int first_cost = first_groups == 1 ? kSingleCost : first_groups == 2 ? kShortCost : kWholeCost;
  long long best = end_of_tiles(num_heads * (schedule.num_query_tiles - 1), num_heads, first_cost, num_sms);
  int num_short = 0;
  for (int count = 1; count <= kMostShort && count * short_rows + tile_q <= q_len; ++count) {
    const long long num_whole = (q_len - count * short_rows + tile_q - 1) / tile_q;
    if (count * short_rows + num_whole * tile_q - q_len >= kGroupRows) continue;   // a group of the first tile would have no row
    const long long end = end_of_tiles(num_whole * num_heads, count * num_heads, kShortCost, num_sms);
    if (end < best) best = end, num_short = count;
  }
  return num_short;
}
// Static: what it remembers is this module's own (see sm90_host.cuh).
static inline void mix_tiles(Schedule& schedule, long long q_len, int tile_q, int num_sms) {
  static thread_local long long known[3] = {-1, -1, -1};   // of the launch before: those of a model are mostly alike
  static thread_local int num_short;
  if (known[0] != q_len || known[1] != schedule.num_heads || known[2] != num_sms) {
    num_short = best_num_short(schedule, q_len, tile_q, num_sms);
    known[0] = q_len, known[1] = schedule.num_heads, known[2] = num_sms;
  }
  if (num_short == 0) return;
  const long long short_rows = static_cast<long long>(num_short) * (tile_q - kGroupRows), num_whole = (q_len - short_rows + tile_q - 1) / tile_q;
  schedule.num_query_tiles = static_cast<int>(num_whole) + num_short, schedule.num_late = num_short;
  schedule.num_tiles = schedule.num_query_tiles * schedule.num_heads;
  schedule.absent_rows = static_cast<int>(short_rows + num_whole * tile_q - q_len);
}
// First row of a tile; a short one begins with the rows of a group that it does not have. kMixes: there may be short ones.
template <bool kMixes> JITGEN_FN int first_row_of(int tile, const Schedule& schedule, int tile_q) {
  const int groups_before = !kMixes ? 0 : tile < schedule.num_late ? tile + 1 : schedule.num_late;   // that are missing
  return tile * tile_q - groups_before * kGroupRows - schedule.absent_rows;
}
// The first group that has rows.
template <bool kMixes> JITGEN_FN int first_group_of(int tile, int first_row, const Schedule& schedule) {
  return kMixes && tile < schedule.num_late ? 1 : max(-first_row, 0) / kGroupRows;
}

// Messages from the producer to the consumers: {first row, head, batch, kind}.
constexpr int kWorkStop = -1, kWorkEmpty = 0, kWorkTile = 1;   // kWorkEmpty: no visible key, write O = 0 and LSE = -inf
constexpr int kShortTile = 4;   // with either: the first group has no rows
template <bool kMixes> JITGEN_FN int short_flag(int tile, const Schedule& schedule) { return kMixes && tile < schedule.num_late ? kShortTile : 0; }
template <bool kMixes> JITGEN_FN bool has_keys(int kind) { return kMixes ? kind & kWorkTile : kind != kWorkEmpty; }
// First row of a group; far in front of all rows where the tile has none for it.
template <bool kMixes> JITGEN_FN int group_row_of(const int4& work, int group) {
  return work.x + group * kGroupRows - (kMixes && group == 0 && (work.w & kShortTile) ? 1 << 30 : 0);
}

// What a stage holds, in one word: the visiting position of its KV tile above kStepShift; for each warp group what the tile
// is to its 64 rows (two bits from 2 * group: kTileNone, kTilePartial, kTileFull), and whether the next tile is nothing to
// it (a bit from kNextAt + group; set too when there is no next one); whether this tile is the last.
constexpr int kNextAt = 8, kStepLast = 1 << 12, kStepShift = 13;
JITGEN_FN int kind_of(int step, int group) { return step >> 2 * group & 3; }
JITGEN_FN bool is_next_skipped(int step, int group) { return step >> (kNextAt + group) & 1; }
// The bits of the groups to which the tile with these kinds is nothing.
JITGEN_FN int skipped_groups(int kinds) {
  const int seen = kinds | kinds >> 1;
  return ~(seen & 1 | seen >> 1 & 2 | seen >> 2 & 4 | seen >> 3 & 8) & 15;
}

// Where halves of a tile are told apart (VisibleHalves) there are three groups. A bit from kHalfAt + group says that the rows see only
// one half of the columns: the second if the kind is kTileFull, else the first. Half a tile is masked in any case, and is a run of its
// own: in place of the bits from kNextAt there is one from kRunEndAt + group, which says that this tile ends a run.
constexpr int kHalfAt = 6, kRunEndAt = 9;
JITGEN_FN bool is_half(int step, int group) { return step >> (kHalfAt + group) & 1; }
JITGEN_FN bool is_run_end(int step, int group) { return step >> (kRunEndAt + group) & 1; }
// Of the tile with these kinds, before one with those of `next`.
JITGEN_FN int run_ends(int kinds, int next) { return ((kinds | next) >> kHalfAt | skipped_groups(next)) & 7; }

// ---- visible KV tiles of one query tile ----
// Walks them in visiting order; all lanes of the producer warp call together. Each lane classifies one tile, after a first
// look at groups of 32 tiles at once: 131072 keys per look with 128-key tiles, so a window far inside a long context
// costs no scan. span(first, count) is the mask's span of the rows of `count` warp groups, and is asked by all lanes for
// the same; classify(span, first, last) judges the tiles at visiting positions first to last as one.
template <int kGroups, bool kPerGroup, class SpanOf, class Classify> struct VisibleTiles {
  SpanOf span;
  Classify classify;
  int num_tiles, first_group, end_group;   // warp groups before first_group, and from end_group on, have no row
  int look, base;                      // look: position of the next look; base: of the current group
  unsigned groups, tiles;              // bits not yet visited
  int kinds;                           // of the tile of this lane, for each warp group

  JITGEN_FN VisibleTiles(int num_tiles, int first_group, SpanOf span, Classify classify, int end_group = kGroups)
      : span(span), classify(classify), num_tiles(num_tiles), first_group(first_group), end_group(end_group), look(0), base(0),
        groups(0), tiles(0), kinds(0) {}
  // Position and kinds of the next visible tile, or -1 after the last.
  JITGEN_FN int next() {
    const int lane = threadIdx.x & 31;
    while (tiles == 0) {
      while (groups == 0) {
        if (look >= num_tiles) return -1;
        const int first = look + 32 * lane;
        look += 1024;
        groups = 1;
        if (num_tiles <= 32) break;   // nothing to skip
        const auto rows = span(0, end_group);
        groups = __ballot_sync(0xffffffffu, first < num_tiles && classify(rows, first, min(first + 31, num_tiles - 1)) != kTileNone);
      }
      base = look - 1024 + 32 * (__ffs(groups) - 1);
      groups &= groups - 1;
      const int mine = base + lane;
      kinds = 0;
#pragma unroll 1
      for (int group = kPerGroup ? first_group : 0; group < (kPerGroup ? end_group : 1); ++group) {
        const auto rows = span(group, kPerGroup ? 1 : end_group);
        kinds |= (mine < num_tiles ? classify(rows, mine, mine) : kTileNone) << 2 * group;
      }
      if (!kPerGroup) kinds *= 0x55 << 2 * first_group & (1 << 2 * end_group) - 1;   // the same for every group
      tiles = __ballot_sync(0xffffffffu, kinds != 0);
    }
    const int bit = __ffs(tiles) - 1;
    tiles &= tiles - 1;
    return (base + bit) << kStepShift | __shfl_sync(0xffffffffu, kinds, bit);
  }
};

// What VisibleHalves and VisibleHalvesInOne know of the tiles of a query tile. It begins without a tile.
struct HalvesSeen {
  int num_tiles = 0, first_group = 0, look = 0, base = 0;   // as in VisibleTiles
  unsigned groups = 0, tiles = 0, full = 0;                 // full: of the tiles not yet visited, or of others
  unsigned close = 0, seen = 0, whole = 0, kept = 0;        // tiles looked at closely; their halves: some seen, all, none hidden by tensors

  // Begins a query tile: the functions that judge tiles are of this one from now on.
  JITGEN_FN void restart(int tiles_of_kv, int first) {
    num_tiles = tiles_of_kv, first_group = first;
    look = 0, groups = tiles = 0;
  }
  static JITGEN_FN int spread(unsigned bits) { return bits & 1 | bits << 1 & 4 | bits << 2 & 16; }   // to every other bit
  JITGEN_FN int full_kinds() const { return 0x2a >> 2 * first_group << 2 * first_group; }   // kTileFull to each group
  // Of a tile that was looked at closely.
  JITGEN_FN int kinds_of(unsigned tile) const {
    const int at = 6 * __popc(close & (tile - 1));
    const unsigned first = seen >> at & 7, second = seen >> at + 3 & 7, all = whole >> at & whole >> at + 3;
    const unsigned untouched = (kept >> at | ~first) & (kept >> at + 3 | ~second) & (first | second);   // by tensors
    return spread(first & ~all) | spread(untouched | (second & ~first)) << 1 | static_cast<int>(first ^ second) << kHalfAt;
  }
  // The next five tiles that are neither nothing nor full to all rows are those looked at closely: lane / 6 has the i-th, or none.
  JITGEN_FN unsigned pick_close(int lane) {
    unsigned rest = tiles & ~full, mine = 0;
    close = 0;
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      const unsigned lowest = rest & -rest;
      if (lane / 6 == i) mine = lowest;
      close |= lowest;
      rest ^= lowest;
    }
    return mine;
  }
};

// The same for three groups, with the halves of tiles told apart. Lanes look at tiles for all rows first; at those that are neither
// nothing nor full the lanes look again, five tiles together, for each group and half. span and classify as above; classify_half(span,
// position, half) judges half a tile.
template <int kGroups, class SpanOf, class Classify, class ClassifyHalf> struct VisibleHalves : HalvesSeen {
  static_assert(kGroups == 3, "a word has room for three groups");
  SpanOf span;
  Classify classify;
  ClassifyHalf classify_half;
  int end_group;   // groups from it on have no row

  JITGEN_FN VisibleHalves(SpanOf span, Classify classify, ClassifyHalf classify_half, int end_group)
      : span(span), classify(classify), classify_half(classify_half), end_group(end_group) {}
  // At the next five tiles that are neither nothing nor full to all rows: lane 6 i + 3 half + group at a half of the i-th.
  JITGEN_FN void look_closely(int lane) {
    const unsigned mine = pick_close(lane);
    const int group = lane % 3, half = lane / 3 % 2;
    int kind = kTileNone;
    if (mine != 0 && group >= first_group && group < end_group) kind = classify_half(span(group, 1), base + __ffs(mine) - 1, half);
    seen = __ballot_sync(0xffffffffu, kind != kTileNone);
    whole = __ballot_sync(0xffffffffu, kind == kTileFull);
    kept = __ballot_sync(0xffffffffu, kind & 2);
  }
  JITGEN_FN int next() {
    const int lane = threadIdx.x & 31;
    for (;;) {
      while (tiles == 0) {
        while (groups == 0) {
          if (look >= num_tiles) return -1;
          const int first = look + 32 * lane;
          look += 1024;
          groups = 1;
          if (num_tiles <= 32) break;   // nothing to skip
          groups = __ballot_sync(0xffffffffu, first < num_tiles && classify(span(0, end_group), first, min(first + 31, num_tiles - 1)) != kTileNone);
        }
        base = look - 1024 + 32 * (__ffs(groups) - 1);
        groups &= groups - 1;
        const int mine = base + lane, kind = mine < num_tiles ? classify(span(0, end_group), mine, mine) : kTileNone;
        tiles = __ballot_sync(0xffffffffu, kind != kTileNone);
        full = __ballot_sync(0xffffffffu, kind == kTileFull);
        close = 0;
      }
      const unsigned lowest = tiles & -tiles;
      int kinds = full_kinds() & (1 << 2 * end_group) - 1;
      if (!(full & lowest)) {
        if (!(close & lowest)) look_closely(lane);
        kinds = kinds_of(lowest);
      }
      const int position = base + __ffs(lowest) - 1;
      tiles ^= lowest;
      if (kinds != 0) return position << kStepShift | kinds;
    }
  }
};

// The same with one function and one piece of code for all looks, which take fewer instructions: no cache holds them when a launch
// begins. judge(first_group, count, first, last, half): what the rows of `count` groups see of the tiles at visiting positions first to
// last, or of half of one where `half` is not negative.
template <int kGroups, class Judge> struct VisibleHalvesInOne : HalvesSeen {
  static_assert(kGroups == 3, "a word has room for three groups");
  Judge judge;

  JITGEN_FN explicit VisibleHalvesInOne(Judge judge) : judge(judge) {}
  JITGEN_FN int next() {
#pragma unroll 1
    for (;;) {
      const unsigned lowest = tiles & -tiles;
      if (lowest & (full | close)) {
        const int position = base + __ffs(lowest) - 1, kinds = full & lowest ? full_kinds() : kinds_of(lowest);
        tiles ^= lowest;
        if (kinds != 0) return position << kStepShift | kinds;
      } else if (!look_further()) {
        return -1;
      }
    }
  }

 private:
  // At groups of tiles, at the tiles of a group, or closely at tiles. False after the last.
  JITGEN_FN bool look_further() {
    const int lane = threadIdx.x & 31;
    int first, last, group = 0, count = kGroups, half = -1;
    const int depth = tiles != 0 ? 2 : groups != 0 ? 1 : 0;
    if (depth == 0) {
      if (look >= num_tiles) return false;
      first = look + 32 * lane, last = min(first + 31, num_tiles - 1);
      look += 1024;
      if (num_tiles <= 32) {   // nothing to skip
        groups = 1;
        return true;
      }
    } else if (depth == 1) {
      base = look - 1024 + 32 * (__ffs(groups) - 1);
      groups &= groups - 1;
      first = last = base + lane;
    } else {   // lane 6 i + 3 half + group at a half of the i-th of the next five that are neither nothing nor full
      const unsigned mine = pick_close(lane);
      group = lane % 3, count = 1, half = lane / 3 % 2;
      first = last = mine != 0 && group >= first_group ? base + __ffs(mine) - 1 : num_tiles;
    }
    const int kind = first < num_tiles ? judge(group, count, first, last, half) : kTileNone;
    const unsigned some = __ballot_sync(0xffffffffu, kind != kTileNone), all = __ballot_sync(0xffffffffu, kind == kTileFull);
    if (depth == 0) {
      groups = some;
    } else if (depth == 1) {
      tiles = some, full = all, close = 0;
    } else {
      seen = some, whole = all;
      kept = __ballot_sync(0xffffffffu, kind & 2);
    }
    return true;
  }
};

// Without a mask every tile is visited.
struct AllPositions {
  int num_tiles, taken;
  JITGEN_FN explicit AllPositions(int num_tiles) : num_tiles(num_tiles), taken(0) {}
  JITGEN_FN int next() { return taken < num_tiles ? taken++ << kStepShift : -1; }
};

}  // namespace jg
