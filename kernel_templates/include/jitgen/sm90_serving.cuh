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
// A box of K or V: rows of one span of columns. A box outside of the tensor is zero. Called by a whole warp with equal values.
JITGEN_FN void load_box(unsigned dst, const Operand& t, unsigned barrier, int row, int span, int head, int page, unsigned long long policy) {
  asm volatile(
      "{\n.reg .pred elected;\nelect.sync _|elected, 0xffffffff;\n"
      "@elected cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;\n}"
      ::"r"(dst), "l"(&t.map), "r"(barrier), "r"(0), "r"(row), "r"(span), "r"(head * t.head_step), "r"(page * t.batch_step), "l"(policy)
      : "memory");
}
// Zeroes rows [first, rows) of a tile, by a warp: what lies behind a request's last key may be NaN, and a weight of zero
// would make NaN of it.
template <int kCols> JITGEN_FN void clear_rows(unsigned tile, int first, int rows, int lane) {
  using Tile = SpanTile<kCols>;
#pragma unroll 1
  for (int span = 0; span < kCols / Tile::kSpan; ++span)
#pragma unroll 1
    for (unsigned at = (span * rows + first) * Tile::kSpanBytes + 16 * lane; at < (span + 1) * rows * Tile::kSpanBytes; at += 16 * 32)
      store_shared(tile + at, make_int4(0, 0, 0, 0));
}

// ---- host ----
namespace {

constexpr int kErrorPageSize = 20011;

inline const char* serving_error_string(int code) {
  if (code == kErrorPageSize) return "the sm90 family reads pages of a multiple of 8 keys. Make the plan with family='sm80'.";
  return launch_error_string(code);
}

// Keys that one box copies of a page: the largest power of two that divides the page and the tile. 0: too few for a box.
inline int box_keys(int64_t page_size, int tile_keys) {
  int keys = 8;
  if (page_size % keys || tile_keys % keys) return 0;
  while (page_size % (2 * keys) == 0 && tile_keys % (2 * keys) == 0) keys *= 2;
  return keys;
}

// The map of q [rows, heads, kCols]; box of 2^packing heads and the queries of a tile.
template <int kCols> struct QueryMap {
  TensorKey key = {};
  int packing = -1;
  Operand operand = {};

  int update(const TensorKey& wanted, bool is_bf16, int wanted_packing, unsigned tile_rows) {
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
    const unsigned box[4] = {Tile::kSpan, 1u << wanted_packing, tile_rows >> wanted_packing, kCols / Tile::kSpan}, ones[4] = {1, 1, 1, 1};
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
