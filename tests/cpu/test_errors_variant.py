"""What cannot be expressed is refused where it is defined: file and line, what was found, how to write it."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

import jitgen
from jitgen.errors import UnsupportedVariant, VariantError

TABLE = torch.zeros(8, 8)
LONG_ROW = torch.zeros(300)


def refused_line(function) -> int:
    """The line marked ``# here``, else the one that defines the function."""
    lines, first = inspect.getsourcelines(function)
    marked = [i for i, line in enumerate(lines) if "# here" in line]
    return first + (marked[0] if marked else next(i for i, line in enumerate(lines) if line.lstrip().startswith("def ")))


# ---- hooks that do what a kernel cannot ----


def loop_bound(b, h, q, k):
    keep = k == q
    for i in range(q // 64):  # here
        keep = keep | (k == i)
    return keep


def loop_over_value(b, h, q, k):
    for _ in q:  # here
        pass
    return k <= q


def math_function(b, h, q, k):
    return math.sqrt(q - k) < 3  # here


def float_of_index(b, h, q, k):
    return float(q) < 3.0  # here


def int_of_index(b, h, q, k):
    return int(q) % 2 == 0  # here


def cumulative(b, h, q, k):
    return torch.cumsum(q, 0) > k  # here


def unknown_function(b, h, q, k):
    return torch.linalg.det(q) > k  # here


def unknown_method(b, h, q, k):
    return q.kthvalue(2) > k  # here


def sorting(b, h, q, k):
    return torch.sort(q).values > k  # here


def random_number(b, h, q, k):
    return torch.rand_like(q) > 0.5  # here


def drawn_number(b, h, q, k):
    return (torch.rand(()) > 0.5) & (k <= q)  # here


def in_place(b, h, q, k):
    return q.add_(1) > k  # here


def in_place_operator(b, h, q, k):
    TABLE[q] = 1  # here
    return k <= q


def matrix_product(b, h, q, k):
    return (TABLE[0] @ TABLE[q]) > 0  # here


def item_of_index(b, h, q, k):
    return k <= q.item()  # here


def positions_of(b, h, q, k):
    return torch.where(q > k)[0] > 0  # here


def nonzero(b, h, q, k):
    return torch.nonzero(q) > k  # here


def tensor_of_value(b, h, q, k):
    return torch.tensor([q, k]).sum() > 0  # here


def large_tensor_inside(b, h, q, k):
    return torch.arange(1000)[q] > k  # here


def float_index(b, h, q, k):
    return TABLE[q * 0.5, k] > 0  # here


def bool_index(b, h, q, k):
    return TABLE[q > k, k] > 0  # here


def too_many_indices(b, h, q, k):
    return TABLE[b, q, k] > 0  # here


def long_row(b, h, q, k):
    return (LONG_ROW == k).any()  # here


def two_axes_left(b, h, q, k):
    return (TABLE == k).any()  # here


def rows_of_two_lengths(b, h, q, k):
    return (TABLE[q] == LONG_ROW[:5]).any()  # here


def truth_of_row(b, h, q, k):
    return True if TABLE[q] == k else False  # here


def contains(b, h, q, k):
    return k in TABLE[0]  # here


def bits_of_float(b, h, q, k):
    return (q / 2) & 1 == 0  # here


def minus_of_bools(b, h, q, k):
    return (q > k) - (q < k)  # here


def round_digits(b, h, q, k):
    return round(q / 3, 2) > 1  # here


def double_precision(b, h, q, k):
    return q.to(torch.complex64) == k  # here


def reshaped(b, h, q, k):
    return TABLE.reshape(64)[q] > k  # here


def raising(b, h, q, k):
    if k > q:
        raise ValueError("no key after the query")  # here
    return True


def helper_that_fails(q):
    return math.exp(q)  # the line of the helper is the one that is named


def through_helper(b, h, q, k):
    return helper_that_fails(q) > k


def returns_nothing(b, h, q, k):
    k <= q  # noqa: B015


def returns_float(b, h, q, k):
    return (q - k) * 0.5


def returns_string(b, h, q, k):
    return "causal"


def returns_row(b, h, q, k):
    return TABLE[q] > 0


def generator(b, h, q, k):
    yield k <= q


REFUSED = [
    (
        loop_bound,
        r"loop bound depends on q_idx: for i in range\(q // 64\).*Use a captured int, or select entries with torch",
    ),
    (loop_over_value, r"single number, got a loop over an expression of q_idx\. Loop over a static range"),
    (math_function, r"math\.sqrt needs a number but got an expression of kv_idx, q_idx\. Use torch\.sqrt"),
    (float_of_index, r"Python needs float\(\) of an expression of q_idx.*Use x\.float\(\)"),
    (int_of_index, r"Python needs int\(\) of an expression of q_idx.*Use x\.int\(\)"),
    (
        cumulative,
        r"unsupported op torch\.cumsum on a traced value\. Precompute it as a tensor and index it: c\[b, h, q_idx\]",
    ),
    (unknown_function, r"unsupported op torch\.(linalg_)?det on a traced value"),
    (unknown_method, r"unsupported op Tensor\.kthvalue on a traced value\. Write it with elementwise torch ops"),
    (sorting, r"unsupported op torch\.sort on a traced value"),
    (drawn_number, r"torch\.rand would be drawn once, when the hook is traced\. Draw outside, and index the tensor"),
    (random_number, r"unsupported op torch\.rand_like on a traced value\. A hook must be pure"),
    (in_place, r"in-place op Tensor\.add_ on a traced value\. Hooks are pure: write x = x\.add\("),
    (in_place_operator, r"an element of a captured tensor or traced value is assigned.*torch\.where\(cond, new, old\)"),
    (matrix_product, r"unsupported op matmul \(@\).*torch\.dot"),
    (item_of_index, r"\.item\(\) of a traced value, which is known only in the kernel"),
    (positions_of, r"torch\.where\(cond\) lists positions.*torch\.where\(cond, a, b\)"),
    (nonzero, r"unsupported op torch\.nonzero"),
    (tensor_of_value, r"torch\.tensor cannot hold a traced value: use the value itself, or torch\.stack"),
    (
        large_tensor_inside,
        r"tensor of shape \(1000,\) made inside the hook is indexed\. Make it outside the hook and capture it",
    ),
    (
        float_index,
        r"captured tensor 'TABLE' is indexed with a f32 value, expected an integer\. Convert it with \.long\(\)",
    ),
    (bool_index, r"captured tensor 'TABLE' is indexed with a bool value, expected an integer"),
    (too_many_indices, r"captured tensor 'TABLE' has 2 axes left, got 3 indices"),
    (long_row, r"a row of 300 values of captured tensor 'LONG_ROW' is used in arithmetic, limit 256"),
    (two_axes_left, r"captured tensor 'TABLE' is used with 2 axes not indexed, shape \(8, 8\)"),
    (rows_of_two_lengths, r"rows of lengths \[5, 8\] were combined"),
    (truth_of_row, r"a row of 8 values has no single truth value\. Reduce it with \.any\(-1\)"),
    (contains, r"'in' on a traced value or captured tensor has no single answer"),
    (bits_of_float, r"bitwise operator on a float: got f32 and i32; compare the values first"),
    (minus_of_bools, r"'-' is not defined on two bools"),
    (round_digits, r"round\(x, 2\) is not available"),
    (double_precision, r"conversion of a traced value to torch\.complex64"),
    (reshaped, r"change of shape of SymTensor\(TABLE, 2 axes left\)"),
    (raising, r"raised ValueError when \(q_idx < kv_idx\): no key after the query"),
    (returns_nothing, r"mask_mod 'returns_nothing' returned nothing \(None\)\. Return the value"),
    (
        returns_float,
        r"mask_mod 'returns_float' returned f32, expected bool\. Compare the value, or put the bias in score_mod",
    ),
    (returns_string, r"mask_mod 'returns_string' returned 'causal' of type str, expected bool"),
    (returns_row, r"mask_mod 'returns_row' returned a row of 8 values, expected one\. Reduce it"),
    (generator, r"'generator' is a generator or coroutine, expected a plain function"),
]


@pytest.mark.parametrize("mask, message", REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_mask_is_refused_at_the_users_line(mask, message):
    with pytest.raises(UnsupportedVariant, match=message) as raised:
        jitgen.Variant(mask_mod=mask)
    assert (raised.value.file, raised.value.line) == (__file__, refused_line(mask))
    assert str(raised.value).startswith(f"{__file__}:{raised.value.line}: ")


def test_line_of_a_helper_is_named():
    with pytest.raises(UnsupportedVariant, match=r"math\.exp needs a number.*Use torch\.exp") as raised:
        jitgen.Variant(mask_mod=through_helper)
    assert raised.value.line == inspect.getsourcelines(helper_that_fails)[1] + 1


def test_raw_function_is_refused_like_a_variant():
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(UnsupportedVariant, match="loop bound depends on q_idx") as raised:
        jitgen.attention(q, q, q, mask_mod=loop_bound)
    assert raised.value.line == refused_line(loop_bound)


def test_assert_on_an_index_is_refused():
    scope: dict = {}
    exec(compile("def mask(b, h, q, k):\n    assert k <= q\n    return k < 3\n", "user.py", "exec"), scope)
    with pytest.raises(
        UnsupportedVariant, match=r"asserts on values known only in the kernel.*mask with torch\.where"
    ) as raised:
        jitgen.Variant(mask_mod=scope["mask"])
    assert (raised.value.file, raised.value.line) == ("user.py", 2)


class OfOneLogit(jitgen.OnlineNorm):
    """Takes the maximum of a logit for that of the row."""

    state = {"m": -float("inf")}  # noqa: RUF012

    def update(self, score, state):
        m = torch.maximum(state["m"], score.max())
        return torch.exp(score - m), torch.exp(state["m"] - m), {"m": m}


class SumOfOneLogit(jitgen.OnlineNorm):
    state = {"s": 0.0}  # noqa: RUF012

    def update(self, score, state):
        return score, 1.0, {"s": state["s"] + score.sum()}


@pytest.mark.parametrize("norm, what", [(OfOneLogit, "factor"), (SumOfOneLogit, "state 's'")])
def test_norm_whose_state_differs_from_key_to_key_is_refused(norm, what):
    with pytest.raises(VariantError, match=f"the norm's {what} differs from key to key.*jitgen.row_max or jitgen.row_sum"):
        jitgen.Variant(softmax=norm)
