"""Tiles of the sm90_fp8 family: what fits its registers and shared memory, and is fastest on an H100."""

from __future__ import annotations

from jitgen.emit_early import POSITIONS
from jitgen.ir import Expr, walk
from jitgen.program import Program
from jitgen.spec import Tiles

FP8_HEAD_DIMS = (64, 128, 256)

# head_dim -> (tile_q, tile_kv, stages) by what hooks need of the registers: little, scores of their own or a producer that
# searches, gathers of each element.
TILES = {
    64: ((192, 128, 3), (192, 64, 3), (192, 64, 3)),
    128: ((192, 128, 2), (128, 128, 2), (128, 128, 2)),
    256: ((128, 128, 2), (128, 64, 2), (128, 64, 2)),
}


def fp8_tiles(head_dim: int, head_dim_v: int, program: Program | None = None) -> Tiles:
    """Tiles of a kernel for one head dim of Q, K and V; ``program`` None: without hooks."""
    assert head_dim == head_dim_v, "padded_head_dims makes them equal"
    tile_q, tile_kv, num_stages = TILES[head_dim][0 if program is None else hook_weight(program, head_dim)]
    return Tiles(tile_q, tile_kv, num_warps=4 + tile_q // 16, num_stages=num_stages)


def hook_weight(program: Program, head_dim: int) -> int:
    """Column of TILES for a program's hooks. Three groups of head dim 128 spill with scores that are more than scaled."""
    if _gathers_by_position(program.score):
        return 2
    return int(_gathers_by_position(program.mask) or (head_dim == 128 and not _only_scales(program.score)))


def _only_scales(root: Expr | None) -> bool:
    return all(n.op in ("mul", "index", "load", "scalar", "const") for n in walk(root))


def _gathers_by_position(root: Expr | None) -> bool:
    return any(n.op == "load" and n.deps & POSITIONS for n in walk(root))
