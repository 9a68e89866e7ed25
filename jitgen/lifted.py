"""Arguments of calls that a compiled graph holds by a number, as recipes: of jitgen.attention (op.py) and append (kv_op.py).

NOTE: a number stays for good: of a graph that Dynamo, AOTAutograd, torch.export or a backend may hold, nothing says when it is
gone. Each trace by Dynamo adds one and no call does, so there are as many as torch has compiled.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from jitgen.recipes import Leaves, Recipe

try:
    from jitgen.lifting import lift_here, trace_of_attention
except ImportError:  # another torch, whose Dynamo has other names: calls leave the graph
    lift_here = trace_of_attention = None  # type: ignore[assignment]
CAN_LIFT = lift_here is not None

__all__ = ["CAN_LIFT", "lift_here", "made", "register", "trace_of_attention"]

_arguments: dict[int, dict[str, Recipe]] = {}  # those of a call that are no inputs of the graph
_numbers = itertools.count()


def register(arguments: dict[str, Recipe]) -> int:
    """Handle of the arguments of a call."""
    handle = next(_numbers)
    _arguments[handle] = arguments
    return handle


def made(handle: int, tensors: Sequence[torch.Tensor], ints: Sequence[int]) -> dict[str, Any]:
    """The arguments under a handle, made of what the graph passes for the values that they capture."""
    leaves = Leaves(tensors, ints)
    return {name: recipe(leaves) for name, recipe in _arguments[handle].items()}
