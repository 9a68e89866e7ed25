"""Calls that Dynamo must not look into: between two graphs of torch.compile, or operators of one."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch.compiler import is_compiling, is_dynamo_compiling

from jitgen.checks import is_traced

Function = TypeVar("Function", bound=Callable[..., Any])
functions: dict[str, Callable[..., Any]] = {}  # by qualified name


def _noted(function: Callable[..., Any]) -> str:
    name = f"{function.__module__}.{function.__qualname__}"
    functions[name] = function
    if "jitgen.graph_breaks" in sys.modules:
        sys.modules["jitgen.graph_breaks"].add(name, function)
    return name


def between_graphs(function: Function) -> Function:
    """The function; where Dynamo traces a call of it, the graph ends there.

    Cost:    a fifth of a microsecond a call. torch's own decorator imports Dynamo, which takes a second.
    """
    name = _noted(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            from jitgen.graph_breaks import disabled

            return disabled[name](*args, **kwargs)
        return function(*args, **kwargs)

    return cast(Function, call)


def sampling_operator(function: Function) -> Function:
    """A call on rows, its first argument; where Dynamo traces it, it is an operator of the graph (sampling_op.py)."""
    name, first = _noted(function), function.__code__.co_varnames[0]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_compiling() and is_traced(args[0] if args else kwargs.get(first)):
            from jitgen.sampling_op import call_op

            return call_op(name, *args, **kwargs)
        return function(*args, **kwargs)

    return cast(Function, call)
