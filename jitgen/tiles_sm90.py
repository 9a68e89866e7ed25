"""Tiles of the sm90 attention family: measured on an H100, see the table."""

from __future__ import annotations

from jitgen.spec import Tiles

# (head_dim, head_dim_v) -> rows of Q, rows of K and V, pipeline stages. Consumer warp groups own 64 rows of Q each.
SM90_TILES = {
    (64, 64): Tiles(192, 128, num_warps=16, num_stages=2),
    (96, 96): Tiles(192, 128, num_warps=16, num_stages=2),
    (128, 128): Tiles(128, 128, num_warps=12, num_stages=2),
    (192, 192): Tiles(128, 112, num_warps=12, num_stages=2),
    (192, 128): Tiles(128, 128, num_warps=12, num_stages=2),
    (256, 256): Tiles(128, 64, num_warps=12, num_stages=2),
}


def sm90_tiles(head_dim: int, head_dim_v: int) -> Tiles:
    """Tiles for these head dims."""
    return SM90_TILES[head_dim, head_dim_v]
