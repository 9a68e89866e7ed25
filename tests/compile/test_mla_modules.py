"""The kernel of latent attention compiled without a GPU: no spill, products by the tensor cores, none of them serialised."""

from __future__ import annotations

import re

import pytest
import torch
from compiling import compile_source
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
    return compile_source(source, directory, *target.flags)


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
