"""Arguments of the wrong kind get an error of jitgen that names them, as a list in the place of a tensor."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

import jitgen
from jitgen import errors

ROWS, LENGTHS = torch.tensor([0, 1, 4]), torch.tensor([5, 9])
CACHE, PAGES = torch.zeros(8, 2, 4, 2, 32), torch.arange(6).view(2, 3)
NEW = torch.ones(4, 2, 32)
TOKENS = {"positions": torch.tensor([4, 6, 7, 8]), "batch_indices": torch.tensor([0, 1, 1, 1])}


def append(**changes):
    places = {"page_table": PAGES, **TOKENS}
    if "slot_mapping" in changes:
        places = {}
    elif changes.keys() & {"q_indptr", "kv_len"}:
        places = {"page_table": PAGES, "q_indptr": ROWS, "kv_len": LENGTHS}
    return jitgen.append(CACHE.clone(), NEW, NEW, **{**places, **changes})


def rope(**changes):
    given = {"q": torch.ones(4, 4, 32), "k": NEW, "positions": torch.arange(4)}
    return jitgen.rope(**{**given, **changes})


def sample(**changes):
    return jitgen.sample(torch.zeros(4, 50), **{"seed": 1, "offset": torch.zeros(4, dtype=torch.int64), **changes})


def merge(**changes):
    return jitgen.merge_states(**{"outs": torch.ones(5, 3, 4, 32), "lses": torch.ones(5, 3, 4), **changes})


def select(**changes):
    given = {"page_table": PAGES, "chosen": torch.zeros(2, 1, 1, dtype=torch.int64), "page_size": 4}
    return jitgen.Selection(ROWS, kv_len=LENGTHS, **{**given, **changes})


def plan(**changes):
    return jitgen.Plan(**{**dict.fromkeys(("max_batch", "num_q_heads", "num_kv_heads"), 2), "max_tokens": 8, "head_dim": 32,
                          "dtype": torch.float32, "device": "cpu", **changes})  # fmt: skip


def penalties(**changes):
    return jitgen.Penalties(torch.zeros(4, 50, dtype=torch.int32), **changes)


WRONG = [
    *[(append, {name: value}, name) for value in ([4, 6, 7, 8], numpy.arange(4), 3)
      for name in ("positions", "batch_indices", "slot_mapping", "q_indptr", "kv_len")],
    (append, {"page_table": PAGES.to_sparse()}, "block_table has layout torch.sparse_coo"),
    *[(rope, {name: value}, name) for value in ([1.0], numpy.ones(4), "x") for name in ("q", "k", "positions", "cos_sin")],
    *[(rope, {name: [1]}, name) for name in ("theta", "scale", "rotary_dim", "interleave", "llama31")],
    (rope, {"interleave": None}, "interleave is None of type NoneType"),
    (rope, {"llama31": 3}, "llama31 is 3"),
    (rope, {"out": 3}, "out is int, expected a pair"),
    (sample, {"advance": "x"}, "advance is 'x' of type str"),
    (sample, {"bad_token": 10**30}, "bad_token is 1000"),
    (penalties, {"frequency": math.nan}, "frequency is nan"),
    (merge, {"outs": None}, "outs is a NoneType"),
    (merge, {"lses": 3}, "lses is a int"),
    (merge, {"outs": torch.ones(5, 3, 4, 32, dtype=torch.int8)}, "outs has dtype int8, expected a floating point"),
    *[(select, {name: value}, name) for name in ("page_size", "block_size") for value in ("4", [4], 4.0)],
    (plan, {"max_kv_len": 10**30}, "max_kv_len is 1000"),
    (plan, {"max_q_len": 2**31}, "max_q_len is 2147483648, expected at most 2147483647"),
]  # fmt: skip


@pytest.mark.parametrize("call, changes, named", WRONG, ids=lambda x: getattr(x, "__name__", None) or str(x)[:40])
def test_wrong_kinds_are_named(call, changes, named):
    call()
    with pytest.raises(errors.JitgenError, match="^" + named.replace(" ", r"\s")):
        call(**changes)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16])
def test_small_integers_are_integers(dtype):
    x, ks = torch.randn(4, 50), [3, 4, 5, 6]
    want = jitgen.sample(x, top_k=torch.tensor(ks, dtype=torch.int32), seed=1)
    assert torch.equal(jitgen.sample(x, top_k=torch.tensor(ks, dtype=dtype), seed=1), want)


def test_page_lists_may_be_of_more_requests_than_the_batch():
    made = plan(page_size=4, num_q_heads=4).update(ROWS, LENGTHS)
    q, cache = torch.randn(4, 4, 32), torch.randn(8, 2, 4, 2, 32)
    indptr, indices = torch.tensor([0, 2, 5, 6, 8]), torch.arange(8)
    want = jitgen.paged_attention(q, cache, (indptr[:3], indices), made)
    assert torch.equal(jitgen.paged_attention(q, cache, (indptr, indices), made), want)
    table = jitgen.PageTable.csr(indptr, indices)
    assert table.kv_len(torch.tensor([1, 2]), 4).tolist() == [5, 10]
    with pytest.raises(errors.ShapeMismatch, match="request 1 has kv_len 13"):
        jitgen.paged_attention(q, cache, (indptr, indices), plan(num_q_heads=4).update(ROWS, torch.tensor([5, 13])))
