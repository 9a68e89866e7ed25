"""Every variant of the gallery as a compiled CPU kernel, against the oracle in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from gallery import CASES, Sizes
from gallery.rounding import inputs, largest_error, rounding_error

import jitgen
from jitgen import reference

HEAD_DIMS = (16, 24, 40, 48, 64)  # one a case: each costs a compile
# q_len, kv_len, q_index: decode, several tiles with odd ends, equal lengths, more queries than keys
CALLS = [(1, 301, "absolute"), (101, 301, "absolute"), (101, 301, "local"), (130, 130, "absolute"), (97, 67, "local")]
TIMES_SDPA = 1.5  # largest error allowed, as a multiple of that of torch's own kernel
TIMES_ROUNDING = 1.0  # largest error allowed, as a multiple of what rounding the weights and the output costs


def head_dim_of(case) -> int:
    return HEAD_DIMS[list(CASES).index(case.name) % len(HEAD_DIMS)]


def has_lse(program) -> bool:
    return program.norm is None or program.norm.lse is not None


def float32_bound(kv_len, want, tensors, variant, q_index):
    """Error that float32 allows: a few times that of the same formulas in float32, at least a sum of roundings."""
    plain = reference.attention(*tensors, variant, q_index=q_index, dtype=torch.float32)
    eps = torch.finfo(torch.float32).eps
    size = max(1.0, want.abs().max().item())
    bound = max(4 * largest_error(plain, want), eps * math.sqrt(kv_len) * size)
    assert bound < 3e-5 * size, f"the case is too badly conditioned to prove anything: bound {bound:.2g}, values to {size:.2g}"
    return bound


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_cpu_kernel_is_the_oracle(case):
    head_dim = head_dim_of(case)
    for q_len, kv_len, q_index in CALLS:
        z = Sizes(q_len, kv_len, head_dim=head_dim)
        variant, tensors = case.make(z), inputs(z)
        want_lse = has_lse(variant.trace().program)
        want = reference.attention(*tensors, variant, q_index=q_index, return_lse=want_lse)
        got = jitgen.attention(*tensors, variant, q_index=q_index, return_lse=want_lse)
        where = f"q_len {q_len}, kv_len {kv_len}, {q_index}, head_dim {head_dim}"
        if want_lse:
            (got, got_lse), (want, exact_lse) = got, want
            torch.testing.assert_close(got_lse.double(), exact_lse, rtol=1e-5, atol=2e-5, msg=lambda m: f"{where}: {m}")  # noqa: B023
        bound = float32_bound(kv_len, want, tensors, variant, q_index)
        error = largest_error(got, want)
        assert error <= bound, f"{where}: error {error:.3g}, allowed {bound:.3g}"


SHORT_DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", SHORT_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["causal", "sliding_window", "prefix_lm", "streaming", "morton_neighbourhood"])
def test_masked_kernel_is_as_accurate_as_sdpa(name, dtype):
    z = Sizes(101, 301, head_dim=64)
    variant, (q, k, v) = CASES[name].make(z), inputs(z, dtype)
    traced = variant.trace()
    keep = reference.mask_of(traced.program, traced.values(), batch=z.batch, num_q_heads=z.num_q_heads,
                             q_len=z.q_len, kv_len=z.kv_len, q_offset=z.kv_len - z.q_len)  # fmt: skip
    want = reference.attention(q, k, v, variant)
    theirs = F.scaled_dot_product_attention(q, *(t.repeat_interleave(2, 1) for t in (k, v)), attn_mask=keep)
    error, allowed = largest_error(jitgen.attention(q, k, v, variant), want), TIMES_SDPA * largest_error(theirs, want)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", SHORT_DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["soft_cap", "alibi_slopes", "t5_encoder", "gpt_oss", "sigmoid", "stick_breaking", "normalised_output"]
)
def test_kernel_in_a_short_dtype_costs_a_rounding(name, dtype):
    z = Sizes(101, 301, head_dim=32)
    variant, (q, k, v) = CASES[name].make(z), inputs(z, dtype)
    want = reference.attention(q, k, v, variant)
    error = largest_error(jitgen.attention(q, k, v, variant), want)
    allowed = TIMES_ROUNDING * rounding_error(q, k, v, variant, want, "absolute")
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
