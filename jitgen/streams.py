"""CUDA devices and their current streams, for launches: both cost a fraction of what torch.cuda takes.

A call runs on the device of its tensors, whatever device is current, and leaves that one current. A thread's current device as
torch knows it is not always the one whose context the driver has: torch puts off creating a context for a device that only was
current. So even a launch on the current device makes it current first; that costs no more than to ask for it.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import torch

from jitgen.errors import LaunchError

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


def capture_number(stream: int) -> int:
    """Identity of the CUDA graph that launches on a stream of the current device become part of; 0 where it captures none.

    Cost:    half a microsecond outside of a capture.
    """
    if not torch.cuda.is_current_stream_capturing():
        return 0
    status, number = ctypes.c_int(0), ctypes.c_ulonglong(0)
    if _capture_info()(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number)) == 0:
        return number.value
    return -next(_unknown)


def memory_apart(size: int, device: torch.device, stream: int) -> torch.Tensor:
    """Bytes for kernels on one stream of the current device that come from the memory of no CUDA graph, even while one is
    captured: they stay when the graph is gone, and torch.compile, which counts what lives in the memory of its graphs, does
    not meet them.

    Errors:  LaunchError; torch.OutOfMemoryError.
    Cost:    a thread, as what threads allocate may be put into a graph's memory; so seldom.
    """
    found: list[torch.Tensor | BaseException] = []
    driver, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    driver.cuCtxGetCurrent(ctypes.byref(context))

    def take() -> None:
        try:
            driver.cuCtxSetCurrent(context)
            driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(_RELAXED)))
            make_current(device.index)
            with torch.cuda.stream(_stream_apart(driver, device)):
                found.append(torch.empty(size, dtype=torch.uint8, device=device))
        except BaseException as error:  # raised below
            found.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    found[0].record_stream(torch.cuda.ExternalStream(stream, device=device))
    return found[0]


_RELAXED = 2  # a mode of captures: this thread allocates while another one captures
_NON_BLOCKING = 1  # a stream that does not wait for the default one
_streams_apart: dict[int | None, torch.cuda.ExternalStream] = {}


def _stream_apart(driver: ctypes.CDLL, device: torch.device) -> torch.cuda.ExternalStream:
    """A stream for memory alone: nothing runs there, so what is allocated is in use nowhere else."""
    if device.index not in _streams_apart:
        handle = ctypes.c_void_p()
        code = driver.cuStreamCreate(ctypes.byref(handle), _NON_BLOCKING)
        if code:
            raise LaunchError(f"the driver makes no stream on {device} (code {code}). Ask 'jitgen doctor' about the device.")
        _streams_apart[device.index] = torch.cuda.ExternalStream(handle.value, device=device)  # type: ignore[arg-type]
    return _streams_apart[device.index]


@cache
def _capture_info() -> Callable[..., int]:
    """What a driver says of a stream: its status of capture, and the number of the graph."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo  # type: ignore[no-any-return]
    except (OSError, AttributeError):
        return _no_answer


def _no_answer(*_: object) -> int:
    return 1


_unknown = itertools.count(1)  # graphs whose number a driver does not tell: each call is taken for the first of another


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
