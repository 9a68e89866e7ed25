// Serving kernels on sm_90a: tensor maps over packed query rows, K and V tiles copied in boxes, the end of V.
#pragma once
#include "jitgen/sm90_geometry.cuh"
#include "jitgen/sm90_host.cuh"

namespace jg {

// ---- copies ----
// A box of Q: 2^packing heads from `head` on of neighbouring rows from `row` on; all spans of columns. The map is
// {element in span, head, row, span}, so the rows of a tile come out packed.
JITGEN_FN void load_query_box(unsigned dst, const Operand& t, unsigned barrier, int head, int row, unsigned long long policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %3}], [%2], %6;"
      ::"r"(dst), "l"(&t.map), "r"(barrier), "r"(0), "r"(head), "r"(row), "l"(policy) : "memory");
}
// Its counterpart for O: one span of columns.
JITGEN_FN void store_output_box(const Operand& t, unsigned src, int head, int row, int span) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
               ::"l"(&t.map), "r"(src), "r"(0), "r"(head), "r"(row), "r"(span) : "memory");
}
// A box of each lane's own, as load_box.
JITGEN_FN void load_own_box(unsigned dst, const Operand& t, unsigned barrier, int row, int span, int head, int page, unsigned long long policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;"
      ::"r"(dst), "l"(&t.map), "r"(barrier), "r"(0), "r"(row), "r"(span), "r"(head * t.head_step), "r"(page * t.batch_step), "l"(policy)
      : "memory");
}
// A box of K or V: rows of one span of columns. A box outside of the tensor is zero. Called by a whole warp with equal values.
JITGEN_FN void load_box(unsigned dst, const Operand& t, unsigned barrier, int row, int span, int head, int page, unsigned long long policy) {
  asm volatile(
      "{\n.reg .pred elected;\nelect.sync _|elected, 0xffffffff;\n"
      "@elected cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;\n}"
      ::"r"(dst), "l"(&t.map), "r"(barrier), "r"(0), "r"(row), "r"(span), "r"(head * t.head_step), "r"(page * t.batch_step), "l"(policy)
      : "memory");
}
// A box of a page in a PageMap: all columns of the keys from 8 * group on. kNowhere as its place: zeros. Called by a whole warp
// with equal values.
constexpr int kNowhere = 0x7fffffff;
JITGEN_FN void load_page_box(unsigned dst, const Operand& t, unsigned barrier, int group, int place, unsigned long long policy) {
  asm volatile(
      "{\n.reg .pred elected;\nelect.sync _|elected, 0xffffffff;\n"
      "@elected cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %3, %3, %4, %5}], [%2], %6;\n}"
      ::"r"(dst), "l"(&t.map), "r"(barrier), "r"(0), "r"(group), "r"(place), "l"(policy) : "memory");
}
// Byte offset of a row in a tile that boxes of pages, or the like, are copied to.
template <int kCols> JITGEN_FN unsigned page_row_offset(int row) {
  return row / 8 * (8 * kCols * 2) + row % 8 * SpanTile<kCols>::kSpanBytes;
}
JITGEN_FN void cp_async_wait_but_one() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }
// Zeroes rows [first, rows) of a tile, by a warp: what lies behind a request's last key may be NaN, and a weight of zero
// would make NaN of it. `span_rows`: rows of a span that stand together.
template <int kCols> JITGEN_FN void clear_rows(unsigned tile, int first, int rows, int span_rows, int lane) {
  using Tile = SpanTile<kCols>;
  constexpr int kChunks = Tile::kSpanBytes / 16, kSpans = kCols / Tile::kSpan;
#pragma unroll 1
  for (int i = lane; i < (rows - first) * kSpans * kChunks; i += 32) {
    const int chunk = i % kChunks, span = i / kChunks % kSpans, row = first + i / (kChunks * kSpans);
    const int block = row / span_rows, inside = row - block * span_rows;
    store_shared(tile + ((block * kSpans + span) * span_rows + inside) * Tile::kSpanBytes + 16 * chunk, make_int4(0, 0, 0, 0));
  }
}

// ---- host ----
namespace {

constexpr int kErrorPageSize = 20011, kErrorRows = 20012, kErrorFarRows = 20013;

inline const char* serving_error_string(int code) {
  if (code == kErrorPageSize) return "the sm90 family reads pages of a multiple of 8 keys. Make the plan with page_size=.";
  if (code == kErrorRows) return "keys and values must begin at multiples of 16 bytes. Copy the cache.";
  if (code == kErrorFarRows) return "the sm90 family reads at most 64 GB of keys, and as many of values. Make the plan with family='sm80'.";
  return launch_error_string(code);
}

// Keys that one box copies of a page: the largest power of two that divides the page and the tile. 0: fewer than `least`.
inline int box_keys(int64_t page_size, int tile_keys, int least = 8) {
  int keys = least;
  if (page_size % keys || tile_keys % keys) return 0;
  while (page_size % (2 * keys) == 0 && tile_keys % (2 * keys) == 0) keys *= 2;
  return keys;
}

// Of K or V that is copied by rows: strides in elements; 0, or what is wrong. Addresses are 32-bit counts of 16 bytes.
inline int check_rows(const void* base, int64_t page, int64_t head, int64_t row, int64_t pages, int64_t heads, int64_t page_size) {
  if (pages <= 0) return 0;
  if (reinterpret_cast<uintptr_t>(base) % 16 || page % 8 || head % 8 || row % 8) return kErrorRows;
  return ((pages - 1) * page + (heads - 1) * head + (page_size - 1) * row) / 8 < 0xfffffff0ll ? 0 : kErrorFarRows;
}

// The map of a paged cache for boxes of keys of one page. A box holds groups of 8 keys, in each of them the spans of columns one
// after the other: so all of its columns come at once, and a tile of boxes is one of 8-row spans whatever the page size is. Pages
// and heads are one axis, as multiples of what their strides have in common: the place of a page and head on it is
// page * batch_step + head * head_step.
template <int kCols> struct PageMap {
  TensorKey key = {};
  Operand operand = {};

  int update(const TensorKey& wanted, bool is_bf16, unsigned keys) {
    if (key.base == wanted.base && key.rows == wanted.rows && key.heads == wanted.heads && key.batch == wanted.batch &&
        key.stride_s == wanted.stride_s && key.stride_h == wanted.stride_h && key.stride_b == wanted.stride_b)
      return 0;
    static const EncodeTiled encode = find_encoder();
    if (!encode) return kErrorNoEncoder;
    using Tile = SpanTile<kCols>;
    using u64 = unsigned long long;
    const int64_t page = wanted.batch > 1 ? wanted.stride_b : 0, head = wanted.heads > 1 ? wanted.stride_h : 0;
    int64_t unit = page, rest = head;
    while (rest != 0) {
      const int64_t next = unit % rest;
      unit = rest, rest = next;
    }
    unit = unit != 0 ? unit : 8;
    operand.batch_step = static_cast<int>(page / unit), operand.head_step = static_cast<int>(head / unit);
    const u64 places = (wanted.batch - 1) * (page / unit) + (wanted.heads - 1) * (head / unit) + 1, row = wanted.stride_s * 2;
    const u64 sizes[5] = {Tile::kSpan, 8, kCols / Tile::kSpan, static_cast<u64>(wanted.rows) / 8, places};
    const u64 strides[4] = {row, Tile::kSpanBytes, 8 * row, static_cast<u64>(unit) * 2};
    const unsigned box[5] = {Tile::kSpan, 8, kCols / Tile::kSpan, keys / 8, 1}, ones[5] = {1, 1, 1, 1, 1};
    key.base = nullptr;
    void* const base = const_cast<void*>(wanted.base);
    if (row == 0 || encode(&operand.map, is_bf16 ? 9 : 6, 5, base, sizes, strides, box, ones, 0, Tile::kSpan == 64 ? 3 : 2, 3, 0))
      return kErrorTensorMap;
    key = wanted;
    return 0;
  }
};

// The map of q or o [rows, heads, kCols]; a box of 2^packing heads has tile_rows packed rows and `spans` spans of columns.
template <int kCols> struct QueryMap {
  TensorKey key = {};
  int packing = -1;
  Operand operand = {};

  int update(const TensorKey& wanted, bool is_bf16, int wanted_packing, unsigned tile_rows, unsigned spans) {
    using Tile = SpanTile<kCols>;
    using u64 = unsigned long long;
    if (packing == wanted_packing && key.base == wanted.base && key.rows == wanted.rows && key.heads == wanted.heads &&
        key.stride_s == wanted.stride_s && key.stride_h == wanted.stride_h)
      return 0;
    static const EncodeTiled encode = find_encoder();
    if (!encode) return kErrorNoEncoder;
    const auto bytes = [](u64 size, int64_t stride) { return size == 1 ? 16ull : static_cast<u64>(stride * 2); };
    const u64 rows = wanted.rows, heads = wanted.heads;
    const u64 sizes[4] = {Tile::kSpan, heads, rows, kCols / Tile::kSpan};
    const u64 strides[3] = {bytes(heads, wanted.stride_h), bytes(rows, wanted.stride_s), Tile::kSpanBytes};
    const unsigned box[4] = {Tile::kSpan, 1u << wanted_packing, tile_rows >> wanted_packing, spans}, ones[4] = {1, 1, 1, 1};
    packing = -1;
    void* const base = const_cast<void*>(wanted.base);
    if (strides[0] == 0 || strides[1] == 0 ||
        encode(&operand.map, is_bf16 ? 9 : 6, 4, base, sizes, strides, box, ones, 0, Tile::kSpan == 64 ? 3 : 2, 3, 0))
      return kErrorTensorMap;
    key = wanted;
    packing = wanted_packing;
    return 0;
  }
};

}  // namespace
}  // namespace jg
