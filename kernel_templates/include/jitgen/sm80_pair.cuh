// Two warps that share rows: each has half of the columns of S and half of those of O. What a warp reads from shared memory
// meets twice as many rows then, which pays where reading is the bound (head dim 256). Per tile they exchange weights.
//
// Threads of the two warps with the same lane hold the same rows.
#pragma once
#include "jitgen/sm80_softmax.cuh"
#include "jitgen/sm80_tile.cuh"

namespace jg {

// O += P V of one step. `v_address` is this lane's a-fragment address in the first of the 16 rows of V, at the first column
// of O (the transposing load turns it into a B operand).
template <class Element, int kHeadDimV, int kRowTiles, int kOutTiles>
JITGEN_FN void multiply_pv_step(float (&o)[kRowTiles][kOutTiles][4], const unsigned (&a)[kRowTiles][4], unsigned v_address) {
#pragma unroll
  for (int j = 0; j < kOutTiles; j += 2) {
    unsigned b[4];
    load_matrix_transposed(b, SwizzledTile<kHeadDimV>::advance(v_address, j));
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      Element::mma(o[i][j], a[i], b[0], b[1]);
      Element::mma(o[i][j + 1], a[i], b[2], b[3]);
    }
  }
}

template <class Element, int kRowTiles, int kColTiles> struct WarpPair {
  static constexpr int kSteps = kColTiles / 2;                     // of 16 keys, each warp
  static constexpr unsigned kWeightBytes = kSteps * kRowTiles * 512, kWarpBytes = kWeightBytes + 512;
  static_assert(kRowTiles == 2, "the four rows of a thread are exchanged as 16 bytes");
  unsigned mine, other;   // shared-memory addresses, of this lane

  JITGEN_FN WarpPair(unsigned address, int warp, int lane)
      : mine(address + warp * kWarpBytes + lane * 16), other(address + (warp ^ 1) * kWarpBytes + lane * 16) {}

  JITGEN_FN void put_weights(const float (&p)[kRowTiles][kColTiles][4]) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      unsigned a[kRowTiles][4];
      pack_weights<Element>(a, p, step);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
        store_shared_128(mine + (step * kRowTiles + i) * 512, make_uint4(a[i][0], a[i][1], a[i][2], a[i][3]));
    }
  }
  JITGEN_FN void get_weights(unsigned (&a)[kRowTiles][4], int step) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const uint4 v = load_shared_128(other + (step * kRowTiles + i) * 512);
      a[i][0] = v.x, a[i][1] = v.y, a[i][2] = v.z, a[i][3] = v.w;
    }
  }
  // O += P V over the other warp's keys; `v_address` as for multiply_pv.
  template <int kHeadDimV, int kOutTiles> JITGEN_FN void multiply_pv(float (&o)[kRowTiles][kOutTiles][4], unsigned v_address) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      unsigned a[kRowTiles][4];
      get_weights(a, step);
      multiply_pv_step<Element, kHeadDimV>(o, a, v_address + step * 16 * SwizzledTile<kHeadDimV>::kPitch);
    }
  }
  JITGEN_FN void put_rows(const float (&x)[kRowTiles][2]) const {
    const uint4 rows = {__float_as_uint(x[0][0]), __float_as_uint(x[0][1]), __float_as_uint(x[1][0]), __float_as_uint(x[1][1])};
    store_shared_128(mine + kWeightBytes, rows);
  }
  JITGEN_FN void get_rows(float (&x)[kRowTiles][2]) const {
    const uint4 v = load_shared_128(other + kWeightBytes);
    x[0][0] = __uint_as_float(v.x), x[0][1] = __uint_as_float(v.y), x[1][0] = __uint_as_float(v.z), x[1][1] = __uint_as_float(v.w);
  }

  JITGEN_FN void add_rows(float (&x)[kRowTiles][2]) const {
    float theirs[kRowTiles][2];
    get_rows(theirs);
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) x[r / 2][r % 2] += theirs[r / 2][r % 2];
  }

  // Where a maximum moved in either warp: both go on with the larger one. Weights and `factor`, which is that of the own maxima
  // if they moved, are brought to it.
  JITGEN_FN void agree(OnlineSoftmax<kRowTiles>& softmax, float (&p)[kRowTiles][kColTiles][4], float (&factor)[kRowTiles][2],
                       bool moved, float units) const {
    float theirs[kRowTiles][2], change[kRowTiles][2];
    get_rows(theirs);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& own = softmax.row_max[i][half];
        const float top = ::fmaxf(own, theirs[i][half]);
        change[i][half] = own == top ? 1.0f : exp2((own - top) * units);   // both may be -inf
        own = top;
        softmax.row_sum[i][half] *= change[i][half];
        factor[i][half] = (moved ? factor[i][half] : 1.0f) * change[i][half];
      }
    scale_rows(p, change);
  }
};

}  // namespace jg
