"""jitgen.flex_attention: FlexAttention's signature and conventions over jitgen's kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.compiler import is_compiling

from jitgen.checks import check_tensors, is_traced
from jitgen.dense import run
from jitgen.errors import InvalidType, ShapeMismatch, VariantError
from jitgen.variant import Variant, resolve

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask

BLOCK_NONE, BLOCK_PARTIAL, BLOCK_FULL = 0, 1, 2


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., object] | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, object] | None = None,
    *,
    return_aux: AuxRequest | None = None,
    mask_mod: Callable[..., object] | None = None,
) -> object:
    """Attention with a score modification and a mask, called as torch.nn.attention.flex_attention.flex_attention is.

    Calling it directly is the normal case; under torch.compile it is one opaque operator, wherever the hooks are made, and what
    they capture is an input of it. ``mask_mod`` may be given without a BlockMask: tiles that it excludes are skipped all the
    same. Of ``kernel_options`` only ``"FAMILY"`` is read (``"sm80"``, ``"sm90"``); tile sizes of other back ends are ignored.

    Shapes:  query [batch, num_q_heads, q_len, head_dim]; key [batch, num_kv_heads, kv_len, head_dim]; value [batch,
             num_kv_heads, kv_len, head_dim_v]; returns [batch, num_q_heads, q_len, head_dim_v], then the logsumexp
             [batch, num_q_heads, q_len] when return_lse, or an AuxOutput when return_aux is given.
    Units:   q_idx counts query rows from 0, whatever kv_len is; scale default 1/sqrt(head_dim); natural logarithm.
    Errors:  as jitgen.attention; ShapeMismatch when num_kv_heads differs without enable_gqa, or block_mask has other lengths.
    Cost:    as jitgen.attention; a BlockMask is turned into a table of block classes once per object, under torch.compile in
             every call.
    """
    if return_aux is not None and not hasattr(return_aux, "max_scores"):
        raise InvalidType(f"return_aux is {return_aux!r} of type {type(return_aux).__name__}, expected torch's AuxRequest.")
    if kernel_options is not None and not isinstance(kernel_options, dict):
        raise InvalidType(f"kernel_options is a {type(kernel_options).__name__}, expected a dict of names.")
    if return_aux is not None and return_aux.max_scores:
        raise VariantError("return_aux asks for max_scores, which jitgen's kernels do not keep. Ask for lse only.")
    if return_aux is not None and return_lse:
        raise VariantError("return_lse and return_aux were both given. Use return_aux=AuxRequest(lse=True) alone.")
    try:
        heads_differ = query.dim() == key.dim() == 4 and query.size(1) != key.size(1)
    except AttributeError:
        check_tensors(query, key, value)  # says which one is no tensor
        raise
    if heads_differ and not enable_gqa:
        remedy = "Pass enable_gqa=True for grouped-query attention."
        if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
            remedy = "Is the layout [batch, heads, length, head_dim]?"
        raise ShapeMismatch(f"key has {key.shape[1]} heads, query has {query.shape[1]} (axis 1). {remedy}")
    want_lse = return_lse or (return_aux is not None and return_aux.lse)
    mask = mask_mod if block_mask is None else mask_of(block_mask, mask_mod, query, key)
    family = str(kernel_options["FAMILY"]).lower() if kernel_options and "FAMILY" in kernel_options else None
    if is_compiling() and is_traced(query):
        from jitgen.op import call_op

        out, lse = call_op(
            query, key, value, None, score_mod, mask, convention="flex", scale=scale, want_lse=want_lse, family=family
        )
    else:
        out, lse = eager(query, key, value, score_mod, mask, scale, want_lse, family)
    if return_aux is not None:
        from torch.nn.attention.flex_attention import AuxOutput

        return out, AuxOutput(lse=lse)
    return (out, lse) if return_lse else out


def eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: object,
    mask_mod: object,
    scale: float | None,
    want_lse: bool,
    family: str | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The call without torch.compile."""
    if isinstance(score_mod, Variant):
        if mask_mod is not None:
            raise VariantError("a Variant and a mask were both given. Put the mask into the Variant.")
        program, values = score_mod.resolve()
        local = score_mod.q_index != "absolute"
    else:
        program, values = resolve(score_mod, mask_mod)
        local = True
    return run(program, values, query, key, value, scale=scale, local=local, want_lse=want_lse, family=family)


# ---- BlockMask ----------------------------------------------------------------------------------------------------------

_masks: dict[int, tuple[weakref.ref[object], Callable[..., object]]] = {}


def mask_of(block_mask: BlockMask, extra: Callable[..., object] | None, query: torch.Tensor, key: torch.Tensor) -> object:
    """The mask function that a BlockMask stands for: its blocks, its mask_mod inside partial blocks, and ``extra``."""
    if not hasattr(block_mask, "kv_num_blocks"):
        shown = f"a tensor of shape {tuple(block_mask.shape)}" if isinstance(block_mask, torch.Tensor) else repr(block_mask)
        raise VariantError(f"block_mask is {shown}, expected a BlockMask of create_block_mask. A function goes to mask_mod=.")
    q_len, kv_len = block_mask.seq_lengths
    if query.shape[-2:-1] + key.shape[-2:-1] != (q_len, kv_len) and max(block_mask.BLOCK_SIZE) < 1 << 30:
        raise ShapeMismatch(
            f"block_mask was made for q_len {q_len} and kv_len {kv_len}, the inputs have {query.shape[-2]} and "
            f"{key.shape[-2]}. "
            "Create it for these lengths, or pass mask_mod= and no block_mask: it serves every length."
        )
    if block_mask.kv_num_blocks.device != query.device:
        raise ShapeMismatch(
            f"block_mask is on {block_mask.kv_num_blocks.device}, query is on {query.device}. Use block_mask.to(...)."
        )
    is_in_graph = is_compiling() and is_traced(query)
    entry = None if is_in_graph else _masks.get(id(block_mask))
    if is_in_graph:  # the mask may be made in the compiled function, of which there is no object to remember
        mask = block_mask_function(block_mask)
    elif entry is None or entry[0]() is not block_mask:
        ident = id(block_mask)
        mask = block_mask_function(block_mask)
        _masks[ident] = (weakref.ref(block_mask, lambda _: _masks.pop(ident, None)), mask)
    else:
        mask = entry[1]
    if extra is None:
        return mask
    from jitgen.masks import and_masks

    return and_masks(mask, extra)


def block_mask_function(block_mask: BlockMask) -> Callable[..., object]:
    """A mask_mod over the table of block classes; tracing and interval analysis treat it like any other mask."""
    from jitgen.masks import static

    classes = block_classes(block_mask)
    q_block, kv_block = (static(size) for size in block_mask.BLOCK_SIZE)
    inner = block_mask.mask_mod
    has_batch, has_heads = classes.shape[0] > 1, classes.shape[1] > 1

    def block_mask_mod(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        kind = classes[b if has_batch else 0, h if has_heads else 0, q_idx // q_block, kv_idx // kv_block]
        return (kind == BLOCK_FULL) | ((kind == BLOCK_PARTIAL) & inner(b, h, q_idx, kv_idx))

    return block_mask_mod


def block_classes(block_mask: BlockMask) -> torch.Tensor:
    """Class of every block.

    Shapes:  uint8 [batch or 1, heads or 1, q_blocks, kv_blocks] of BLOCK_NONE, BLOCK_PARTIAL or BLOCK_FULL.
    """
    indices = block_mask.kv_indices
    num_kv_blocks = indices.shape[-1]
    table = torch.zeros((*indices.shape[:-1], num_kv_blocks + 1), dtype=torch.uint8, device=indices.device)
    position = torch.arange(num_kv_blocks, device=indices.device)
    lists = [(block_mask.kv_num_blocks, indices, BLOCK_PARTIAL)]
    if block_mask.full_kv_num_blocks is not None:
        lists.append((block_mask.full_kv_num_blocks, block_mask.full_kv_indices, BLOCK_FULL))
    for counts, listed, kind in lists:
        target = torch.where(position < counts[..., None], listed, num_kv_blocks)  # unused entries go to the spare column
        table.scatter_(-1, target.long(), kind)
    return table[..., :num_kv_blocks].contiguous()
