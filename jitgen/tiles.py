"""Tiles of the sm80 kernels by head dim, measured on an H100; see the commit that changed a row last for figures."""

from __future__ import annotations

from jitgen.spec import Tiles

# (head_dim, head_dim_v) -> tile_q, tile_kv, warps, stages
_SM80 = {
    (64, 64): Tiles(128, 64, 4, 2),
    (96, 96): Tiles(128, 64, 4, 1),
    (128, 128): Tiles(128, 64, 4, 2),
    (192, 128): Tiles(64, 64, 4, 1),
    (192, 192): Tiles(64, 64, 4, 1),
    (256, 256): Tiles(64, 64, 4, 1),
}
# Head dim 512, by the KiB of shared memory that a CTA has. Plans need room for the places of keys beside the largest.
_WIDE = ((227, Tiles(64, 64, 8, 1)), (163, Tiles(64, 32, 8, 1)), (99, Tiles(32, 16, 4, 1)))
_LARGEST_OF_PLANS = 163
WIDE_TILES = Tiles(64, 64, 8, 1)  # of the sm90_wide family


def sm80_tiles(head_dim: int, head_dim_v: int, shared_kib: int, layout: str = "dense") -> Tiles:
    """Tiles of the sm80 kernel for supported head dims, with ``shared_kib`` of shared memory for a CTA."""
    if (head_dim, head_dim_v) != (512, 512):
        return _SM80[head_dim, head_dim_v]
    most = shared_kib if layout == "dense" else min(shared_kib, _LARGEST_OF_PLANS)
    return next(tiles for least, tiles in _WIDE if least <= most)
