"""Tiles of the sm90 attention family: what fits its registers and shared memory, and is fastest on an H100."""

from __future__ import annotations

from jitgen.ir import index, walk
from jitgen.program import Program
from jitgen.spec import Tiles

# Weight of a program's hooks: what they need of the registers that S, P and O leave.
PLAIN, SCORED, GATHERING, SCANNING = range(4)

# (head_dim, head_dim_v) -> (tile_q, tile_kv) by weight. Each 64 rows of Q are a warp group: two have 240 registers a
# thread, three have 160. tests/compile/test_sm90_modules.py sees to it that no program of its list spills.
TILES = {
    (64, 64): ((192, 128), (192, 96), (192, 96), (128, 64)),
    (96, 96): ((192, 128), (192, 64), (192, 64), (128, 64)),
    (128, 128): ((128, 128), (128, 128), (128, 112), (128, 64)),
    (192, 192): ((128, 96), (128, 80), (128, 80), (128, 64)),
    (192, 128): ((128, 128), (128, 112), (128, 112), (128, 64)),
    (256, 256): ((128, 64), (128, 64), (128, 48), (128, 32)),
}
NUM_STAGES = 2  # three or four: -2 to +1.5 %


def sm90_tiles(head_dim: int, head_dim_v: int, program: Program | None = None) -> Tiles:
    """Tiles of a kernel for these head dims; ``program`` None: without hooks."""
    tile_q, tile_kv = TILES[head_dim, head_dim_v][PLAIN if program is None else hook_weight(program)]
    return Tiles(tile_q, tile_kv, num_warps=4 + tile_q // 16, num_stages=NUM_STAGES)


def hook_weight(program: Program) -> int:
    """PLAIN, SCORED, GATHERING or SCANNING: how much a program's hooks hold in registers beside the tiles."""
    if program.norm is not None and any(n.op == "row_cumsum" for n in walk(*program.norm.roots())):
        return SCANNING
    gathers = (n for n in walk(program.score, program.mask) if n.op == "load")
    by_position = any(n.deps & {"q_idx", "kv_idx"} for n in gathers)
    if program.norm is None and program.score in (None, index("score")):
        return SCORED if by_position else PLAIN
    return GATHERING if by_position else SCORED
