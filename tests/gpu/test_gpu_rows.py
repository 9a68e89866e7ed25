"""Variants that transform rows of q, k and v on a GPU, against the oracle on rows transformed in float64 and rounded once."""

from __future__ import annotations

import pytest
import torch
from cascade_batch import SharedBatch
from row_cases import NAMES, causal, rows_variant
from serving_batch import Batch, poisoned
from stored_batch import STORED, StoredBatch

import jitgen
from jitgen import reference
from jitgen.errors import PlanMismatch, VariantError

DEVICE = "cuda"
ERRORS = {torch.bfloat16: 6e-3, torch.float16: 1.5e-3}  # of a row, relative
DECODE = [(1, n) for n in (1, 15, 16, 17, 0, 129, 1000, 33, 4097, 64)]
MIXED = [(1, 300), (300, 300), (1, 0), (70, 1025), (2, 17), (129, 400), (0, 5)]


def transformed(batch, variant):
    """The batch with the rows that the kernels must see, and the variant without its transforms."""
    program, values = variant.resolve()
    rows, at = program.rows, 0

    def one(p, x, b, first=0):
        copies = x.transpose(0, 1).expand(b + 1, -1, -1, -1)
        return reference.transform_rows(p, values, copies, first=first)[-1].transpose(0, 1).to(batch.dtype)

    q = batch.q.clone()
    for b, (n, keys) in enumerate(batch.lengths):
        q[at : at + n] = one(rows.q, batch.q[at : at + n], b, keys - n)
        at += n
        batch.k[b], batch.v[b] = one(rows.k, batch.k[b], b), one(rows.v, batch.v[b], b)
    batch.q = q
    return batch


def check(batch, got, want, factor=1.0):
    out, lse = got
    assert not out.isnan().any() and not lse.isnan().any()
    off = (out.double() - want[0]).norm(dim=-1) / want[0].norm(dim=-1).clamp(min=1e-3)
    assert off.max().item() <= factor * ERRORS[batch.dtype]
    assert torch.equal(lse.isfinite(), want[1].isfinite())
    finite = want[1].isfinite()
    allowed = factor * 2e-3 * (want[1].abs() / 4).clamp(min=1)  # elements near the middle of two may be rounded either way
    assert ((lse.double() - want[1]).abs() <= allowed)[finite].all()


def attend(name, lengths, heads=(8, 2), head_dim=128, page_size=16, dtype=torch.bfloat16, hnd=False, **options):
    variant = rows_variant(name, head_dim, head_dim, DEVICE)
    batch = Batch(lengths, *heads, head_dim, dtype=dtype, device=DEVICE)
    layout = "paged" if page_size else "ragged"
    plan = batch.plan(variant, room=2, layout=layout, **options)
    out, lse = poisoned(plan, batch.q)
    if page_size:
        k, v, lists = batch.pages(page_size)
        if hnd:
            k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        order = "HND" if hnd else "NHD"
        got = jitgen.paged_attention(
            batch.q, (k, v), batch.csr(lists), plan, out=out, lse=lse, return_lse=True, kv_layout=order
        )
    else:
        got = jitgen.ragged_attention(batch.q, *batch.ragged(), plan, out=out, lse=lse, return_lse=True)
    want = transformed(batch, variant).expected(jitgen.Variant(mask_mod=causal))
    check(batch, got, want, 1.5 if name == "all" else 1.0)


@pytest.mark.parametrize("page_size", [0, 1, 16, 24])
@pytest.mark.parametrize("name", NAMES)
def test_decode(name, page_size):
    attend(name, DECODE, page_size=page_size, max_q_len=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 192, 256, 512])
@pytest.mark.parametrize("name", ["rope", "all"])
def test_decode_of_every_width(name, head_dim, dtype):
    attend(name, DECODE, head_dim=head_dim, dtype=dtype, max_q_len=1)


@pytest.mark.parametrize("name", ["rope", "all"])
def test_decode_of_many_heads_and_drafts(name):
    attend(name, [(4, 100), (3, 3), (1, 700), (4, 2049)], heads=(32, 4), max_q_len=4)


@pytest.mark.parametrize("page_size", [0, 16, 5])
@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_decode_mixed(name, page_size):
    attend(name, MIXED, page_size=page_size, max_kv_tokens=4096)


@pytest.mark.parametrize("hnd", [False, True], ids=["NHD", "HND"])
@pytest.mark.parametrize("head_dim", [64, 256, 512])
def test_prefill_of_other_widths_and_orders(head_dim, hnd):
    attend("rope", MIXED, head_dim=head_dim, max_kv_tokens=4096, hnd=hnd)


def test_one_family(family):
    attend("rope", MIXED, max_kv_tokens=4096, family=family)


def test_a_rotation_that_decode_cannot_do_is_staged():
    rope = jitgen.Rope(rotary_dim=8)
    variant = jitgen.Variant(
        mask_mod=causal, q_transform=lambda q, b, h, pos: rope(q, pos), k_transform=lambda k, b, h, pos: rope(k, pos)
    )
    batch = Batch(DECODE, 8, 2, 128, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(VariantError, match="max_kv_tokens"):
        batch.plan(variant, max_q_len=1)
    plan = batch.plan(variant, max_q_len=1, max_kv_tokens=8192)
    k, v, lists = batch.pages(16)
    got = jitgen.paged_attention(batch.q, (k, v), batch.csr(lists), plan, return_lse=True)
    check(batch, got, transformed(batch, variant).expected(jitgen.Variant(mask_mod=causal)))


def test_prefill_needs_room():
    batch = Batch([(1, 300), (900, 1025)], 8, 2, 128, dtype=torch.bfloat16, device=DEVICE)
    variant = rows_variant("rope", 128, 128, DEVICE)
    with pytest.raises(VariantError, match="max_kv_tokens"):
        batch.plan(variant)
    plan = batch.plan(variant, max_kv_tokens=1000)
    with pytest.raises(PlanMismatch, match="max_kv_tokens=1000"):
        plan.update(batch.q_indptr(), batch.kv_len(), check=True)


@pytest.mark.parametrize("name", NAMES)
def test_dense(name, family):
    variant = rows_variant(name, 128, 128, DEVICE)
    batch = Batch([(77, 300), (77, 300)], 8, 2, 128, dtype=torch.bfloat16, device=DEVICE)
    q = batch.q.view(2, 77, 8, 128).transpose(1, 2)
    k, v = (torch.stack(t).transpose(1, 2) for t in (batch.k, batch.v))
    out, lse = jitgen.attention(q, k, v, variant, return_lse=True, family=family)
    got = out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
    check(batch, got, transformed(batch, variant).expected(jitgen.Variant(mask_mod=causal)), 1.5 if name == "all" else 1.0)


@pytest.mark.parametrize("q_lens", [[1, 1, 1, 1], [1, 3, 40, 5]], ids=str)
@pytest.mark.parametrize("name", ["rope", "v only"])
def test_cascade(name, q_lens):
    variant = rows_variant(name, 128, 128, DEVICE)
    levels = [[(4, 512)], [(2, 90), (2, 0)], [(1, 50), (1, 110), (1, 60), (1, 50)]]
    shared = SharedBatch(q_lens, levels, 16, 8, 2, 128, dtype=torch.bfloat16, device=DEVICE)
    caches, cascade = shared.build()
    plan = shared.plan(variant, max_kv_tokens=2048).update(cascade)
    got = jitgen.paged_attention(shared.whole.q, caches, cascade, plan, return_lse=True)
    check(shared.whole, got, transformed(shared.whole, variant).expected(jitgen.Variant(mask_mod=causal)))


def test_requests_cut_at_fixed_keys():
    attend("rope", DECODE, max_q_len=1, split="fixed", kv_split=256, max_kv_len=5000)
    attend("rope", MIXED, split="fixed", kv_split=256, max_kv_len=2048, max_kv_tokens=4096)


def test_a_graph_replays_for_other_lengths():
    variant = rows_variant("rope", 128, 128, DEVICE)
    batch = Batch(MIXED, 8, 2, 128, dtype=torch.bfloat16, device=DEVICE)
    k, v, lists = batch.pages(16)
    table = jitgen.PageTable.of(batch.block_table(lists))
    plan = jitgen.Plan(7, batch.total_q, 8, 2, 128, variant=variant, max_kv_tokens=4096, device=DEVICE)
    q_indptr, kv_len = batch.q_indptr(), batch.kv_len()

    def step():
        plan.update(q_indptr, kv_len)
        return jitgen.paged_attention(batch.q, (k, v), table, plan, return_lse=True)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    shorter = [(q, max(q, n - 13 * i) if n else 0) for i, (q, n) in enumerate(MIXED)]
    kv_len.copy_(batch.ints([n for _, n in shorter]))
    for t in results:
        t.fill_(torch.nan)
    graph.replay()
    batch.lengths = shorter
    batch.k, batch.v = ([t[:n] for t, (_, n) in zip(rows, shorter, strict=True)] for rows in (batch.k, batch.v))
    check(batch, results, transformed(batch, variant).expected(jitgen.Variant(mask_mod=causal)))


def test_a_dense_call_is_captured_in_a_graph():
    variant = rows_variant("all", 128, 128, DEVICE)
    q, k, v = (torch.randn(2, heads, 150, 128, device=DEVICE).bfloat16() for heads in (8, 2, 2))
    jitgen.attention(q, k, v, variant)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = jitgen.attention(q, k, v, variant)
    for t in (q, k, v):
        t.copy_(torch.randn_like(t))
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, jitgen.attention(q, k, v, variant))


# ---- 8-bit keys and values ---------------------------------------------------------------------------------------------


def attend_stored(kv_dtype, kind, variant=None, page_size=16, layout="paged", **options):
    batch = StoredBatch(MIXED, 8, 2, 128, dtype=torch.bfloat16, device=DEVICE, kv_dtype=kv_dtype, kinds=(kind, kind))
    used = variant or jitgen.Variant(mask_mod=causal)
    plan = batch.plan(used, layout=layout, kv_dtype=kv_dtype, max_kv_tokens=4096, **options)
    assert len(plan.classes) == 2
    got = batch.attend(plan, page_size)
    if variant is not None:
        batch = transformed(batch, variant)
    batch.k, batch.v = ([t.to(batch.dtype) for t in rows] for rows in (batch.k, batch.v))
    check(batch, got, batch.expected(jitgen.Variant(mask_mod=causal)), 2.0)


@pytest.mark.parametrize("kv_dtype", STORED, ids=str)
@pytest.mark.parametrize("kind", ["none", "number", "head", "slot"])
def test_prefill_over_8_bits(kv_dtype, kind):
    attend_stored(kv_dtype, kind)


@pytest.mark.parametrize("page_size", [1, 24])
def test_prefill_over_8_bits_in_pages_of_any_size(page_size):
    attend_stored(torch.float8_e4m3fn, "slot", page_size=page_size)


def test_prefill_over_ragged_8_bits():
    attend_stored(torch.int8, "slot", layout="ragged")


@pytest.mark.parametrize("name", ["rope", "all"])
def test_8_bits_are_transformed(name):
    attend_stored(torch.float8_e4m3fn, "head", rows_variant(name, 128, 128, DEVICE))
