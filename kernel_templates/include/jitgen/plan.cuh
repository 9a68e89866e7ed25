// The planner: lengths of a batch on the device -> what each CTA of a serving kernel works on. One CTA, no host copy.
//
// A request with q_len rows has q_len * pack packed rows in each of `groups` head groups; packed row r is query r / pack.
// They are cut into tiles of tile_rows. A tile in one group is an item; its visible keys [begin, end) are visited in units of
// unit_keys. All items in the order request, group, tile form a line on which an item takes fixed_cost + units places:
//
//     places of an item:   fixed_cost | unit 0 | unit 1 | ... | unit n - 1        n = max(1, units that cover [begin, end))
//
// Share c of the line begins at the first unit at or behind place c * length / shares, so a share is a run of units that may
// begin and end inside items. Where the cuts are taken as they fall (least_piece <= 1), the share of any place is known in
// closed form (`share_of`), and so are all pieces of an item.
//
// A kernel may give its items out instead, to CTAs as they ask: groups one after the other, tiles of a group from the last to
// the first, so that CTAs of a moment read the same keys. The last groups, that are worth 3/2 of the longest item for each CTA,
// are given out together, the longest tiles first; and of these items those that no CTA could end with in time in up to
// kTailPieces pieces. So all CTAs end nearly together. (Everything by its length would be worse: CTAs that are always at items
// of one length end up to one of the shortest apart.)
//
// Plan buffer, for S shares asked for (any number; a kernel runs one or several in a CTA):
//
//     offset 0                       PlanHeader
//     kPlanShares                    Share[S + 1]     where each share begins; [c + 1] is the end of share c
//     kPlanShares + 80 (S + 1)       PlanTile[]       all tiles, by request and rows: at most plan_tiles(...) of them
//
// Units. Positions on the line are 32 bits: units of a batch times groups must stay below 2^31.
#pragma once

#ifdef __CUDACC__
#define JITGEN_PLAN_FN __host__ __device__ __forceinline__
#else
#define JITGEN_PLAN_FN inline
#endif

namespace jg {

// What a kernel asks of its planner. A request belongs to the kernel if least_rows <= q_len * class_pack <= most_rows.
struct PlanShape {
  int tile_rows;      // packed rows of a tile
  int unit_keys;      // keys of a unit
  int pack;           // packed rows of a query
  int groups;         // head groups
  int class_pack;     // num_q_heads / num_kv_heads: classes count rows packed by kv head
  int least_rows, most_rows;
  int least_keys;     // 1: a request without keys has no tile, as nobody reads its results; 0: its rows are written
  int fixed_cost;     // of an item, in units
  int least_piece;    // units: a cut that would leave less of an item on one side moves to the nearer end of the item
  int whole_items;    // equal items of at most so many units are taken whole where that leaves few CTAs idle: memory is the limit
  int many_items;     // a kernel gives items out that must not be cut, and others from so many items a share on; 0: none
  int shares;
  // Where another kernel attends the requests outside of the class at the same time, shares are left to it:
  int beside_key, beside_row;   // what a key of such a request costs, and more for each packed row, in 2^-20 of a unit; or 0
  int least_shares;             // that stay
};
constexpr int kTailPieces = 4;
constexpr int kNotForMany = 0x7fffffff;   // as many_items: only items that must not be cut are given out
constexpr int kNeverCut = 0x7fffffff;   // as least_piece: items stay whole

struct alignas(16) PlanHeader {
  int tiles;          // in the table
  int shares;         // that have a part of the line; the others are empty
  unsigned length;    // of the line
  // of a kernel that gives out items
  int taken, done;    // 0 between launches
  int whole_groups;   // given out one after the other
  int tail_groups;    // given out together behind them; 0: the kernel has shares
  unsigned places;    // of a group
  int least_units;    // of a piece of an item
  int pieces;         // of a group, without tiles in one piece; more than there is room for are not cut
  int reserved[6];
};
struct alignas(16) PlanTile {
  int request, q_start, q_len, kv_len;
  int index, count;   // of this tile among those of its request: the first is tile number - index
  int begin, end;     // visible keys; begin == end: none
  unsigned line;      // places before this tile, in one group
  // of a kernel that gives out items, of place i in the order of the last groups, i the number of this tile:
  int at;             // the tile there
  int at_pieces;      // pieces it is given out in
  int pieces;         // pieces before it, in one group, without tiles in one piece
};
struct alignas(16) Share {
  int tile, group, unit;   // where it begins; past the last share tile is PlanHeader::tiles
  unsigned line;           // place of that unit
  PlanTile first;          // copy of the tile
  unsigned length;         // copies of the header
  int shares;
  int reserved[2];
};
constexpr int kPlanShares = 64;
static_assert(sizeof(PlanHeader) == kPlanShares && sizeof(PlanTile) == 48 && sizeof(Share) == 80, "layout of the plan buffer");

struct KeyRange { int begin, end; };

// ---- sizes ----
JITGEN_PLAN_FN long long plan_tiles(long long max_batch, long long max_tokens, const PlanShape& shape) {
  return max_batch + max_tokens * shape.pack / shape.tile_rows;
}
JITGEN_PLAN_FN long long plan_bytes(long long max_batch, long long max_tokens, const PlanShape& shape) {
  return kPlanShares + sizeof(Share) * (shape.shares + 1ll) + sizeof(PlanTile) * plan_tiles(max_batch, max_tokens, shape);
}

// ---- parts of the buffer ----
JITGEN_PLAN_FN const PlanHeader* plan_header(const void* plan) { return static_cast<const PlanHeader*>(plan); }
JITGEN_PLAN_FN const Share* plan_shares(const void* plan) {
  return reinterpret_cast<const Share*>(static_cast<const char*>(plan) + kPlanShares);
}
JITGEN_PLAN_FN const PlanTile* plan_tiles_of(const void* plan, int shares) {
  return reinterpret_cast<const PlanTile*>(plan_shares(plan) + shares + 1);
}

// ---- the line ----
JITGEN_PLAN_FN int tiles_of_request(int q_len, int kv_len, const PlanShape& shape) {
  const long long rows = static_cast<long long>(q_len) * shape.class_pack;
  if (q_len <= 0 || kv_len < shape.least_keys || rows < shape.least_rows || rows > shape.most_rows) return 0;
  return (q_len * shape.pack + shape.tile_rows - 1) / shape.tile_rows;
}
// Units begin at multiples of 16 keys, as boxes of pages do.
JITGEN_PLAN_FN int first_unit_key(int begin) { return begin & ~15; }
JITGEN_PLAN_FN int units_of(KeyRange keys, int unit_keys) {
  const int units = (keys.end - first_unit_key(keys.begin) + unit_keys - 1) / unit_keys;
  return units > 1 ? units : 1;
}
JITGEN_PLAN_FN unsigned cut(unsigned share, unsigned length, unsigned shares) {
  return static_cast<unsigned>(static_cast<unsigned long long>(share) * length / shares);
}
// What a request outside of the class costs the other kernel, in 2^-20 of a unit of this one.
JITGEN_PLAN_FN unsigned long long work_beside(int q_len, int kv_len, const PlanShape& shape) {
  const unsigned long long rows = static_cast<unsigned long long>(q_len) * shape.class_pack;
  return q_len > 0 ? (shape.beside_key + rows * shape.beside_row) * kv_len : 0;
}
// Shares for a line beside other work, so that both end together.
JITGEN_PLAN_FN int shares_beside(const PlanShape& shape, unsigned length, unsigned long long work) {
  const int own = static_cast<int>(static_cast<unsigned long long>(shape.shares) * length / (length + (work >> 20) + 1));
  return work == 0 ? shape.shares : own > shape.least_shares ? own : shape.least_shares;
}
// Shares that have a part of the line, about `wanted`. Of equal items each gets the same number, or, where they may stay whole,
// each share the same number of them, at the price of up to one CTA in sixteen: tiles of a request then visit the same keys at
// the same time, and all but one find them in L2, and nothing is left to merge. Otherwise as few as leave the largest share as
// it is, so that cuts of equal items fall on their ends.
JITGEN_PLAN_FN int shares_in_use(const PlanShape& shape, int wanted, unsigned length, int items, bool is_even) {
  if (length == 0) return 0;
  if (is_even && items > 0) {
    int even = (wanted + items / 2) / items * items;
    if (even > shape.shares) even -= items;
    if (even == 0 && shape.whole_items)
      for (even = wanted; items % even != 0 && 16 * even >= 15 * wanted; --even) {}
    if (16 * even >= 15 * wanted) return static_cast<unsigned>(even) < length ? even : static_cast<int>(length);
  }
  const unsigned largest = (length + wanted - 1) / wanted;
  return static_cast<int>((length + largest - 1) / largest);
}
constexpr int kShortItem = 16;   // units: a cut costs about as much
JITGEN_PLAN_FN bool is_better_even(const PlanShape& shape, int tiles_of_request, int cost) {
  return tiles_of_request > 1 || cost <= kShortItem || cost <= shape.whole_items;
}
// The share that place x falls in: the inverse of `cut`.
JITGEN_PLAN_FN unsigned share_of(unsigned x, unsigned length, unsigned shares) {
  return static_cast<unsigned>(((x + 1ull) * shares - 1) / length);
}
// Last i in [0, n) whose value is at most x; values ascend and the first is.
template <class At> JITGEN_PLAN_FN int last_at_most(int n, unsigned x, At at) {
  int low = 0, high = n;
  while (high - low > 1) {
    const int middle = (low + high) >> 1;
    (at(middle) <= x ? low : high) = middle;
  }
  return low;
}

// The part of the line before share c. `first_tile` and `first_line` are of requests, [batch + 1].
struct Line {
  const int* first_tile;
  const unsigned* first_line;
  const PlanTile* tiles;
  int batch, num_tiles;
};
JITGEN_PLAN_FN Share share_start(const Line& at, const PlanShape& shape, unsigned length, int shares, int c) {
  Share share = {};
  share.length = length, share.shares = shares;
  share.tile = at.num_tiles, share.line = length;
  if (c >= shares) return share;
  const unsigned groups = static_cast<unsigned>(shape.groups);
  unsigned x = cut(c, length, shares);
  const int b = last_at_most(at.batch, x, [&](int i) { return at.first_line[i] * groups; });
  const unsigned begin = at.first_line[b], places = at.first_line[b + 1] - begin;
  x -= begin * groups;
  share.group = static_cast<int>(x / places);
  x %= places;
  const int first = at.first_tile[b], count = at.first_tile[b + 1] - first;
  int tile = first + last_at_most(count, x + begin, [&](int i) { return at.tiles[first + i].line; });
  x -= at.tiles[tile].line - begin;
  const int units = units_of({at.tiles[tile].begin, at.tiles[tile].end}, shape.unit_keys);
  const int inside = static_cast<int>(x) - shape.fixed_cost;
  share.unit = inside > 0 ? inside : 0;
  if (share.unit < shape.least_piece || units - share.unit < shape.least_piece) {
    const bool next = share.unit * 2 > units;
    share.unit = 0;
    if (next) {
      const bool last_tile = tile + 1 == first + count, last_group = last_tile && share.group + 1 == shape.groups;
      tile = last_tile && !last_group ? first : tile + 1;
      share.group = last_group ? 0 : share.group + last_tile;
      if (tile == at.num_tiles) return share;   // the line ends here: group and unit are 0
    }
  }
  share.tile = tile;
  share.first = at.tiles[tile];
  // of the tile's request, which is not b if the cut moved on
  const int request = share.first.request;
  const unsigned request_line = at.first_line[request], request_places = at.first_line[request + 1] - request_line;
  const unsigned item_line = request_line * groups + share.group * request_places + (share.first.line - request_line);
  share.line = item_line + shape.fixed_cost + share.unit;
  return share;
}

// Item of a kernel that walks its share: the one after (tile, group).
JITGEN_PLAN_FN void next_item(const PlanTile& tile, int groups, int& number, int& group) {
  const bool last_tile = tile.index + 1 == tile.count, last_group = last_tile && group + 1 == groups;
  number += last_tile && !last_group ? -tile.index : 1;
  group = last_group ? 0 : group + last_tile;
}

// ---- items that are given out ----
JITGEN_PLAN_FN bool gives_out(long long items, const PlanShape& shape) {
  if (shape.many_items == 0 || items == 0) return false;
  return shape.least_piece == kNeverCut || items >= static_cast<long long>(shape.many_items) * shape.shares;
}
// Groups that are given out together: worth 3/2 of the longest item for each CTA.
JITGEN_PLAN_FN int tail_groups_of(unsigned places, int most_cost, const PlanShape& shape) {
  const unsigned long long worth = 3ull * shape.shares * most_cost, wanted = (worth + 2ull * places - 1) / (2ull * places);
  return wanted < static_cast<unsigned>(shape.groups) ? static_cast<int>(wanted) : shape.groups;
}
// Results of pieces that wait to be joined, at most.
JITGEN_PLAN_FN long long tail_slots(int shares) { return kTailPieces * static_cast<long long>(shares); }
// A piece is taken to cost four units more than its own: simulated schedules then rank as measured ones did. The fewer items
// there are, the more of them are cut.
JITGEN_PLAN_FN int least_units_of(long long items, const PlanShape& shape) {
  if (shape.least_piece == kNeverCut) return kNeverCut;
  return items >= 4ll * shape.shares ? 24 : 48;
}
// Pieces of a tile of `units` that is first given out after `before` items of the last groups, where `rest` places are left, with
// it. Of the first items, that are few and long, those longer than a CTA's part of what is left are cut, since all CTAs would wait
// for them. Later ones from 8/5 of that part on: others that are nearly as long have been begun by then, and end as late.
JITGEN_PLAN_FN int pieces_wanted(int units, unsigned rest, int before, int least_units, const PlanShape& shape) {
  const bool is_first = 2 * before < shape.shares;
  const unsigned long long work = (is_first ? 8ull : 5ull) * (units + shape.fixed_cost) * shape.shares, part = 8ull * rest;
  const int most = units / least_units, wanted = static_cast<int>((work + part - 1) / part);
  const int pieces = wanted < kTailPieces ? wanted : kTailPieces;
  return pieces < most ? pieces : most > 1 ? most : 1;
}
// As many of them as there is room for behind `before` of a group.
JITGEN_PLAN_FN int pieces_given(int wanted, int before, const PlanHeader& header, const PlanShape& shape) {
  return (before + static_cast<long long>(wanted)) * header.tail_groups <= tail_slots(shape.shares) ? wanted : 1;
}

// ---- the planner ----
#ifdef __CUDACC__
constexpr int kPlanThreads = 1024;
constexpr int kPlanMaxBatch = 4096;   // requests whose positions fit in 48 KB less what the scans take

// Inclusive sum over the CTA, and the total.
__device__ __forceinline__ int scan_block(int value, int& total) {
  __shared__ int of_warp[32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, sum, step);
    sum += lane >= step ? before : 0;
  }
  if (lane == 31) of_warp[warp] = sum;
  __syncthreads();
  int warps = of_warp[lane];
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, warps, step);
    warps += lane >= step ? before : 0;
  }
  total = __shfl_sync(0xffffffffu, warps, 31);
  const int earlier = __shfl_sync(0xffffffffu, warps, warp > 0 ? warp - 1 : 0);
  __syncthreads();   // of_warp may be written again
  return sum + (warp > 0 ? earlier : 0);
}

// The order of the last groups: the longest tiles first, later ones before earlier ones of the same length. A tile that lacks
// rows counts three quarters as much less (128 of 192 rows take 0.72 to 0.78 of the time). Of more tiles than threads those count
// as of one length whose units have as many digits in base two.
__device__ __forceinline__ void order_tail(PlanTile* tiles, int num_tiles, int most_cost, PlanHeader& header, const PlanShape& shape) {
  __shared__ int costs[kPlanThreads];
  const int thread = threadIdx.x;
  const auto units_at = [&](int i) { return units_of({tiles[i].begin, tiles[i].end}, shape.unit_keys); };
  if (num_tiles <= kPlanThreads) {
    const auto rows_at = [&](int i) { return tiles[i].q_len * shape.pack - tiles[i].index * shape.tile_rows; };
    const auto weight = [&](int rows) { return shape.tile_rows + 3 * (rows < shape.tile_rows ? rows : shape.tile_rows); };
    const int own = thread < num_tiles ? units_at(thread) * weight(rows_at(thread)) : 0;   // written by this thread
    costs[thread] = own;
    __syncthreads();
    int place = 0;
    for (int i = 0; i < num_tiles; ++i) place += costs[i] > own || (costs[i] == own && i > thread);
    if (thread < num_tiles) tiles[place].at = thread;
  } else {
    for (int digits = 32 - __clz(most_cost), placed = 0, total; digits > 0; --digits)
      for (int last = num_tiles - 1; last >= 0; last -= kPlanThreads, placed += total) {
        const int i = last - thread, is_next = i >= 0 && 32 - __clz(units_at(i)) == digits;
        const int place = placed + scan_block(is_next, total) - is_next;
        if (is_next) tiles[place].at = i;
      }
  }
  __syncthreads();
  int places = 0, pieces = 0, total;
  for (int first = 0; first < num_tiles; first += kPlanThreads) {
    const int i = first + thread, units = i < num_tiles ? units_at(tiles[i].at) : 0, cost = i < num_tiles ? units + shape.fixed_cost : 0;
    const unsigned line = places + scan_block(cost, total) - cost;
    places += total;
    const unsigned rest = (header.places - line) * header.tail_groups;
    const int wanted = i < num_tiles ? pieces_wanted(units, rest, i * header.tail_groups, header.least_units, shape) : 0;
    const int counted = wanted > 1 ? wanted : 0;
    const int before = pieces + scan_block(counted, total) - counted;
    pieces += total;
    if (i < num_tiles) tiles[i].at_pieces = pieces_given(wanted, before, header, shape), tiles[i].pieces = before;
  }
  header.pieces = pieces;
}

// By one CTA of kPlanThreads. `visible(tile, first query, last query)` gives the keys that these rows of the request see;
// all threads call it, those without a tile with kv_len 0. kGivesOut: for a kernel that may give out items.
template <bool kGivesOut, class Visible>
__device__ __forceinline__ void make_plan(void* plan, const int* q_indptr, const int* kv_len, int batch,
                                          const PlanShape& shape, Visible visible) {
  __shared__ int first_tile[kPlanMaxBatch + 1];
  __shared__ unsigned first_line[kPlanMaxBatch + 1];
  Share* const shares = const_cast<Share*>(plan_shares(plan));
  PlanTile* const tiles = const_cast<PlanTile*>(plan_tiles_of(plan, shape.shares));
  const int thread = threadIdx.x;

  __shared__ unsigned long long beside;
  if (thread == 0) beside = 0;
  __syncthreads();
  int num_tiles = 0, total;
  for (int first = 0; first < batch; first += kPlanThreads, num_tiles += total) {
    const int b = first + thread, q_len = b < batch ? q_indptr[b + 1] - q_indptr[b] : 0, keys = b < batch ? kv_len[b] : 0;
    const int count = tiles_of_request(q_len, keys, shape);
    if ((shape.beside_key || shape.beside_row) && count == 0 && q_len > 0) atomicAdd(&beside, work_beside(q_len, keys, shape));
    const int before = num_tiles + scan_block(count, total) - count;
    if (b < batch) first_tile[b] = before;
  }
  if (thread == 0) first_tile[batch] = num_tiles;
  __syncthreads();

  __shared__ int most_cost;
  if (thread == 0) most_cost = 0;
  int places = 0, own_cost = 0, own_most = 0;
  bool is_even = true;   // this thread's tiles: all of one cost
  for (int first = 0; first < num_tiles; first += kPlanThreads, places += total) {
    const int number = first + thread;
    PlanTile tile = {};
    int first_query = 0, last_query = 0, cost = 0;
    if (number < num_tiles) {
      const int b = last_at_most(batch, number, [&](int i) { return static_cast<unsigned>(first_tile[i]); });
      tile.request = b, tile.q_start = q_indptr[b], tile.q_len = q_indptr[b + 1] - tile.q_start, tile.kv_len = kv_len[b];
      tile.index = number - first_tile[b], tile.count = first_tile[b + 1] - first_tile[b];
      const int first_row = tile.index * shape.tile_rows, rows = tile.q_len * shape.pack;
      const int end_row = first_row + shape.tile_rows < rows ? first_row + shape.tile_rows : rows;
      first_query = first_row / shape.pack, last_query = (end_row - 1) / shape.pack;
    }
    const KeyRange keys = visible(tile, first_query, last_query);   // by whole warps: some masks need all lanes
    if (number < num_tiles) {
      tile.begin = keys.begin, tile.end = keys.end;
      cost = shape.fixed_cost + units_of(keys, shape.unit_keys);
      is_even &= is_better_even(shape, tile.count, cost) && (own_cost == 0 || cost == own_cost);
      own_cost = cost;
      own_most = cost > own_most ? cost : own_most;
    }
    tile.line = places + scan_block(cost, total) - cost;
    if (number < num_tiles) {
      tiles[number] = tile;
      if (tile.index == 0) first_line[tile.request] = tile.line;
    }
  }
  is_even = __syncthreads_and(is_even && (own_cost == 0 || static_cast<long long>(own_cost) * num_tiles == places));
  for (int b = thread; b <= batch; b += kPlanThreads)
    if (first_tile[b] == num_tiles) first_line[b] = places;
    else if (first_tile[b] == first_tile[b + 1]) first_line[b] = tiles[first_tile[b]].line;

  const int items = num_tiles * shape.groups;
  PlanHeader header = {num_tiles};
  if (kGivesOut && gives_out(items, shape)) {
    atomicMax(&most_cost, own_most);
    __syncthreads();
    header.places = places;
    header.tail_groups = tail_groups_of(places, most_cost, shape);
    header.whole_groups = shape.groups - header.tail_groups;
    header.least_units = least_units_of(items, shape);
    order_tail(tiles, num_tiles, most_cost, header, shape);
  }
  __syncthreads();

  const unsigned length = static_cast<unsigned>(places) * shape.groups;
  const int used = shares_in_use(shape, shares_beside(shape, length, beside), length, items, is_even);
  header.length = length, header.shares = used;
  const Line line = {first_tile, first_line, tiles, batch, num_tiles};
  for (int c = thread; c <= shape.shares; c += kPlanThreads) shares[c] = share_start(line, shape, length, used, c);
  if (thread == 0) *static_cast<PlanHeader*>(plan) = header;
}
#endif

}  // namespace jg
