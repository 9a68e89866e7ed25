"""flashinfer.activation: gated activations as torch operations, so that code which imports them runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_and_mul(input: torch.Tensor, out: torch.Tensor | None = None, enable_pdl: bool | None = None) -> torch.Tensor:
    """``silu(a) * b`` for the halves a and b of the last axis."""
    a, b = input.chunk(2, -1)
    return written(F.silu(a.float()) * b, input, out)


def gelu_and_mul(input: torch.Tensor, out: torch.Tensor | None = None, enable_pdl: bool | None = None) -> torch.Tensor:
    """``gelu(a) * b`` for the halves a and b of the last axis."""
    a, b = input.chunk(2, -1)
    return written(F.gelu(a.float()) * b, input, out)


def gelu_tanh_and_mul(input: torch.Tensor, out: torch.Tensor | None = None, enable_pdl: bool | None = None) -> torch.Tensor:
    """``gelu(a) * b`` with the tanh form of gelu, for the halves a and b of the last axis."""
    a, b = input.chunk(2, -1)
    return written(F.gelu(a.float(), approximate="tanh") * b, input, out)


def written(value: torch.Tensor, like: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """``value`` in the dtype of ``like``, in ``out`` if there is one."""
    return value.to(like.dtype) if out is None else out.copy_(value)
