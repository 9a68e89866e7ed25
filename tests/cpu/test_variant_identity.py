"""When two hooks are one program and one kernel, and when not."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import jitgen
from jitgen.variant import Variant


def program_of(mask=None, **hooks):
    return Variant(**({"mask_mod": mask} if mask is not None else {}), **hooks).trace().program


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


# ---- equal maths ----

SAME = {
    "renamed parameters": lambda batch, head, row, column: column <= row,
    "other side": lambda b, h, q, k: q >= k,
    "negated": lambda b, h, q, k: ~(k > q),
    "not operator": lambda b, h, q, k: not k > q,
    "difference": lambda b, h, q, k: torch.logical_not(torch.gt(k, q)),
    "branches": lambda b, h, q, k: True if k <= q else False,
    "with itself": lambda b, h, q, k: (k <= q) & (q >= k),
    "with true": lambda b, h, q, k: (k <= q) & True,
    "where": lambda b, h, q, k: torch.where(k <= q, True, False),
    "shifted both": lambda b, h, q, k: k + h - h <= q,
    "cast": lambda b, h, q, k: k.int() <= q.to(torch.int32),
}


@pytest.mark.parametrize("name", SAME)
def test_same_maths_is_the_same_program(name):
    assert program_of(SAME[name]).id == program_of(causal).id


DIFFERENT = {
    "strict": lambda b, h, q, k: k < q,
    "swapped": lambda b, h, q, k: q <= k,
    "by head": lambda b, h, q, k: (k <= q) | (h == 0),
    "other constant": lambda b, h, q, k: k <= q + 1,
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_other_maths_is_another_program(name):
    assert program_of(DIFFERENT[name]).id != program_of(causal).id


def test_linear_sums_are_one_expression_however_written():
    window = 8
    first = program_of(lambda b, h, q, k: q - k + 3 * h - window < 2 * (h + 1))
    second = program_of(lambda b, h, q, k: h * 3 - (window + k) + q < 2 + h * 2)
    assert first.id == second.id


def test_shift_and_power_of_two_are_one_expression():
    assert program_of(lambda b, h, q, k: q >> 4 == k >> 4).id == program_of(lambda b, h, q, k: q // 16 == k // 16).id


def test_commuted_operands_are_one_expression():
    bias = torch.zeros(9)
    first = program_of(score_mod=lambda s, b, h, q, k: s * 2.0 + bias[h])
    second = program_of(score_mod=lambda s, b, h, q, k: bias[h] + 2.0 * s)
    assert first.id == second.id


SOURCE = "import torch\nWIDTH = {width}\ndef {name}(b, h, {q}, {k}):\n    return ({k} <= {q}) & ({q} - {k} < WIDTH)\n"


def module_with(**words) -> types.ModuleType:
    module = types.ModuleType(f"made_{words['name']}")
    exec(compile(SOURCE.format(**words), f"/elsewhere/{words['name']}.py", "exec"), module.__dict__)
    return module


def test_moved_file_and_renamed_function_keep_the_program():
    first = module_with(name="window", q="q_idx", k="kv_idx", width=16)
    second = module_with(name="local", q="i", k="j", width=99)
    assert program_of(first.window).id == program_of(second.local).id


def test_program_is_the_same_in_every_process():
    code = (
        "import torch, jitgen\n"
        "names = {'slope': torch.zeros(4), 'cap': 3.0, 'width': 7}\n"
        "class Norm(jitgen.OnlineNorm):\n"
        "    state = {'total': 0.0, 'count': 1.0}\n"
        "    def update(self, s, st): return s, 1.0, {'count': st['count'], 'total': st['total'] + jitgen.row_sum(s)}\n"
        "print(jitgen.Variant(score_mod=lambda s, b, h, q, k: s * names['slope'][h] + names['cap'],"
        " mask_mod=lambda b, h, q, k: (k <= q) & (q - k < names['width']) | (k in (1, 2, 3)), softmax=Norm)"
        ".trace().program.id)\n"
    )
    ids = set()
    for seed in ("0", "1", "4242"):
        run = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        ids.add(run.stdout.strip())
    assert len(ids) == 1 and len(ids.pop()) == 32


# ---- captured values ----


def test_changed_scalar_keeps_the_program_and_is_passed_on():
    window = 16

    def mask(b, h, q, k):
        return q - k < window

    variant = Variant(mask_mod=mask)
    first = variant.trace()
    window = 99
    second = variant.trace()
    assert second.program is first.program and first.values() == [16] and second.values() == [99]


def test_scalar_that_outgrows_its_type_is_another_program():
    window = 16

    def mask(b, h, q, k):
        return q - k < window

    small = program_of(mask)
    window = 2**40
    large = program_of(mask)
    window = 4.5
    real = program_of(mask)
    assert len({small.id, large.id, real.id}) == 3
    assert [p.slots[0].dtype for p in (small, large, real)] == ["i32", "i64", "f32"]


def test_static_value_is_part_of_the_program():
    def with_width(width):
        return program_of(lambda b, h, q, k: q - k < width)

    assert with_width(jitgen.static(8)).id != with_width(jitgen.static(9)).id
    assert with_width(jitgen.static(8)).slots == ()
    assert with_width(8).id == with_width(9).id


def test_number_that_python_needs_is_part_of_the_program():
    def with_count(count):
        def mask(b, h, q, k):
            keep = k <= q
            for i in range(count):
                keep = keep | (k == 7 * i)
            return keep

        return program_of(mask)

    assert with_count(2).id != with_count(3).id and with_count(2).id == with_count(2).id


def test_captured_bool_steers_python():
    def with_flag(flag):
        return program_of(lambda b, h, q, k: (k <= q) if flag else (k >= q))

    assert with_flag(True).id == program_of(causal).id != with_flag(False).id


WIDTH = 5
LIMITS = types.SimpleNamespace(low=2, high=9)


def test_rebound_global_is_noticed():
    global WIDTH
    variant = Variant(mask_mod=lambda b, h, q, k: q - k < WIDTH)
    first, before = variant.trace(), WIDTH
    WIDTH = 6
    try:
        assert variant.trace().values() == [6] and variant.trace().program is first.program
        WIDTH = 6.5
        assert variant.trace().program.id != first.program.id
    finally:
        WIDTH = before


def helper(q, k):
    return k <= q


def test_rebound_global_function_is_noticed(monkeypatch):
    variant = Variant(mask_mod=lambda b, h, q, k: helper(q, k))
    assert variant.trace().program.id == program_of(causal).id
    monkeypatch.setitem(globals(), "helper", lambda q, k: k < q)
    assert variant.trace().program.id == program_of(DIFFERENT["strict"]).id


def test_changed_attribute_and_item_are_noticed():
    sizes = {"window": 3, "rest": (1, [2])}
    variant = Variant(mask_mod=lambda b, h, q, k: (q - k < sizes["window"]) & (k > LIMITS.low) & (k < sizes["rest"][1][0]))
    program = variant.trace().program
    sizes["window"], sizes["rest"][1][0] = 30, 20
    again = variant.trace()
    assert again.program is program and sorted(again.values()) == [2, 20, 30]


def test_changed_code_of_a_helper_is_noticed():
    def inner(q, k):
        return k <= q

    variant = Variant(mask_mod=lambda b, h, q, k: inner(q, k))
    first = variant.trace().program.id
    inner.__code__ = (lambda q, k: k <= q + 1).__code__
    assert variant.trace().program.id != first


@pytest.mark.parametrize(
    "number, dtype",
    [(np.int64(5), "i32"), (np.float32(0.5), "f32"), (torch.tensor(5), "i32"), (torch.tensor(0.5), "f32"), (7, "i32")],
    ids=["numpy int", "numpy float", "int tensor", "float tensor", "int"],
)
def test_number_of_any_kind_is_a_launch_argument(number, dtype):
    traced = Variant(mask_mod=lambda b, h, q, k: q - k < number).trace()
    assert [s.kind for s in traced.program.slots] == ["scalar"] and traced.program.slots[0].dtype == dtype
    assert traced.values() == [float(number)]


@pytest.mark.parametrize("flag", [np.bool_(True), torch.tensor(True), True], ids=["numpy", "tensor", "python"])
def test_bool_of_any_kind_can_be_used_in_arithmetic(flag):
    keep = Variant(mask_mod=lambda b, h, q, k: (k <= q) & flag).trace()
    assert jitgen.reference.mask_of(keep.program, keep.values(), q_len=3, kv_len=3)[0, 0].sum() == 6


def test_tensor_content_and_size_keep_the_program_and_dtype_rank_and_layout_do_not():
    def with_table(table):
        return program_of(lambda b, h, q, k: table[q, k] > 0)

    first = with_table(torch.zeros(4, 4))
    assert with_table(torch.ones(9, 7)).id == first.id
    assert with_table(torch.zeros(4, 4, dtype=torch.float16)).id != first.id
    assert with_table(torch.zeros(4, 4).t()[:3]).id != first.id
    assert with_table(torch.zeros(1, 4).expand(4, 4)).id != first.id


def test_renamed_capture_keeps_the_program():
    def with_name_a(slopes):
        return program_of(score_mod=lambda s, b, h, q, k: s + slopes[h])

    def with_name_b(other):
        return program_of(score_mod=lambda s, b, h, q, k: s + other[h])

    assert with_name_a(torch.zeros(4)).id == with_name_b(torch.zeros(4)).id


def test_unused_capture_is_no_launch_argument():
    noise = torch.zeros(4)

    def mask(b, h, q, k):
        noise.shape  # noqa: B018
        return k <= q

    assert program_of(mask).slots == ()


def test_bind_replaces_by_name_without_tracing():
    slopes = torch.zeros(4)
    variant = Variant(score_mod=lambda s, b, h, q, k: s + slopes[h])
    bound = variant.bind(slopes=torch.ones(4))
    assert bound.trace().program.id == variant.trace().program.id
    assert torch.equal(bound.trace().values()[0], torch.ones(4)) and torch.equal(variant.trace().values()[0], slopes)
