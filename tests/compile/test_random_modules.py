"""Variants drawn at random through every CUDA template, compiled to PTX: names that nobody defines, types that clash."""

from __future__ import annotations

import random
import subprocess
from dataclasses import replace

import pytest
from compiling import write_source
from random_variants import Draw

from jitgen import toolchain
from jitgen.families import cuda_spec
from jitgen.kv_decode import rows_in_decode, with_value_factor
from jitgen.loader import quick_options
from jitgen.program import without_rows
from jitgen.render import render_kernel
from jitgen.serving_place import ChosenLists, place
from jitgen.target import cuda_target

pytestmark = pytest.mark.skipif(
    toolchain.find_toolkit() is None or toolchain.find_cxx() is None,
    reason="no complete CUDA toolkit (see 'jitgen doctor')",
)

ARCHS = {"sm80": "8.0", "sm90": "9.0a", "sm90_fp8": "9.0a", "decode": "9.0a"}
KERNELS = [
    ("sm90", "dense"), ("sm80", "dense"), ("sm90", "ragged"), ("sm90", "paged"), ("sm90", "chosen"),
    ("sm80", "paged"), ("sm80", "ragged"), ("decode", "paged"), ("decode", "chosen"), ("sm90_fp8", "dense"),
]  # fmt: skip


def drawn_spec(seed: int, family: str, layout: str):
    """A kernel for a variant of this seed, and the names of its terms."""
    choose = random.Random(seed)
    head_dim = choose.choice([64, 128, 256] if family == "sm90_fp8" else [64, 96, 128, 192, 256])
    dtype = "float8_e4m3fn" if family == "sm90_fp8" else choose.choice(["bfloat16", "float16"])
    draw = Draw(seed, 4, 200, 200 if layout == "dense" else 0, 2)
    program = draw.variant(rows=(family, layout) == ("decode", "paged")).trace().program
    if layout == "chosen":
        program = place(program, ChosenLists(16, is_even=choose.random() < 0.5))[0]
    elif layout != "dense" and choose.random() < 0.3:
        program = place(program)[0]
    program = with_value_factor(program) if family == "decode" else program
    target = cuda_target(ARCHS[family])
    dims, layout = (head_dim, head_dim), "paged" if layout == "chosen" else layout
    spec = cuda_spec(without_rows(program), dtype, dims, family, target, layout=layout, kv_dtype="")
    if program.rows is not None and program.rows.changes_keys:
        spec = replace(spec, rows=rows_in_decode(program, dtype, *dims))
    return spec, draw.names


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family, layout", KERNELS)
def test_a_drawn_variant_compiles(family, layout, seed, tmp_path):
    spec, names = drawn_spec(100 * KERNELS.index((family, layout)) + seed, family, layout)
    write_source(render_kernel(spec), tmp_path)
    arch = ARCHS[family].replace(".", "")
    toolkit = toolchain.require_toolkit()
    command = [str(toolkit.nvcc), "-ccbin", str(toolchain.require_cxx().path), "-std=c++17", *quick_options(toolkit, tmp_path)]
    command += ["-Werror=all-warnings", "-Xcicc", "-O0", "-ptx", f"-arch=compute_{arch}", f"-I{tmp_path / 'include'}"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "kernel.ptx"), str(tmp_path / "kernel.cu")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=toolchain.clean_environment(),
    )  # fmt: skip
    assert done.returncode == 0, f"{names}\n{done.stdout}"
