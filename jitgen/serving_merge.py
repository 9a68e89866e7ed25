"""Merging attention over parts of the keys: results with their logsumexps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from jitgen.checks import check_is_tensor
from jitgen.errors import ShapeMismatch, UnsupportedDtype

Tensor = torch.Tensor
BASES = {"e": 1.0, 2: math.log(2.0)}  # what turns a logsumexp of that base into a natural one


def merge_states(
    outs: Tensor | Sequence[Tensor], lses: Tensor | Sequence[Tensor], *, base: str | int = "e"
) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over each of several parts of them.

    A part that saw no key has logsumexp -inf and is left out, whatever its output holds.

    Shapes:  outs [rows, states, heads, head_dim_v]; lses [rows, states, heads] float32; or both lists of states, without that
             axis; returns [rows, heads, head_dim_v] in outs's dtype and [rows, heads] float32.
    Units:   logsumexps of base 'e', as jitgen returns them, or 2, as FlashInfer does; the result has the same base.
    Errors:  InvalidType, ShapeMismatch, UnsupportedDtype.
    Cost:    a few torch operations, float32 throughout.
    """
    outs, lses = _stacked("outs", outs), _stacked("lses", lses)
    _check(outs, lses, base, 4)
    weights = lses * BASES[base]
    merged = weights.logsumexp(1)
    empty = merged == -math.inf
    weights = torch.exp(weights - torch.where(empty, 0.0, merged)[:, None])
    kept = torch.where((weights > 0)[..., None], outs.float(), 0.0)
    return (kept * weights[..., None]).sum(1).to(outs.dtype), merged / BASES[base]


def merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, base: str | int = "e") -> tuple[Tensor, Tensor]:
    """Attention over the keys of two parts, as ``merge_states``.

    Shapes:  out_a, out_b [rows, heads, head_dim_v]; lse_a, lse_b [rows, heads] float32; returns the same.
    Units:   as merge_states.
    Errors:  ShapeMismatch, UnsupportedDtype.
    Cost:    as merge_states.
    """
    check_is_tensor(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape:
        raise ShapeMismatch(
            f"the parts have outputs of shapes {tuple(out_a.shape)} and {tuple(out_b.shape)}, logsumexps of shapes "
            f"{tuple(lse_a.shape)} and {tuple(lse_b.shape)}. They must match."
        )
    return merge_states(torch.stack([out_a, out_b], 1), torch.stack([lse_a, lse_b], 1), base=base)


def _stacked(name: str, states: Tensor | Sequence[Tensor]) -> Tensor:
    """The states along axis 1."""
    if isinstance(states, Tensor):
        return states
    for i, t in enumerate(states):
        check_is_tensor(**{f"{name}[{i}]": t})
    shapes = [tuple(t.shape) for t in states]
    if not shapes or any(s != shapes[0] for s in shapes):
        raise ShapeMismatch(f"{name} has states of shapes {shapes}, expected one state at least, and all alike.")
    return torch.stack(tuple(states), 1)


def _check(outs: Tensor, lses: Tensor, base: str | int, rank: int) -> None:
    if base not in BASES:
        raise ShapeMismatch(f"base={base!r} is not a base of logsumexps. Use 'e' or 2.")
    if outs.dim() != rank or outs.shape[:-1] != lses.shape:
        raise ShapeMismatch(
            f"outs has shape {tuple(outs.shape)}, lses {tuple(lses.shape)}, expected [rows, states, heads, head_dim_v] and "
            "[rows, states, heads]."
        )
    if lses.dtype != torch.float32:
        raise UnsupportedDtype(f"lses has dtype {str(lses.dtype).removeprefix('torch.')}, expected float32.")
