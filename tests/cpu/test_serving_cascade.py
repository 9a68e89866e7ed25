"""Cascades: every structure of levels gives what each request gives alone, for every hook and every edge."""

from __future__ import annotations

import pytest
import torch
from cascade_batch import SharedBatch
from serving_batch import poisoned

import jitgen
from jitgen.errors import PlanMismatch, ShapeMismatch, VariantError

slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
per_request = torch.tensor([3, 40, 0, 17, 25])


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


VARIANTS = {
    "plain": lambda: None,
    "causal": lambda: jitgen.Variant(mask_mod=causal),
    "window": lambda: jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < 13)),
    "alibi": lambda: jitgen.Variant(
        score_mod=lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx), mask_mod=causal
    ),
    "request": lambda: jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: kv_idx >= per_request[b]),
    "lengths": lambda: jitgen.Variant(
        score_mod=lambda score, b, h, q_idx, kv_idx, *, q_len, kv_len, ctx_len: score * (q_len + ctx_len) / (kv_len + 1),
    ),
    "local": lambda: jitgen.Variant(
        score_mod=lambda score, b, h, q_idx, kv_idx: score - 0.01 * (q_idx + 1) * kv_idx, q_index="local"
    ),
    "finished": lambda: jitgen.Variant(
        mask_mod=causal, sink=sinks, output_transform=lambda o, lse, b, h, q_idx: o * (b + 1) + q_idx,
        lse_transform=lambda lse, b, h, q_idx: lse * 2 + q_idx,
    ),
}  # fmt: skip
STRUCTURES = {
    "shared": ([1, 1, 1, 1, 1], [[(5, 37)], [(1, 3), (1, 18), (1, 1), (1, 4), (1, 9)]]),
    "groups": ([3, 1, 5, 2, 1], [[(2, 33), (3, 21)], [(1, 9), (1, 2), (1, 6), (1, 130), (1, 1)]]),
    "three": ([3, 1, 5, 2, 2], [[(5, 37)], [(2, 11), (3, 5)], [(1, 9), (1, 1), (1, 30), (1, 4), (1, 7)]]),
    "some share": ([1, 2, 1, 1, 1], [[(1, 0), (3, 16), (1, 0)], [(1, 9), (1, 4), (1, 4), (1, 4), (1, 300)]]),
    "no suffix": ([1, 1, 1, 1, 1], [[(5, 40)], [(1, 0), (1, 3), (1, 0), (1, 0), (1, 5)]]),
    "no prefix": ([1, 3, 1, 1, 2], [[(5, 0)], [(1, 5), (1, 3), (1, 8), (1, 1), (1, 5)]]),
    "no rows": ([0, 3, 0, 1, 0], [[(2, 9), (3, 12)], [(1, 5), (1, 3), (1, 8), (1, 1), (1, 5)]]),
    "one": ([7], [[(1, 29)], [(1, 10)]]),
    "one level": ([2, 1], [[(1, 9), (1, 4)]]),
    "prefill": ([40, 3, 70, 1], [[(4, 64)], [(1, 40), (1, 3), (1, 75), (1, 1)]]),
}


def check(shared, variant, *, form="csr", tolerance=2e-5, **options):
    caches, cascade = shared.build(form=form)
    plan = shared.plan(variant, room=2, **options).update(cascade)
    out, lse = poisoned(plan, shared.whole.q)
    jitgen.paged_attention(shared.whole.q, caches, cascade, plan, out=out, lse=lse, return_lse=True)
    want, want_lse = shared.whole.expected(variant)
    torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, atol=tolerance, rtol=tolerance)
    return plan, cascade, caches


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_request_gets_what_it_gets_alone(structure, variant):
    check(SharedBatch(*STRUCTURES[structure]), VARIANTS[variant]())


@pytest.mark.parametrize("form", ["csr", "dense"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_any_page_table_and_page_size_will_do(form, page_size):
    check(SharedBatch(*STRUCTURES["three"], page_size=page_size), VARIANTS["alibi"](), form=form)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_states_are_merged_in_float(dtype):
    shared = SharedBatch(*STRUCTURES["three"], dtype=dtype, head_dim=24, head_dim_v=40)
    check(shared, VARIANTS["causal"](), tolerance=2e-3 if dtype == torch.float16 else 1.6e-2)


@pytest.mark.parametrize("split", ["balanced", "none"])
def test_long_keys_are_cut_or_not(split):
    check(SharedBatch([1, 2], [[(2, 2000)], [(1, 700), (1, 5)]]), VARIANTS["alibi"](), split=split)


def test_an_update_for_other_lengths_reads_the_tensors_as_they_are_then():
    first, second = (SharedBatch(*STRUCTURES["groups"], seed=seed) for seed in (0, 5))
    plan, cascade, _ = check(first, VARIANTS["causal"]())
    caches, other = second.build()
    for level, new in zip(cascade.levels, other.levels, strict=True):
        level.page_table.pages.copy_(new.page_table.pages)
        level.page_table.indptr.copy_(new.page_table.indptr)
        level.kv_len.copy_(new.kv_len)
    plan.update(cascade)
    out = jitgen.paged_attention(second.whole.q, caches, cascade, plan)
    torch.testing.assert_close(out.double(), second.whole.expected(VARIANTS["causal"]())[0], atol=2e-5, rtol=2e-5)


def test_padding_is_neither_read_nor_written():
    shared = SharedBatch(*STRUCTURES["groups"])
    caches, cascade = shared.build()
    plan = shared.plan(None, room=4).update(cascade)
    q = torch.cat([shared.whole.q, torch.full((3, 4, 16), torch.nan)])
    out, lse = poisoned(plan, q)
    jitgen.paged_attention(q, caches, cascade, plan, out=out, lse=lse)
    torch.testing.assert_close(out[:-3].double(), shared.whole.expected()[0], atol=2e-5, rtol=2e-5)
    assert out[-3:].isnan().all() and lse[-3:].isnan().all()


def test_layers_may_differ_in_their_scores():
    shared = SharedBatch(*STRUCTURES["three"])
    caches, cascade = shared.build()
    plan = shared.plan(VARIANTS["causal"]()).update(cascade)
    for name in ("causal", "alibi"):
        out = jitgen.paged_attention(shared.whole.q, caches, cascade, plan, variant=VARIANTS[name]())
        torch.testing.assert_close(out.double(), shared.whole.expected(VARIANTS[name]())[0], atol=2e-5, rtol=2e-5)


def test_captures_are_replaced_by_an_update():
    shared = SharedBatch(*STRUCTURES["three"])
    caches, cascade = shared.build()
    plan = shared.plan(VARIANTS["request"]()).update(cascade, per_request=torch.tensor([0, 1, 2, 3, 4]))
    out = jitgen.paged_attention(shared.whole.q, caches, cascade, plan)
    want, _ = shared.whole.expected(jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: kv_idx >= b))
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)


# ---- detection --------------------------------------------------------------------------------------------------------------


def detected(lists, lengths, page_size=4, **options):
    indptr = torch.tensor([0, *torch.tensor([len(pages) for pages in lists]).cumsum(0).tolist()])
    table = (indptr, torch.tensor([page for pages in lists for page in pages]))
    rows = torch.arange(len(lists) + 1)
    cascade = jitgen.Cascade.detect(rows, table, torch.tensor(lengths), page_size, **options)
    return [(level.q_indptr.tolist(), level.page_table.indptr.tolist(), level.page_table.pages.tolist(), level.kv_len.tolist())
            for level in cascade.levels]  # fmt: skip


def test_neighbours_that_begin_alike_form_a_group():
    lists = [[7, 8, 9, 1], [7, 8, 9, 2], [7, 8, 3], [5, 6, 4], [5, 6]]
    shared, own = detected(lists, [16, 14, 10, 12, 8], min_pages=2)
    assert shared == ([0, 3, 5], [0, 2, 4], [7, 8, 5, 6], [8, 8])
    assert own == ([0, 1, 2, 3, 4, 5], [0, 2, 4, 5, 6, 6], [9, 1, 9, 2, 3, 4], [8, 6, 2, 4, 0])


def test_pages_that_are_not_full_are_not_shared():
    lists = [[7, 8], [7, 8], [1]]
    shared, own = detected(lists, [8, 7, 3], min_pages=1)
    assert shared == ([0, 2, 3], [0, 1, 1], [7], [4, 0])
    assert own[2:] == ([8, 8, 1], [4, 3, 3])


def test_detection_changes_no_result():
    q_lens, lengths = [1, 1, 2, 1], [45, 40, 33, 9]
    shared = SharedBatch(q_lens, [[(3, 32), (1, 0)], [(1, n) for n in (13, 8, 1, 9)]])
    caches, cascade = shared.build()
    level = cascade.levels
    lists = [level[0].page_table.pages[:8].tolist() if b < 3 else [] for b in range(4)]
    at = level[1].page_table.indptr.tolist()
    for b in range(4):
        lists[b] += level[1].page_table.pages[at[b] : at[b + 1]].tolist()
    found = jitgen.Cascade.detect(shared.whole.q_indptr(), shared.whole.csr(lists), shared.whole.ints(lengths), 4)
    assert [level.kv_len.tolist() for level in found.levels] == [[32, 0], [13, 8, 1, 9]]
    assert found.saved_keys == 2 * 32
    assert cascade.saved_keys is None
    plan = shared.plan(VARIANTS["alibi"]()).update(found)
    out = jitgen.paged_attention(shared.whole.q, caches, found, plan)
    torch.testing.assert_close(out.double(), shared.whole.expected(VARIANTS["alibi"]())[0], atol=2e-5, rtol=2e-5)


# ---- errors -----------------------------------------------------------------------------------------------------------------


def test_wrong_levels_are_named():
    shared = SharedBatch(*STRUCTURES["three"])
    cascade = shared.build()[1]
    with pytest.raises(PlanMismatch, match="has 3 levels, the plan was made for levels=2"):
        shared.plan(levels=2).update(cascade)
    with pytest.raises(PlanMismatch, match="Make it with levels="):
        shared.plan(levels=1).update(cascade)
    with pytest.raises(PlanMismatch, match=r"takes a jitgen\.Cascade and no lengths"):
        shared.plan().update(shared.whole.q_indptr(), shared.whole.kv_len())
    with pytest.raises(ShapeMismatch, match="has no levels"):
        jitgen.Cascade([])
    with pytest.raises(ShapeMismatch, match="2 groups, q_indptr of 2 entries"):
        jitgen.Cascade([(torch.tensor([0, 1]), torch.zeros(2, 1, dtype=torch.int32), torch.tensor([1, 1]))])
    with pytest.raises(TypeError, match=r"expected \(q_indptr, page_table, kv_len\)"):
        jitgen.Cascade([torch.zeros(1)])


def test_groups_that_divide_a_request_or_other_rows_are_named():
    def cascade(first):
        table = torch.zeros(4, 4, dtype=torch.int32)
        last = torch.tensor([0, 3, 5])
        return jitgen.Cascade([(first, table, torch.full((len(first) - 1,), 4)), (last, table, torch.tensor([5, 5]))])

    plan = jitgen.Plan(4, 8, 4, 2, 16, dtype=torch.float32, device="cpu", levels=2)
    with pytest.raises(ShapeMismatch, match="level 0 begins or ends at row 2, inside of a request"):
        plan.update(cascade(torch.tensor([0, 2, 5])))
    with pytest.raises(ShapeMismatch, match="level 0 ends with 4 rows, that of the last level with 5"):
        plan.update(cascade(torch.tensor([0, 4])))
    with pytest.raises(ShapeMismatch, match="start with 0 and never fall"):
        plan.update(cascade(torch.tensor([0, 3, 2, 5])))
    for first in (-(10**9), 10**9):
        with pytest.raises(ShapeMismatch, match="start with 0 and never fall"):
            plan.update(cascade(torch.tensor([first, 5])))
    wrong = cascade(torch.tensor([0, 5]))
    wrong.levels[0].kv_len[0] = -1
    with pytest.raises(ShapeMismatch, match=r"kv_len of level 0 is \[-1\], expected no negative length"):
        plan.update(wrong)


def test_a_call_needs_the_cascade_of_the_update():
    shared = SharedBatch(*STRUCTURES["groups"])
    caches, cascade = shared.build()
    plan = shared.plan().update(cascade)
    with pytest.raises(PlanMismatch, match=r"another Cascade than plan\.update was given"):
        jitgen.paged_attention(shared.whole.q, caches, shared.build()[1], plan)
    with pytest.raises(PlanMismatch, match="a PageTable, not the Cascade"):
        jitgen.paged_attention(shared.whole.q, caches, cascade.levels[-1].page_table, plan)


def test_page_lists_must_hold_the_keys_of_their_level():
    shared = SharedBatch(*STRUCTURES["groups"])
    caches, cascade = shared.build()
    cascade.levels[0].kv_len[1] = 500
    plan = shared.plan().update(cascade)
    with pytest.raises(ShapeMismatch, match="request 1 has kv_len 500"):
        jitgen.paged_attention(shared.whole.q, caches, cascade, plan)


def test_a_norm_of_its_own_has_no_states_to_merge():
    class Weights(jitgen.OnlineNorm):
        def update(self, score, state):
            return torch.sigmoid(score), 1.0, state

    with pytest.raises(VariantError, match=r"an OnlineNorm without merge\(a, b\), which levels= needs"):
        jitgen.Plan(4, 8, 4, 2, 16, dtype=torch.float32, device="cpu", levels=2, variant=jitgen.Variant(softmax=Weights))


@pytest.mark.parametrize("options", [{"layout": "ragged"}, {"split": "fixed", "kv_split": 16}], ids=str)
def test_levels_need_pages_and_no_fixed_split(options):
    with pytest.raises(ShapeMismatch, match="levels=2 goes with layout='paged'"):
        jitgen.Plan(4, 8, 4, 2, 16, dtype=torch.float32, device="cpu", levels=2, **options)


def test_explain_counts_requests_and_their_parts():
    shared = SharedBatch(*STRUCTURES["groups"])
    plan = shared.plan().update(shared.build()[1])
    text = plan.explain()
    keys = sum(n for _, n in shared.whole.lengths)
    assert text.startswith(f"5 requests, 12 query rows, {keys} keys; in 7 parts; 4 query heads on 2 KV heads")
