"""Hooks that read where keys lie in a paged cache on a GPU, against the oracle: decode, prefill, MLA, chosen keys."""

from __future__ import annotations

import pytest
import torch
from cascade_batch import SharedBatch
from gallery import PAGED_CASES, Cache
from mla_cases import SCALE
from selection_batch import ChosenBatch
from serving_batch import Batch, poisoned
from stored_batch import stored

import jitgen
from jitgen import reference

DEVICE = "cuda"
DECODE = [(1, 1), (1, 15), (1, 16), (1, 17), (1, 129), (1, 2049), (0, 40), (1, 700), (2, 300)]
MIXED = [(1, 700), (50, 50), (0, 9), (1, 2000), (3, 300), (130, 391), (2, 64), (257, 513)]
ERRORS = {torch.bfloat16: 6e-3, torch.float16: 1.5e-3}  # of a row, relative


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def assert_right(dtype, got, want):
    out, lse = got
    assert not out.isnan().any()
    off = (out.double() - want[0]).norm(dim=-1) / want[0].norm(dim=-1).clamp(min=1e-3)
    assert off.max().item() <= ERRORS[dtype], f"row {int(off.flatten().argmax())}: {off.max().item():.3g}"
    if lse is not None:
        assert torch.equal(lse.isfinite(), want[1].isfinite())
        finite = want[1].isfinite()
        assert (lse.double() - want[1])[finite].abs().max().item() <= 2e-3


def expected(batch, variant, lists, page_size):
    """The oracle's results on the rows that the kernels see, transformed and rounded."""
    program, values = variant.resolve()
    if program.rows is None:
        return batch.expected(variant, lists=lists, page_size=page_size)
    for b, pages in enumerate(lists):
        key = torch.arange(batch.lengths[b][1], device=DEVICE)
        page = batch.ints(pages or [0])[key // page_size].long()[None, None, None]
        places = {"page": page, "kv_slot": page * page_size + key % page_size}
        for rows, p in ((batch.k, program.rows.k), (batch.v, program.rows.v)):
            x = rows[b].transpose(0, 1)[None]
            rows[b] = reference.transform_rows(p, values, x, places=places)[0].transpose(0, 1).to(batch.dtype)
    bare = jitgen.Variant(score_mod=variant.score_mod, mask_mod=variant.mask_mod)
    return batch.expected(bare, lists=lists, page_size=page_size)


def check(name, lengths, page_size, *, dtype=torch.bfloat16, table="csr", heads=(8, 2), head_dim=128, **options):
    batch = Batch(lengths, *heads, head_dim, dtype=dtype, device=DEVICE, seed=page_size)
    k, v, lists = batch.pages(page_size)
    lists[1][0] = lists[0][0]  # a page that two requests share
    n = min(page_size, lengths[0][1], lengths[1][1])
    for keys in (batch.k, batch.v):
        keys[1][:n] = keys[0][:n]
    for cache, keys in ((k, batch.k), (v, batch.v)):
        cache[lists[1][0], :n] = keys[0][:n]
        longer = min(page_size, lengths[1][1])
        cache[lists[1][0], n:longer] = keys[1][n:longer]
    variant = PAGED_CASES[name].make(Cache(k.shape[0], page_size, heads[1], DEVICE))
    program = variant.trace().program
    norm = program.norm
    if options.pop("is_known", False):
        options["page_size"] = page_size
    plan = batch.plan(variant, **options)
    out, lse = poisoned(plan, batch.q)
    lse = lse if norm is None or norm.lse is not None else None
    pages = batch.csr(lists) if table == "csr" else batch.block_table(lists)
    jitgen.paged_attention(batch.q, (k, v), pages, plan, out=out, lse=lse)
    assert_right(dtype, (out, lse), expected(batch, variant, lists, page_size))


@pytest.mark.parametrize("name", PAGED_CASES)
def test_decode(name):
    for page_size in (1, 16, 17):
        check(name, DECODE, page_size, max_q_len=2, table="csr" if page_size == 16 else "dense")


@pytest.mark.parametrize("name", PAGED_CASES)
def test_prefill(name, family):
    for page_size in (16, 24) if family == "sm90" else (1, 17):
        check(name, MIXED, page_size, family=family, is_known=True, max_kv_tokens=8000)


def test_prefill_beside_decode():
    for split in ({}, {"split": "fixed", "kv_split": 512}):
        check("slot_bias", MIXED, 16, is_known=True, **split)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_other_widths(head_dim):
    check("slot_offsets", DECODE, 16, head_dim=head_dim, dtype=torch.float16, max_q_len=2)
    check("evicted_slots", MIXED, 16, head_dim=head_dim, dtype=torch.float16, is_known=True)


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("lengths", [DECODE, MIXED], ids=["decode", "mixed"])
def test_cache_of_8_bits_with_scales_in_hooks_alone(kv_dtype, lengths):
    page_size, batch = 16, Batch(lengths, 8, 2, 128, dtype=torch.bfloat16, device=DEVICE)
    batch.k, batch.v = ([stored(20 * t.float(), kv_dtype).float() for t in ts] for ts in (batch.k, batch.v))
    slots = batch.pages(page_size)[0].shape[0]
    caches, lists = [], batch.pages(page_size)[2]
    for rows in (batch.k, batch.v):
        cache = torch.full((slots * page_size, 2, 128), 100.0, device=DEVICE)
        for pages, keys in zip(lists, rows, strict=True):
            at = torch.arange(keys.shape[0], device=DEVICE)
            cache[batch.ints(pages or [0])[at // page_size] * page_size + at % page_size] = keys
        caches.append(cache.view(slots, page_size, 2, 128).to(kv_dtype))
    variant = PAGED_CASES["slot_scales"].make(Cache(slots, page_size, 2, DEVICE))
    room = {"max_q_len": 2} if lengths is DECODE else {"max_kv_tokens": 8000}  # decode reads the cache as it is
    plan = batch.plan(variant, kv_dtype=kv_dtype, page_size=page_size, **room)
    got = jitgen.paged_attention(batch.q, tuple(caches), batch.csr(lists), plan, return_lse=True)
    assert_right(torch.bfloat16, got, expected(batch, variant, lists, page_size))


def test_levels_of_a_cascade():
    batch = SharedBatch(
        [2, 1, 70, 1], [[(4, 300)], [(1, 200), (1, 9), (1, 130), (1, 50)]], page_size=16, num_q_heads=8, head_dim=128,
        dtype=torch.bfloat16, device=DEVICE,
    )  # fmt: skip
    caches, cascade = batch.build()
    weight = torch.rand(caches[0].shape[0] * 16, device=DEVICE) + 0.5
    variant = jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx, *, kv_slot: s * weight[kv_slot], mask_mod=lambda b, h, q, k: k <= q
    )
    lists = [[] for _ in batch.q_lens]
    for groups, level in zip(batch.levels, cascade.levels, strict=True):
        starts, pages, first = level.page_table.starts(len(groups)).tolist(), level.page_table.pages.tolist(), 0
        for (requests, keys), start in zip(groups, starts, strict=True):
            for b in range(first, first + requests):
                lists[b] += [pages[start + i // 16] * 16 + i % 16 for i in range(keys)]
            first += requests
    want = batch.whole.expected(variant, lists=lists)
    plan = batch.plan(variant, page_size=16).update(cascade)
    assert_right(torch.bfloat16, jitgen.paged_attention(batch.whole.q, caches, cascade, plan, return_lse=True), want)


@pytest.mark.parametrize("newest", [True, False], ids=["even", "uneven"])
def test_chosen_blocks(newest):
    batch = ChosenBatch(
        [(1, 700), (1, 40), (2, 90)], tile=1, block_size=16, page_size=16, newest=newest, num_q_heads=8, head_dim=128,
        dtype=torch.bfloat16, device=DEVICE,
    )  # fmt: skip
    caches, table = batch.caches(0.0)
    scale = torch.rand(caches[0].shape[0] * 16, 2, device=DEVICE) + 0.5
    chosen = batch.select(table)
    variant = jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx, *, kv_slot, kv_h: s * scale[kv_slot, kv_h])
    plan = batch.plan(variant, max_q_len=1).update(chosen)
    got = jitgen.paged_attention(batch.whole.q, caches, chosen, plan, return_lse=True)
    lists = batch.whole.pages(16)[2]
    width = max(map(len, lists))
    slots = batch.whole.ints([[p * 16 + i for p in pages + [0] * (width - len(pages)) for i in range(16)] for pages in lists])
    want = batch.expected(
        jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx, *, kv_h: s * scale[slots[b, kv_idx], kv_h])
    )
    assert_right(torch.bfloat16, got, want)


@pytest.mark.parametrize("mla_family", ["mla", "mla_decode", "sm80_mla"])
def test_latent_attention(mla_family):
    if mla_family != "sm80_mla" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"family {mla_family} needs compute capability 9.0")
    for page_size in (1, 64, 24):
        rows, keys = [1, 2, 1, 3], [5, 700, 64, 2333]
        counts = [-(-n // page_size) for n in keys]
        total = sum(counts) + 2
        cache = torch.randn(total, page_size, 576, device=DEVICE).bfloat16()
        order, q = torch.randperm(total).tolist(), torch.randn(sum(rows), 16, 576, device=DEVICE).bfloat16()
        lists = [order[sum(counts[:b]) : sum(counts[: b + 1])] for b in range(4)]
        table = torch.tensor([x + [-1] * (max(counts) - len(x)) for x in lists], dtype=torch.int32, device=DEVICE)
        scale, kept = torch.rand(total * page_size, device=DEVICE) + 0.5, torch.rand(total, device=DEVICE) < 0.9
        variant = jitgen.Variant(
            score_mod=lambda s, b, h, q_idx, kv_idx, *, kv_slot: s * scale[kv_slot],  # noqa: B023
            mask_mod=lambda b, h, q_idx, kv_idx, *, page: (kv_idx <= q_idx) & (kept[page] | (kv_idx < 3)),  # noqa: B023
        )
        plan = jitgen.Plan(
            4, sum(rows), 16, 1, 576, head_dim_v=512, device=DEVICE, page_size=page_size, family=mla_family, variant=variant
        )
        starts = torch.tensor([0, *rows], device=DEVICE).cumsum(0).int()
        plan.update(starts, torch.tensor(keys, device=DEVICE).int())
        got = jitgen.paged_attention(q, cache, table, plan, scale=SCALE, return_lse=True)
        want = []
        for b, (n, pages) in enumerate(zip(keys, lists, strict=True)):
            k = cache[pages].flatten(0, 1)[None, None, :n]
            own = q[starts[b] : starts[b + 1]].transpose(0, 1)[None]
            places = torch.tensor([pages], device=DEVICE)
            found = reference.attention(
                own, k, k[..., :512], variant, scale=SCALE, return_lse=True, page_table=places, page_size=page_size
            )
            want.append([found[0][0].transpose(0, 1), found[1][0].T])
        assert_right(torch.bfloat16, got, [torch.cat(parts) for parts in zip(*want, strict=True)])
