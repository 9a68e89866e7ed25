"""Python control flow in hooks: what forks, what does not, what it is traced into."""

from __future__ import annotations

import pytest
import torch

import jitgen
from jitgen.ir import walk
from jitgen.ir_text import to_text
from jitgen.reference import mask_of

Q_LEN, KV_LEN, HEADS = 11, 17, 3
LIMIT = 5


def mask_program(mask):
    return jitgen.Variant(mask_mod=mask).trace()


def traced_mask(mask) -> torch.Tensor:
    traced = mask_program(mask)
    return mask_of(traced.program, traced.values(), num_q_heads=HEADS, q_len=Q_LEN, kv_len=KV_LEN, q_offset=3)[0]


def plain_mask(mask) -> torch.Tensor:
    """The mask called with plain Python ints."""
    rows = [[[bool(mask(0, h, q + 3, k)) for k in range(KV_LEN)] for q in range(Q_LEN)] for h in range(HEADS)]
    return torch.tensor(rows)


def if_else(b, h, q, k):
    if k <= q:
        return q - k < LIMIT
    else:
        return k == 16


def elif_chain(b, h, q, k):
    if h == 0:
        return k <= q
    elif h == 1:
        return k >= q
    return k % 2 == 0


def ternary(b, h, q, k):
    return (k < 3) if q > 7 else (k > 9)


def and_or_not(b, h, q, k):
    return k <= q and not (k % 3 == 0 or q % 4 == 1)


def chained_comparison(b, h, q, k):
    return 0 <= q - k < LIMIT


def min_max(b, h, q, k):
    return max(q, 4) - min(k, 9) > 2


def early_return(b, h, q, k):
    if k > q:
        return False
    if k < 2:
        return True
    return q - k <= LIMIT


def static_loop(b, h, q, k):
    keep = k == q
    for i in range(1, 4):
        keep = keep | (k == q - 2 * i)
    return keep


def loop_with_break(b, h, q, k):
    for step in (1, 2, 4):
        if (q - k) % step != 0:
            return False
        if step == h + 1:
            break
    return k <= q


def loop_over_captured_list(b, h, q, k):
    return any(low <= k < low + 2 for low in STARTS)


def nested_function(b, h, q, k):
    def near(x, y):
        return abs(x - y) <= 2

    return near(q, k) or near(q, k + 7)


def while_loop(b, h, q, k):
    step, keep = 1, False
    while step < 9:
        keep = keep or k == q - step
        step *= 2
    return keep


def bool_of_int(b, h, q, k):
    return not k % 3 and bool(q - k)


STARTS = [1, 6, 12]
HOOKS = [
    if_else,
    elif_chain,
    ternary,
    and_or_not,
    chained_comparison,
    min_max,
    early_return,
    static_loop,
    loop_with_break,
    loop_over_captured_list,
    nested_function,
    while_loop,
    bool_of_int,
]


@pytest.mark.parametrize("mask", HOOKS, ids=lambda f: f.__name__)
def test_control_flow_means_what_it_means_on_numbers(mask):
    want = plain_mask(mask)
    assert torch.equal(traced_mask(mask), want)
    assert want.any() and not want.all()


def test_score_branches_join_to_one_expression():
    def score(s, b, h, q, k):
        if s > 0 and k <= q:
            return s * 2
        return s if h == 0 else s - 1

    program = jitgen.Variant(score_mod=score).trace().program
    assert program.mask is None and sum(n.op == "where" for n in walk(program.score)) == 3


def test_condition_settled_on_the_way_does_not_fork_again():
    def mask(b, h, q, k):
        if k <= q:
            return k <= q and not (k > q)  # decided already
        return False

    assert to_text(mask_program(mask).program.mask) == "(kv_idx <= q_idx)"


@pytest.mark.parametrize("width", [3, 40])
def test_condition_on_captured_numbers_alone_is_decided_now_and_watched(width):
    def mask(b, h, q, k):
        if width > 16:  # not compiled in as such: only its outcome is
            return k <= q
        return (k <= q) & (q - k < width)

    first = mask_program(mask).program
    assert ("q_idx - kv_idx" in to_text(first.mask)) == (width <= 16)
    before, width = width, 17 if width > 16 else 16
    assert mask_program(mask).program.id == first.id
    width = 40 if before <= 16 else 3
    assert mask_program(mask).program.id != first.id


def test_assert_on_captured_numbers_is_checked_when_traced():
    source = "def mask(b, h, q, k):\n    assert step > 0, 'a step is needed'\n    return k % step == 0\n"
    scope: dict = {"step": 4}
    exec(source, scope)  # not written here, because pytest rewrites asserts
    assert mask_program(scope["mask"]).program.mask is not None
    scope["step"] = 0
    with pytest.raises(jitgen.errors.UnsupportedVariant, match="raised AssertionError: a step is needed"):
        mask_program(scope["mask"])


def test_sixty_four_paths_are_the_limit():
    def mask(paths):
        def mask(b, h, q, k):
            keep = True
            for i in range(paths):
                if q == 100 + i:
                    keep = k < i
                    break
            return keep

        return mask

    assert mask_program(mask(63)).program.mask is not None  # 64 ways: one a branch, one for none of them
    with pytest.raises(jitgen.errors.UnsupportedVariant, match=r"traced 65 control-flow paths, limit 64.*torch\.where"):
        mask_program(mask(64))


def test_independent_branches_multiply_and_are_refused():
    def mask(b, h, q, k):
        total = k
        for i in range(7):
            if (q + k) % (i + 2) == 0:
                total = total + 1
        return total > 3

    with pytest.raises(jitgen.errors.UnsupportedVariant, match="control-flow paths, limit 64"):
        mask_program(mask)
