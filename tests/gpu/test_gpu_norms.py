"""Norms whose parts are joined by merge, on a GPU against float64: decode, prefill, fixed cuts, cascades, stored keys."""

from __future__ import annotations

import random

import pytest
import torch
from cascade_batch import SharedBatch
from decode_batch import Batch as DecodeBatch
from decode_batch import Module, Shape
from norm_cases import MERGED
from serving_batch import Batch, poisoned
from stored_batch import StoredBatch

import jitgen
from jitgen.families import cuda_spec
from jitgen.runtime import module_path
from jitgen.serving_balance import read_plan
from jitgen.target import detect_cuda

DEVICE = "cuda"
NAMES = list(MERGED)
EPS = torch.finfo(torch.bfloat16).eps
EDGES = [0, 1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 300, 1000, 4097, 5, 0, 2049, 64]
LONG = [(40, 4001), (5, 30), (64, 2003), (100, 3000)]
_built: dict[tuple[object, ...], tuple[Module, list[object]]] = {}


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def variant_of(name, **hooks):
    return jitgen.Variant(softmax=MERGED[name], mask_mod=causal, **hooks)


def has_lse(name):
    return variant_of(name).trace().program.norm.lse is not None


# ---- decode, through the C interface ---------------------------------------------------------------------------------------


def decode_module(name, dims=(128, 128), layout="paged", rows=8):
    """The decode module of a norm, built once in a process."""
    key = (name, dims, layout, rows)
    if key not in _built:
        traced = variant_of(name).trace()
        target = detect_cuda(accelerated=True)
        spec = cuda_spec(traced.program, "bfloat16", dims, "decode", target, layout=layout, rows=rows)
        _built[key] = Module(module_path(spec), spec), traced.values()
    return _built[key]


def decode_batch(name, q_lens, kv_lens, shape=None, *, rows=8, **options):
    shape = shape or Shape()
    layout = "paged" if shape.page_size else "ragged"
    module, values = decode_module(name, (shape.head_dim, shape.head_dim_v), layout, rows)
    return DecodeBatch(module, q_lens, kv_lens, shape, values, **options)


def check_decode(batch):
    """Rows within the rounding of P and O; a logsumexp may be a sum of thousands."""
    out, lse = batch.run()
    want, want_lse = batch.expected()
    assert not out.isnan().any()
    size = want.norm(dim=-1)
    wrong = (out.double() - want).norm(dim=-1)
    assert (wrong <= 6e-3 * size + 1e-6).all(), f"relative error {(wrong / size.clamp_min(1e-30)).max():.3g}"
    if want_lse is not None:
        torch.testing.assert_close(lse.double(), want_lse, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_lengths_at_every_edge(name, group, page_size):
    check_decode(decode_batch(name, [1] * len(EDGES), EDGES, Shape(4 * group, 4, page_size=page_size)))


@pytest.mark.parametrize(("batch", "kv_heads"), [(1, 1), (1, 8), (2, 2), (3, 8), (15, 8), (16, 8), (40, 6), (40, 5)])
@pytest.mark.parametrize("name", NAMES)
def test_heads_of_a_cta_follow_the_batch(name, batch, kv_heads):
    lengths = [random.Random(batch).randint(0, 3000) for _ in range(batch)]
    check_decode(decode_batch(name, [1] * batch, lengths, Shape(4 * kv_heads, kv_heads)))


@pytest.mark.parametrize("lengths", [[65536], [40001, 17, 22222]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_few_long_requests(name, lengths):
    check_decode(decode_batch(name, [1] * len(lengths), lengths, Shape(32, 8)))


@pytest.mark.parametrize("num_ctas", [1, 7, 61, 132])
@pytest.mark.parametrize("name", NAMES)
def test_random_batches_on_any_number_of_ctas(name, num_ctas):
    chance = random.Random(num_ctas)
    for seed in range(3):
        top = (20, 700, 6000)[seed]
        size = chance.randint(1, 40)
        q_lens = [chance.choice([0, 1, 1, 1, 2, 3]) for _ in range(size)]
        kv_lens = [max(q, chance.choice([0, chance.randint(0, top)])) for q in q_lens]
        check_decode(decode_batch(name, q_lens, kv_lens, Shape(16, 4), num_ctas=num_ctas, split=seed != 1, seed=seed))


DIMS = [("softmax", (256, 256), 8), ("stick_breaking", (64, 64), 8), ("forgetting", (192, 128), 8), ("power", (96, 96), 8),
        ("softmax", (128, 128), 32), ("stick_breaking", (128, 128), 32)]  # fmt: skip


@pytest.mark.parametrize(("name", "dims", "rows"), DIMS, ids=str)
def test_head_dims_and_several_rows(name, dims, rows):
    q_len = 1 if rows == 8 else 5
    lengths = [q_len, 1000, 17, 333, 64, q_len + 1]
    check_decode(decode_batch(name, [q_len] * 6, lengths, Shape(8, 2, *dims), rows=rows))


@pytest.mark.parametrize("name", NAMES)
def test_runs_are_bit_equal(name):
    batch = decode_batch(name, [1] * 5, [random.Random(3).randint(0, 9000) for _ in range(5)], Shape(32, 8))
    first = [t.nan_to_num() for t in batch.run()]  # a norm without logsumexp has NaN there
    for _ in range(10):
        assert all(torch.equal(a, b.nan_to_num()) for a, b in zip(first, batch.run(), strict=True))


# ---- plans -------------------------------------------------------------------------------------------------------------------


def run(batch, plan, name, page_size=16):
    """Output and logsumexp of a call, into buffers full of NaN; page_size 0: ragged keys."""
    out, lse = poisoned(plan, batch.q)
    lse = lse if has_lse(name) else None
    if page_size == 0:
        jitgen.ragged_attention(batch.q, *batch.ragged(), plan, out=out, lse=lse)
    else:
        k, v, lists = batch.pages(page_size)
        jitgen.paged_attention(batch.q, (k, v), batch.csr(lists), plan, out=out, lse=lse)
    return out, lse


def check(batch, variant, got):
    """Rows within the rounding of P and O; a logsumexp may be a sum of thousands."""
    (out, lse), (exact, exact_lse) = got, batch.expected(variant)
    assert not out.isnan().any()
    size = exact.norm(dim=-1)
    wrong = (out.double() - exact).norm(dim=-1)
    assert (wrong <= EPS * size + 1e-6).all(), f"relative error {(wrong / size.clamp_min(1e-30)).max():.3g}"
    if lse is not None:
        torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-5, atol=3e-4)


def pieces_of(plan):
    """Items that the plan cuts: shares that begin inside one."""
    buffer, shares = plan.classes[0].plan, plan.classes[0].num_ctas
    return int((buffer[16 : 16 + 20 * shares].view(shares, 20)[:, 2] > 0).sum())


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("name", NAMES)
def test_prefill_cuts_long_requests_and_joins_them(family, name, page_size):
    batch, variant = Batch(LONG, 8, 2, 128, 0, torch.bfloat16, DEVICE), variant_of(name)
    plan = batch.plan(variant, layout="paged" if page_size else "ragged", family=family)
    assert pieces_of(plan) > 0
    got = run(batch, plan, name, page_size)
    check(batch, variant, got)
    assert torch.equal(run(batch, plan, name, page_size)[0], got[0])


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="the sm80 family gives out no items"
)
@pytest.mark.parametrize("name", ["sigmoid", "softmax", "stick_breaking"])
def test_pieces_of_items_that_are_given_out_are_joined(name):
    batch, variant = Batch([(2100, 2100), (64, 24001)], 16, 4, 128, 0, torch.bfloat16, DEVICE), variant_of(name)
    plan = batch.plan(variant, layout="paged", page_size=16, family="sm90")
    kernel = plan.classes[0]
    assert read_plan(kernel.plan.cpu().numpy().tobytes(), kernel.num_ctas).given_out.pieces > 0
    check(batch, variant, run(batch, plan, name))


def test_hooks_see_the_joined_row(family):
    gate = torch.linspace(-2, 2, 8, device=DEVICE)
    variant = variant_of(
        "softmax",
        output_transform=lambda o, lse, b, h, q_idx: o / o.rms(1e-5) * torch.sigmoid(gate[h] + 0.1 * lse),
        lse_transform=lambda lse, b, h, q_idx: lse * 2 + h,
    )
    batch = Batch(LONG, 8, 2, 64, 0, torch.bfloat16, DEVICE)
    plan = batch.plan(variant, family=family)
    assert pieces_of(plan) > 0
    out, lse = run(batch, plan, "softmax")
    exact, exact_lse = batch.expected(variant)
    assert ((out.double() - exact).norm() / exact.norm()).item() <= EPS
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-5, atol=3e-4)


@pytest.mark.parametrize("name", ["sigmoid", "softmax", "stick_breaking"])
def test_both_kernels_of_a_plan_join_parts(name):
    lengths = [(1, 30001), (50, 50), (0, 9), (1, 5000), (257, 1029)]
    batch, variant = Batch(lengths, 8, 2, 128, 0, torch.bfloat16, DEVICE), variant_of(name)
    check(batch, variant, run(batch, batch.plan(variant, page_size=16, max_kv_len=32768), name))


@pytest.mark.parametrize("name", ["sigmoid", "softmax", "stick_breaking"])
def test_fixed_cuts_do_not_depend_on_the_rest_of_the_batch(name):
    lengths = [(1, 3001), (1, 40), (1, 700), (60, 300), (5, 64)]
    batch, variant = Batch(lengths, 8, 2, 128, 0, torch.bfloat16, DEVICE), variant_of(name)
    plan = batch.plan(variant, split="fixed", kv_split=512, max_kv_len=4096, page_size=16)
    assert plan.segments is not None
    got = run(batch, plan, name)
    check(batch, variant, got)
    k, v, lists = batch.pages(16)
    at = 0
    for b, (rows, keys) in enumerate(lengths):
        plan.update(batch.ints([0, rows]), batch.ints([keys]))
        alone = jitgen.paged_attention(batch.q[at : at + rows], (k, v), batch.csr([lists[b]]), plan)
        assert torch.equal(alone, got[0][at : at + rows])
        at += rows


LEVELS = {
    "decode": ([1] * 19, [[(19, 1000)], [(1, 16 * (b % 5) + b + 1) for b in range(19)]]),
    "three": ([3, 1, 5, 2, 2], [[(5, 370)], [(2, 110), (3, 5)], [(1, 9), (1, 1), (1, 300), (1, 4), (1, 7)]]),
    "prefill": ([150, 3, 270, 1], [[(4, 640)], [(1, 150), (1, 3), (1, 275), (1, 1)]]),
}


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("name", ["sigmoid", "softmax", "stick_breaking"])
def test_levels_of_a_cascade_are_joined(name, levels):
    shared = SharedBatch(*LEVELS[levels], 16, 8, 2, 128, dtype=torch.bfloat16, device=DEVICE)
    variant = variant_of(name)
    caches, cascade = shared.build()
    plan = shared.plan(variant, room=2, page_size=16, max_kv_len=4096).update(cascade, check=True)
    out, lse = poisoned(plan, shared.whole.q)
    lse = lse if has_lse(name) else None
    jitgen.paged_attention(shared.whole.q, caches, cascade, plan, out=out, lse=lse)
    check(shared.whole, variant, (out, lse))


@pytest.mark.parametrize("name", ["softmax", "stick_breaking"])
def test_stored_keys(name):
    variant = variant_of(name)
    batch = StoredBatch([(1, 9001), (1, 1), (1, 700)], 8, 2, 128, dtype=torch.bfloat16, device=DEVICE, kinds=("slot", "slot"))
    plan = batch.plan(variant, kv_dtype=batch.kv_dtype, max_q_len=1)
    like, _, lists = batch.pages(16)
    caches = batch.stored_pages(16, lists, like.shape[0])
    scales = batch.call_scales(16, lists, like.shape[0])
    out = jitgen.paged_attention(batch.q, caches, batch.csr(lists), plan, **scales)
    check(batch, variant, (out, None))
    assert "units on" in plan.explain() and "not cut" not in plan.explain()


def test_replays_of_a_graph_follow_the_lengths():
    full = [20000, 1, 700, 64, 0, 1000, 5000, 33]
    batch = decode_batch("softmax", [1] * 8, full, Shape(8, 2, block_table=True))
    batch.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch.plan()
        batch.launch()
    chance = random.Random(1)
    for _ in range(20):
        batch.kv_len.copy_(torch.tensor([chance.randint(0, n) for n in full], dtype=torch.int32))
        batch.out.fill_(float("nan"))
        graph.replay()
        replayed = batch.out.clone(), batch.lse.clone()
        batch.plan()
        batch.launch()
        assert torch.equal(replayed[0], batch.out) and torch.equal(replayed[1], batch.lse)
