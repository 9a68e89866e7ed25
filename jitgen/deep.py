"""Recursion over expressions that are deeper than Python's stack allows."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])
FRAMES = 100_000  # some ten for each of trace.MAX_NODES operations, one inside of the other, twice over
STACK_BYTES = 512 << 20  # of addresses: memory is taken as it is used
_lock = threading.Lock()  # both limits are the whole process's


def goes_deep(function: Function) -> Function:
    """The function; where it runs out of stack it runs again, in a thread that has more. It must have no effects.

    Cost:    none where the stack suffices, as it does for hooks of up to some hundred operations one inside of the other.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except RecursionError:
            return _with_room(lambda: function(*args, **kwargs))

    return cast(Function, call)


def _with_room(function: Callable[[], Any]) -> Any:
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:  # handed on, whatever it is
            outcome.append((None, error))

    with _lock:
        frames, size = sys.getrecursionlimit(), threading.stack_size(STACK_BYTES)
        try:
            thread = threading.Thread(target=run, name="jitgen-deep")
            sys.setrecursionlimit(max(frames, FRAMES))
            thread.start()
            threading.stack_size(size)
            thread.join()
        finally:
            threading.stack_size(size)
            sys.setrecursionlimit(frames)
    result, error = outcome[0]
    if error is not None:
        raise error
    return result
