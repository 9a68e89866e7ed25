"""The kernel of latent attention compiled without a GPU: no spill, products by the tensor cores, none of them serialised."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch
from disassembly import disassemble

import jitgen
from jitgen import toolchain
from jitgen.families import cuda_spec
from jitgen.render import render_kernel
from jitgen.spec import MLA_DIMS
from jitgen.target import cuda_target

pytestmark = pytest.mark.skipif(
    toolchain.find_toolkit() is None or toolchain.find_cxx() is None,
    reason="no complete CUDA toolkit (see 'jitgen doctor')",
)


def plain() -> jitgen.Variant:
    return jitgen.Variant()


def causal() -> jitgen.Variant:
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx)


def scored() -> jitgen.Variant:
    cap, slopes = 30.0, torch.zeros(128)

    def bend(score, b, h, q_idx, kv_idx):
        return cap * torch.tanh(score / cap) + slopes[h] * (kv_idx - q_idx)

    return jitgen.Variant(score_mod=bend, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx, sink=slopes)


VARIANTS = {f.__name__: f for f in (plain, causal, scored)}


@pytest.fixture(scope="module", params=VARIANTS)
def module(request, tmp_path_factory):
    """Binary, what ptxas says."""
    program, target = VARIANTS[request.param]().trace().program, cuda_target("9.0a")
    source = render_kernel(cuda_spec(program, "bfloat16", MLA_DIMS, "mla", target, layout="paged"))
    directory = tmp_path_factory.mktemp("module")
    for path, text in {"kernel.cu": source.text, **{f"include/{p}": t for p, t in source.includes.items()}}.items():
        file = directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    command = [str(toolchain.require_toolkit().nvcc), "-ccbin", str(toolchain.require_cxx().path), *target.flags]
    command += [f"-I{directory / 'include'}", "-cubin", "-o", str(directory / "kernel.cubin"), str(directory / "kernel.cu")]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=toolchain.clean_environment()
    )
    assert done.returncode == 0, done.stdout
    return directory / "kernel.cubin", done.stdout


def test_module_spills_nothing_and_serialises_no_product(module):
    _, output = module
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill st\D+(\d+) bytes", output)
    assert found and {numbers for numbers in found} == {("0", "0", "0")}, output
    assert "C7510" not in output, output  # "wgmma.mma_async instructions are serialized"


def test_products_are_wide_and_read_values_where_keys_are(module):
    sass = disassemble(module[0])
    assert len(re.findall(r"HGMMA\.64x64x16", sass)) >= 36, "Q K^T"
    assert re.search(r"HGMMA\.64x256x16\.F32\.BF16 R\d+, gdesc\[UR\d+\]\.tnspB", sass), "P V with P of the other group"
    assert re.search(r"HGMMA\.64x256x16\.F32\.BF16 R\d+, R\d+, gdesc\[UR\d+\]\.tnspB", sass), "P V with P in registers"
    assert re.search(r"\bUTMALDG\.5D\b", sass), "bulk tensor copies"
