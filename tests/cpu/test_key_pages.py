"""Hooks that read where keys lie in a paged cache: kv_slot and page, in every layout that has pages, and errors elsewhere."""

from __future__ import annotations

import json

import pytest
import torch
from cascade_batch import SharedBatch
from gallery import PAGED_CASES, Cache
from selection_batch import ChosenBatch
from serving_batch import Batch, poisoned
from stored_batch import stored

import jitgen
from jitgen import portable, reference, runtime
from jitgen.errors import ShapeMismatch, VariantError
from jitgen.ir_text import to_text
from jitgen.kv_decode import value_factor, with_value_factor

LENGTHS = [(1, 100), (20, 45), (0, 0), (1, 7), (3, 300), (2, 17)]


def has_lse(variant) -> bool:
    norm = variant.trace().program.norm
    return norm is None or norm.lse is not None


def slot_scaled(scale):
    return lambda s, b, h, q_idx, kv_idx, *, kv_slot: s * scale[kv_slot]


def attend(batch, variant, page_size, *, share=False, table="csr", **options):
    """A call and its oracle's results; with ``share`` all requests have the page of the first as theirs."""
    k, v, lists = batch.pages(page_size)
    if share:
        for b, keys in enumerate(batch.lengths):
            if keys[1] >= page_size and b:
                lists[b][0] = lists[0][0]
                batch.k[b][:page_size], batch.v[b][:page_size] = batch.k[0][:page_size], batch.v[0][:page_size]
    plan = batch.plan(variant, **options)
    out, lse = poisoned(plan, batch.q)
    lse = lse if has_lse(variant) else None
    pages = batch.csr(lists) if table == "csr" else batch.block_table(lists)
    jitgen.paged_attention(batch.q, (k, v), pages, plan, out=out, lse=lse)
    return (out, lse), batch.expected(variant, lists=lists, page_size=page_size)


def assert_right(got, want, tolerance=2e-5):
    for a, b in zip(got, want, strict=True):
        if a is not None:
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def cache_of(batch, page_size) -> Cache:
    return Cache(batch.pages(page_size)[0].shape[0], page_size, batch.num_kv_heads)


@pytest.mark.parametrize("case", PAGED_CASES.values(), ids=lambda c: c.name)
def test_cpu_kernel_is_the_oracle(case):
    for page_size in (1, 16, 17):
        batch = Batch(LENGTHS, seed=page_size)
        variant = case.make(cache_of(batch, page_size))
        for share, table in ((False, "csr"), (page_size > 1, "block table")):
            assert_right(*attend(batch, variant, page_size, share=share, table=table))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str)
def test_short_dtypes(dtype, tolerance):
    batch = Batch(LENGTHS, 8, 2, 64, dtype=dtype)
    for name in ("slot_bias", "slot_offsets", "evicted_slots"):
        assert_right(*attend(batch, PAGED_CASES[name].make(cache_of(batch, 16)), 16), tolerance)


@pytest.mark.parametrize("split", [{"split": "fixed", "kv_split": 64}, {"split": "none"}], ids=["fixed", "none"])
def test_cut_requests(split):
    batch = Batch([(1, 900), (40, 500), (1, 64)])
    for name in ("slot_bias", "slot_offsets", "evicted_slots"):
        assert_right(*attend(batch, PAGED_CASES[name].make(cache_of(batch, 16)), 16, **split))


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_cache_of_8_bits_with_scales_in_hooks_alone(kv_dtype):
    page_size, batch = 16, Batch(LENGTHS, 8, 2, 64)
    batch.k, batch.v = ([stored(20 * t, kv_dtype).float() for t in ts] for ts in (batch.k, batch.v))
    k, v, lists = batch.pages(page_size)
    variant = PAGED_CASES["slot_scales"].make(cache_of(batch, page_size))
    plan = batch.plan(variant, kv_dtype=kv_dtype)
    codes = tuple(t.nan_to_num(nan=100.0).to(kv_dtype) for t in (k, v))
    got = jitgen.paged_attention(batch.q, codes, batch.csr(lists), plan, return_lse=True)
    assert_right(got, batch.expected(variant, lists=lists, page_size=page_size))
    # the same by scales of the call, which no hook sees
    scales = [plan.trace()[1][i].clone() for i in range(2)]
    plain = batch.plan(lambda b, h, q, k: k <= q, kv_dtype=kv_dtype)
    scaled = jitgen.paged_attention(
        batch.q, codes, batch.csr(lists), plain, k_scale=scales[0], v_scale=scales[1], return_lse=True
    )
    assert_right(got, [t.double() for t in scaled], 1e-4)


def test_levels_of_a_cascade():
    batch = SharedBatch([2, 1, 3, 1], [[(4, 37)], [(2, 20), (2, 9)], [(1, 30), (1, 0), (1, 11), (1, 5)]], page_size=4)
    caches, cascade = batch.build()
    slots = caches[0].shape[0] * batch.page_size
    weight, warmth = torch.rand(slots) + 0.5, torch.rand(caches[0].shape[0]) + 0.5
    variant = jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx, *, kv_slot, page: s * weight[kv_slot] * warmth[page],
        mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx,
        v_transform=lambda v, b, kv_h, kv_idx, *, kv_slot: v * weight[kv_slot],
    )
    by_slot = jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx, *, kv_slot: s * weight[kv_slot] * warmth[kv_slot // 4],
        mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx,
        v_transform=lambda v, b, kv_h, kv_idx, *, kv_slot: v * weight[kv_slot],
    )
    lists = [[] for _ in batch.q_lens]
    for groups, level in zip(batch.levels, cascade.levels, strict=True):
        starts, pages, first = level.page_table.starts(len(groups)).tolist(), level.page_table.pages.tolist(), 0
        for (requests, keys), start in zip(groups, starts, strict=True):
            for b in range(first, first + requests):
                lists[b] += [pages[start + i // 4] * 4 + i % 4 for i in range(keys)]
            first += requests
    want = batch.whole.expected(by_slot, lists=lists)
    plan = batch.plan(variant).update(cascade)
    assert_right(jitgen.paged_attention(batch.whole.q, caches, cascade, plan, return_lse=True), want)


@pytest.mark.parametrize("newest", [True, False], ids=["even", "uneven"])
def test_chosen_blocks(newest):
    batch = ChosenBatch([(6, 70), (1, 40), (9, 9)], newest=newest)
    caches, table = batch.caches(0.0)
    scale = torch.rand(caches[0].shape[0] * batch.page_size, 2) + 0.5
    chosen = batch.select(table)
    plan = batch.plan(lambda s, b, h, q_idx, kv_idx, *, kv_slot, kv_h: s * scale[kv_slot, kv_h] + 0.125 * (kv_idx % 3)).update(
        chosen
    )
    got = jitgen.paged_attention(batch.whole.q, caches, chosen, plan, return_lse=True)
    _, _, lists = batch.whole.pages(batch.page_size)
    width = max(map(len, lists))
    # the oracle numbers requests, so that what a slot holds may be looked up by request and position
    slots = torch.tensor([[p * 8 + i for p in pages + [0] * (width - len(pages)) for i in range(8)] for pages in lists])
    want = batch.expected(
        jitgen.Variant(
            score_mod=lambda s, b, h, q_idx, kv_idx, *, kv_h: s * scale[slots[b, kv_idx], kv_h] + 0.125 * (kv_idx % 3)
        )
    )
    assert_right(got, want)


def test_numbers_are_what_the_page_table_says():
    """Weights that are the numbers themselves, on values that tell keys apart."""

    class Passing(jitgen.OnlineNorm):
        def update(self, s, st):
            return s, 1.0, st

    keys, page_size = 40, 7
    q, k, v = torch.zeros(1, 1, 8), torch.zeros(6, page_size, 1, 8), torch.zeros(6, page_size, 1, 40)
    pages = [4, 1, 5, 0, 3, 2]
    for i in range(keys):
        v[pages[i // page_size], i % page_size, 0, i] = 1.0
    slots = [pages[i // page_size] * page_size + i % page_size for i in range(keys)]
    for score_mod, want in (
        (lambda s, b, h, q_idx, kv_idx, *, kv_slot: kv_slot, slots),
        (lambda s, b, h, q_idx, kv_idx, *, page: page, [slot // page_size for slot in slots]),
    ):
        variant = jitgen.Variant(score_mod=score_mod, softmax=Passing)
        plan = jitgen.Plan(1, 1, 1, 1, 8, head_dim_v=40, dtype=torch.float32, variant=variant, device="cpu")
        plan.update(torch.tensor([0, 1]), torch.tensor([keys]))
        out = jitgen.paged_attention(q, (k, v), torch.tensor([pages]), plan)
        assert out.flatten().tolist() == want


def test_a_repeated_call_sees_new_pages_and_values():
    batch = Batch([(1, 60), (5, 33)])
    k, v, lists = batch.pages(8)
    scale = torch.rand(k.shape[0] * 8) + 0.5
    variant = jitgen.Variant(score_mod=slot_scaled(scale))
    plan, table = batch.plan(variant), batch.block_table(lists)
    for step in range(3):
        got = jitgen.paged_attention(batch.q, (k, v), table, plan, return_lse=True)
        assert_right(got, batch.expected(variant, lists=lists, page_size=8))
        if step == 0:
            scale.mul_(0.5)
        else:  # keys move to other pages, in place
            order = torch.randperm(k.shape[0])
            k[order], v[order] = k.clone(), v.clone()
            lists = [[int(order[p]) for p in pages] for pages in lists]
            table.copy_(batch.block_table(lists))


# ---- errors ----------------------------------------------------------------------------------------------------------------


def test_dense_and_ragged_keys_have_no_pages():
    scale, q = torch.ones(64), torch.zeros(1, 2, 4, 8)
    with pytest.raises(VariantError, match=r"reads kv_slot, and dense keys are in no pages\. Index by b and kv_idx, or call"):
        jitgen.attention(q, q, q, score_mod=slot_scaled(scale))
    with pytest.raises(VariantError, match="dense keys are in no pages"):
        jitgen.flex_attention(q, q, q, score_mod=slot_scaled(scale))
    with pytest.raises(VariantError, match="reads page, and dense keys"):
        jitgen.attention(q, q, q, jitgen.Variant(v_transform=lambda v, b, kv_h, kv_idx, *, page: v * page))
    with pytest.raises(VariantError, match=r"ragged keys are in no pages. Index by kv_off \+ kv_idx, the row of k"):
        Batch([(1, 9)]).plan(slot_scaled(scale), layout="ragged")


def test_captured_tensors_have_an_entry_for_each_slot():
    batch = Batch([(1, 20)])
    k, v, lists = batch.pages(4)
    slots = k.shape[0] * 4
    short = torch.ones(slots - 1)
    plan = batch.plan(slot_scaled(short))
    reach = f"'scale' has size {slots - 1} along axis 0, which kv_slot indexes up to {slots - 1}: the kv cache has"
    with pytest.raises(ShapeMismatch, match=f"{reach} {k.shape[0]} pages of 4 keys"):
        jitgen.paged_attention(batch.q, (k, v), batch.csr(lists), plan)
    rows = jitgen.Variant(v_transform=lambda v, b, kv_h, kv_idx, *, page: v * short[page])
    jitgen.paged_attention(batch.q, (k, v), batch.csr(lists), batch.plan(rows))
    short = torch.ones(k.shape[0] - 1)
    with pytest.raises(ShapeMismatch, match=f"page indexes up to {k.shape[0] - 1}: the kv cache has {k.shape[0]} pages. Give"):
        jitgen.paged_attention(batch.q, (k, v), batch.csr(lists), batch.plan(rows))
    clamped = batch.plan(lambda s, b, h, q_idx, kv_idx, *, kv_slot: s * short[(kv_slot + 0).clamp(max=2)])
    jitgen.paged_attention(batch.q, (k, v), batch.csr(lists), clamped)


def test_hooks_without_a_key_do_not_ask_for_its_place():
    with pytest.raises(VariantError, match="asks for kv_slot, and it is given no kv_idx"):
        jitgen.Variant(output_transform=lambda o, lse, b, h, q_idx, *, kv_slot: o).trace()
    with pytest.raises(VariantError, match=r"q_transform .* asks for page, and it is given no kv_idx"):
        jitgen.Variant(q_transform=lambda q, b, h, q_idx, *, page: q).trace()
    with pytest.raises(VariantError, match=r"keyword-only .kv_len.; rows of k and v have kv_slot and page, those of q"):
        jitgen.Variant(k_transform=lambda k, b, kv_h, kv_idx, *, kv_len: k).trace()
    with pytest.raises(VariantError, match="Give page_table="):
        q = torch.zeros(1, 1, 3, 8)
        reference.attention(q, q, q, slot_scaled(torch.ones(3)))


def test_a_call_with_another_score_reads_slots_too():
    batch = Batch([(1, 60), (5, 33)])
    k, v, lists = batch.pages(8)
    plan, scale = batch.plan(), torch.rand(k.shape[0] * 8)
    other = jitgen.Variant(score_mod=slot_scaled(scale))
    for variant in (jitgen.Variant(), other, jitgen.Variant()):
        got = jitgen.paged_attention(batch.q, (k, v), batch.csr(lists), plan, variant=variant, return_lse=True)
        assert_right(got, batch.expected(variant, lists=lists, page_size=8))


# ---- tools -----------------------------------------------------------------------------------------------------------------


def test_a_compiled_model_holds_the_call():
    batch = Batch([(1, 60), (5, 33)])
    k, v, lists = batch.pages(8)
    variant = jitgen.Variant(score_mod=slot_scaled(torch.rand(k.shape[0] * 8)))
    plan, table = batch.plan(variant), batch.block_table(lists)

    def layer(q, k, v, table):
        return jitgen.paged_attention(q * 1.0, (k, v), table, plan, return_lse=True)

    got = torch.compile(layer, backend="eager", fullgraph=True)(batch.q, k, v, table)
    assert_right(got, batch.expected(variant, lists=lists, page_size=8))


def test_kernels_are_recorded_and_built_again():
    variant = PAGED_CASES["slot_scales"].make(Cache(4, 16))
    batch = Batch([(1, 20)])
    kernel = batch.plan(variant).classes[0].kernel
    request = json.loads(json.dumps(portable.pack((runtime.module_path, kernel.spec))))
    function, (spec,) = portable.unpack(request)
    assert function is runtime.module_path and spec.digest == kernel.spec.digest and spec.reads_pages


def test_combined_masks_pass_the_names_on():
    batch = Batch([(3, 60), (5, 33)])
    k = batch.pages(8)[0]
    kept, open_pages = torch.rand(k.shape[0] * 8) < 0.5, torch.rand(k.shape[0]) < 0.5
    mask = jitgen.and_masks(
        lambda b, h, q_idx, kv_idx: kv_idx <= q_idx,
        jitgen.or_masks(
            lambda b, h, q_idx, kv_idx, *, kv_slot: kept[kv_slot],
            lambda b, h, q_idx, kv_idx, *, page: open_pages[page],
            lambda b, h, q_idx, kv_idx: kv_idx == 0,
        ),
    )
    assert_right(*attend(batch, jitgen.Variant(mask_mod=mask), 8))


# ---- what decode kernels on a GPU make of it ---------------------------------------------------------------------------------


def factor_of(v_transform):
    program = jitgen.Variant(v_transform=v_transform).trace().program
    found = value_factor(program)
    return None if found is None else to_text(found, [slot.name for slot in program.slots])


def test_a_factor_of_values_goes_to_their_weights():
    vs, other, row = torch.ones(64, 2), torch.ones(9), torch.ones(16)
    assert factor_of(lambda v, b, kv_h, pos, *, kv_slot: v * vs[kv_slot, kv_h]) == "vs[kv_slot, kv_h]"
    assert factor_of(lambda v, b, kv_h, pos, *, page: 2.0 * (v / other[page])) == "(2.0 / other[page])"
    assert factor_of(lambda v, b, kv_h, pos, *, kv_slot: other[pos] * v * vs[kv_slot, kv_h]).count("kv_idx") == 1
    for transform in (
        lambda v, b, kv_h, pos, *, kv_slot: v * vs[kv_slot, kv_h] + 1.0,
        lambda v, b, kv_h, pos, *, kv_slot: vs[kv_slot, kv_h] / v,
        lambda v, b, kv_h, pos, *, kv_slot: v * row * vs[kv_slot, kv_h],
        lambda v, b, kv_h, pos, *, kv_slot: v * vs[kv_slot, kv_h] * v.rms(),
        lambda v, b, kv_h, pos: v * other[pos],  # which reads no page, and is generated as ever
    ):
        assert factor_of(transform) is None
    both = jitgen.Variant(
        k_transform=lambda k, b, kv_h, pos: 2.0 * k, v_transform=lambda v, b, kv_h, pos, *, kv_slot: v * vs[kv_slot, kv_h]
    )
    left = with_value_factor(both.trace().program)
    assert left.value is not None and left.rows.v.is_empty and not left.rows.k.is_empty
