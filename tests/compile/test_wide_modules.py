"""Prefill modules of head dim 512, whose rows two warps share: shared memory, registers and instructions for each target."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from compiling import code_for, compile_source
from disassembly import disassemble
from test_cuda_modules import alibi, causal_only, dense_bias, document, plain, sigmoid, soft_cap_window, unit_rows
from test_prefill_modules import every_hook, merged_softmax, slot_scales, window_per_head

from jitgen import toolchain
from jitgen.families import cuda_spec
from jitgen.render import render_kernel
from jitgen.target import cuda_target
from jitgen.tiles_decode import shared_kib

OTHER_BYTES = 2048  # of shared memory, that are no part of kSharedBytes: pieces, and what warps tell each other of rows
SPILL = 48  # of the kernels of plans
HOOKS = (plain, causal_only, soft_cap_window, alibi, document, sigmoid, every_hook, merged_softmax, unit_rows)
CASES = [
    *(("sm90_wide", "9.0a", layout, make) for layout in ("dense", "paged", "ragged") for make in HOOKS),
    *(("sm90_wide", "9.0a", "dense", make) for make in (dense_bias,)),
    *(("sm90_wide", "9.0a", "paged", make) for make in (window_per_head, slot_scales)),
    *(("sm80", "9.0", "dense", make) for make in HOOKS),
    *(("sm80", "8.6", layout, make) for layout in ("dense", "paged") for make in (causal_only, every_hook)),
    *(("sm80", "10.0", layout, make) for layout in ("dense", "ragged") for make in (causal_only,)),
]

pytestmark = pytest.mark.skipif(
    toolchain.find_toolkit() is None or toolchain.find_cxx() is None,
    reason="no complete CUDA toolkit (see 'jitgen doctor')",
)


@pytest.mark.parametrize("family, arch, layout, make", CASES)
def test_module_fits_its_target(family, arch, layout, make, tmp_path):
    target = cuda_target(arch)
    spec = cuda_spec(make().trace().program, "bfloat16", (512, 512), family, target, layout=layout)
    source = render_kernel(spec)
    room = shared_kib(target) * 1024 - OTHER_BYTES
    source = replace(source, text=f"{source.text}\nstatic_assert(kSharedBytes <= {room});\n")
    binary, output = compile_source(source, tmp_path, *code_for(arch.replace(".", "")))
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", output)
    allowed = 0 if layout == "dense" else SPILL
    assert spills and max(int(n) for found in spills for n in found) <= allowed, output
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", output)]
    assert max(registers) * 32 * spec.tiles.num_warps <= 65536
    assert not re.findall(r".*C75\d\d.*", output)
    product = "HGMMA" if family == "sm90_wide" else "HMMA"
    sass = disassemble(binary)
    assert product in sass and "LDGSTS" in sass
