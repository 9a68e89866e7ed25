"""jitgen.append and jitgen.rope inside torch.compile: one operator each, no graph break, what eager calls do."""

from __future__ import annotations

import pytest
import torch

import jitgen
from jitgen import kv_op, lifted
from jitgen.recipes import constant

rope, weight = jitgen.Rope(theta=5e5), torch.linspace(0.5, 1.5, 32)


def rotate_and_weigh(k, v, b, kv_h, pos):
    return rope(k * weight, pos), v


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def rows(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


OPTIONS = [{}, {"rotary_dim": 16, "interleave": True}, {"llama31": (1.0, 4.0, 64), "scale": 8.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("has_k", [True, False])
def test_rope(options, has_k):
    q, k, positions = rows(7, 4, 32), rows(7, 2, 32) if has_k else None, torch.arange(7) * 3

    def model(q, k, positions):
        q, k = jitgen.rope(q * 2, k, positions, **options)
        return q + 1, None if k is None else k + 1

    want, got = model(q, k, positions), compiled(model)(q, k, positions)
    for a, b in zip(got, want, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_rope_in_place_by_requests_and_by_a_table():
    table, starts, first = rows(64, 32), torch.tensor([0, 3, 7]), torch.tensor([5, 0])

    def model(q, k):
        jitgen.rope(q, k, (starts, first), cos_sin=table, out=(q, k))
        return q.sum()

    q, k = rows(7, 4, 32), rows(7, 2, 32)
    others = q.clone(), k.clone()
    assert torch.equal(compiled(model)(q, k), model(*others))
    assert torch.equal(q, others[0]) and torch.equal(k, others[1])


@pytest.mark.parametrize("transform_from", ["closure", "argument"])
def test_append_whose_transform_the_model_makes_or_is_given(transform_from):
    k, v, slots = rows(5, 2, 32), rows(5, 2, 32), torch.tensor([3, 0, 17, -1, 30])

    def transform_of(bias):
        return lambda k, v, b, kv_h, pos: (rope(k + bias[kv_h], pos), v * weight)

    def model(kv, k, v, bias, given):
        transform = transform_of(bias) if given is None else given
        jitgen.append(kv, k + 1, v, slot_mapping=slots, positions=torch.arange(5), transform=transform)
        return kv.sum()

    run = compiled(model)
    for factor in (1, 2, 3):  # a function of the same code captures another tensor
        bias = rows(2, 32) * factor
        given = transform_of(bias) if transform_from == "argument" else None
        want, got = torch.zeros(4, 2, 8, 2, 32), torch.zeros(4, 2, 8, 2, 32)
        model(want, k, v, bias, given)
        run(got, k, v, bias, given)
        assert torch.equal(got, want)


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("form", ["positions", "lengths", "slots"])
def test_append(form, joined):
    k, v = rows(5, 2, 32), rows(5, 2, 32)
    indices = {
        "positions": {"positions": torch.tensor([0, 1, 9, 10, -1]), "batch_indices": torch.tensor([0, 0, 1, 1, 0])},
        "lengths": {"q_indptr": torch.tensor([0, 2, 5]), "kv_len": torch.tensor([2, 12])},
        "slots": {"slot_mapping": torch.tensor([3, 0, 17, -1, 30]), "positions": torch.arange(5)},
    }[form]
    table = None if form == "slots" else jitgen.PageTable.csr(torch.tensor([0, 1, 3]), torch.tensor([3, 1, 0]))

    def model(kv, k, v):
        jitgen.append(kv, k + 1, v, table, **indices, transform=rotate_and_weigh)

    def cache():
        kv = torch.full((4, 2, 8, 2, 32), torch.nan)
        return kv if joined else kv.unbind(1)

    got, want = cache(), cache()
    compiled(model)(got, k, v)
    model(want, k, v)
    for a, b in zip((got,) if joined else got, (want,) if joined else want, strict=True):
        assert torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)) and not a.isnan().all()


def test_append_with_scales_that_it_stores():
    k, v, slots = rows(5, 2, 32), rows(5, 2, 32), torch.arange(5)

    def model(cache, scales, k, v):
        jitgen.append(cache, k, v, slot_mapping=slots, scales=(scales, 0.5))

    found = []
    for run in (compiled(model), model):
        cache = tuple(torch.zeros(1, 8, 2, 32, dtype=torch.int8) for _ in range(2))
        scales = torch.zeros(8, 2)
        run(cache, scales, k, v)
        found.append((*cache, scales))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and found[0][2][:5].min() > 0


def test_operators_keep_the_rules_of_torch():
    q, k, where = rows(5, 2, 32), rows(5, 1, 32), [torch.arange(5)]
    rest = (where, 1e4, 1.0, None, False, [], None)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(kv_op.rope_op, (q, k, *rest), test_utils=tests)
    torch.library.opcheck(kv_op.rope_out_op, (q, k, q.clone(), k.clone(), *rest), test_utils=tests)
    caches = torch.zeros(1, 8, 1, 32), torch.zeros(1, 8, 1, 32)
    indices = [torch.arange(5), None, None, None, torch.arange(5)]
    handle = lifted.register({"transform": constant(rotate_and_weigh)})
    arguments = (*caches, k, k, None, None, indices, [], [], handle, None, None, [], "NHD")
    torch.library.opcheck(kv_op.append_op, arguments, test_utils=tests)
