"""Variants that differ in captured values, names and spelling, but are few distinct kernels; and shapes for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Hooks = dict[str, Callable[..., Any]]

# NOTE: hooks are written as a user writes them, without types.


def causal(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
    return kv_idx <= q_idx


def backwards(batch, head, row, column):  # type: ignore[no-untyped-def]
    return row >= column


def soft_cap(number: int, device: str) -> Hooks:
    cap = 10.0 + number

    def capped(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return cap * torch.tanh(score / cap)

    return {"score_mod": capped, "mask_mod": causal}


def soft_cap_again(number: int, device: str) -> Hooks:
    limit = 11.0 + number

    def squashed(logit, batch, head, row, column):  # type: ignore[no-untyped-def]
        inner = (logit / limit).tanh()
        return inner * limit

    return {"score_mod": squashed, "mask_mod": backwards}


def alibi(number: int, device: str) -> Hooks:
    slopes = torch.exp2(-torch.arange(1, 9, device=device) * (1.0 + number / 10))

    def biased(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return score + slopes[h] * (kv_idx - q_idx)

    return {"score_mod": biased, "mask_mod": causal}


def alibi_again(number: int, device: str) -> Hooks:
    per_head = torch.full((8,), 0.01 * (number + 1), device=device)

    def sloped(logit, batch, head, row, column):  # type: ignore[no-untyped-def]
        distance = column - row
        return distance * per_head[head] + logit

    return {"score_mod": sloped, "mask_mod": backwards}


def window(number: int, device: str) -> Hooks:
    width = 8 + number

    def near(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return (kv_idx <= q_idx) & (q_idx - kv_idx < width)

    return {"mask_mod": near}


def window_again(number: int, device: str) -> Hooks:
    size = 9 + number

    def recent(batch, head, row, column):  # type: ignore[no-untyped-def]
        return row - column < size and column <= row

    return {"mask_mod": recent}


def documents(number: int, device: str) -> Hooks:
    doc = torch.arange(512, device=device) // (16 + number)

    def same_document(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return doc[q_idx] == doc[kv_idx]

    return {"mask_mod": same_document}


def documents_again(number: int, device: str) -> Hooks:
    owner = torch.arange(512, device=device) // (17 + number)

    def same_owner(batch, head, row, column):  # type: ignore[no-untyped-def]
        theirs, mine = owner[column], owner[row]
        return mine == theirs

    return {"mask_mod": same_owner}


def relative_bias(number: int, device: str) -> Hooks:
    table, far = torch.randn(8, 64, device=device), 20 + number

    def near_bias(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return score + table[h, torch.clamp(q_idx - kv_idx, 0, far)]

    return {"score_mod": near_bias, "mask_mod": causal}


def relative_bias_again(number: int, device: str) -> Hooks:
    rows, last = torch.randn(8, 64, device=device), 21 + number

    def clipped_bias(logit, batch, head, row, column):  # type: ignore[no-untyped-def]
        distance = (row - column).clamp(0, last)
        return rows[head][distance] + logit

    return {"score_mod": clipped_bias, "mask_mod": backwards}


# what one kernel serves: a pair of spellings of the same mathematics
SPELLINGS = (
    (soft_cap, soft_cap_again),
    (alibi, alibi_again),
    (window, window_again),
    (documents, documents_again),
    (relative_bias, relative_bias_again),
)


def variants(device: str, count: int) -> list[list[Hooks]]:
    """``count`` variants, by kernel: both spellings in turn, each time with other captured values."""
    each = count // len(SPELLINGS)
    return [[pair[i % 2](i, device) for i in range(each)] for pair in SPELLINGS]


def shapes(count: int) -> list[tuple[int, int, int, int, int]]:
    """Different (batch, query heads, key heads, q_len, kv_len), all small."""
    heads = ((1, 1), (2, 1), (2, 2), (4, 2), (8, 8))
    return [(1 + i % 3, *heads[i % 5], 1 + 3 * i, 2 + 4 * i) for i in range(count)]
