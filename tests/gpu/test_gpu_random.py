"""Variants drawn at random against the oracle in float64 on a GPU: dense attention of both families, requests, decode."""

from __future__ import annotations

import math
import random

import pytest
import torch
from random_variants import Draw
from serving_batch import Batch, poisoned

import jitgen
from jitgen import reference

pytestmark = pytest.mark.gpu

HEADS = [(2, 2), (4, 2), (9, 3), (8, 1)]
HEAD_DIMS = [64, 64, 96, 128, 128, 128, 192, 256]
DTYPES = [torch.bfloat16, torch.float16]


def assert_close(got, want, dtype, names):
    """To 1.6 units of the last place over all (an approximate tanh is good to one), 20 in each row."""
    (out, lse), (exact, exact_lse) = got, want
    assert not out.isnan().any(), f"{names}: a row was not written"
    eps, off = torch.finfo(dtype).eps, out.double() - exact
    assert off.norm() <= 1.6 * eps * exact.norm(), f"{names}: relative error {off.norm() / exact.norm() / eps:.2g} units"
    rows = exact.norm(dim=-1)
    worst = (off.norm(dim=-1) / rows.clamp_min(1e-3 * rows.max().item() + 1e-30)).max().item()
    assert worst <= 20 * eps, f"{names}: relative error of a row {worst / eps:.2g} units"
    torch.testing.assert_close(lse.double(), exact_lse, rtol=3e-3, atol=5e-3, msg=lambda text: f"{names}: {text}")


@pytest.mark.parametrize("seed", range(40))
def test_dense(seed):
    choose = random.Random(seed)
    (num_q_heads, num_kv_heads), head_dim, dtype = choose.choice(HEADS), choose.choice(HEAD_DIMS), choose.choice(DTYPES)
    batch, q_len = choose.choice([1, 3]), choose.choice([1, 7, 64, choose.randrange(2, 1200)])
    kv_len = q_len + choose.choice([0, 0, 3, choose.randrange(1, 1200)])
    draw = Draw(seed, num_q_heads, kv_len, q_len, batch, "cuda")
    variant, family = draw.variant(rows=True), choose.choice([{}, {}, {"family": "sm80"}])
    torch.manual_seed(seed)
    q, k, v = (
        torch.randn(batch, n, h, head_dim, device="cuda").to(dtype).transpose(1, 2)
        for n, h in ((q_len, num_q_heads), (kv_len, num_kv_heads), (kv_len, num_kv_heads))
    )
    out = torch.full((batch, num_q_heads, q_len, head_dim), math.nan, dtype=dtype, device="cuda")
    got = jitgen.attention(q, k, v, variant, out=out, return_lse=True, **family)
    assert_close(got, reference.attention(q, k, v, variant, return_lse=True), dtype, draw.names)


@pytest.mark.parametrize("is_decode", [False, True], ids=["mixed", "decode"])
@pytest.mark.parametrize("seed", range(100, 125))
def test_serving(seed, is_decode):
    choose = random.Random(seed)
    lengths = [(1, 20)]
    for _ in range(choose.choice([1, 3, 7])):
        keys = choose.randrange(0, choose.choice([300, 3000, 9000]))
        rows = 1 if is_decode else choose.choice([0, 1, 1, 5, choose.randrange(0, 300)])
        lengths.append((min(rows, keys), keys))
    (num_q_heads, num_kv_heads), head_dim, dtype = choose.choice(HEADS), choose.choice(HEAD_DIMS), choose.choice(DTYPES)
    draw = Draw(seed, num_q_heads, max(keys for _, keys in lengths), device="cuda")
    variant = draw.variant(rows=True)
    batch = Batch(lengths, num_q_heads, num_kv_heads, head_dim, 0, dtype, "cuda", seed)
    page_size, split = choose.choice([0, 1, 16, 16, 24, 64]), choose.choice([{}, {}, {"split": "fixed", "kv_split": 768}])
    options = {"max_kv_len": draw.kv_len, "max_kv_tokens": 2 * sum(keys for _, keys in lengths), **split}
    if is_decode:
        options["max_q_len"] = 1
    if page_size and choose.random() < 0.5:
        options["page_size"] = page_size
    plan = batch.plan(variant, layout="paged" if page_size else "ragged", **options)
    out, lse = poisoned(plan, batch.q)
    if page_size:
        k, v, lists = batch.pages(page_size)
        table = choose.choice([batch.csr, batch.block_table])(lists)
        jitgen.paged_attention(batch.q, (k, v), table, plan, out=out, lse=lse)
    else:
        jitgen.ragged_attention(batch.q, *batch.ragged(), plan, out=out, lse=lse)
    assert_close((out, lse), batch.expected(variant), dtype, draw.names)
