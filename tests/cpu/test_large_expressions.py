"""Expressions that are deep, or share much: no step takes more than their nodes, or more of Python's stack than there is."""

from __future__ import annotations

import sys

import pytest
import torch

import jitgen
from jitgen.errors import UnsupportedVariant
from jitgen.families import cuda_spec
from jitgen.ir_text import to_text
from jitgen.render import render_kernel
from jitgen.target import cuda_target

STARTS = torch.arange(0, 400, 2)
ROW = torch.linspace(-1, 1, 256)  # the longest that may be used in arithmetic
LAYER = 3
FAMILIES = {"sm90": ("9.0a", "dense"), "sm80": ("8.0", "dense"), "decode": ("9.0", "paged")}


def chain(score, b, h, q_idx, kv_idx):
    for i in range(200):
        score = score * 0.999 + 0.001 * i
    return score


def bias_of_segments(score, b, h, q_idx, kv_idx):
    for i in range(100):  # each step uses the one before twice
        score = torch.where(kv_idx >= STARTS[i], score + 0.01 * i, score)
    return score


def row_sum(score, b, h, q_idx, kv_idx):
    return score + (ROW * torch.sin(score)).sum()


def doubled(b, h, q_idx, kv_idx):
    x = kv_idx
    for _ in range(40):
        x = (x * x + x) % 97
    return kv_idx <= q_idx if x > 5 else kv_idx < q_idx


def doubled_distance(score, b, h, q_idx, kv_idx):
    x = (q_idx - kv_idx).float()
    for _ in range(40):
        x = torch.tanh(x) * x
    return score + x


def squared(score, b, h, q_idx, kv_idx):
    x = torch.tanh(score)
    for _ in range(40):  # a product of 2**40 factors
        x = x * x
    return score + x


def doubled_number(score, b, h, q_idx, kv_idx):
    x = LAYER
    for _ in range(40):
        x = (x * x + x) % 97
    return score + kv_idx if x > 5 else score


DEEP = {"chain": {"score_mod": chain}, "segments": {"score_mod": bias_of_segments}, "row": {"score_mod": row_sum}}
SHARED = {
    "doubled": {"mask_mod": doubled},
    "distance": {"score_mod": doubled_distance},
    "number": {"score_mod": doubled_number},
    "squared": {"score_mod": squared},
}


@pytest.mark.parametrize("hooks", DEEP.values(), ids=DEEP)
def test_deep_hooks_mean_what_they_say(hooks):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 16) for n in (13, 37, 37))
    got, want = jitgen.attention(q, k, v, **hooks), jitgen.reference.attention(q, k, v, **hooks)
    assert (got - want).abs().max() < 1e-4
    assert sys.getrecursionlimit() < 50_000


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hooks", [*DEEP.values(), *SHARED.values()], ids=[*DEEP, *SHARED])
def test_every_kernel_is_printed_for_them(hooks, family):
    arch, layout = FAMILIES[family]
    program = jitgen.Variant(**hooks).trace().program
    source = render_kernel(cuda_spec(program, "bfloat16", (64, 64), family, cuda_target(arch), layout=layout))
    brackets = [sum(line[:i].count(b) for b in "([{") - sum(line[:i].count(b) for b in ")]}")
                for line in source.text.splitlines() for i in range(0, len(line), 20)]  # fmt: skip
    assert max(brackets) < 200  # clang takes 256


def test_text_is_cut_where_it_is_asked_to_be():
    score = jitgen.Variant(score_mod=doubled_distance).trace().program.score
    text = to_text(score, limit=80)
    assert len(text) == 80 and text.endswith("...") and len(repr(score)) == 1000
    short = jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx).trace().program.mask
    assert to_text(short, limit=17) == "(kv_idx <= q_idx)" and to_text(short, limit=16) == "(kv_idx <= q_..."


@pytest.mark.parametrize(
    "mask",
    [lambda b, h, q_idx, kv_idx: kv_idx < 2**70, lambda b, h, q_idx, kv_idx: kv_idx * 2**40 * 2**40 >= 0],
    ids=["literal", "combined"],
)
def test_integers_beyond_64_bits_are_refused_where_they_are_used(mask):
    with pytest.raises(UnsupportedVariant, match=r"test_large_expressions\.py:\d+: the integer \d+.* does not fit 64 bits"):
        jitgen.Variant(mask_mod=mask)
