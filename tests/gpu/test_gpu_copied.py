"""A dense bias that the copy engine brings in tiles, and the same where rows of it are not aligned."""

from __future__ import annotations

import pytest
import torch
from gallery.rounding import check_attention

import jitgen

HEADS = 2
LENGTHS = [(129, 129), (300, 777), (777, 1026), (64, 2048)]


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def padded(*shape, dtype):
    """Random values whose rows begin at multiples of 16 bytes, with NaN behind their ends."""
    *outer, kv_len = shape
    whole = torch.full((*outer, (kv_len + 7) // 8 * 8), torch.nan, device="cuda", dtype=dtype)
    whole[..., :kv_len] = torch.randn(*shape, device="cuda").to(dtype)
    return whole[..., :kv_len]


def by_head(kv_len, dtype=torch.bfloat16):
    bias = padded(HEADS, kv_len, kv_len, dtype=dtype)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[h, q_idx, kv_idx], mask_mod=causal)


def of_float16(kv_len):
    return by_head(kv_len, torch.float16)


def unmasked(kv_len):
    bias = padded(kv_len, kv_len, dtype=torch.bfloat16)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s - 0.5 * bias[q_idx, kv_idx])


def by_request(kv_len):
    """Of each request, the same for its heads; beside ALiBi, under a window."""
    bias, slopes = padded(2, 1, kv_len, kv_len, dtype=torch.float16).expand(2, HEADS, -1, -1), torch.rand(HEADS, device="cuda")
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: s + slopes[h] * (kv_idx - q_idx) + bias[b, h, q_idx, kv_idx] * 2.0,
        mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < 200),
    )


def hiding(kv_len):
    """Hides single keys, a block of them and all of some rows."""
    bias = padded(HEADS, kv_len, kv_len, dtype=torch.bfloat16)
    bias[:, :, ::3] = -torch.inf
    bias[:, kv_len // 2 :, : kv_len // 2] = -torch.inf
    bias[:, ::50] = -torch.inf
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[h, q_idx, kv_idx], mask_mod=causal)


def of_documents(kv_len):
    bias, doc = padded(HEADS, kv_len, kv_len, dtype=torch.bfloat16), torch.arange(kv_len, device="cuda") // 50
    doc = jitgen.sorted(doc.int())
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[h, q_idx, kv_idx],
        mask_mod=lambda b, h, q_idx, kv_idx: (doc[q_idx] == doc[kv_idx]) & (kv_idx <= q_idx),
    )


VARIANTS = [by_head, of_float16, unmasked, by_request, hiding, of_documents]


def compare(variant, q, k, v, where):
    got = check_attention(variant, q, k, v, where)
    assert torch.equal(jitgen.attention(q, k, v, variant), got), f"{where}: another result from the same call"


def tensors(batch, heads, q_len, kv_len, head_dim, dtype):
    return (torch.randn(batch, heads, n, head_dim, device="cuda").to(dtype) for n in (q_len, kv_len, kv_len))


@pytest.mark.parametrize("make", VARIANTS)
def test_copied_bias_is_the_oracle(make):
    torch.manual_seed(0)
    for q_len, kv_len in LENGTHS:
        q, k, v = tensors(2, HEADS, q_len, kv_len, 128, torch.bfloat16)
        compare(make(kv_len), q, k, v, f"q_len {q_len}, kv_len {kv_len}")


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_copied_bias_with_many_tiles_for_each_sm_is_the_oracle(head_dim):
    """More query tiles than SMs: what one leaves behind is there for the next."""
    torch.manual_seed(0)
    q, k, v = tensors(3, 32, 610, 910, head_dim, torch.bfloat16)
    bias = padded(32, 910, 910, dtype=torch.bfloat16)
    for mask in (causal, None):
        variant = jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[h, q_idx, kv_idx], mask_mod=mask)
        compare(variant, q, k, v, "causal" if mask else "unmasked")


def test_bias_is_read_where_the_copy_engine_cannot():
    """Rows of an odd pitch, a base between two multiples of 16 bytes, and aligned ones in turn."""
    torch.manual_seed(0)
    q, k, v = tensors(1, HEADS, 257, 257, 128, torch.bfloat16)
    whole = torch.randn(HEADS, 257, 272, device="cuda").bfloat16()
    for bias in (whole[:, :, :257], whole[:, :, 1:258], whole[:, :, :257].contiguous(), whole[:, :, 8:265]):
        variant = jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[h, q_idx, kv_idx])  # noqa: B023
        compare(variant, q, k, v, f"strides {bias.stride()}, address {bias.data_ptr() % 16}")
