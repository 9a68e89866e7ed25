"""Tensors without memory at an address are refused by every call: a kernel would be given address 0, and crash."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor

import jitgen
from jitgen import checks
from jitgen.errors import GradNotSupported, ShapeMismatch, UnsupportedDevice

K, V = torch.randn(1, 2, 40, 64), torch.randn(1, 2, 40, 64)
SLOTS = torch.tensor([0, 1, 2])


def planned() -> jitgen.Plan:
    plan = jitgen.Plan(2, 8, 2, 1, 64, dtype=torch.float32, device="cpu", page_size=4)
    return plan.update(torch.tensor([0, 1, 3]), torch.tensor([5, 7]))


def append(x: torch.Tensor) -> torch.Tensor:
    jitgen.append(torch.zeros(2, 2, 4, 2, 64), x, x, slot_mapping=SLOTS)
    return x


PLAN, CACHE, TABLE = planned(), torch.randn(4, 2, 4, 1, 64), torch.arange(4, dtype=torch.int32).view(2, 2)
# name: the call, the shape of what it is given
CALLS: dict[str, tuple[Callable[[torch.Tensor], object], tuple[int, ...]]] = {
    "attention": (lambda x: jitgen.attention(x, K, V), (1, 2, 40, 64)),
    "captured": (lambda x: jitgen.attention(K, K, V, score_mod=lambda s, b, h, q_idx, kv_idx: s + x[kv_idx]), (40,)),
    "paged": (lambda x: jitgen.paged_attention(x, CACHE, TABLE, PLAN), (3, 2, 64)),
    "append": (append, (3, 2, 64)),
    "rope": (lambda x: jitgen.rope(x, None, SLOTS)[0], (3, 2, 64)),
    "sample": (lambda x: jitgen.sample(x, seed=1), (3, 20)),
}


@pytest.mark.parametrize(("call", "shape"), CALLS.values(), ids=CALLS)
def test_tensors_without_memory_are_refused_also_where_a_like_call_was_made(call, shape):
    call(torch.randn(shape))
    with pytest.raises(UnsupportedDevice, match=r"torch\.func .*make the mapped axis a part of the batch"):
        torch.vmap(call)(torch.randn(2, *shape))
    with pytest.raises(UnsupportedDevice, match=r"is a tensor of torch\.func"):
        torch.func.functionalize(call)(torch.randn(shape))
    with FakeTensorMode():
        fake = torch.randn(shape)
    with pytest.raises(UnsupportedDevice, match="is a FakeTensor, which has no values"):
        call(fake)
    with pytest.raises(UnsupportedDevice, match="is a TwoTensor without memory of its own"):
        call(TwoTensor(torch.randn(shape), torch.randn(shape)))


def test_lengths_without_values_are_refused():
    with FakeTensorMode():
        lengths = torch.tensor([5, 7])
    with pytest.raises(UnsupportedDevice, match="kv_len is a FakeTensor"):
        planned().update(torch.tensor([0, 1, 3]), lengths)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward_ad itself; its category differs by version
def test_a_tangent_is_refused_also_where_the_same_call_was_made_without():
    x = torch.randn(1, 2, 40, 64)
    for _ in range(3):
        jitgen.attention(x, K, V)
    with forward_ad.dual_level(), pytest.raises(GradNotSupported, match="has a tangent"):
        jitgen.attention(forward_ad.make_dual(x, x), K, V)
    with pytest.raises(GradNotSupported, match="has a tangent"):
        torch.func.jvp(lambda t: jitgen.attention(t, K, V), (x,), (x,))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward_ad itself; its category differs by version
def test_tangents_are_seen_by_a_torch_that_tells_no_level(monkeypatch):
    monkeypatch.setattr(checks, "HAS_LEVEL", False)
    x = torch.randn(1, 2, 40, 64)
    want = jitgen.attention(x, K, V)
    assert torch.equal(jitgen.attention(x, K, V), want)
    with forward_ad.dual_level(), pytest.raises(GradNotSupported, match="has a tangent"):
        jitgen.attention(forward_ad.make_dual(x, x), K, V)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused_also_where_a_like_call_was_made():
    x, rows = torch.randn(1, 2, 40, 64), torch.randn(3, 2, 64)
    plan = jitgen.Plan(2, 8, 2, 2, 64, dtype=torch.float32, device="cpu", layout="ragged")
    plan.update(torch.tensor([0, 1, 3]), kv_indptr=torch.tensor([0, 1, 3]))
    for _ in range(3):  # remembered calls ask torch's guards, which end the process over a nested tensor
        jitgen.attention(x, K, V)
        jitgen.paged_attention(rows, CACHE, TABLE, PLAN)
        jitgen.ragged_attention(rows, rows.clone(), rows + 1, plan)
    nested = torch.nested.nested_tensor([x[0], x[0, :, :3]])
    with pytest.raises(ShapeMismatch, match="q is a nested tensor"):
        jitgen.attention(nested, K, V)
    with pytest.raises(ShapeMismatch, match="v is a nested tensor"):
        jitgen.attention(x, K, nested)
    requests = torch.nested.nested_tensor([rows[:1], rows[1:]])
    with pytest.raises(ShapeMismatch, match="q is a nested tensor, expected the rows of all requests in one"):
        jitgen.paged_attention(requests, CACHE, TABLE, PLAN)
    with pytest.raises(ShapeMismatch, match="k is a nested tensor"):
        jitgen.ragged_attention(rows, requests, requests, plan)


@pytest.mark.parametrize("name", CALLS)
def test_negative_views_are_never_read_as_their_memory(name):
    call, shape = CALLS[name]
    plain = torch.randn(shape)
    for _ in range(3):
        call(plain)
    negative = torch._neg_view(plain)  # as the imaginary part of a conjugate is
    if name == "attention":  # which copies them
        torch.testing.assert_close(call(negative), call(-plain))
    else:
        with pytest.raises(UnsupportedDevice, match=r"is a view that negates what it shows \(is_neg\(\)\)"):
            call(negative)


ROWS = torch.randn(3, 2, 64)


@pytest.mark.parametrize(
    "call",
    [
        lambda out: jitgen.attention(K, K, V, out=out(K)),
        lambda out: jitgen.paged_attention(ROWS, CACHE, TABLE, PLAN, out=out(ROWS)),
        lambda out: jitgen.rope(ROWS, None, SLOTS, out=(out(ROWS), None)),
        lambda out: jitgen.append(out(CACHE.expand(4, 2, 4, 2, 64)), ROWS, ROWS, slot_mapping=SLOTS),
        lambda out: jitgen.softmax(ROWS[:, 0], out=out(ROWS[:, 0])),
    ],
    ids=["attention", "paged", "rope", "append", "softmax"],
)
def test_negative_views_are_never_written_as_their_memory(call):
    with pytest.raises((ShapeMismatch, UnsupportedDevice), match="is a view that negates what it shows"):
        call(lambda like: torch._neg_view(like.clone(memory_format=torch.contiguous_format)))
