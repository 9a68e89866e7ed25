"""Sampling kernels compiled without a GPU: no spill, registers for two CTAs a multiprocessor, wide loads, no float atomics."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from disassembly import disassemble

from jitgen import toolchain
from jitgen.sampling_hooks import resolve_processors
from jitgen.sampling_processors import Penalties, bitmask_processor
from jitgen.sampling_spec import SamplingSpec, render_sampling
from jitgen.target import cuda_target

ARCHS = ("8.0", "9.0")
REGISTER_FILE = 65_536  # of a multiprocessor; a thread gets a multiple of 8
# Bytes a thread may spill: a stream of float32 rows spills in the draw at its end, see _is_thin_stream in sampling_spec.py.
SPILL = {"sample": 24}

pytestmark = pytest.mark.skipif(
    toolchain.find_toolkit() is None or toolchain.find_cxx() is None,
    reason="no complete CUDA toolkit (see 'jitgen doctor')",
)


def fused_processors() -> tuple:
    """Penalties, a function of the user's and a bitmask, all at once."""
    counts, bits = torch.zeros(4, 1000, dtype=torch.int32), torch.zeros(4, 32, dtype=torch.int32)
    penalties = Penalties(counts, counts > 0, torch.ones(4), torch.zeros(4), 0.5)
    return penalties.processor(), lambda logit, token, row: 30.0 * torch.tanh(logit / 30.0), bitmask_processor(bits, 1000)


MODULES = {
    "sample": {"op": "sample", "dtype": "float32"},
    "sample_probs": {"op": "sample", "dtype": "float32", "from_probs": True},
    "sample_bf16": {"op": "sample", "dtype": "bfloat16"},
    "sample_bf16_k_then_p": {"op": "sample", "dtype": "bfloat16", "has_top_k": True, "has_top_p": True, "top_k_first": True},
    "sample_probs_all": {
        "op": "sample", "dtype": "float32", "from_probs": True, "has_top_k": True, "has_top_p": True, "has_min_p": True,
    },
    "sample_processed": {"op": "sample", "dtype": "float16", "has_top_p": True, "program": fused_processors},
    "softmax": {"op": "probs", "dtype": "bfloat16", "out_dtype": "float32"},
    "renorm": {"op": "probs", "dtype": "float32", "out_dtype": "float32", "from_probs": True, "has_top_p": True},
    "mask": {"op": "mask", "dtype": "float16", "out_dtype": "float16", "has_top_k": True},
    "process": {"op": "process", "dtype": "bfloat16", "out_dtype": "bfloat16", "program": fused_processors},
    "verify": {"op": "verify", "dtype": "float32", "from_probs": True},
    "verify_bf16": {"op": "verify", "dtype": "bfloat16", "from_probs": True},
}  # fmt: skip


def compile_module(options: dict, arch: str, directory: Path) -> tuple[SamplingSpec, str, Path, str]:
    """Compile one module: spec, source, binary, what ptxas says."""
    given = dict(options)
    if "program" in given:
        given["program"] = resolve_processors(given["program"]())[0]
    spec = SamplingSpec(target=cuda_target(arch), **given)
    source = render_sampling(spec)
    for path, text in {"kernel.cu": source.text, **{f"include/{p}": t for p, t in source.includes.items()}}.items():
        file = directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    command = [str(toolchain.require_toolkit().nvcc), "-ccbin", str(toolchain.require_cxx().path), *spec.target.flags]
    command += [f"-I{directory / 'include'}", "-cubin", "-o", str(directory / "kernel.cubin"), str(directory / "kernel.cu")]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=toolchain.clean_environment()
    )
    assert done.returncode == 0, done.stdout
    return spec, source.text, directory / "kernel.cubin", done.stdout


@pytest.fixture(scope="module", params=[(name, arch) for name in MODULES for arch in ARCHS], ids="-sm".join)
def module(request, tmp_path_factory):
    name, arch = request.param
    return name, *compile_module(MODULES[name], arch, tmp_path_factory.mktemp("module"))


def test_module_spills_nothing_and_fits_the_register_file(module):
    name, _, text, _, output = module
    frame, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill st\D+(\d+) bytes", output).groups())
    assert max(frame, stores, loads) <= SPILL.get(name, 0), output
    (used,) = re.findall(r"Used (\d+) registers", output)
    (threads,) = re.findall(r"kThreads = (\d+);", text)
    (ctas,) = re.findall(r"(?:kBlocksPerProcessor = |kThreads, )(\d);?", text)
    assert int(used) <= REGISTER_FILE // (int(threads) * int(ctas)) // 8 * 8, output


def test_module_loads_sixteen_bytes_at_a_time_and_adds_no_floats_atomically(module):
    name, spec, _, binary, _ = module
    sass = disassemble(binary)
    assert re.search(r"\bLDG\.E\.128\b", sass), "no 16-byte load"
    atomics = re.findall(r"\b(?:ATOM|ATOMG|ATOMS|RED)\b[.\w]*", sass)
    assert not [a for a in atomics if "F32" in a or "F16" in a or "F64" in a], atomics  # order would show in the sum
    assert spec.has_top_k or not atomics, atomics
    assert name in SPILL or not re.search(r"\b(?:LDL|STL)\b", sass), "local memory"
    if spec.target.compute_capability >= (9, 0) and spec.op != "process":
        assert re.search(r"\bUCGABAR_ARV\b", sass), "no cluster barrier"


def test_generated_source_reads_well(module):
    _, _, text, _, _ = module
    assert text.startswith("// generated by jitgen ")
    lines = text.split("\n")
    assert not [line for line in lines if line != line.rstrip() or "\t" in line]
    assert "\n\n\n" not in text
    assert not re.search(r"\b(?:None|True|False)\b", text)
    assert text.count("{") == text.count("}")
