"""Chosen blocks of keys on CUDA against the oracle in float64: lists by request, KV head and query tile, hooks, families."""

from __future__ import annotations

import pytest
import torch
from selection_batch import ChosenBatch
from serving_batch import poisoned

import jitgen

DEVICE = "cuda"
LENGTHS = {
    "decode": [(1, 900), (1, 16), (1, 333), (1, 5), (1, 4000), (1, 129)],
    "tiles": [(130, 700), (1, 41), (300, 300), (64, 1000)],
    "rows": [(3, 500), (2, 170)],
}


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def variants():
    slopes, sinks = torch.logspace(-1, -3, 8, base=2, device=DEVICE), torch.linspace(-1, 2, 8, device=DEVICE)
    alibi = lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx)  # noqa: E731
    return {
        "causal": jitgen.Variant(mask_mod=causal),
        "alibi": jitgen.Variant(score_mod=alibi, mask_mod=causal),
        "finished": jitgen.Variant(
            score_mod=alibi, mask_mod=causal, sink=sinks, output_transform=lambda o, lse, b, h, q_idx: o * (b + 1),
            lse_transform=lambda lse, b, h, q_idx: lse * 2 + q_idx,
        ),
    }  # fmt: skip


def chosen(lengths, **options):
    fixed = {"tile": 1 if lengths == "rows" else 64, "blocks": 9, "block_size": 16, "page_size": 16, "num_q_heads": 8,
             "head_dim": 64, "dtype": torch.bfloat16, "device": DEVICE}  # fmt: skip
    return ChosenBatch(LENGTHS[lengths], **(fixed | options))


def check(batch, variant=None, behind=float("nan"), **options):
    caches, table = batch.caches(behind)
    selection = batch.select(table)
    plan = batch.plan(variant, room=2, **options).update(selection, check=True)
    out, lse = poisoned(plan, batch.whole.q)
    jitgen.paged_attention(batch.whole.q, caches, selection, plan, out=out, lse=lse)
    want, want_lse = batch.expected(variant)
    assert not out.isnan().any()
    assert ((out.double() - want).norm() / want.norm()).item() <= 0.5 * torch.finfo(batch.dtype).eps
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", ["causal", "alibi", "finished"])
@pytest.mark.parametrize("form", ["heads", "shared", "uneven"])
def test_rows_see_their_blocks_at_their_positions(lengths, name, form):
    batch = chosen(lengths, shared=form == "shared", newest=form != "uneven")
    check(batch, variants()[name], behind=1e3 if form == "uneven" else torch.nan)


@pytest.mark.parametrize("lengths", ["decode", "tiles"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_family_walks_the_lists_of_each_head(lengths, head_dim, family):
    check(chosen(lengths, head_dim=head_dim), variants()["alibi"], family=family)


@pytest.mark.parametrize("newest", [True, False])
@pytest.mark.parametrize("heads", [(8, 2), (32, 8), (4, 4)])
def test_decode_needs_no_mask(newest, heads):
    batch = chosen("decode", newest=newest, num_q_heads=heads[0], num_kv_heads=heads[1], head_dim=128)
    check(batch, None, torch.nan if newest else 1e3, max_q_len=1)


@pytest.mark.parametrize("block_size, page_size", [(64, 16), (32, 32), (8, 8), (16, 1)])
@pytest.mark.parametrize("lengths", ["decode", "tiles"])
def test_a_block_is_one_or_more_pages(block_size, page_size, lengths):
    check(chosen(lengths, block_size=block_size, page_size=page_size, blocks=4), variants()["causal"])


def test_8_bit_keys():
    batch = chosen("decode", head_dim=128)
    for t in (*batch.whole.k, *batch.whole.v):
        t.copy_(t.to(torch.float8_e4m3fn))
    caches, table = batch.caches(0.0)
    selection = batch.select(table)
    plan = batch.plan(kv_dtype=torch.float8_e4m3fn, max_q_len=1).update(selection)
    out = jitgen.paged_attention(batch.whole.q, tuple(t.to(torch.float8_e4m3fn) for t in caches), selection, plan)
    want = batch.expected()[0]
    assert ((out.double() - want).norm() / want.norm()).item() <= 0.5 * torch.finfo(batch.dtype).eps


def test_keys_are_turned_to_the_positions_they_have():
    batch, rope = chosen("decode", head_dim=128), jitgen.Rope(theta=1e4)
    caches, table = batch.caches()
    selection = batch.select(table)
    variant = jitgen.Variant(
        q_transform=lambda q, b, h, pos: rope(q, pos), k_transform=lambda k, b, kv_h, pos: rope(k, pos)
    )
    plan = batch.plan(variant, max_q_len=1).update(selection)
    out = jitgen.paged_attention(batch.whole.q, caches, selection, plan)
    w = batch.whole
    w.k = [jitgen.rope(k, None, torch.arange(k.shape[0], device=DEVICE))[0] for k in w.k]
    last = torch.tensor([n - 1 for _, n in batch.lengths], device=DEVICE)
    w.q = jitgen.rope(w.q, None, last)[0]
    want = batch.expected()[0]
    assert ((out.double() - want).norm() / want.norm()).item() <= 3 * torch.finfo(batch.dtype).eps


def test_a_graph_chooses_again_and_plans_again():
    batch = chosen("decode", head_dim=128, newest=False)
    caches, table = batch.caches(1e3)
    selection = batch.select(table)
    plan = batch.plan(variants()["alibi"], max_q_len=1).update(selection)
    q = batch.whole.q
    chosen_now = batch.chosen
    jitgen.paged_attention(q, caches, selection, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.update(selection.choose(chosen_now))
        out = jitgen.paged_attention(q, caches, selection, plan)
    for _ in range(3):
        batch.chosen = batch.draw()
        chosen_now.copy_(batch.chosen)
        out.fill_(torch.nan)
        graph.replay()
        want = batch.expected(variants()["alibi"])[0]
        assert ((out.double() - want).norm() / want.norm()).item() <= 0.5 * torch.finfo(batch.dtype).eps


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs sm_90")
@pytest.mark.parametrize("block_size", [16, 1])
def test_latent_attention_over_chosen_keys(block_size):
    """The sparse attention of DeepSeek: every row chooses its own keys."""
    g = torch.Generator().manual_seed(0)
    cache = torch.randn(70, block_size, 576, generator=g).to(DEVICE, torch.bfloat16)
    q = torch.randn(5, 16, 576, generator=g).to(DEVICE, torch.bfloat16)
    lengths = torch.tensor([40 * block_size, 30 * block_size], dtype=torch.int32, device=DEVICE)
    table = torch.randperm(70, generator=g).int().to(DEVICE)
    q_indptr = torch.tensor([0, 3, 5], dtype=torch.int32, device=DEVICE)
    rows = torch.arange(6, dtype=torch.int32, device=DEVICE)
    blocks = torch.stack([torch.randperm(30, generator=g)[:20] for _ in range(5)])[:, None].int().to(DEVICE)
    pages = (torch.tensor([0, 40, 70], dtype=torch.int32, device=DEVICE), table)
    selection = jitgen.Selection(q_indptr, pages, lengths, blocks, block_size, list_indptr=rows)
    plan = jitgen.Plan(5, 5, 16, 1, 576, head_dim_v=512, page_size=block_size, selection="even", device=DEVICE)
    plan.update(selection, check=True)
    out = jitgen.paged_attention(q, cache, selection, plan, scale=0.1)
    for i in range(5):
        own = table[(0 if i < 3 else 40) + blocks[i, 0].long()]
        keys = cache[own.long()].flatten(0, 1).double()
        want = (0.1 * q[i].double() @ keys.T).softmax(-1) @ keys[:, :512]
        assert ((out[i].double() - want).norm() / want.norm()).item() <= 4 * torch.finfo(torch.bfloat16).eps
