"""Variants drawn at random against the oracle in float64: dense attention, ragged and paged requests, on the CPU."""

from __future__ import annotations

import random

import pytest
import torch
from random_variants import Draw
from serving_batch import Batch, poisoned

import jitgen
from jitgen import reference

HEADS = [(2, 2), (4, 2), (3, 1), (8, 1)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def assert_close(got, want, dtype, names):
    """Relative to the whole; logsumexps to 1e-3 or a unit of the dtype, to which rotated rows are rounded, and infinite in the
    same places."""
    (out, lse), (exact, exact_lse) = got, want
    assert not out.isnan().any(), f"{names}: a row was not written"
    error = ((out.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()
    assert error <= TOLERANCE[dtype], f"{names}: relative error {error:.2g}"
    allowed = max(1e-3, torch.finfo(dtype).eps)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=allowed, atol=allowed, msg=lambda text: f"{names}: {text}")


@pytest.mark.parametrize("seed", range(30))
def test_dense(seed):
    choose = random.Random(seed)
    (num_q_heads, num_kv_heads), head_dim = choose.choice(HEADS), choose.choice([16, 40, 64, 128])
    dtype, batch = choose.choice(list(TOLERANCE)), choose.choice([1, 3])
    q_len = choose.choice([1, 7, 64, choose.randrange(2, 200)])
    kv_len = q_len + choose.choice([0, 0, 3, choose.randrange(1, 200)])
    draw = Draw(seed, num_q_heads, kv_len, q_len, batch)
    variant = draw.variant(rows=True)
    torch.manual_seed(seed)
    q, k, v = (
        torch.randn(batch, n, h, head_dim).to(dtype).transpose(1, 2)
        for n, h in ((q_len, num_q_heads), (kv_len, num_kv_heads), (kv_len, num_kv_heads))
    )
    out = torch.full((batch, num_q_heads, q_len, head_dim), torch.nan, dtype=dtype)
    got = jitgen.attention(q, k, v, variant, out=out, return_lse=True)
    assert_close(got, reference.attention(q, k, v, variant, return_lse=True), dtype, draw.names)


@pytest.mark.parametrize("seed", range(100, 120))
def test_serving(seed):
    choose = random.Random(seed)
    lengths = []
    for _ in range(choose.choice([1, 3, 6])):
        keys = choose.randrange(0, 500)
        lengths.append((min(choose.choice([0, 1, 1, 5, choose.randrange(0, 200)]), keys), keys))
    lengths.append((1, 20))
    (num_q_heads, num_kv_heads), dtype = choose.choice(HEADS), choose.choice(list(TOLERANCE))
    page_size, split = choose.choice([0, 1, 16, 24]), choose.choice([{}, {}, {"split": "fixed", "kv_split": 64}])
    draw = Draw(seed, num_q_heads, max(keys for _, keys in lengths))
    variant = draw.variant(rows=True)
    batch = Batch(lengths, num_q_heads, num_kv_heads, choose.choice([32, 64]), 0, dtype, seed=seed)
    plan = batch.plan(variant, layout="paged" if page_size else "ragged", **split)
    out, lse = poisoned(plan, batch.q)
    if page_size:
        k, v, lists = batch.pages(page_size)
        jitgen.paged_attention(batch.q, (k, v), batch.block_table(lists), plan, out=out, lse=lse)
    else:
        jitgen.ragged_attention(batch.q, *batch.ragged(), plan, out=out, lse=lse)
    assert_close((out, lse), batch.expected(variant), dtype, draw.names)
