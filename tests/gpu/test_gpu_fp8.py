"""The 8-bit kernel against attention in float64 on the dequantised inputs.

The yardstick is float64 attention whose weights alone are rounded to e4m3, measured from the maxima that the kernel keeps.
"""

from __future__ import annotations

import math

import pytest
import torch
from norm_cases import Sigmoid

import jitgen
from jitgen import reference, runtime
from jitgen.errors import UnsupportedDtype, UnsupportedVariant, VariantError

E4M3 = torch.float8_e4m3fn
TIMES_ROUNDED = 1.05  # error allowed, as a multiple of the yardstick's: 2-norms against float64
SLACK_BITS, SLACK_BITS_OF_64 = 4, 4.75  # of the kernel; of head dims up to 64
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
hopper = pytest.mark.skipif(not HOPPER, reason="the sm90_fp8 family needs compute capability 9.0")


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def window(b, h, q_idx, kv_idx):
    return (kv_idx <= q_idx) & (q_idx - kv_idx < 200)


def inputs(batch, heads, kv_heads, q_len, kv_len, head_dim, head_dim_v=None, mean=0.0):
    generator = torch.Generator("cuda").manual_seed(q_len * 1000 + kv_len)

    def random(*shape, mean=0.0):
        return (torch.randn(shape, generator=generator, device="cuda") + mean).to(E4M3)

    return (
        random(batch, heads, q_len, head_dim),
        random(batch, kv_heads, kv_len, head_dim),
        random(batch, kv_heads, kv_len, head_dim_v or head_dim, mean=mean),
    )


def random_scales(*shape):
    return torch.rand(shape, generator=torch.Generator("cuda").manual_seed(sum(shape)), device="cuda") + 0.5


def scaled(t, scale):
    """``t`` in float64, multiplied as documented."""
    if scale is None:
        return t.double()
    scale = torch.as_tensor(scale, dtype=torch.float64, device="cuda")
    return t.double() * (scale if scale.numel() == 1 else scale.reshape(-1, t.shape[1], 1, 1))


def relative_error(got, want):
    assert not got.isnan().any()
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-300)).item()


def rounded_attention(q, k, v, mask_mod=None, q_offset=None, sums_rounded=False, score_mod=None, scale=None):
    """Attention in float64 but for the weights, which are rounded to e4m3 as the kernel's are.

    Without LSE the kernel of head dims 64 and 128 sums the rounded ones: ``sums_rounded``.

    It measures them from the maximum of the keys visited so far, in tiles from the last key on, which becomes 2**4; a maximum
    is kept until another exceeds it by more than so many bits. So the largest weight of a row is a power of two, and has no
    error, only where no maximum was kept: peaked rows lose a quarter by that.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().expand(q.shape[0], -1, -1, -1).repeat_interleave(group, 1) for t in (k, v))
    logits = q.double() @ k.mT * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    offset = k.shape[2] - q.shape[2] if q_offset is None else q_offset
    rows, keys = torch.arange(q.shape[2], device="cuda")[:, None] + offset, torch.arange(k.shape[2], device="cuda")
    if score_mod is not None:
        heads = torch.arange(q.shape[1], device="cuda")[:, None, None]
        logits = score_mod(logits, 0, heads, rows, keys)
    logits = logits * math.log2(math.e)
    if mask_mod is not None:
        logits = logits.masked_fill(~mask_mod(0, 0, rows, keys), -math.inf)
    slack = SLACK_BITS if q.shape[3] > 64 else SLACK_BITS_OF_64
    tile_kv = 128  # a short last tile makes more of a difference than its size: its maximum is kept
    kept = torch.full_like(logits[..., :1], -math.inf)
    total, out = torch.zeros_like(kept), v.new_zeros(*q.shape[:3], v.shape[3])
    for first in reversed(range(0, k.shape[2], tile_kv)):
        tile = logits[..., first : first + tile_kv]
        top = tile.amax(-1, keepdim=True)
        origin = torch.where(top > kept + slack, top, kept)
        factor = torch.exp2(kept - origin).nan_to_num()  # both -inf: nothing so far
        weights = torch.exp2(tile - origin.nan_to_num(neginf=0.0)) * 2**4
        rounded = weights.float().to(E4M3).double()
        out = out * factor + rounded @ v[:, :, first : first + tile_kv]
        total, kept = total * factor + (rounded if sums_rounded else weights).sum(-1, keepdim=True), origin
    return torch.nan_to_num(out / total)


def assert_as_accurate_as_rounded_weights(got, want, yardstick):
    """The rounding of the output is independent of that of the weights: their squares add."""
    error, rounded = relative_error(got, want), relative_error(yardstick, want)
    bound = math.hypot(TIMES_ROUNDED * rounded, torch.finfo(got.dtype).eps / 2)
    assert error <= bound, f"error {error:.4f}, of rounded weights {rounded:.4f}"


def poison(like):
    """Leave NaN in the memory that the next output and workspace will get."""
    for _ in range(3):
        torch.full_like(like, math.nan)
        torch.full((like.numel(),), 0x7F, dtype=torch.uint8, device="cuda")  # NaN in e4m3


@hopper
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("length", [1, 63, 65, 127, 257, 515, 1100])
@pytest.mark.parametrize("mask_mod", [None, causal, window], ids=["full", "causal", "window"])
def test_kernel_is_as_accurate_as_rounded_weights(head_dim, length, mask_mod):
    q, k, v = inputs(2, 4, 4, length, length, head_dim)
    want, want_lse = reference.attention(*(t.double() for t in (q, k, v)), mask_mod=mask_mod, return_lse=True)
    poison(q)
    got, lse = jitgen.attention(q, k, v, mask_mod=mask_mod, return_lse=True)
    assert got.dtype == torch.bfloat16
    assert_as_accurate_as_rounded_weights(got, want, rounded_attention(q, k, v, mask_mod))
    poison(q)
    alone = jitgen.attention(q, k, v, mask_mod=mask_mod)
    assert_as_accurate_as_rounded_weights(alone, want, rounded_attention(q, k, v, mask_mod, sums_rounded=head_dim <= 128))
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-3, rtol=1e-4)  # q . k is summed in about 14 bits


@hopper
@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (1, 300), (5, 1000), (64, 129), (130, 2257), (300, 7), (129, 64)])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("q_index", ["absolute", "local"])
def test_kernel_counts_queries_from_the_end_of_the_keys(q_len, kv_len, heads, kv_heads, q_index):
    offset = kv_len - q_len if q_index == "absolute" else 0
    if offset < 0:
        pytest.skip("q_idx would be negative")
    q, k, v = inputs(2, heads, kv_heads, q_len, kv_len, 128)
    want, want_lse = reference.attention(*(t.double() for t in (q, k, v)), mask_mod=causal, q_index=q_index, return_lse=True)
    poison(q)
    got, lse = jitgen.attention(q, k, v, mask_mod=causal, q_index=q_index, return_lse=True)
    assert_as_accurate_as_rounded_weights(got, want, rounded_attention(q, k, v, causal, offset))
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-3, rtol=1e-4)


@hopper
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("rise", [-2.0, 1.0, 3.0, 4.5, 7.0])
def test_maxima_that_rise_from_tile_to_tile_are_followed(head_dim, rise):
    """By so many bits, in the order in which tiles are visited: from the last key on. The columns that do so come last, as
    the tensor cores cut off what is small beside a large sum."""
    q, k, v = inputs(1, 2, 2, 200, 700, head_dim)
    bits = rise * (torch.arange(699, -1, -1, device="cuda") // 128)
    q[..., -16:] = 2.0
    k[..., -16:] = (bits * math.sqrt(head_dim) / (32.0 * math.log2(math.e))).to(E4M3)[:, None]
    want, want_lse = reference.attention(*(t.double() for t in (q, k, v)), return_lse=True)
    poison(q)
    got, lse = jitgen.attention(q, k, v, return_lse=True)
    assert_as_accurate_as_rounded_weights(got, want, rounded_attention(q, k, v))
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-3, rtol=1e-4)
    poison(q)
    alone = jitgen.attention(q, k, v)
    assert_as_accurate_as_rounded_weights(alone, want, rounded_attention(q, k, v, sums_rounded=head_dim <= 128))


@hopper
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_long_rows_of_one_sign_are_summed_in_float32(head_dim):
    """In the accumulators of the tensor cores alone 16384 keys lose 18 % of such an output."""
    q, k, v = inputs(1, 2, 1, 70, 16384, head_dim, mean=1.0)
    want = reference.attention(*(t.double() for t in (q, k, v)))
    assert relative_error(jitgen.attention(q, k, v), want) < 0.02


SCALES = {
    "numbers": (0.5, 3, 0.25),
    "per_head": ((8,), (2,), (2,)),
    "per_request_and_head": ((3, 8), (3, 2), (3, 2)),
    "of_v_alone": (None, None, (2,)),
    "of_one_element": ((1,), 0.5, (1,)),
}


@hopper
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shapes", SCALES.values(), ids=SCALES)
def test_scales_multiply_the_inputs(shapes, out_dtype):
    q, k, v = inputs(3, 8, 2, 200, 333, 128)
    scales = [random_scales(*s) if isinstance(s, tuple) else s for s in shapes]
    exact = [scaled(t, s) for t, s in zip((q, k, v), scales, strict=True)]
    named = dict(zip(("scale_q", "scale_k", "scale_v"), scales, strict=True))
    got = jitgen.attention(q, k, v, mask_mod=causal, out_dtype=out_dtype, **named)
    assert got.dtype == out_dtype
    want = reference.attention(*exact, mask_mod=causal)
    assert_as_accurate_as_rounded_weights(got, want, rounded_attention(*exact, causal))


@hopper
def test_new_values_of_scales_compile_nothing():
    q, k, v = inputs(1, 4, 2, 100, 100, 64)
    for scale in (random_scales(4), random_scales(4) + 1.0):
        jitgen.attention(q, k, v, scale_q=scale, scale_k=2.0)
        known = len(runtime.loaded_kernels())
    jitgen.attention(q, k, v, scale_q=random_scales(4), scale_k=0.5)
    assert len(runtime.loaded_kernels()) == known


def soft_cap_window():
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: 5.0 * torch.tanh(s / 5.0),
        mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < 300),
    )


def alibi():
    slopes = torch.linspace(0.01, 0.5, 8, device="cuda")
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + slopes[h] * (kv_idx - q_idx), mask_mod=causal)


def documents():
    doc = torch.arange(2000, device="cuda") // 171
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: doc[q_idx] == doc[kv_idx])


def sorted_documents():
    doc = jitgen.sorted(torch.arange(2000, device="cuda") // 171)
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (doc[q_idx] == doc[kv_idx]) & (kv_idx <= q_idx))


def sorted_documents_in_a_window():
    doc = jitgen.sorted(torch.arange(2000, device="cuda") // 450)
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: 5.0 * torch.tanh(s / 5.0),
        mask_mod=lambda b, h, q_idx, kv_idx: (doc[q_idx] == doc[kv_idx]) & (kv_idx <= q_idx) & (q_idx - kv_idx < 300),
        sink=torch.linspace(-1.0, 1.0, 8, device="cuda"),
    )


def scattered():
    """Every third run of 70 keys: tiles are skipped in the middle of a row."""
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx // 70) % 5 == q_idx // 64 % 5)


def sink():
    return jitgen.Variant(mask_mod=causal, sink=torch.linspace(-1.0, 3.0, 8, device="cuda"))


def every_hook():
    doc, gate = torch.arange(2000, device="cuda") // 500, torch.linspace(-1.0, 1.0, 8, device="cuda")
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: 5.0 * torch.tanh(s / 5.0),
        mask_mod=lambda b, h, q_idx, kv_idx: (doc[q_idx] == doc[kv_idx]) & (kv_idx <= q_idx),
        sink=torch.linspace(-1.0, 1.0, 8, device="cuda"),
        output_transform=lambda o, lse, b, h, q_idx: o * torch.sigmoid(gate[h]),
        lse_transform=lambda lse, b, h, q_idx: lse * 1.4426950408889634,
    )


@hopper
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("scales", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize(
    "make",
    [soft_cap_window, alibi, documents, sorted_documents, sorted_documents_in_a_window, scattered, sink, every_hook],
)
def test_hooks_see_scaled_scores_and_outputs(make, scales, head_dim):
    q, k, v = inputs(2, 8, 4, 700, 1500, head_dim)
    given = (random_scales(8), random_scales(2, 4), random_scales(4)) if scales else (None, None, None)
    exact = [scaled(t, s) for t, s in zip((q, k, v), given, strict=True)]
    named = dict(zip(("scale_q", "scale_k", "scale_v"), given, strict=True))
    want, want_lse = reference.attention(*exact, make(), return_lse=True)
    poison(q)
    got, lse = jitgen.attention(q, k, v, make(), return_lse=True, **named)
    assert relative_error(got, want) < 0.035  # rounded weights: 0.021 to 0.03
    torch.testing.assert_close(lse.double(), want_lse, atol=5e-3, rtol=1e-3)
    poison(q)
    assert relative_error(jitgen.attention(q, k, v, make(), **named), want) < 0.035  # other sums


def cap_of(size):
    return lambda s, b, h, q_idx, kv_idx: size * torch.tanh(s / size)


def slopes_of(largest, sign=1.0):
    slopes = largest * torch.exp2(-torch.arange(8.0, device="cuda"))
    return lambda s, b, h, q_idx, kv_idx: s + slopes[h] * (sign * (kv_idx - q_idx))


def cap_turned_round(s, b, h, q_idx, kv_idx):
    return -20.0 * torch.tanh(s / 20.0)


def cap_of_distances(s, b, h, q_idx, kv_idx):
    return 20.0 * torch.tanh((s + 0.01 * (kv_idx - q_idx)) / 20.0)


EARLY_SCORES = {  # what makes a score, its arguments, what q is multiplied by, and the mask
    "far_from_the_cap": (cap_of, (50.0,), 1.0, causal),
    "near_the_cap": (cap_of, (6.0,), 4.0, window),
    "at_the_cap": (cap_of, (0.5,), 4.0, None),
    "peaks_near_the_cap": (cap_of, (30.0,), 4.0, None),
    "cap_turned_round": (lambda: cap_turned_round, (), 1.0, causal),
    "cap_of_distances": (lambda: cap_of_distances, (), 1.0, None),
    "small_slopes": (slopes_of, (0.05,), 1.0, causal),
    "large_slopes": (slopes_of, (4.0,), 1.0, None),
    "slopes_up_to_the_first_key": (slopes_of, (0.5, -1.0), 1.0, causal),
    "slopes_of_small_scores": (slopes_of, (0.7,), 0.05, window),
}


@hopper
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("scale", [1.0, -1.0], ids=["scale", "negative_scale"])
@pytest.mark.parametrize("case", EARLY_SCORES.values(), ids=EARLY_SCORES)
def test_scores_that_are_taken_apart_are_as_accurate(case, scale, head_dim):
    make, arguments, peak, mask_mod = case
    score_mod = make(*arguments)
    q, k, v = inputs(1, 8, 4, 300, 900, head_dim)
    q, scale = (q.float() * peak).to(E4M3), scale / math.sqrt(head_dim)
    exact = [t.double() for t in (q, k, v)]
    want, want_lse = reference.attention(*exact, score_mod=score_mod, mask_mod=mask_mod, scale=scale, return_lse=True)
    yardstick = [
        rounded_attention(q, k, v, mask_mod, sums_rounded=sums_rounded, score_mod=score_mod, scale=scale)
        for sums_rounded in (False, head_dim <= 128)
    ]
    poison(q)
    got, lse = jitgen.attention(q, k, v, score_mod=score_mod, mask_mod=mask_mod, scale=scale, return_lse=True)
    assert_as_accurate_as_rounded_weights(got, want, yardstick[0])
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-2, rtol=1e-4)
    poison(q)
    got = jitgen.attention(q, k, v, score_mod=score_mod, mask_mod=mask_mod, scale=scale)
    assert_as_accurate_as_rounded_weights(got, want, yardstick[1])


@hopper
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("make, size", [(cap_of, 20.0), (slopes_of, 0.5)], ids=["cap", "slopes"])
def test_early_scores_beside_sinks_and_empty_rows(make, size, head_dim):
    q, k, v = inputs(2, 8, 4, 400, 700, head_dim)
    variant = jitgen.Variant(
        score_mod=make(size),
        mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx + 150 <= q_idx) & (q_idx < 600) & ((kv_idx < 100) | (kv_idx >= 400)),
        sink=torch.linspace(-1.0, 3.0, 8, device="cuda"),
    )
    want, want_lse = reference.attention(*(t.double() for t in (q, k, v)), variant, return_lse=True)
    poison(q)
    got, lse = jitgen.attention(q, k, v, variant, return_lse=True)
    assert relative_error(got, want) < 0.035
    torch.testing.assert_close(lse.double(), want_lse, atol=5e-3, rtol=1e-3)
    assert (got[:, :, 300:] == 0).all()
    poison(q)
    assert relative_error(jitgen.attention(q, k, v, variant), want) < 0.035


@hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("make", [sorted_documents, lambda: jitgen.Variant(mask_mod=window)], ids=["documents", "window"])
def test_masks_hold_in_every_query_tile_of_a_cta(make, head_dim):
    """So many query tiles that each CTA has several; the requests are the same."""
    q, k, v = (t.expand(30, -1, -1, -1).clone() for t in inputs(1, 7, 7, 1100, 1500, head_dim))
    want = reference.attention(*(t[:1].double() for t in (q, k, v)), make())
    for _ in range(3):
        poison(q)
        got = jitgen.attention(q, k, v, make())
        assert relative_error(got[:1], want) < 0.035
        assert (got == got[:1]).all()


@hopper
@pytest.mark.parametrize("make, size", [(cap_of, 20.0), (slopes_of, 0.5)], ids=["cap", "slopes"])
def test_nan_of_a_query_stays_in_its_row(make, size):
    q, k, v = inputs(1, 8, 8, 300, 700, 128)
    score_mod = make(size)
    want = jitgen.attention(q, k, v, score_mod=score_mod)
    q[:, :, 77, 3] = math.nan
    got = jitgen.attention(q, k, v, score_mod=score_mod)
    others = torch.arange(300, device="cuda") != 77
    assert got[:, :, 77].isnan().all()
    torch.testing.assert_close(got[:, :, others], want[:, :, others], atol=4e-3, rtol=2e-2)


@hopper
@pytest.mark.parametrize("batch, rows", [(1, 200), (24, 1500)])
def test_rows_without_keys_are_zero_with_lse_minus_infinity(batch, rows):
    """Of many rows the first ones that a CTA takes may see nothing."""
    q, k, v = inputs(batch, 2, 2, rows, rows + 100, 128)
    poison(q)
    out, lse = jitgen.attention(q, k, v, mask_mod=lambda b, h, q_idx, kv_idx: (q_idx < 230) & (kv_idx < 3), return_lse=True)
    empty = torch.arange(100, rows + 100, device="cuda") >= 230
    assert (out[:, :, empty] == 0).all() and (lse[:, :, empty] == -math.inf).all()
    assert (out[:, :, ~empty] != 0).any() and lse[:, :, ~empty].isfinite().all()
    want = reference.attention(*(t.double() for t in (q, k[:, :, :3], v[:, :, :3])))
    assert relative_error(out[:, :, ~empty], want[:, :, ~empty]) < 0.035


@hopper
def test_no_keys_at_all_give_zeros():
    q, k, v = inputs(2, 2, 2, 5, 0, 64)
    out, lse = jitgen.attention(q, k, v, return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()


@hopper
def test_nan_in_excluded_tiles_of_v_does_not_reach_the_output():
    q, k, v = inputs(1, 2, 2, 140, 600, 128)
    want = jitgen.attention(q, k[:, :, :37], v[:, :, :37])
    v[:, :, 256:] = math.nan  # whole tiles; inside a tile 0 * NaN is NaN, as in torch
    got = jitgen.attention(q, k, v, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx < 37)
    torch.testing.assert_close(got, want, atol=4e-3, rtol=2e-2)


@hopper
@pytest.mark.parametrize("head_dim, head_dim_v", [(40, 40), (72, 96), (192, 128)])
def test_kernel_takes_head_dims_between_the_supported_ones(head_dim, head_dim_v):
    q, k, v = inputs(2, 4, 2, 130, 200, head_dim, head_dim_v)
    want = reference.attention(*(t.double() for t in (q, k, v)))
    assert_as_accurate_as_rounded_weights(jitgen.attention(q, k, v), want, rounded_attention(q, k, v))


LAYOUTS = {
    "heads_inside_positions": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "head_dim_strided": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "every_other_row": lambda t: t.repeat_interleave(2, dim=2)[:, :, ::2],
    "rows_of_72_bytes": lambda t: torch.nn.functional.pad(t, (0, 8))[..., :64],
    "off_by_one_element": lambda t: torch.nn.functional.pad(t.flatten(), (1, 0))[1:].view(t.shape),
}


@hopper
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_takes_any_strides(layout):
    q, k, v = inputs(2, 4, 2, 33, 100, 64)
    want = jitgen.attention(q, k, v, mask_mod=causal)
    assert torch.equal(jitgen.attention(*(LAYOUTS[layout](t) for t in (q, k, v)), mask_mod=causal), want)


@hopper
def test_keys_of_batch_one_serve_the_whole_batch():
    q, k, v = inputs(3, 4, 4, 33, 170, 64)
    want = reference.attention(q.double(), k[:1].double(), v[:1].double())
    got = jitgen.attention(q, k[:1], v[:1])
    assert_as_accurate_as_rounded_weights(got, want, rounded_attention(q, k[:1], v[:1]))
    shared = k[:, :1].expand(-1, 4, -1, -1), v[:, :1].expand(-1, 4, -1, -1)
    assert torch.equal(jitgen.attention(q, *shared), jitgen.attention(q, *(t.contiguous() for t in shared)))


@hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mask_mod", [None, causal], ids=["full", "causal"])
@pytest.mark.parametrize("heads, kv_heads", [(7, 7), (21, 7)])
def test_heads_whose_v_is_copied_later_are_as_others(head_dim, mask_mod, heads, kv_heads):
    """So many query tiles that V of the last heads is transposed by idle warps. A request alone is copied beforehand."""
    q, k, v = inputs(45, heads, kv_heads, 500, 333, head_dim)
    v = torch.nn.functional.pad(v, (0, 16))[..., :head_dim]
    for _ in range(3):
        poison(q)
        got = jitgen.attention(q, k, v, mask_mod=mask_mod, q_index="local")
        for b in (0, 17, 44):
            want = jitgen.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], mask_mod=mask_mod, q_index="local")
            assert torch.equal(got[b : b + 1], want)
    assert_as_accurate_as_rounded_weights(
        got[40:], reference.attention(*(t[40:].double() for t in (q, k, v)), mask_mod=mask_mod, q_index="local"),
        rounded_attention(q[40:], k[40:], v[40:], mask_mod, 0, sums_rounded=True),
    )  # fmt: skip


@hopper
def test_many_requests_fit_the_grid():
    q, k, v = inputs(70000, 1, 1, 1, 2, 64)
    want = reference.attention(*(t.double() for t in (q, k, v)))
    assert_as_accurate_as_rounded_weights(jitgen.attention(q, k, v), want, rounded_attention(q, k, v))


@hopper
def test_negative_scale_turns_the_order_of_keys():
    q, k, v = inputs(1, 2, 2, 100, 200, 64)
    want = reference.attention(*(t.double() for t in (q, k, v)), scale=-0.125)
    assert_as_accurate_as_rounded_weights(jitgen.attention(q, k, v, scale=-0.125), want, rounded_attention(-q.float(), k, v))
    got = jitgen.attention(q, k, v, scale_k=-torch.ones(2, device="cuda"))
    assert_as_accurate_as_rounded_weights(got, want, rounded_attention(-q.float(), k, v))


@hopper
def test_results_are_the_same_from_run_to_run():
    q, k, v = inputs(2, 8, 2, 1300, 2600, 128)
    first = jitgen.attention(q, k, v, mask_mod=causal)
    for _ in range(20):
        assert torch.equal(jitgen.attention(q, k, v, mask_mod=causal), first)


@hopper
def test_kernel_is_captured_in_a_graph():
    q, k, v = inputs(1, 4, 2, 300, 300, 128)
    want = jitgen.attention(q, k, v, mask_mod=causal)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = jitgen.attention(q, k, v, mask_mod=causal)
    out.zero_()
    graph.replay()
    assert torch.equal(out, want)


@hopper
def test_calls_on_two_streams_have_workspaces_of_their_own():
    a, b = inputs(1, 8, 8, 700, 4000, 128), inputs(1, 8, 8, 701, 4000, 128)
    want = [jitgen.attention(*t) for t in (a, b)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(10):
        got = []
        for stream, t in zip(streams, (a, b), strict=True):
            with torch.cuda.stream(stream):
                got.append(jitgen.attention(*t))
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@hopper
def test_what_the_kernel_does_not_do_is_refused():
    q, k, v = inputs(1, 2, 2, 10, 10, 64)
    with pytest.raises(UnsupportedVariant, match="weights of any size"):
        jitgen.attention(q, k, v, jitgen.Variant(softmax=Sigmoid))
    with pytest.raises(VariantError, match="family='sm80' does not take float8_e4m3fn"):
        jitgen.attention(q, k, v, family="sm80")


@pytest.mark.skipif(HOPPER, reason="Hopper has the kernel")
def test_other_devices_are_refused_with_the_remedy():
    q, k, v = inputs(1, 2, 2, 10, 10, 64)
    with pytest.raises(UnsupportedDtype, match="Dequantise"):
        jitgen.attention(q, k, v)
