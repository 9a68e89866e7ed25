"""The serving calls on CUDA against the oracle in float64: mixed batches, decode, cache forms, hooks, plans, CUDA graphs."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from gallery import CASES, Sizes
from serving_batch import Batch, poisoned

import jitgen
from jitgen.serving_balance import read_plan

DEVICE = "cuda"
DECODE = [(1, 1), (1, 15), (1, 16), (1, 17), (1, 127), (1, 128), (1, 129), (1, 4097), (0, 40), (1, 0), (1, 700)]
MIXED = [(1, 700), (50, 50), (0, 9), (1, 5000), (3, 300), (130, 391), (1, 0), (0, 0), (2, 64), (257, 1024)]
ULPS = {"plain": 0.5, "tanh": 1.0}  # largest relative error in units of the last place; tanh.approx is good to 2**-11


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def make(lengths, heads=8, kv_heads=2, head_dim=64, head_dim_v=0, dtype=torch.bfloat16, seed=0):
    return Batch(lengths, heads, kv_heads, head_dim, head_dim_v, dtype, DEVICE, seed)


def assert_is_the_oracle(batch, got, want, ulps=ULPS["plain"], lse_atol=1e-4):
    (out, lse), (exact, exact_lse) = got, want
    assert not out.isnan().any()
    allowed = ulps * torch.finfo(batch.dtype).eps
    error = ((out.double() - exact).norm() / exact.norm()).item()
    assert error <= allowed, f"relative error {error:.3g}, allowed {allowed:.3g}"
    rows = (out.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1).clamp_min(1e-30)
    assert rows.max() <= 4 * allowed, f"row {int(rows.argmax())}: relative error {rows.max():.3g}"
    if lse is not None:
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=lse_atol)


def attend(batch, plan, page_size=16, *, has_lse=True, table="csr", **options):
    """Output and logsumexp of a call, into buffers full of NaN; page_size 0: ragged keys."""
    out, lse = poisoned(plan, batch.q)
    lse = lse if has_lse else None
    if page_size == 0:
        jitgen.ragged_attention(batch.q, *batch.ragged(), plan, out=out, lse=lse, **options)
    else:
        k, v, lists = batch.pages(page_size)
        pages = batch.csr(lists) if table == "csr" else batch.block_table(lists)
        jitgen.paged_attention(batch.q, (k, v), pages, plan, out=out, lse=lse, **options)
    return out, lse


# ---- lengths, pages, heads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [0, 1, 16, 24, 64])
@pytest.mark.parametrize("lengths", [DECODE, MIXED], ids=["decode", "mixed"])
def test_requests_of_every_length_are_attended(lengths, page_size):
    batch = make(lengths)
    plan = batch.plan(causal, layout="paged" if page_size else "ragged")
    assert_is_the_oracle(batch, attend(batch, plan, page_size), batch.expected(causal))


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(8, 8, 64), (32, 8, 128), (16, 2, 128), (6, 2, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_decode_plan_takes_every_head_layout(heads, kv_heads, head_dim, dtype):
    batch = make(DECODE, heads, kv_heads, head_dim, dtype=dtype)
    plan = batch.plan(max_q_len=1)
    assert [c.name for c in plan.classes] == ["decode"]
    for table in ("csr", "dense"):
        assert_is_the_oracle(batch, attend(batch, plan, table=table), batch.expected())


@pytest.mark.parametrize(
    "split", [{}, {"split": "fixed", "kv_split": 512}, {"split": "none"}], ids=["balanced", "fixed", "none"]
)
@pytest.mark.parametrize("lengths", [[(1, 30000)], [(1, 20000), (1, 3)], [(40, 9000), (1, 5), (1, 12000)]], ids=str)
def test_long_requests_are_cut_and_merged(lengths, split):
    batch = make(lengths)
    plan = batch.plan(causal, **split)
    got = attend(batch, plan)
    assert_is_the_oracle(batch, got, batch.expected(causal))
    again = attend(batch, plan)
    assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])


@pytest.mark.parametrize(
    "lengths", [[(1, 3000), (1, 40), (1, 700)] * 7, [(60, 300), (1, 2000), (5, 64)]], ids=["decode", "mixed"]
)
def test_fixed_splits_do_not_depend_on_the_rest_of_the_batch(lengths):
    batch = make(lengths)
    plan = batch.plan(causal, split="fixed", kv_split=512)
    k, v, lists = batch.pages(16)
    together = jitgen.paged_attention(batch.q, (k, v), batch.csr(lists), plan)
    at = 0
    for b, (rows, keys) in enumerate(lengths):
        plan.update(batch.ints([0, rows]), batch.ints([keys]))
        alone = jitgen.paged_attention(batch.q[at : at + rows], (k, v), batch.csr([lists[b]]), plan)
        assert torch.equal(alone, together[at : at + rows])
        at += rows


def test_cache_is_read_in_every_form():
    batch = make(MIXED)
    plan, want = batch.plan(), batch.expected()
    k, v, lists = batch.pages(16)
    pair = torch.stack([k, v], 1)
    forms = [((k, v), "NHD"), (pair, "NHD"), (pair.transpose(2, 3).contiguous(), "HND"),
             ((k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()), "HND"),
             ((torch.stack([k, k], 1)[:, 1], v), "NHD")]  # fmt: skip
    for cache, kv_layout in forms:
        for table in (batch.csr(lists, torch.int64), batch.block_table(lists)):
            out, lse = poisoned(plan, batch.q)
            jitgen.paged_attention(batch.q, cache, table, plan, kv_layout=kv_layout, out=out, lse=lse)
            assert_is_the_oracle(batch, (out, lse), want)


def test_rows_past_the_last_request_are_left_alone():
    batch = make([(1, 40), (60, 70)])
    plan = batch.plan(room=8)
    k, v, lists = batch.pages(16)
    q = torch.cat([batch.q, torch.full((5, *batch.q.shape[1:]), math.nan, dtype=batch.dtype, device=DEVICE)])
    out, lse = poisoned(plan, q)
    jitgen.paged_attention(q, (k, v), batch.csr(lists), plan, out=out, lse=lse)
    assert_is_the_oracle(batch, (out[:61], lse[:61]), batch.expected())
    assert out[61:].isnan().all() and lse[61:].isnan().all()


# ---- hooks -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2", "alibi", "window_per_head", "tree_verify", "sigmoid", "gated_output"])
def test_variant_means_the_same_as_in_the_oracle(name):
    z = Sizes(101, 301, batch=5, num_q_heads=8, num_kv_heads=2, head_dim=64, device=DEVICE)
    batch = make([(1, 301), (101, 301), (5, 64), (1, 1), (1, 300)])
    variant = CASES[name].make(z)
    program = variant.trace().program
    has_lse = program.norm is None or program.norm.lse is not None
    plan = batch.plan(variant, max_kv_len=301)
    got = attend(batch, plan, has_lse=has_lse)
    tanh = name == "gemma2"
    assert_is_the_oracle(batch, got, batch.expected(variant), ULPS["tanh" if tanh else "plain"], 5e-3 if tanh else 1e-4)


def test_packed_bits_are_read():
    lengths = [(5, 40), (1, 33), (50, 57)]
    batch = make(lengths)
    kept = torch.rand(sum(q * k for q, k in lengths), device=DEVICE) < 0.5
    packed, byte_indptr = jitgen.pack_mask(kept, batch.ints([q for q, _ in lengths]), batch.kv_len())
    mask = jitgen.bit_mask(packed, byte_indptr)
    assert_is_the_oracle(batch, attend(batch, batch.plan(mask)), batch.expected(mask))


# ---- plans -----------------------------------------------------------------------------------------------------------------


def test_planner_covers_every_item_once():
    batch = make([(1, n) for n in (1, 5000, 17, 0, 900, 33, 2048)] + [(200, 300), (65, 4000)])
    plan = batch.plan(causal)
    for c in plan.classes:
        record = read_plan(c.plan.cpu().numpy().tobytes(), c.num_ctas)
        assert record.tiles and (record.shares[0].tile, record.shares[0].group, record.shares[0].unit) == (0, 0, 0)
        lines = [s.line for s in record.shares[: record.used + 1]]
        assert lines == sorted(lines) and lines[-1] == record.length
    assert "CTAs" in plan.explain()


def test_update_waits_for_nothing():
    batch = make(MIXED)
    plan = batch.plan(causal)
    k, v, lists = batch.pages(16)
    table = jitgen.PageTable.csr(*batch.csr(lists))
    torch.cuda.synchronize()
    with SyncErrors():
        plan.update(plan.q_indptr, plan.kv_len)
        jitgen.paged_attention(batch.q, (k, v), table, plan)


class SyncErrors:
    """A wait for the device inside is an error."""

    def __enter__(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the mode announces itself as a prototype
            torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode("default")


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_q_len", [1, None], ids=["decode", "mixed"])
def test_graph_replays_with_changing_lengths_equal_eager_calls(max_q_len):
    generator = torch.Generator().manual_seed(0)
    requests, rows, page, most = 12, 64, 16, 600
    batch = make([(1, most)] * requests)
    k, v, lists = batch.pages(page)
    table = jitgen.PageTable.dense(batch.block_table(lists))

    def new_plan():
        return jitgen.Plan(requests, rows, 8, 2, 64, variant=causal, max_q_len=max_q_len, device=DEVICE)

    captured, eager = new_plan(), new_plan()
    q = torch.randn(rows, 8, 64, device=DEVICE).to(torch.bfloat16)
    q_indptr = torch.arange(requests + 1, dtype=torch.int32, device=DEVICE)
    kv_len = torch.full((requests,), most, dtype=torch.int32, device=DEVICE)
    out, lse = poisoned(captured, q)

    def step(plan, out, lse):
        plan.update(q_indptr, kv_len)
        jitgen.paged_attention(q, (k, v), table, plan, out=out, lse=lse)

    step(captured, out, lse)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, out, lse)
    for _ in range(200):
        q_len = torch.randint(0, 2 if max_q_len else 8, (requests,), generator=generator)
        lengths = torch.maximum(torch.randint(0, most + 1, (requests,), generator=generator), q_len)
        assert int(q_len.sum()) <= rows
        q_indptr[1:] = q_len.cumsum(0).to(torch.int32)
        kv_len.copy_(lengths)
        q.normal_()
        want, want_lse = poisoned(eager, q)
        out.fill_(math.nan), lse.fill_(math.nan)
        graph.replay()
        step(eager, want, want_lse)
        used = int(q_len.sum())
        assert torch.equal(out[:used], want[:used]) and torch.equal(lse[:used], want_lse[:used])
        assert not out[:used].isnan().any()


# ---- errors ----------------------------------------------------------------------------------------------------------------


def test_captures_read_at_positions_need_a_bound():
    bias = torch.zeros(100, device=DEVICE)

    def by_key(score, b, h, q_idx, kv_idx):
        return score + bias[kv_idx]

    batch = make([(1, 50)])
    with pytest.raises(jitgen.errors.PlanMismatch, match="max_kv_len"):
        batch.plan(by_key)
    with pytest.raises(jitgen.errors.ShapeMismatch, match=r"size 100 along axis 0, .* up to 199"):
        batch.plan(by_key, max_kv_len=200)
    plan = batch.plan(by_key, max_kv_len=100)
    assert_is_the_oracle(batch, attend(batch, plan), batch.expected(by_key))


def test_lengths_are_checked_on_demand():
    batch = make([(1, 50)])
    plan = batch.plan(causal, room=2)
    with pytest.raises(jitgen.errors.ShapeMismatch, match="q_len 3 and kv_len 2"):
        plan.update(batch.ints([0, 3]), batch.ints([2]), check=True)


def test_odd_head_dims_are_refused_before_anything_is_compiled():
    with pytest.raises(jitgen.errors.ShapeMismatch, match="on cuda the cache must be stored"):
        jitgen.Plan(1, 1, 8, 2, 80, device=DEVICE)
