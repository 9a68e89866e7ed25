"""Merging of attention states."""

from __future__ import annotations

import torch

from jitgen import serving_merge as native
from jitgen.errors import ShapeMismatch

State = tuple[torch.Tensor, torch.Tensor]


def merge_state(v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor) -> State:
    """Attention over the union of two sets of keys, from the attention over each.

    Shapes:  v [n, num_heads, head_dim]; s [n, num_heads], any float dtype; returns v in the dtype of v_a and float32 s.
    Units:   s is a logsumexp of base 2, -inf for no key; a state without keys leaves the other as it is, whatever its v holds.
    Errors:  ShapeMismatch.
    Cost:    one kernel for 16-bit outputs on a GPU, else torch operations; no wait.
    """
    check_states((v_a, s_a), (v_b, s_b))
    return native.merge_state(v_a, s_a.float(), v_b.to(v_a.dtype), s_b.float(), base=2)


def merge_state_in_place(
    v: torch.Tensor,
    s: torch.Tensor,
    v_other: torch.Tensor,
    s_other: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> None:
    """merge_state written back to ``v`` and ``s``, whatever their dtypes; rows where ``mask`` [n] is False stay as they are."""
    values, logs = merge_state(v, s, v_other, s_other)
    if mask is not None:
        values = torch.where(mask.bool()[:, None, None], values, v)
        logs = torch.where(mask.bool()[:, None], logs, s.float())
    v.copy_(values)
    s.copy_(logs)


def merge_states(v: torch.Tensor, s: torch.Tensor) -> State:
    """Attention over the union of several sets of keys, from the attention over each.

    Shapes:  v [n, states, num_heads, head_dim]; s [n, states, num_heads]; returns v [n, num_heads, head_dim] in the dtype of v
             and float32 s [n, num_heads].
    Units:   s is a logsumexp of base 2.
    """
    return native.merge_states(v, s.float(), base=2)


def check_states(a: State, b: State) -> None:
    """Two states have the same rows, heads and head dim."""
    for name, (v, s) in (("a", a), ("b", b)):
        if v.dim() != 3 or s.shape != v.shape[:2]:
            raise ShapeMismatch(
                f"state {name} has v {tuple(v.shape)} and s {tuple(s.shape)}, expected [n, heads, dim] and [n, heads]."
            )
    if a[0].shape != b[0].shape:
        raise ShapeMismatch(f"the states have shapes {tuple(a[0].shape)} and {tuple(b[0].shape)}. Both must match.")
