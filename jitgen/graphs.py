"""Calls that no graph of torch.compile holds: made between two graphs, without Dynamo looking into every function of them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch.compiler import is_dynamo_compiling

Function = TypeVar("Function", bound=Callable[..., Any])
functions: dict[str, Callable[..., Any]] = {}  # by qualified name


def between_graphs(function: Function) -> Function:
    """The function; where Dynamo traces a call of it, the graph ends there.

    Cost:    a fifth of a microsecond a call. torch's own decorator imports Dynamo, which takes a second.
    """
    name = f"{function.__module__}.{function.__qualname__}"
    functions[name] = function
    if "jitgen.graph_breaks" in sys.modules:
        sys.modules["jitgen.graph_breaks"].add(name, function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            from jitgen.graph_breaks import disabled

            return disabled[name](*args, **kwargs)
        return function(*args, **kwargs)

    return cast(Function, call)
