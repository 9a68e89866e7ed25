"""The kernels of latent attention compiled without a GPU: no spill, products by the tensor cores, none of them serialised."""

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


def compile_module(variant, family, arch, directory, rows=64):
    """Binary, what ptxas says."""
    program, target = VARIANTS[variant]().trace().program, cuda_target(arch)
    source = render_kernel(cuda_spec(program, "bfloat16", MLA_DIMS, family, target, layout="paged", rows=rows))
    return compile_source(source, directory, *target.flags)


@pytest.fixture(scope="module", params=VARIANTS)
def module(request, tmp_path_factory):
    return compile_module(request.param, "mla", "9.0a", tmp_path_factory.mktemp("module"))


@pytest.fixture(scope="module", params=[("plain", 8), ("causal", 16), ("scored", 32)], ids=lambda p: f"{p[0]}-{p[1]}")
def few_rows(request, tmp_path_factory):
    variant, rows = request.param
    return rows, *compile_module(variant, "mla_decode", "9.0a", tmp_path_factory.mktemp("few_rows"), rows)


@pytest.fixture(scope="module", params=("8.0", "8.9"))
def older_module(request, tmp_path_factory):
    return compile_module("scored", "sm80_mla", request.param, tmp_path_factory.mktemp("older"))


def spills(output):
    return re.findall(r"Compiling entry function '\w*?([a-z]+_kernel)\w*'.*?(\d+) bytes spill stores", output, re.DOTALL)


def test_module_spills_nothing_and_serialises_no_product(module):
    _, output = module
    assert spills(output) and {count for _, count in spills(output)} == {"0"}, output
    assert "C7510" not in output, output  # "wgmma.mma_async instructions are serialized"


def test_products_are_wide_and_read_values_where_keys_are(module):
    sass = disassemble(module[0])
    assert len(re.findall(r"HGMMA\.64x64x16", sass)) >= 36, "Q K^T"
    assert re.search(r"HGMMA\.64x256x16\.F32\.BF16 R\d+, gdesc\[UR\d+\]\.tnspB", sass), "P V with P of the other group"
    assert re.search(r"HGMMA\.64x256x16\.F32\.BF16 R\d+, R\d+, gdesc\[UR\d+\]\.tnspB", sass), "P V with P in registers"
    assert re.search(r"\bUTMALDG\.5D\b", sass), "bulk tensor copies"


def test_few_rows_are_columns_of_both_products(few_rows):
    rows, binary, output = few_rows
    assert spills(output) and {count for _, count in spills(output)} == {"0"}, output
    assert "C7510" not in output, output
    sass = disassemble(binary)
    products = re.findall(rf"HGMMA\.64x{rows}x16\.F32\.BF16 R\d+, gdesc\[UR\d+\](\.tnspA)?,", sass)
    assert (products.count(""), products.count(".tnspA")) == (36, 32), "K Q^T, and V^T P^T with V where it was copied to"
    assert re.search(r"\bUTMALDG\.5D\b", sass), "bulk tensor copies"


def test_older_module_spills_nothing_in_its_loop_and_reads_values_where_keys_are(older_module):
    binary, output = older_module
    assert ("attention_kernel", "0") in spills(output) and ("plan_kernel", "0") in spills(output), output
    sass = disassemble(binary)
    assert len(re.findall(r"HMMA\.16816\.F32\.BF16", sass)) >= 36 * 2 + 32, "Q K^T and P V"
    assert re.search(r"LDSM\.16\.MT88\.4", sass) and re.search(r"LDGSTS\.E\.BYPASS\.LTC128B\.128", sass)
