"""jitgen.rope on the CPU: every kind of rotation, in and out of place, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from append_cases import assert_rows_close, check_rope, poisoned, random_rows, rotated

import jitgen
from jitgen.errors import GradNotSupported, InvalidType, ShapeMismatch, UnsupportedDtype, VariantError

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


@pytest.mark.parametrize("kind", KINDS)
def test_rope_rotates_as_float64_does(kind):
    check_rope("cpu", torch.bfloat16, (8, 2), 64, torch.int32, **KINDS[kind])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [6, 80, 256])
def test_rope_takes_every_dtype_and_head_dim(dtype, head_dim):
    check_rope("cpu", dtype, (3, 1), head_dim, torch.int64)


def test_q_and_k_may_differ_in_head_dim():
    q, k, positions = torch.randn(5, 4, 96), torch.randn(5, 2, 64), torch.arange(5) * 77
    for got, x in zip(jitgen.rope(q, k, positions), (q, k), strict=True):
        assert_rows_close(got, rotated(x, positions))


def test_k_may_be_left_out_and_strides_may_be_any():
    wide = random_rows(0, 9, 7, 3, 128, dtype=torch.float16, device="cpu")
    q = wide[:, 2, :, 32:96]
    got, nothing = jitgen.rope(q, None, torch.arange(9))
    assert nothing is None
    assert_rows_close(got, rotated(q, torch.arange(9)))


def test_positions_of_requests_leave_padding_alone():
    q, indptr, first = torch.randn(9, 2, 32), torch.tensor([0, 3, 3, 7]), torch.tensor([100, 5, 0])
    positions = torch.tensor([100, 101, 102, 0, 1, 2, 3])
    out = poisoned((9, 2, 32), torch.float32, "cpu")
    jitgen.rope(q, None, (indptr, first), out=(out, None))
    assert_rows_close(out[:7], rotated(q[:7], positions))
    assert out[7:].isnan().all()


def test_angles_are_exact_at_far_positions():
    q, positions = torch.randn(64, 1, 128), 2**24 - 1 - torch.arange(64) * 100_003
    assert_rows_close(jitgen.rope(q, None, positions)[0], rotated(q, positions))


def test_no_tokens_are_no_work():
    q, _ = jitgen.rope(torch.empty(0, 4, 64), None, torch.empty(0, dtype=torch.int32))
    assert q.shape == (0, 4, 64)


Q = torch.zeros(3, 2, 64)
P = torch.zeros(3, dtype=torch.int32)
WRONG = {
    "rank": (dict(q=torch.zeros(64)), ShapeMismatch, "q has shape (64,), expected [num_tokens, heads, head_dim]."),
    "no_tensor": (dict(q=None), InvalidType, "q is a NoneType, expected a torch.Tensor."),
    "dtype": (dict(q=Q.double()), UnsupportedDtype, "q has dtype float64, expected float32, bfloat16, float16."),
    "rows": (dict(k=torch.zeros(4, 2, 64)), ShapeMismatch, "k has 4 rows on cpu, q has 3 on cpu. Both must match."),
    "positions": (dict(positions=P[:2]), ShapeMismatch, "positions has 2 entries, expected 3: one for each token."),
    "index_dtype": (dict(positions=P.float()), UnsupportedDtype, "positions has dtype float32, expected int32 or int64."),
    "rotary_dim": (
        dict(rotary_dim=66), ShapeMismatch, "rotary_dim is 66, the rows have 64 elements. It must be even and not larger.",
    ),
    "odd": (dict(rotary_dim=7), ShapeMismatch, "rotary_dim is 7, expected an even number from 2 on."),
    "theta": (dict(theta=0.0), VariantError, "theta is 0.0, expected a number above 0."),
    "llama31": (dict(llama31=(4.0, 1.0, 8192)), VariantError, "the first below the second."),
    "table": (dict(cos_sin=torch.zeros(5)), ShapeMismatch, "cos_sin has shape (5,), expected [max_position, rotary_dim]."),
    "out": (dict(out=(Q.half(), None)), ShapeMismatch, "out for q has shape (3, 2, 64) and dtype torch.float16"),
    "strides": (dict(q=Q.transpose(1, 2)), ShapeMismatch, "expected unit stride along the head dim"),
    "grad": (dict(q=Q.clone().requires_grad_()), GradNotSupported, "q requires grad"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(case):
    given, error, text = WRONG[case]
    call = {"q": Q, "k": None, "positions": P, **given}
    with pytest.raises(error) as caught:
        jitgen.rope(call.pop("q"), call.pop("k"), call.pop("positions"), **call)
    assert text in str(caught.value)


def test_rope_outside_of_a_transform_is_refused():
    with pytest.raises(VariantError, match=r"called outside of a transform.*jitgen\.rope"):
        jitgen.Rope()(Q, P)


def test_prepared_calls_still_refuse_gradients():
    q = Q.clone().requires_grad_()
    with torch.no_grad():
        jitgen.rope(q, None, P)
    with pytest.raises(GradNotSupported, match="q requires grad"):
        jitgen.rope(q, None, P)
