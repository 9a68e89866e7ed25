"""Scores that the sm90 kernels work out before the logits, where it is delicate: odd lengths and strides, tables that are flat
in some tiles, maxima that rise late."""

from __future__ import annotations

import pytest
import torch
from gallery.rounding import check_attention

import jitgen

HEADS = 2
LENGTHS = [(129, 129), (300, 777), (777, 1026), (64, 2048)]


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


def dense(dtype, width=lambda kv: kv):
    """A bias of each head, query and key; ``width`` is the length of its rows in memory."""

    def make(kv_len):
        bias = randn(HEADS, kv_len, width(kv_len), dtype=dtype)[:, :, :kv_len]
        return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[h, q_idx, kv_idx], mask_mod=causal)

    return make


def batched(kv_len):
    bias = randn(2, 1, kv_len, kv_len, dtype=torch.float16)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s * 0.5 - bias[b, 0, q_idx, kv_idx])


def clipped(kv_len):
    table = randn(HEADS, 64)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + table[h, torch.clamp(q_idx - kv_idx, 0, 63)])


def bounded(kv_len):
    """Tables that are flat on both sides of the diagonal, under a soft cap and beside ALiBi."""
    table, slopes, cap = randn(HEADS, 65), torch.rand(HEADS, device="cuda"), 5.0

    def score(s, b, h, q_idx, kv_idx):
        near = table[h, torch.clamp(q_idx - kv_idx, -32, 32) + 32]
        return cap * torch.tanh(s / cap) + near + slopes[h] * (kv_idx - q_idx)

    return jitgen.Variant(score_mod=score, mask_mod=causal)


def capped(kv_len):
    """A soft cap of a score that grows with the distance: tiles far from the cap and tiles at it."""
    cap = 5.0
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: cap * torch.tanh((s + 0.02 * (q_idx - kv_idx)) / cap), mask_mod=causal
    )


def soft_cap(kv_len):
    """Some warps are near the cap and some are not; rows that see nothing of the first tiles."""
    cap = 3.0
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: cap * torch.tanh(s / cap),
        mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < 100) & (q_idx % 7 != 3),
    )


def decaying(kv_len):
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s * torch.exp2(-0.01 * torch.abs(q_idx - kv_idx)))


def forgetting(kv_len):
    gates = torch.cumsum(-torch.rand(HEADS, kv_len, device="cuda") * 0.1, 1)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + gates[h, q_idx] - gates[h, kv_idx], mask_mod=causal)


def forgetting_fast(kv_len):
    """Sums of gates far larger than what is left of their differences."""
    gates = torch.cumsum(-torch.rand(HEADS, kv_len, device="cuda") * 0.1, 1) - 400.0
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + gates[h, q_idx] - gates[h, kv_idx], mask_mod=causal)


def key_bias(kv_len):
    """A bias per key that takes some out, all of a tile among them; rows that see only those."""
    bias = randn(2, HEADS, kv_len)
    bias[:, :, :140] = -torch.inf
    bias[:, :, ::5] = -torch.inf
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[b, h, kv_idx], mask_mod=causal)


def hidden_keys(kv_len):
    """Keys hidden by a large number, as masks of padding are: the first of a tile among them, beside keys that count."""
    bias = randn(2, HEADS, kv_len)
    bias[:, :, : kv_len // 3] = -1e9
    bias[:, :, ::7] = torch.finfo(torch.float32).min
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[b, h, kv_idx])


def key_bias_alibi(kv_len):
    """Beside a multiple of the distance, a table of it and a term of the row."""
    bias, rows, slopes, table = randn(HEADS, kv_len), randn(HEADS, kv_len), torch.rand(HEADS, device="cuda"), randn(HEADS, 33)

    def score(s, b, h, q_idx, kv_idx):
        near = table[h, torch.clamp(q_idx - kv_idx, 0, 32)]
        return s + bias[h, kv_idx] + rows[h, q_idx] - slopes[h] * (q_idx - kv_idx) + near

    return jitgen.Variant(score_mod=score)


def positions(kv_len):
    """A bias that grows with the key's position, without a term of the row."""
    slopes = torch.rand(HEADS, device="cuda") * 0.5
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + slopes[h] * kv_idx, mask_mod=causal)


def steep(kv_len):
    """ALiBi turned round: every tile that is visited later exceeds those before by far."""
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + 0.25 * (q_idx - kv_idx), mask_mod=causal)


def documents(kv_len):
    doc = jitgen.sorted(torch.arange(kv_len, device="cuda", dtype=torch.int32) // 50)
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (doc[q_idx] == doc[kv_idx]) & (kv_idx <= q_idx))


VARIANTS = {
    "dense_bf16": dense(torch.bfloat16),
    "dense_fp32": dense(torch.float32),
    "dense_padded": dense(torch.float16, lambda kv: kv + kv % 2),
    "batched": batched,
    "clipped": clipped,
    "bounded": bounded,
    "capped": capped,
    "capped_bf16": capped,
    "soft_cap": soft_cap,
    "soft_cap_bf16": soft_cap,
    "decaying": decaying,
    "forgetting": forgetting,
    "forgetting_fast": forgetting_fast,
    "key_bias": key_bias,
    "key_bias_bf16": key_bias,
    "key_bias_alibi": key_bias_alibi,
    "hidden_keys": hidden_keys,
    "positions": positions,
    "steep": steep,
    "documents": documents,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_early_scores_are_the_oracle(name):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if name in ("capped_bf16", "soft_cap_bf16", "key_bias_bf16") else torch.float16
    for q_len, kv_len in LENGTHS:
        q = randn(2, HEADS, q_len, 128, dtype=dtype)
        k, v = randn(2, HEADS, kv_len, 128, dtype=dtype), randn(2, HEADS, kv_len, 128, dtype=dtype)
        variant = VARIANTS[name](kv_len)
        atol = 5e-3 if name == "bounded" or "cap" in name else 2e-4  # tanh.approx
        check_attention(variant, q, k, v, f"{name}, q_len {q_len}, kv_len {kv_len}", atol=atol)


@pytest.mark.parametrize("head_dim", [64, 96, 192, 256])
@pytest.mark.parametrize("name", ["forgetting_fast", "key_bias", "hidden_keys", "key_bias_alibi"])
def test_what_keys_add_is_the_oracle(name, head_dim):
    """Terms that a product adds, in three parts each, or that threads read: by head dim."""
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        for q_len, kv_len in ((129, 129), (300, 777)):
            q = randn(2, HEADS, q_len, head_dim, dtype=dtype)
            k, v = randn(2, HEADS, kv_len, head_dim, dtype=dtype), randn(2, HEADS, kv_len, head_dim, dtype=dtype)
            check_attention(VARIANTS[name](kv_len), q, k, v, f"{name}, {dtype}, q_len {q_len}, kv_len {kv_len}", atol=2e-4)
