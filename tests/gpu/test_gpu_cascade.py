"""Cascades and fixed cuts on CUDA against the oracle in float64: structures of levels, hooks, families, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from cascade_batch import SharedBatch
from serving_batch import Batch, poisoned

import jitgen

DEVICE = "cuda"
STRUCTURES = {
    "decode": ([1] * 19, [[(19, 1000)], [(1, 16 * (b % 5) + b + 1) for b in range(19)]]),
    "groups": ([3, 1, 5, 2, 1], [[(2, 330), (3, 213)], [(1, 9), (1, 2), (1, 6), (1, 130), (1, 1)]]),
    "three": ([3, 1, 5, 2, 2], [[(5, 370)], [(2, 110), (3, 5)], [(1, 9), (1, 1), (1, 300), (1, 4), (1, 7)]]),
    "some share": ([1, 2, 1, 1, 1], [[(1, 0), (3, 160), (1, 0)], [(1, 9), (1, 4), (1, 4), (1, 4), (1, 3000)]]),
    "no suffix": ([1, 1, 1, 1, 1], [[(5, 400)], [(1, 0), (1, 3), (1, 0), (1, 0), (1, 5)]]),
    "prefill": ([150, 3, 270, 1], [[(4, 640)], [(1, 150), (1, 3), (1, 275), (1, 1)]]),
}


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def variants():
    slopes = torch.logspace(-1, -3, 8, base=2, device=DEVICE)
    sinks = torch.linspace(-1, 2, 8, device=DEVICE)
    seen = torch.tensor([3, 40, 0, 17, 25, 5, 9], dtype=torch.int32, device=DEVICE)
    return {
        "plain": None,
        "causal": jitgen.Variant(mask_mod=causal),
        "window": jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < 130)),
        "alibi": jitgen.Variant(
            score_mod=lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx), mask_mod=causal
        ),
        "request": jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: kv_idx >= seen[b % 7]),
        "finished": jitgen.Variant(
            mask_mod=causal, sink=sinks, output_transform=lambda o, lse, b, h, q_idx: o * (b + 1),
            lse_transform=lambda lse, b, h, q_idx: lse * 2 + q_idx,
        ),
    }  # fmt: skip


def shared_batch(structure, heads=(8, 2), head_dim=64, dtype=torch.bfloat16, page_size=16):
    return SharedBatch(*STRUCTURES[structure], page_size, *heads, head_dim, dtype=dtype, device=DEVICE)


def assert_near(batch, out, lse, want):
    exact, exact_lse = want
    assert not out.isnan().any()
    allowed = 0.5 * torch.finfo(batch.dtype).eps
    assert ((out.double() - exact).norm() / exact.norm()).item() <= allowed
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=2e-4)


def check(shared, variant, **options):
    caches, cascade = shared.build()
    plan = shared.plan(variant, room=2, **options).update(cascade, check=True)
    out, lse = poisoned(plan, shared.whole.q)
    jitgen.paged_attention(shared.whole.q, caches, cascade, plan, out=out, lse=lse)
    assert_near(shared.whole, out, lse, shared.whole.expected(variant))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["plain", "causal", "window", "alibi", "request", "finished"])
def test_each_request_gets_what_it_gets_alone(structure, name):
    check(shared_batch(structure), variants()[name], page_size=16, max_kv_len=4096)


@pytest.mark.parametrize("structure", ["decode", "three", "prefill"])
@pytest.mark.parametrize("name", ["plain", "alibi"])
def test_every_family_leaves_the_same_states(structure, name, family):
    check(shared_batch(structure), variants()[name], page_size=16, max_kv_len=4096, family=family)


@pytest.mark.parametrize("heads, head_dim", [((32, 8), 128), ((6, 2), 96), ((8, 8), 256), ((8, 2), 192)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_heads_and_dtypes(heads, head_dim, dtype):
    for structure in ("decode", "prefill"):
        check(shared_batch(structure, heads, head_dim, dtype), None, page_size=16)


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_pages_of_any_size(page_size):
    check(shared_batch("three", page_size=page_size), jitgen.Variant(mask_mod=causal))


def test_a_graph_replays_for_lengths_that_change():
    first, second = (
        SharedBatch(*STRUCTURES["groups"], 16, 8, 2, 64, dtype=torch.bfloat16, device=DEVICE, seed=seed) for seed in (0, 7)
    )
    caches, cascade = first.build()
    plan = first.plan(causal, page_size=16).update(cascade)
    q = first.whole.q.clone()
    jitgen.paged_attention(q, caches, cascade, plan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        plan.update(cascade)
        jitgen.paged_attention(q, caches, cascade, plan)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.update(cascade)
        out, lse = jitgen.paged_attention(q, caches, cascade, plan, return_lse=True)
    other_caches, other = second.build()
    q.copy_(second.whole.q)
    for cache, new in zip(caches, other_caches, strict=True):
        cache.copy_(new)
    for level, new in zip(cascade.levels, other.levels, strict=True):
        level.page_table.pages.copy_(new.page_table.pages)
        level.page_table.indptr.copy_(new.page_table.indptr)
        level.kv_len.copy_(new.kv_len)
    graph.replay()
    assert_near(second.whole, out, lse, second.whole.expected(causal))


# ---- fixed cuts -----------------------------------------------------------------------------------------------------------

LENGTHS = [(1, 700), (1, 64), (1, 0), (2, 129), (0, 30), (1, 4000), (40, 300), (1, 65), (3, 1)]


@pytest.mark.parametrize("layout", ["paged", "ragged", "dense table"])
@pytest.mark.parametrize("name", ["plain", "window", "alibi", "finished"])
def test_requests_cut_at_fixed_keys_are_the_oracles(layout, name):
    lengths = [(rows, max(rows, keys)) for rows, keys in LENGTHS]
    batch, variant = Batch(lengths, 8, 2, 64, dtype=torch.bfloat16, device=DEVICE), variants()[name]
    out, lse, plan = fixed(batch, variant, layout)
    assert plan.segments is not None and plan.segments.levels == 63
    assert_near(batch, out, lse, batch.expected(variant))


def fixed(batch, variant, layout, room=20):
    options = {"split": "fixed", "kv_split": 64, "max_kv_len": 4000}
    plan = batch.plan(variant, room=room, layout="ragged" if layout == "ragged" else "paged", **options)
    out, lse = poisoned(plan, batch.q)
    if layout == "ragged":
        jitgen.ragged_attention(batch.q, *batch.ragged(), plan, out=out, lse=lse)
    else:
        k, v, lists = batch.pages(16)
        table = batch.csr(lists) if layout == "paged" else batch.block_table(lists)
        jitgen.paged_attention(batch.q, (k, v), table, plan, out=out, lse=lse)
    return out, lse, plan


@pytest.mark.parametrize("layout", ["paged", "ragged"])
@pytest.mark.parametrize("rows, keys", [(1, 3000), (1, 63), (2, 1025), (70, 900)])
def test_neighbours_do_not_change_a_bit(layout, rows, keys):
    mine = Batch([(rows, keys)], 8, 2, 64, dtype=torch.bfloat16, device=DEVICE, seed=3)
    alone, alone_lse, _ = fixed(mine, causal, layout)
    for seed, others in ((1, [(1, 4000)] * 40), (2, [(1, 5), (33, 40), (1, 2000)]), (3, [(1, 100)] * 5)):
        crowd = Batch([*others, (rows, keys), *others], 8, 2, 64, dtype=torch.bfloat16, device=DEVICE, seed=seed)
        at = len(others)
        first = sum(n for n, _ in others)
        crowd.q[first : first + rows], crowd.k[at], crowd.v[at] = mine.q, mine.k[0], mine.v[0]
        out, lse, _ = fixed(crowd, causal, layout, room=3 * seed)
        assert torch.equal(out[first : first + rows], alone) and torch.equal(lse[first : first + rows], alone_lse)
