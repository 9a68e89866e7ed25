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
    (512, 512): Tiles(64, 32, 8, 1),
}
# Where a CTA has 99 kB of shared memory.
_SMALL_SHARED = {(512, 512): Tiles(32, 16, 4, 1)}


def sm80_tiles(head_dim: int, head_dim_v: int, *, has_small_shared: bool = False) -> Tiles:
    """Tiles of the sm80 kernel for supported head dims."""
    dims = head_dim, head_dim_v
    return _SMALL_SHARED.get(dims, _SM80[dims]) if has_small_shared else _SM80[dims]
