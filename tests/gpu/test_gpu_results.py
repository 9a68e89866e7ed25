"""CUDA kernels against attention written out in float64: head dims, lengths, strides, head counts, special rows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import jitgen
from jitgen.errors import ShapeMismatch

# Error allowed, as a multiple of that of torch's own kernel on the same inputs: 2-norms against float64. (Of a single element
# the worst is no yardstick: torch's weight of a row's largest key is exactly 1, ours only within rounding.)
TIMES_SDPA = 1.2
DTYPES = [torch.bfloat16, torch.float16]


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
        positions = torch.arange(q_len, device=q.device)[:, None] + offset
        logits = logits.masked_fill(torch.arange(kv_len, device=q.device) > positions, -math.inf)
    return torch.nan_to_num(logits.softmax(-1)) @ v, logits.logsumexp(-1)


def inputs(batch, heads, kv_heads, q_len, kv_len, head_dim, head_dim_v=None, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(q_len * 1000 + kv_len)

    def random(*shape):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    return (
        random(batch, heads, q_len, head_dim),
        random(batch, kv_heads, kv_len, head_dim),
        random(batch, kv_heads, kv_len, head_dim_v or head_dim),
    )


def poison(like):
    """Leave NaN in the memory that the next output will get."""
    for _ in range(3):
        torch.full_like(like, math.nan)


def largest_error(got, want):
    assert not got.isnan().any()
    return (got.double() - want).abs().max().item()


def relative_error(got, want):
    assert not got.isnan().any()
    return ((got.double() - want).norm() / want.norm()).item()


def assert_as_accurate_as_sdpa(got, want, q, k, v, **options):
    """The bar: torch's math in float64 is the truth, torch's kernel in the inputs' dtype the yardstick."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.expand(q.shape[0], -1, -1, -1).repeat_interleave(group, 1) for t in (k, v))
    theirs = F.scaled_dot_product_attention(q, k, v, **options)
    error, bound = relative_error(got, want), TIMES_SDPA * relative_error(theirs, want)
    assert error <= bound + torch.finfo(q.dtype).eps * 1e-2, f"error {error:.3g}, torch's {bound / TIMES_SDPA:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("length", [1, 63, 65, 127, 257, 515, 1024])
@pytest.mark.parametrize("is_causal", [False, True])
def test_kernel_is_as_accurate_as_sdpa(family, dtype, head_dim, length, is_causal):
    q, k, v = inputs(2, 4, 4, length, length, head_dim, dtype=dtype)
    want, want_lse = exact(q, k, v, is_causal=is_causal)
    poison(q)
    got, lse = jitgen.attention(q, k, v, mask_mod=causal if is_causal else None, return_lse=True, family=family)
    assert_as_accurate_as_sdpa(got, want, q, k, v, is_causal=is_causal)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (1, 300), (5, 1000), (64, 129), (130, 257), (300, 7), (129, 64)])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (6, 1)])
def test_kernel_counts_queries_from_the_end_of_the_keys(family, q_len, kv_len, heads, kv_heads):
    q, k, v = inputs(2, heads, kv_heads, q_len, kv_len, 128)
    for q_index, offset in (("absolute", kv_len - q_len), ("local", 0)):
        if offset < 0:
            continue
        want, want_lse = exact(q, k, v, is_causal=True, q_offset=offset)
        poison(q)
        got, lse = jitgen.attention(q, k, v, mask_mod=causal, q_index=q_index, return_lse=True, family=family)
        keep = torch.arange(kv_len, device="cuda") <= torch.arange(q_len, device="cuda")[:, None] + offset
        assert_as_accurate_as_sdpa(got, want, q, k, v, attn_mask=keep)
        torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("head_dim, head_dim_v", [(192, 128), (40, 40), (72, 72), (80, 64), (136, 200)])
def test_kernel_takes_head_dims_between_the_supported_ones(family, head_dim, head_dim_v):
    q, k, v = inputs(2, 4, 2, 130, 200, head_dim, head_dim_v)
    want, _ = exact(q, k, v)
    got = jitgen.attention(q, k, v, family=family)
    assert got.shape == want.shape
    assert largest_error(got, want) < 8e-3


LAYOUTS = {
    "heads_inside_positions": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "head_dim_strided": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "every_other_row": lambda t: t.repeat_interleave(2, dim=2)[:, :, ::2],
    "off_by_one_element": lambda t: F.pad(t.flatten(), (1, 0))[1:].view(t.shape),
    "fused_qkv": lambda t: F.pad(t, (64, 64))[..., 64:-64],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_takes_any_strides(family, layout):
    q, k, v = inputs(2, 4, 2, 33, 100, 64)
    want = jitgen.attention(q, k, v, mask_mod=causal, family=family)
    strided = [LAYOUTS[layout](t) for t in (q, k, v)]
    assert torch.equal(jitgen.attention(*strided, mask_mod=causal, family=family), want)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_kernel_follows_maxima_that_jump(family, head_dim, is_causal):
    q, k, v = inputs(2, 4, 4, 515, 515, head_dim)
    k *= torch.exp2(torch.randint(-3, 5, (2, 4, 515, 1), generator=torch.Generator().manual_seed(7))).cuda()
    want, want_lse = exact(q, k, v, is_causal=is_causal)
    poison(q)
    got, lse = jitgen.attention(q, k, v, mask_mod=causal if is_causal else None, return_lse=True, family=family)
    assert relative_error(got, want) < torch.finfo(q.dtype).eps / 2  # roundings of the largest weight and of the output
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-5)


# The caps lie on both sides of what the sm80 kernel needs no running maximum for. Logits are at the cap, above or below zero
# for whole tiles, so a reference that the first tile gives is wrong by twice the cap for a later one.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("cap", [0.5, 20.0, 50.0, 62.0, 63.0, 200.0, -30.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_capped_logits_of_any_reach(family, dtype, head_dim, cap, sign):
    q, k, v = inputs(1, 2, 2, 130, 330, head_dim, dtype=dtype)
    q, k = q.abs() + 0.5, (k.abs() + 0.5) * 2048
    k[:, :, 64:200] *= -1
    k[:, 1] *= -1
    capped = jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: cap * torch.tanh(s / cap), mask_mod=causal)
    logits = cap * torch.tanh(q.double() @ k.double().mT * sign / math.sqrt(head_dim) / cap)
    logits = logits.masked_fill(torch.arange(330, device="cuda") > torch.arange(200, 330, device="cuda")[:, None], -math.inf)
    poison(q)
    got, lse = jitgen.attention(q, k, v, capped, scale=sign / math.sqrt(head_dim), return_lse=True, family=family)
    assert relative_error(got, logits.softmax(-1) @ v.double()) < 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=1e-3 + abs(cap) * 2**-11, rtol=1e-5)  # tanh.approx


# A factor below zero takes the path where logits are scaled before the maximum.
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("factor", [1.0, -1.5])
def test_multiples_of_the_distance_of_either_sign(family, head_dim, factor):
    q, k, v = inputs(2, 4, 2, 200, 333, head_dim)
    slopes = torch.tensor([0.5, 0.01, 0.0, -0.25], device="cuda")
    alibi = jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: factor * s + slopes[h] * (kv_idx - q_idx), mask_mod=causal)
    distance = torch.arange(333, device="cuda") - torch.arange(133, 333, device="cuda")[:, None]
    keys, values = (t.double().repeat_interleave(2, 1) for t in (k, v))
    logits = factor * (q.double() @ keys.mT) / math.sqrt(head_dim) + slopes.double()[:, None, None] * distance
    logits = logits.masked_fill(distance > 0, -math.inf)
    poison(q)
    got, lse = jitgen.attention(q, k, v, alibi, return_lse=True, family=family)
    assert relative_error(got, logits.softmax(-1) @ values) < torch.finfo(q.dtype).eps
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("q_len", [535, 301])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_documents_of_every_length(family, head_dim, q_len, is_sorted):
    lengths = torch.tensor([1, 62, 2, 130, 64, 5, 71, 200])
    document = torch.repeat_interleave(torch.arange(8, dtype=torch.int32), lengths).cuda()
    captured = jitgen.sorted(document) if is_sorted else document
    q, k, v = inputs(2, 4, 2, q_len, 535, head_dim)
    inside = jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (captured[q_idx] == captured[kv_idx]) & (kv_idx <= q_idx))
    rows = torch.arange(535 - q_len, 535, device="cuda")[:, None]
    keep = (document[rows] == document) & (torch.arange(535, device="cuda") <= rows)
    logits = (q.double() @ k.double().repeat_interleave(2, 1).mT / math.sqrt(head_dim)).masked_fill(~keep, -math.inf)
    poison(q)
    got, lse = jitgen.attention(q, k, v, inside, return_lse=True, family=family)
    assert_as_accurate_as_sdpa(got, logits.softmax(-1) @ v.double().repeat_interleave(2, 1), q, k, v, attn_mask=keep)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [128, 256])
def test_rows_without_keys_are_zero_with_lse_minus_infinity(family, head_dim):
    q, k, v = inputs(1, 2, 2, 200, 300, head_dim)
    poison(q)
    out, lse = jitgen.attention(
        q, k, v, mask_mod=lambda b, h, q_idx, kv_idx: (q_idx < 230) & (kv_idx < 3), return_lse=True, family=family
    )
    empty = torch.arange(100, 300, device="cuda") >= 230
    assert (out[:, :, empty] == 0).all() and (lse[:, :, empty] == -math.inf).all()
    assert (out[:, :, ~empty] != 0).any() and lse[:, :, ~empty].isfinite().all()


def test_no_keys_at_all_give_zeros(family):
    q, k, v = inputs(2, 2, 2, 5, 0, 64)
    out, lse = jitgen.attention(q, k, v, return_lse=True, family=family)
    assert (out == 0).all() and (lse == -math.inf).all()


def test_values_of_excluded_keys_do_not_reach_the_output(family):
    q, k, v = inputs(1, 2, 2, 140, 300, 128)
    want = jitgen.attention(q, k[:, :, :37], v[:, :, :37], family=family)
    k[:, :, 37:], v[:, :, 37:] = 1e4, 1e4
    got = jitgen.attention(q, k, v, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx < 37, family=family)
    torch.testing.assert_close(got, want, atol=4e-3, rtol=2e-2)


def test_keys_of_batch_one_serve_the_whole_batch(family):
    q, k, v = inputs(3, 4, 4, 33, 170, 64)
    want, _ = exact(q, k[:1], v[:1])
    assert largest_error(jitgen.attention(q, k[:1], v[:1], family=family), want) < 8e-3


def test_many_heads_and_requests_fit_the_grid(family):
    q, k, v = inputs(70000, 1, 1, 1, 2, 64)
    want, _ = exact(q, k, v)
    assert largest_error(jitgen.attention(q, k, v, family=family), want) < 2e-2


def test_kernel_runs_on_the_current_stream(family):
    q, k, v = inputs(1, 4, 4, 2048, 2048, 128)
    want = jitgen.attention(q, k, v, family=family)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = q.clone()
        torch.cuda._sleep(20_000_000)
        late.mul_(2)
        got = jitgen.attention(late, k, v, scale=0.5 / math.sqrt(128), family=family)
    torch.cuda.synchronize()
    torch.testing.assert_close(got, want, atol=4e-3, rtol=2e-2)


def test_call_that_comes_again_reads_its_own_tensors_wherever_they_lie(family):
    for i in range(4):
        q, k, v = (t * (i + 1) for t in inputs(1, 4, 2, 100, 100, 64))
        if i == 3:  # memory that the kernel cannot read, with the looks of that before it
            q, k, v = (torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape) for t in (q, k, v))
        got = jitgen.attention(q, k, v, scale=0.05, family=family)
        assert largest_error(got, exact(q, k, v, scale=0.05)[0]) < 2e-2 * (i + 1)
    with pytest.raises(ShapeMismatch, match="v has kv_len 99, k has 100"):
        jitgen.attention(q, k, v[:, :, :99], scale=0.05, family=family)


def test_more_streams_than_tile_counters(family):
    q, k, v = inputs(3, 40, 40, 300, 300, 64)
    want = jitgen.attention(q, k, v, mask_mod=causal, family=family)
    streams = [torch.cuda.Stream(priority=-level) for level in range(3) for _ in range(32)]
    got = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got.append(jitgen.attention(q, k, v, mask_mod=causal, family=family))
    torch.cuda.synchronize()
    assert len({stream.stream_id for stream in streams}) > 64
    assert all(torch.equal(out, want) for out in got)


def test_kernel_is_captured_in_a_graph(family):
    q, k, v = inputs(1, 4, 2, 300, 300, 128)
    want = jitgen.attention(q, k, v, mask_mod=causal, family=family)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = jitgen.attention(q, k, v, mask_mod=causal, family=family)
    q.copy_(q.flip(0))
    out.zero_()
    graph.replay()
    assert torch.equal(out, want)


def test_flex_attention_in_torch_compile(family):
    q, k, v = inputs(2, 4, 4, 130, 200, 64)

    def call(q, k, v):
        return jitgen.flex_attention(q, k, v, mask_mod=causal, kernel_options={"FAMILY": family})

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(call, backend="aot_eager", fullgraph=True)(q, k, v), call(q, k, v))
