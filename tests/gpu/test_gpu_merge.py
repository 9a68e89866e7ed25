"""merge_states and merge_state on the device, by one kernel, against float64 from the definition."""

from __future__ import annotations

import math

import pytest
import torch

import jitgen
from jitgen import runtime

TOLERANCE = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 0.0}  # rounding of outputs within +-1
ROUNDING = 5e-6  # of float32 arithmetic


def states_of(rows, count, heads, dim, dtype):
    """Outputs and logsumexps, some of states that have seen no key, whose outputs are NaN."""
    outs = torch.rand(rows, count, heads, dim, device="cuda").mul_(2).sub_(1).to(dtype)
    lses = 5 * torch.randn(rows, count, heads, device="cuda")
    empty = torch.rand(rows, count, heads, device="cuda") < 0.3
    empty[0] = True  # a row without any key
    return outs.masked_fill(empty[..., None], math.nan), lses.masked_fill(empty, -math.inf)


def expected(outs, lses, base):
    natural = lses.double() * (math.log(2.0) if base == 2 else 1.0)
    merged = natural.logsumexp(1)
    weights = torch.nan_to_num((natural - merged[:, None]).exp())
    values = torch.where(weights[..., None] > 0, outs.double(), 0.0)
    return (weights[..., None] * values).sum(1), merged / (math.log(2.0) if base == 2 else 1.0)


def check(got, want, dtype):
    (out, lse), (out64, lse64) = got, want
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert float((out.double() - out64).abs().max()) <= TOLERANCE[dtype] + ROUNDING
    seen = torch.isfinite(lse64)
    assert torch.equal(lse[~seen], lse64[~seen].float()) and not out[~seen].count_nonzero()
    assert bool(((lse.double() - lse64)[seen].abs() < 1e-4).all())


@pytest.mark.parametrize("base", ["e", 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "count", "heads", "dim"), [(7, 1, 5, 64), (33, 2, 4, 96), (5, 9, 3, 128), (2, 3, 1, 512), (9, 3, 2, 40)]
)
def test_states_are_merged(rows, count, heads, dim, dtype, base):
    outs, lses = states_of(rows, count, heads, dim, dtype)
    check(jitgen.merge_states(outs, lses, base=base), expected(outs, lses, base), dtype)
    apart = jitgen.merge_states(list(outs.unbind(1)), list(lses.unbind(1)), base=base)
    assert all(torch.equal(a, b) for a, b in zip(apart, jitgen.merge_states(outs, lses, base=base), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_states_with_strides_of_their_own(dtype):
    outs, lses = states_of(70, 2, 6, 64, dtype)
    a, b = outs[:, 0].transpose(0, 1).contiguous().transpose(0, 1), torch.cat((outs[:, 1], outs[:, 1]), 2)[..., :64]
    lse_a = lses[:, 0].T.contiguous().T
    assert not a.is_contiguous() and not b.is_contiguous() and not lse_a.is_contiguous()
    check(jitgen.merge_state(a, lse_a, b, lses[:, 1], base=2), expected(outs, lses, 2), dtype)


def test_no_rows_and_a_captured_graph():
    outs, lses = states_of(11, 2, 4, 128, torch.bfloat16)
    empty = jitgen.merge_state(outs[:0, 0], lses[:0, 0], outs[:0, 1], lses[:0, 1])
    assert empty[0].shape == (0, 4, 128) and empty[1].shape == (0, 4)
    jitgen.merge_states(outs, lses)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = jitgen.merge_states(outs, lses)
    fresh = states_of(11, 2, 4, 128, torch.bfloat16)
    outs.copy_(fresh[0])
    lses.copy_(fresh[1])
    graph.replay()
    check(got, expected(*fresh, "e"), torch.bfloat16)
    assert any(k.spec.family == "merge_outs" for k in runtime.loaded_kernels())


def test_gradients_keep_to_torch_operations():
    outs, lses = states_of(3, 2, 4, 64, torch.bfloat16)
    outs = outs.nan_to_num_().requires_grad_()
    jitgen.merge_states(outs, lses)[0].float().sum().backward()
    assert outs.grad is not None and bool(outs.grad.isfinite().all())
