// Tiles of 16-bit elements in shared memory: swizzled layout, copies from and to global memory, and the two products.
//
// Legend: a chunk is 16 bytes (8 elements); a span is the run of chunks that the swizzle permutes (8 chunks = 128 bytes
// when the row is a multiple of 64 elements, else 4 chunks = 64 bytes, which covers head_dim 96). Lane l of a warp:
// group = l / 4 is its accumulator row, quad = l % 4 its column pair.
#pragma once
#include "jitgen/sm80_ptx.cuh"

namespace jg {

// Row-major [rows][kCols] whose chunks are permuted inside each span by the row number, so that the eight rows an
// ldmatrix phase reads, and the eight chunks a cp.async phase writes, fall in different banks.
template <int kCols> struct SwizzledTile {
  static_assert(kCols % 32 == 0, "rows must be a multiple of 64 bytes");
  static constexpr int kPitch = kCols * 2;
  static constexpr int kSpan = kCols % 64 == 0 ? 8 : 4;
  static constexpr int kSpans = kCols / 8 / kSpan;

  static JITGEN_FN unsigned swizzle(unsigned row) { return kSpan == 8 ? row & 7 : (row >> 1) & 3; }
  static JITGEN_FN unsigned offset(unsigned row, unsigned chunk) {
    return row * kPitch + (chunk / kSpan * kSpan + ((chunk % kSpan) ^ swizzle(row))) * 16;
  }
  // Address `chunks` (a constant, even) further along the row. Bases are 128-byte aligned, so the permuted bits of the
  // address change by one xor; rows a multiple of 8 apart share the swizzle, so row steps are plain constants.
  static JITGEN_FN unsigned advance(unsigned address, int chunks) {
    return (address ^ (chunks % kSpan * 16)) + chunks / kSpan * (kSpan * 16);
  }
};

// Where spans of a row of a tile are. kSpanRows: the tile is [spans][kSpanRows][8 chunks], as wgmma wants it; 0: rows are whole.
template <int kCols, int kSpanRows> struct SpanPlaces {
  using Tile = SwizzledTile<kCols>;
  static constexpr int kPitch = kSpanRows ? Tile::kSpan * 16 : Tile::kPitch;
  static constexpr int kSpanStep = kSpanRows ? kSpanRows * kPitch : Tile::kSpan * 16;
  static_assert(kSpanRows == 0 || Tile::kSpan == 8, "spans of 64 columns");

  // Of a chunk of the first span.
  static JITGEN_FN unsigned offset(unsigned row, unsigned chunk) { return row * kPitch + (chunk ^ Tile::swizzle(row)) * 16; }
};

// The part of a [rows][kCols] copy that one thread does: kSpan neighbouring threads copy one span of a row.
template <int kCols, int kThreads, int kSpanRows = 0> struct TileCopy {
  using Tile = SwizzledTile<kCols>;
  using Places = SpanPlaces<kCols, kSpanRows>;
  static constexpr int kRowStep = kThreads / Tile::kSpan;
  static_assert(kRowStep % 8 == 0, "rows of one thread must share the swizzle");

  const char* src;          // global address of this thread's chunk in row `row` of the matrix
  long long row_bytes;
  int dst;                  // shared-memory offset of the same chunk
  int row;

  JITGEN_FN TileCopy(const void* base, long long row_stride, int thread)
      : row_bytes(row_stride * 2), row(thread / Tile::kSpan) {
    const int chunk = thread % Tile::kSpan;
    src = static_cast<const char*>(base) + row * row_bytes + chunk * 16;
    dst = Places::offset(row, chunk);
  }
  // Rows [first, first + kRows) to the tile at `address`; rows from `limit` on become zero, so that a weight of zero
  // never meets a NaN left in memory.
  template <int kRows> JITGEN_FN void start(unsigned address, int first, int limit) const {
    static_assert(kRows % kRowStep == 0, "every thread copies the same number of rows");
    const long long pitch = stay(row_bytes);
    const char* from = src + first * pitch;
    const unsigned to = address + stay(dst);
#pragma unroll
    for (int i = 0; i < kRows / kRowStep; ++i, from = stay(from + kRowStep * pitch)) {
      const bool valid = first + row + i * kRowStep < limit;
#pragma unroll
      for (int span = 0; span < Tile::kSpans; ++span)
        cp_async_16(to + i * kRowStep * Places::kPitch + span * Places::kSpanStep, from + span * Tile::kSpan * 16, valid);
    }
  }
};

// ---- lane addresses of the fragments: row part and chunk part of ldmatrix.x4 ----
template <int kCols> JITGEN_FN unsigned a_fragment_offset(int lane) { return SwizzledTile<kCols>::offset(lane & 15, lane >> 4); }
template <int kCols> JITGEN_FN unsigned b_fragment_offset(int lane) {
  return SwizzledTile<kCols>::offset((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
}

// Q fragments of a warp: those of the first kHeld steps stay in registers for the whole KV loop, the others are read again for
// every KV tile. kSteps: of 16 columns, that the warp multiplies; the addresses of both operands are those of the first.
template <int kRowTiles, int kHeadDim, int kHeld, int kSteps = kHeadDim / 16> struct QueryFragments {
  unsigned address;
  unsigned held[kHeld ? kHeld : 1][kRowTiles][4];

  JITGEN_FN void load(unsigned (&a)[kRowTiles][4], int step) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
      load_matrix(a[i], SwizzledTile<kHeadDim>::advance(address, 2 * step) + i * 16 * SwizzledTile<kHeadDim>::kPitch);
  }
  JITGEN_FN void hold() {   // call once the Q tile has arrived
#pragma unroll
    for (int step = 0; step < kHeld; ++step) load(held[step], step);
  }
  JITGEN_FN void get(unsigned (&a)[kRowTiles][4], int step) const {
    if (step >= kHeld) return load(a, step);
#pragma unroll
    for (int i = 0; i < 4 * kRowTiles; ++i) a[i / 4][i % 4] = held[step][i / 4][i % 4];
  }
};

// S = Q K^T. `k_address` is this lane's b-fragment address in the K tile.
template <class Element, int kRowTiles, int kColTiles, int kHeadDim, int kHeld, int kSteps>
JITGEN_FN void multiply_qk(float (&s)[kRowTiles][kColTiles][4], const QueryFragments<kRowTiles, kHeadDim, kHeld, kSteps>& q,
                           unsigned k_address) {
  using Tile = SwizzledTile<kHeadDim>;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kColTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[i][j][e] = 0.0f;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    unsigned a[kRowTiles][4];
    q.get(a, step);
    const unsigned address = Tile::advance(k_address, 2 * step);
#pragma unroll
    for (int j = 0; j < kColTiles; j += 2) {
      unsigned b[4];
      load_matrix(b, address + j * 8 * Tile::kPitch);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        Element::mma(s[i][j], a[i], b[0], b[1]);
        Element::mma(s[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// P of one step of 16 keys as an A operand: the accumulators of S are already in its order, so it needs no shuffle.
template <class Element, int kRowTiles, int kColTiles>
JITGEN_FN void pack_weights(unsigned (&a)[kRowTiles][4], const float (&p)[kRowTiles][kColTiles][4], int step) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    a[i][0] = Element::pack(p[i][2 * step][0], p[i][2 * step][1]);
    a[i][1] = Element::pack(p[i][2 * step][2], p[i][2 * step][3]);
    a[i][2] = Element::pack(p[i][2 * step + 1][0], p[i][2 * step + 1][1]);
    a[i][3] = Element::pack(p[i][2 * step + 1][2], p[i][2 * step + 1][3]);
  }
}

// O += P V for one step of 16 keys, P as an A operand. `v_address` is this lane's a-fragment address in the V tile (the transposing
// load turns it into a B operand), whose rows have kCols elements; `offset` bytes behind it the keys begin. It is added after the
// swizzle: before, every load would need an address of its own, and paged kernels spill more.
template <class Element, int kCols, int kRowTiles, int kOutTiles>
JITGEN_FN void multiply_values(float (&o)[kRowTiles][kOutTiles][4], const unsigned (&a)[kRowTiles][4], unsigned v_address, int offset = 0) {
#pragma unroll
  for (int j = 0; j < kOutTiles; j += 2) {
    unsigned b[4];
    load_matrix_transposed(b, SwizzledTile<kCols>::advance(v_address, j) + offset);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      Element::mma(o[i][j], a[i], b[0], b[1]);
      Element::mma(o[i][j + 1], a[i], b[2], b[3]);
    }
  }
}
template <class Element, int kCols, int kRowTiles, int kColTiles, int kOutTiles>
JITGEN_FN void multiply_pv(float (&o)[kRowTiles][kOutTiles][4], const float (&p)[kRowTiles][kColTiles][4], unsigned v_address) {
#pragma unroll
  for (int step = 0; step < kColTiles / 2; ++step) {
    unsigned a[kRowTiles][4];
    pack_weights<Element>(a, p, step);
    multiply_values<Element, kCols>(o, a, v_address, step * 16 * SwizzledTile<kCols>::kPitch);
  }
}

// Writes the 16 * kRowTiles rows of a warp through its own part of shared memory (`address`), 16 bytes per lane and
// store, so that rows leave in full sectors. Rows from `row_limit` on are dropped.
template <class Element, int kRowTiles, int kOutTiles>
JITGEN_FN void store_rows(const float (&o)[kRowTiles][kOutTiles][4], unsigned address, void* base, long long row_stride,
                          int row_limit) {
  using Tile = SwizzledTile<kOutTiles * 8>;
  const int lane = threadIdx.x & 31;
  __syncwarp();   // O leaves through the rows that the warp's Q was read from
  const unsigned mine = address + Tile::offset(lane >> 2, 0) + (lane & 3) * 4;
  const unsigned mine_odd = address + Tile::offset(lane >> 2, 1) + (lane & 3) * 4;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kOutTiles; ++j) {
      const unsigned at = Tile::advance(j % 2 ? mine_odd : mine, j - j % 2) + i * 16 * Tile::kPitch;
      store_shared_32(at, Element::pack(o[i][j][0], o[i][j][1]));
      store_shared_32(at + 8 * Tile::kPitch, Element::pack(o[i][j][2], o[i][j][3]));
    }
  __syncwarp();
  constexpr int kRowsAtOnce = 32 / Tile::kSpan;
  const int row = lane / Tile::kSpan, chunk = lane % Tile::kSpan;
  char* to = static_cast<char*>(base) + row * row_stride * 2 + chunk * 16;
#pragma unroll
  for (int r = 0; r < 16 * kRowTiles; r += kRowsAtOnce, to += kRowsAtOnce * row_stride * 2) {
#pragma unroll
    for (int span = 0; span < Tile::kSpans; ++span) {   // no branch between the rows: reads of several overlap
      const uint4 out = load_shared_128(address + Tile::offset(r + row, span * Tile::kSpan + chunk));
      if (r + row < row_limit) *reinterpret_cast<uint4*>(to + span * Tile::kSpan * 16) = out;
    }
  }
}

}  // namespace jg
