"""jitgen.rope and jitgen.append on a CUDA device: the checks of the CPU, and what only a GPU has."""

from __future__ import annotations

import pytest
import torch
from append_cases import assert_rows_close, check_append, check_rope, make_cache, poisoned, random_rows, rotated

import jitgen

TABLE = torch.randn(1000, 32, generator=torch.Generator().manual_seed(1))
KINDS = {
    "plain": {},
    "theta_scale": {"theta": 5e5, "scale": 4.0},
    "interleave": {"interleave": True},
    "partial": {"rotary_dim": 32},
    "partial_interleave": {"rotary_dim": 20, "interleave": True},
    "partial_odd": {"rotary_dim": 10},
    "llama31": {"theta": 5e5, "scale": 8.0, "llama31": (1.0, 4.0, 8192)},
    "table": {"cos_sin": TABLE},
    "table_bf16": {"cos_sin": TABLE.bfloat16(), "interleave": True},
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BYTES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rope_rotates_as_float64_does(kind, dtype):
    given = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in KINDS[kind].items()}
    check_rope("cuda", dtype, (8, 2), 64, torch.int32, **given)


@pytest.mark.parametrize("head_dim", [6, 33 * 2, 80, 128, 256, 512])
def test_rope_takes_every_head_dim(head_dim):
    check_rope("cuda", torch.bfloat16, (5, 1), head_dim, torch.int64)


def test_strides_may_be_any():
    wide = random_rows(0, 9, 7, 3, 131, dtype=torch.float16, device="cuda")
    q = wide[:, 2, :, 33:97]  # rows begin at odd elements
    assert_rows_close(jitgen.rope(q, None, torch.arange(9, device="cuda"))[0], rotated(q, torch.arange(9, device="cuda")))


def test_positions_of_requests_leave_padding_alone():
    q, indptr, first = torch.randn(9, 2, 32, device="cuda"), torch.tensor([0, 3, 3, 7]), torch.tensor([100, 5, 0])
    positions = torch.tensor([100, 101, 102, 0, 1, 2, 3], device="cuda")
    out = poisoned((9, 2, 32), torch.float32, "cuda")
    jitgen.rope(q, None, (indptr.cuda(), first.cuda()), out=(out, None))
    assert_rows_close(out[:7], rotated(q[:7], positions))
    assert out[7:].isnan().all()


@pytest.mark.parametrize("form", ["csr", "dense", "requests", "slots"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_land_where_the_indices_say(form, layout, dtype):
    check_append("cuda", dtype, dtype, form=form, layout=layout, joined=layout == "HND", page_size=7, dims=(128, 128), heads=5)


@pytest.mark.parametrize("dims", [(96, 33), (512, 64), (128, 80)], ids=str)
def test_heads_may_be_odd_and_indices_int64(dims):
    check_append("cuda", torch.bfloat16, torch.float16, form="slots", index_dtype=torch.int64, dims=dims, heads=3, page_size=1)


@pytest.mark.parametrize("form", ["dense", "requests", "slots"])
@pytest.mark.parametrize("dims", [(128, 128), (64, 48)], ids=str)
def test_transform_is_fused(dims, form):
    check_append("cuda", torch.bfloat16, torch.bfloat16, form=form, transform=True, dims=dims)


@pytest.mark.parametrize("scale", ["number", "tensor", "head", "stored"])
@pytest.mark.parametrize("cache", BYTES, ids=str)
@pytest.mark.parametrize("dim", [128, 36])
def test_rows_are_quantised(cache, scale, dim):
    check_append("cuda", torch.bfloat16, cache, scale=scale, transform=scale == "stored", form="slots", dims=(dim, dim))


@pytest.mark.parametrize("cache", BYTES[:2], ids=str)
def test_float8_rounds_as_torch_does_where_it_does_not_saturate(cache):
    values = torch.randn(4096, generator=torch.Generator().manual_seed(3)) * torch.logspace(-8, 2, 4096, base=2.0)
    kv = tuple(poisoned((1, 64, 1, 64), cache, "cuda") for _ in range(2))
    rows = values.view(64, 1, 64).cuda()
    jitgen.append(kv, rows, rows, slot_mapping=torch.arange(64, device="cuda"))
    assert torch.equal(kv[0].flatten().view(torch.uint8).cpu(), values.to(cache).view(torch.uint8))


def test_many_tokens_take_every_cta():
    n, heads = 20_011, 8
    cache = make_cache([n], 16, heads, (128, 128), torch.bfloat16, "cuda")
    k, v = (random_rows(i, n, heads, 128, dtype=torch.bfloat16, device="cuda") for i in range(2))
    positions, requests, rope = torch.arange(n, device="cuda"), torch.zeros(n, dtype=torch.int32, device="cuda"), jitgen.Rope()
    jitgen.append(cache.kv, k, v, cache.table, positions, requests, transform=lambda k, v, b, h, pos: (rope(k, pos), v))
    slots = cache.slots(requests, positions)
    assert_rows_close(cache.rows("k")[slots], rotated(k, positions))
    assert torch.equal(cache.rows("v")[slots], v)


def test_a_place_that_is_not_there_is_skipped():
    cache, k = make_cache([8], 4, 1, (8, 8), torch.float32, "cuda"), torch.ones(2, 1, 8, device="cuda")
    cache.k.fill_(0)
    jitgen.append(cache.kv, k, k, slot_mapping=torch.tensor([1000, 2], device="cuda"))
    assert cache.k.sum() == 8


@pytest.mark.parametrize("start", [-(10**9), 10**9, -1])
def test_page_lists_that_begin_nowhere_are_not_followed(start):
    cache, k = make_cache([8, 8], 4, 1, (8, 8), torch.float32, "cuda"), torch.ones(2, 1, 8, device="cuda")
    cache.k.fill_(0)
    starts, positions, requests = (torch.tensor(t, device="cuda") for t in ([start, 2, 4], [1, 0], [0, 1]))
    jitgen.append(cache.kv, k, k, (starts, torch.arange(4, device="cuda")), positions, requests)
    assert cache.k.sum() == 8


def test_a_graph_appends_what_the_tensors_hold_at_its_replay():
    cache, rope = make_cache([64], 16, 2, (64, 64), torch.bfloat16, "cuda"), jitgen.Rope()
    k = torch.zeros(3, 2, 64, dtype=torch.bfloat16, device="cuda")
    slots, positions = (torch.zeros(3, dtype=dtype, device="cuda") for dtype in (torch.int64, torch.int32))

    def rotate(k, v, b, kv_h, pos):
        return rope(k, pos), v

    def step():
        jitgen.append(cache.kv, k, k, slot_mapping=slots, positions=positions, transform=rotate)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for i in range(3):
        k.copy_(random_rows(i, 3, 2, 64, dtype=torch.bfloat16, device="cuda"))
        slots.copy_(torch.tensor([5, 40, 20]) + i)
        positions.copy_(torch.tensor([7, 1000, 90_000]) + i)
        graph.replay()
        assert_rows_close(cache.rows("k")[slots], rotated(k, positions))
