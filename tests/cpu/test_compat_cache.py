"""flashinfer.page, .rope, .quantization, .activation and .norm of the shim against the definitions."""

from __future__ import annotations

import math

import pytest
import torch
from compat_reference import assert_near, rope_by_hand

from jitgen.compat import flashinfer
from jitgen.errors import ShapeMismatch, UnsupportedDtype, UnsupportedOption

# ---- bits -----------------------------------------------------------------------------------------------------------------


def packed_by_hand(bits, order):
    values = []
    for i in range(0, len(bits), 8):
        byte = [*bits[i : i + 8], *[False] * (8 - len(bits[i : i + 8]))]
        values.append(int("".join("01"[bit] for bit in (byte if order == "big" else byte[::-1])), 2))
    return torch.tensor(values, dtype=torch.uint8)


@pytest.mark.parametrize("order", ["big", "little"])
@pytest.mark.parametrize("n", [0, 1, 8, 13, 64])
def test_packbits(n, order):
    x = torch.rand(n) < 0.5
    assert torch.equal(flashinfer.packbits(x, order), packed_by_hand(x.tolist(), order))
    assert torch.equal(flashinfer.packbits(x.int() * 3, bitorder=order), flashinfer.packbits(x, order))


def test_packbits_is_big_endian_by_default():
    assert flashinfer.packbits(torch.tensor([True, False, False])).tolist() == [128]


@pytest.mark.parametrize("order", ["big", "little"])
def test_segments_start_at_bytes(order):
    indptr = torch.tensor([0, 3, 3, 19, 27], dtype=torch.int32)
    x = torch.rand(27) < 0.5
    packed, starts = flashinfer.segment_packbits(x, indptr, order)
    assert starts.tolist() == [0, 1, 1, 3, 4] and starts.dtype == torch.int32
    segments = [packed_by_hand(x[a:b].tolist(), order) for a, b in ((0, 3), (3, 19), (19, 27))]
    assert torch.equal(packed, torch.cat(segments))
    with pytest.raises(ShapeMismatch, match="x has 26 elements, indptr ends at 27"):
        flashinfer.segment_packbits(x[1:], indptr, order)
    with pytest.raises(UnsupportedOption, match="bitorder='middle'"):
        flashinfer.packbits(x, "middle")


# ---- pages ----------------------------------------------------------------------------------------------------------------


def test_lengths_from_page_tables():
    indptr, last = torch.tensor([0, 2, 3, 3], dtype=torch.int32), torch.tensor([3, 16, 0], dtype=torch.int32)
    assert flashinfer.get_seq_lens(indptr, last, 16).tolist() == [19, 16, 0]


def test_positions_of_new_tokens():
    indptr, seq_lens = torch.tensor([0, 3, 3, 5], dtype=torch.int32), torch.tensor([10, 4, 2], dtype=torch.int32)
    batch_indices, positions = flashinfer.get_batch_indices_positions(indptr, seq_lens, 7)
    assert batch_indices.tolist() == [0, 0, 0, 2, 2, -1, -1] and batch_indices.dtype == torch.int32
    assert positions.tolist()[:5] == [7, 8, 9, 0, 1]
    buffers = torch.full((7,), 9, dtype=torch.int32), torch.full((7,), 9, dtype=torch.int32)
    assert flashinfer.get_batch_indices_positions(indptr, seq_lens, 7, *buffers)[0] is buffers[0]
    assert torch.equal(buffers[0], batch_indices) and torch.equal(buffers[1], positions)
    none = flashinfer.get_batch_indices_positions(torch.tensor([0]), torch.tensor([], dtype=torch.int64), 2)
    assert none[0].tolist() == [-1, -1]


INDPTR, INDICES = torch.tensor([0, 3, 3, 4], dtype=torch.int32), torch.tensor([5, 0, 2, 7], dtype=torch.int32)
PAGE_SIZE = 4


def expected_cache(cache, rows, batch_indices, positions):
    want = cache.clone()
    for row, b, position in zip(rows, batch_indices.tolist(), positions.tolist(), strict=True):
        if b >= 0 and position >= 0:
            want[INDICES[INDPTR[b] + position // PAGE_SIZE], position % PAGE_SIZE] = row.to(cache.dtype)
    return want


TOKENS = {
    "some": ([0, 0, 2, 2], [4, 11, 0, 3]),
    "first_skipped": ([-1, 0, 2, -1], [0, 9, 1, 0]),
    "negative_position": ([0, 2], [-1, 2]),
    "all_skipped": ([-1, -1], [0, 0]),
    "none": ([], []),
}


@pytest.mark.parametrize(("batch_indices", "positions"), TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("form", ["pair", "joined"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_append_writes_tokens_to_their_places_and_nothing_else(batch_indices, positions, layout, form, dtype):
    batch_indices, positions = (torch.tensor(x, dtype=torch.int32) for x in (batch_indices, positions))
    k, v = torch.randn(len(batch_indices), 2, 8), torch.randn(len(batch_indices), 2, 8)
    caches = [torch.randn(9, PAGE_SIZE, 2, 8).to(dtype) for _ in range(2)]
    want = [expected_cache(c, rows, batch_indices, positions) for c, rows in zip(caches, (k, v), strict=True)]
    given = [c.transpose(1, 2).contiguous() if layout == "HND" else c for c in caches]
    given = torch.stack(given, 1) if form == "joined" else tuple(given)
    last = torch.tensor([4, 0, 4])
    flashinfer.append_paged_kv_cache(k, v, batch_indices, positions, given, INDICES, INDPTR, last, layout)
    for got, expected in zip(given.unbind(1) if form == "joined" else given, want, strict=True):
        got = got.transpose(1, 2) if layout == "HND" else got
        assert torch.equal(got.float(), expected.float())


def test_padded_rows_from_positions_to_append():
    """What get_batch_indices_positions pads with is skipped, as the last request's pages show."""
    append_indptr, seq_lens = torch.tensor([0, 2, 2, 3], dtype=torch.int32), torch.tensor([9, 0, 4], dtype=torch.int32)
    batch_indices, positions = flashinfer.get_batch_indices_positions(append_indptr, seq_lens, 6)
    k, cache = torch.randn(6, 2, 8), torch.zeros(9, PAGE_SIZE, 2, 8)
    want = expected_cache(cache, k, batch_indices, positions)
    flashinfer.append_paged_kv_cache(k, k, batch_indices, positions, (cache, cache.clone()), INDICES, INDPTR, None)
    assert torch.equal(cache, want)


def test_append_to_an_mla_cache():
    batch_indices, positions = torch.tensor([0, -1, 2]), torch.tensor([6, 0, 1])
    ckv, kpe = torch.randn(3, 512), torch.randn(3, 64)
    caches = torch.randn(9, PAGE_SIZE, 512), torch.randn(9, PAGE_SIZE, 64)
    want = [expected_cache(c, rows, batch_indices, positions) for c, rows in zip(caches, (ckv, kpe), strict=True)]
    flashinfer.append_paged_mla_kv_cache(ckv, kpe, batch_indices, positions, *caches, INDICES, INDPTR, None)
    for got, expected in zip(caches, want, strict=True):
        assert torch.equal(got, expected)


def test_append_refuses_rows_that_do_not_fit():
    k, cache, where = torch.randn(2, 3, 8), torch.zeros(9, PAGE_SIZE, 2, 8), torch.tensor([0, 0])
    with pytest.raises(ShapeMismatch, match=r"append_key has rows \(3, 8\), the cache has \(2, 8\)"):
        flashinfer.append_paged_kv_cache(k, k, where, where, (cache, cache), INDICES, INDPTR, None)
    with pytest.raises(ShapeMismatch, match="append_key has 2 tokens, positions has 1"):
        flashinfer.append_paged_kv_cache(k[:, :2], k[:, :2], where, where[:1], (cache, cache), INDICES, INDPTR, None)
    with pytest.raises(ShapeMismatch, match="paged_kv_cache has shape"):
        flashinfer.append_paged_kv_cache(k, k, where, where, cache, INDICES, INDPTR, None)


# ---- rotation -------------------------------------------------------------------------------------------------------------


def rotated_by_hand(x, positions, frequency, interleave):
    d = 2 * len(frequency)
    angle = positions.double()[:, None, None] * frequency
    head, tail = x.double()[..., :d], x.double()[..., d:]
    a, b = (head[..., ::2], head[..., 1::2]) if interleave else head.chunk(2, -1)
    pair = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin())
    return torch.cat((torch.stack(pair, -1).flatten(-2) if interleave else torch.cat(pair, -1), tail), -1)


def frequencies(d, theta, scale, llama31=None):
    result = []
    for i in range(d // 2):
        f = theta ** (-2 * i / d)
        s = 0.0
        if llama31:
            lo, hi, length = llama31
            s = min(max(f * length / (2 * math.pi * (hi - lo)) - 1 / (hi / lo - 1), 0.0), 1.0)
        result.append((1 - s) * f / scale + s * f)
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("llama31", [False, True])
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rope_of_every_form(llama31, interleave, rotary_dim, dtype):
    indptr, offsets = torch.tensor([0, 3, 3, 7], dtype=torch.int32), torch.tensor([5, 9, 1000], dtype=torch.int32)
    positions = torch.tensor([5, 6, 7, 1000, 1001, 1002, 1003])
    q, k = torch.randn(7, 4, 32).to(dtype), torch.randn(7, 2, 32).to(dtype)
    name = "apply_llama31_rope" if llama31 else "apply_rope"
    options = {"rotary_dim": rotary_dim, "interleave": interleave, "rope_scale": 2.0, "rope_theta": 1e4}
    smooth = None
    if llama31:
        options |= {"low_freq_factor": 1, "high_freq_factor": 4, "old_context_len": 256}
        smooth = (1, 4, 256)
    frequency = frequencies(rotary_dim or 32, 1e4, 2.0, smooth)
    want = [rotated_by_hand(t, positions, frequency, interleave) for t in (q, k)]
    for suffix, where in (("", (indptr, offsets)), ("_pos_ids", (positions,))):
        got = getattr(flashinfer, name + suffix)(q, k, *where, **options)
        copies = q.clone(), k.clone()
        assert getattr(flashinfer, f"{name}{suffix}_inplace")(*copies, *where, **options) is None
        for g, c, w in zip(got, copies, want, strict=True):
            assert g.dtype == dtype and torch.equal(g, c)
            assert_near(g, w, 2e-2 if dtype == torch.bfloat16 else 4e-4)  # angles up to 1003 radians, in float32


def test_rope_defaults():
    q, k, positions = torch.randn(3, 2, 16), torch.randn(3, 1, 16), torch.arange(3)
    assert_near(flashinfer.apply_rope_pos_ids(q, k, positions)[0], rope_by_hand(q, positions), 1e-6)
    frequency = frequencies(16, 5e5, 8, (1, 4, 8192))
    assert_near(
        flashinfer.apply_llama31_rope_pos_ids(q, k, positions)[1], rotated_by_hand(k, positions, frequency, False), 1e-6
    )


@pytest.mark.parametrize("is_neox", [False, True])
def test_rope_from_a_table(is_neox):
    positions = torch.tensor([3, 0, 40])
    angle = torch.arange(64)[:, None] * frequencies(16, 1e4, 1.0)
    table = torch.cat((angle.cos(), angle.sin()), -1).float()
    q, k = torch.randn(3, 4 * 32), torch.randn(3, 2 * 32)
    want = [rotated_by_hand(t.view(3, -1, 32), positions, frequencies(16, 1e4, 1.0), not is_neox).flatten(1) for t in (q, k)]
    got = flashinfer.apply_rope_with_cos_sin_cache(positions, q, k, 32, table, is_neox)
    flashinfer.apply_rope_with_cos_sin_cache_inplace(positions, q, k, 32, table, is_neox=is_neox)
    for g, c, w in zip(got, (q, k), want, strict=True):
        assert torch.equal(g, c)
        assert_near(g, w)
    with pytest.raises(UnsupportedDtype, match=r"cos_sin_cache has dtype torch.bfloat16"):
        flashinfer.apply_rope_with_cos_sin_cache(positions, q, k, 32, table.bfloat16())


@pytest.mark.parametrize("dtype", [None, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("is_mla", [False, True])
def test_rope_and_quantisation_at_once(dtype, is_mla):
    angle = torch.arange(64)[:, None] * frequencies(16, 1e4, 1.0)
    table, positions = torch.cat((angle.cos(), angle.sin()), -1).float(), torch.tensor([3, 0, 40])
    heads = () if is_mla else (2,)
    shapes = ((3, 4, 16), (3, *heads, 16), (3, 4, 32), (3, *heads, 24))
    q_rope, k_rope, q_nope, k_nope = (torch.randn(s).bfloat16() for s in shapes)
    out = torch.empty(3, 4, 16, dtype=dtype or torch.float8_e4m3fn)
    got = flashinfer.rope_quantize_fp8(
        q_rope, k_rope, q_nope, k_nope, table, positions, False, dtype, quant_scale_q=4.0, quant_scale_kv=0.5, q_rope_out=out
    )
    assert got[0] is out
    turned = [
        rotated_by_hand(t.view(3, -1, 16), positions, frequencies(16, 1e4, 1.0), True).view(t.shape) for t in (q_rope, k_rope)
    ]
    for g, want, scale in zip(got, (*turned, q_nope, k_nope), (4.0, 0.5, 4.0, 0.5), strict=True):
        assert g.dtype == out.dtype and g.shape == want.shape
        half = 2.0**-4 if g.dtype == torch.float8_e4m3fn else 2.0**-3
        want = want.double() * scale
        assert ((g.double() - want).abs() <= want.abs() * half * 1.001 + 2.0**-10 + 1e-6).all()
    rest = flashinfer.mla_rope_quantize_fp8(q_rope, k_rope, None, None, table, positions)
    assert rest[2].numel() == rest[3].numel() == 0
    with pytest.raises(UnsupportedDtype, match=r"quantize_dtype is torch\.int8"):
        flashinfer.rope_quantize_fp8(q_rope, k_rope, None, None, table, positions, True, torch.int8)


def test_rope_refuses_what_does_not_fit():
    q, k = torch.randn(3, 2, 16), torch.randn(3, 1, 16)
    with pytest.raises(ShapeMismatch, match="q has 3 rows, k has 3"):
        flashinfer.apply_rope_pos_ids(q, k, torch.arange(4))
    with pytest.raises(ShapeMismatch, match="rotary_dim is 32, the rows have 16"):
        flashinfer.apply_rope_pos_ids(q, k, torch.arange(3), rotary_dim=32)


# ---- what else code imports -----------------------------------------------------------------------------------------------


def test_norms():
    x, r, w = torch.randn(5, 32), torch.randn(5, 32), torch.rand(32)
    want = torch.nn.functional.rms_norm(x.double(), (32,), w.double(), 1e-6)
    assert_near(flashinfer.rmsnorm(x, w), want, 1e-5)
    want_sum = torch.nn.functional.rms_norm((x + r).double(), (32,), w.double() + 1, 1e-6)
    y, s = x.clone(), r.clone()
    flashinfer.gemma_fused_add_rmsnorm(y, s, w)
    assert_near(y, want_sum, 1e-5)
    assert torch.equal(s, x + r)


def test_fused_norms_are_of_the_sum_before_it_is_rounded():
    x, r, w = torch.randn(5, 32).bfloat16(), torch.randn(5, 32).bfloat16(), torch.rand(32).bfloat16()
    want = torch.nn.functional.rms_norm(x.double() + r.double(), (32,), w.double(), 1e-6).bfloat16()
    y, s = x.clone(), r.clone()
    flashinfer.fused_add_rmsnorm(y, s, w)
    assert torch.equal(y, want) and torch.equal(s, x + r)


def test_activations():
    x = torch.randn(5, 32)
    a, b = x.double().chunk(2, -1)
    for function, gate in (
        (flashinfer.silu_and_mul, torch.nn.functional.silu),
        (flashinfer.gelu_and_mul, torch.nn.functional.gelu),
        (flashinfer.gelu_tanh_and_mul, lambda t: torch.nn.functional.gelu(t, approximate="tanh")),
    ):
        assert_near(function(x), gate(a) * b, 1e-5)
