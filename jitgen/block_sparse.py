"""Attention over chosen blocks of the matrix of logits: BSR lists, blocks of any sizes, and torch's BlockMask.

A list of blocks becomes a mask over a table with the class of each block. Kernels skip a tile whose class is NONE and run one
that is FULL without the mask, since the interval analysis of masks reads such a table; and the planner of serving calls counts
what is visible by it. So blocks go with every hook and every kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from jitgen.api import attention
from jitgen.block_checks import check_has_values, check_one_device, check_visible, checked_pair
from jitgen.block_lists import BlockLists
from jitgen.checks import as_int32, check_is_tensor, check_tensors
from jitgen.errors import InvalidType, ShapeMismatch, UnsupportedDevice, VariantError
from jitgen.graphs import between_graphs
from jitgen.layouts import check_apart
from jitgen.masks import and_masks, static
from jitgen.serving_lists import check_indices
from jitgen.streams import is_capturing, record_event
from jitgen.variant import Variant

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Tensor = torch.Tensor
NONE, PARTIAL, FULL = 0, 1, 2
MAX_VARIANTS = 32  # whose hooks are remembered by an object of block lists
TILE = 64  # rows and columns of the tiles of variable blocks: the smallest tile of the kernels


class BlockSparse:
    """Which blocks of q_len query rows and kv_len keys are attended: made by ``bsr``, ``variable`` or ``of``.

    ``mask_mod`` is the mask, for positions as jitgen.attention counts them, ``local_mask_mod`` the same for rows that count
    from 0; combine it with others by jitgen.and_masks, or use ``block_sparse_attention``, which walks ``lists`` instead where
    there are any and that is faster. Rows that see no key give 0, and logsumexp -inf.
    """

    def __init__(
        self,
        mask_mod: Callable[..., Any],
        local_mask_mod: Callable[..., Any],
        lengths: tuple[int, int],
        check: LateCheck | None = None,
        lists: BlockLists | None = None,
        heads: tuple[str, int] | None = None,
    ) -> None:
        self.mask_mod, self.local_mask_mod, self.lengths, self._check = mask_mod, local_mask_mod, lengths, check
        self.lists, self.heads = lists, heads  # heads: which ones have their own blocks, and how many
        self._variants: dict[tuple[int, ...], tuple[Variant, object]] = {}

    @classmethod
    def bsr(
        cls,
        indptr: Tensor,
        indices: Tensor,
        lengths: tuple[int, int],
        block: tuple[int, int],
        *,
        mask: Tensor | None = None,
        packed_mask: Tensor | None = None,
        per_query_head: bool = False,
    ) -> BlockSparse:
        """Blocks of one size: block row i has the block columns ``indices[indptr[i] : indptr[i + 1]]``.

        lengths       (q_len, kv_len); the last block row may be short, block columns are whole
        block         (rows, columns) of a block
        mask          which elements of each listed block are visible; packed_mask the same as bits, lowest first
        per_query_head  lists of every query head, not of every KV head, where indptr has two dimensions

        Shapes:  indptr [block rows + 1], or [heads, block rows + 1] for lists of each head, whose numbers count through
                 ``indices`` [nnz]; mask bool [nnz, rows, columns]; packed_mask uint8 [ceil(nnz * rows * columns / 8)].
        Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedDevice, InvalidType. Block columns are checked on the device: the
                 error comes here on the CPU, from a later call on a GPU, and nothing waits.
        Cost:    a table of heads * block rows * block columns entries; no wait for the device.
        """
        lengths, block = checked_pair("lengths", lengths, "(q_len, kv_len)"), checked_pair("block", block, "(rows, columns)")
        (q_len, kv_len), (rows, columns) = lengths, block
        check_is_tensor(indptr=indptr)
        check_indices("indptr", indptr, 2 if indptr.dim() == 2 else 1)
        check_indices("indices", indices, 1)
        check_one_device(indptr=indptr, indices=indices)
        if not isinstance(per_query_head, bool):
            raise InvalidType(f"per_query_head is {per_query_head!r}, expected True or False.")
        if rows < 1 or columns < 1:
            raise ShapeMismatch(f"block is {block}, expected a positive number of rows and of columns.")
        if kv_len % columns:
            raise ShapeMismatch(
                f"kv_len is {kv_len}, blocks have {columns} columns, which must divide it. Pad the keys, list what is there."
            )
        wanted = -(-q_len // rows) + 1
        if indptr.shape[-1] != wanted:
            raise ShapeMismatch(
                f"indptr has shape {tuple(indptr.shape)}, expected [{wanted}] or [heads, {wanted}] for q_len {q_len} and "
                f"blocks of {rows} rows."
            )
        if indices.shape[0] and not indptr[..., 1:].numel():
            raise ShapeMismatch(
                f"indices has {indices.shape[0]} block columns, and indptr of shape {tuple(indptr.shape)} has no block rows."
            )
        classes, slots, wrong = bsr_tables(indptr, indices, kv_len // columns, mask is not None or packed_mask is not None)
        message = (
            f"indices has a block column outside 0 .. {kv_len // columns - 1} (kv_len {kv_len}, blocks of {columns}), or one "
            f"twice in a block row, or indptr falls or ends behind the {indices.shape[0]} indices."
        )
        bits = block_bits(mask, packed_mask, indices.shape[0], rows * columns, indices.device)
        mods = (
            block_mask_mod(classes, slots, bits, rows, columns, per_query_head=per_query_head, local=local)
            for local in (False, True)
        )
        whole = indptr.dim() == 1 and bits is None
        lists = BlockLists(as_int32(indptr).clone(), as_int32(indices).clone(), lengths, block) if whole else None
        heads = None if indptr.dim() == 1 else ("num_q_heads" if per_query_head else "num_kv_heads", indptr.shape[0])
        return cls(*mods, lengths, LateCheck(wrong, message), lists, heads)

    @classmethod
    def variable(cls, chosen: Tensor, row_sizes: Tensor, column_sizes: Tensor, lengths: tuple[int, int]) -> BlockSparse:
        """Blocks of any sizes, for each KV head: block (i, j) has row_sizes[i] rows and column_sizes[j] keys.

        Shapes:  chosen bool [num_kv_heads, block rows, block columns]; row_sizes int [num_kv_heads, block rows], column_sizes
                 int [num_kv_heads, block columns], which sum to the lengths (q_len, kv_len).
        Errors:  as ``bsr``; sums are checked as block columns are there.
        Cost:    tables of q_len and of kv_len entries for each KV head; no wait for the device.
        """
        lengths = checked_pair("lengths", lengths, "(q_len, kv_len)")
        check_indices("row_sizes", row_sizes, 2)
        check_indices("column_sizes", column_sizes, 2)
        check_visible(chosen=chosen)
        check_one_device(chosen=chosen, row_sizes=row_sizes, column_sizes=column_sizes)
        sizes = (row_sizes.shape[0], row_sizes.shape[-1], column_sizes.shape[-1])
        if chosen.shape != sizes or column_sizes.shape[0] != sizes[0] or not chosen.numel():
            raise ShapeMismatch(
                f"chosen has shape {tuple(chosen.shape)}, row_sizes {tuple(row_sizes.shape)}, column_sizes "
                f"{tuple(column_sizes.shape)}. Expected [heads, rows, columns], [heads, rows] and [heads, columns] of blocks, "
                "none of them 0."
            )
        wrong = (row_sizes.sum(1) != lengths[0]).any() | (column_sizes.sum(1) != lengths[1]).any()
        wrong = wrong | (row_sizes < 0).any() | (column_sizes < 0).any()
        message = (
            f"row_sizes and column_sizes do not sum to q_len {lengths[0]} and kv_len {lengths[1]} for every head, or have a "
            "negative size."
        )
        tables = tile_classes(chosen.bool(), row_sizes, column_sizes, *lengths)
        mods = (variable_mask_mod(*tables, local=local) for local in (False, True))
        return cls(*mods, lengths, LateCheck(wrong, message), heads=("num_kv_heads", chosen.shape[0]))

    @classmethod
    def of(cls, block_mask: BlockMask) -> BlockSparse:
        """The blocks of a torch BlockMask, with its mask_mod inside of partial ones; its rows count from 0."""
        from jitgen.flex import block_mask_function

        if not hasattr(block_mask, "kv_num_blocks"):
            raise VariantError(f"block_mask is a {type(block_mask).__name__}, expected torch's BlockMask.")
        inner = block_mask_function(block_mask)

        def mask(b, h, q_idx, kv_idx, *, ctx_len):  # type: ignore[no-untyped-def]
            return inner(b, h, q_idx - ctx_len, kv_idx)

        q_len, kv_len = block_mask.seq_lengths
        return cls(mask, inner, (q_len, kv_len))

    def check(self) -> None:
        """Raise what a GPU has found wrong with the lists since, if it is known by now; waits for nothing."""
        if self._check is not None:
            self._check.look()

    @property
    def device(self) -> torch.device | None:
        """Device of the lists; None for those of a BlockMask."""
        return None if self._check is None else self._check.device

    def unmasked(self, score_mod: object = None, sink: object = None) -> Variant:
        """A variant of these hooks for calls that are given the lists and need no mask; remembered by their identity."""
        key = (id(score_mod), id(sink))
        if key not in self._variants:
            self._keep(key, Variant(score_mod=score_mod, sink=sink), (score_mod, sink))
        return self._variants[key][0]

    def variant(self, score_mod: object = None, mask_mod: object = None, sink: object = None) -> Variant:
        """These blocks as a variant, with other hooks; remembered by their identity."""
        key = (id(score_mod), id(mask_mod), id(sink))
        if key not in self._variants:
            if score_mod is None and mask_mod is None:  # nothing else reads positions: rows may be more than keys
                made = Variant(mask_mod=self.local_mask_mod, sink=sink, q_index="local")
            else:
                masks = self.mask_mod if mask_mod is None else and_masks(self.mask_mod, mask_mod)  # type: ignore[arg-type]
                made = Variant(score_mod=score_mod, mask_mod=masks, sink=sink)
            self._keep(key, made, (score_mod, mask_mod, sink))
        return self._variants[key][0]

    def _keep(self, key: tuple[int, ...], variant: Variant, hooks: object) -> None:
        """Remember a variant, and the hooks, which thereby keep their ids; hooks made for each call do not fill the table."""
        if len(self._variants) >= MAX_VARIANTS:
            self._variants.clear()
        self._variants[key] = variant, hooks


@between_graphs
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockSparse,
    *,
    score_mod: object = None,
    mask_mod: object = None,
    sink: object = None,
    scale: float | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the visible blocks; the other hooks are those of jitgen.attention, ``mask_mod`` narrows the blocks.

    Shapes:  as jitgen.attention; q_len and kv_len are those of ``blocks``, the same for all of the batch.
    Errors:  as jitgen.attention; ShapeMismatch for other lengths, and for lists that a GPU has found wrong.
    Cost:    as jitgen.attention, for the tiles that have visible blocks. On compute capability 9.0 lists of whole blocks are
             walked by the prefill kernel of serving, for one sequence and hooks that read no positions; it has a plan for
             each set of hooks, made on first use, which must not be inside of a CUDA graph's capture. torch.compile leaves
             its graph for the call; jitgen.attention with ``mask_mod=blocks.mask_mod`` is an operator of the graph.
    """
    if not isinstance(blocks, BlockSparse):
        raise VariantError(f"blocks is a {type(blocks).__name__}, expected a jitgen.BlockSparse.")
    if not all(isinstance(t, Tensor) and t.dim() == 4 for t in (q, k, v)):
        check_tensors(q, k, v)  # says which one is no tensor, or of another rank
    if (q.shape[-2], k.shape[-2]) != blocks.lengths:
        raise ShapeMismatch(
            f"q has {q.shape[-2]} rows and k {k.shape[-2]}, the blocks are those of q_len {blocks.lengths[0]} and kv_len "
            f"{blocks.lengths[1]}. Make blocks for these lengths."
        )
    if blocks.device not in (None, q.device):
        raise UnsupportedDevice(f"the blocks are on {blocks.device}, q is on {q.device}. Make them of lists on q's device.")
    if blocks.heads is not None and blocks.heads[1] != (q if blocks.heads[0] == "num_q_heads" else k).shape[1]:
        name, count = blocks.heads
        raise ShapeMismatch(
            f"the blocks have lists of {count} heads, q has {q.shape[1]} heads and k {k.shape[1]}. Expected {name}; "
            "BlockSparse.bsr has per_query_head=True for lists of query heads."
        )
    blocks.check()
    lists = blocks.lists if mask_mod is None else None
    if lists is not None:
        plain = blocks.unmasked(score_mod, sink)
        if lists.serve(q, k, v, plain.trace().program):
            if out is not None:
                check_out(out, q, v)
                check_apart(out, k=k, v=v)
            found, lse = lists.attend(q, k, v, plain, scale, out, return_lse)
            return (found, lse) if return_lse else found  # type: ignore[return-value]
    variant = blocks.variant(score_mod, mask_mod, sink)
    return attention(q, k, v, variant, scale=scale, return_lse=return_lse, out=out)


def check_out(out: Tensor, q: Tensor, v: Tensor) -> None:
    """``out=`` is what a call would have allocated."""
    check_is_tensor(out=out)
    shape = (*q.shape[:3], v.shape[3])
    if tuple(out.shape) != shape or out.dtype != q.dtype or out.device != q.device:
        raise ShapeMismatch(f"out has shape {tuple(out.shape)} of {out.dtype} on {out.device}, expected {shape} as q has them.")


# ---- blocks of one size -----------------------------------------------------------------------------------------------------


def bsr_tables(indptr: Tensor, indices: Tensor, num_columns: int, has_bits: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Class of each block and, with bits, its place in the list; and whether a list is none, or has a column that does not
    exist, or one twice.

    Shapes:  indptr [..., block rows + 1], indices [nnz]; returns uint8 and int32 [..., block rows, num_columns], and a bool.
    """
    shape = (*indptr.shape[:-1], indptr.shape[-1] - 1)
    begins, ends = indptr[..., :-1].reshape(-1).long(), indptr[..., 1:].reshape(-1).long()
    num_rows = begins.shape[0]
    listed = torch.arange(indices.shape[0], device=indices.device)
    row = torch.searchsorted(ends, listed, right=True)
    inside = row.clamp(max=num_rows - 1)
    used = (row < num_rows) & (listed >= begins[inside])
    wrong = used & ((indices < 0) | (indices >= num_columns))
    spare = num_rows * num_columns  # where entries go that are wrong or belong to no row
    place = torch.where(used & ~wrong, row * num_columns + indices.long(), spare)
    classes = torch.zeros(spare + 1, dtype=torch.uint8, device=indices.device)
    classes.scatter_(0, place, PARTIAL if has_bits else FULL)
    is_twice = classes[:-1].count_nonzero() != (used & ~wrong).sum()
    is_no_list = (begins > ends).any() | (begins < 0).any() | (ends > indices.shape[0]).any()
    slots = None
    if has_bits:
        slots = torch.zeros(spare + 1, dtype=torch.int32, device=indices.device).scatter_(0, place, listed.int())
        slots = slots[:-1].view(*shape, num_columns)
    return classes[:-1].view(*shape, num_columns), slots, wrong.any() | is_twice | is_no_list


def block_bits(
    mask: Tensor | None, packed_mask: Tensor | None, num_blocks: int, block_elements: int, device: torch.device
) -> Tensor | None:
    """Little-endian bits of all listed blocks, joined; None without a mask."""
    num_bits = num_blocks * block_elements
    num_bytes = -(-num_bits // 8)
    if packed_mask is not None:
        check_has_values(packed_mask=packed_mask)
        if packed_mask.numel() != num_bytes or packed_mask.dtype != torch.uint8:
            raise ShapeMismatch(
                f"packed_mask has {packed_mask.numel()} elements of {packed_mask.dtype}, expected {num_bytes} of uint8: "
                "packbits(mask, bitorder='little')."
            )
        return packed_mask.to(device)
    if mask is None:
        return None
    check_visible(mask=mask)
    if mask.numel() != num_bits:
        raise ShapeMismatch(f"mask has {mask.numel()} elements, expected {num_bits}: [{num_blocks}, rows, columns] of blocks.")
    bits = torch.nn.functional.pad(mask.to(device).reshape(-1).bool(), (0, -num_bits % 8))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=device)
    return (bits.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def block_mask_mod(
    classes: Tensor,
    slots: Tensor | None,
    bits: Tensor | None,
    rows: int,
    columns: int,
    *,
    per_query_head: bool = False,
    local: bool = False,
) -> Callable[..., Any]:
    """Mask of blocks of one size. ``local``: rows count from 0."""
    rows, columns = static(rows), static(columns)
    by_head = classes.dim() == 3

    def block_mask(b, h, q_idx, kv_idx, *, kv_h, ctx_len):  # type: ignore[no-untyped-def]
        row = q_idx if local else q_idx - ctx_len
        at = (row // rows, kv_idx // columns)
        if by_head:
            at = (h if per_query_head else kv_h, *at)
        kind = classes[at]
        if bits is None:
            return kind == FULL
        bit = slots[at] * (rows * columns) + row % rows * columns + kv_idx % columns
        return (kind == PARTIAL) & (((bits[bit >> 3] >> (bit & 7)) & 1) == 1)

    return block_mask


# ---- blocks of any sizes ----------------------------------------------------------------------------------------------------


def tile_classes(
    chosen: Tensor, row_sizes: Tensor, column_sizes: Tensor, q_len: int, kv_len: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def block_of(sizes: Tensor, length: int) -> Tensor:
    """Block that each of ``length`` positions lies in, int32 [heads, length]; blocks of size 0 hold none."""
    position = torch.arange(length, device=sizes.device).expand(sizes.shape[0], -1).contiguous()
    block = torch.searchsorted(sizes.long().cumsum(1), position, right=True)
    return block.clamp(max=sizes.shape[1] - 1).int()


def tile_parts(block: Tensor, num_blocks: int) -> Tensor:
    """How many positions of each tile lie in each block, float32 [heads, tiles, num_blocks]."""
    heads, length = block.shape
    tiles = -(-length // TILE)
    cell = torch.arange(length, device=block.device) // TILE * num_blocks + block.long()
    counts = torch.zeros(heads, tiles * num_blocks, device=block.device)
    return counts.scatter_add_(1, cell, torch.ones_like(cell, dtype=torch.float32)).view(heads, tiles, num_blocks)


def variable_mask_mod(
    classes: Tensor, chosen: Tensor, row_block: Tensor, column_block: Tensor, *, local: bool = False
) -> Callable[..., Any]:
    """Mask of blocks of any sizes. ``local`` as block_mask_mod."""
    tile = static(TILE)

    def variable_mask(b, h, q_idx, kv_idx, *, kv_h, ctx_len):  # type: ignore[no-untyped-def]
        row = q_idx if local else q_idx - ctx_len
        kind = classes[kv_h, row // tile, kv_idx // tile]
        return (kind == FULL) | ((kind == PARTIAL) & chosen[kv_h, row_block[kv_h, row], column_block[kv_h, kv_idx]])

    return variable_mask


# ---- checks -----------------------------------------------------------------------------------------------------------------


class LateCheck:
    """A condition that the device knows, raised once the host knows it too, without a wait on a GPU."""

    def __init__(self, failed: Tensor, message: str) -> None:
        self._message, self.device = message, failed.device
        self._event = None
        self._failed: Tensor | None = failed
        if failed.is_cuda:
            self._failed = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True).copy_(failed, non_blocking=True)
            self._event = record_event(failed.device)
        self.look()

    def look(self) -> None:
        """Raise ShapeMismatch if the condition is known to hold."""
        if self._failed is None:
            return
        if self._event is not None and (is_capturing(self.device) or not self._event.query()):
            return
        if bool(self._failed):
            raise ShapeMismatch(self._message)
        self._failed = None
