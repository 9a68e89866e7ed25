"""CUDA graphs that calls become part of: which one a stream captures, memory for its calls, and when that may go.

A graph is replayed with the addresses that its calls were given, by whoever holds it, so memory of such calls stays as long as
the graph or an executable made of it. The driver says when that is: a graph owns references to "user objects", and calls a
function when the last of them is given up, after the last replay has ended.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Hashable
from functools import cache
from typing import Any

import torch

from jitgen.errors import LaunchError
from jitgen.streams import make_current

_RELAXED = 2  # a mode of captures: this thread allocates while another one captures
_NON_BLOCKING = 1  # a stream that does not wait for the default one
_NO_DESTRUCTOR_SYNC = 1  # the only kind of user object there is: no call waits for its function
_MOVE = 1  # the graph takes the reference over
_SEMAPHORE_BYTES = 64  # sem_t has 32 on x86-64


def capture_number(stream: int) -> int:
    """Identity of the CUDA graph that launches on a stream of the current device become part of; 0 where it captures none.

    Cost:    half a microsecond outside of a capture.
    """
    return _capture(stream)[0] if torch.cuda.is_current_stream_capturing() else 0


def _capture(stream: int) -> tuple[int, int]:
    """Number and handle of the graph that a stream captures; where a driver does not tell, a number of no other and 0."""
    status, number, graph = ctypes.c_int(0), ctypes.c_ulonglong(0), ctypes.c_void_p()
    ask = getattr(_driver(), "cuStreamGetCaptureInfo_v2", None)
    if ask and ask(ctypes.c_void_p(stream), *map(ctypes.byref, (status, number, graph)), None, None) == 0:
        return number.value, graph.value or 0
    return -next(_unknown), 0


class GraphEnd:
    """Whether the CUDA graph that a stream captures when this is made can still be replayed.

    The driver's thread posts a semaphore of the C library: a function of Python could be called when the interpreter is gone.
    """

    def __init__(self, stream: int) -> None:
        self._libc, driver = ctypes.CDLL(None), _driver()
        self._libc.calloc.restype = ctypes.c_void_p
        self._posted = ctypes.c_void_p(self._libc.calloc(1, _SEMAPHORE_BYTES))  # zeros are a semaphore that nobody has posted
        self._libc.sem_init(self._posted, 0, 0)
        self.is_gone = False
        _, graph = _capture(stream)
        made, post = ctypes.c_void_p(), ctypes.cast(self._libc.sem_post, ctypes.c_void_p)
        if graph and driver.cuUserObjectCreate(ctypes.byref(made), self._posted, post, 1, _NO_DESTRUCTOR_SYNC) == 0:
            driver.cuGraphRetainUserObject(ctypes.c_void_p(graph), made, 1, _MOVE)

    def look(self) -> bool:
        """Whether the graph is gone; not for two threads at once."""
        if not self.is_gone and self._libc.sem_trywait(self._posted) == 0:
            self.is_gone = True
            self._libc.free(self._posted)
        return self.is_gone


class GraphTable:
    """What the calls in CUDA graphs keep, a table for each graph, until it is gone."""

    def __init__(self) -> None:
        self._graphs: dict[int, tuple[GraphEnd, dict[Hashable, Any]]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._graphs)

    def of(self, number: int, stream: int) -> dict[Hashable, Any]:
        """The table of the graph that a stream captures, by its ``capture_number``."""
        with self._lock:
            if number not in self._graphs:
                self._graphs[number] = GraphEnd(stream), {}
            return self._graphs[number][1]

    def drop(self) -> None:
        """Give up what belongs to graphs that are gone."""
        with self._lock:
            for number in [number for number, (end, _) in self._graphs.items() if end.look()]:
                del self._graphs[number]


def memory_apart(size: int, device: torch.device, stream: int | None) -> torch.Tensor:
    """Bytes on the current device that come from the memory of no CUDA graph, even while one is captured: torch.compile, which
    counts what lives in the memory of its graphs, does not meet them.

    ``stream``: the one whose kernels use them, waited for when they are given up; None where no kernel can use them then.
    Errors:  LaunchError; torch.OutOfMemoryError.
    Cost:    a thread, as what threads allocate may be put into a graph's memory; so seldom.
    """
    found: list[torch.Tensor | BaseException] = []
    driver, context = _driver(), ctypes.c_void_p()
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
    if stream is not None:
        found[0].record_stream(torch.cuda.ExternalStream(stream, device=device))
    return found[0]


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
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


_streams_apart: dict[int | None, torch.cuda.ExternalStream] = {}
_unknown = itertools.count(1)  # graphs whose number a driver does not tell: each call is taken for the first of another
