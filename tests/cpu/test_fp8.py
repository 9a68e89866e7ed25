"""8-bit inputs and scales: what they mean, on the CPU against float64, which kernel they choose, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from norm_cases import Sigmoid

import jitgen
from jitgen import errors, fp8, reference, runtime
from jitgen.__main__ import main
from jitgen.families import cuda_spec, padded_head_dims
from jitgen.prebuild_units import spec_of
from jitgen.spec import FP8_DTYPE
from jitgen.target import cuda_target, detect_cpu
from jitgen.tiles_fp8 import FP8_HEAD_DIMS

E4M3 = torch.float8_e4m3fn
BATCH, HEADS, KV_HEADS = 2, 8, 4
# Relative error of an output that is exact but for its rounding, half of bfloat16's epsilon. An AMX kernel, whose inputs have
# 8 or 16 bits, rounds its weights too.
INPUTS_ERROR = 2.0**-9 * (2 if detect_cpu().isa == "amx" else 1)


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def inputs(q_len=37, kv_len=61, head_dim=64, dtype=E4M3):
    generator = torch.Generator().manual_seed(q_len * 1000 + kv_len)
    shapes = [(BATCH, HEADS, q_len, head_dim), *[(BATCH, KV_HEADS, kv_len, head_dim)] * 2]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def scaled(t, scale):
    """``t`` in float64, multiplied as documented."""
    t = t.double()
    if scale is None:
        return t
    scale = torch.as_tensor(scale, dtype=torch.float64)
    if scale.numel() == 1:
        return t * scale.reshape(())
    return t * scale.reshape(-1, t.shape[1], 1, 1)


def relative_error(got, want):
    assert not got.isnan().any()
    return ((got.double() - want).norm() / want.norm()).item()


def random_scales(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


SCALES = {
    "none": (None, None, None),
    "numbers": (0.5, 3, 0.25),
    "tensors_of_one": (torch.tensor(2.0), torch.tensor([0.5]), torch.tensor(3.0)),
    "per_head": (random_scales(HEADS), random_scales(KV_HEADS, seed=1), random_scales(KV_HEADS, seed=2)),
    "per_request_and_head": (random_scales(BATCH, HEADS), random_scales(BATCH, KV_HEADS), random_scales(BATCH, KV_HEADS)),
    "one_of_each": (0.7, random_scales(KV_HEADS), random_scales(BATCH, KV_HEADS)),
    "v_only": (None, None, random_scales(KV_HEADS)),
    "strided": (random_scales(HEADS, 2)[:, 0], random_scales(KV_HEADS, BATCH).T, random_scales(1).expand(KV_HEADS)),
    "bfloat16": (random_scales(HEADS).bfloat16(), random_scales(KV_HEADS).bfloat16(), None),
}


@pytest.mark.parametrize("dtype", [E4M3, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
def test_scales_multiply_the_inputs(dtype, scales):
    q, k, v = inputs(dtype=dtype)
    named = dict(zip(("scale_q", "scale_k", "scale_v"), scales, strict=True))
    got, lse = jitgen.attention(q, k, v, mask_mod=causal, return_lse=True, **named)
    want, want_lse = reference.attention(*map(scaled, (q, k, v), scales), mask_mod=causal, return_lse=True)
    assert got.dtype == (torch.bfloat16 if dtype == E4M3 else dtype)
    allowed = {E4M3: INPUTS_ERROR, torch.bfloat16: INPUTS_ERROR, torch.float32: 1e-6}
    assert relative_error(got, want) < allowed[dtype]
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


def every_hook():
    doc, slopes, gate = torch.arange(61) // 20, torch.linspace(0.1, 1.0, HEADS), torch.linspace(-1.0, 1.0, HEADS)
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx, *, scale: 5.0 * torch.tanh((s + slopes[h] * (kv_idx - q_idx) * scale) / 5.0),
        mask_mod=lambda b, h, q_idx, kv_idx: (doc[q_idx] == doc[kv_idx]) & (kv_idx <= q_idx),
        sink=torch.linspace(-1.0, 1.0, HEADS),
        output_transform=lambda o, lse, b, h, q_idx: (o + 0.1) * torch.sigmoid(gate[h]),
        lse_transform=lambda lse, b, h, q_idx: lse * 2.0,
    )


def test_hooks_see_scaled_scores_and_outputs():
    q, k, v = inputs()
    scales = SCALES["per_request_and_head"]
    got, lse = jitgen.attention(q, k, v, every_hook(), scale_q=scales[0], scale_k=scales[1], scale_v=scales[2], return_lse=True)
    want, want_lse = reference.attention(*map(scaled, (q, k, v), scales), every_hook(), return_lse=True)
    assert relative_error(got, want) < INPUTS_ERROR
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


def test_new_values_of_scales_compile_nothing():
    q, k, v = inputs()
    jitgen.attention(q, k, v, scale_q=random_scales(HEADS), scale_v=0.5)
    known = len(runtime.loaded_kernels())
    jitgen.attention(q, k, v, scale_q=random_scales(HEADS, seed=9), scale_v=0.75)
    assert len(runtime.loaded_kernels()) == known


def test_one_scale_is_not_taken_for_scales_of_heads():
    q, k, v = inputs()
    per_head = random_scales(HEADS)
    for scale in (per_head[:1], per_head, per_head[0]):  # all three of rank 0 or 1, contiguous
        got = jitgen.attention(q, k, v, scale_q=scale)
        assert relative_error(got, reference.attention(scaled(q, scale), k.double(), v.double())) < INPUTS_ERROR


@pytest.mark.parametrize("wanted", [None, torch.bfloat16, torch.float16])
def test_output_has_the_dtype_asked_for(wanted):
    q, k, v = inputs()
    want = reference.attention(q.double(), k.double(), v.double())
    got = jitgen.attention(q, k, v, out_dtype=wanted)
    assert got.dtype == (wanted or torch.bfloat16)
    out = torch.full(got.shape, math.nan, dtype=got.dtype)
    assert jitgen.attention(q, k, v, out_dtype=wanted, out=out) is out
    assert torch.equal(out, got)
    assert relative_error(got, want) < (2.0**-12 if wanted == torch.float16 else INPUTS_ERROR)


# query heads, KV heads, rows, keys, head dims: decode in place, whole and odd tiles, few keys, dims that are no whole vectors
CPU_SHAPES = [
    (8, 2, 1, 300, (64, 64)), (4, 4, 70, 513, (128, 128)), (6, 2, 3, 1, (64, 64)), (4, 1, 40, 333, (24, 40)),
    (4, 2, 100, 259, (192, 128)), (2, 1, 1, 77, (8, 8)),
]  # fmt: skip


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", CPU_SHAPES, ids=str)
def test_cpu_kernel_is_that_of_the_same_numbers_in_16_bits(shape, out_dtype):
    heads, kv_heads, q_len, kv_len, (dim, dim_v) = shape
    generator = torch.Generator().manual_seed(kv_len)

    def random(*size):
        return torch.randn(size, generator=generator)

    q, k, v = random(2, heads, q_len, dim), random(1, kv_heads, kv_len, dim), random(1, kv_heads, kv_len, dim_v)
    v[0, 0, kv_len // 2, 3] = 3e-3  # denormal, one with the least of bits
    forms = [
        (q, k, v),
        (q.transpose(1, 2).contiguous().transpose(1, 2), k, v),  # heads inside positions
        (q, k.transpose(2, 3).contiguous().transpose(2, 3), v.transpose(2, 3).contiguous().transpose(2, 3)),  # and columns
    ]
    for tensors in forms:
        eight = [t.to(E4M3) for t in tensors]
        got = jitgen.attention(*eight, mask_mod=causal, q_index="local", out_dtype=out_dtype, return_lse=True)
        want = jitgen.attention(*[t.to(out_dtype) for t in eight], mask_mod=causal, q_index="local", return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("q_len", [1, 40])
def test_every_code_is_read_and_nan_stays(q_len):
    """Values that are codes, each under a key that weighs nearly all; then a key with NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3)
    q, k = torch.zeros(1, 1, q_len, 8), torch.zeros(1, 1, 16, 8)
    q[..., 0], k[0, 0, 5, 0] = 16.0, 16.0
    v = torch.zeros(1, 1, 16, 256).to(E4M3)
    v.view(torch.uint8)[0, 0, 5] = codes.view(torch.uint8)
    out = jitgen.attention(q.to(E4M3), k.to(E4M3), v, scale=1.0)
    want = codes.float().expand(1, 1, q_len, -1).bfloat16()
    assert torch.equal(out.nan_to_num(nan=777.0), want.nan_to_num(nan=777.0))
    k[0, 0, 3, 2] = math.nan
    assert jitgen.attention(q.to(E4M3), k.to(E4M3), torch.ones(1, 1, 16, 64).to(E4M3)).isnan().all()


def test_flex_attention_takes_8_bits():
    q, k, v = inputs()
    want = reference.attention(q.double(), k.double(), v.double())
    got = jitgen.flex_attention(q, k, v, enable_gqa=True)
    assert relative_error(got, want) < INPUTS_ERROR


def test_negative_scale_turns_the_order_of_keys():
    q, k, v = inputs()
    want = reference.attention(q.double(), k.double(), v.double(), scale=-0.5)
    assert relative_error(jitgen.attention(q, k, v, scale=-0.5), want) < INPUTS_ERROR
    assert torch.equal(fp8.negated(q).float(), -q.float())


# ---- the kernel that is chosen --------------------------------------------------------------------------------------


def test_show_names_the_family(capsys):
    arguments = ["show", "tests/cpu/test_fp8.py:causal", "--arch", "9.0a", "--dtype", FP8_DTYPE, "--q-len", "256"]
    assert main([*arguments, "--json"]) == 0
    kernel = json.loads(capsys.readouterr().out)["kernel"]
    assert (kernel["family"], kernel["dtype"], kernel["out_dtype"]) == ("sm90_fp8", FP8_DTYPE, "bfloat16")
    assert kernel["key"].startswith("sm90_fp8-")
    assert main(arguments) == 0
    assert "sm90_fp8, float8_e4m3fn to bfloat16, head_dim 128" in capsys.readouterr().out


def test_prebuilding_makes_the_spec_of_a_call():
    program = jitgen.Variant().trace().program
    spec = spec_of(program, FP8_DTYPE, (80, 80), "9.0")
    assert (spec.family, spec.head_dim, spec.head_dim_v, spec.out_dtype) == ("sm90_fp8", 128, 128, "bfloat16")
    assert spec.target.arch == "9.0a"


def test_output_dtypes_are_different_modules():
    program = jitgen.Variant().trace().program
    specs = [
        cuda_spec(program, FP8_DTYPE, (128, 128), "sm90_fp8", cuda_target("9.0a"), out_dtype=out)
        for out in ("bfloat16", "float16")
    ]
    assert len({spec.digest for spec in specs}) == 2


@pytest.mark.parametrize("head_dims", [(8, 8), (64, 40), (96, 96), (128, 64), (192, 128), (256, 256)])
def test_head_dims_are_padded_to_one_that_has_tiles(head_dims):
    padded = padded_head_dims(*head_dims, FP8_DTYPE)
    assert padded[0] == padded[1] >= max(head_dims)
    assert padded[0] in FP8_HEAD_DIMS


def test_workspace_holds_whole_tiles_and_a_counter_of_every_head_that_differs():
    tiles = cuda_spec(jitgen.Variant().trace().program, FP8_DTYPE, (64, 64), "sm90_fp8", cuda_target("9.0a")).tiles
    v = torch.zeros(3, 4, 2 * tiles.tile_kv + 1, 64, dtype=E4M3)
    assert fp8.workspace_bytes(tiles, v.shape, v.stride()) == 3 * 4 * 3 * tiles.tile_kv * 64 + 4 * 13
    assert fp8.workspace_bytes(tiles, v.shape, (0, *v.stride()[1:])) == 4 * 3 * tiles.tile_kv * 64 + 4 * 5


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"scale_q": torch.ones(3)}, errors.ShapeMismatch, ["scale_q has shape (3,)", "(8,)", "(2, 8)"]),
        ({"scale_k": torch.ones(HEADS)}, errors.ShapeMismatch, ["scale_k has shape (8,)", "(4,)"]),
        ({"scale_v": torch.ones(KV_HEADS, BATCH)}, errors.ShapeMismatch, ["scale_v has shape (4, 2)", "(2, 4)"]),
        ({"scale_v": torch.ones(BATCH, KV_HEADS, 1)}, errors.ShapeMismatch, ["scale_v has shape (2, 4, 1)"]),
        (
            {"scale_q": torch.ones(HEADS, dtype=torch.int32)},
            errors.UnsupportedDtype,
            ["scale_q has dtype torch.int32", "float()"],
        ),
        ({"scale_q": "big"}, errors.UnsupportedDtype, ["scale_q is a str", "number or a tensor"]),
        ({"scale_q": torch.ones(HEADS, device="meta")}, errors.UnsupportedDevice, ["scale_q is on meta", "q is on cpu"]),
        ({"out_dtype": torch.float32}, errors.UnsupportedDtype, ["out_dtype is torch.float32", "torch.bfloat16"]),
        ({"out": torch.zeros(BATCH, HEADS, 37, 64)}, errors.UnsupportedDtype, ["out has dtype torch.float32", "out_dtype="]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_options_are_refused(options, error, words):
    with pytest.raises(error) as caught:
        jitgen.attention(*inputs(), **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_other_dtypes_have_no_choice_of_output():
    with pytest.raises(errors.UnsupportedDtype, match=r"out_dtype is torch\.float16, q has torch\.float32"):
        jitgen.attention(*inputs(dtype=torch.float32), out_dtype=torch.float16)


def test_mixed_dtypes_are_refused():
    q, k, v = inputs()
    with pytest.raises(errors.UnsupportedDtype, match="v has dtype bfloat16, q has float8_e4m3fn"):
        jitgen.attention(q, k, v.bfloat16())


@pytest.mark.parametrize("arch", ["8.0", "8.9", "9.0", "10.0"])
def test_other_architectures_are_refused_with_the_remedy(arch):
    program = jitgen.Variant().trace().program
    with pytest.raises(errors.UnsupportedDtype, match=r"float8_e4m3fn needs compute capability 9\.0 .*Dequantise"):
        cuda_spec(program, FP8_DTYPE, (128, 128), "sm90_fp8", cuda_target(arch))


@pytest.mark.parametrize("dtype, family", [(FP8_DTYPE, "sm90"), (FP8_DTYPE, "sm80"), ("bfloat16", "sm90_fp8")])
def test_families_of_other_dtypes_are_refused(dtype, family):
    with pytest.raises(errors.VariantError, match=f"family='{family}' does not take {dtype}"):
        cuda_spec(jitgen.Variant().trace().program, dtype, (128, 128), family, cuda_target("9.0a"))


def test_online_norm_is_refused_by_the_8_bit_kernel_alone():
    variant = jitgen.Variant(softmax=Sigmoid)
    with pytest.raises(errors.UnsupportedVariant, match="weights of any size"):
        cuda_spec(variant.trace().program, FP8_DTYPE, (128, 128), "sm90_fp8", cuda_target("9.0a"))
    q, k, v = inputs()
    want = reference.attention(q.double(), k.double(), v.double(), variant)
    assert relative_error(jitgen.attention(q, k, v, variant), want) < INPUTS_ERROR
