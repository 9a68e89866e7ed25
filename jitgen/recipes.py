"""Hooks that a compiled graph holds: how they are made again, of the tensors and numbers that the graph passes.

A graph carries tensors and numbers, no Python functions. A function that a compiled model makes or is given is therefore
noted as a recipe: its code, and where what it captures comes from. Each run of the operator makes it anew, which costs less
than a microsecond a function, and the table of traces knows it by its code.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from jitgen.captures import SortedTensor


class Leaves(NamedTuple):
    """What a graph passes for the values that hooks capture."""

    tensors: Sequence[Any] = ()
    ints: Sequence[int] = ()


Recipe = Callable[[Leaves], Any]


def constant(value: object) -> Recipe:
    """A value that Dynamo has guarded."""
    return lambda leaves: value


def tensor(index: int) -> Recipe:
    """A tensor of the graph."""
    return lambda leaves: leaves.tensors[index]


def ascending(index: int) -> Recipe:
    """A tensor of the graph that jitgen.sorted has declared."""
    return lambda leaves: SortedTensor.of(leaves.tensors[index])


def integer(index: int) -> Recipe:
    """A number that may differ from call to call."""
    return lambda leaves: leaves.ints[index]


def real(index: int) -> Recipe:
    """The same for a float, which operators take as a tensor."""
    return lambda leaves: float(leaves.tensors[index])


def sequence(kind: Callable[[list[Any]], Any], items: Sequence[Recipe]) -> Recipe:
    """A list or a tuple."""
    return lambda leaves: kind([item(leaves) for item in items])


def mapping(items: Mapping[Any, Recipe]) -> Recipe:
    """A dict."""
    return lambda leaves: {key: item(leaves) for key, item in items.items()}


def function(
    code: types.CodeType, scope: dict[str, Any], defaults: Recipe, kwdefaults: Recipe, cells: Sequence[Recipe],
    attributes: Mapping[str, Any],
) -> Recipe:  # fmt: skip
    """A plain function over the globals ``scope``; ``attributes`` are given to it as they are."""

    def build(leaves: Leaves) -> types.FunctionType:
        closure = tuple([types.CellType(cell(leaves)) for cell in cells])
        made = types.FunctionType(code, scope, code.co_name, defaults(leaves), closure)
        made.__kwdefaults__ = kwdefaults(leaves)
        made.__dict__.update(attributes)
        return made

    return build


def method(func: Recipe, owner: Recipe) -> Recipe:
    """A function bound to an object."""
    return lambda leaves: types.MethodType(func(leaves), owner(leaves))


def partial_call(func: Recipe, args: Recipe, keywords: Recipe) -> Recipe:
    """A functools.partial."""
    return lambda leaves: partial(func(leaves), *args(leaves), **keywords(leaves))


def shell(cls: type, attributes: Mapping[str, Recipe]) -> Recipe:
    """An object of ``cls`` that has the attributes which hooks read, and no others."""

    def build(leaves: Leaves) -> Any:
        made = types.SimpleNamespace() if cls is types.SimpleNamespace else object.__new__(cls)
        for name, value in attributes.items():
            object.__setattr__(made, name, value(leaves))
        return made

    return build
