"""Calls that look like the last one of their plan use what was prepared for it: what may change meanwhile must be seen."""

from __future__ import annotations

import pytest
import torch
from serving_batch import Batch

import jitgen

PAGE_SIZE = 4


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


@pytest.fixture
def batch():
    return Batch([(1, 9), (3, 21), (1, 1), (2, 14)])


def table_of(batch, lists, form, dtype=torch.int32):
    if form == "dense":
        return batch.block_table(lists, dtype)
    pair = batch.csr(lists, dtype)
    return jitgen.PageTable.csr(*pair) if form == "object" else pair


def assert_is_expected(batch, got):
    want, _ = batch.expected(causal)
    assert (got.double() - want).abs().max().item() <= 5e-6


def renumbered(k, v, lists, seed):
    """The same cache with its pages in another order, and their new numbers."""
    order = torch.randperm(k.shape[0], generator=torch.Generator().manual_seed(seed))
    place = order.argsort().tolist()
    return k[order], v[order], [[place[p] for p in pages] for pages in lists]


FORMS = [(form, dtype) for form in ("pair", "dense") for dtype in (torch.int32, torch.int64)]


@pytest.mark.parametrize(("form", "dtype"), [("object", torch.int32), *FORMS], ids=str)  # a PageTable of int64 is a copy
def test_page_numbers_may_be_changed_in_place(batch, form, dtype):
    plan = batch.plan(causal)
    k, v, lists = batch.pages(PAGE_SIZE)
    table = table_of(batch, lists, form, dtype)
    for seed in range(3):
        k, v, lists = renumbered(k, v, lists, seed)
        now = table_of(batch, lists, form, dtype)
        if form == "dense":
            table.copy_(now)
        else:
            (table.pages if form == "object" else table[1]).copy_(now.pages if form == "object" else now[1])
        assert_is_expected(batch, jitgen.paged_attention(batch.q, (k, v), table, plan))


def test_layers_have_caches_and_tables_of_their_own(batch):
    plan = batch.plan(causal)
    layers = [renumbered(*batch.pages(PAGE_SIZE), seed) for seed in range(3)]
    tables = [table_of(batch, lists, "object") for _, _, lists in layers]
    for _ in range(2):
        for (k, v, _), table in zip(layers, tables, strict=True):
            assert_is_expected(batch, jitgen.paged_attention(batch.q, (k, v), table, plan))


@pytest.mark.parametrize("layout", ["paged", "ragged"])
def test_an_update_changes_the_lengths_of_the_next_call(batch, layout):
    plan = batch.plan(causal, room=8, layout=layout)
    for lengths in ([(1, 9), (3, 21), (1, 1), (2, 14)], [(3, 21), (1, 1), (1, 40), (2, 14)], [(7, 9)], [(4, 4), (3, 30)]):
        step = Batch(lengths, seed=len(lengths))
        step.update(plan)
        for _ in range(2):
            if layout == "ragged":
                got = jitgen.ragged_attention(step.q, *step.ragged(), plan)
            else:
                k, v, lists = step.pages(PAGE_SIZE)
                got = jitgen.paged_attention(step.q, (k, v), table_of(step, lists, "object"), plan)
            assert_is_expected(step, got)


def test_options_of_one_call_are_not_those_of_the_next(batch):
    plan = batch.plan(causal)
    k, v, lists = batch.pages(PAGE_SIZE)
    table = table_of(batch, lists, "object")
    first = jitgen.paged_attention(batch.q, (k, v), table, plan)
    other = jitgen.paged_attention(batch.q, (k, v), table, plan, scale=0.7)
    assert not torch.equal(first, other)
    wide = torch.full((batch.total_q, 2 * batch.num_q_heads, batch.head_dim), torch.nan)
    jitgen.paged_attention(batch.q, (k, v), table, plan, out=wide[:, ::2])
    assert torch.equal(wide[:, ::2], first)
    assert wide[:, 1::2].isnan().all()
    assert torch.equal(jitgen.paged_attention(batch.q, (k, v), table, plan), first)


def test_the_number_of_threads_is_that_of_the_call(batch):
    plan = batch.plan(causal)
    k, v, lists = batch.pages(PAGE_SIZE)
    table = table_of(batch, lists, "object")
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            assert_is_expected(batch, jitgen.paged_attention(batch.q, (k, v), table, plan))
    finally:
        torch.set_num_threads(before)
