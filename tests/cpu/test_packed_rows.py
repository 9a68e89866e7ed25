"""q_off, q_tok and kv_off: where rows and keys of a request lie among those of all, in every layout."""

from __future__ import annotations

import pytest
import torch
from cascade_batch import SharedBatch
from packed_cases import LENGTHS, by_capture, by_name
from selection_batch import ChosenBatch
from serving_batch import Batch, poisoned

import jitgen
from jitgen import reference
from jitgen.errors import VariantError

key_bias = torch.randn(300, generator=torch.Generator().manual_seed(4))


def check(got, want):
    for name, a, b in zip(("out", "lse"), got, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


BOTH = pytest.mark.parametrize("q_index", ["absolute", "local"])


@BOTH
@pytest.mark.parametrize("options", [{}, {"split": "fixed", "kv_split": 16}], ids=["balanced", "fixed"])
@pytest.mark.parametrize("layout", ["ragged", "paged"])
def test_rows_of_a_plan_are_those_of_q(layout, q_index, options):
    batch = Batch(LENGTHS)
    plan = batch.plan(by_name(q_index), layout=layout, room=3, **options)
    out, lse = poisoned(plan, batch.q)
    if layout == "ragged":
        jitgen.ragged_attention(batch.q, *batch.ragged(), plan, out=out, lse=lse)
    else:
        k, v, lists = batch.pages(16)
        jitgen.paged_attention(batch.q, (k, v), batch.csr(lists), plan, out=out, lse=lse)
    check((out, lse), batch.expected(by_capture(q_index, batch.q_indptr())))


@BOTH
def test_rows_of_a_cascade_are_those_of_q(q_index):
    shared = SharedBatch([3, 1, 5, 2, 2], [[(5, 37)], [(2, 11), (3, 5)], [(1, 9), (1, 1), (1, 30), (1, 4), (1, 7)]])
    caches, cascade = shared.build()
    plan = shared.plan(by_name(q_index), room=2).update(cascade)
    out, lse = poisoned(plan, shared.whole.q)
    jitgen.paged_attention(shared.whole.q, caches, cascade, plan, out=out, lse=lse)
    check((out, lse), shared.whole.expected(by_capture(q_index, shared.whole.q_indptr())))


def test_rows_of_a_selection_are_those_of_q():
    chosen = ChosenBatch([(3, 40), (1, 17), (9, 61), (1, 130)])
    caches, table = chosen.caches()
    selection = chosen.select(table)
    plan = chosen.plan(by_name("absolute")).update(selection)
    out, lse = poisoned(plan, chosen.whole.q)
    jitgen.paged_attention(chosen.whole.q, caches, selection, plan, out=out, lse=lse)
    check((out, lse), chosen.expected(by_capture("absolute", chosen.whole.q_indptr())))


@BOTH
def test_rows_of_a_dense_batch_count_through_its_requests(q_index):
    q, k, v = (torch.randn(3, heads, length, 24) for heads, length in ((4, 13), (2, 41), (2, 41)))
    starts = torch.tensor([0, 13, 26])
    for variant in (by_name(q_index), by_capture(q_index, starts)):
        want = reference.attention(q, k, v, by_capture(q_index, starts), return_lse=True)
        check(jitgen.attention(q, k, v, variant, return_lse=True), want)
        assert all(map(torch.equal, reference.attention(q, k, v, variant, return_lse=True), want))


def test_ragged_keys_are_indexed_where_they_lie():
    batch = Batch(LENGTHS)
    plan = batch.plan(lambda s, b, h, q_idx, kv_idx, *, kv_off: s + key_bias[kv_off + kv_idx], layout="ragged")
    starts = batch.kv_indptr()
    want = batch.expected(lambda s, b, h, q_idx, kv_idx: s + key_bias[starts[b] + kv_idx])
    check(jitgen.ragged_attention(batch.q, *batch.ragged(), plan, return_lse=True), want)


@pytest.mark.parametrize("page_size", [1, 5])
def test_a_tensor_by_slots_of_the_cache_is_read_through_the_block_table(page_size):
    batch = Batch(LENGTHS)
    k, v, lists = batch.pages(page_size)
    table, age = batch.block_table(lists), torch.randn(k.shape[0] * page_size)

    def by_slot(score, b, h, q_idx, kv_idx):
        return score + age[table[b, kv_idx // page_size] * page_size + kv_idx % page_size]

    plan = batch.plan(by_slot)
    check(jitgen.paged_attention(batch.q, (k, v), table, plan, return_lse=True), batch.expected(by_slot))


def test_kv_off_is_refused_where_keys_have_no_rows():
    def by_row(score, b, h, q_idx, kv_idx, *, kv_off):
        return score + key_bias[kv_off + kv_idx]

    batch = Batch(LENGTHS)
    with pytest.raises(VariantError, match="reads kv_off, and keys in pages have no rows"):
        batch.plan(by_row)
    with pytest.raises(VariantError, match="reads kv_off, and this plan copies keys"):
        batch.plan(jitgen.Variant(score_mod=by_row, k_transform=lambda k, b, kv_h, pos: k * 2), layout="ragged")
    with pytest.raises(VariantError, match="asks for q_tok, and it is given no q_idx"):
        jitgen.Variant(sink=lambda b, h, *, q_tok: key_bias[q_tok])
    with pytest.raises(VariantError, match="asks for kv_off, and it is given no kv_idx"):
        jitgen.Variant(lse_transform=lambda lse, b, h, q_idx, *, kv_off: lse + kv_off)
