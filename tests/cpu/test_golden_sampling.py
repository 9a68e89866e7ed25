"""Generated sampling kernels: reviewed as code in tests/golden/sampling, tidy, and every branch of their templates taken.

JITGEN_ACCEPT=1 rewrites the files; read the diff before committing it.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import pytest
import torch
from template_checks import assert_both_ways, assert_tidy, record_branches, template_names

from jitgen.program import Program
from jitgen.sampling_hooks import trace_processors
from jitgen.sampling_spec import SamplingSpec, render_sampling
from jitgen.target import CompileTarget, cpu_target, cuda_target

GOLDEN = Path(__file__).parent.parent / "golden" / "sampling"
bias = torch.zeros(8)


def add_bias(logit, token, row):
    return logit + bias[token]


def processed() -> Program:
    return trace_processors([add_bias]).program


def specs() -> dict[str, SamplingSpec]:
    """Cases by name; each pair of a CPU and a CUDA case differs in the target only."""
    cases = {
        "logits_float32": ("sample", "float32", {}),
        "every_filter_bfloat16": (
            "sample",
            "bfloat16",
            {"has_top_k": True, "has_top_p": True, "has_min_p": True, "top_k_first": True, "program": processed()},
        ),
        "renorm_float16": ("probs", "float16", {"from_probs": True, "has_top_p": True, "out_dtype": "float32"}),
        "mask_float32": ("mask", "float32", {"has_top_k": True, "out_dtype": "float32"}),
        "process_float32": ("process", "float32", {"out_dtype": "float32", "program": processed()}),
        "verify_float32": ("verify", "float32", {"from_probs": True}),
        "verify_bfloat16": ("verify", "bfloat16", {"from_probs": True}),
    }
    targets: dict[str, CompileTarget] = {"cpu": cpu_target("portable"), "sm90": cuda_target("9.0")}
    return {
        f"{name}__{where}": SamplingSpec(op, dtype, target, **options)
        for name, (op, dtype, options) in cases.items()
        for where, target in targets.items()
    }


CASES = specs()


@pytest.mark.parametrize("name", CASES)
def test_generated_source_equals_golden_file(name):
    source = render_sampling(CASES[name])
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
    assert_tidy(render_sampling(CASES[name]).text)


@pytest.fixture(scope="module")
def branches():
    return record_branches(lambda: [render_sampling(spec) for spec in CASES.values()])


@pytest.mark.parametrize("template", template_names("sampling"))
def test_golden_cases_take_every_branch_both_ways(template, branches):
    assert_both_ways(template, branches)
