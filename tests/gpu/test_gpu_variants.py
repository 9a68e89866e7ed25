"""Every variant of the gallery as a CUDA kernel of each family, against the oracle in float64 on the device."""

from __future__ import annotations

import pytest
import torch
from gallery import CASES, Sizes
from gallery.rounding import inputs, largest_error, rounding_error

import jitgen
from jitgen import reference
from jitgen.ir import walk

TIMES_ROUNDING = 1.5  # largest error allowed, as a multiple of what rounding the weights and the output costs
# q_len, kv_len, q_index: decode, several tiles with odd ends, equal lengths, more queries than keys
CALLS = [(1, 301, "absolute"), (101, 301, "absolute"), (101, 301, "local"), (130, 130, "absolute"), (257, 67, "local")]
HEAD_DIMS = (64, 128, 96)  # one a case: each costs a compile


def approximates_tanh(program) -> bool:
    """Whether kernels use tanh.approx, which is good to 2**-11 and bends logits by that much."""
    return any(n.op in ("tanh", "tanh_approx", "gelu_tanh") for n in walk(*program.roots()))


def assert_is_the_oracle(case, family, dtype, head_dim, calls):
    for q_len, kv_len, q_index in calls:
        z = Sizes(q_len, kv_len, head_dim=head_dim, device="cuda")
        variant, (q, k, v) = case.make(z), inputs(z, dtype)
        program = variant.trace().program
        want_lse = program.norm is None or program.norm.lse is not None
        want = reference.attention(q, k, v, variant, q_index=q_index, return_lse=want_lse)
        got = jitgen.attention(q, k, v, variant, q_index=q_index, return_lse=want_lse, family=family)
        where = f"q_len {q_len}, kv_len {kv_len}, {q_index}, head_dim {head_dim}"
        if want_lse:
            (got, got_lse), (want, exact_lse) = got, want
            atol = 5e-3 if approximates_tanh(program) else 1e-4
            torch.testing.assert_close(got_lse.double(), exact_lse, rtol=1e-5, atol=atol, msg=lambda m: f"{where}: {m}")  # noqa: B023
        allowed = TIMES_ROUNDING * rounding_error(q, k, v, variant, want, q_index) + torch.finfo(dtype).eps * 1e-2
        error = largest_error(got, want)
        assert error <= allowed, f"{where}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_cuda_kernel_is_the_oracle(case, family):
    head_dim = HEAD_DIMS[list(CASES).index(case.name) % len(HEAD_DIMS)]
    assert_is_the_oracle(case, family, torch.bfloat16, head_dim, CALLS)


# float16 has three bits more: what bfloat16 hides shows here.
@pytest.mark.parametrize(
    "name",
    [
        "causal",
        "alibi_slopes",
        "t5_encoder",
        "gpt_oss",
        "packed_documents",
        "sigmoid",
        "stick_breaking",
        "gated_output",
    ],
)
def test_cuda_kernel_in_float16_is_the_oracle(name, family):
    assert_is_the_oracle(CASES[name], family, torch.float16, 64, CALLS)


@pytest.mark.parametrize("name", ["causal", "gemma2", "alibi_slopes", "chunked", "stick_breaking"])
def test_cuda_kernel_is_the_oracle_at_the_edges_of_tiles(name, family):
    edges = [
        (63, 63, "absolute"),
        (64, 128, "absolute"),
        (65, 129, "absolute"),
        (127, 192, "local"),
        (256, 513, "absolute"),
    ]
    assert_is_the_oracle(CASES[name], family, torch.bfloat16, 64, edges)
