"""How a call is timed. One machine state for all contenders: they take turns, in an order shuffled anew each round."""

from __future__ import annotations

import gc
import platform
import random
import re
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

Call = Callable[[], object]

FLUSH_BYTES = 256 << 20  # five times the 50 MB of L2 of an H100
CYCLES_PER_US = 2000  # of torch.cuda._sleep, rounded up: an H100 runs at no more than 1980 MHz
PAUSE_S = 0.01  # before a CPU sample: OpenMP workers of the contender before still spin for a moment; 30 ms cost SDPA 20 %
WARM_UPS = 3


@dataclass(frozen=True)
class Samples:
    """Times of one contender in milliseconds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile; the value itself when there is only one."""
        if len(self.values) < 2:
            return self.values[0], self.values[0]
        first, _, third = statistics.quantiles(self.values, n=4, method="inclusive")
        return first, third

    def to_json(self) -> dict[str, object]:
        """Median, quartiles, extremes and number of samples."""
        q1, q3 = self.quartiles
        found = {"median": self.median, "q1": q1, "q3": q3, "min": min(self.values), "max": max(self.values)}
        return {**{name: round(value, 6) for name, value in found.items()}, "samples": len(self.values)}


@dataclass(frozen=True)
class Budget:
    """How long to sample one contender: until ``seconds`` are spent, within ``least`` and ``most`` samples."""

    least: int
    most: int
    seconds: float

    def is_spent(self, taken: int, seconds: float) -> bool:
        """Whether a contender with these samples leaves the contest."""
        return taken >= self.most or (taken >= self.least and seconds >= self.seconds)


class Timer(Protocol):
    """A clock that times one round of calls."""

    device: str

    def warm_up(self, call: Call) -> float:
        """Run the call a few times; returns its host time in microseconds, without waiting for the device."""

    def adapt(self, call: Call) -> Call:
        """The call in the form that is timed."""

    def run_round(self, calls: Sequence[Call]) -> list[float | Exception]:
        """Milliseconds of each call, in order; an exception in place of a failed one."""

    def describe(self) -> str:
        """One sentence for the report."""


class CpuTimer:
    """Wall-clock time of a call on the CPU. Caches are as the call before left them."""

    device = "cpu"

    def warm_up(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6

    def adapt(self, call: Call) -> Call:
        return call

    def run_round(self, calls: Sequence[Call]) -> list[float | Exception]:
        times: list[float | Exception] = []
        for call in calls:
            time.sleep(PAUSE_S)
            try:
                start = time.perf_counter()
                call()
                times.append((time.perf_counter() - start) * 1e3)
            except Exception as error:  # one contender failing must not lose the others
                times.append(error)
        return times

    def describe(self) -> str:
        return (
            f"wall clock round one call after {PAUSE_S * 1e3:g} ms of rest; contenders take turns in shuffled order in "
            f"one process; median and quartiles; {torch.get_num_threads()} threads"
        )


class CudaTimer:
    """CUDA events round one call. Before each, 256 MiB are read, so nothing of the inputs is left in L2 (a flush that
    writes would leave dirty lines whose write-back is billed to the call); then the device sleeps for longer than the
    host needs to launch the call, so host time is not in the figure.
    """

    device = "cuda"

    def __init__(self, *, use_graph: bool = False) -> None:
        self.use_graph = use_graph
        self._flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")
        self._sleep_us = 100.0

    def warm_up(self, call: Call) -> float:
        host = []
        for _ in range(WARM_UPS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            host.append((time.perf_counter() - start) * 1e6)
        torch.cuda.synchronize()
        self._sleep_us = max(self._sleep_us, 2 * statistics.median(host))
        return statistics.median(host)

    def adapt(self, call: Call) -> Call:
        return captured(call) if self.use_graph else call

    def run_round(self, calls: Sequence[Call]) -> list[float | Exception]:
        events: list[tuple[Any, Any] | Exception] = []
        for call in calls:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.sum()
            torch.cuda._sleep(int(self._sleep_us * CYCLES_PER_US))
            try:
                start.record()
                call()
                end.record()
                events.append((start, end))
            except Exception as error:  # one contender failing must not lose the others
                events.append(error)
        torch.cuda.synchronize()
        return [pair if isinstance(pair, Exception) else pair[0].elapsed_time(pair[1]) for pair in events]

    def describe(self) -> str:
        what = "one replay of a CUDA graph of the call" if self.use_graph else "one call"
        return (
            f"CUDA events round {what}; {FLUSH_BYTES >> 20} MiB read before each (L2 flushed); device kept busy before "
            "the first event, so host time is outside; contenders take turns in shuffled order in one process; "
            "median and quartiles"
        )


def captured(call: Call) -> Call:
    """Replay of a CUDA graph that holds one call; for calls so short that launch gaps inside them matter."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> object:
        graph.replay()
        return output

    return replay


def interleave(calls: Mapping[str, Call], timer: Timer, budget: Budget, seed: int = 0) -> dict[str, Samples | Exception]:
    """Time contenders in turns until the budget of each is spent."""
    order, rng = list(calls), random.Random(seed)
    values: dict[str, list[float]] = {name: [] for name in order}
    failed: dict[str, Exception] = {}
    while order:
        rng.shuffle(order)
        for name, value in zip(order, timer.run_round([calls[name] for name in order]), strict=True):
            if isinstance(value, Exception):
                failed[name] = value
            else:
                values[name].append(value)
        order = [n for n in order if n not in failed and not budget.is_spent(len(values[n]), sum(values[n]) / 1e3)]
    return {name: failed.get(name) or Samples(tuple(values[name])) for name in calls}


class TimeLimit(BaseException):
    """A time limit ran out. Not an Exception: compilers catch those and carry on in another way."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the block after ``seconds``; without effect outside the main thread and where there is no SIGALRM."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def expire(signum: int, frame: object) -> None:
        raise TimeLimit(f"no output after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- the device -----------------------------------------------------------------------------------------------------


def device_problem(device: str) -> str:
    """Why this device cannot be used here, and what to do about it; empty when it can."""
    if device == "cpu" or torch.cuda.is_available():
        return ""
    has_cuda = torch.version.cuda is not None
    why = "torch sees no CUDA device" if has_cuda else f"torch {torch.__version__} was built without CUDA"
    return f"device cuda is not usable: {why}. Use --device cpu, or see 'jitgen doctor'."


def device_name(device: str) -> str:
    """The device as its maker calls it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def synchronize(device: str) -> None:
    """Wait for the device, so that a kernel's error appears here and not at a later contender."""
    if device == "cuda":
        torch.cuda.synchronize()


def release(device: str) -> None:
    """Let go of what the contenders of a finished group hold: compiled code of torch.compile, cached memory."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError:
            pass  # the device is lost: the next group will say so, and what was measured is still reported
