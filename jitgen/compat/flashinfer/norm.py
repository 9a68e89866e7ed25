"""flashinfer.norm: root-mean-square norms as torch operations, so that code which imports them runs."""

from __future__ import annotations

import torch

from jitgen.compat.flashinfer.activation import written


def rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` along the last axis, in float32."""
    return written(normed(input.float(), eps) * weight.float(), input, out)


def fused_add_rmsnorm(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """Adds ``input`` to ``residual``, and puts the norm of the sum into ``input``."""
    total = residual.float() + input.float()
    residual.copy_(total)
    input.copy_(normed(total, eps) * weight.float())  # of the sum before it was rounded


def gemma_rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """As rmsnorm, with ``weight + 1`` in place of weight."""
    return rmsnorm(input, weight.float() + 1, eps, out)


def gemma_fused_add_rmsnorm(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """As fused_add_rmsnorm, with ``weight + 1`` in place of weight."""
    fused_add_rmsnorm(input, residual, weight.float() + 1, eps)


def normed(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x over the root of its mean square along the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
