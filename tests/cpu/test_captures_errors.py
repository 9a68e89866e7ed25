"""Captured values that no kernel can take are refused by name, with the line of the hook."""

from __future__ import annotations

import inspect

import pytest
import torch

import jitgen
from jitgen.errors import UnsupportedVariant


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
