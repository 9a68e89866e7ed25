"""Attention of one layer of a model, in the form in which transformers calls it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_compiling

from jitgen.api import attention
from jitgen.compat.transformers._hooks import (
    Hook,
    added,
    chained,
    combined,
    in_one_sequence,
    kept,
    one_mask,
    soft_cap,
    up_to_row,
)
from jitgen.compat.transformers._mask import ModelMask, padding_hook
from jitgen.errors import InvalidType, ShapeMismatch, UnsupportedOption
from jitgen.variant import Variant

REFUSED = {
    "head_mask": "Weigh heads in a variant: register(..., variant=jitgen.Variant(output_transform=...)).",
    "layer_head_mask": "Weigh heads in a variant: register(..., variant=jitgen.Variant(output_transform=...)).",
    "cross_attn_head_mask": "Weigh heads in a variant: register(..., variant=jitgen.Variant(output_transform=...)).",
    "sinks": "jitgen's sinks are one number a head. Use attn_implementation='eager' for this model.",
    "block_indices": "Use attn_implementation='eager' or 'sdpa' for this model, whose blocks are chosen for each query.",
    "block_table": "Continuous batching takes implementations of its own list only. Use model.generate, or jitgen.Plan.",
}


class Attention:
    """What is registered under a name: the call of a layer, with a variant that may depend on the layer."""

    def __init__(self, for_layer: Callable[[torch.nn.Module], Variant | None], replace_mask: bool) -> None:
        self.for_layer, self.replace_mask = for_layer, replace_mask

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: ModelMask | torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        indices: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """One layer's attention.

        Shapes:  query [batch, num_q_heads, q_len, head_dim], key and value [batch, num_kv_heads, kv_len, head_dim(_v)];
                 position_bias [batch or 1, num_q_heads or 1, q_len, kv_len]; s_aux [num_q_heads]; indices, the keys that a
                 query may see, [batch, q_len, n]; cu_seq_lens_q and cu_seq_lens_k, first rows and keys of packed sequences and
                 the end of the last; returns [batch, q_len, num_q_heads, head_dim_v] and, where others have weights, None.
        """
        check_options(dropout, others)
        query, key, value = as_one_dtype(query, key, value)
        variant = self.for_layer(module)
        given = ModelHooks(query, key)
        if softcap is not None:
            given.score_mods.append(soft_cap(softcap))
        if position_bias is not None:
            given.add_bias("position_bias", position_bias)
        if indices is not None:
            given.add_chosen(indices)
        if cu_seq_lens_q is not None:
            given.add_packed(cu_seq_lens_q, cu_seq_lens_k)
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        window = sliding_window if is_causal else None
        given.add_mask(attention_mask, is_causal, window, replaced=self.replace_mask and variant is not None)
        return call(given, value, variant, s_aux, query.shape[3] ** -0.5 if scaling is None else scaling), None


class ModelHooks:
    """What a model asks of a call, as hooks over the call's row and key numbers."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor) -> None:
        self.query, self.key = query, key
        self.masks: list[Hook] = []
        self.score_mods: list[Hook] = []
        self.local = False  # rows are counted from 0, and not so that the last is the last key
        self.shifts: tuple[Any, Any] = (0, 0)  # what makes positions of row and key numbers

    def add_bias(self, name: str, bias: torch.Tensor) -> None:
        """Numbers that are added to logits."""
        self.local = True
        self.score_mods.append(added(everywhere(name, bias, self.query, self.key)))

    def add_chosen(self, indices: torch.Tensor) -> None:
        """The keys that each query may see, by number."""
        self.local = True
        self.masks.append(kept(chosen(indices, self.query, self.key)))

    def add_packed(self, starts_q: torch.Tensor, starts_k: torch.Tensor | None) -> None:
        """Packed sequences, by their first rows and keys."""
        self.local = True
        self.masks.append(in_one_sequence(*packed(starts_q, starts_k, self.query, self.key)))

    def add_mask(self, mask: Any, is_causal: bool, window: int | None, *, replaced: bool) -> None:
        """The mask of the model; ``replaced``: what only padding and unwritten cache are left of."""
        if isinstance(mask, ModelMask):
            mask = mask.to(self.query.device)
            check_lengths(mask, self.query, self.key)
            self.local = self.local or not mask.is_aligned
            hook, self.shifts = mask.hook(local=self.local, replaced=replaced), mask.shifts(self.local)
            self.masks += [] if hook is None else [hook]
            return
        self.local = True
        if mask is not None:
            self.add_tensor_mask(mask)
        elif is_causal and not replaced and self.query.shape[2] > 1:
            self.masks.append(up_to_row(window))

    def add_tensor_mask(self, mask: Any) -> None:
        """A mask that the model, or its user, made as a tensor: of truths, of what is added to logits, or of padding.

        Shapes:  mask [batch or 1, num_q_heads or 1, q_len or 1, kv_len or more], or [batch, kv_len] with 0 at padding.
        Errors:  ShapeMismatch, InvalidType.
        """
        if not isinstance(mask, torch.Tensor):
            raise InvalidType(
                f"the mask is a {type(mask).__name__}, expected a tensor or what transformers makes for this implementation. "
                "Give the function of a BlockMask as and_mask_function of create_causal_mask."
            )
        kv_len = self.key.shape[2]
        if mask.dim() == 2:
            hook = padding_hook(mask.bool(), kv_len, 0)
            self.masks += [] if hook is None else [hook]
        elif mask.dtype == torch.bool:
            self.masks.append(kept(everywhere("attention_mask", mask[..., :kv_len], self.query, self.key)))
        else:
            self.add_bias("attention_mask", mask[..., :kv_len])


def call(given: ModelHooks, value: torch.Tensor, variant: Variant | None, sink: Any, scale: float) -> torch.Tensor:
    """The call of jitgen.attention, of a layer that asks for ``given``.

    Shapes:  returns [batch, q_len, num_q_heads, head_dim_v].
    """
    q_index = "local" if given.local else "absolute"
    head_dim_v = value.shape[3]
    query, key, value = with_padded_heads(given.query, given.key, value, variant)
    if variant is None:
        out = attention(
            query, key, value, score_mod=chained(given.score_mods), mask_mod=one_mask(given.masks), sink=sink, scale=scale,
            q_index=q_index,
        )  # fmt: skip
    else:
        variant = combined(variant, given.masks, given.score_mods, sink, *given.shifts)
        out = attention(query, key, value, variant, scale=scale, q_index=q_index)
    return out[..., :head_dim_v].transpose(1, 2).contiguous()  # type: ignore[index]


def check_options(dropout: float, others: dict[str, Any]) -> None:
    """Refuse what would change the result and is not computed.

    Errors:  UnsupportedOption.
    """
    if dropout:
        raise UnsupportedOption(
            f"dropout={dropout} of the attention weights was asked for, as in training, and jitgen is for inference. "
            "Call model.eval(), or set the attention dropout of the model's config to 0."
        )
    if others.get("output_attentions"):
        raise UnsupportedOption(
            "output_attentions=True asks for the attention weights, which jitgen does not keep. "
            "Use model.set_attn_implementation('eager') to see them."
        )
    for name, remedy in REFUSED.items():
        if others.get(name) is not None:
            raise UnsupportedOption(f"{name} was given, which attn_implementation='jitgen' does not take. {remedy}")


def as_one_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In autocast, what it computes attention in; else the tensors as they are."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple([t.to(dtype) for t in tensors])


def check_lengths(mask: ModelMask, query: torch.Tensor, key: torch.Tensor) -> None:
    """A mask is for the lengths of the call.

    Errors:  ShapeMismatch.
    """
    if query.shape[2] != mask.q_length or key.shape[2] != mask.kv_length:
        raise ShapeMismatch(
            f"the mask was made for {mask.q_length} query rows and {mask.kv_length} keys, and the layer has {query.shape[2]} "
            f"and {key.shape[2]}. Make the mask for the cache and the inputs that the layer sees."
        )


def everywhere(name: str, t: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A tensor over all logits, broadcast.

    Errors:  ShapeMismatch.
    """
    wanted = (*query.shape[:3], key.shape[2])
    if t.dim() != 4 or any(have not in (1, want) for have, want in zip(t.shape, wanted, strict=True)):
        raise ShapeMismatch(f"{name} has shape {tuple(t.shape)}, expected one that broadcasts to {tuple(wanted)}.")
    return t.expand(wanted)


def chosen(indices: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Keys that were chosen for each query, by number, as a mask.

    Shapes:  indices int [batch, q_len, n]; returns bool [batch, num_q_heads, q_len, kv_len], broadcast over the heads.
    """
    batch, heads, q_len, _ = query.shape
    mask = torch.zeros(batch, q_len, key.shape[2], dtype=torch.bool, device=query.device)
    return mask.scatter_(2, indices.long(), True)[:, None].expand(batch, heads, q_len, key.shape[2])


_packed: list[tuple[Any, ...]] = []  # of the last packed sequences: the tensors, by weak references, and what came of them


def packed(
    starts_q: torch.Tensor, starts_k: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """First key and end of the keys of the sequence that each query is in.

    Errors:  ShapeMismatch.
    """
    if query.shape[0] != 1:
        raise ShapeMismatch(
            f"cu_seq_lens_q was given for packed sequences, and the batch is {query.shape[0]}, expected 1. Pack all in one row."
        )
    starts_k = starts_q if starts_k is None else starts_k
    asked = (starts_q, starts_k)
    if not is_compiling() and _packed:
        references, versions, length, found = _packed[0]
        same = all(reference() is t for reference, t in zip(references, asked, strict=True))
        if same and versions == [t._version for t in asked] and length == query.shape[2]:
            return found  # type: ignore[no-any-return]
    row = torch.arange(query.shape[2], device=query.device)
    at = torch.searchsorted(starts_q.to(row), row, right=True)
    bounds = starts_k.to(row)
    found = bounds[at - 1], bounds[at.clamp(max=len(bounds) - 1)]
    if not is_compiling():
        _packed[:] = [(tuple(map(weakref.ref, asked)), [t._version for t in asked], query.shape[2], found)]
    return found


def with_padded_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, variant: Variant | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Head dims as multiples of 8, by zeros, which change no logit.

    Errors:  ShapeMismatch.
    """
    missing, missing_v = -query.shape[3] % 8, -value.shape[3] % 8
    if missing == 0 and missing_v == 0:
        return query, key, value
    rows = ("output_transform", "q_transform", "k_transform", "v_transform")
    if variant is not None and any(getattr(variant, kind) is not None for kind in rows):
        raise ShapeMismatch(
            f"head dims are {query.shape[3]} and {value.shape[3]}, no multiples of 8, and the variant transforms whole rows, "
            "which would see zeros behind them. Leave transforms of rows out for this model."
        )
    pad = torch.nn.functional.pad
    return pad(query, (0, missing)), pad(key, (0, missing)), pad(value, (0, missing_v))
