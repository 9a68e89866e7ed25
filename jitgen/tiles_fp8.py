"""Tiles of the sm90_fp8 family: what fits its registers and shared memory, and is fastest on an H100."""

from __future__ import annotations

from jitgen.emit_bits import mask_by_bits
from jitgen.emit_early import CAPS, POSITIONS, take_offset
from jitgen.emit_mask import is_causal
from jitgen.emit_split import raw_score
from jitgen.ir import Expr, walk
from jitgen.program import Program
from jitgen.spec import Tiles

FP8_HEAD_DIMS = (64, 128, 256)
VARYING = POSITIONS | {"score", "step"}

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
    """Column of TILES for a program's hooks. Three groups of head dim 128 spill with scores that are not light."""
    if _gathers_by_position(program.score):
        return 2
    searches = _gathers_by_position(program.mask) and "bits" not in fp8_early_parts(program, head_dim)
    return int(searches or (head_dim == 128 and not _is_light(program.score)))


def fp8_early_parts(program: Program, head_dim: int) -> frozenset[str]:
    """What of hooks the kernel does early (emit_early.py)."""
    parts: set[str] = set()
    if program.score is not None:
        scaled, _ = raw_score(program.score, keep_units=False)
        if scaled.op in CAPS:
            parts.add("cap")
        elif take_offset(scaled)[1] is not None:
            parts.add("offset")
    bits = mask_by_bits(program)
    if bits is None or _gathers_by_position(program.score) or (bits.search is not None and head_dim == 256):
        return frozenset(parts)  # registers would not last, or shared memory for what is found
    if parts or not (bits.mask.op != "and" and is_causal(bits.mask)):
        parts |= {"bits", "positions"}
    return frozenset(parts)


def _is_light(score: Expr | None) -> bool:
    """Whether a score takes few registers: it is scaled, then capped or raised by a multiple of the distance."""
    if score is None:
        return True
    score, _ = raw_score(score, keep_units=False)
    rest, offset = take_offset(score)
    rest = rest.args[0] if rest.op in CAPS else rest
    allowed = {"mul", "index"} if offset is None else {"mul", "index", "add", "sub", "neg"}
    return all(n.op in allowed for n in walk(rest) if n.deps & VARYING)


def _gathers_by_position(root: Expr | None) -> bool:
    return any(n.op == "load" and n.deps & POSITIONS for n in walk(root))
