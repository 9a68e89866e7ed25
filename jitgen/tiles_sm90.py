"""Tiles of the sm90 attention family: what fits its registers and shared memory, and is fastest on an H100."""

from __future__ import annotations

from jitgen.ir import index, walk
from jitgen.program import Program
from jitgen.spec import Tiles

# Weight of a program's hooks: what they need of the registers that S, P and O leave.
PLAIN, SCORED, GATHERING, SCANNING = range(4)

# (head_dim, head_dim_v) -> (tile_q, tile_kv, stages) by weight. Each 64 rows of Q are a warp group: two have 240 registers a
# thread, three 160, four 112. tests/compile/test_sm90_modules.py sees to it that no program of its list spills.
TILES = {
    (64, 64): ((192, 128, 2), (192, 128, 2), (192, 112, 2), (128, 64, 2)),
    (96, 96): ((192, 128, 2), (192, 128, 2), (192, 64, 2), (128, 64, 2)),
    (128, 128): ((192, 128, 2), (192, 128, 2), (128, 112, 2), (128, 64, 2)),
    (192, 192): ((128, 96, 2), (128, 80, 2), (128, 80, 2), (128, 64, 2)),
    (192, 128): ((128, 128, 2), (128, 128, 2), (128, 112, 2), (128, 64, 2)),
    (256, 256): ((128, 64, 2), (128, 64, 2), (128, 48, 2), (128, 32, 2)),
}
# Better for queries below a length: fewer rows are lost at a causal diagonal and at the end (hd128), or more warps hide the
# exponentials of a narrow head (hd64).
SHORT_TILES = {
    (64, 64): (8192, ((256, 64, 4), (256, 64, 4), (192, 96, 2), (128, 64, 2))),
    (128, 128): (2048, ((128, 128, 2), (128, 128, 2), (128, 112, 2), (128, 64, 2))),
}


def sm90_tiles(head_dim: int, head_dim_v: int, program: Program | None = None, *, q_len: int = 1 << 20) -> Tiles:
    """Tiles of a kernel for these head dims; ``program`` None: without hooks."""
    limit, short = SHORT_TILES.get((head_dim, head_dim_v), (0, ()))
    table = short if q_len < limit else TILES[head_dim, head_dim_v]
    tile_q, tile_kv, num_stages = table[PLAIN if program is None else hook_weight(program)]
    return Tiles(tile_q, tile_kv, num_warps=4 + tile_q // 16, num_stages=num_stages)


def hook_weight(program: Program) -> int:
    """PLAIN, SCORED, GATHERING or SCANNING: how much a program's hooks hold in registers beside the tiles."""
    if program.norm is not None and any(n.op == "row_cumsum" for n in walk(*program.norm.roots())):
        return SCANNING
    gathers = (n for n in walk(program.score, program.mask) if n.op == "load")
    by_position = any(n.deps & {"q_idx", "kv_idx"} for n in gathers)
    if program.norm is None and program.score in (None, index("score")):
        return SCORED if by_position else PLAIN
    return GATHERING if by_position else SCORED
