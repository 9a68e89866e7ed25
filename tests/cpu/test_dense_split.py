"""Which dense calls a GPU cuts along their keys: told by shapes and strides, for which tensors without memory will do."""

from __future__ import annotations

import pytest
import torch

import jitgen
from jitgen import dense_split, runtime
from jitgen.dense_split import can_split, find_kernel, pays
from jitgen.errors import CompileError, KernelNotPrebuilt, ToolchainMissing
from jitgen.families import cuda_spec
from jitgen.layouts import stride_like
from jitgen.target import cuda_target


def tensors(batch, heads, kv_heads, q_len, kv_len, dtype=torch.bfloat16):
    shapes = ((batch, heads, q_len, 64), (batch, kv_heads, kv_len, 64), (batch, kv_heads, kv_len, 64))
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]


def is_cut(variant, q, k, v):
    return can_split(variant.trace().program, q, k, v, stride_like(q, tuple(q.shape)))


def inside(t):
    """The same with the heads inside of positions."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("error", [KernelNotPrebuilt("not built"), ToolchainMissing("no nvcc", "Install it.")], ids=type)
def test_kernel_that_nobody_built_is_looked_for_once(monkeypatch, error):
    asked = []

    def refuse(spec):
        asked.append(spec)
        raise error

    monkeypatch.setattr(runtime, "get_kernel", refuse)
    monkeypatch.setattr(dense_split, "_absent", set())
    spec = cuda_spec(jitgen.Variant().trace().program, "bfloat16", (64, 64), "decode", cuda_target("9.0a"), layout="paged")
    assert find_kernel(spec) is None and find_kernel(spec) is None
    assert asked == [spec]


def test_kernel_that_does_not_compile_is_no_reason_to_take_another(monkeypatch):
    def fail(spec):
        raise CompileError("ptxas died")

    monkeypatch.setattr(runtime, "get_kernel", fail)
    spec = cuda_spec(jitgen.Variant().trace().program, "bfloat16", (64, 64), "decode", cuda_target("9.0a"), layout="paged")
    with pytest.raises(CompileError):
        find_kernel(spec)


def test_few_rows_over_many_keys_pay():
    many = dense_split.LEAST_KEYS
    assert pays((1, 32, 1, 128), (1, 8, many, 128))
    assert not pays((1, 32, 1, 128), (1, 8, many - 1, 128))
    assert pays((1, 32, 8, 128), (1, 8, many, 128))
    assert not pays((1, 32, 9, 128), (1, 8, many, 128))  # 36 rows share a key
    assert not pays((1, 32, 0, 128), (1, 8, many, 128))


def test_rows_must_follow_each_other():
    q, k, v = tensors(3, 8, 2, 4, 900)
    assert not is_cut(jitgen.Variant(), q, k, v)
    assert is_cut(jitgen.Variant(), inside(q), k, v)
    assert is_cut(jitgen.Variant(), q[:1], k[:1], v[:1])
    assert is_cut(jitgen.Variant(), q[:, :, :1], k, v)


def test_keys_and_values_are_of_one_request_or_of_each():
    q, k, v = tensors(3, 8, 2, 1, 900)
    assert is_cut(jitgen.Variant(), q, k[:1], v[:1])
    assert is_cut(jitgen.Variant(), q, k[:1].expand(3, -1, -1, -1), v[:1])
    assert not is_cut(jitgen.Variant(), q, k[:1], v)
    assert not is_cut(jitgen.Variant(), q, k[:, :1].expand(-1, 2, -1, -1), v)  # heads that share memory


def test_dtypes_of_the_decode_kernel():
    assert not is_cut(jitgen.Variant(), *tensors(1, 8, 2, 1, 900, torch.float32))
    assert not is_cut(jitgen.Variant(), *tensors(1, 8, 2, 1, 900, torch.float8_e4m3fn))


class Sigmoid(jitgen.OnlineNorm):
    def update(self, score, state):
        return torch.sigmoid(score), 1.0, state


class Ordered(jitgen.OnlineNorm):
    state = {"total": 0.0}  # noqa: RUF012

    def update(self, score, state):
        return score, 1.0, {"total": state["total"] + jitgen.row_sum(score)}

    def finalize(self, o, state):
        return o / state["total"]


class Joined(Ordered):
    def merge(self, a, b):
        return {"total": a["total"] + b["total"]}, 1.0, 1.0


@pytest.mark.parametrize("norm, expected", [(Sigmoid, True), (Ordered, False), (Joined, True)])
def test_norms_whose_parts_can_be_joined(norm, expected):
    assert is_cut(jitgen.Variant(softmax=norm), *tensors(1, 8, 2, 1, 900)) == expected


def test_hooks_that_count_rows_or_keys_of_all_requests():
    gate = torch.ones(10)
    by_row = jitgen.Variant(output_transform=lambda o, lse, b, h, q_idx, *, q_tok: o * gate[q_tok])
    by_key = jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx, *, kv_off: kv_off + kv_idx < 500)
    assert not is_cut(by_row, *tensors(1, 8, 2, 1, 900))
    assert not is_cut(by_key, *tensors(1, 8, 2, 1, 900))
