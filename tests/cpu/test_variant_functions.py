"""Hooks given as functions of every kind, combined, and with context by name."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.attention.flex_attention import and_masks as torch_and_masks
from torch.nn.attention.flex_attention import or_masks as torch_or_masks

import jitgen
from jitgen.variant import Variant

WIDTH = 5


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def program_of(mask):
    return Variant(mask_mod=mask).trace().program


def window_mask(b, h, q, k, width):
    return (k <= q) & (q - k < width)


class Windowed:
    def __init__(self, width):
        self.width = width

    def mask(self, b, h, q, k):
        return window_mask(b, h, q, k, self.width)

    __call__ = mask

    @classmethod
    def of_class(cls, b, h, q, k):
        return window_mask(b, h, q, k, cls.CLASS_WIDTH)

    @property
    def as_property(self):
        return self.width

    def through_property(self, b, h, q, k):
        return window_mask(b, h, q, k, self.as_property)

    CLASS_WIDTH = 5


class WindowModule(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.register_buffer("width", torch.tensor(width))

    def forward(self, b, h, q, k):
        return window_mask(b, h, q, k, self.width)


def closure_of_closure(width):
    def outer():
        def mask(b, h, q, k):
            return window_mask(b, h, q, k, width)

        return mask

    return outer()


def with_default(b, h, q, k, width=5):
    return window_mask(b, h, q, k, width)


def with_keyword_default(b, h, q, k, *, width=5):
    return window_mask(b, h, q, k, width)


def wrapped(f):
    @functools.wraps(f)
    def inner(*args, **kwargs):
        return f(*args, **kwargs)

    return inner


WAYS = {
    "partial": functools.partial(window_mask, width=5),
    "partial of partial": functools.partial(functools.partial(window_mask), width=5),
    "bound method": Windowed(5).mask,
    "callable object": Windowed(5),
    "class method": Windowed.of_class,
    "property": Windowed(5).through_property,
    "module": WindowModule(5),
    "closure": closure_of_closure(5),
    "default": with_default,
    "keyword default": with_keyword_default,
    "decorated": wrapped(closure_of_closure(5)),
    "torch and_masks": torch_and_masks(causal, lambda b, h, q, k: q - k < WIDTH),
    "jitgen and_masks": jitgen.and_masks(causal, lambda b, h, q, k: q - k < WIDTH),
}


@pytest.mark.parametrize("way", WAYS)
def test_function_given_in_any_way_is_the_same_program(way):
    width = 5
    want = Variant(mask_mod=lambda b, h, q, k: (k <= q) & (q - k < width)).trace()
    got = Variant(mask_mod=WAYS[way]).trace()
    assert got.program.id == want.program.id and got.values() == want.values() == [5]


def test_or_masks_of_both_libraries_are_one_program():
    parts = causal, lambda b, h, q, k: k < 4
    want = program_of(lambda b, h, q, k: (k <= q) | (k < 4)).id
    assert program_of(torch_or_masks(*parts)).id == program_of(jitgen.or_masks(*parts)).id == want


def test_changed_attribute_of_a_bound_method_is_noticed():
    owner = Windowed(5)
    variant = Variant(mask_mod=owner.mask)
    program = variant.trace().program
    owner.width = 50
    assert variant.trace().program is program and variant.trace().values() == [50]


def test_masks_that_ask_for_context_can_be_combined():
    def in_context(b, h, q, k, *, ctx_len):
        return k < ctx_len

    combined = jitgen.or_masks(causal, in_context)
    assert program_of(combined).id == program_of(lambda b, h, q, k, *, ctx_len: (k <= q) | (k < ctx_len)).id


@pytest.mark.parametrize(
    "name", ["q_len", "kv_len", "ctx_len", "q_off", "kv_off", "kv_h", "num_q_heads", "num_kv_heads", "scale"]
)
def test_context_is_given_by_keyword_name(name):
    scope: dict[str, object] = {}
    exec(f"def score(s, b, h, q, k, *, {name}): return s + {name}", scope)
    program = Variant(score_mod=scope["score"]).trace().program
    assert name in program.score.deps


def test_function_made_anew_for_every_call_is_traced_once():
    before = None
    for width in range(5):
        program, values = jitgen.variant.resolve(None, closure_of_closure(width))
        assert values == [width] and (before is None or program is before)
        before = program
