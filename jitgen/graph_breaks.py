"""The functions of graphs.py as Dynamo leaves them alone. Imported where Dynamo runs already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from jitgen.graphs import functions

disabled: dict[str, Callable[..., Any]] = {}


def add(name: str, function: Callable[..., Any]) -> None:
    """Have a function called between two graphs."""
    reason = f"{name} is no operator of a graph. Call it outside of the compiled function, or without fullgraph=True"
    disabled[name] = torch.compiler.disable(function, reason=reason)


for _name, _function in functions.items():
    add(_name, _function)
