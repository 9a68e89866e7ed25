"""Inputs for a variant in a dtype, and the error that this dtype allows."""

from __future__ import annotations

import torch

import jitgen
from gallery.case import Sizes
from jitgen import reference

Tensor = torch.Tensor


def inputs(z: Sizes, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Normally distributed q, k and v."""
    generator = torch.Generator().manual_seed(z.q_len * 1000 + z.kv_len)
    shapes = (z.num_q_heads, z.q_len), (z.num_kv_heads, z.kv_len), (z.num_kv_heads, z.kv_len)
    q, k, v = (torch.randn((z.batch, *shape, z.head_dim), generator=generator).to(z.device, dtype) for shape in shapes)
    return q, k, v


def largest_error(got: Tensor, want: Tensor) -> float:
    assert not got.isnan().any()
    return (got.double() - want.double()).abs().max().item()


def rounding_error(q: Tensor, k: Tensor, v: Tensor, variant: jitgen.Variant, want: Tensor, q_index: str) -> float:
    """What rounding the weights and the output to the dtype of v costs.

    Values changed by a random part of half a unit stand for rounded weights: a weight and its value enter as a product.
    """
    unit = torch.finfo(v.dtype).eps / 2
    noise = 2 * torch.rand(v.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(v.device) - 1
    changed = reference.attention(q, k, v.double() * (1 + unit * noise), variant, q_index=q_index)
    return largest_error(changed, want) + largest_error(want.to(v.dtype), want)


def check_attention(variant: jitgen.Variant, q: Tensor, k: Tensor, v: Tensor, where: str, *, atol: float = 2e-4,
                    family: str | None = None) -> Tensor:  # fmt: skip
    """The output of jitgen.attention, once it and its logsumexp have been compared with the oracle. ``atol``: of logsumexps."""
    want, want_lse = reference.attention(q, k, v, variant, return_lse=True)
    out = torch.full_like(q, torch.nan)
    got, got_lse = jitgen.attention(q, k, v, variant, return_lse=True, out=out, family=family)
    torch.testing.assert_close(got_lse.double(), want_lse, rtol=1e-5, atol=atol, msg=lambda m: f"{where}: {m}")
    allowed = 1.5 * rounding_error(q, k, v, variant, want, "absolute") + torch.finfo(q.dtype).eps * 1e-2
    error = largest_error(got, want)
    assert error <= allowed, f"{where}: error {error:.3g}, allowed {allowed:.3g}"
    return got
