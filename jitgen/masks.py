"""Combining masks, and declarations about captured values."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from jitgen.captures import SortedTensor
from jitgen.errors import VariantError
from jitgen.signatures import signature_of

Mask = Callable[..., Any]


def and_masks(*mask_mods: Mask) -> Mask:
    """A mask that keeps what every one of ``mask_mods`` keeps."""
    if is_dynamo_compiling() and not _any_asks_for_context(mask_mods):

        def kept_by_all(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
            result = mask_mods[0](b, h, q_idx, kv_idx)
            for mask in mask_mods[1:]:
                result = result & mask(b, h, q_idx, kv_idx)
            return result

        return kept_by_all
    parts = _with_context("and_masks", mask_mods)

    def all_masks(b, h, q_idx, kv_idx, **context):  # type: ignore[no-untyped-def]
        result = None
        for mask, names in parts:
            kept = mask(b, h, q_idx, kv_idx, **{n: context[n] for n in names})
            result = kept if result is None else result & kept
        return result

    return _with_signature(all_masks, parts)


def or_masks(*mask_mods: Mask) -> Mask:
    """A mask that keeps what at least one of ``mask_mods`` keeps."""
    if is_dynamo_compiling() and not _any_asks_for_context(mask_mods):

        def kept_by_any(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
            result = mask_mods[0](b, h, q_idx, kv_idx)
            for mask in mask_mods[1:]:
                result = result | mask(b, h, q_idx, kv_idx)
            return result

        return kept_by_any
    parts = _with_context("or_masks", mask_mods)

    def any_mask(b, h, q_idx, kv_idx, **context):  # type: ignore[no-untyped-def]
        result = None
        for mask, names in parts:
            kept = mask(b, h, q_idx, kv_idx, **{n: context[n] for n in names})
            result = kept if result is None else result | kept
        return result

    return _with_signature(any_mask, parts)


def _any_asks_for_context(mask_mods: tuple[Mask, ...]) -> bool:
    """Whether the signatures must be looked into, as Dynamo cannot, and not the code alone."""
    if len(mask_mods) == 0:
        return True
    return any(not hasattr(mask, "__code__") or mask.__code__.co_kwonlyargcount > 0 for mask in mask_mods)


Parts = tuple[tuple[Mask, tuple[str, ...]], ...]


def _with_context(caller: str, mask_mods: tuple[Mask, ...]) -> Parts:
    """Each mask with the names of its keyword-only parameters, which the combination must pass on."""
    if not mask_mods:
        raise VariantError(f"{caller} got no mask. Pass at least one mask_mod.")
    for mask in mask_mods:
        if not callable(mask):
            raise VariantError(
                f"{caller} got {mask!r} of type {type(mask).__name__}, expected functions (b, h, q_idx, kv_idx)."
            )
    return tuple((mask, signature_of(mask).context) for mask in mask_mods)


def _with_signature(combined: Mask, parts: Parts) -> Mask:
    """Announce the context that the parts ask for, in place of ``**context``."""
    names = dict.fromkeys(name for _, wanted in parts for name in wanted)
    if not names:
        return combined
    positional = list(inspect.signature(combined).parameters.values())[:4]
    keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    combined.__signature__ = inspect.Signature([*positional, *keywords])  # type: ignore[attr-defined]
    return combined


class StaticInt(int):
    """An int that is compiled in."""


class StaticFloat(float):
    """A float that is compiled in."""


def static(value: bool | int | float) -> bool | int | float:
    """A captured number that is compiled into the kernel instead of being a launch argument.

    It lets the compiler fold it, at the price of one kernel for each value. Inside of torch.compile the number stays as it is,
    which is a launch argument.
    """
    if isinstance(value, bool) or is_dynamo_compiling():
        return value
    if isinstance(value, int):
        return StaticInt(value)
    if isinstance(value, float):
        return StaticFloat(value)
    raise VariantError(f"static got {value!r} of type {type(value).__name__}, expected a bool, int or float.")


def sorted(t: torch.Tensor) -> torch.Tensor:
    """Declare that a captured tensor ascends, such as the document number of each position.

    Tiles of a mask that compares it are then bounded by its ends. The declaration holds for this object, not for what is
    computed from it; writing to the tensor so that it no longer ascends makes masks over it wrong.

    Shapes:  t [n], integer.
    Errors:  VariantError if t is not of rank 1, not of integers, or does not ascend.
    Cost:    one pass over t, and a wait for its device.
    """
    if not isinstance(t, torch.Tensor) or t.dim() != 1 or t.is_floating_point() or t.is_complex():
        what = f"a tensor of shape {tuple(t.shape)} and dtype {t.dtype}" if isinstance(t, torch.Tensor) else repr(t)
        raise VariantError(f"sorted got {what}, expected an integer tensor of rank 1.")
    falls = (t[1:] < t[:-1]).nonzero()
    if len(falls):
        at = int(falls[0]) + 1
        raise VariantError(
            f"sorted got a tensor that falls from {t[at - 1].item()} to {t[at].item()} at index {at}. Sort it first."
        )
    return SortedTensor.of(t)
