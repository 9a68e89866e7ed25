"""Generated kernels of rope and append: reviewed as code in tests/golden/cache_ops, tidy, every branch of the templates taken.

JITGEN_ACCEPT=1 rewrites the files; read the diff before committing it.
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path

import golden_cases
import pytest
import torch
from template_checks import assert_both_ways, assert_tidy, record_branches, template_names

import jitgen
from jitgen import portable
from jitgen.kv_hooks import trace_transform
from jitgen.kv_launch import module_path
from jitgen.kv_spec import Rotation, RowsSpec, StreamSpec, render_rows
from jitgen.render import render_kernel
from jitgen.target import cpu_target, cuda_target

GOLDEN = Path(__file__).parent.parent / "golden" / "cache_ops"
IN_DECODE = ("rotated__decode__bfloat16", "normed_rows__decode_states__float16", "slot_scales__decode__bfloat16")
weight, start, rope = torch.zeros(128), torch.zeros(8, dtype=torch.int32), jitgen.Rope()


def norm_and_rotate(k, v, b, kv_h, pos):
    return 2.0 * rope(k * torch.rsqrt((k * k).mean() + 1e-6) * weight, pos - start[b]), v


def specs() -> dict[str, RowsSpec]:
    trace = trace_transform(norm_and_rotate)
    by_slot = golden_cases.slot_scales().trace().program
    whole = {"before": trace.k.before, "after": trace.k.after, "position": trace.k.position}
    cases = {
        "rope_bfloat16": (
            (
                StreamSpec("q", "bfloat16", "bfloat16", 128, 8, rotation=Rotation(128)),
                StreamSpec("k", "bfloat16", "bfloat16", 128, 8, rotation=Rotation(128)),
            ),
            "rows",
            (),
        ),
        "rope_table_float16": (
            (StreamSpec("q", "float16", "float16", 96, 8, rotation=Rotation(64, True, "float32")),),
            "rows",
            (),
        ),
        "append_float8": (
            (
                StreamSpec("k", "bfloat16", "float8_e4m3fn", 128, 8, scale="stored", rotation=Rotation(128), **whole),
                StreamSpec("v", "bfloat16", "float8_e4m3fn", 128, 8, scale="stored"),
            ),
            "pages",
            trace.slots,
        ),
        "gather_int8": (
            (StreamSpec("v", "int8", "bfloat16", 128, 8, scale="read", before=by_slot.rows.v.before),),
            "from_pages",
            by_slot.slots,
        ),
    }
    targets = {"cpu": cpu_target("portable"), "cuda": cuda_target("9.0")}
    return {
        f"{name}__{where}": RowsSpec(streams, places, target, slots)
        for name, (streams, places, slots) in cases.items()
        for where, target in targets.items()
    }


CASES = specs()


@pytest.mark.parametrize("name", CASES)
def test_generated_source_equals_golden_file(name):
    source = render_rows(CASES[name])
    path = GOLDEN / f"{name}{source.suffix}"
    if os.environ.get("JITGEN_ACCEPT") == "1":
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(source.text)
    want = path.read_text() if path.is_file() else ""
    diff = "".join(difflib.unified_diff(want.splitlines(True), source.text.splitlines(True), path.name, "rendered"))
    assert not diff, f"{name}: generated source changed; if intended, JITGEN_ACCEPT=1 and review the diff\n{diff}"


def test_golden_directory_holds_no_stale_file():
    assert {p.name for p in GOLDEN.iterdir()} == {f"{name}{spec.target.suffix}" for name, spec in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_generated_source_is_tidy(name):
    assert_tidy(render_rows(CASES[name]).text)


@pytest.fixture(scope="module")
def branches():
    in_decode = [golden_cases.case_spec(name) for name in IN_DECODE]
    return record_branches(lambda: [*map(render_rows, CASES.values()), *map(render_kernel, in_decode)])


@pytest.mark.parametrize("template", template_names("cache_ops"))
def test_golden_cases_take_every_branch_both_ways(template, branches):
    assert_both_ways(template, branches)


@pytest.mark.parametrize("name", CASES)
def test_requests_are_recorded_and_asked_again(name):
    """What a recording keeps of a kernel is enough to build it elsewhere."""
    request = json.loads(json.dumps(portable.pack((module_path, CASES[name]))))
    function, (spec,) = portable.unpack(request)
    assert function is module_path and spec.digest == CASES[name].digest
