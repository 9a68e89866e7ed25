"""CUDA modules compiled without a GPU: no spill, no local memory, and the tensor-core instructions they are written for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from compiling import code_for, compile_source
from disassembly import disassemble
from norm_cases import Sigmoid

import jitgen
from jitgen import toolchain
from jitgen.families import cuda_spec
from jitgen.render import render_kernel
from jitgen.target import cuda_target

ARCHS = ("80", "90")
MAX_REGISTERS = 255
REGISTER_FILE = 65536  # 32-bit registers of one multiprocessor, sm_80 to sm_90
# Bytes a thread may spill, by head dim. At 128 a tile of 64 keys fills the registers; tiles of 48 and 32 keys spill nothing
# and were 3 to 15 % slower on an H100.
SPILL = {128: 128}
LOCAL_SHARE = 0.04  # of the instructions may touch local memory where spilling is allowed
SASS = {"HMMA": "mma.sync", "LDSM": "ldmatrix", "LDGSTS": "cp.async"}

pytestmark = pytest.mark.skipif(
    toolchain.find_toolkit() is None or toolchain.find_cxx() is None,
    reason="no complete CUDA toolkit (see 'jitgen doctor')",
)


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def plain() -> jitgen.Variant:
    return jitgen.Variant()


def causal_only() -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal)


def soft_cap_window() -> jitgen.Variant:
    cap, window = 50.0, 1024
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: cap * torch.tanh(s / cap),
        mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < window),
    )


def alibi() -> jitgen.Variant:
    slopes = torch.zeros(32)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + slopes[h] * (kv_idx - q_idx), mask_mod=causal)


def document() -> jitgen.Variant:
    doc = torch.zeros(8192, dtype=torch.int32)
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (doc[q_idx] == doc[kv_idx]) & (kv_idx <= q_idx))


def dense_bias() -> jitgen.Variant:
    """A form to which ptxas gave 32 registers on sm_90."""
    bias = torch.zeros(2, 256, 256, dtype=torch.bfloat16)
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[h, q_idx, kv_idx], mask_mod=causal)


def sink() -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal, sink=torch.zeros(32))


def sigmoid() -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal, softmax=Sigmoid)


def unit_rows() -> jitgen.Variant:
    return jitgen.Variant(output_transform=lambda o, lse, b, h, q_idx: o * torch.rsqrt(jitgen.row_sum(o * o) + 1e-6))


MODULES = [
    (causal_only, "bfloat16", 64, 64),
    (causal_only, "bfloat16", 128, 128),
    (causal_only, "bfloat16", 256, 256),
    (plain, "float16", 96, 96),
    (causal_only, "bfloat16", 192, 128),
    (soft_cap_window, "bfloat16", 128, 128),
    (soft_cap_window, "bfloat16", 256, 256),
    (alibi, "float16", 128, 128),
    (document, "bfloat16", 64, 64),
    (dense_bias, "bfloat16", 128, 128),
    (sink, "bfloat16", 64, 64),
    (sigmoid, "bfloat16", 128, 128),
    (causal_only, "bfloat16", 512, 512),
    (plain, "float16", 512, 512),
    (document, "bfloat16", 512, 512),
    (sigmoid, "bfloat16", 512, 512),
    (unit_rows, "bfloat16", 512, 512),
]


def compile_both(make, dtype, head_dim, head_dim_v, directory: Path) -> tuple[object, Path, str]:
    """Compile one module for both architectures: spec, fat binary, what ptxas says."""
    spec = cuda_spec(make().trace().program, dtype, (head_dim, head_dim_v), "sm80", cuda_target("8.0"))
    source = render_kernel(spec)
    return spec, *compile_source(source, directory, *code_for(*ARCHS), "--threads=2", "-fatbin")


def name_of(case) -> str:
    make, dtype, head_dim, head_dim_v = case
    return f"{make.__name__}-{dtype}-hd{head_dim}" + (f"_{head_dim_v}" if head_dim_v != head_dim else "")


@pytest.fixture(scope="module", params=MODULES, ids=name_of)
def module(request, tmp_path_factory):
    return compile_both(*request.param, tmp_path_factory.mktemp("module"))


def test_module_spills_no_more_than_its_head_dim_allows(module):
    spec, _, output = module
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", output)
    assert len(spills) >= len(ARCHS), output
    assert max(int(n) for found in spills for n in found) <= SPILL.get(spec.head_dim, 0), output


def test_module_fits_the_register_file(module):
    spec, _, output = module
    used = [int(n) for n in re.findall(r"Used (\d+) registers", output)]
    limit = min(MAX_REGISTERS, REGISTER_FILE // (32 * spec.tiles.num_warps))
    assert len(used) >= len(ARCHS), output
    assert max(used) <= limit


def test_module_uses_tensor_cores_and_asynchronous_copies(module):
    spec, binary, _ = module
    for arch in ARCHS:
        sass = disassemble(binary, "-arch", f"sm_{arch}")
        missing = [f"{name} ({ptx})" for name, ptx in SASS.items() if not re.search(rf"\b{name}\b", sass)]
        assert not missing, f"sm_{arch} has no {', '.join(missing)}"
        local, all_of_it = (
            len(re.findall(r"\b(?:LDL|STL)\b", sass)),
            len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)),
        )
        assert local <= (LOCAL_SHARE * all_of_it if spec.head_dim in SPILL else 0), (
            f"sm_{arch}: {local} of {all_of_it} use local memory"
        )
