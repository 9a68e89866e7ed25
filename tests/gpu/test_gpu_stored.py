"""Keys and values stored in 8 bits on a GPU, against the oracle on what they stand for."""

from __future__ import annotations

import pytest
import torch
from norm_cases import Sigmoid, StickBreaking
from stored_batch import KINDS, STORED, StoredBatch

import jitgen

DEVICE = "cuda"
ERRORS = {torch.bfloat16: 6e-3, torch.float16: 1.5e-3}  # of a row, relative
LENGTHS = [(1, n) for n in (1, 15, 16, 17, 0, 129, 1000, 33, 4097, 64)]


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def check(batch, got, want, factor=1.0):
    out, lse = got
    assert not out.isnan().any() and not lse.isnan().any()
    off = (out.double() - want[0]).norm(dim=-1) / want[0].norm(dim=-1).clamp(min=1e-3)
    assert off.max().item() <= factor * ERRORS[batch.dtype]
    assert torch.equal(lse.isfinite(), want[1].isfinite())
    finite = want[1].isfinite()
    assert (lse.double() - want[1])[finite].abs().max().item() <= factor * 1e-3


def attend(variant=None, lengths=LENGTHS, heads=(8, 2), head_dim=128, page_size=16, layout="paged", factor=1.0, **options):
    batch = StoredBatch(lengths, *heads, head_dim, dtype=options.pop("dtype", torch.bfloat16), device=DEVICE, **options)
    plan = batch.plan(variant, layout=layout, kv_dtype=batch.kv_dtype, max_q_len=max(q for q, _ in lengths))
    check(batch, batch.attend(plan, page_size), batch.expected(variant), factor)


@pytest.mark.parametrize("page_size", [1, 16, 24, 32])
@pytest.mark.parametrize("kv_dtype", STORED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_scales_of_every_kind(page_size, kv_dtype, kind):
    attend(page_size=page_size, kv_dtype=kv_dtype, kinds=(kind, kind))


@pytest.mark.parametrize("kinds", [("slot", "number"), ("head", "slot"), ("none", "paged slot")], ids="-".join)
@pytest.mark.parametrize("page_size", [3, 64])
def test_keys_and_values_have_scales_of_their_own(kinds, page_size):
    attend(page_size=page_size, kinds=kinds)


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv_dtype", STORED, ids=str)
def test_types_and_widths(head_dim, dtype, kv_dtype):
    attend(head_dim=head_dim, dtype=dtype, kv_dtype=kv_dtype, kinds=("slot", "slot"))


@pytest.mark.parametrize("kv_dtype", STORED, ids=str)
@pytest.mark.parametrize("kind", ["head", "slot"])
def test_ragged_keys(kv_dtype, kind):
    attend(layout="ragged", kv_dtype=kv_dtype, kinds=(kind, kind))


@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (32, 8), (64, 8)], ids=str)
@pytest.mark.parametrize("batch", [1, 5, 40])
def test_heads_and_batches(heads, batch):
    attend(lengths=[(1, 37 * i % 1500 + 1) for i in range(batch)], heads=heads, kinds=("slot", "slot"))


def test_rows_of_a_draft_and_of_a_prefill():
    attend(causal, lengths=[(4, 100), (3, 3), (1, 700)], kinds=("slot", "slot"))
    attend(causal, lengths=[(70, 100), (1, 300), (200, 200)], kinds=("head", "head"))


@pytest.mark.parametrize("page_size", [1, 16])
def test_hooks_see_true_logits_and_values(page_size):
    cap, slopes = 5.0, torch.linspace(0.01, 0.3, 8, device=DEVICE)
    variant = jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: cap * torch.tanh(s / cap) + slopes[h] * (kv_idx - q_idx),
        mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < 300),
        sink=torch.linspace(-1, 1, 8, device=DEVICE),
        output_transform=lambda o, lse, b, h, q_idx: o * torch.sigmoid(lse),
    )
    attend(variant, page_size=page_size, kinds=("slot", "slot"), factor=2.0, lengths=[(1, 1), (1, 900), (1, 4097), (2, 40)])


@pytest.mark.parametrize("norm", [Sigmoid, StickBreaking])
def test_other_norms(norm):
    variant = jitgen.Variant(mask_mod=causal, softmax=norm)
    batch = StoredBatch(LENGTHS, 8, 2, 128, dtype=torch.bfloat16, device=DEVICE, kinds=("slot", "slot"))
    plan = batch.plan(variant, kv_dtype=batch.kv_dtype, max_q_len=1)
    like, _, lists = batch.pages(16)
    caches = batch.stored_pages(16, lists, like.shape[0])
    scales = batch.call_scales(16, lists, like.shape[0])
    out = jitgen.paged_attention(batch.q, caches, batch.csr(lists), plan, **scales)
    want = batch.expected(variant)[0]
    off = (out.double() - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-3)
    assert off.max().item() <= 2 * ERRORS[torch.bfloat16]


@pytest.mark.parametrize("kv_dtype", STORED, ids=str)
def test_small_elements_are_not_lost(kv_dtype):
    """Denormals of the stored type, and nothing else."""
    batch = StoredBatch([(1, 300)], 8, 2, 128, dtype=torch.bfloat16, device=DEVICE, kv_dtype=kv_dtype, kinds=("none", "none"))
    small = 3 * {torch.float8_e4m3fn: 2.0**-9, torch.float8_e5m2: 2.0**-16, torch.int8: 1.0}[kv_dtype]
    for n, codes in enumerate(batch.codes):
        codes[0] = (torch.randn(codes[0].shape, device=DEVICE).sign() * small).to(kv_dtype)
        (batch.k, batch.v)[n][0] = codes[0].double()
    plan = batch.plan(kv_dtype=kv_dtype, max_q_len=1)
    scale = 0.1 / small
    check(batch, batch.attend(plan, scale=scale), batch.expected(scale=scale))
