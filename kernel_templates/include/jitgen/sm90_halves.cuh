// The products of two warp groups that have the same 64 rows, by wgmma: as sm80_halves.cuh, a group has half of the columns of Q
// and K, and of those of V and O. Tiles are spans of 64 columns, [spans][rows][64], as the copies of sm80_tile.cuh make them.
#pragma once
#include "jitgen/sm80_tile.cuh"
#include "jitgen/sm90_geometry.cuh"
#include "jitgen/sm90_wgmma.cuh"

namespace jg {

template <class Element, int kHeadDim, int kHeadDimV, int kTileKv> struct GroupHalves {
  using KeyTile = SpanTile<kHeadDim>;
  static constexpr int kRows = 64, kSpanBytes = KeyTile::kSpanBytes;   // of Q; of a row of a span
  static_assert(KeyTile::kSpan == 64 && SpanTile<kHeadDimV>::kSpan == 64 && kHeadDim % 128 == 0 && kHeadDimV % 128 == 0, "whole spans");
  unsigned long long q, k, v;   // descriptors of the group's part of the tiles at these addresses

  JITGEN_FN GroupHalves(unsigned q_at, unsigned k_at, unsigned v_at, int part)
      : q(matrix_descriptor<128>(q_at + part * (kHeadDim / 128) * kRows * kSpanBytes, 16)),
        k(matrix_descriptor<128>(k_at + part * (kHeadDim / 128) * kTileKv * kSpanBytes, 16)),
        v(matrix_descriptor<128>(v_at + part * (kHeadDimV / 128) * kTileKv * kSpanBytes, kTileKv * kSpanBytes)) {}

  // The group's part of S = Q K^T.
  JITGEN_FN void multiply_qk(float (&s)[1][kTileKv / 8][4]) const {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 32; ++step)
      Wgmma<kTileKv>::template shared<Element, 0>(s[0], q + KeyTile::step_offset(step, kRows), k + KeyTile::step_offset(step, kTileKv), step != 0);
    wgmma_commit();
    Wgmma<kTileKv>::template wait<0>(s[0]);
  }
  // O += P V.
  JITGEN_FN void multiply_pv(float (&o)[1][kHeadDimV / 16][4], const float (&p)[1][kTileKv / 8][4]) const {
    unsigned a[kTileKv / 16][1][4];
#pragma unroll
    for (int step = 0; step < kTileKv / 16; ++step) pack_weights<Element>(a[step], p, step);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kTileKv / 16; ++step)
      Wgmma<kHeadDimV / 2>::template registers<Element>(o[0], a[step][0], v + step * (16 * kSpanBytes >> 4), 1);
    wgmma_commit();
    Wgmma<kHeadDimV / 2>::template wait<0>(o[0]);
  }
};

}  // namespace jg
