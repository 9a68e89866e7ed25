"""Hooks that do not fit together are refused when the variant is defined."""

from __future__ import annotations

import inspect

import pytest
import torch

import jitgen
from jitgen.errors import UnsupportedVariant, VariantError


class NoWeights(jitgen.OnlineNorm):
    def update(self, s, st):
        return s, 1.0


class WrongState(jitgen.OnlineNorm):
    state = {"total": 0.0}  # noqa: RUF012

    def update(self, s, st):
        return s, 1.0, {"sum": st["total"]}


class WrongOrder(jitgen.OnlineNorm):
    order = "backwards"


class WrongStart(jitgen.OnlineNorm):
    state = {"total": "zero"}  # noqa: RUF012


class NoLse(jitgen.OnlineNorm):
    def update(self, s, st):
        return s, 1.0, st


class NeedsArguments(NoLse):
    def __init__(self, bias):
        self.bias = bias


def causal(b, h, q, k):
    return k <= q


MISTAKES = {
    "score with four parameters": (
        dict(score_mod=causal),
        r"score_mod 'causal' takes 4 positional parameters, expected 5: \(score, b, h",
    ),
    "mask with five parameters": (
        dict(mask_mod=lambda s, b, h, q, k: s),
        r"mask_mod '<lambda>' takes 5 positional parameters, expected 4: \(b, h, q_idx, kv_idx\)",
    ),
    "not a function": (dict(mask_mod=3), r"mask_mod is 3 of type int, expected a function"),
    "unknown context": (
        dict(mask_mod=lambda b, h, q, k, *, block: k < block),
        r"asks for keyword-only 'block', expected one of q_len, kv_len",
    ),
    "sink of rank two": (dict(sink=torch.zeros(2, 3)), r"sink has shape \(2, 3\), expected \[num_q_heads\]"),
    "sink of text": (dict(sink="two"), r"sink is 'two' of type str, expected a tensor \[num_q_heads\], a number"),
    "sink and softmax": (dict(sink=0.0, softmax=NoLse), r"sink and softmax were both given"),
    "softmax of another type": (dict(softmax=torch.softmax), r"softmax is .*expected a subclass of jitgen\.OnlineNorm"),
    "softmax that needs arguments": (
        dict(softmax=NeedsArguments),
        r"softmax is the class NeedsArguments, which needs arguments",
    ),
    "order": (dict(softmax=WrongOrder), r"WrongOrder\.order is 'backwards', expected 'any', 'forward' or 'reverse'"),
    "state": (dict(softmax=WrongStart), r"WrongStart\.state\['total'\] starts from 'zero', expected a number"),
    "lse of a norm without": (
        dict(softmax=NoLse, lse_transform=lambda lse, b, h, q: lse),
        r"a hook reads lse, but the variant's OnlineNorm has none",
    ),
    "q_index": (dict(q_index="global"), r"q_index='global' is not a convention\. Use 'local' or 'absolute'"),
    "variant inside": (dict(mask_mod=jitgen.Variant(mask_mod=causal)), r"mask_mod is"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_wrong_composition_is_refused(name):
    hooks, message = MISTAKES[name]
    with pytest.raises(VariantError, match=message):
        jitgen.Variant(**hooks)


@pytest.mark.parametrize(
    "norm, message",
    [
        (NoWeights, r"NoWeights\.update returned .*expected \(weight, factor, state\)"),
        (WrongState, r"WrongState\.update returned the state \['sum'\], expected a dict of \['total'\]"),
    ],
    ids=["two values", "other state"],
)
def test_norm_that_returns_something_else_is_refused_at_its_line(norm, message):
    with pytest.raises(UnsupportedVariant, match=message) as raised:
        jitgen.Variant(softmax=norm)
    assert raised.value.line == inspect.getsourcelines(norm.update)[1]


DEFINITIONS = {
    "a number": (5, r"variant is 5 of type int, expected a jitgen\.Variant, a score_mod or mask_mod"),
    "three parameters": (
        lambda a, b, c: a,
        r"takes 3 positional parameters, expected 5 for a score_mod .* or 4 for a mask_mod",
    ),
    "a class that needs arguments": (NeedsArguments, r"needs arguments"),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_wrong_definition_is_refused(name):
    definition, message = DEFINITIONS[name]
    with pytest.raises(VariantError, match=message):
        jitgen.Variant(definition)


def test_definition_and_hooks_exclude_each_other():
    with pytest.raises(VariantError, match="a definition and separate hooks were both given"):
        jitgen.Variant(causal, sink=0.0)


def test_bind_of_an_unknown_name_lists_the_known_ones():
    window = 3
    with pytest.raises(VariantError, match=r"bind got 'windw', which no hook captures\. Captured: .*window"):
        jitgen.Variant(mask_mod=lambda b, h, q, k: q - k < window).bind(windw=4)


def test_variant_is_immutable():
    with pytest.raises(AttributeError, match="Variant is immutable"):
        jitgen.Variant(mask_mod=causal).q_index = "local"


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.tensor([1, 3, 2]), r"falls from 3 to 2 at index 2"),
        (torch.zeros(3), r"dtype torch\.float32, expected an integer tensor"),
        (torch.zeros(2, 2, dtype=torch.int32), r"shape \(2, 2\)"),
        ([1, 2], r"sorted got \[1, 2\]"),
    ],
    ids=["falls", "float", "rank", "list"],
)
def test_sorted_refuses_what_does_not_ascend(value, message):
    with pytest.raises(VariantError, match=message):
        jitgen.sorted(value)


def test_static_refuses_what_is_no_number():
    with pytest.raises(VariantError, match="static got 'x' of type str, expected a bool, int or float"):
        jitgen.static("x")


@pytest.mark.parametrize("combine", [jitgen.and_masks, jitgen.or_masks], ids=["and", "or"])
def test_combining_masks_refuses_nothing_and_numbers(combine):
    with pytest.raises(VariantError, match="got no mask"):
        combine()
    with pytest.raises(VariantError, match="got 3 of type int, expected functions"):
        combine(3)
