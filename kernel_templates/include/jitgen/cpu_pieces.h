// Division of a batch of requests of any lengths into pieces of work: some rows of a request against some of its keys.
#pragma once

#include "jitgen/cpu_work.h"

namespace jg {

constexpr int kErrorBadPage = 2, kErrorBadRows = 3;
// Pieces a thread gets to work on, on average: enough that the last ones to finish differ little.
constexpr int kPiecesPerThread = 4;

// Up to kTileQ (query head, row) pairs of one request that share a KV head, and the tiles of keys that they see.
struct ServingItem {
  int b, kv_h, first_head, num_heads, first_row, num_rows;
  int first_tile, end_tile;        // of kTileKv keys, numbered from the request's first key
  int origin, tiles_per_piece;     // piece p has the tiles [origin + p * tiles_per_piece, + tiles_per_piece) among these
  int num_pieces, pieces_left;     // pieces_left counts down as they finish: the last one merges
  int64_t partial;                 // where the item's first piece writes, if there are several

  int rows() const { return num_heads * num_rows; }
  int begin_of(int piece) const { return larger(first_tile, origin + piece * tiles_per_piece); }
  int end_of(int piece) const { return smaller(end_tile, origin + (piece + 1) * tiles_per_piece); }
  // Reading or packing a tile of K and V costs about as much as eight rows of arithmetic.
  int64_t cost_of_tile() const { return rows() + kMaxDirectRows; }

  static int larger(int a, int b) { return a > b ? a : b; }
  static int smaller(int a, int b) { return a < b ? a : b; }
};

// How the rows of one request are divided: all heads of a group together while they are few, then row block by row block.
struct RowDivision {
  int heads_per_item, rows_per_item, head_blocks, row_blocks;

  RowDivision(int q_len, int group, int tile_q) {
    rows_per_item = q_len < tile_q ? q_len : tile_q;
    const int heads = ServingItem::smaller(tile_q / rows_per_item, kMaxHeadsPerItem);
    heads_per_item = ServingItem::smaller(heads, group);
    head_blocks = static_cast<int>(ceil_div(group, heads_per_item));
    row_blocks = static_cast<int>(ceil_div(q_len, rows_per_item));
  }
};

struct PieceOfItem { int item, piece; };

// Cuts items along their keys. target: cost of a piece; 0 leaves items whole. fixed: tiles of a piece, counted from the
// request's first key, so that a request is cut alike whatever else is in the batch; 0 lets target decide.
static inline int64_t cut_items(ServingItem* items, int64_t num_items, int64_t target, int fixed) {
  int64_t pieces = 0;
  for (int64_t i = 0; i < num_items; ++i) {
    ServingItem& item = items[i];
    const int tiles = item.end_tile - item.first_tile;
    item.origin = item.first_tile;
    item.tiles_per_piece = tiles > 0 ? tiles : 1;
    if (fixed > 0) {
      item.origin = item.first_tile / fixed * fixed;
      item.tiles_per_piece = fixed;
    } else if (target > 0 && tiles > 1) {
      const int64_t wanted = ceil_div(tiles * item.cost_of_tile(), target);
      item.tiles_per_piece = static_cast<int>(ceil_div(tiles, wanted < tiles ? wanted : tiles));
    }
    const int span = item.end_tile - item.origin;
    item.num_pieces = span > 0 ? static_cast<int>(ceil_div(span, item.tiles_per_piece)) : 1;
    item.pieces_left = item.num_pieces;
    pieces += item.num_pieces;
  }
  return pieces;
}

// Cost of a piece such that every thread gets kPiecesPerThread of them; 0 where one thread does everything.
static inline int64_t target_cost(const ServingItem* items, int64_t num_items, int threads) {
  if (threads == 1) return 0;
  int64_t total = 0;
  for (int64_t i = 0; i < num_items; ++i) total += (items[i].end_tile - items[i].first_tile) * items[i].cost_of_tile();
  const int64_t target = total / (int64_t{threads} * kPiecesPerThread);
  return target > 0 ? target : 1;
}

// Lists the pieces and gives those of cut items their memory, row_floats a row; returns the floats needed.
static inline int64_t list_pieces(ServingItem* items, int64_t num_items, int row_floats, PieceOfItem* pieces) {
  int64_t floats = 0;
  for (int64_t i = 0; i < num_items; ++i) {
    for (int p = 0; p < items[i].num_pieces; ++p) *pieces++ = {static_cast<int>(i), p};
    items[i].partial = floats;
    if (items[i].num_pieces > 1) floats += int64_t{items[i].num_pieces} * items[i].rows() * row_floats;
  }
  return floats;
}

// First and end tile that may hold a visible key. excludes(begin, end) tells of the keys [begin, end) that none does; what
// it excludes as a whole it also excludes in parts, so both ends are found by bisection.
template <class Excludes> static inline void visible_tiles(ServingItem& item, int kv_len, int tile_kv, Excludes excludes) {
  const int tiles = static_cast<int>(ceil_div(kv_len, tile_kv));
  int low = 0, high = tiles;   // the tiles before low are excluded
  while (low < high) {
    const int middle = low + (high - low + 1) / 2;
    if (excludes(0, ServingItem::smaller(middle * tile_kv, kv_len))) low = middle;
    else high = middle - 1;
  }
  item.first_tile = low;
  high = tiles;   // the tiles from high on are excluded
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (excludes(middle * tile_kv, kv_len)) high = middle;
    else low = middle + 1;
  }
  item.end_tile = high;
}

}  // namespace jg
