"""Prefill modules of ragged and paged layouts compiled without a GPU: registers, local memory, tensor-core instructions."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compiling import code_for, compile_source
from disassembly import disassemble
from norm_cases import MERGED, Sigmoid

import jitgen
from jitgen import toolchain
from jitgen.families import cuda_spec
from jitgen.render import render_kernel
from jitgen.target import cuda_target

ARCHS = {"sm80": ("80", "90"), "sm90": ("90a",)}
# Bytes that a thread of an sm80 module may spill, by head_dim, nearly all of them outside of the loop over keys: at 128 the
# tile fills the registers, as that of the dense kernel does.
SPILL = {128: 192}
OTHER_SPILL = 48
SM90_SPILL = 16  # of three consumer groups, at the first tile of an item: they have 160 registers, and the loop keeps to them
LOCAL_IN_LOOP = 17  # accesses to local memory for each tile of keys, among more than 1300 instructions
SASS = {
    "sm80": {"HMMA": "mma.sync", "LDSM": "ldmatrix", "LDGSTS": "cp.async"},
    "sm90": {"HGMMA": "wgmma", "UTMALDG": "bulk tensor copies", "USETMAXREG": "setmaxnreg"},
}

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


def segments() -> jitgen.Variant:
    """A mask whose rows are looked up: the planner asks for them by whole warps."""
    start = torch.zeros(8192, dtype=torch.int32)
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx >= start[q_idx]) & (kv_idx <= q_idx))


def window() -> jitgen.Variant:
    """A mask of whose tiles rows may see one half."""
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < 1024))


def documents() -> jitgen.Variant:
    """Such a mask whose columns are looked up once for all rows."""
    doc = jitgen.sorted(torch.zeros(8192, dtype=torch.int32))
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (doc[q_idx] == doc[kv_idx]) & (kv_idx <= q_idx))


def window_per_head() -> jitgen.Variant:
    widths = torch.zeros(32, dtype=torch.int32)
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < widths[h]))


def every_hook() -> jitgen.Variant:
    doc, slopes, gate = torch.zeros(8192, dtype=torch.int32), torch.zeros(32), torch.zeros(32)
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: s + slopes[h] * (kv_idx - q_idx),
        mask_mod=lambda b, h, q_idx, kv_idx: (doc[q_idx] == doc[kv_idx]) & (kv_idx <= q_idx),
        sink=torch.zeros(32),
        output_transform=lambda o, lse, b, h, q_idx: o * torch.sigmoid(gate[h]),
        lse_transform=lambda lse, b, h, q_idx: lse * 1.4426950408889634,
    )


def sigmoid() -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal, softmax=Sigmoid)


def slot_scales() -> jitgen.Variant:
    scale = torch.zeros(8192, 8)
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx, *, kv_slot, kv_h: s * scale[kv_slot, kv_h], mask_mod=causal
    )


def evicted() -> jitgen.Variant:
    """A mask whose columns are looked up once for all rows."""
    kept = torch.ones(8192, dtype=torch.bool)
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx, *, kv_slot: (kv_idx <= q_idx) & kept[kv_slot])


def merged_softmax() -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal, softmax=MERGED["softmax"])


MODULES = [
    ("sm80", "paged", causal_only, "bfloat16", 64, 64),
    ("sm80", "paged", causal_only, "bfloat16", 128, 128),
    ("sm80", "ragged", causal_only, "bfloat16", 128, 128),
    ("sm80", "ragged", plain, "float16", 96, 96),
    ("sm80", "paged", causal_only, "bfloat16", 192, 128),
    ("sm80", "paged", causal_only, "float16", 192, 192),
    ("sm80", "paged", causal_only, "bfloat16", 256, 256),
    ("sm80", "paged", causal_only, "bfloat16", 512, 512),
    ("sm80", "paged", every_hook, "float16", 512, 512),
    ("sm80", "ragged", sigmoid, "bfloat16", 512, 512),
    ("sm80", "ragged", merged_softmax, "bfloat16", 512, 512),
    ("sm80", "paged", every_hook, "bfloat16", 128, 128),
    ("sm80", "ragged", segments, "bfloat16", 64, 64),
    ("sm80", "paged", window_per_head, "bfloat16", 128, 128),
    ("sm80", "paged", sigmoid, "bfloat16", 128, 128),
    ("sm80", "paged", slot_scales, "bfloat16", 128, 128),
    ("sm80", "paged", merged_softmax, "bfloat16", 128, 128),
    ("sm90", "paged", plain, "bfloat16", 128, 128),
    ("sm90", "paged", plain, "float16", 256, 256),
    ("sm90", "paged", causal_only, "bfloat16", 64, 64),
    ("sm90", "paged", causal_only, "bfloat16", 128, 128),
    ("sm90", "ragged", causal_only, "bfloat16", 128, 128),
    ("sm90", "paged", window, "bfloat16", 64, 64),
    ("sm90", "ragged", window, "bfloat16", 96, 96),
    ("sm90", "paged", window, "bfloat16", 128, 128),
    ("sm90", "ragged", documents, "bfloat16", 128, 128),
    ("sm90", "ragged", plain, "float16", 96, 96),
    ("sm90", "paged", causal_only, "bfloat16", 192, 128),
    ("sm90", "paged", causal_only, "float16", 192, 192),
    ("sm90", "paged", causal_only, "bfloat16", 256, 256),
    ("sm90", "paged", every_hook, "bfloat16", 128, 128),
    ("sm90", "paged_rows", causal_only, "bfloat16", 128, 128),  # pages of any size
    ("sm90", "paged_rows", window, "bfloat16", 64, 64),
    ("sm90", "paged_rows", every_hook, "float16", 128, 128),
    ("sm90", "paged_rows", plain, "bfloat16", 192, 128),
    ("sm90", "ragged", every_hook, "float16", 256, 256),
    ("sm90", "ragged", segments, "bfloat16", 64, 64),
    ("sm90", "paged", sigmoid, "bfloat16", 128, 128),
    ("sm90", "paged", evicted, "bfloat16", 128, 128),
    ("sm90", "ragged", slot_scales, "float16", 64, 64),  # whose keys are copies, without pages
    ("sm90", "paged", merged_softmax, "bfloat16", 128, 128),
]


def name_of(case) -> str:
    family, layout, make, dtype, head_dim, head_dim_v = case
    dims = f"hd{head_dim}" + (f"_{head_dim_v}" if head_dim_v != head_dim else "")
    return "-".join([family, layout, make.__name__, dtype, dims])


class Module:
    """A compiled module: its spec, what the compiler printed, and the instructions of its attention kernel."""

    def __init__(self, case, directory: Path) -> None:
        family, layout, make, dtype, head_dim, head_dim_v = case
        self.archs = ARCHS[family]
        target = cuda_target("9.0a" if family == "sm90" else "8.0")
        dims, place = (head_dim, head_dim_v), layout.removesuffix("_rows")
        spec = cuda_spec(make().trace().program, dtype, dims, family, target, layout=place)
        self.spec = replace(spec, copies=False) if place != layout else spec
        source = render_kernel(self.spec)
        self.binary, self.output = compile_source(source, directory, *code_for(*self.archs), "--threads=2", "-fatbin")

    def spills(self, kernel: str) -> list[tuple[int, ...]]:
        """Stack frame, spill stores and spill loads of a kernel, for each architecture."""
        pattern = rf"entry function '\w*{kernel}\w*'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill"
        return [tuple(map(int, found)) for found in re.findall(pattern, self.output, re.DOTALL)]

    def sass(self, arch: str) -> str:
        text = disassemble(self.binary, "-arch", f"sm_{arch}")
        parts = re.split(r"^\s*Function : ", text, flags=re.MULTILINE)
        return next(part for part in parts if "attention_kernel" in part.splitlines()[0])


@pytest.fixture(scope="module", params=MODULES, ids=name_of)
def module(request, tmp_path_factory):
    return Module(request.param, tmp_path_factory.mktemp("module"))


def test_attention_spills_no_more_than_its_head_dim_allows(module):
    found = module.spills("attention_kernel")
    assert len(found) == len(module.archs), module.output
    allowed = SM90_SPILL if module.spec.tiles.tile_q == 192 else 0
    if module.spec.family == "sm80":
        allowed = SPILL.get(module.spec.head_dim, OTHER_SPILL)
    assert max(map(max, found)) <= allowed, module.output


def test_planner_and_merge_spill_nothing(module):
    kernels = ["plan_kernel"] + (["merge_kernel"] if module.spec.program.can_split else [])
    for kernel in kernels:
        found = module.spills(kernel)
        assert len(found) == len(module.archs), module.output
        assert max(map(max, found)) == 0, module.output


def test_products_are_not_serialised(module):
    assert not re.findall(r".*C75\d\d.*", module.output)


def test_attention_uses_the_instructions_it_is_written_for(module):
    for arch in module.archs:
        sass = module.sass(arch)
        missing = [f"{name} ({ptx})" for name, ptx in SASS[module.spec.family].items() if name not in sass]
        assert not missing, f"sm_{arch} has no {', '.join(missing)}"


def main_loop(sass: str) -> list[str]:
    """Instructions of the smallest loop with products of matrices."""
    found = [(int(m[1], 16), m[2], m[3]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?(\S+)(.*?);", sass)]
    loops = []
    for at, name, operands in found:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name.startswith("BRA") and target and int(target[1], 16) <= at:
            body = [n for a, n, _ in found if int(target[1], 16) <= a <= at]
            if any("MMA" in n for n in body):
                loops.append(body)
    return min(loops, key=len)


def test_loop_over_keys_keeps_to_its_registers(module):
    for arch in module.archs:
        local = [n for n in main_loop(module.sass(arch)) if n.startswith(("LDL", "STL"))]
        assert len(local) <= (LOCAL_IN_LOOP if module.spec.family == "sm80" else 0), f"sm_{arch}: {local}"
