"""Variants that a manifest names: a user's by import path, common ones by a name of their own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from jitgen.errors import ManifestError, VariantError
from jitgen.masks import sorted as declare_sorted
from jitgen.program import ELEMENT_TO_IR, Program
from jitgen.show_target import load_variant
from jitgen.variant import Variant


def causal(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
    return kv_idx <= q_idx


def causal_window(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
    return (kv_idx <= q_idx) & (q_idx - kv_idx < window)


def softcap(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
    return cap * torch.tanh(score / cap)


def alibi(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
    return score + slopes[h] * (kv_idx - q_idx)


# What the functions above capture: only the types count.
window, cap, slopes = 256, 50.0, torch.zeros(2)

BUILT_IN: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask_mod": causal},
    "causal_window": {"mask_mod": causal_window},
    "softcap": {"score_mod": softcap},
    "softcap_causal": {"score_mod": softcap, "mask_mod": causal},
    "softcap_causal_window": {"score_mod": softcap, "mask_mod": causal_window},
    "alibi_causal": {"score_mod": alibi, "mask_mod": causal},
}


def program_of(name: str, captures: Mapping[str, Any], folder: Path) -> Program:
    """The traced program of a variant; the types of what it captures now, or of `captures`, are compiled in.

    Errors:  ManifestError, UnsupportedVariant.
    """
    try:
        variant = _variant(name, folder)
        if captures:
            variant = variant.bind(**{capture: _stand_in(capture, kind) for capture, kind in captures.items()})
        return variant.trace().program
    except VariantError as error:
        raise ManifestError(f"variant = {name!r}: {error}") from error
    except NameError as error:
        raise ManifestError(f"variant = {name!r} cannot be traced: {error}. Define it in its module.") from error


def _variant(name: str, folder: Path) -> Variant:
    where, colon, attribute = name.rpartition(":")
    if not colon:
        if name not in BUILT_IN:
            raise ManifestError(f"variant = {name!r} is neither module:name nor one of {', '.join(BUILT_IN)}.")
        return Variant(**BUILT_IN[name])
    if where.endswith(".py"):
        return load_variant(f"{folder / where}:{attribute}")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return load_variant(name)


def _stand_in(name: str, kind: Any) -> object:
    """A value of the type that a manifest declares: a number as it is, or a contiguous tensor."""
    if isinstance(kind, (bool, int, float)):
        return kind
    allowed = {"dtype", "rank", "sorted"}
    if not isinstance(kind, Mapping) or "dtype" not in kind or not set(kind) <= allowed:
        raise ManifestError(f'captures.{name} = {kind!r}: write a number or {{ dtype = "float32", rank = 1 }}.')
    rank = kind.get("rank", 1)
    if kind["dtype"] not in ELEMENT_TO_IR or not isinstance(rank, int) or not 0 <= rank <= 4:
        expected = f"a dtype of {', '.join(ELEMENT_TO_IR)} and a rank up to 4"
        raise ManifestError(f"captures.{name}: expected {expected}, got {kind!r}.")
    tensor = torch.zeros([2] * rank, dtype=getattr(torch, kind["dtype"]))
    return declare_sorted(tensor) if kind.get("sorted") else tensor
