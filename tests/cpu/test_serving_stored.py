"""Keys and values stored in 8 bits on the CPU target, against the oracle on what they stand for."""

from __future__ import annotations

import pytest
import torch
from stored_batch import KINDS, STORED, StoredBatch

import jitgen
from jitgen.errors import PlanMismatch, ShapeMismatch, UnsupportedDtype

LENGTHS = [(1, 100), (20, 45), (0, 0), (1, 7), (3, 300)]


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def assert_right(batch, got, want, tolerance=2e-5):
    for name, a, b in zip(("output", "logsumexp"), got, want, strict=True):
        assert not a.isnan().any(), name
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite), name
        assert (a.double() - b)[finite].abs().max().item() <= tolerance * max(1.0, b[finite].abs().max().item()), name


@pytest.mark.parametrize("layout", ["paged", "ragged"])
@pytest.mark.parametrize("kv_dtype", STORED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_scales_of_every_kind(layout, kv_dtype, kind):
    if layout == "ragged" and kind == "paged slot":
        kind = "slot"
    batch = StoredBatch(LENGTHS, kv_dtype=kv_dtype, kinds=(kind, kind))
    plan = batch.plan(causal, layout=layout, kv_dtype=kv_dtype)
    assert_right(batch, batch.attend(plan), batch.expected(causal))


@pytest.mark.parametrize(
    "kinds", [("slot", "number"), ("head", "slot"), ("none", "paged slot"), ("slot", "head")], ids="-".join
)
def test_keys_and_values_have_scales_of_their_own(kinds):
    batch = StoredBatch(LENGTHS, kinds=kinds)
    plan = batch.plan(causal, kv_dtype=batch.kv_dtype)
    assert_right(batch, batch.attend(plan, 5), batch.expected(causal))


@pytest.mark.parametrize("head_dim", [8, 24, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types_and_widths(head_dim, dtype):
    batch = StoredBatch(LENGTHS, 6, 3, head_dim, dtype=dtype, kv_dtype=torch.int8, kinds=("slot", "slot"))
    plan = batch.plan(kv_dtype=batch.kv_dtype)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    assert_right(batch, batch.attend(plan), batch.expected(), tolerance)


def test_every_code_has_its_value():
    for kv_dtype in STORED:
        codes = torch.arange(256, dtype=torch.uint8).view(kv_dtype)
        values = codes.double()
        finite = values.isfinite()
        codes = codes.view(torch.uint8)[finite].view(kv_dtype)
        k = torch.zeros(len(codes), 1, 8).to(kv_dtype)
        v = codes.view(torch.uint8)[:, None, None].expand(-1, 1, 8).contiguous().view(kv_dtype)
        plan = jitgen.Plan(1, 256, 1, 1, 8, dtype=torch.float32, kv_dtype=kv_dtype, layout="ragged", device="cpu",
                           variant=lambda b, h, q_idx, kv_idx: q_idx == kv_idx)  # fmt: skip
        n = len(codes)
        plan.update(torch.tensor([0, n], dtype=torch.int32), kv_indptr=torch.tensor([0, n], dtype=torch.int32))
        out = jitgen.ragged_attention(torch.ones(n, 1, 8), k, v, plan)
        assert torch.equal(out[:, 0, 0].double(), values[finite])


def test_hooks_see_true_logits_and_values():
    cap, slopes = 5.0, torch.randn(4)
    variant = jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: cap * torch.tanh(s / cap) + slopes[h] * (kv_idx - q_idx),
        mask_mod=causal,
        sink=torch.randn(4),
        output_transform=lambda o, lse, b, h, q_idx: o * torch.sigmoid(lse),
    )
    batch = StoredBatch(LENGTHS, kinds=("slot", "slot"))
    assert_right(batch, batch.attend(batch.plan(variant, kv_dtype=batch.kv_dtype)), batch.expected(variant))


def test_a_graph_carries_scales():
    batch = StoredBatch(LENGTHS, kinds=("slot", "slot"))
    plan = batch.plan(causal, layout="ragged", kv_dtype=batch.kv_dtype)
    k, v = (torch.cat([c.view(torch.uint8) for c in codes]).view(batch.kv_dtype) for codes in batch.codes)
    k_scale, v_scale = batch.call_scales(0, [], k.shape[0]).values()

    def call(q, k_scale, v_scale):
        by_slot = jitgen.ragged_attention(q, k, v, plan, k_scale=k_scale, v_scale=v_scale)
        return by_slot, jitgen.ragged_attention(q, k, v, plan, k_scale=0.5)

    got = torch.compile(call, backend="eager", fullgraph=True)(batch.q, k_scale, v_scale)
    assert all(torch.equal(a, b) for a, b in zip(got, call(batch.q, k_scale, v_scale), strict=True))


def test_wrong_scales_are_refused():
    batch = StoredBatch(LENGTHS)
    plan = batch.plan(kv_dtype=batch.kv_dtype)
    with pytest.raises(ShapeMismatch, match=r"k_scale has shape \[3\], expected a number, \[1\], \[2\] for each key head, or "):
        _attend_with(batch, plan, k_scale=torch.ones(3))
    with pytest.raises(ShapeMismatch, match="v_scale is not contiguous"):
        _attend_with(batch, plan, v_scale=torch.ones(2, 16 * _pages(batch)).T)
    with pytest.raises(UnsupportedDtype, match="k_scale has dtype float64, expected float32"):
        _attend_with(batch, plan, k_scale=torch.ones(1, dtype=torch.float64))
    with pytest.raises(TypeError, match="v_scale is a str, expected a number or a float32 tensor"):
        _attend_with(batch, plan, v_scale="x")


def test_wrong_types_are_refused():
    batch = StoredBatch(LENGTHS)
    with pytest.raises(UnsupportedDtype, match="kv_dtype is float64, expected float32 as dtype, or float8_e4m3fn"):
        batch.plan(kv_dtype=torch.float64)
    with pytest.raises(PlanMismatch, match="k or v has dtype float8_e4m3fn, the plan was made for kv_dtype=int8"):
        batch.attend(batch.plan(kv_dtype=torch.int8))
    with pytest.raises(PlanMismatch, match="k or v has dtype float8_e4m3fn, the plan was made for dtype=float32"):
        batch.attend(batch.plan())
    plain = batch.plan(layout="ragged")
    k, v = (torch.cat(t).float() for t in (batch.k, batch.v))
    with pytest.raises(UnsupportedDtype, match="k_scale was given, and the plan was made for keys and values of float32"):
        jitgen.ragged_attention(batch.q, k, v, plain, k_scale=1.0)


def _pages(batch):
    return batch.pages(16)[0].shape[0]


def _attend_with(batch, plan, **scales):
    exact, _, lists = batch.pages(16)
    caches = batch.stored_pages(16, lists, exact.shape[0])
    return jitgen.paged_attention(batch.q, caches, batch.csr(lists), plan, **scales)
