"""Tiles of the sm90 attention family: what fits its registers and shared memory, and is fastest on an H100."""

from __future__ import annotations

from jitgen.emit_early import POSITIONS, ahead_loads, ahead_words, early_parts, take_initial, take_relative
from jitgen.ir import walk
from jitgen.program import Program
from jitgen.spec import Tiles

# What a program's hooks need of the registers that S, P and O leave: little; room for a producer that looks through captured
# tensors; for a word, or two, of each pair of columns read ahead; for gathers of each element; for scans along a row.
PLAIN, SEARCHING, AHEAD, FAR_AHEAD, GATHERING, SCANNING = range(6)

# (head_dim, head_dim_v) -> (tile_q, tile_kv, stages) by need. Each 64 rows of Q are a warp group: two have 240 registers a
# thread, three 160, four 112. tests/compile/test_sm90_modules.py sees to it that no program of its list spills.
TILES = {
    (64, 64): ((192, 128, 2), (192, 128, 2), (128, 128, 2), (128, 96, 2), (192, 112, 2), (128, 64, 2)),
    (96, 96): ((192, 128, 2), (192, 128, 2), (128, 128, 2), (128, 80, 2), (192, 64, 2), (128, 64, 2)),
    (128, 128): ((192, 128, 2), (128, 128, 2), (128, 128, 2), (128, 96, 2), (128, 112, 2), (128, 64, 2)),
    (192, 192): ((128, 96, 2), (128, 80, 2), (128, 80, 2), (128, 48, 2), (128, 80, 2), (128, 64, 2)),
    (192, 128): ((128, 128, 2), (128, 128, 2), (128, 112, 2), (128, 96, 2), (128, 112, 2), (128, 64, 2)),
    (256, 256): ((128, 64, 2), (128, 64, 2), (128, 32, 2), (128, 48, 2), (128, 48, 2), (128, 32, 2)),
}
# Better for queries below a length: four warp groups of 64 rows hide more of what begins and ends a query tile.
SHORT_TILES = {(64, 64): (2048, ((256, 64, 4), (256, 64, 4), (128, 128, 2), (128, 96, 2), (192, 96, 2), (128, 64, 2)))}


# For groups of requests that share keys, in place of the first: they have 64 rows, or 2 or 4 times as many, more often than
# 192, and the rest of a tile is idle.
GROUP_TILES = {(128, 128): (128, 128, 2)}


def sm90_tiles(
    head_dim: int, head_dim_v: int, program: Program | None = None, *, q_len: int = 1 << 20, layout: str = "dense"
) -> Tiles:
    """Tiles of a kernel for these head dims; ``program`` None: without hooks."""
    limit, short = SHORT_TILES.get((head_dim, head_dim_v), (0, ()))
    table = short if q_len < limit else TILES[head_dim, head_dim_v]
    weight = PLAIN if program is None else hook_weight(program, layout, head_dim_v)
    tiles = table[weight]
    if layout.endswith("_states") and weight == PLAIN:  # groups of requests
        tiles = GROUP_TILES.get((head_dim, head_dim_v), tiles)
    tile_q, tile_kv, num_stages = tiles
    return Tiles(tile_q, tile_kv, num_warps=4 + tile_q // 16, num_stages=num_stages)


def hook_weight(program: Program, layout: str, head_dim_v: int) -> int:
    """PLAIN to SCANNING: how much a program's hooks hold in registers beside the tiles."""
    if program.norm is not None and any(n.op == "row_cumsum" for n in walk(*program.norm.roots())):
        return SCANNING
    if program.norm is not None:
        return GATHERING
    early, score = early_parts(program, layout, head_dim_v), program.score
    if score is not None and "relative" in early:
        score, _ = take_relative(score)
    if score is not None and "initial" in early:
        score, _, _ = take_initial(score)
    gathers = [n for n in walk(score) if n.op == "load" and "kv_idx" in n.deps]
    ahead = ahead_loads(score, program.slots) if score is not None and "ahead" in early else []
    others = [n for n in gathers if n not in ahead]
    if others and (ahead or len(others) > 1 or "q_idx" in others[0].deps or "columns" not in early):
        return GATHERING
    if ahead:
        return AHEAD if ahead_words(ahead, program.slots) == 1 else FAR_AHEAD
    searched = [n for n in walk(program.mask) if n.op == "load" and n.deps & POSITIONS]
    by_column = [n for n in searched if "kv_idx" in n.deps] + others
    is_light = "columns" in early and len(by_column) <= 1 and all(program.slots[int(n.attr)].is_sorted for n in searched)
    return PLAIN if is_light or not (searched or others) else SEARCHING
