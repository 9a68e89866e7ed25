"""Decode modules on a GPU, through their C interface: every length edge, layout and hook against float64."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import pytest
import torch
from decode_batch import Batch, Module, Shape
from norm_cases import Sigmoid, StickBreaking

import jitgen
from jitgen.families import cuda_spec
from jitgen.runtime import module_path
from jitgen.serving_balance import PlanShape, balance, read_plan
from jitgen.target import detect_cuda

ERRORS = {torch.bfloat16: 6e-3, torch.float16: 1e-3}  # of a row, relative: P and O are rounded to 2^-9 and 2^-12
LSE_ERROR = 1e-4
EDGES = [0, 1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 300, 1000, 4097, 5, 0, 2049, 64]


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def plain() -> jitgen.Variant:
    return jitgen.Variant()


def causal_only() -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal)


def window() -> jitgen.Variant:
    width = 100
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < width))


def window_by_head() -> jitgen.Variant:
    widths = torch.arange(1, 33, dtype=torch.int32, device="cuda") * 50
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < widths[h]))


def soft_cap() -> jitgen.Variant:
    cap = 20.0
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: cap * torch.tanh(s / cap), mask_mod=causal)


def alibi() -> jitgen.Variant:
    slopes = torch.linspace(0.01, 0.3, 32, device="cuda")
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + slopes[h] * (kv_idx - q_idx), mask_mod=causal)


def every_hook() -> jitgen.Variant:
    document = (torch.arange(8192, device="cuda") // 700).to(torch.int32)
    sinks, gate, cap = torch.linspace(-1, 2, 32, device="cuda"), torch.linspace(-2, 2, 32, device="cuda"), 30.0
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: cap * torch.tanh(s / cap),
        mask_mod=lambda b, h, q_idx, kv_idx: (document[q_idx] == document[kv_idx]) & (kv_idx <= q_idx),
        sink=sinks,
        output_transform=lambda o, lse, b, h, q_idx: o * torch.sigmoid(gate[h]),
        lse_transform=lambda lse, b, h, q_idx: lse * 1.4426950408889634,
    )


def unit_rows() -> jitgen.Variant:
    return jitgen.Variant(output_transform=lambda o, lse, b, h, q_idx: o * torch.rsqrt(jitgen.row_sum(o * o) + 1e-6))


class OwnSoftmax(jitgen.OnlineNorm):
    state = {"top": -1e30, "total": 0.0}  # noqa: RUF012
    order = "any"

    def update(self, s, st):
        top = torch.maximum(st["top"], jitgen.row_max(s))
        factor, weight = torch.exp(st["top"] - top), torch.exp(s - top)
        return weight, factor, {"top": top, "total": st["total"] * factor + jitgen.row_sum(weight)}

    def finalize(self, o, st):
        return o / st["total"]

    def lse(self, st):
        return st["top"] + torch.log(st["total"])


def sigmoid() -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal, softmax=Sigmoid)


def stick_breaking() -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal, softmax=StickBreaking)


def own_softmax() -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal, softmax=OwnSoftmax)


@cache
def build(make: Callable[[], jitgen.Variant], shape: Shape, rows: int) -> tuple[Module, list[object]]:
    """The module for a variant; ``shape`` matters in its types only."""
    traced = make().trace()
    target, layout = detect_cuda(accelerated=True), "ragged" if shape.page_size == 0 else "paged"
    dtype, dims = str(shape.dtype).removeprefix("torch."), (shape.head_dim, shape.head_dim_v)
    spec = cuda_spec(traced.program, dtype, dims, "decode", target, layout=layout, rows=rows)
    return Module(module_path(spec), spec), traced.values()


def batch_of(make, q_lens, kv_lens, shape=None, *, rows=8, **options) -> Batch:
    shape = shape or Shape()
    module, values = build(make, Shape(head_dim=shape.head_dim, head_dim_v=shape.head_dim_v, dtype=shape.dtype,
                                       page_size=min(shape.page_size, 1)), rows)  # fmt: skip
    return Batch(module, q_lens, kv_lens, shape, values, **options)


def check(batch: Batch) -> None:
    relative, off = batch.error()
    assert relative <= ERRORS[batch.shape.dtype]
    assert off <= LSE_ERROR


# ---- layouts ----
@pytest.mark.parametrize("page_size", [0, 1, 3, 16, 24, 32, 64])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_lengths_at_every_edge(page_size, group):
    check(batch_of(plain, [1] * len(EDGES), EDGES, Shape(4 * group, 4, page_size=page_size)))


@pytest.mark.parametrize("page_size", [1, 5, 16, 48])
def test_lengths_around_a_page(page_size):
    lengths = [0, 1, max(page_size - 1, 0), page_size, page_size + 1, 7 * page_size, 7 * page_size + 1, 60000 + page_size]
    check(batch_of(plain, [1] * len(lengths), lengths, Shape(page_size=page_size)))


@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("block_table", [False, True])
@pytest.mark.parametrize("page_size", [7, 32])
def test_cache_layouts(order, joined, block_table, page_size):
    shape = Shape(12, 3, page_size=page_size, order=order, joined=joined, block_table=block_table)
    check(batch_of(plain, [1] * 7, [600, 31, 0, 77, 1, 1500, 64], shape))


@pytest.mark.parametrize(("batch", "kv_heads"), [(1, 1), (1, 8), (2, 2), (3, 8), (15, 8), (16, 8), (40, 6), (40, 5)])
def test_heads_of_a_cta_follow_the_batch(batch, kv_heads):
    lengths = [random.Random(batch).randint(0, 900) for _ in range(batch)]
    check(batch_of(plain, [1] * batch, lengths, Shape(4 * kv_heads, kv_heads)))


# ---- types ----
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("page_size", [1, 16])
def test_head_dims_and_types(dims, dtype, page_size):
    shape = Shape(8, 2, *dims, page_size=page_size, dtype=dtype)
    check(batch_of(plain, [1] * 6, [1000, 0, 17, 333, 64, 2], shape))


# ---- several query rows ----
@pytest.mark.parametrize(
    ("q_len", "group", "rows"), [(2, 4, 8), (5, 4, 32), (4, 4, 16), (8, 4, 32), (3, 8, 32), (7, 1, 8), (3, 5, 16)]
)
@pytest.mark.parametrize("page_size", [1, 16])
def test_causal_rows_of_a_draft(q_len, group, rows, page_size):
    lengths = [q_len, q_len + 1, 100, 1000, 31]
    check(batch_of(causal_only, [q_len] * 5, lengths, Shape(2 * group, 2, page_size=page_size), rows=rows))


def test_more_rows_than_columns_take_several_passes():
    check(batch_of(causal_only, [40, 1, 0, 17], [300, 200, 50, 17], Shape(8, 2)))


def test_group_larger_than_the_columns():
    check(batch_of(plain, [1, 1, 1], [300, 0, 2000], Shape(80, 2), rows=32))


# ---- hooks ----
VARIANTS = [causal_only, window, window_by_head, soft_cap, alibi, every_hook, unit_rows, sigmoid, stick_breaking, own_softmax]


@pytest.mark.parametrize("make", VARIANTS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("batch", [1, 20])
def test_variants(make, page_size, batch):
    lengths = [random.Random(batch).randint(1, 1500) for _ in range(batch)]
    relative, off = batch_of(make, [1] * batch, lengths, Shape(8, 2, page_size=page_size)).error()
    assert relative <= 2 * ERRORS[torch.bfloat16]  # tanh is good to 2^-11 of a logit
    assert off <= 5e-3


@pytest.mark.parametrize("page_size", [1, 16])
def test_pages_outside_of_the_window_are_not_read(page_size):
    batch = batch_of(window, [1, 2, 1], [700, 1000, 5000], Shape(8, 2, page_size=page_size), hole=592)
    check(batch)


# ---- plans ----
def test_planner_gives_the_integers_of_the_host():
    chance = random.Random(5)
    for size in (1, 7, 130, 1500, 4096):
        q_lens = [chance.choice([0, 1, 1, 2, chance.randint(0, 12)]) for _ in range(size)]
        kv_lens = [max(q, chance.randint(0, 40)) for q in q_lens]
        if size == 1500:
            q_lens, kv_lens = [1] * size, [640] * size  # equal items, which are taken whole
        batch = batch_of(plain, q_lens, kv_lens, Shape(8, 2), split=size != 130)
        batch.plan()
        key_warps = batch.module.spec.tiles.num_warps // (1 if size < 16 else 2)
        shape = PlanShape(8, 16 * key_warps, 4, 2 if size < 16 else 1, 4, 1, 1 << 20, 0, 0,
                          1 if size != 130 else 0x7FFFFFFF, 64, 0, batch.words["num_ctas"])  # fmt: skip
        assert read_plan(batch.plan_buffer.cpu().numpy().tobytes(), shape.shares) == balance(q_lens, kv_lens, shape)


@pytest.mark.parametrize("num_ctas", [1, 7, 61, 132])
@pytest.mark.parametrize("split", [True, False])
def test_random_batches_on_any_number_of_ctas(num_ctas, split):
    chance = random.Random(num_ctas)
    for seed in range(4):
        top = (20, 200, 700, 6000)[seed]
        size = chance.randint(1, 40 if top > 700 else 200)
        q_lens = [chance.choice([0, 1, 1, 1, 2, 3]) for _ in range(size)]
        kv_lens = [max(q, chance.choice([0, chance.randint(0, top)])) for q in q_lens]
        shape = Shape(16, 4, page_size=chance.choice([1, 7, 16, 64]))
        check(batch_of(causal_only, q_lens, kv_lens, shape, num_ctas=num_ctas, split=split, seed=seed))


def test_runs_are_bit_equal():
    batch = batch_of(plain, [1] * 33, [random.Random(3).randint(0, 3000) for _ in range(33)], Shape(32, 8))
    first = [t.clone() for t in batch.run()]
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, batch.run(), strict=True))


@pytest.mark.parametrize("programmatic", [0, 1])
def test_replays_of_a_graph_follow_the_lengths(programmatic):
    full = [2000, 1, 700, 64, 0, 1000, 5000, 33]
    batch = batch_of(plain, [1] * 8, full, Shape(8, 2, block_table=True))
    batch.words["programmatic"] = programmatic
    stream = torch.cuda.Stream()
    batch.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        batch.plan()
        batch.launch()
    chance = random.Random(1)
    for _ in range(50):
        lengths = [chance.randint(0, n) for n in full]
        batch.kv_len.copy_(torch.tensor(lengths, dtype=torch.int32))
        batch.out.fill_(float("nan"))
        graph.replay()
        replayed = batch.out.clone(), batch.lse.clone()
        batch.plan()
        batch.launch()
        assert torch.equal(replayed[0], batch.out)
        assert torch.equal(replayed[1], batch.lse)
