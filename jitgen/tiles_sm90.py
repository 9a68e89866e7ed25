"""Tiles of the sm90 attention family: what fits its registers and shared memory, and is fastest on an H100."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jitgen.emit_early import POSITIONS, ahead_loads, ahead_words, early_parts, take_initial, take_relative
from jitgen.ir import walk
from jitgen.program import Program
from jitgen.spec import Tiles

if TYPE_CHECKING:
    from jitgen.emit_section import VariantSection

SHARED_BYTES = 232448  # 227 KiB: what a CTA may have

# What a program's hooks need of the registers that S, P and O leave: little; room for a producer that looks through captured
# tensors; for a word, or two, of each pair of columns read ahead; for gathers of each element; for scans along a row. A
# tile of a tensor that is copied takes shared memory instead.
PLAIN, SEARCHING, AHEAD, FAR_AHEAD, GATHERING, SCANNING, COPIED = range(7)

# (head_dim, head_dim_v) -> (tile_q, tile_kv, stages) by need. Each 64 rows of Q are a warp group: two have 240 registers a
# thread, three 160, four 112. tests/compile/test_sm90_modules.py sees to it that no program of its list spills.
TILES = {
    (64, 64): ((192, 128, 2), (192, 128, 2), (128, 128, 2), (128, 96, 2), (192, 112, 2), (128, 64, 2), (192, 128, 2)),
    (96, 96): ((192, 128, 2), (192, 128, 2), (128, 128, 2), (128, 80, 2), (192, 64, 2), (128, 64, 2), (192, 128, 2)),
    (128, 128): ((192, 128, 2), (128, 128, 2), (128, 128, 2), (128, 96, 2), (128, 112, 2), (128, 64, 2), (192, 128, 2)),
    (192, 192): ((128, 96, 2), (128, 80, 2), (128, 80, 2), (128, 48, 2), (128, 80, 2), (128, 64, 2), (128, 96, 2)),
    (192, 128): ((128, 128, 2), (128, 128, 2), (128, 112, 2), (128, 96, 2), (128, 112, 2), (128, 64, 2), (128, 96, 2)),
    (256, 256): ((128, 64, 2), (128, 64, 2), (128, 32, 2), (128, 48, 2), (128, 48, 2), (128, 32, 2), (128, 64, 2)),
}
# Better for queries below a length: four warp groups of 64 rows hide more of what begins and ends a query tile.
SHORT_TILES = {
    (64, 64): (
        2048,
        ((256, 64, 4), (256, 64, 4), (128, 128, 2), (128, 96, 2), (192, 96, 2), (128, 64, 2), (192, 128, 2)),
    )
}


# For groups of requests that share keys, in place of the first: they have 64 rows, or 2 or 4 times as many, more often than
# 192, and the rest of a tile is idle.
GROUP_TILES = {(128, 128): (128, 128, 2)}


def sm90_tiles(
    head_dim: int,
    head_dim_v: int,
    program: Program | None = None,
    *,
    q_len: int = 1 << 20,
    layout: str = "dense",
    copies: bool = True,
) -> Tiles:
    """Tiles of a kernel for these head dims; ``program`` None: without hooks. ``copies``: see KernelSpec."""
    limit, short = SHORT_TILES.get((head_dim, head_dim_v), (0, ()))
    table = short if q_len < limit else TILES[head_dim, head_dim_v]
    weight = PLAIN if program is None else hook_weight(program, layout, head_dim_v, copies)
    tiles = table[weight]
    if layout.endswith("_states") and weight == PLAIN:  # groups of requests
        tiles = GROUP_TILES.get((head_dim, head_dim_v), tiles)
    tile_q, tile_kv, num_stages = tiles
    return Tiles(tile_q, tile_kv, num_warps=4 + tile_q // 16, num_stages=num_stages)


def adds_terms_by_product(section: VariantSection, head_dim: int) -> bool:
    """Whether a step of wgmma adds what keys add to scores; else threads read it, which is faster for head dims 64 and 256,
    and spills nothing beside a table of distances."""
    return section.initial_by_column and 96 < head_dim < 256 and not section.looks_ahead


def has_room(tiles: Tiles, head_dim: int, head_dim_v: int, section: VariantSection) -> bool:
    """Whether a dense kernel of these tiles, laid out as by sm90_geometry.cuh and sm90_geometry.cu.jinja, fits in shared
    memory; O may lie over something else."""
    rows, keys, stages = tiles.tile_q, tiles.tile_kv, tiles.num_stages
    in_place = section.initial_by_tile and rows == 192 and head_dim_v > 64
    tensors = 2 * (stages * keys * (head_dim + head_dim_v) + rows * head_dim)
    weights = 2 * rows * keys if rows >= 192 and head_dim_v >= 96 and not in_place else 0
    control = 8 * (15 + 4 * stages)  # barriers, then messages, steps, padding
    control = (control + 15) // 16 * 16 + 32 + (8 * stages + 15) // 16 * 16
    extra = stages * 4 * (keys + 4) if section.initial_by_column else 0
    if adds_terms_by_product(section, head_dim):
        extra = (stages * 6 * (keys + 16) + 1023) // 1024 * 1024
    if section.has_relative or section.score_columns or section.mask_columns:
        extra += rows // 64 * 4 * (keys + 68 if section.has_relative else keys)
    elif section.has_mask_search:
        extra += 8 * rows
    if section.initial_by_tile:
        extra += rows // 64 * 16 + 2 * rows * keys
    return tensors + weights + control + extra <= SHARED_BYTES


def hook_weight(program: Program, layout: str, head_dim_v: int, copies: bool = True) -> int:
    """PLAIN to COPIED: how much a program's hooks hold in registers beside the tiles."""
    if program.norm is not None and any(n.op == "row_cumsum" for n in walk(*program.norm.roots())):
        return SCANNING
    if program.norm is not None:
        return GATHERING
    early, score = early_parts(program, layout, head_dim_v), program.score
    if copies and "tile" in early:
        return COPIED
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
