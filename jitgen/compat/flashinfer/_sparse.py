"""Block lists as masks over a table of tile classes: what the sparse wrappers of the shim are made of.

Kernels skip a tile whose class is NONE and run one that is FULL without the mask, since the interval analysis of masks reads
such a table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from jitgen.compat.flashinfer.quantization import bytes_of
from jitgen.errors import ShapeMismatch
from jitgen.masks import static

NONE, PARTIAL, FULL = 0, 1, 2
TILE = 64  # rows and columns of the tiles of variable blocks: the smallest tile of the kernels


def bsr_tables(
    indptr: torch.Tensor, indices: torch.Tensor, num_columns: int, has_bits: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Class of each block and, with bits, its place in the list; and whether the list has a column that does not exist.

    Shapes:  indptr [block rows + 1], indices [nnz]; returns uint8 and int32 [block rows, num_columns], and a bool.
    """
    num_rows = indptr.shape[0] - 1
    listed = torch.arange(indices.shape[0], device=indices.device)
    row = torch.searchsorted(indptr.long(), listed, right=True) - 1
    used = (row >= 0) & (row < num_rows)
    wrong = used & ((indices < 0) | (indices >= num_columns))
    spare = num_rows * num_columns  # where entries go that are wrong or belong to no row
    place = torch.where(used & ~wrong, row * num_columns + indices.long(), spare)
    classes = torch.zeros(spare + 1, dtype=torch.uint8, device=indices.device)
    classes.scatter_(0, place, PARTIAL if has_bits else FULL)
    slots = None
    if has_bits:
        slots = torch.zeros(spare + 1, dtype=torch.int32, device=indices.device).scatter_(0, place, listed.int())
        slots = slots[:-1].view(num_rows, num_columns)
    return classes[:-1].view(num_rows, num_columns), slots, wrong.any()


def block_bits(
    mask: torch.Tensor | None, packed_mask: torch.Tensor | None, num_blocks: int, block_elements: int, device: torch.device
) -> torch.Tensor | None:
    """Little-endian bits of all listed blocks, joined; None without a mask."""
    num_bits = num_blocks * block_elements
    num_bytes = -(-num_bits // 8)
    if packed_mask is not None:
        if packed_mask.numel() != num_bytes or packed_mask.dtype != torch.uint8:
            raise ShapeMismatch(
                f"packed_mask has {packed_mask.numel()} elements of {packed_mask.dtype}, expected {num_bytes} of uint8: "
                "packbits(mask, bitorder='little')."
            )
        return packed_mask.to(device)
    if mask is None:
        return None
    if mask.numel() != num_bits:
        raise ShapeMismatch(f"mask has {mask.numel()} elements, expected {num_bits}: [{num_blocks}, R, C].")
    bits = mask.to(device).reshape(-1).bool()
    return bytes_of(torch.nn.functional.pad(bits, (0, -num_bits % 8)), "little")


def block_mask_mod(
    classes: torch.Tensor, slots: torch.Tensor | None, bits: torch.Tensor | None, rows: int, columns: int, causal: bool
) -> Callable[..., Any]:
    """Mask of blocks of one size, for query rows that count from 0."""
    rows, columns = static(rows), static(columns)

    def block_mask(b, h, row, kv_idx, *, ctx_len):  # type: ignore[no-untyped-def]
        kind = classes[row // rows, kv_idx // columns]
        if bits is None:
            kept = kind == FULL
        else:
            bit = slots[row // rows, kv_idx // columns] * (rows * columns) + row % rows * columns + kv_idx % columns
            kept = (kind == PARTIAL) & (((bits[bit >> 3] >> (bit & 7)) & 1) == 1)
        return kept & (kv_idx <= row + ctx_len) if causal else kept

    return block_mask


def tile_classes(
    chosen: torch.Tensor, row_sizes: torch.Tensor, column_sizes: torch.Tensor, q_len: int, kv_len: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Class of each tile of TILE rows and columns, and what tells the elements of a PARTIAL one apart.

    Shapes:  chosen bool [heads, block rows, block columns]; row_sizes [heads, block rows]; column_sizes [heads, block
             columns]; returns uint8 [heads, row tiles, column tiles], ``chosen``, and the block of each row and column, int32
             [heads, q_len] and [heads, kv_len].
    """
    row_block, column_block = block_of(row_sizes, q_len), block_of(column_sizes, kv_len)
    row_part, column_part = tile_parts(row_block, chosen.shape[1]), tile_parts(column_block, chosen.shape[2])
    kept = row_part @ chosen.float() @ column_part.mT  # at most TILE * TILE: exact
    whole = row_part.sum(2)[:, :, None] * column_part.sum(2)[:, None, :]
    classes = torch.where(kept == 0, NONE, torch.where(kept == whole, FULL, PARTIAL)).to(torch.uint8)
    return classes, chosen, row_block, column_block


def block_of(sizes: torch.Tensor, length: int) -> torch.Tensor:
    """Block that each of ``length`` positions lies in, int32 [heads, length]; blocks of size 0 hold none."""
    position = torch.arange(length, device=sizes.device).expand(sizes.shape[0], -1).contiguous()
    block = torch.searchsorted(sizes.long().cumsum(1), position, right=True)
    return block.clamp(max=sizes.shape[1] - 1).int()


def tile_parts(block: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """How many positions of each tile lie in each block, float32 [heads, tiles, num_blocks]."""
    heads, length = block.shape
    tiles = -(-length // TILE)
    cell = torch.arange(length, device=block.device) // TILE * num_blocks + block.long()
    counts = torch.zeros(heads, tiles * num_blocks, device=block.device)
    return counts.scatter_add_(1, cell, torch.ones_like(cell, dtype=torch.float32)).view(heads, tiles, num_blocks)


def variable_mask_mod(
    classes: torch.Tensor, chosen: torch.Tensor, row_block: torch.Tensor, column_block: torch.Tensor, causal: bool
) -> Callable[..., Any]:
    """Mask of blocks of any sizes, for query rows that count from 0."""
    tile = static(TILE)

    def variable_mask(b, h, row, kv_idx, *, kv_h, ctx_len):  # type: ignore[no-untyped-def]
        kind = classes[kv_h, row // tile, kv_idx // tile]
        kept = (kind == FULL) | ((kind == PARTIAL) & chosen[kv_h, row_block[kv_h, row], column_block[kv_h, kv_idx]])
        return kept & (kv_idx <= row + ctx_len) if causal else kept

    return variable_mask


class LateCheck:
    """A condition that the device knows, raised once the host knows it too, without a wait on a GPU."""

    def __init__(self, failed: torch.Tensor, message: str) -> None:
        self._message = message
        self._event = None
        self._failed: torch.Tensor | None = failed
        if failed.is_cuda:
            self._failed = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(failed, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        self.look()

    def look(self) -> None:
        """Raise ShapeMismatch if the condition is known to hold."""
        if self._failed is None:
            return
        if self._event is not None and (torch.cuda.is_current_stream_capturing() or not self._event.query()):
            return
        if bool(self._failed):
            raise ShapeMismatch(self._message)
        self._failed = None
