"""Lengths, batches, heads, strides and captured values compile nothing. Builds are counted, not done."""

from __future__ import annotations

import random
import struct

import pytest
import torch
from gallery import CASES, Sizes

import jitgen
from jitgen import build, dense, runtime
from jitgen.abi import pack_format

NUM_SHAPES = 50
HEAD_DIM = 16


class CountedKernel:
    """A kernel that packs its arguments as any other, and does nothing."""

    def __init__(self, path, spec, fields):
        self.pack = struct.Struct(pack_format(fields)).pack
        self.pack_tail = lambda words: b""
        self.launch = lambda arguments: 0


@pytest.fixture
def builds(monkeypatch, private_store):
    """Names of the modules built in an empty store by a process that has loaded none."""
    names: list[str] = []

    def build_nothing(source, *, name, target, includes, label, directory):
        names.append(name)
        (directory / "kernel.cpp").write_text(source)
        (directory / "build.log").write_text("")
        (directory / "module.so").write_bytes(b"\x7fELF" + name.encode() * 20)

    monkeypatch.setattr(build, "build", build_nothing)
    monkeypatch.setattr(runtime, "CompiledKernel", CountedKernel)
    monkeypatch.setattr(runtime, "_kernels", {})
    monkeypatch.setattr(dense, "_prepared", {})
    monkeypatch.setattr(dense, "_recent", {})
    return names


def shapes():
    rng = random.Random(0)
    for i in range(NUM_SHAPES):
        kv_len = rng.choice([1, 3, 64, 150, 257]) + i
        q_len = 1 if i % 5 == 0 else rng.randrange(1, kv_len + 1)
        num_kv_heads = rng.choice([1, 2, 3])
        yield Sizes(
            q_len,
            kv_len,
            batch=rng.choice([1, 2, 5]),
            num_q_heads=num_kv_heads * rng.choice([1, 2, 4]),
            num_kv_heads=num_kv_heads,
        )


def inputs(z: Sizes, *, transposed: bool, dtype=torch.float32):
    sizes = (z.num_q_heads, z.q_len), (z.num_kv_heads, z.kv_len), (z.num_kv_heads, z.kv_len)
    if transposed:
        return [torch.zeros(z.batch, length, heads, HEAD_DIM, dtype=dtype).transpose(1, 2) for heads, length in sizes]
    return [torch.zeros(z.batch, heads, length, HEAD_DIM, dtype=dtype) for heads, length in sizes]


def call(case, z: Sizes, i: int, **options):
    variant = case.make(z)
    norm = variant.trace().program.norm
    return_lse = bool(i % 2) and (norm is None or norm.lse is not None)
    jitgen.attention(*inputs(z, transposed=i % 3 == 0, **options), variant, return_lse=return_lse, scale=[None, 0.5 + i][i % 2])


# Cases that are the same kernel though written differently.
SAME_KERNEL = [{"causal", "causal_in_score"}]


def test_fifty_variants_in_fifty_shapes_compile_one_module_each(builds):
    assert len(CASES) >= 50
    first = Sizes(5, 9)
    distinct = {case.make(first).trace().program.id for case in CASES.values()}
    assert len(distinct) == len(CASES) - sum(len(group) - 1 for group in SAME_KERNEL)
    for i, z in enumerate(shapes()):
        for case in CASES.values():
            call(case, z, i)
        assert len(builds) == len(distinct), f"after shape {i}, {z}"
    assert len(set(builds)) == len(builds)


@pytest.mark.parametrize("name", ["gemma2", "t5_encoder", "stick_breaking"])
def test_head_dim_and_dtype_are_a_module_each_and_nothing_else_is(builds, name, monkeypatch):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for i, z in enumerate(list(shapes())[:4]):
            call(CASES[name], z, i, dtype=dtype)
    assert len(builds) == 3
    monkeypatch.setitem(globals(), "HEAD_DIM", 32)
    call(CASES[name], Sizes(3, 7), 0)
    assert len(builds) == 4


def test_module_stored_by_another_process_is_not_built_again(builds, monkeypatch):
    call(CASES["causal"], Sizes(5, 9), 0)
    monkeypatch.setattr(runtime, "_kernels", {})
    monkeypatch.setattr(dense, "_prepared", {})
    monkeypatch.setattr(dense, "_recent", {})
    call(CASES["causal"], Sizes(300, 300), 1)
    assert len(builds) == 1


def test_static_value_is_a_module_each(builds):
    z = Sizes(5, 9)
    for width in (3, 4, 3):
        fixed = jitgen.static(width)
        jitgen.attention(*inputs(z, transposed=False), mask_mod=lambda b, h, q, k: q - k < fixed)  # noqa: B023
    assert len(builds) == 2
