"""Calls that are made again: the checks of the first are not repeated, and nothing that changes goes unseen."""

import pytest
import torch

import jitgen
from jitgen import dense, looks, reference
from jitgen.errors import GradNotSupported, ShapeMismatch, UnsupportedDtype

LENGTH, HEADS = 5, 2
cap = 3.0
bias = torch.linspace(-1, 1, LENGTH)


def score_mod(score, b, h, q_idx, kv_idx):
    return cap * torch.tanh(score / cap) + bias[kv_idx]


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


VARIANT = jitgen.Variant(score_mod=score_mod, mask_mod=causal)
CALLS = {
    "plain": {},
    "mask": {"mask_mod": causal},
    "hooks": {"score_mod": score_mod, "mask_mod": causal},
    "variant": {"variant": VARIANT},
}


def inputs(length=LENGTH, dtype=torch.float32):
    return [torch.randn(1, HEADS, length, 16, dtype=dtype) for _ in range(3)]


def check(tensors, **hooks):
    got, lse = jitgen.attention(*tensors, **hooks, return_lse=True)
    assert torch.equal(got, jitgen.attention(*tensors, **hooks))
    expected, expected_lse = reference.attention(*tensors, **hooks, return_lse=True)
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse.to(lse.dtype), rtol=1e-4, atol=1e-5)


@pytest.fixture(params=["guards", "no guards"])
def again(request, monkeypatch):
    """Makes a call until it is known, with torch's guards and without."""
    if request.param == "no guards":
        monkeypatch.setattr(looks, "TensorGuards", None)
    elif looks.TensorGuards is None:
        pytest.skip("this torch has no TensorGuards")
    monkeypatch.setattr(dense, "_recent", {})

    def call(tensors, **hooks):
        for _ in range(3):
            check(tensors, **hooks)

    return call


@pytest.mark.parametrize("name", CALLS)
def test_known_call_is_not_looked_up_and_reads_its_own_tensors(name, again, monkeypatch):
    again(inputs(), **CALLS[name])
    monkeypatch.delattr(dense, "find_call")
    check(inputs(), **CALLS[name])


def test_one_tensor_for_keys_and_values_is_known_too(again, monkeypatch):
    q, k, _ = inputs()
    again((q, k, k))
    monkeypatch.delattr(dense, "find_call")
    check((q * 2, k, k))


@pytest.mark.parametrize("name", CALLS)
def test_other_tensors_are_checked_again(name, again):
    q, k, v = inputs()
    hooks = CALLS[name]
    again((q, k, v), **hooks)
    with pytest.raises(ShapeMismatch, match="v has kv_len 4, k has 5"):
        jitgen.attention(q, k, v[:, :, :4], **hooks)
    with pytest.raises(UnsupportedDtype, match="k has dtype float64"):
        jitgen.attention(q, k.double(), v, **hooks)
    with pytest.raises(GradNotSupported):
        jitgen.attention(q.clone().requires_grad_(), k, v, **hooks)
    with pytest.raises(TypeError, match="v is a list"):
        jitgen.attention(q, k, v.tolist(), **hooks)
    check((q[:, :, 2:], k, v), **hooks)
    check((q.transpose(1, 2).contiguous().transpose(1, 2), k, v), **hooks)
    check((q, k, v), **hooks)


@pytest.mark.parametrize("name", ["hooks", "variant"])
def test_changed_captures_are_seen(name, again, monkeypatch):
    tensors, hooks = inputs(), CALLS[name]
    again(tensors, **hooks)
    for value in (cap / 2, 7):  # the second has another type, and so another kernel
        monkeypatch.setitem(globals(), "cap", value)
        check(tensors, **hooks)
    monkeypatch.setitem(globals(), "bias", torch.randn(LENGTH + 3))
    again(tensors, **hooks)
    bias.mul_(-2)
    check(tensors, **hooks)
    bias.set_(torch.randn(LENGTH + 9))
    check(tensors, **hooks)
    bias.resize_(LENGTH - 1)
    with pytest.raises(ShapeMismatch, match=f"'bias' has size {LENGTH - 1} along axis 0"):
        jitgen.attention(*tensors, **hooks)


def test_captured_parameter_that_requires_grad_is_read_anew(again, monkeypatch):
    monkeypatch.setitem(globals(), "bias", torch.nn.Parameter(torch.randn(LENGTH)))
    tensors = inputs()
    with torch.no_grad():
        again(tensors, **CALLS["hooks"])
        bias.mul_(3)
        check(tensors, **CALLS["hooks"])


def test_shapes_that_alternate_are_each_right(again):
    for _ in range(3):
        for length in (LENGTH, 1, 3):
            check(inputs(length), **CALLS["hooks"])


def test_function_made_anew_is_known_by_its_code(again, monkeypatch):
    def window(width):
        return lambda b, h, q_idx, kv_idx: q_idx - kv_idx < width

    tensors = inputs()
    again(tensors, mask_mod=window(2))
    monkeypatch.delattr(dense, "find_call")
    check(tensors, mask_mod=window(4))


def test_results_given_to_a_known_call_are_written_and_checked(again):
    q, k, v = inputs()
    again((q, k, v))
    out = torch.full((1, LENGTH, HEADS, 16), float("nan")).transpose(1, 2)
    assert jitgen.attention(q, k, v, out=out) is out
    assert torch.equal(out, jitgen.attention(q, k, v))
    with pytest.raises(ShapeMismatch, match="out"):
        jitgen.attention(q, k, v, out=out[:, :, 1:])


def test_call_between_two_graphs_of_torch_compile(again):
    tensors = inputs()

    def layer(q, k, v):
        return jitgen.attention(q * 1, k, v, mask_mod=causal) + 1

    expected = reference.attention(*tensors, mask_mod=causal) + 1
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(*tensors), expected.to(torch.float32), rtol=1e-4, atol=1e-5)
