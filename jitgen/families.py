"""Which kernel family and which tiles serve a call: decided from the target and the spec, never from lengths."""

from __future__ import annotations

import torch

from jitgen.errors import ShapeMismatch, VariantError
from jitgen.program import Program
from jitgen.spec import KernelSpec, Tiles
from jitgen.target import CompileTarget, detect_cpu, detect_cuda

FAMILIES = ("cpu", "sm80", "sm90")
CUDA_HEAD_DIMS = (64, 96, 128, 192, 256)


def choose_spec(
    program: Program, dtype: str, head_dim: int, head_dim_v: int, device: torch.device, family: str | None = None
) -> KernelSpec:
    """The kernel for these types on this device. ``family`` forces one; otherwise the best that supports the program."""
    if family is not None and family not in FAMILIES:
        raise VariantError(f"family={family!r} is not a kernel family. Use one of {', '.join(FAMILIES)}.")
    if device.type == "cpu":
        if family not in (None, "cpu"):
            raise VariantError(f"family={family!r} needs cuda tensors, q is on cpu. Leave family out.")
        return KernelSpec("cpu", program, dtype, head_dim, head_dim_v, cpu_tiles(head_dim, head_dim_v), detect_cpu())
    if family == "cpu":
        raise VariantError(f"family='cpu' needs cpu tensors, q is on {device}. Leave family out.")
    return cuda_spec(program, dtype, head_dim, head_dim_v, "sm80", detect_cuda(device.index))


def cuda_spec(
    program: Program, dtype: str, head_dim: int, head_dim_v: int, family: str, target: CompileTarget
) -> KernelSpec:
    """A CUDA spec of a given family; also used for compile-only checks, where there is no device."""
    from jitgen.tiles import sm80_tiles

    return KernelSpec(family, program, dtype, head_dim, head_dim_v, sm80_tiles(head_dim, head_dim_v), target)


def cpu_tiles(head_dim: int, head_dim_v: int) -> Tiles:
    """Tiles of the CPU kernel: a packed K/V tile and the rows that meet it stay in a 512 kB second-level cache."""
    widest = max(head_dim, head_dim_v)
    return Tiles(tile_q=48, tile_kv=256 if widest <= 128 else 128 if widest <= 256 else 64)


def padded_head_dims(head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """Head dims of the CUDA kernel that serves these: the next supported ones."""
    if (head_dim, head_dim_v) == (192, 128):
        return head_dim, head_dim_v
    width = max(head_dim, head_dim_v)
    for supported in CUDA_HEAD_DIMS:
        if width <= supported:
            return supported, supported
    raise ShapeMismatch(
        f"head_dim {width} is larger than {CUDA_HEAD_DIMS[-1]}, the largest the cuda kernels take. Use the CPU, or split the heads."
    )
