"""Arguments of the wrong kind get an error of jitgen that names them, as a list in the place of a tensor."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

import jitgen
from jitgen import block_lists, errors

ROWS, LENGTHS = torch.tensor([0, 1, 4]), torch.tensor([5, 9])
CACHE, PAGES = torch.zeros(8, 2, 4, 2, 32), torch.arange(6).view(2, 3)
NEW, KEYS = torch.ones(4, 2, 32), torch.ones(1, 2, 32, 16)
BOUNDS, COLUMNS = torch.tensor([0, 1, 3]), torch.tensor([0, 0, 1])
BITS = torch.ones(3, 3, 16, dtype=torch.bool)
PAIRLESS = (None, 6, 6.0, "64", (6,), (6, 32, 1), (6.0, 32.0), ("6", "32"), (True, 32), torch.tensor([6, 32]), numpy.ones(2))
TENSORLESS = (None, [[1.0]], "x", 1.5, True, numpy.ones((1, 2, 32, 16), dtype=numpy.float32))
HASHLESS = ([1], {}, numpy.ones(2))
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


def attention(**changes):
    return jitgen.attention(**{"q": torch.ones(1, 4, 6, 16), "k": KEYS, "v": KEYS, **changes})


def variant_of(**changes):
    return jitgen.attention(torch.ones(1, 4, 6, 16), KEYS, KEYS, jitgen.Variant(**changes))


def reference(**changes):
    return jitgen.reference.attention(torch.ones(1, 4, 6, 16), KEYS, KEYS, **changes)


def flex(**changes):
    return jitgen.flex_attention(torch.ones(1, 4, 6, 16), KEYS, KEYS, enable_gqa=True, **changes)


def bsr(**changes):
    return jitgen.BlockSparse.bsr(**{"indptr": BOUNDS, "indices": COLUMNS, "lengths": (6, 32), "block": (3, 16), **changes})


def variable(**changes):
    sizes = {"row_sizes": torch.tensor([[3, 3], [2, 4]]), "column_sizes": torch.tensor([[16, 16], [2, 30]])}
    chosen = torch.ones(2, 2, 2, dtype=torch.bool)
    return jitgen.BlockSparse.variable(**{"chosen": chosen, "lengths": (6, 32), **sizes, **changes})


def over_blocks(made=bsr, **changes):
    given = {"q": torch.ones(1, 4, 6, 16), "k": KEYS, "v": KEYS, "blocks": made()}
    return jitgen.block_sparse_attention(**{**given, **changes})


def over_blocks_of_hopper(**changes):
    """As on a GPU that walks the lists, which the CPU kernels can too."""
    half = {"q": torch.ones(1, 4, 6, 64).half(), "k": torch.ones(1, 2, 32, 64).half(), "v": torch.ones(1, 2, 32, 64).half()}
    return over_blocks(**{**half, **changes})


def paged(**changes):
    made = plan(num_q_heads=4).update(ROWS, LENGTHS)
    given = {"q": torch.ones(4, 4, 32), "kv_cache": CACHE, "page_table": PAGES, "plan": made}
    return jitgen.paged_attention(**{**given, **changes})


def cascade(levels=None):
    table = jitgen.PageTable.dense(PAGES)
    return jitgen.Cascade([jitgen.CascadeLevel(ROWS.int(), table, LENGTHS.int())] if levels is None else levels)


def merge_two(**changes):
    parts = {name: torch.ones(5, 4, 32) if "out" in name else torch.ones(5, 4) for name in ("out_a", "lse_a", "out_b", "lse_b")}
    return jitgen.merge_state(**{**parts, **changes})


def pack(**changes):
    given = {"mask": torch.ones(32, dtype=torch.bool), "q_len": torch.tensor([1, 3]), "kv_len": LENGTHS}
    return jitgen.pack_mask(**{**given, **changes})


def verify(**changes):
    given = {"draft_probs": torch.ones(4, 2, 50), "draft_ids": torch.zeros(4, 2, dtype=torch.int32), "seed": 1}
    return jitgen.speculative_verify(target_probs=torch.ones(4, 3, 50), **{**given, **changes})


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
    *[(bsr, {name: value}, f"{name} is .* expected a pair of integers") for name in ("lengths", "block") for value in PAIRLESS],
    (bsr, {"lengths": (-6, 32)}, r"lengths is \(-6, 32\), expected \(q_len, kv_len\) from 0"),
    *[(bsr, {name: value}, name) for name in ("mask", "packed_mask") for value in TENSORLESS if value is not None],
    *[(bsr, {"indices": value}, "indices has shape") for value in (COLUMNS[0], COLUMNS[None])],
    (bsr, {"indices": COLUMNS.to("meta")}, "indices is on meta, expected a cpu or cuda tensor"),
    (bsr, {"indptr": BOUNDS.to("meta")}, "indptr is on meta"),
    (bsr, {"indices": COLUMNS.to_sparse()}, "indices has layout torch.sparse_coo"),
    (bsr, {"mask": BITS.to("meta")}, "mask is on meta"),
    (bsr, {"mask": BITS.float()}, "mask has dtype float32, expected bool"),
    (bsr, {"indptr": torch.tensor([0]), "lengths": (0, 32)}, r"indices has 3 block columns, and indptr of shape \(1,\)"),
    (bsr, {"per_query_head": 4}, "per_query_head is 4, expected True or False"),
    *[(variable, {"lengths": value}, "lengths is .* expected a pair of integers") for value in PAIRLESS],
    *[(variable, {"chosen": value}, "chosen is a") for value in TENSORLESS],
    (variable, {"row_sizes": torch.tensor(3)}, "row_sizes has shape"),
    (variable, {"column_sizes": torch.tensor([16, 16])}, "column_sizes has shape"),
    (variable, {"row_sizes": torch.tensor([[-3, 9], [2, 4]])}, "row_sizes and column_sizes .* negative size"),
    (variable, {"chosen": torch.ones(2, 2, 2, device="meta", dtype=torch.bool)}, "chosen is on meta"),
    (variable, {"chosen": torch.ones(2, 2, 2)}, "chosen has dtype float32"),
    *[(over_blocks, {name: value}, f"{name} is a") for name in "qkv" for value in TENSORLESS],
    *[(over_blocks, {name: KEYS[0, 0, :n]}, f"{name} has 2 dimensions") for name, n in (("q", 6), ("k", 32), ("v", 32))],
    *[(over_blocks, {name: torch.ones(3)}, f"{name} has 1 dimensions") for name in "qkv"],
    (over_blocks, {"made": lambda: bsr(indptr=torch.tensor([[0, 1, 2]] * 4))}, "the blocks have lists of 4 heads"),
    *[(over_blocks_of_hopper, {"v": torch.ones(1, 2, n, 64).half()}, f"v has kv_len {n}, k has 32") for n in (16, 64)],
    (over_blocks_of_hopper, {"k": torch.ones(2, 2, 32, 64).half(), "v": torch.ones(2, 2, 32, 64).half()}, "k has batch 2"),
    (over_blocks_of_hopper, {"v": torch.ones(1, 2, 32, 64)}, "v has dtype float32"),
    (over_blocks_of_hopper, {"k": torch.ones(1, 2, 32, 64).half().to_sparse()}, "k has layout torch.sparse_coo"),
    (over_blocks_of_hopper, {"out": [1]}, "out is a list"),
    *[(call, {"sink": torch.zeros(5)}, "sink has 5 logits, q has 4 heads") for call in (attention, variant_of, reference)],
    (paged, {"variant": jitgen.Variant(sink=torch.zeros(5))}, "sink has 5 logits, q has 4 heads"),
    *[(attention, {name: value}, name) for name in ("family", "out_dtype", "q_index") for value in HASHLESS],
    *[(append, {"kv_layout": value}, "kv_layout=") for value in HASHLESS],
    *[(append, {"q_indptr": torch.tensor(value)}, "q_indptr is") for value in ([0, 3, 2], [-1, 1, 4], [0, 1, 5])],
    *[(rope, {"positions": (torch.tensor(value), torch.tensor([0, 7]))}, "q_indptr is") for value in ([0, 3, 2], [0, 1, 5])],
    *[(paged, {"kv_layout": value}, "kv_layout=") for value in HASHLESS],
    *[(paged, {"scale": value}, "scale is") for value in HASHLESS],
    (paged, {"q": torch.ones(4, 4, 32).to_sparse()}, "q has layout torch.sparse_coo"),
    *[(plan, {name: value}, name) for value in HASHLESS for name in ("dtype", "kv_dtype", "layout", "split", "selection",
      "family", "head_dim", "max_batch", "page_size")],
    *[(plan, {"device": value}, "device is") for value in (*HASHLESS, "gpu", 1.5, ("cpu",))],
    (plan, {"levels": 10**30}, "levels is 1000"),
    *[(flex, {"kernel_options": value}, "kernel_options is a") for value in (1.5, [1], "FAMILY")],
    *[(flex, {"return_aux": value}, "return_aux is") for value in (True, [1])],
    *[(cascade, {"levels": value}, "levels is a") for value in ("x", 3, LENGTHS)],
    (cascade, {"levels": [jitgen.CascadeLevel(ROWS, None, LENGTHS)]}, "page_table is a NoneType"),
    (cascade, {"levels": [jitgen.CascadeLevel([0, 1], jitgen.PageTable.dense(PAGES), LENGTHS)]}, "q_indptr is a list"),
    *[(call, {"base": value}, "base=") for call in (merge, merge_two) for value in HASHLESS],
    (merge_two, {"lse_b": torch.ones(5, 4, dtype=torch.int8)}, "lses has dtype int8"),
    (merge_two, {"out_b": torch.ones(5, 4, 32, dtype=torch.bool)}, "outs has dtype bool"),
    (merge, {"outs": (torch.tensor(1.0), torch.tensor(2.0))}, "outs has states of shapes"),
    (pack, {"q_len": torch.ones(3, dtype=torch.int32)}, "q_len has 3 entries, kv_len 2"),
    (pack, {"q_len": torch.ones(2)}, "q_len has dtype float32"),
    (pack, {"kv_len": LENGTHS[None]}, "kv_len has shape"),
    (pack, {"mask": torch.ones(32)}, "mask has dtype float32"),
    *[(verify, {"advance": value}, "advance is") for value in (None, "x", 1)],
    (verify, {"draft_ids": torch.ones(4, 2, dtype=torch.int32).to_sparse()}, "draft_ids has layout torch.sparse_coo"),
    (sample, {"order": numpy.ones(2)}, "order is"),
]  # fmt: skip


def label(x):
    """Of a case: the same in all processes, as values of tensors and addresses are not."""
    if isinstance(x, dict):
        return ",".join(f"{name}:{type(value).__name__}" for name, value in x.items())
    return getattr(x, "__name__", None) or str(x)[:40]


@pytest.mark.parametrize("call, changes, named", WRONG, ids=label)
def test_wrong_kinds_are_named(call, changes, named, monkeypatch):
    if call is over_blocks_of_hopper:
        monkeypatch.setattr(block_lists, "is_hopper", lambda device: True)
    call()
    with pytest.raises(errors.JitgenError, match="^" + named.replace(" ", r"\s")):
        call(**changes)


def test_a_sink_is_as_long_as_there_are_heads_whatever_was_called_before():
    q, long = torch.ones(1, 4, 6, 16), torch.zeros(8)
    for _ in range(3):
        jitgen.attention(q, KEYS, KEYS, sink=long[:4])
    with pytest.raises(errors.ShapeMismatch, match="sink has 8 logits, q has 4 heads"):
        jitgen.attention(q, KEYS, KEYS, sink=long)
    jitgen.attention(torch.ones(1, 8, 6, 16), KEYS, KEYS, sink=long)
    part = jitgen.attention(q, KEYS, KEYS, sink=lambda b, h: long[h])  # a table of which a part is read
    assert torch.equal(part, jitgen.attention(q, KEYS, KEYS, sink=long[:4]))


WRONG_IN_GRAPHS = [
    *[({name: value}, f"{name} is a list") for name, value in (("k", [1]), ("v", [1]))],
    *[({name: [1]}, name) for name in ("scale", "q_index", "out_dtype", "family")],
    ({"scale": "x"}, "scale is 'x'"),
    ({"scale": True}, "scale is True"),
    ({"sink": torch.zeros(5)}, "sink has 5 logits, q has 4 heads"),
]


@pytest.mark.parametrize("changes, named", WRONG_IN_GRAPHS, ids=label)
def test_compiled_calls_name_them_too(changes, named):
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def call(q, given):
        return jitgen.attention(q, **{"k": KEYS, "v": KEYS, **given})

    with pytest.raises(errors.JitgenError, match="^" + named):
        call(torch.ones(1, 4, 6, 16), changes)


def test_bounds_are_looked_at_in_every_call():
    for _ in range(3):
        append(q_indptr=ROWS)
    with pytest.raises(errors.ShapeMismatch, match=r"q_indptr is \[0, 3, 2\], expected numbers that never fall"):
        append(q_indptr=torch.tensor([0, 3, 2]))


def test_lists_may_stand_for_pairs():
    q = torch.randn(1, 4, 6, 16)
    want = over_blocks(q=q)
    assert torch.equal(over_blocks(q=q, made=lambda: bsr(lengths=[6, 32], block=[3, numpy.int64(16)])), want)


def test_a_level_may_have_a_table_in_any_form():
    whole = torch.tensor([0, 4]), PAGES[:1], torch.tensor([4])
    q, made = torch.randn(4, 4, 32), plan(num_q_heads=4, levels=2)
    results = []
    for level in ((ROWS, PAGES, LENGTHS), jitgen.CascadeLevel(ROWS, PAGES, LENGTHS)):
        levels = jitgen.Cascade([whole, level])
        results.append(jitgen.paged_attention(q, torch.ones_like(CACHE), levels, made.update(levels)))
    assert torch.equal(*results)


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
