"""Modules of entries that are not requests: those that leave states of rows, the one that merges them, and those that read
chosen lists. Compiled without a GPU: registers and products."""

from __future__ import annotations

import re

import pytest
import torch
from compiling import compile_source
from norm_cases import MERGED

import jitgen
from jitgen import toolchain
from jitgen.families import cuda_spec
from jitgen.render import render_kernel
from jitgen.serving_place import ChosenLists, finishing, place
from jitgen.target import cuda_target

pytestmark = pytest.mark.skipif(
    toolchain.find_toolkit() is None or toolchain.find_cxx() is None,
    reason="no complete CUDA toolkit (see 'jitgen doctor')",
)
# Bytes that a thread may spill, or keep in local memory, all of it once an item: the tiles of head_dim 128 fill the registers.
SPILL = {"sm80": 128, "sm90": 16}
CHOSEN_SPILL = {"sm80": 112, "sm90": 24}  # where places of keys are looked up too


def plain() -> jitgen.Variant:
    return jitgen.Variant()


def alibi() -> jitgen.Variant:
    slopes = torch.zeros(32)
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: s + slopes[h] * (kv_idx - q_idx),
        mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < 1000),
    )


def causal() -> jitgen.Variant:
    return jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx)


def stick_breaking() -> jitgen.Variant:
    return jitgen.Variant(softmax=MERGED["stick_breaking"])


def finished() -> jitgen.Variant:
    gate = torch.zeros(32)
    by_row = torch.zeros(4096, 32)
    return jitgen.Variant(
        sink=gate,
        output_transform=lambda o, lse, b, h, q_idx, *, q_tok: o * torch.sigmoid(by_row[q_tok, h]) + q_idx,
        lse_transform=lambda lse, b, h, q_idx: lse * 1.4426950408889634,
    )


MODULES = [
    ("sm90", plain, 128, "paged_states"),
    ("sm90", alibi, 128, "paged_states"),
    ("sm90", alibi, 64, "ragged_states"),
    ("sm80", plain, 128, "paged_states"),
    ("decode", plain, 128, "paged_states"),
    ("decode", alibi, 64, "ragged_states"),
    ("sm90", stick_breaking, 128, "paged_states"),
    ("decode", stick_breaking, 128, "paged_states"),
    ("merge", stick_breaking, 128, "states"),
    ("sm90", alibi, 128, "paged_chosen"),
    ("sm90", plain, 128, "paged_chosen"),
    ("sm90", causal, 128, "paged_chosen"),
    ("sm90", causal, 64, "paged_chosen"),
    ("sm80", alibi, 64, "paged_chosen"),
    ("decode", alibi, 128, "paged_chosen"),
    ("merge", plain, 128, "states"),
    ("merge", finished, 96, "states"),
    ("merge", finished, 256, "states"),
    ("merge_outs", plain, 128, "outs"),
    ("merge_outs", plain, 512, "outs"),
    ("sm90_wide", alibi, 512, "paged_states"),
    ("sm90_wide", causal, 512, "paged_chosen"),
    ("sm80", plain, 512, "paged_states"),
    ("decode", alibi, 512, "paged_states"),
    ("merge", finished, 512, "states"),
]


@pytest.mark.parametrize("family, make, head_dim, layout", MODULES)
def test_nothing_spills_and_products_are_not_serialised(family, make, head_dim, layout, tmp_path):
    program = make().trace().program
    chosen = ChosenLists(16, is_even=False) if layout.endswith("_chosen") else None
    program = finishing(program) if family == "merge" else place(program, chosen)[0]
    arch = {"sm90": "9.0a", "sm90_wide": "9.0a", "decode": "9.0a"}.get(family, "8.0")
    kind = layout.removesuffix("_chosen")
    spec = cuda_spec(program, "bfloat16", (head_dim, head_dim), family, cuda_target(arch), layout=kind)
    source = render_kernel(spec)
    _, output = compile_source(source, tmp_path, *spec.target.flags)
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", output)
    allowed = (CHOSEN_SPILL if chosen else SPILL).get(family, 0)
    assert found and max(max(map(int, numbers)) for numbers in found) <= allowed, output
    assert not re.findall(r".*C75\d\d.*", output)
