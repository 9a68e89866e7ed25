"""Bad input to sampling gets one clear error before anything is compiled or launched."""

from __future__ import annotations

import pytest
import torch

import jitgen
from jitgen import sampling
from jitgen.errors import GradNotSupported, ShapeMismatch, UnsupportedDevice, UnsupportedDtype, VariantError

X = torch.zeros(3, 10)
THREE = torch.zeros(3)
COUNTS = torch.zeros(3, 10, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jitgen.sample([1.0]), TypeError, "x is a list, expected a torch.Tensor"),
        (lambda: jitgen.sample(torch.zeros(10)), ShapeMismatch, r"x has 1 dimensions \(shape \(10,\)\), expected 2"),
        (lambda: jitgen.sample(X.double()), UnsupportedDtype, "x has dtype float64, expected float32, bfloat16, float16"),
        (lambda: jitgen.sample(X.to("meta")), UnsupportedDevice, "x is on meta"),
        (lambda: jitgen.sample(torch.zeros(10, 3).T), ShapeMismatch, "unit stride along the vocabulary"),
        (lambda: jitgen.sample(torch.zeros(3, 0)), ShapeMismatch, "x has a vocabulary of 0"),
        (lambda: jitgen.sample(X.clone().requires_grad_()), GradNotSupported, "x requires grad"),
        (lambda: jitgen.sample(X, top_p=1.5), ValueError, "top_p is 1.5, expected 0 to 1"),
        (lambda: jitgen.sample(X, top_p=float("nan")), ValueError, "top_p is nan"),
        (lambda: jitgen.sample(X, min_p=-0.1), ValueError, "min_p is -0.1, expected 0 to 1"),
        (lambda: jitgen.sample(X, temperature=-1.0), ValueError, "temperature is -1.0, expected 0 to inf"),
        (lambda: jitgen.sample(X, top_k=2.5), TypeError, "top_k is 2.5 of type float, expected an int"),
        (lambda: jitgen.sample(X, top_k=True), TypeError, "top_k is True of type bool"),
        (lambda: jitgen.sample(X, indices=torch.tensor([0, 2**32 + 1])), ShapeMismatch, "indices reach from 0 to 4294967297"),
        (lambda: jitgen.sample(X, top_k=THREE), UnsupportedDtype, "top_k has dtype float32, expected int32"),
        (lambda: jitgen.sample(X, top_p=torch.zeros(4)), ShapeMismatch, r"top_p has shape \(4,\), expected \(3,\)"),
        (lambda: jitgen.sample(X, top_p=THREE.to("meta")), UnsupportedDevice, "top_p is on meta"),
        (lambda: jitgen.sample(X, order="p_first"), ValueError, "order is 'p_first', expected 'top_k_first' or 'joint'"),
        (lambda: jitgen.sample(X, from_logits=False, temperature=2.0), VariantError, "temperature divides logits"),
        (lambda: jitgen.sample(X, indices=torch.tensor([0, 3])), ShapeMismatch, "indices reach from 0 to 3, expected 0 to 2"),
        (lambda: jitgen.sample(X, indices=THREE), ShapeMismatch, r"indices is \(3,\) float32, expected a tensor"),
        (lambda: jitgen.sample(X, out=torch.zeros(3)), UnsupportedDtype, "out has dtype float32, expected int32 or int64"),
        (lambda: jitgen.sample(X, out=torch.zeros(4, dtype=torch.int32)), ShapeMismatch, r"out has shape \(4,\)"),
        (lambda: jitgen.sample(X, out=[0]), TypeError, "out is a list, expected a torch.Tensor"),
        (lambda: jitgen.sample(X, bad_token="none"), TypeError, "bad_token is 'none' of type str, expected an int"),
        (lambda: jitgen.sample(X, bitmask=[1]), TypeError, "bitmask is a list, expected a torch.Tensor"),
        (lambda: jitgen.sample(X, penalties=1.2), TypeError, "penalties is 1.2 of type float, expected a jitgen.Penalties"),
        (lambda: jitgen.softmax(X, dtype=torch.int32), UnsupportedDtype, "dtype is torch.int32, expected one of torch.float32"),
        (lambda: jitgen.softmax(X, out=X.int()), UnsupportedDtype, "out has dtype int32, expected float32 or bfloat16 or"),
        (lambda: jitgen.sample(X, status=torch.zeros(3)), UnsupportedDtype, "status has dtype float32, expected uint8"),
        (lambda: jitgen.sample(X, seed=1.5), TypeError, "seed is 1.5 of type float"),
        (lambda: jitgen.sample(X, seed=torch.zeros(3)), UnsupportedDtype, "seed has dtype float32, expected int64"),
        (lambda: jitgen.sample(X, seed=torch.zeros(2, dtype=torch.int64)), ShapeMismatch, r"seed has shape \(2,\)"),
        (lambda: jitgen.sample(X, offset=3), ValueError, "offset and advance need a seed"),
        (lambda: jitgen.sample(X, seed=3, advance=True), ValueError, "advance=True moves offsets in place"),
        (lambda: jitgen.sample(X, seed=3, generator=torch.Generator()), ValueError, "seed and generator were both given"),
        (lambda: jitgen.sample(X, generator=[torch.Generator()]), ShapeMismatch, "generator has 1 entries, expected 3"),
        (lambda: jitgen.sample(X, generator=3), TypeError, r"generator is 3, expected a torch\.Generator, or a list of one"),
        (lambda: jitgen.softmax(X, out=torch.empty(1, X.shape[1]).expand(X.shape)), ShapeMismatch, "rows of it share memory"),
        (lambda: jitgen.Penalties(COUNTS, repetition=0.0), ValueError, r"repetition is 0\.0, expected a number above 0"),
        (lambda: jitgen.Penalties(COUNTS, presence="1"), TypeError, "presence is '1' of type str, expected a number"),
        (lambda: jitgen.Penalties(COUNTS, prompt=[True]), TypeError, r"prompt is a list, expected a torch\.Tensor"),
        (lambda: jitgen.renorm(X, order="x"), ValueError, "order is 'x'"),
        (lambda: jitgen.mask_logits(X, top_k=3, out=X.half()), UnsupportedDtype, "out has dtype float16, expected float32"),
        (lambda: jitgen.Penalties(THREE), ShapeMismatch, r"counts has shape \(3,\)"),
        (lambda: jitgen.Penalties(X), UnsupportedDtype, "counts has dtype float32, expected an integer type"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert isinstance(caught.value, jitgen.JitgenError)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"draft_probs": torch.zeros(2, 4, 9)}, ShapeMismatch, r"draft_probs has shape \(2, 4, 9\), expected \(2, 3, 9\)"),
        ({"draft_probs": torch.zeros(2, 3, 9).half()}, UnsupportedDtype, "draft_probs has dtype float16, target_probs float32"),
        ({"draft_ids": torch.zeros(2, 3)}, UnsupportedDtype, "draft_ids is float32, expected a tensor of int32 or int64"),
        ({"draft_ids": torch.zeros(2, 2, dtype=torch.int32)}, ShapeMismatch, r"draft_ids has shape \(2, 2\)"),
        ({"parents": torch.zeros(2, 2, dtype=torch.int32)}, ShapeMismatch, r"parents has shape \(2, 2\)"),
        ({"target_probs": torch.zeros(2, 64, 9)}, ShapeMismatch, "target_probs has 64 rows"),
        ({"target_probs": torch.zeros(2, 9)}, ShapeMismatch, "target_probs has 2 dimensions"),
    ],
)
def test_bad_drafts_are_named(change, error, message):
    given = {
        "draft_probs": torch.zeros(2, 3, 9),
        "draft_ids": torch.zeros(2, 3, dtype=torch.int32),
        "target_probs": torch.zeros(2, 4, 9),
        **change,
    }
    with pytest.raises(error, match=message):
        jitgen.speculative_verify(given.pop("draft_probs"), given.pop("draft_ids"), given.pop("target_probs"), **given)


def test_empty_batches_launch_nothing():
    assert jitgen.sample(torch.zeros(0, 10), top_p=0.5).shape == (0,)
    assert sampling.softmax(torch.zeros(0, 10)).shape == (0, 10)
    assert jitgen.sample(X, indices=torch.zeros(0, dtype=torch.int32)).shape == (0,)
    found = jitgen.speculative_verify(torch.zeros(0, 1, 5), torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, 2, 5))
    assert found.ids.shape == (0, 2)
