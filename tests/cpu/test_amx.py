"""bfloat16 on AMX against the oracle in float64: the error that rounding the weights and the output explains, no more."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from norm_cases import Sigmoid
from serving_batch import Batch, poisoned

import jitgen
from jitgen import reference
from jitgen.families import cpu_tiles
from jitgen.program import Program
from jitgen.render import render_kernel
from jitgen.spec import KernelSpec
from jitgen.target import CPU_LEVELS, cpu_target, detect_cpu

UNIT = torch.finfo(torch.bfloat16).eps / 2
needs_amx = pytest.mark.skipif(detect_cpu().isa != "amx", reason="no AMX on this machine, or JITGEN_CPU_ISA leaves it out")


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def inputs(q_len, kv_len, head_dim=64, head_dim_v=0, heads=4, kv_heads=2, batch=2):
    generator = torch.Generator().manual_seed(1000 * q_len + kv_len)
    shapes = (heads, q_len, head_dim), (kv_heads, kv_len, head_dim), (kv_heads, kv_len, head_dim_v or head_dim)
    return [torch.randn(batch, *shape, generator=generator).bfloat16() for shape in shapes]


def assert_costs_a_rounding(got, q, k, v, variant=None, **options):
    """Each weight may be off by a unit relative to itself, so an output by that share of the sum of weight * |value|."""
    want = reference.attention(q, k, v, variant, **options)
    spread = reference.attention(q, k, v.abs(), variant, **options)
    excess = (got.double() - want).abs() - 1.02 * UNIT * (want.abs() + spread) - 1e-6
    assert excess.max().item() <= 0, f"an error is {excess.max().item():.3g} larger than rounding explains"


# ---- shapes ---------------------------------------------------------------------------------------------------------------


@needs_amx
@pytest.mark.parametrize("head_dim, head_dim_v", [(8, 8), (40, 72), (64, 64), (96, 24), (256, 136)])
def test_every_head_dim_is_padded_to_whole_tiles(head_dim, head_dim_v):
    for q_len, kv_len in [(67, 131), (9, 300), (1, 40)]:
        q, k, v = inputs(q_len, kv_len, head_dim, head_dim_v)
        out = torch.full((*q.shape[:3], head_dim_v), math.nan, dtype=q.dtype)
        assert_costs_a_rounding(jitgen.attention(q, k, v, out=out), q, k, v)


@needs_amx
@pytest.mark.parametrize("q_len", [1, 4, 5, 8, 9, 15, 16, 17, 33, 47, 48, 49, 97])
def test_every_number_of_rows_and_keys_is_served(q_len):
    for kv_len in sorted({q_len, q_len + 1, 100, 255, 257, 511}):
        q, k, v = inputs(q_len, kv_len)
        out, lse = jitgen.attention(q, k, v, mask_mod=causal, return_lse=True)
        assert_costs_a_rounding(out, q, k, v, mask_mod=causal)
        _, exact = reference.attention(q, k, v, mask_mod=causal, return_lse=True)
        torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=2e-5)


@needs_amx
@pytest.mark.parametrize("window", [1, 70, 300])
def test_blocks_of_an_item_see_their_own_keys(window):
    """391 rows are several blocks an item and several items a head; a short window leaves most tiles to some of them."""
    variant = jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < window))
    q, k, v = inputs(391, 700, heads=16, kv_heads=8)
    out = torch.full(q.shape, math.nan, dtype=q.dtype)
    assert_costs_a_rounding(jitgen.attention(q, k, v, variant, out=out), q, k, v, variant)


@needs_amx
@pytest.mark.parametrize("cap", [2.0, 50.0])
def test_soft_cap_bends_logits_to_within_its_error(cap):
    """The rough tanh is off by 1.6e-5 of itself: a logit by that of the cap, a weight by twice that relative to its row."""
    variant = jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: cap * torch.tanh(s / cap), mask_mod=causal)
    q, k, v = inputs(101, 301)
    for size in (0.1, 1.0, 8.0, 1e4):
        got = jitgen.attention(q * size, k, v, variant)
        want = reference.attention(q * size, k, v, variant)
        spread = reference.attention(q * size, k, v.abs(), variant)
        bound = (1.02 * UNIT + 2 * 1.6e-5 * cap) * (want.abs() + spread) + 1e-6
        assert ((got.double() - want).abs() <= bound).all()


@needs_amx
@pytest.mark.parametrize("scale", [0.3, -0.2, 0.0, 1e-30, 4.0])
def test_scale_of_any_sign_and_size_multiplies_the_logits(scale):
    q, k, v = inputs(60, 131)
    window = jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < 40))
    for variant in (None, window):
        assert_costs_a_rounding(jitgen.attention(q, k, v, variant, scale=scale), q, k, v, variant, scale=scale)


@needs_amx
def test_large_logits_neither_overflow_nor_lose_the_maximum():
    q, k, v = inputs(60, 300)
    q = q * 100
    assert_costs_a_rounding(jitgen.attention(q, k, v), q, k, v)


@needs_amx
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_key_spoils_the_rows_that_see_it_and_no_other(value):
    q, k, v = inputs(60, 300)
    clean = jitgen.attention(q, k, v, mask_mod=causal)
    k[:, :, 272] = value  # seen by the rows from 32 on
    out = jitgen.attention(q, k, v, mask_mod=causal)
    assert torch.equal(out[:, :, :32], clean[:, :, :32]) and out[:, :, 32:].isnan().any(-1).all()


@needs_amx
def test_a_row_without_keys_is_zero():
    q, k, v = inputs(70, 131)
    variant = jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (q_idx >= 100) & (kv_idx % 3 == 0))
    out, lse = jitgen.attention(q, k, v, variant, return_lse=True)
    assert (out[:, :, :39] == 0).all() and (lse[:, :, :39] == -math.inf).all()  # q_idx starts at 61
    assert_costs_a_rounding(out, q, k, v, variant)


# ---- hooks ----------------------------------------------------------------------------------------------------------------


def hooks():
    documents, slopes = torch.arange(400, dtype=torch.int32) // 70, torch.tensor([0.5, 0.25, 0.125, 0.0625])

    def same_document(b, h, q_idx, kv_idx):
        return (documents[q_idx] == documents[kv_idx]) & (kv_idx <= q_idx)

    def alibi(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (kv_idx - q_idx)

    return {
        "score": jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: 20.0 * torch.tanh(s / 20.0)),
        "score, mask, sink": jitgen.Variant(score_mod=alibi, mask_mod=same_document, sink=torch.tensor([0.5, -1.0, 3.0, 0.0])),
        "norm": jitgen.Variant(softmax=Sigmoid),
        "norm, score, mask": jitgen.Variant(score_mod=alibi, mask_mod=causal, softmax=Sigmoid),
        "output": jitgen.Variant(mask_mod=causal, output_transform=lambda o, lse, b, h, q_idx: o * torch.sigmoid(lse)),
    }


@needs_amx
@pytest.mark.parametrize("name", hooks())
def test_hooks_see_float32_logits(name):
    variant = hooks()[name]
    for q_len, kv_len in [(101, 301), (6, 90)]:
        q, k, v = inputs(q_len, kv_len)
        assert_costs_a_rounding(jitgen.attention(q, k, v, variant, scale=-0.15), q, k, v, variant, scale=-0.15)


@needs_amx
@pytest.mark.parametrize("layout", ["ragged", "paged"])
@pytest.mark.parametrize("head_dim", [40, 128])
def test_requests_of_every_length_are_served(layout, head_dim):
    lengths = [(1, 700), (0, 40), (3, 300), (50, 50), (130, 391), (5, 33), (33, 33)]
    batch = Batch(lengths, head_dim=head_dim, dtype=torch.bfloat16)
    plan = batch.plan(causal, layout=layout)
    out, lse = poisoned(plan, batch.q)
    if layout == "paged":
        k, v, lists = batch.pages(16)  # NaN where no key lies
        jitgen.paged_attention(batch.q, (k, v), batch.csr(lists), plan, out=out, lse=lse, return_lse=True)
    else:
        jitgen.ragged_attention(batch.q, *batch.ragged(), plan, out=out, lse=lse, return_lse=True)
    want, exact = batch.expected(causal)
    batch.v = [v.abs() for v in batch.v]
    spread, _ = batch.expected(causal)
    assert ((out.double() - want).abs() <= 1.02 * UNIT * (want.abs() + spread) + 1e-6).all()
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=2e-5)


# ---- choice ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["dense", "ragged", "paged"])
def test_only_bfloat16_for_amx_uses_tiles(layout):
    def uses_tiles(isa, dtype):
        spec = KernelSpec("cpu", Program(), dtype, 64, 64, cpu_tiles(64, 64, layout), cpu_target(isa), layout)
        return "jitgen/cpu_amx.h" in render_kernel(spec).includes

    used = {(isa, dtype) for isa in CPU_LEVELS for dtype in ("float32", "bfloat16", "float16") if uses_tiles(isa, dtype)}
    assert used == {("amx", "bfloat16")}


@needs_amx
@pytest.mark.parametrize("isa", ["amx", "avx512"])
def test_isa_that_is_asked_for_is_built_and_run(isa, tmp_path):
    script = (
        "import torch, jitgen; from jitgen import reference, runtime; from pathlib import Path\n"
        "q, k, v = torch.randn(3, 1, 2, 40, 16).bfloat16()\n"
        "error = (jitgen.attention(q, k, v).double() - reference.attention(q, k, v)).abs().max().item()\n"
        "(kernel,) = runtime.loaded_kernels()\n"
        "code = kernel.path.with_name('module.so').read_bytes()\n"
        "print(kernel.spec.target.isa, b'\\xc4\\xe2\\x78\\x49' in code, error < 0.02)"  # ldtilecfg, tilerelease
    )
    environment = {**os.environ, "JITGEN_CPU_ISA": isa, "JITGEN_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [isa, str(isa == "amx"), "True"]
