"""Bad input to jitgen.attention: one error that names the values and the remedy, before anything is launched."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import jitgen
from jitgen import errors


def tensors(q=(1, 4, 8, 64), k=(1, 4, 8, 64), v=(1, 4, 8, 64), dtype=torch.float32):
    return tuple(torch.zeros(shape, dtype=dtype) for shape in (q, k, v))


@pytest.mark.parametrize(
    "shapes, words",
    [
        ({"q": (4, 8, 64)}, ["q has 3 dimensions", "(4, 8, 64)", "unsqueeze"]),
        ({"k": (1, 3, 8, 64), "v": (1, 3, 8, 64)}, ["q has 4 heads", "3", "multiple"]),
        ({"v": (1, 4, 9, 64)}, ["kv_len 9", "k has 8"]),
        ({"k": (1, 4, 8, 32)}, ["k has head_dim 32", "q has 64"]),
        ({"k": (2, 4, 8, 64), "v": (2, 4, 8, 64)}, ["batch 2", "q has 1"]),
        ({"q": (1, 4, 8, 60), "k": (1, 4, 8, 60)}, ["head_dim 60", "multiple of 8", "pad"]),
        ({"v": (1, 4, 8, 520)}, ["head_dim 520", "512", "Is the last axis the head dim?"]),
        ({"q": (1, 4, 8, 576), "k": (1, 4, 8, 576)}, ["head_dim 576", "Latent attention is of plans"]),
        ({"q": (1, 0, 8, 64), "k": (1, 0, 8, 64), "v": (1, 0, 8, 64)}, ["q has 0 heads", "positive multiple"]),
    ],
)
def test_attention_refuses_shapes_that_do_not_fit(shapes, words):
    with pytest.raises(errors.ShapeMismatch) as caught:
        jitgen.attention(*tensors(**shapes))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_attention_refuses_what_is_no_tensor():
    q, _, v = tensors()
    with pytest.raises(TypeError, match=r"k is a list, expected a torch\.Tensor"):
        jitgen.attention(q, [1.0], v)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64])
def test_attention_refuses_dtypes_without_kernels(dtype):
    with pytest.raises(errors.UnsupportedDtype, match="expected float32 or bfloat16 or float16 on cpu"):
        jitgen.attention(*tensors(dtype=dtype))


def test_attention_refuses_mixed_dtypes():
    q, k, v = tensors()
    with pytest.raises(errors.UnsupportedDtype, match=r"v has dtype bfloat16, q has float32.*v\.to\(q\.dtype\)"):
        jitgen.attention(q, k, v.bfloat16())


def test_attention_refuses_devices_without_kernels():
    q, k, v = (t.to("meta") for t in tensors())
    with pytest.raises(errors.UnsupportedDevice, match="q is on meta"):
        jitgen.attention(q, k, v)


FAKE = """
import torch, jitgen
from torch._subclasses.fake_tensor import FakeTensorMode
given = [torch.zeros(1, 4, 8, 64) for _ in range(3)]
for _ in range({before}):
    jitgen.attention(*given)
with FakeTensorMode() as mode:
    jitgen.attention(*map(mode.from_tensor, given))
"""


@pytest.mark.parametrize("before", [0, 3])
def test_attention_refuses_tensors_without_memory(before):
    """In a process of its own: what it guards against is a crash."""
    command = [sys.executable, "-c", FAKE.format(before=before)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "UnsupportedDevice: q is a FakeTensor, which has no values" in done.stderr


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # once a process
def test_attention_refuses_nested_tensors():
    q, k, v = tensors()
    nested = torch.nested.nested_tensor([q[0], q[0, :, :3]])
    with pytest.raises(errors.ShapeMismatch, match=r"q is a nested tensor.*jitgen\.ragged_attention"):
        jitgen.attention(nested, k, v)
    for _ in range(3):  # like a call that is known by now, whose one tensor stood for three
        jitgen.attention(q, q, q)
    with pytest.raises(errors.ShapeMismatch, match="q is a nested tensor"):
        jitgen.attention(nested, q, q)


def test_a_sign_that_is_not_in_memory_yet_is_seen():
    q = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(0))
    turned = torch.complex(q, q).conj().imag
    assert turned.is_neg()
    for _ in range(3):
        assert torch.equal(jitgen.attention(turned, q, q), jitgen.attention(-q, q, q))
        assert torch.equal(jitgen.attention(turned._neg_view(), q, q), jitgen.attention(q, q, q))


def test_attention_refuses_sparse_tensors():
    q, k, v = tensors()
    with pytest.raises(errors.UnsupportedDevice, match=r"layout torch\.sparse_coo"):
        jitgen.attention(q, k.to_sparse(), v)


def test_attention_refuses_inputs_that_require_grad():
    q, k, v = tensors()
    q.requires_grad_()
    with pytest.raises(errors.GradNotSupported, match="no_grad"):
        jitgen.attention(q, k, v)
    with torch.no_grad():
        assert jitgen.attention(q, k, v).shape == q.shape


@pytest.mark.parametrize(
    "keywords, words",
    [
        ({"q_index": "middle"}, ["q_index='middle'", "'local' or 'absolute'"]),
        ({"family": "sm70"}, ["family='sm70'", "sm80"]),
        ({"family": "sm80"}, ["needs cuda tensors", "cpu"]),
        ({"score_mod": lambda s, b: s}, ["score_mod", "2 positional parameters", "expected 5"]),
        ({"mask_mod": 3}, ["mask_mod is 3", "(b, h, q_idx, kv_idx)"]),
        ({"mask_mod": torch.ones(8, 8) > 0}, ["mask_mod is a tensor of shape (8, 8)", "as in mask[q_idx, kv_idx]"]),
        ({"variant": torch.ones(8, 8) > 0}, ["variant is a tensor of shape (8, 8)", "mask[q_idx, kv_idx]"]),
        (
            {"variant": create_block_mask(lambda b, h, q_idx, kv_idx: kv_idx <= q_idx, None, None, 8, 8, device="cpu")},
            ["variant is a BlockMask", "jitgen.flex_attention"],
        ),
        ({"scale": "1"}, ["scale is '1' of type str", "finite number"]),
        ({"scale": math.nan}, ["scale is nan", "finite number"]),
        ({"scale": math.inf}, ["scale is inf", "finite number"]),
        ({"scale": torch.tensor(0.1)}, ["scale is tensor(0.1000) of type Tensor", "float()"]),
        ({"sink": "no"}, ["sink is 'no'", "tensor [num_q_heads]"]),
        ({"sink": torch.zeros(2, 2)}, ["sink has shape (2, 2)"]),
        ({"variant": 7}, ["variant is 7", "jitgen.Variant"]),
        ({"variant": jitgen.Variant(), "sink": 1.0}, ["both given"]),
    ],
)
def test_attention_refuses_options_that_make_no_sense(keywords, words):
    with pytest.raises(errors.VariantError) as caught:
        jitgen.attention(*tensors(), **keywords)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "out, error, words",
    [
        (torch.empty(1, 4, 8, 32), errors.ShapeMismatch, "out has shape .*expected"),
        (torch.empty(1, 4, 8, 64, dtype=torch.float16), errors.UnsupportedDtype, "out has dtype float16"),
        (torch.empty(1, 4, 64, 8).mT, errors.ShapeMismatch, "unit stride along head_dim"),
        (torch.empty(1, 1, 1, 64).expand(1, 4, 8, 64), errors.ShapeMismatch, "rows of it share memory"),
        ([1.0], TypeError, "out is a list, expected a torch.Tensor"),
    ],
)
def test_attention_refuses_an_out_that_does_not_fit(out, error, words):
    with pytest.raises(error, match=words):
        jitgen.attention(*tensors(), out=out)


def test_attention_refuses_an_out_over_the_keys_or_values_that_it_reads():
    q, k, v = tensors()
    for name, t in (("k", k), ("v", v)):
        with pytest.raises(errors.ShapeMismatch, match=f"out shares memory with {name}, which is read"):
            jitgen.attention(q, k, v, out=t)
    memory = torch.randn(2 * q.numel())
    half = q.numel() // 2
    k, out = (memory[begin : begin + q.numel()].view(q.shape) for begin in (0, half))
    with pytest.raises(errors.ShapeMismatch, match="out shares memory with k"):
        jitgen.attention(q, k, v, out=out)


def test_an_out_beside_the_keys_and_values_is_taken():
    """As in one tensor of q, k and v for each token, whose rows lie between one another."""
    b, heads, length, dim = tensors()[0].shape
    packed = torch.randn(b, length, 4, heads, dim)
    q, k, v, out = packed.permute(2, 0, 3, 1, 4)
    want = jitgen.attention(q, k, v)
    assert jitgen.attention(q, k, v, out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, want) and torch.equal(packed[:, :, 3].transpose(1, 2), want)
    memory = torch.randn(2, *q.shape)
    jitgen.attention(q, memory[0], v, out=memory[1])


def test_attention_refuses_captures_too_small_for_the_positions_they_serve():
    bias = torch.zeros(5)
    with pytest.raises(
        errors.ShapeMismatch, match="captured tensor 'bias' has size 5 along axis 0, which kv_idx indexes up to 7"
    ):
        jitgen.attention(*tensors(), score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[kv_idx])


def test_attention_refuses_empty_captures():
    empty = torch.zeros(0)
    with pytest.raises(errors.ShapeMismatch, match="captured tensor 'empty' is empty along axis 0, and a hook reads it there"):
        jitgen.attention(*tensors(), score_mod=lambda s, b, h, q_idx, kv_idx: s + empty[kv_idx // 2])
    nothing = torch.zeros(0, 64)
    with pytest.raises(errors.ShapeMismatch, match="captured tensor 'nothing' is empty along axis 0"):
        jitgen.attention(*tensors(), jitgen.Variant(q_transform=lambda q, b, h, pos: q + nothing[pos]))


def test_attention_refuses_captured_rows_shorter_than_the_output():
    gate = torch.zeros(4, 16)
    with pytest.raises(errors.ShapeMismatch, match="captured tensor 'gate' has size 16 along axis 1, which d indexes up to 63"):
        jitgen.attention(*tensors(), jitgen.Variant(output_transform=lambda o, lse, b, h, q_idx: o * gate[h]))


def test_a_score_is_no_condition():
    with pytest.raises(errors.UnsupportedVariant, match=r"returned bool, expected a number\. Make it a mask_mod"):
        jitgen.attention(*tensors(), score_mod=lambda s, b, h, q_idx, kv_idx: kv_idx <= q_idx)


def test_attention_refuses_captures_on_another_device():
    bias = torch.zeros(8, device="meta")
    with pytest.raises(errors.UnsupportedDevice, match=r"captured tensor 'bias' is on meta, q is on cpu.*bias\.to"):
        jitgen.attention(*tensors(), score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[kv_idx])


def test_return_lse_needs_a_norm_that_has_one():
    class Sigmoid(jitgen.OnlineNorm):
        def update(self, s, st):
            return torch.sigmoid(s), 1.0, st

    with pytest.raises(errors.VariantError, match=r"has none. Give it a method lse\(state\)"):
        jitgen.attention(*tensors(), jitgen.Variant(softmax=Sigmoid), return_lse=True)
