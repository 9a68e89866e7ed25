"""Requests for kernels as plain values: what a recording or a manifest keeps, and another machine asks again.

Each kind of kernel has one function ``module_path(...)`` that finds or builds its module. A request is that function and
its arguments: numbers, strings, tuples, expressions, a target, and frozen dataclasses or named tuples of jitgen made of
such. They are packed by their fields, so a new kind of kernel or a new field of a spec needs nothing here. A field that
has its default is left out, so an older recording still fits.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jitgen import ir
from jitgen.errors import ManifestError
from jitgen.ir import Expr
from jitgen.target import CompileTarget, target_of

ASKING = "module_path"  # what the function of every kind is called
_FUNCTION = re.compile(rf"jitgen(\.[a-z_][a-z0-9_]*)+:{ASKING}")
_CLASS = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)*\.[A-Z]\w*")

Call = tuple[Any, ...]  # a function and its arguments


# ---- packing ----------------------------------------------------------------------------------------------------------


def pack(call: Call) -> dict[str, Any]:
    """A request as plain values: strings, numbers, booleans, lists and dictionaries of them.

    Errors:  TypeError when an argument has no portable form, which is a mistake of the kind's own module.
    """
    function, *arguments = call
    packer = _Packer()
    packed = [packer.pack(argument) for argument in arguments]
    request = {"function": f"{function.__module__}:{function.__name__}", "arguments": packed}
    return {**request, "nodes": packer.nodes} if packer.nodes else request


class _Packer:
    """Packs values; expressions become numbers of ``nodes``, so that what they share is written once."""

    def __init__(self) -> None:
        self.nodes: list[list[Any]] = []
        self._numbers: dict[Expr, int] = {}

    def pack(self, value: Any) -> Any:
        if isinstance(value, (bool, int, float, str)):
            return value
        if value is None:
            return {"class": "none"}
        if isinstance(value, Expr):
            return {"node": self._number(value)}
        if isinstance(value, CompileTarget):
            return {"class": "target", "arch": value.arch}
        fields = _fields_of(value)
        if fields is not None:
            kept = {name: self.pack(item) for name, (item, default) in fields.items() if not _same(item, default)}
            return {"class": f"{type(value).__module__.removeprefix('jitgen.')}.{type(value).__qualname__}", **kept}
        if isinstance(value, (tuple, list)):
            return [self.pack(item) for item in value]
        raise TypeError(f"a {type(value).__name__} has no portable form: {value!r}")

    def _number(self, root: Expr) -> int:
        for node in ir.walk(root):
            if node not in self._numbers:
                attr = self._attr(node)
                self._numbers[node] = len(self.nodes)
                self.nodes.append([node.op, node.dtype, *attr, *(self._numbers[a] for a in node.args)])
        return self._numbers[root]

    @staticmethod
    def _attr(node: Expr) -> list[Any]:
        if node.op == "lin":
            constant, coefficients = node.attr  # type: ignore[misc]
            return [[constant, *coefficients]]
        return [node.attr] if node.op in ("const", "index", "state", "scalar", "load") else []


_NO_DEFAULT = object()


def _fields_of(value: object) -> dict[str, tuple[Any, Any]] | None:
    """Field -> (value, default) of a dataclass or named tuple of jitgen; None for anything else."""
    kind = type(value)
    if not kind.__module__.startswith("jitgen."):
        return None
    if dataclasses.is_dataclass(value):
        return {f.name: (getattr(value, f.name), _default(f)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return {name: (getattr(value, name), kind._field_defaults.get(name, _NO_DEFAULT)) for name in kind._fields}
    return None


def _default(field: dataclasses.Field) -> object:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else _NO_DEFAULT


def _same(value: object, default: object) -> bool:
    return type(value) is type(default) and value == default


# ---- unpacking --------------------------------------------------------------------------------------------------------


def unpack(request: Mapping[str, Any]) -> tuple[Callable[..., Path], tuple[Any, ...]]:
    """The function and the arguments of a packed request; calling it finds or builds the module.

    Errors:  ManifestError when the request was damaged, or recorded by a jitgen that knows more than this one.
    """
    name = request.get("function", "")
    if not isinstance(name, str) or _FUNCTION.fullmatch(name) is None:
        raise ManifestError(f"function = {name!r} is not a function {ASKING} of jitgen. Record the kernel again.")
    try:
        nodes = _nodes(request.get("nodes", ()))
        arguments = tuple(_unpack(item, nodes) for item in request.get("arguments", ()))
        function = getattr(import_module(name.partition(":")[0]), ASKING)
    except ManifestError:
        raise
    except (ImportError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ManifestError(f"a request for {name} cannot be read ({reason}). Record it again.") from error
    return function, arguments


def _nodes(rows: Sequence[Sequence[Any]]) -> list[Expr]:
    made: list[Expr] = []
    for row in rows:
        op, dtype, *rest = row
        if op == "const":
            made.append(ir.const(rest[0], dtype))
        elif op in ("index", "state"):
            made.append(getattr(ir, op)(rest[0]))
        elif op == "scalar":
            made.append(ir.scalar(int(rest[0]), dtype))
        elif op == "load":
            made.append(ir.load(int(rest[0]), dtype, _operands(made, rest[1:])))
        elif op == "lin":
            constant, *coefficients = map(int, rest[0])
            made.append(ir.make_lin(constant, list(zip(coefficients, _operands(made, rest[1:]), strict=True)), dtype))
        elif op == "cast":
            made.append(ir.cast(*_operands(made, rest), dtype))
        else:
            made.append(ir.make(op, *_operands(made, rest)))
        if made[-1].dtype != dtype:
            raise ManifestError(f"node {row!r} of a request should be {dtype}, and is {made[-1].dtype}. Record it again.")
    return made


def _operands(made: Sequence[Expr], numbers: Sequence[int]) -> list[Expr]:
    if any(not 0 <= number < len(made) for number in numbers):
        raise ManifestError(f"nodes {list(numbers)} of a request are not defined before they are used. Record it again.")
    return [made[number] for number in numbers]


def _unpack(value: Any, nodes: Sequence[Expr]) -> Any:
    if isinstance(value, list):
        return tuple(_unpack(item, nodes) for item in value)
    if not isinstance(value, Mapping):
        return value
    if "node" in value:
        return _operands(nodes, [value["node"]])[0]
    fields = {name: _unpack(item, nodes) for name, item in value.items() if name != "class"}
    kind = value["class"]
    if kind == "none":
        return None
    if kind == "target":
        return target_of(fields["arch"])
    return _class_of(kind)(**fields)


def _class_of(name: str) -> Any:
    """A dataclass or named tuple of jitgen; nothing else can be made from a manifest."""
    if _CLASS.fullmatch(name):
        module, _, last = name.rpartition(".")
        found = getattr(import_module(f"jitgen.{module}"), last)
        if isinstance(found, type) and (dataclasses.is_dataclass(found) or hasattr(found, "_fields")):
            return found
    raise ManifestError(f"class = {name!r} is not a part of a kernel. Record it again.")


# ---- other targets ----------------------------------------------------------------------------------------------------


def targets_in(value: Any) -> list[CompileTarget]:
    """Targets among the arguments of a request, and in their fields."""
    if isinstance(value, CompileTarget):
        return [value]
    fields = _fields_of(value)
    inner = [item for item, _ in fields.values()] if fields is not None else value if isinstance(value, (tuple, list)) else ()
    return [target for item in inner for target in targets_in(item)]
