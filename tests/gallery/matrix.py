"""A kernel as an evaluator: one call that returns the score and mask of every (query, key) pair as it computed them."""

from __future__ import annotations

from typing import Any

import torch

import jitgen
from jitgen.evaluate import evaluate
from jitgen.reference import index_leaves


class Passing(jitgen.OnlineNorm):
    """Weights that are the scores themselves."""

    def update(self, s, st):
        return s, 1.0, st


def matrix_inputs(batch: int, num_heads: int, q_len: int, kv_len: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs whose logits, with scale 1, are eighths between -8 and 8; values that pick out one key each."""
    q, k = torch.zeros(batch, num_heads, q_len, 8), torch.zeros(batch, num_heads, kv_len, 8)
    q[..., 0] = (torch.arange(q_len) * 5 % 33 - 16) / 8
    k[..., 0] = (torch.arange(kv_len) * 7 % 9 - 4).float()
    return q, k, torch.eye(kv_len).expand(batch, num_heads, -1, -1)


def computed_scores(
    variant: jitgen.Variant, *, batch: int, num_heads: int, q_len: int, kv_len: int, q_offset: int
) -> torch.Tensor:
    """Scores [batch, num_heads, q_len, kv_len] of a compiled kernel; excluded keys are 0."""
    shown = jitgen.Variant(score_mod=variant.score_mod, mask_mod=variant.mask_mod, softmax=Passing)
    q_index = "local" if q_offset == 0 else "absolute"
    assert q_offset in (0, kv_len - q_len)
    return jitgen.attention(*matrix_inputs(batch, num_heads, q_len, kv_len), shown, scale=1.0, q_index=q_index)


def evaluated_scores(variant: jitgen.Variant, *, batch: int, num_heads: int, q_len: int, kv_len: int, q_offset: int) -> Any:
    """The same in float64, from the traced expressions."""
    q, k, _ = matrix_inputs(batch, num_heads, q_len, kv_len)
    score = (q @ k.mT).double()
    leaves = index_leaves(batch, num_heads, num_heads, q_len, kv_len, q_offset, 1.0, torch.float64, torch.device("cpu"))
    traced = variant.trace()
    program, values = traced.program, traced.values()
    if program.mask is not None:
        keep = evaluate(program.mask, values, leaves).expand(score.shape)
    if program.score is not None:
        score = evaluate(program.score, values, {**leaves, "score": score}).double().expand(score.shape)
    return score if program.mask is None else torch.where(keep, score, 0.0)
