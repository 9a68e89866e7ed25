"""q_off, q_tok and kv_off on a GPU, in every layout and family, against hooks that find rows by the bounds of requests."""

from __future__ import annotations

import pytest
import torch
from cascade_batch import SharedBatch
from packed_cases import LENGTHS, by_capture, by_name
from selection_batch import ChosenBatch
from serving_batch import Batch, poisoned

import jitgen
from jitgen import reference

DEVICE = "cuda"
TOLERANCE = 2e-2  # bfloat16 outputs below 4


def check(got, want):
    out, lse = got
    assert not out.isnan().any() and (out.double() - want[0]).abs().max().item() <= TOLERANCE
    assert torch.equal(lse.isfinite(), want[1].isfinite())
    finite = want[1].isfinite()
    assert (lse.double() - want[1])[finite].abs().max().item() <= TOLERANCE


BOTH = pytest.mark.parametrize("q_index", ["absolute", "local"])
PLANS = {
    "ragged": {"layout": "ragged"},
    "paged": {"page_size": 16},
    "sm80": {"page_size": 16, "family": "sm80"},
    "fixed": {"page_size": 16, "split": "fixed", "kv_split": 32, "max_kv_len": 130},
}


@BOTH
@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
def test_rows_of_a_plan_are_those_of_q(options, q_index):
    batch = Batch(LENGTHS, 8, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    plan = batch.plan(by_name(q_index, DEVICE), room=3, **options)
    out, lse = poisoned(plan, batch.q)
    if plan.layout == "ragged":
        jitgen.ragged_attention(batch.q, *batch.ragged(), plan, out=out, lse=lse)
    else:
        k, v, lists = batch.pages(16)
        jitgen.paged_attention(batch.q, (k, v), batch.csr(lists), plan, out=out, lse=lse)
    check((out, lse), batch.expected(by_capture(q_index, batch.q_indptr())))


@BOTH
def test_rows_of_a_cascade_are_those_of_q(q_index):
    shared = SharedBatch(
        [3, 1, 5, 2, 2], [[(5, 37)], [(2, 11), (3, 5)], [(1, 9), (1, 1), (1, 30), (1, 4), (1, 7)]], page_size=16,
        num_q_heads=8, head_dim=64, dtype=torch.bfloat16, device=DEVICE,
    )  # fmt: skip
    caches, cascade = shared.build()
    plan = shared.plan(by_name(q_index, DEVICE), room=2).update(cascade)
    out, lse = poisoned(plan, shared.whole.q)
    jitgen.paged_attention(shared.whole.q, caches, cascade, plan, out=out, lse=lse)
    check((out, lse), shared.whole.expected(by_capture(q_index, shared.whole.q_indptr())))


def test_rows_of_a_selection_are_those_of_q():
    chosen = ChosenBatch(
        [(3, 40), (1, 17), (9, 61), (1, 130)], block_size=16, page_size=16, num_q_heads=8, head_dim=64, dtype=torch.bfloat16,
        device=DEVICE,
    )  # fmt: skip
    caches, table = chosen.caches()
    selection = chosen.select(table)
    plan = chosen.plan(by_name("absolute", DEVICE)).update(selection)
    out, lse = poisoned(plan, chosen.whole.q)
    jitgen.paged_attention(chosen.whole.q, caches, selection, plan, out=out, lse=lse)
    check((out, lse), chosen.expected(by_capture("absolute", chosen.whole.q_indptr())))


@BOTH
def test_rows_of_a_dense_batch_count_through_its_requests(q_index, family):
    q, k, v = (torch.randn(3, n, length, 64, device=DEVICE, dtype=torch.bfloat16) for n, length in ((8, 13), (2, 41), (2, 41)))
    want = reference.attention(q, k, v, by_capture(q_index, torch.tensor([0, 13, 26], device=DEVICE)), return_lse=True)
    check(jitgen.attention(q, k, v, by_name(q_index, DEVICE), return_lse=True, family=family), want)


def test_ragged_keys_are_indexed_where_they_lie():
    key_bias = torch.randn(300, device=DEVICE)
    batch = Batch(LENGTHS, 8, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    starts = batch.kv_indptr()
    want = batch.expected(lambda s, b, h, q_idx, kv_idx: s + key_bias[starts[b] + kv_idx])
    for options in ({}, {"split": "fixed", "kv_split": 32, "max_kv_len": 130}):
        plan = batch.plan(lambda s, b, h, q_idx, kv_idx, *, kv_off: s + key_bias[kv_off + kv_idx], layout="ragged", **options)
        check(jitgen.ragged_attention(batch.q, *batch.ragged(), plan, return_lse=True), want)
