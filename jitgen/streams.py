"""The current CUDA device and its current stream, for launches: both cost a fraction of what torch.cuda takes to say them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from jitgen.runtime import CompiledKernel

Result = TypeVar("Result")

current_device = getattr(torch._C, "_cuda_getDevice", None)  # absent from a torch for CPUs
current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # of a device, by its number


def cuda_index(device: torch.device) -> int | None:
    """The number of a CUDA device; None for the CPU, whatever number it was given."""
    return device.index if device.type == "cuda" else None


def stream_of(index: int | None) -> int:
    """The current stream of CUDA device ``index``; 0 for the CPU, None."""
    return 0 if index is None else current_stream(index)  # type: ignore[misc]


def call_on(index: int | None, function: Callable[..., Result], *args: object) -> Result:
    """Call a function, such as an entry point of a module, with CUDA device ``index`` current; None: one of the CPU's."""
    if index is None or index == current_device():  # type: ignore[misc]
        return function(*args)
    with torch.cuda.device(index):
        return function(*args)


def start(kernel: CompiledKernel, index: int | None, packed: bytes) -> None:
    """Launch a kernel with CUDA device ``index`` current; None: one of the CPU's.

    Errors:  LaunchError.
    """
    code = call_on(index, kernel.launch, packed)
    if code:
        kernel.raise_error(code)
