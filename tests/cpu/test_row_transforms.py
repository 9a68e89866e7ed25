"""Variants that transform rows of q, k and v: dense and serving calls against the oracle in float64."""

from __future__ import annotations

import pytest
import torch
from cascade_batch import SharedBatch
from row_cases import NAMES, causal, rows_variant
from serving_batch import Batch, poisoned
from stored_batch import StoredBatch

import jitgen
from jitgen import reference
from jitgen.errors import PlanMismatch, ShapeMismatch, UnsupportedVariant, VariantError

LENGTHS = [(5, 37), (1, 130), (0, 9), (33, 33), (3, 3)]
HALF = torch.ones(64, 16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


def assert_close(got, want, dtype=torch.float32):
    for a, b in zip(got, want, strict=True):
        assert not a.isnan().any(), "a row was not written"
        off = (a.double() - b).abs().max().item() / max(1.0, b.abs().max().item())
        assert off <= TOLERANCE[dtype], f"off by {off:.2g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_dense(name, dtype):
    variant = rows_variant(name, 32, 48)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, h, n, d, generator=generator).to(dtype) for h, n, d in ((4, 7, 32), (2, 19, 32), (2, 19, 48)))
    for q_index in (None, "local"):
        got = jitgen.attention(q, k, v, variant, q_index=q_index, return_lse=True)
        assert_close(got, reference.attention(q, k, v, variant, q_index=q_index, return_lse=True), dtype)


WEIGHT, BIAS = torch.linspace(0.5, 1.5, 32), torch.linspace(-1, 1, 32)
NORMS = {
    "rms_norm": lambda x: torch.nn.functional.rms_norm(x, (32,), WEIGHT.to(x.dtype), 1e-3),
    "torch.rms_norm": lambda x: torch.rms_norm(x, (32,)),
    "layer_norm": lambda x: torch.nn.functional.layer_norm(x, (32,), WEIGHT.to(x.dtype), BIAS.to(x.dtype)),
    "normalize": lambda x: torch.nn.functional.normalize(x, dim=-1),
    "norm": lambda x: x / x.norm(dim=-1, keepdim=True),
    "torch.norm": lambda x: x / torch.norm(x, p=2, dim=-1, keepdim=True),
    "linalg": lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_torch_over_a_row(name):
    normed = NORMS[name]
    q, k, v = (torch.randn(2, 4, 9, 32) for _ in range(3))
    got = jitgen.attention(q, k, v, jitgen.Variant(q_transform=lambda q, b, h, pos: normed(q)))
    assert_close((got,), (reference.attention(normed(q.double()), k, v),))


def test_other_norms_are_refused():
    with pytest.raises(UnsupportedVariant, match=r"a norm with p=1 is not available\. Use p=2"):
        jitgen.Variant(q_transform=lambda q, b, h, pos: q / q.norm(p=1))


def test_dense_takes_any_strides_and_one_k_for_the_batch():
    variant = rows_variant("rope", 32, 32)
    q = torch.randn(3, 5, 4, 32).transpose(1, 2)
    k, v = (torch.randn(1, 2, 32, 11).transpose(2, 3) for _ in range(2))
    out = torch.full((3, 4, 5, 32), torch.nan)
    assert_close((jitgen.attention(q, k, v, variant, out=out),), (reference.attention(q, k, v, variant),))


def test_dense_takes_what_has_no_rows():
    variant = rows_variant("rope", 32, 32)
    q, k = torch.randn(2, 4, 3, 32), torch.randn(2, 2, 0, 32)
    assert torch.equal(jitgen.attention(q, k, k, variant, q_index="local"), torch.zeros(2, 4, 3, 32))


@pytest.mark.parametrize("layout", ["ragged", "paged", "HND", "joined"])
@pytest.mark.parametrize("name", NAMES)
def test_serving(name, layout):
    variant = rows_variant(name, 32, 32)
    batch = Batch(LENGTHS, head_dim=32)
    plan = batch.plan(variant, room=3, layout="ragged" if layout == "ragged" else "paged")
    out, lse = poisoned(plan, batch.q)
    if layout == "ragged":
        got = jitgen.ragged_attention(batch.q, *batch.ragged(), plan, out=out, lse=lse, return_lse=True)
    else:
        k, v, lists = batch.pages(8)
        options, table = {}, batch.csr(lists)
        if layout == "HND":
            k, v, options = k.transpose(1, 2).contiguous(), v.transpose(1, 2), {"kv_layout": "HND"}
            table = batch.block_table(lists)
        cache = torch.stack((k, v), 1) if layout == "joined" else (k, v)
        got = jitgen.paged_attention(batch.q, cache, table, plan, out=out, lse=lse, return_lse=True, **options)
    assert_close(got, batch.expected(variant))


def test_a_plan_serves_one_step_after_another():
    variant = rows_variant("all", 32, 32)
    plan = jitgen.Plan(8, 64, 4, 2, 32, dtype=torch.float32, variant=variant, device="cpu")
    for lengths in (LENGTHS, [(1, 200)] * 7, [(2, 2)], []):
        batch = Batch(lengths, head_dim=32, seed=len(lengths))
        batch.update(plan)
        k, v, lists = batch.pages(4)
        got = jitgen.paged_attention(batch.q, (k, v), batch.csr(lists), plan, return_lse=True)
        if lengths:
            assert_close(got, batch.expected(variant))


@pytest.mark.parametrize("layout", ["ragged", "paged"])
def test_a_request_without_rows_has_more_keys_than_all_others(layout):
    """Its keys are not copied, so the copies are shorter than its length."""
    variant = rows_variant("rope", 32, 32)
    batch = Batch([(0, 500), (1, 20)], head_dim=32)
    plan = batch.plan(variant, layout=layout)
    if layout == "ragged":
        got = jitgen.ragged_attention(batch.q, *batch.ragged(), plan, return_lse=True)
    else:
        k, v, lists = batch.pages(8)
        got = jitgen.paged_attention(batch.q, (k, v), batch.csr(lists), plan, return_lse=True)
    assert_close(got, batch.expected(variant))


def test_bfloat16_pages():
    variant = rows_variant("rope", 64, 64)
    batch = Batch(LENGTHS, head_dim=64, dtype=torch.bfloat16)
    k, v, lists = batch.pages(16)
    got = jitgen.paged_attention(batch.q, (k, v), batch.csr(lists), batch.plan(variant), return_lse=True)
    assert_close(got, batch.expected(variant), torch.bfloat16)


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("kind", ["head", "slot"])
def test_keys_stored_in_8_bits_are_transformed_after_their_scale(kv_dtype, kind):
    variant = rows_variant("all", 32, 32)
    for layout in ("paged", "ragged"):
        batch = StoredBatch(LENGTHS, head_dim=32, kv_dtype=kv_dtype, kinds=(kind, "number"))
        plan = batch.plan(variant, layout=layout, kv_dtype=kv_dtype)
        assert_close(batch.attend(plan, 8), batch.expected(variant))


@pytest.mark.parametrize("name", ["rope", "q only", "v only"])
def test_positions_count_on_through_the_levels_of_a_cascade(name):
    variant = rows_variant(name, 32, 32)
    shared = SharedBatch([1, 3, 2, 5], [[(4, 24)], [(2, 9), (2, 0)], [(1, 5), (1, 11), (1, 6), (1, 5)]], head_dim=32)
    caches, cascade = shared.build()
    plan = shared.plan(variant).update(cascade)
    got = jitgen.paged_attention(shared.whole.q, caches, cascade, plan, return_lse=True)
    assert_close(got, shared.whole.expected(variant))


def test_plans_of_ragged_and_of_transformed_keys_explain_themselves():
    batch = Batch(LENGTHS, head_dim=32)
    for options in ({"layout": "ragged"}, {"variant": rows_variant("rope", 32, 32)}):
        assert "5 requests, 42 query rows, 212 keys" in batch.plan(**options).explain()


def test_captured_values_may_change():
    factor = 2.0
    variant = jitgen.Variant(k_transform=lambda k, b, h, pos: k * factor, mask_mod=causal)
    batch = Batch([(3, 9)], head_dim=32)
    plan = batch.plan(variant, layout="ragged")
    first = jitgen.ragged_attention(batch.q, *batch.ragged(), plan)
    got = jitgen.ragged_attention(batch.q, *batch.ragged(), plan, factor=0.5)
    want = batch.expected(variant.bind(factor=0.5))[0]
    assert_close((got,), (want,))
    assert not torch.allclose(first, got)


def test_scales_that_are_not_positive_follow_the_transform():
    variant = rows_variant("all", 32, 32)
    batch = Batch(LENGTHS, head_dim=32)
    got = jitgen.ragged_attention(batch.q, *batch.ragged(), batch.plan(variant, layout="ragged"), scale=-0.3)
    assert_close((got,), (batch.expected(variant, scale=-0.3)[0],))


# ---- refused ---------------------------------------------------------------------------------------------------------------


def test_context_is_not_available():
    with pytest.raises(VariantError, match="asks for keyword-only 'kv_len'"):
        jitgen.Variant(k_transform=lambda k, b, h, pos, *, kv_len: k * kv_len)


def test_a_row_is_rotated_once():
    rope = jitgen.Rope()
    with pytest.raises(UnsupportedVariant, match="rotates a row more than once"):
        jitgen.Variant(q_transform=lambda q, b, h, pos: rope(rope(q, pos), pos))


@pytest.mark.parametrize(
    "hook, message",
    [
        (lambda q, b, h, pos: q[16:], "seen element by element, and was indexed. Rotate it with a jitgen.Rope"),
        (lambda q, b, h, pos: q * torch.cat([HALF[pos], HALF[pos]]), "rows along the head dim were joined"),
        (lambda q, b, h, pos: torch.stack((-q, q)), "rows along the head dim were joined"),
    ],
)
def test_rows_are_neither_cut_nor_joined(hook, message):
    with pytest.raises(UnsupportedVariant, match=message):
        jitgen.Variant(q_transform=hook)


def test_a_rope_belongs_to_rows():
    rope = jitgen.Rope()
    with pytest.raises(VariantError, match="outside of a transform of rows"):
        jitgen.Variant(score_mod=lambda s, b, h, q, k: rope(s, q))


def test_a_plan_is_made_for_the_rows_that_are_transformed():
    batch = Batch([(3, 9)], head_dim=32)
    plan = batch.plan(rows_variant("rope", 32, 32), layout="ragged")
    with pytest.raises(PlanMismatch, match="transforms rows of q, the plan was made for one that transforms rows of q and k"):
        jitgen.ragged_attention(batch.q, *batch.ragged(), plan, variant=rows_variant("q only", 32, 32))
    plain = batch.plan(jitgen.Variant(mask_mod=causal), layout="ragged")
    with pytest.raises(PlanMismatch, match="transforms rows, the plan was made for one that does not"):
        jitgen.ragged_attention(batch.q, *batch.ragged(), plain, variant=rows_variant("q only", 32, 32))


def test_captured_rows_reach_as_far_as_they_are_read():
    weight = torch.ones(32)
    variant = jitgen.Variant(k_transform=lambda k, b, h, pos: k * weight)
    batch = Batch([(3, 9)], head_dim=32)
    plan = batch.plan(variant, layout="ragged")
    jitgen.ragged_attention(batch.q, *batch.ragged(), plan)
    with pytest.raises(ShapeMismatch, match="'weight' has size 16 along axis 0, which runs along a row of 32 elements"):
        jitgen.ragged_attention(batch.q, *batch.ragged(), plan, weight=torch.ones(16))
    k = torch.randn(1, 2, 5, 32)
    with pytest.raises(ShapeMismatch, match="'weight' has size 16"):
        jitgen.attention(k, k, k, variant.bind(weight=torch.ones(16)))


def test_latent_rows_are_key_and_value():
    with pytest.raises(VariantError, match="key and value at once"):
        jitgen.Plan(1, 1, 16, 1, 576, head_dim_v=512, variant=rows_variant("rope", 576, 512), device="cpu")


def test_scales_of_dense_inputs_do_not_go_with_transforms():
    q = torch.randn(1, 2, 3, 32)
    with pytest.raises(VariantError, match="Multiply by them in the transforms"):
        jitgen.attention(q, q, q, rows_variant("rope", 32, 32), scale_q=2.0)
