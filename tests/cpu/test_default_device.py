"""What torch makes where nothing is said (torch.set_default_device, set_default_dtype) changes no call of jitgen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import jitgen
from jitgen.compat import flashinfer

Q, CACHE, TABLE = torch.randn(3, 2, 64), torch.randn(4, 2, 4, 1, 64), torch.arange(4, dtype=torch.int32).view(2, 2)
K, X, THREE = torch.randn(1, 2, 40, 64), torch.randn(3, 20), torch.arange(3)
Q_INDPTR, KV_LEN, LIST_INDPTR = torch.tensor([0, 1, 3]), torch.tensor([5, 7]), torch.tensor([0, 2, 4], dtype=torch.int32)
MASK = torch.rand(3, 3) > 0.3
MASK[:, 0] = True


@contextmanager
def defaults() -> Iterator[None]:
    """Tensors are made without memory, as a default of "cuda" makes them where the values are not."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def planned() -> jitgen.Plan:
    plan = jitgen.Plan(2, 8, 2, 1, 64, dtype=torch.float32, device="cpu", page_size=4)
    return plan.update(Q_INDPTR, KV_LEN)


CALLS = {
    "attention": lambda: jitgen.attention(K, K, K, mask_mod=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx),
    "paged": lambda: jitgen.paged_attention(Q, CACHE, (LIST_INDPTR, TABLE.view(-1)), planned()),
    "sample": lambda: jitgen.sample(X, generator=torch.Generator("cpu").manual_seed(3)),
    "sample from generators": lambda: jitgen.sample(X, generator=[torch.Generator("cpu").manual_seed(i) for i in range(3)]),
    "rope": lambda: jitgen.rope(Q, None, THREE)[0],
    "softmax": lambda: jitgen.softmax(X),
    "block sparse": lambda: jitgen.block_sparse_attention(
        K, K, K, jitgen.BlockSparse.bsr(LIST_INDPTR // 2, TABLE.view(-1)[:2] % 2, (40, 40), (20, 20))
    ),
    "single prefill": lambda: flashinfer.single_prefill_with_kv_cache(Q, Q, Q, custom_mask=MASK),
}


@pytest.mark.parametrize("name", CALLS)
def test_call_is_the_same_under_other_defaults(name):
    expected = CALLS[name]()
    with defaults():
        found = CALLS[name]()
    assert found.device.type == "cpu" and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


def test_plans_tell_their_work_under_other_defaults():
    expected = planned().explain()
    with defaults():
        assert planned().explain() == expected


def test_draws_of_the_default_generator_are_the_same_under_other_defaults():
    torch.manual_seed(1)
    expected = jitgen.sample(X)
    torch.manual_seed(1)
    with defaults():
        assert torch.equal(jitgen.sample(X), expected)


def test_levels_are_found_under_other_defaults():
    pages = torch.tensor([[0, 1, 2], [0, 1, 3]], dtype=torch.int32)
    given = (Q_INDPTR, jitgen.PageTable.dense(pages), torch.tensor([12, 11]), 4)
    expected = jitgen.Cascade.detect(*given, min_pages=2)
    with defaults():
        found = jitgen.Cascade.detect(*given, min_pages=2)
    for a, b in zip(expected.levels, found.levels, strict=True):
        assert torch.equal(a.kv_len, b.kv_len) and torch.equal(a.q_indptr, b.q_indptr)
