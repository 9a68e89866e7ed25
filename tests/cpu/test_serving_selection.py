"""Chosen blocks of keys against the oracle in float64: lists for each request, KV head and query tile, with every hook."""

from __future__ import annotations

import pytest
import torch
from selection_batch import ChosenBatch
from serving_batch import poisoned

import jitgen
from jitgen.errors import PlanMismatch, ShapeMismatch, VariantError

LENGTHS = {
    "decode": [(1, 60), (1, 8), (1, 33), (1, 5), (1, 129)],
    "tiles": [(13, 70), (1, 41), (30, 30), (5, 100)],
    "rows": [(3, 50), (2, 17)],
}


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def variants():
    slopes, sinks = torch.tensor([0.5, 0.25, 0.125, 0.0625]), torch.tensor([-1.0, 0.0, 0.5, 2.0])
    alibi = lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx)  # noqa: E731
    return {
        "causal": jitgen.Variant(mask_mod=causal),
        "alibi": jitgen.Variant(score_mod=alibi, mask_mod=causal),
        "window": jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < 20)),
        "finished": jitgen.Variant(
            score_mod=alibi, mask_mod=causal, sink=sinks, output_transform=lambda o, lse, b, h, q_idx: o * (b + 1) + q_idx,
            lse_transform=lambda lse, b, h, q_idx: lse * 2 + q_idx,
        ),
    }  # fmt: skip


def attend(batch, variant=None, *, behind=float("nan"), **options):
    caches, table = batch.caches(behind)
    selection = batch.select(table)
    plan = batch.plan(variant, room=2, **options).update(selection)
    out, lse = poisoned(plan, batch.whole.q)
    jitgen.paged_attention(batch.whole.q, caches, selection, plan, out=out, lse=lse)
    return out, lse


def assert_near(found, want):
    for got, exact in zip(found, want, strict=True):
        torch.testing.assert_close(got.double(), exact, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", ["causal", "alibi", "window", "finished"])
@pytest.mark.parametrize("form", ["heads", "shared", "uneven"])
def test_rows_see_their_blocks_at_their_positions(lengths, name, form):
    tile = 1 if lengths == "rows" else 4
    batch = ChosenBatch(LENGTHS[lengths], tile=tile, shared=form == "shared", newest=form != "uneven")
    behind = 1e3 if form == "uneven" else float("nan")  # where lists end at different places, keys are read that a mask hides
    assert_near(attend(batch, variants()[name], behind=behind), batch.expected(variants()[name]))


@pytest.mark.parametrize("newest", [True, False])
def test_decode_needs_no_mask(newest):
    batch = ChosenBatch(LENGTHS["decode"], newest=newest)
    assert_near(attend(batch, behind=float("nan") if newest else 1e3, max_q_len=1), batch.expected())


@pytest.mark.parametrize("block_size", [4, 8, 24])
def test_a_block_is_one_or_more_pages(block_size):
    batch = ChosenBatch(LENGTHS["tiles"], block_size=block_size, page_size=4, blocks=5)
    assert_near(attend(batch, variants()["alibi"]), batch.expected(variants()["alibi"]))


def test_single_keys_are_chosen_by_row():
    batch = ChosenBatch(LENGTHS["rows"], tile=1, block_size=1, page_size=1, blocks=7, shared=True)
    assert_near(attend(batch, variants()["causal"]), batch.expected(variants()["causal"]))


def test_any_negative_number_is_none():
    batch = ChosenBatch(LENGTHS["decode"])
    caches, table = batch.caches()
    far = torch.where(batch.chosen < 0, torch.tensor(-(2**31), dtype=torch.int32), batch.chosen)
    assert (far < -1).any()
    selection = batch.select(table).choose(far)
    found = jitgen.paged_attention(batch.whole.q, caches, selection, batch.plan().update(selection), return_lse=True)
    assert_near(found, batch.expected())


def test_a_layer_chooses_other_blocks():
    batch = ChosenBatch(LENGTHS["decode"])
    caches, table = batch.caches()
    selection = batch.select(table)
    plan = batch.plan(max_q_len=1).update(selection)
    for _ in range(3):
        batch.chosen = batch.draw()
        found = jitgen.paged_attention(batch.whole.q, caches, selection.choose(batch.chosen), plan, return_lse=True)
        assert_near(found, batch.expected())


def test_a_layer_may_have_hooks_that_its_plan_has_not():
    batch, alibi = ChosenBatch(LENGTHS["tiles"]), variants()["alibi"]
    caches, table = batch.caches()
    selection = batch.select(table)
    plan = batch.plan(variants()["causal"]).update(selection)
    for variant in (jitgen.Variant(mask_mod=causal), alibi):
        found = jitgen.paged_attention(batch.whole.q, caches, selection, plan, variant=variant, return_lse=True)
        assert_near(found, batch.expected(variant))
    batch = ChosenBatch(LENGTHS["decode"])  # without a mask nothing reads positions, until a layer does
    caches, table = batch.caches()
    selection = batch.select(table)
    plan = batch.plan().update(selection)
    for variant in (jitgen.Variant(), jitgen.Variant(score_mod=alibi.score_mod)):
        found = jitgen.paged_attention(batch.whole.q, caches, selection, plan, variant=variant, return_lse=True)
        assert_near(found, batch.expected(variant))


def test_uneven_lists_are_planned_again():
    batch = ChosenBatch(LENGTHS["decode"], newest=False)
    caches, table = batch.caches(1e3)
    selection = batch.select(table)
    plan = batch.plan().update(selection)
    batch.chosen = batch.draw()
    selection.choose(batch.chosen)
    with pytest.raises(PlanMismatch, match="has chosen other blocks since"):
        jitgen.paged_attention(batch.whole.q, caches, selection, plan)
    found = jitgen.paged_attention(batch.whole.q, caches, selection, plan.update(selection), return_lse=True)
    assert_near(found, batch.expected())


def test_8_bit_keys():
    batch = ChosenBatch(LENGTHS["decode"], dtype=torch.bfloat16)
    batch.whole.k = [t.to(torch.float8_e4m3fn).float() for t in batch.whole.k]
    batch.whole.v = [t.to(torch.float8_e4m3fn).float() for t in batch.whole.v]
    (k, v), table = batch.caches(0.0)
    selection = batch.select(table)
    plan = batch.plan(kv_dtype=torch.float8_e4m3fn, max_q_len=1).update(selection)
    cache = tuple(t.to(torch.float8_e4m3fn) for t in (k, v))
    out = jitgen.paged_attention(batch.whole.q, cache, selection, plan, k_scale=0.5, v_scale=2.0)
    batch.whole.k, batch.whole.v = [0.5 * t.double() for t in batch.whole.k], [2 * t.double() for t in batch.whole.v]
    batch.whole.q = batch.whole.q.double()
    torch.testing.assert_close(out.double(), batch.expected()[0], atol=2e-2, rtol=2e-2)


def test_latent_attention_over_keys_of_each_row():
    """The sparse attention of DeepSeek: every row chooses its own keys, from a cache seen as pages of one key."""
    g = torch.Generator().manual_seed(0)
    cache = torch.randn(9, 8, 576, generator=g)
    q = torch.randn(5, 4, 576, generator=g)
    table = torch.randperm(9, generator=g)
    slots = (table[:, None] * 8 + torch.arange(8)).flatten()
    q_indptr, lengths = torch.tensor([0, 3, 5]), torch.tensor([40, 32])
    chosen = torch.stack([torch.randperm(30, generator=g)[:12] for _ in range(5)])[:, None]
    pages = (torch.tensor([0, 40, 72]), slots)
    selection = jitgen.Selection(q_indptr, pages, lengths, chosen, 1, list_indptr=torch.arange(6))
    plan = jitgen.Plan(
        5, 5, 4, 1, 576, head_dim_v=512, dtype=torch.float32, page_size=1, selection="even", device="cpu"
    ).update(selection)
    out = jitgen.paged_attention(q, cache.flatten(0, 1).unsqueeze(1), selection, plan, scale=0.1)
    for i in range(5):
        keys = cache.flatten(0, 1)[slots[(0 if i < 3 else 40) + chosen[i, 0]]].double()
        want = (0.1 * q[i].double() @ keys.T).softmax(-1) @ keys[:, :512]
        torch.testing.assert_close(out[i].double(), want, atol=2e-5, rtol=2e-5)


def test_copies_of_keys_are_not_made_of_a_selection():
    rope = jitgen.Rope(theta=100.0)
    with pytest.raises(VariantError, match="copies are made of whole requests, not of a selection"):
        ChosenBatch(LENGTHS["decode"]).plan(jitgen.Variant(k_transform=lambda k, b, kv_h, pos: rope(k, pos)))


def test_what_does_not_fit_is_named():
    batch = ChosenBatch(LENGTHS["decode"])
    caches, table = batch.caches()
    selection = batch.select(table)
    q = batch.whole.q
    with pytest.raises(PlanMismatch, match=r"given a Selection, and the plan .* Make it with selection="):
        batch.whole.plan().update(selection)
    plan = batch.plan()
    with pytest.raises(PlanMismatch, match=r"made for selection='even', whose update takes a jitgen.Selection"):
        plan.update(batch.whole.q_indptr(), batch.whole.kv_len())
    plan.update(selection)
    with pytest.raises(PlanMismatch, match="another Selection than"):
        jitgen.paged_attention(q, caches, batch.select(table), plan)
    with pytest.raises(PlanMismatch, match="a PageTable, not the Selection that"):
        jitgen.paged_attention(q, caches, table, plan)
    with pytest.raises(PlanMismatch, match="those of 5 lists, the plan was made for max_batch=3"):
        batch.plan(room=-2).update(selection)
    with pytest.raises(ShapeMismatch, match="selection='odd' is none"):
        batch.plan(selection="odd")
    with pytest.raises(ShapeMismatch, match="goes with layout='paged', page_size="):
        batch.plan(page_size=None)
    with pytest.raises(PlanMismatch, match="has pages of 8 keys and lists of 2 KV heads, the plan was made for page_size=16"):
        batch.plan(page_size=16).update(selection)
    with pytest.raises(ShapeMismatch, match=r"chosen shape \(5, 2, 0\)"):
        jitgen.Selection(batch.whole.q_indptr(), table, batch.whole.kv_len(), batch.chosen[..., :0], 8)
    with pytest.raises(ShapeMismatch, match="block_size is 12, page_size 8"):
        jitgen.Selection(batch.whole.q_indptr(), table, batch.whole.kv_len(), batch.chosen, 8, block_size=12)


def test_lists_that_make_no_sense_are_named_on_the_cpu():
    batch = ChosenBatch(LENGTHS["decode"])
    _, table = batch.caches()
    sizes = batch.whole.q_indptr(), table, batch.whole.kv_len()

    def update(chosen, **options):
        return batch.plan(**options).update(jitgen.Selection(*sizes, chosen, 8))

    far = batch.chosen.clone()
    far[2, 1, 0] = 5  # of 33 keys: blocks 0 to 4
    with pytest.raises(ShapeMismatch, match="list 2 of chosen names block 5, and its request has 33 keys"):
        update(far)
    twice = batch.chosen.clone()
    twice[0, 0] = 2
    with pytest.raises(ShapeMismatch, match="list 0 of chosen names a block twice"):
        update(twice)
    with pytest.raises(ShapeMismatch, match="list 1 of chosen names a block twice"):
        twice = torch.tensor([[[0, 1], [1, 0]], [[0, 0], [0, -1]]] + [[[0, -1]] * 2] * 3)
        batch.plan().update(jitgen.Selection(*sizes, twice, 8, block_size=16))
    uneven = torch.tensor([[[0, 1, -1], [0, 1, 2]]] + [[[0, -1, -1]] * 2] * 4)
    with pytest.raises(ShapeMismatch, match=r"list 0 has \[16, 24\] keys for its KV heads"):
        update(uneven)
    update(uneven, selection="uneven")
    with pytest.raises(ShapeMismatch, match="begin a list at each of the requests' first rows"):
        selection = jitgen.Selection(*sizes, batch.chosen, 8, list_indptr=torch.tensor([0, 1, 1, 2, 3, 5]))
        batch.plan().update(selection)
    starts = torch.arange(6, dtype=torch.int32) * table.shape[1]
    for number in (-1, -(10**9), 2**31 - 1):  # which must not be followed, on a GPU neither
        wrong = starts.clone()
        wrong[1] = number
        with pytest.raises(ShapeMismatch, match="indptr of the page table is"):
            batch.plan().update(jitgen.Selection(sizes[0], (wrong, table.flatten()), sizes[2], batch.chosen, 8))
    with pytest.raises(ShapeMismatch, match="none of them empty"):
        jitgen.Selection(sizes[0], torch.zeros(5, 0, dtype=torch.int32), sizes[2], batch.chosen, 8)
