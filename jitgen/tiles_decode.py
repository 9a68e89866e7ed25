"""Tiles of the decode kernels: packed query rows, warps, and the units of 16 keys that each has under way."""

from __future__ import annotations

from jitgen.program import Program
from jitgen.spec import Tiles
from jitgen.target import CompileTarget

UNIT_KEYS = 16
# Shared memory of one CTA in KiB, by compute capability; the least of them for one that is not listed.
SHARED_KIB = {
    (8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 1): 227, (10, 3): 227, (11, 0): 227,
    (12, 0): 99, (12, 1): 99,
}  # fmt: skip
MAX_OUTPUT_REGISTERS = 128  # of O^T in a thread: head_dim_v * columns / 32
RESERVED_BYTES = 1024  # that the driver takes of each CTA's
# (warps, stages, CTAs of an SM), the best first: 128 KiB under way fill the memory of an H100, 96 are not felt on others.
_WHOLE_SMS = ((8, 4), (8, 3), (8, 2), (4, 4), (4, 3), (4, 2), (4, 1), (2, 2), (2, 1), (1, 1))
SHAPES = tuple((warps, stages, 1) for warps, stages in _WHOLE_SMS)
# Keys in 8 bits take most of what 8 warps can issue: 16 read them at 4.26 TB/s on an H200, 8 at 3.69.
PAIRED_SHAPES = ((8, 4, 2), (8, 2, 2))
MAX_RING_BYTES = 144 * 1024
MERGE_COLUMNS = 8
MERGE_DIMS = 256  # of O, that the warps of a head join at a time, where no hook sees whole rows
MLA_COLUMNS = (8, 16, 32)  # rows of latent attention in a tile
SCALE_BYTES = 128  # of a stage
CONTROL_BYTES = 320  # of a warp: softmax of the columns, or a norm's state of up to six values; barriers
BARRIER_BYTES = 64  # of a warp, of these


def decode_tiles(
    head_dim: int, head_dim_v: int, program: Program, target: CompileTarget, rows: int = 8, stored_bytes: int = 2
) -> Tiles:
    """Tiles for requests of ``rows`` packed rows (q_len times query heads of a key head); more take several passes over K
    and V, whose elements have ``stored_bytes``."""
    columns = decode_columns(head_dim_v, rows)
    # see kQueryAhead in decode_geometry.cu.jinja: a small shared memory has no room for it
    has_room = (9, 0) <= target.compute_capability < (12, 0)
    is_ahead = has_room and columns == 8 and stored_bytes == 2 and program.norm is None
    shared = shared_kib(target) * 1024
    is_paired = has_room and columns == 8 and stored_bytes == 1 and program.norm is None and program.value is None  # kResident
    sees_rows = program.norm is not None or program.output is not None
    merge_dims = head_dim_v if sees_rows else min(head_dim_v, MERGE_DIMS)
    for warps, stages, ctas in (PAIRED_SHAPES if is_paired else ()) + SHAPES:
        ring = warps * stages * UNIT_KEYS * (head_dim + head_dim_v) * stored_bytes
        heads = warps // 2 if program.can_split and warps > 1 else warps  # of a CTA: see kMaxHeads
        queries = 2 * stages + 2 if is_ahead else 1
        rest = heads * queries * columns * head_dim * 2 + warps * MERGE_COLUMNS * (merge_dims + 4) * 4
        rest += warps * _control_bytes(program)
        rest += warps * stages * SCALE_BYTES + heads * columns * 4 if stored_bytes == 1 else 0
        if ring <= MAX_RING_BYTES and ctas * (ring + rest + RESERVED_BYTES) <= shared + RESERVED_BYTES:
            return Tiles(columns, UNIT_KEYS, warps, stages)
    raise AssertionError(f"no tile for head_dim {head_dim} in {shared} bytes")


def shared_kib(target: CompileTarget) -> int:
    """Shared memory of a CTA on a GPU of that architecture."""
    return SHARED_KIB.get(target.compute_capability, min(SHARED_KIB.values()))


def _control_bytes(program: Program) -> int:
    """Shared memory of a warp besides its units and O; a norm with merge keeps the states of finished columns too."""
    if not (program.norm and program.norm.merges):
        return CONTROL_BYTES
    state_bytes = max(8, -(-len(program.norm.state_names) // 2) * 8)
    return max(CONTROL_BYTES, 2 * MERGE_COLUMNS * state_bytes + BARRIER_BYTES)


def mla_decode_tiles(rows: int) -> Tiles:
    """Tiles of latent attention for requests of ``rows`` packed rows; more are taken 32 at a time.

    Stages are thirds of 64 keys, 24 kB each; beside them are Q, 1152 bytes a row, and four tiles of weights.
    """
    columns = next((n for n in MLA_COLUMNS if rows <= n), MLA_COLUMNS[-1])
    return Tiles(columns, 64, num_warps=12, num_stages=6 if columns == 32 else 8)


def decode_columns(head_dim_v: int, rows: int) -> int:
    """Columns of the transposed product that hold ``rows``: 8, 16 or 32, as far as O^T fits the registers."""
    wanted = 8 if rows <= 8 else 16 if rows <= 16 else 32
    while wanted > 8 and wanted * head_dim_v // 32 > MAX_OUTPUT_REGISTERS:
        wanted //= 2
    return wanted
