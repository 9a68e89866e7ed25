"""The hooks of one layer's call: the model's mask, soft cap, bias and sinks, and those of a variant on top of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from jitgen.errors import VariantError
from jitgen.masks import and_masks
from jitgen.signatures import HOOKS, POSITIONAL, signature_of
from jitgen.variant import Variant

Hook = Callable[..., Any]


def soft_cap(cap: float) -> Hook:
    """Logits squeezed into (-cap, cap)."""

    def capped(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return cap * torch.tanh(score / cap)

    return capped


def added(bias: torch.Tensor) -> Hook:
    """A bias for each logit.

    Shapes:  bias [batch, num_q_heads, q_len, kv_len]; rows count from 0.
    """

    def biased(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return score + bias[b, h, q_idx, kv_idx]

    return biased


def kept(mask: torch.Tensor) -> Hook:
    """A mask that was made as a tensor.

    Shapes:  mask bool [batch, num_q_heads, q_len, kv_len]; rows count from 0.
    """

    def is_kept(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return mask[b, h, q_idx, kv_idx]

    return is_kept


def in_one_sequence(first: torch.Tensor, end: torch.Tensor) -> Hook:
    """Packed sequences: a query sees the keys of its own.

    Shapes:  first and end int [q_len]: of the sequence that the query is in; rows count from 0.
    """

    def is_own(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return (kv_idx >= first[q_idx]) & (kv_idx < end[q_idx])

    return is_own


def up_to_row(window: int | None) -> Hook:
    """Causal, counting from the first row and key, with a window of so many keys."""

    def is_before(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return kv_idx <= q_idx

    def is_near(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return (kv_idx <= q_idx) & (kv_idx > q_idx - window)

    return is_before if window is None else is_near


def chained(score_mods: list[Hook]) -> Hook | None:
    """Score modifications one after the other."""
    if len(score_mods) < 2:
        return score_mods[0] if score_mods else None
    *others, last = score_mods
    inner = chained(others)
    names = context_of(last)

    def all_of_them(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return last(inner(score, b, h, q_idx, kv_idx), b, h, q_idx, kv_idx)  # type: ignore[misc]

    def with_context(score, b, h, q_idx, kv_idx, **context):  # type: ignore[no-untyped-def]
        return last(inner(score, b, h, q_idx, kv_idx), b, h, q_idx, kv_idx, **context)  # type: ignore[misc]

    return announcing(with_context, POSITIONAL["score_mod"], names) if names else all_of_them


def at_positions(kind: str, hook: Any, q_shift: Any, kv_shift: Any) -> Any:
    """A hook that is given positions, as one that is given the row and key numbers of a call."""
    if hook is None or kind in ("sink", "softmax"):
        return hook
    names = POSITIONAL[kind]
    shifts = {"q_idx": q_shift, "kv_idx": kv_shift}
    by_place = tuple((i, shifts[name]) for i, name in enumerate(names) if name in shifts and not is_zero(shifts[name]))
    if not by_place:
        return hook

    def moved(*values, **context):  # type: ignore[no-untyped-def]
        there = list(values)
        for place, shift in by_place:
            there[place] = there[place] + shift
        return hook(*there, **context)

    return announcing(moved, names, context_of(hook))


def is_zero(shift: Any) -> bool:
    """Whether this is the number 0; a tensor may be on a device that nobody should wait for."""
    return not isinstance(shift, torch.Tensor) and shift == 0


def context_of(hook: Any) -> tuple[str, ...]:
    """Keyword-only parameters that a hook asks for."""
    return signature_of(hook).context


def announcing(hook: Any, names: tuple[str, ...], context: tuple[str, ...]) -> Any:
    """A wrapper with the parameters of what it wraps."""
    kinds = inspect.Parameter
    positional = [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in names]
    hook.__signature__ = inspect.Signature([*positional, *(kinds(name, kinds.KEYWORD_ONLY) for name in context)])
    return hook


def combined(
    variant: Variant, masks: list[Hook], score_mods: list[Hook], sink: Any, q_shift: Any, kv_shift: Any
) -> Variant:
    """The variant of a call: the hooks of ``variant`` over positions, after the model's over row and key numbers.

    Errors:  VariantError.
    """
    hooks = {kind: at_positions(kind, getattr(variant, kind), q_shift, kv_shift) for kind in HOOKS}
    if sink is not None:
        if hooks["sink"] is not None:
            raise VariantError("the model's layer has sinks (s_aux), and the variant has a sink. Leave one of them out.")
        hooks["sink"] = sink
    if hooks["mask_mod"] is not None:
        masks = [*masks, hooks["mask_mod"]]
    if hooks["score_mod"] is not None:
        score_mods = [*score_mods, hooks["score_mod"]]
    hooks["mask_mod"] = one_mask(masks)
    hooks["score_mod"] = chained(score_mods)
    made: Variant = Variant.made_of(tuple(hooks.values()), variant.parts[1], None)
    return made


def one_mask(masks: list[Hook]) -> Hook | None:
    """What keeps what all masks keep."""
    if len(masks) < 2:
        return masks[0] if masks else None
    found: Hook = and_masks(*masks)
    return found
