"""CUDA devices and their current streams, for launches: both cost a fraction of what torch.cuda takes.

A call runs on the device of its tensors, whatever device is current, and leaves that one current. A thread's current device as
torch knows it is not always the one whose context the driver has: torch puts off creating a context for a device that only was
current. So even a launch on the current device makes it current first; that costs no more than to ask for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from jitgen.runtime import CompiledKernel

Result = TypeVar("Result")


def _exchange(index: int) -> int:
    before = torch.cuda.current_device()
    torch.cuda.set_device(index)
    return before


def _raw_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


# What torch has below its public functions, which stand in where it is absent: so in a torch for CPUs, which never calls them.
# The first two make a device current and return the one that was; the second, which is for going back to it, creates no context
# on a device that has none. The third gives the current stream of a device by its number.
make_current = getattr(torch._C, "_cuda_exchangeDevice", _exchange)
make_current_again = getattr(torch._C, "_cuda_maybeExchangeDevice", _exchange)
current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _raw_stream)


def cuda_index(device: torch.device) -> int | None:
    """The number of a CUDA device; None for the CPU, whatever number it was given."""
    return device.index if device.type == "cuda" else None


def stream_of(index: int | None) -> int:
    """The current stream of CUDA device ``index``; 0 for the CPU, None."""
    return 0 if index is None else current_stream(index)


def call_on(index: int | None, function: Callable[..., Result], *args: object) -> Result:
    """Call a function, such as an entry point of a module, with CUDA device ``index`` current; None: one of the CPU's."""
    if index is None:
        return function(*args)
    before = make_current(index)
    return function(*args) if before == index else call_and_leave(before, function, *args)


def call_and_leave(before: int, function: Callable[..., Result], *args: object) -> Result:
    """Call a function for which another CUDA device has been made current, then go back to device ``before``."""
    try:
        return function(*args)
    finally:
        make_current_again(before)


def is_capturing(device: torch.device) -> bool:
    """Whether what a device's current stream is given becomes part of a CUDA graph."""
    return device.type == "cuda" and call_on(device.index, torch.cuda.is_current_stream_capturing)


def record_event(device: torch.device) -> torch.cuda.Event:
    """An event behind all that the current stream of a CUDA device has been given so far."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def start(kernel: CompiledKernel, index: int | None, packed: bytes) -> None:
    """Launch a kernel with CUDA device ``index`` current; None: one of the CPU's.

    Errors:  LaunchError.
    """
    code = call_on(index, kernel.launch, packed)
    if code:
        kernel.raise_error(code)
