"""Captured values that no kernel can take are refused by name, with the line of the hook."""

from __future__ import annotations

import inspect

import pytest
import torch

import jitgen
from jitgen import reference
from jitgen.errors import ShapeMismatch, UnsupportedVariant


class HasWeight:
    width = 3


CAPTURES = {
    "complex tensor": (
        torch.zeros(3, dtype=torch.complex64),
        r"captured tensor 'value' has dtype torch\.complex64, expected one of",
    ),
    "sparse tensor": (
        torch.zeros(3, 3).to_sparse(),
        r"captured tensor 'value' has layout torch\.sparse_coo, expected strided",
    ),
    "rank five": (torch.zeros(1, 1, 1, 1, 2), r"captured tensor 'value' has rank 5, limit 4"),
    "huge int": (2**70, r"captured int 'value' is \d+, which does not fit 64 bits"),
}


@pytest.mark.parametrize("name", CAPTURES)
def test_capture_is_refused_by_name(name):
    value, message = CAPTURES[name]

    def mask(b, h, q, k):
        return k < (value[0] if isinstance(value, torch.Tensor) else value)

    with pytest.raises(UnsupportedVariant, match=message) as raised:
        jitgen.Variant(mask_mod=mask)
    assert (raised.value.file, raised.value.line) == (__file__, inspect.getsourcelines(mask)[1])


class Layer:
    """A bias that is one row of a tensor for all layers."""

    def __init__(self, number):
        self.number, self.slopes = number, torch.randn(3, 4)

    def __call__(self, score, b, h, q_idx, kv_idx):
        return score + self.slopes[self.number, h]


def test_number_outside_of_a_tensor_is_an_error_of_the_call():
    q, layer = torch.randn(1, 4, 5, 16), Layer(2)
    for number in (2, 0, -3):
        layer.number = number
        want = reference.attention(q, q, q, score_mod=layer)
        for _ in range(3):  # a call that is made again is checked less
            torch.testing.assert_close(jitgen.attention(q, q, q, score_mod=layer).double(), want, atol=2e-6, rtol=2e-6)
    message = r"'slopes' has size 3 along axis 0, and 'number', which is {}, indexes it there, expected -3 to 2"
    for number in (3, -4):
        layer.number = number
        with pytest.raises(ShapeMismatch, match=message.format(number)):
            jitgen.attention(q, q, q, score_mod=layer)
    with pytest.raises(ShapeMismatch, match=r"'bias' has size 4 along axis 0, and the number 7 indexes it there"):
        bias = torch.randn(4)
        jitgen.attention(q, q, q, score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[7])


def test_number_outside_of_a_tensor_is_an_error_of_plans_and_sampling():
    layer = Layer(1)
    plan = jitgen.Plan(1, 2, 4, 4, 16, dtype=torch.float32, device="cpu", variant=layer)
    cache, table = torch.randn(2, 2, 4, 4, 16), torch.tensor([[1, 0]])
    q_indptr, kv_len = torch.tensor([0, 2]), torch.tensor([7])
    jitgen.paged_attention(torch.randn(2, 4, 16), cache, table, plan.update(q_indptr, kv_len))
    layer.number = 3
    with pytest.raises(ShapeMismatch, match="and 'number', which is 3, indexes it there"):
        jitgen.paged_attention(torch.randn(2, 4, 16), cache, table, plan)
    with pytest.raises(ShapeMismatch, match="and 'number', which is 3, indexes it there"):
        plan.update(q_indptr, kv_len)
    with pytest.raises(ShapeMismatch, match="and the number 9 indexes it there"):
        biases = torch.randn(2, 40)
        jitgen.sample(torch.zeros(1, 40), processor=lambda logit, token, row: logit + biases[9, token])


def test_numpy_array_is_refused_with_the_way_to_capture_it():
    table = torch.zeros(4).numpy()
    with pytest.raises(UnsupportedVariant, match=r"captured NumPy array 'table' of shape \(4,\)\. Capture torch\.from_numpy"):
        jitgen.Variant(mask_mod=lambda b, h, q, k: table[k] > 0)


def test_undefined_global_is_reported_by_the_call():
    variant = jitgen.Variant(mask_mod=lambda b, h, q, k: k < defined_later)  # noqa: F821
    with pytest.raises(NameError, match="defined_later"):
        variant.trace()


def test_hook_that_assigns_an_attribute_is_refused():
    owner = HasWeight()

    def mask(b, h, q, k):
        owner.width = 4
        return k < owner.width

    with pytest.raises(UnsupportedVariant, match="a hook assigns attribute 'width' of a HasWeight"):
        jitgen.Variant(mask_mod=mask)


def test_value_kept_beyond_its_hook_is_refused():
    kept = []
    keep = kept.append  # a library method: called as it is

    def mask(b, h, q, k):
        keep(q)
        return k <= q

    jitgen.Variant(mask_mod=mask)
    with pytest.raises(UnsupportedVariant, match="used after its hook had returned"):
        kept[0] + 1
