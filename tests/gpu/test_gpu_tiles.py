"""Launches without a mask whose query tiles have two sizes, so that all SMs end together: hooks against float64."""

from __future__ import annotations

import pytest
import query_tiles
import torch
from gallery.rounding import check_attention
from norm_cases import Sigmoid

import jitgen
from jitgen import reference

HEADS, LENGTH, ODD, KEYS = 16, 2048, 1969, 2100  # 11 tiles of 192 rows for each head, on 132 SMs
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


def alibi():
    slopes = torch.rand(HEADS, device="cuda") * 0.1
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + slopes[h] * (kv_idx - q_idx))


def soft_cap():
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: 5.0 * torch.tanh(s / 5.0))


def key_bias():
    bias = randn(HEADS, KEYS)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[h, kv_idx])


def dense_bias():
    bias = randn(HEADS, KEYS, KEYS, dtype=torch.bfloat16)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[h, q_idx, kv_idx])


def distances():
    table = randn(HEADS, 129)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + table[h, torch.clamp(q_idx - kv_idx, -64, 64) + 64])


def sink():
    return jitgen.Variant(sink=randn(HEADS))


def norm():
    return jitgen.Variant(softmax=Sigmoid())


def output():
    gates = torch.rand(HEADS, device="cuda")
    return jitgen.Variant(output_transform=lambda o, lse, b, h, q_idx: o * gates[h])


VARIANTS = {
    "plain": jitgen.Variant,
    "alibi": alibi,
    "soft_cap": soft_cap,
    "key_bias": key_bias,
    "dense_bias": dense_bias,
    "distances": distances,
    "sink": sink,
    "output": output,
}


@pytest.fixture(scope="module", autouse=True)
def launches_have_two_sizes(tmp_path_factory):
    """What these tests are for, on this GPU."""
    library = query_tiles.build(tmp_path_factory.mktemp("tiles")) or pytest.skip("no C++ compiler on this machine")
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    for q_len in (LENGTH, ODD):
        num_tiles, _, num_short, _ = query_tiles.schedule_of(library, q_len, HEADS, 192, num_sms)
        assert num_short > 0, f"{num_tiles} tiles of {q_len} rows on {num_sms} SMs"


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("q_len, kv_heads, head_dim", [(LENGTH, HEADS, 128), (ODD, 4, 64)])
def test_rows_of_all_tiles_are_the_oracle(name, q_len, kv_heads, head_dim):
    torch.manual_seed(0)
    q = randn(1, HEADS, q_len, head_dim, dtype=torch.bfloat16)
    k, v = randn(2, 1, kv_heads, KEYS, head_dim, dtype=torch.bfloat16)
    atol = 5e-3 if name == "soft_cap" else 2e-4  # tanh.approx
    check_attention(VARIANTS[name](), q, k, v, f"{name}, q_len {q_len}", atol=atol, family="sm90")


def assert_rows_are_alike(out, want, allowed):
    """Errors of rows, relative, over all heads: none is far above the others, and they are at most ``allowed``."""
    error = ((out.double() - want).norm(dim=-1) / want.norm(dim=-1)).mean(dim=(0, 1))
    assert error.isfinite().all()
    worst, usual = error.amax().item(), error.median().item()
    assert worst < 2 * usual < 2 * allowed, f"row {error.argmax()} of {len(error)}: {worst:.4f}, others {usual:.4f}"


@pytest.mark.parametrize("q_len, kv_heads, head_dim", [(LENGTH, HEADS, 96), (ODD, 4, 64)])
def test_rows_of_a_norm_are_alike(q_len, kv_heads, head_dim):
    """One without a logsumexp."""
    torch.manual_seed(0)
    q = randn(1, HEADS, q_len, head_dim, dtype=torch.bfloat16)
    k, v = randn(2, 1, kv_heads, KEYS, head_dim, dtype=torch.bfloat16)
    out = torch.full_like(q, torch.nan)
    jitgen.attention(q, k, v, norm(), out=out, family="sm90")
    assert_rows_are_alike(out, reference.attention(*(t.double() for t in (q, k, v)), norm()), 0.005)


@pytest.mark.parametrize("name", ["plain", "soft_cap", "alibi", "sink"])
@pytest.mark.parametrize("q_len, kv_heads, head_dim", [(LENGTH, HEADS, 128), (ODD, 4, 64)])
def test_rows_of_8_bits_are_alike(name, q_len, kv_heads, head_dim):
    torch.manual_seed(0)
    q = randn(1, HEADS, q_len, head_dim, dtype=torch.float8_e4m3fn)
    k, v = randn(2, 1, kv_heads, KEYS, head_dim, dtype=torch.float8_e4m3fn)
    variant = VARIANTS[name]()
    out = torch.full(q.shape, torch.nan, device="cuda", dtype=torch.bfloat16)
    jitgen.attention(q, k, v, variant, out=out)
    assert_rows_are_alike(out, reference.attention(*(t.double() for t in (q, k, v)), variant), 0.04)
