"""jitgen.attention on the CPU against attention written out in float64: shapes, strides, dtypes, lengths, head counts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import jitgen
from jitgen import reference

# Largest error allowed, as a multiple of the error of torch's own kernel in the same dtype on the same inputs.
TIMES_SDPA = 1.5


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def exact(q, k, v, *, scale=None, is_causal=False, q_offset=None):
    """Attention and its logsumexp in float64, straight from the definition."""
    batch, heads, q_len, head_dim = q.shape
    group, kv_len = heads // k.shape[1], k.shape[2]
    k, v = (t.double().expand(batch, -1, -1, -1).repeat_interleave(group, 1) for t in (k, v))
    logits = q.double() @ k.mT * (scale or 1 / math.sqrt(head_dim))
    if is_causal:
        offset = kv_len - q_len if q_offset is None else q_offset
        keep = torch.arange(kv_len) <= torch.arange(q_len)[:, None] + offset
        logits = logits.masked_fill(~keep, -math.inf)
    weights = torch.nan_to_num(logits.softmax(-1))
    return weights @ v, logits.logsumexp(-1)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def inputs(batch, heads, kv_heads, q_len, kv_len, head_dim, head_dim_v=None, dtype=torch.float32):
    return (
        random(batch, heads, q_len, head_dim, dtype=dtype),
        random(batch, kv_heads, kv_len, head_dim, dtype=dtype, seed=1),
        random(batch, kv_heads, kv_len, head_dim_v or head_dim, dtype=dtype, seed=2),
    )


def largest_error(got, want):
    assert not got.isnan().any()
    return (got.double() - want).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [1, 37, 128, 515])
def test_attention_is_as_accurate_as_sdpa(dtype, is_causal, length):
    q, k, v = inputs(2, 4, 4, length, length, 64, dtype=dtype)
    want, lse = exact(q, k, v, is_causal=is_causal)
    got, got_lse = jitgen.attention(q, k, v, mask_mod=causal if is_causal else None, return_lse=True)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    floor = 4 * torch.finfo(torch.float32).eps  # both may be exact up to float32 where there is one key
    assert got.dtype == dtype
    assert largest_error(got, want) <= TIMES_SDPA * largest_error(theirs, want) + floor
    torch.testing.assert_close(got_lse.double(), lse, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("head_dim, head_dim_v", [(8, 8), (40, 40), (80, 80), (128, 128), (192, 128), (72, 264), (512, 512)])
def test_attention_takes_every_head_dim(head_dim, head_dim_v):
    q, k, v = inputs(1, 2, 2, 67, 131, head_dim, head_dim_v)
    want, _ = exact(q, k, v)
    assert largest_error(jitgen.attention(q, k, v), want) < 5e-6


@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (1, 300), (5, 300), (63, 64), (65, 64), (300, 7), (130, 257)])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (6, 1)])
def test_attention_counts_queries_from_the_end_of_the_keys(q_len, kv_len, heads, kv_heads):
    q, k, v = inputs(2, heads, kv_heads, q_len, kv_len, 64)
    if q_len > kv_len:
        with pytest.raises(jitgen.errors.ShapeMismatch, match=r"q_len .* is larger than kv_len"):
            jitgen.attention(q, k, v, mask_mod=causal)
    else:
        want, lse = exact(q, k, v, is_causal=True)
        got, got_lse = jitgen.attention(q, k, v, mask_mod=causal, return_lse=True)
        assert largest_error(got, want) < 5e-6
        torch.testing.assert_close(got_lse.double(), lse, atol=2e-5, rtol=1e-5)
    want, _ = exact(q, k, v, is_causal=True, q_offset=0)
    assert largest_error(jitgen.attention(q, k, v, mask_mod=causal, q_index="local"), want) < 5e-6


def test_rows_without_keys_are_zero_with_lse_minus_infinity():
    q, k, v = inputs(1, 2, 2, 9, 70, 64)
    out, lse = jitgen.attention(q, k, v, mask_mod=lambda b, h, q_idx, kv_idx: (q_idx < 65) & (kv_idx < 3), return_lse=True)
    empty = torch.arange(61, 70) >= 65
    assert (out[:, :, empty] == 0).all() and (lse[:, :, empty] == -math.inf).all()
    assert (out[:, :, ~empty] != 0).any() and lse[:, :, ~empty].isfinite().all()


def test_no_keys_at_all_give_zeros():
    q, k, v = inputs(2, 2, 2, 5, 0, 64)
    out, lse = jitgen.attention(q, k, v, return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("shape", [(0, 2, 5, 64), (1, 2, 0, 64)])
def test_an_empty_output_launches_nothing(shape):
    q = torch.empty(shape)
    k = torch.empty(shape[0], 2, 7, 64)
    assert jitgen.attention(q, k, k).shape == q.shape


LAYOUTS = {
    "heads_inside_positions": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "head_dim_strided": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "every_other_row": lambda t: t.repeat_interleave(2, dim=2)[:, :, ::2],
    "inside_a_larger_tensor": lambda t: F.pad(t, (3, 5, 1, 1))[:, :, 1:-1, 3:-5],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_takes_any_strides(layout, dtype):
    q, k, v = inputs(2, 4, 2, 33, 100, 64, dtype=dtype)
    want = jitgen.attention(q, k, v, mask_mod=causal)
    strided = [LAYOUTS[layout](t) for t in (q, k, v)]
    assert any(not t.is_contiguous() for t in strided)
    assert torch.equal(jitgen.attention(*strided, mask_mod=causal), want)


def test_keys_of_batch_one_serve_the_whole_batch():
    q, k, v = inputs(3, 4, 4, 33, 70, 64)
    want, _ = exact(q, k[:1], v[:1])
    assert largest_error(jitgen.attention(q, k[:1], v[:1]), want) < 5e-6


def test_output_is_laid_out_like_q():
    q, k, v = inputs(2, 4, 4, 33, 70, 64)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    out = jitgen.attention(q, k, v)
    assert out.transpose(1, 2).is_contiguous()


def test_out_receives_the_result_and_keeps_what_lies_around_it():
    q, k, v = inputs(1, 2, 2, 33, 70, 64)
    around = torch.full((1, 2, 35, 64), math.nan)
    out = around[:, :, 1:-1]
    assert jitgen.attention(q, k, v, out=out) is out
    assert torch.equal(out, jitgen.attention(q, k, v))
    assert around[:, :, 0].isnan().all() and around[:, :, -1].isnan().all()


def test_scale_multiplies_before_the_score_mod():
    q, k, v = inputs(1, 2, 2, 33, 70, 64)
    got, lse = jitgen.attention(q, k, v, score_mod=lambda s, b, h, q_idx, kv_idx: s + 3.0, scale=0.3, return_lse=True)
    want, want_lse = exact(q, k, v, scale=0.3)
    assert largest_error(got, want) < 5e-6
    torch.testing.assert_close(lse.double(), want_lse + 3.0, atol=2e-5, rtol=1e-5)


def test_sink_takes_weight_and_gives_no_value():
    q, k, v = inputs(2, 4, 2, 33, 70, 64)
    sink = torch.tensor([0.5, -1.0, 3.0, -math.inf])
    want, lse = exact(q, k, v)
    with_sink = torch.logaddexp(lse, sink.double()[:, None])
    got, got_lse = jitgen.attention(q, k, v, sink=sink, return_lse=True)
    assert largest_error(got, want * (lse - with_sink).exp()[..., None]) < 5e-6
    torch.testing.assert_close(got_lse.double(), with_sink, atol=2e-5, rtol=1e-5)
    got_one, _ = jitgen.attention(q, k, v, sink=0.5, return_lse=True)
    torch.testing.assert_close(got_one[:, 0], got[:, 0])


def test_results_do_not_depend_on_the_number_of_threads():
    q, k, v = inputs(2, 4, 2, 129, 515, 64)
    want = jitgen.attention(q, k, v, mask_mod=causal)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(jitgen.attention(q, k, v, mask_mod=causal), want)
    finally:
        torch.set_num_threads(threads)


def test_values_of_excluded_keys_do_not_reach_the_output():
    q, k, v = inputs(1, 2, 2, 40, 300, 64)
    want = jitgen.attention(q, k, v, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx < 37)
    k[:, :, 37:], v[:, :, 37:] = 1e4, 1e4
    assert torch.equal(jitgen.attention(q, k, v, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx < 37), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_maximum_that_leaps_leaves_nothing_of_the_earlier_keys(dtype):
    q, k, v = inputs(1, 2, 2, 60, 1100, 64, dtype=dtype)

    def leap(score, b, h, q_idx, kv_idx):
        return score + 90.0 * (kv_idx // 256)  # from tile to tile what is there shrinks to 1e-39

    got, lse = jitgen.attention(q, k, v, score_mod=leap, return_lse=True)
    want, exact_lse = reference.attention(q, k, v, score_mod=leap, return_lse=True)
    unit = torch.finfo(torch.float32).eps * 256  # of a logit, which lies near 360 in the last tile
    assert largest_error(got, want) <= (unit if dtype == torch.float32 else 0.02)
    torch.testing.assert_close(lse.double(), exact_lse, atol=5e-5, rtol=1e-5)


def test_calling_a_kernel_leaves_denormal_numbers_to_the_caller():
    q, k, v = inputs(1, 1, 1, 20, 30, 64)
    jitgen.attention(q, k, v)
    assert (torch.full((4,), 1e-30) * 1e-10 != 0).all()
