"""Rows whose keys are all hidden by large numbers, as rows of padding are where masks are added to scores: none becomes NaN."""

from __future__ import annotations

import math

import pytest
import torch

import jitgen

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs a GPU"
)

HEADS, KV_LEN, HIDDEN = 2, 400, 150  # the first keys are hidden
NUMBERS = {"-1e9": -1e9, "-1e30": -1e30, "lowest": torch.finfo(torch.float32).min}
VISIBLE = torch.arange(KV_LEN) >= HIDDEN


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def added_by_key(number):
    bias = torch.where(VISIBLE, 0.0, number).expand(HEADS, -1).contiguous().cuda()
    return lambda s, b, h, q_idx, kv_idx: s + bias[h, kv_idx]


def added_by_pair(number):
    bias = torch.where(VISIBLE, 0.0, number).expand(KV_LEN, -1).contiguous().cuda()
    return lambda s, b, h, q_idx, kv_idx: s + bias[q_idx, kv_idx]


def chosen(number):
    visible = VISIBLE.cuda()
    return lambda s, b, h, q_idx, kv_idx: torch.where(visible[kv_idx], s, number)


WAYS = {way.__name__: way for way in (added_by_key, added_by_pair, chosen)}


def expected(q, k, v):
    """Of the rows that see visible keys, without the others."""
    s = torch.einsum("bhqd,bhkd->bhqk", q.double(), k.double()) / math.sqrt(q.shape[-1])
    rows = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device="cuda")[:, None]
    s = s.masked_fill(~(VISIBLE.cuda() & (torch.arange(KV_LEN, device="cuda") <= rows)), -math.inf)
    some = (rows >= HIDDEN).flatten()
    return s[:, :, some].softmax(-1) @ v.double(), some


def check(out, q, k, v):
    assert out.isfinite().all()
    want, some = expected(q, k, v)
    got = out[:, :, some].double()
    assert ((got - want).norm() / want.norm()).item() < torch.finfo(out.dtype).eps


def tensors(q_len, head_dim, dtype):
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, n, head_dim, device="cuda").to(dtype) for n in (q_len, KV_LEN, KV_LEN)]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["sm90", "sm80"])
def test_rows_of_hidden_keys_are_finite(family, way, number):
    if family == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the sm90 family needs compute capability 9.0")
    variant = jitgen.Variant(score_mod=WAYS[way](NUMBERS[number]), mask_mod=causal)
    for head_dim in (64, 128, 256):
        for dtype in (torch.bfloat16, torch.float16):
            q, k, v = tensors(KV_LEN, head_dim, dtype)
            out, lse = jitgen.attention(q, k, v, variant, family=family, return_lse=True)
            check(out, q, k, v)
            assert not lse.isnan().any() and (lse[:, :, :HIDDEN] < -1e8).all()


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("q_len", [1, 65, KV_LEN])
def test_rows_of_a_request_with_hidden_keys_are_finite(q_len, way, number):
    """Through a plan: decode of one row, prefill of more."""
    variant = jitgen.Variant(score_mod=WAYS[way](NUMBERS[number]), mask_mod=causal)
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = tensors(q_len, 128, dtype)
        rows = [t[0].transpose(0, 1).contiguous() for t in (q, k, v)]
        plan = jitgen.Plan(
            1, q_len, HEADS, HEADS, 128, dtype=dtype, variant=variant, layout="ragged", device="cuda", max_kv_len=KV_LEN
        )
        starts = [torch.tensor([0, n], dtype=torch.int32, device="cuda") for n in (q_len, KV_LEN)]
        plan.update(starts[0], kv_indptr=starts[1])
        out = jitgen.ragged_attention(*rows, plan)
        check(out.transpose(0, 1)[None], q, k, v)
