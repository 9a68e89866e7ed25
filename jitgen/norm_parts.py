"""The meaning of a jitgen.OnlineNorm: a run of update over keys, joining runs by merge, and the end of a row, with torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch

from jitgen.evaluate import evaluate
from jitgen.program import NormProgram

Tensor = torch.Tensor
Part = tuple[Tensor, dict[str, Tensor]]  # O of rows, not finalized, and their states


def run_keys(norm: NormProgram, values: Sequence[Any], logits: Tensor, v: Tensor, leaves: Mapping[str, Tensor]) -> Part:
    """The keys of ``logits`` [..., rows, keys] as one tile; -inf are excluded ones."""
    keep, rows = logits != -torch.inf, (*logits.shape[:-1], 1)
    state = {n: logits.new_full(rows, start) for n, start in zip(norm.state_names, norm.state_init, strict=True)}
    seen = {**leaves, **state, "score": logits}

    def over_row(e: Any) -> Tensor:
        return evaluate(e, values, seen, keep=keep, reverse=norm.order == "reverse").to(logits.dtype)

    weights = torch.where(keep, over_row(norm.weight).expand(logits.shape), torch.zeros_like(logits))
    if logits.shape[-1]:
        state = {n: over_row(e).expand(rows) for n, e in zip(norm.state_names, norm.next_state, strict=True)}
    return weights @ v, state


def run_parts(
    norm: NormProgram, values: Sequence[Any], logits: Tensor, v: Tensor, leaves: Mapping[str, Tensor], part: int
) -> Part:
    """The same keys in runs of ``part``, joined in the order in which the norm visits keys."""
    starts = range(0, max(logits.shape[-1], 1), part)
    runs = [run_keys(norm, values, logits[..., at : at + part], v[..., at : at + part, :], leaves) for at in starts]
    return join(norm, values, runs[::-1] if norm.order == "reverse" else runs)


def join(norm: NormProgram, values: Sequence[Any], parts: Sequence[Part]) -> Part:
    """One part of several, which are given in the order of visits."""

    def merge(a: Part, b: Part) -> Part:
        (o_a, state_a), (o_b, state_b) = a, b
        seen = {f"{side}.{n}": x for side, state in (("a", state_a), ("b", state_b)) for n, x in state.items()}
        seen = seen or {"o": o_a}  # of a norm without state: the dtype
        *state, scale_a, scale_b = (evaluate(e, values, seen).to(o_a.dtype) for e in norm.merge)
        shape = (*o_a.shape[:-1], 1)
        return scale_a * o_a + scale_b * o_b, {n: x.expand(shape) for n, x in zip(norm.state_names, state, strict=True)}

    return reduce(merge, parts)


def finish_row(
    norm: NormProgram, values: Sequence[Any], o: Tensor, state: Mapping[str, Tensor], leaves: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Output rows and logsumexps, None of a norm that has none."""
    dim, rows = o.shape[-1], (*o.shape[:-1], 1)
    d = torch.arange(dim, device=o.device)
    finished = {**leaves, **state, "o": o, "d": d, "head_dim_v": torch.tensor(dim, device=o.device)}
    out = evaluate(norm.finalize, values, finished).to(o.dtype).expand(o.shape)
    return out, None if norm.lse is None else evaluate(norm.lse, values, finished).to(o.dtype).expand(rows)
