"""Modules of the decode family compiled without a GPU: registers, spills, and the instructions they are written for."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compiling import compile_source
from disassembly import disassemble
from norm_cases import MERGED, StickBreaking

import jitgen
from jitgen import toolchain
from jitgen.families import cuda_spec
from jitgen.kv_decode import rows_in_decode, with_value_factor
from jitgen.program import without_rows
from jitgen.render import render_kernel
from jitgen.target import cuda_target
from jitgen.tiles_decode import SHARED_KIB, decode_tiles

# Bytes a thread may spill: O^T of 128 registers leaves the merge, which runs once per request, short of a few.
FULL_OUTPUT, SPILL = 128, 64
SASS = {"HMMA": "mma.sync", "LDSM": "ldmatrix", "LDGSTS": "cp.async", "MOVM": "movmatrix"}
TENSOR_SASS = {"UTMALDG": "cp.async.bulk.tensor", "SYNCS": "mbarrier"}

needs_compiler = pytest.mark.skipif(
    toolchain.find_toolkit() is None or toolchain.find_cxx() is None,
    reason="no complete CUDA toolkit (see 'jitgen doctor')",
)


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def plain() -> jitgen.Variant:
    return jitgen.Variant()


def alibi_window() -> jitgen.Variant:
    slopes, width = torch.zeros(32), 1024
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: s + slopes[h] * (kv_idx - q_idx),
        mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < width),
    )


def every_hook() -> jitgen.Variant:
    document, gate = torch.zeros(8192, dtype=torch.int32), torch.zeros(32)
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: 50.0 * torch.tanh(s / 50.0),
        mask_mod=lambda b, h, q_idx, kv_idx: (document[q_idx] == document[kv_idx]) & (kv_idx <= q_idx),
        sink=torch.zeros(32),
        output_transform=lambda o, lse, b, h, q_idx: o * torch.sigmoid(gate[h]),
        lse_transform=lambda lse, b, h, q_idx: lse * 1.4426950408889634,
    )


def stick_breaking() -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal, softmax=StickBreaking)


def merged_softmax() -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal, softmax=MERGED["softmax"])


def merged_stick_breaking() -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal, softmax=MERGED["stick_breaking"])


def rotated() -> jitgen.Variant:
    rope = jitgen.Rope()
    return jitgen.Variant(mask_mod=causal, k_transform=lambda k, b, h, pos: rope(k, pos))


def normed_rows() -> jitgen.Variant:
    rope, weight, value_weight = jitgen.Rope(rotary_dim=64, interleave=True), torch.zeros(64), torch.zeros(64)
    return jitgen.Variant(
        k_transform=lambda k, b, h, pos: rope(k * torch.rsqrt((k * k).mean() + 1e-6) * weight[0], pos) + weight[h],
        v_transform=lambda v, b, h, pos: v * value_weight[h],
    )


def slot_scales() -> jitgen.Variant:
    """Scales by slot of a paged cache."""
    ks, vs = torch.zeros(8192, 8), torch.zeros(8192, 8)
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx, *, kv_slot, kv_h: s * ks[kv_slot, kv_h],
        v_transform=lambda v, b, kv_h, kv_idx, *, kv_slot: v * vs[kv_slot, kv_h],
    )


def slot_offsets() -> jitgen.Variant:
    zero = torch.zeros(8192, 8)
    return jitgen.Variant(k_transform=lambda k, b, kv_h, kv_idx, *, kv_slot: k - zero[kv_slot, kv_h], mask_mod=causal)


def evicted() -> jitgen.Variant:
    kept = torch.ones(8192, dtype=torch.bool)
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx, *, kv_slot: (kv_idx <= q_idx) & kept[kv_slot])


# variant, dtype, head dims, packed rows, layout, architecture, dtype of K and V in a cache of 8 bits
MODULES = [
    (plain, "bfloat16", (128, 128), 8, "paged", "9.0a", ""),
    (plain, "bfloat16", (128, 128), 32, "paged", "9.0a", ""),
    (plain, "float16", (128, 128), 8, "ragged", "8.0", ""),
    (every_hook, "bfloat16", (128, 128), 8, "paged", "9.0a", ""),
    (every_hook, "float16", (256, 256), 16, "paged", "8.0", ""),
    (alibi_window, "bfloat16", (256, 256), 8, "paged", "9.0a", ""),
    (plain, "bfloat16", (256, 256), 8, "ragged", "9.0a", ""),
    (alibi_window, "bfloat16", (64, 64), 32, "paged", "8.9", ""),
    (stick_breaking, "bfloat16", (64, 64), 8, "paged", "9.0a", ""),
    (merged_softmax, "bfloat16", (128, 128), 8, "paged", "9.0a", ""),
    (merged_softmax, "float16", (256, 256), 8, "ragged", "8.0", ""),
    (merged_stick_breaking, "bfloat16", (128, 128), 8, "paged", "9.0a", ""),
    (merged_stick_breaking, "bfloat16", (128, 128), 8, "paged", "9.0a", "int8"),
    (plain, "bfloat16", (192, 128), 16, "paged", "9.0a", ""),
    (plain, "bfloat16", (96, 96), 8, "ragged", "9.0a", ""),
    (plain, "bfloat16", (128, 128), 8, "paged", "9.0a", "float8_e4m3fn"),
    (every_hook, "float16", (256, 256), 8, "paged", "9.0a", "float8_e5m2"),
    (stick_breaking, "bfloat16", (64, 64), 8, "ragged", "9.0a", "int8"),
    (alibi_window, "bfloat16", (192, 128), 16, "paged", "8.0", "int8"),
    (rotated, "bfloat16", (128, 128), 8, "paged", "9.0a", ""),
    (rotated, "float16", (256, 256), 8, "paged", "9.0a", ""),
    (rotated, "bfloat16", (128, 128), 8, "ragged", "8.0", ""),
    (normed_rows, "bfloat16", (128, 128), 8, "paged", "9.0a", ""),
    (normed_rows, "float16", (192, 128), 16, "ragged", "8.0", ""),
    (slot_scales, "bfloat16", (128, 128), 8, "paged", "9.0a", ""),
    (slot_scales, "float16", (256, 256), 8, "paged", "8.0", ""),
    (slot_scales, "bfloat16", (128, 128), 8, "paged", "9.0a", "int8"),
    (slot_offsets, "bfloat16", (128, 128), 8, "paged", "9.0a", ""),
    (evicted, "bfloat16", (128, 128), 8, "paged", "9.0a", "int8"),
    (plain, "bfloat16", (512, 512), 32, "paged", "9.0a", ""),
    (alibi_window, "float16", (512, 512), 8, "ragged", "8.0", ""),
    (every_hook, "bfloat16", (512, 512), 8, "paged", "8.6", ""),  # one warp
    (merged_softmax, "bfloat16", (512, 512), 8, "paged", "9.0a", ""),
    (every_hook, "bfloat16", (512, 512), 8, "paged", "9.0a", "float8_e4m3fn"),
    (rotated, "bfloat16", (512, 512), 8, "paged", "9.0a", ""),
    (slot_scales, "bfloat16", (512, 512), 8, "paged", "8.0", "int8"),
]


def name_of(case) -> str:
    make, dtype, dims, rows, layout, arch, kv_dtype = case
    return f"{make.__name__}-{dtype}{kv_dtype}-hd{dims[0]}_{dims[1]}-{rows}-{layout}-sm{arch.replace('.', '')}"


def compile_case(case, directory: Path) -> tuple[object, Path, str]:
    """One module: spec, cubin, what ptxas says."""
    make, dtype, dims, rows, layout, arch, kv_dtype = case
    target = cuda_target(arch)
    program = with_value_factor(make().trace().program)
    spec = cuda_spec(without_rows(program), dtype, dims, "decode", target, layout=layout, rows=rows, kv_dtype=kv_dtype)
    if program.rows is not None and program.rows.changes_keys:
        spec = replace(spec, rows=rows_in_decode(program, dtype, *dims))
    source = render_kernel(spec)
    return spec, *compile_source(source, directory, *target.flags)


@pytest.fixture(scope="module", params=MODULES, ids=name_of)
def module(request, tmp_path_factory):
    return compile_case(request.param, tmp_path_factory.mktemp("module"))


@needs_compiler
def test_module_spills_only_where_the_output_fills_the_registers(module):
    spec, _, output = module
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", output)]
    assert len(spills) == 2, output  # of the kernel and of the planner
    full = spec.tiles.tile_q * spec.head_dim_v // 32 >= FULL_OUTPUT
    assert max(spills) <= (SPILL if full else 0), output


@needs_compiler
def test_two_ctas_share_an_sm_where_keys_have_8_bits(tmp_path):
    spec, _, output = compile_case((alibi_window, "bfloat16", (128, 128), 8, "paged", "9.0a", "float8_e4m3fn"), tmp_path)
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", output))
    assert 2 * 32 * spec.tiles.num_warps * registers <= 65536 and spec.tiles.num_warps == 8, output
    assert "0 bytes spill stores" in output and not re.search(r"[1-9]\d* bytes spill stores", output), output


@needs_compiler
def test_module_uses_the_instructions_it_is_written_for(module):
    spec, cubin, _ = module
    sass = disassemble(cubin)
    expected = SASS | (TENSOR_SASS if spec.target.compute_capability >= (9, 0) else {})
    missing = [f"{name} ({ptx})" for name, ptx in expected.items() if not re.search(rf"\b{name}\b", sass)]
    assert not missing, f"no {', '.join(missing)}"


@needs_compiler
def test_module_has_no_copy_to_a_sum_with_a_uniform_register(module):
    """ptxas 13.0 encodes LDGSTS [R + UR] with registers it never wrote: an illegal instruction when it runs."""
    assert not re.findall(r"LDGSTS[^;]*\[R\d+\+UR[^;]*;", disassemble(module[1]))


@pytest.mark.parametrize("arch", ["8.0", "8.6", "9.0a", "10.0", "12.0", "13.0"])
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (512, 512)], ids=str)
@pytest.mark.parametrize("make", [plain, stick_breaking, merged_softmax, merged_stick_breaking])
def test_every_architecture_has_a_tile(arch, dims, make):
    for rows in (1, 8, 9, 17, 32, 100):
        for stored_bytes in (1, 2):
            tiles = decode_tiles(*dims, make().trace().program, cuda_target(arch), rows, stored_bytes)
            assert tiles.num_warps * tiles.num_stages * 16 * sum(dims) * stored_bytes < max(SHARED_KIB.values()) * 1024
            assert tiles.tile_q * dims[1] // 32 <= FULL_OUTPUT
