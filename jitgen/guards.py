"""Paths from the hooks a caller passes to the values they capture, and the generated check that re-reads them.

A trace stays valid as long as its guards hold. They are printed as one plain Python function, because that function runs
on every call of an attention entry point: about 50 ns a guard, where a list of closures would cost five times that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from jitgen.ir import INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN, Expr, walk
from jitgen.records import record


@record
class Path:
    """How to reach a value: a hook by name, then attributes and items. Hashable; equal paths reach the same value."""

    parent: Path | None
    kind: str  # 'root', 'attr', 'item', 'type', 'number'
    key: object = None

    def attr(self, name: str) -> Path:
        return Path(self, "attr", name)

    def item(self, key: object) -> Path:
        return Path(self, "item", key)

    @property
    def type(self) -> Path:
        return Path(self, "type")

    @property
    def number(self) -> Path:
        """The Python number in a 0-d tensor or NumPy scalar."""
        return Path(self, "number")

    def __str__(self) -> str:
        if self.parent is None:
            return str(self.key)
        return {"attr": f"{self.parent}.{self.key}", "item": f"{self.parent}[{self.key!r}]"}.get(self.kind, f"{self.parent}")


def layout_of(t: torch.Tensor) -> str:
    """One letter a dimension: c (stride 1), 0 (broadcast), s (any other stride); contiguous tensors are s…sc."""
    if t.is_contiguous():
        return "s" * (t.dim() - 1) + "c" if t.dim() else ""
    sizes_strides = zip(t.shape, t.stride(), strict=True)
    return "".join("s" if size == 1 else {0: "0", 1: "c"}.get(stride, "s") for size, stride in sizes_strides)


class Guards:
    """Conditions collected during one trace, in the order in which they make sense."""

    def __init__(self) -> None:
        self._rows: dict[tuple[object, ...], tuple[str, Path | None, object]] = {}
        self.conditions: dict[Expr, bool] = {}  # outcomes of conditions on captured scalars alone

    def add(self, kind: str, path: Path, payload: object = None) -> None:
        """``kind`` is a key of _CHECKS. Payloads are kept alive by the guard."""
        ident = (kind, path, id(payload) if kind in ("is", "type", "code") else repr(payload))
        self._rows.setdefault(ident, (kind, path, payload))

    def paths(self) -> list[Path]:
        """Where the values lie that the conditions read."""
        return [path for _, path, _ in self._rows.values() if path is not None]

    def compile(
        self, roots: Sequence[str], values: Sequence[Path], scalars: dict[int, Path]
    ) -> Callable[..., list[object] | None]:
        """Function of the roots that returns the captured values, or None when a guard fails."""
        writer = _Writer()
        for kind, path, payload in self._rows.values():
            assert path is not None
            writer.check(_CHECKS[kind].format(v=writer.read(path), p=writer.pool(payload)))
        for condition, outcome in self.conditions.items():
            text = python_text(condition, lambda slot: writer.read(scalars[slot]))
            writer.check(f"not {text}" if outcome else text)
        result = ", ".join(writer.read(p) for p in values)
        body = "\n        ".join((*writer.lines, f"return [{result}]"))
        source = f"def check({', '.join(roots)}):\n    try:\n        {body}\n    except ERRORS:\n        return None\n"
        namespace: dict[str, object] = {**writer.constants, "ERRORS": _MISMATCH, "layout_of": layout_of}
        exec(compile(source, "<jitgen guards>", "exec"), namespace)
        check = namespace["check"]
        assert callable(check)
        return check


# A condition under which the trace is no longer valid. {v}: the value, {p}: the payload.
_CHECKS = {
    "is": "{v} is not {p}",
    "type": "type({v}) is not {p}",
    "one of": "type({v}) not in {p}",
    "code": "{v}.__code__ is not {p} and {v}.__code__ != {p}",
    "equal": "type({v}) is not type({p}) or {v} != {p}",
    "length": "len({v}) != {p}",
    "keys": "tuple({v}) != {p}",
    "i32": f"type({{v}}) is not int or not {INT32_MIN} <= {{v}} <= {INT32_MAX}",
    "i64": f"type({{v}}) is not int or {INT32_MIN} <= {{v}} <= {INT32_MAX} or not {INT64_MIN} <= {{v}} <= {INT64_MAX}",
    "f32": "type({v}) is not float",
    "bool": "type({v}) is not bool",
    "dtype": "{v}.dtype is not {p}",
    "contiguous": "{v}.ndim != {p} or not {v}.is_contiguous()",
    "layout": "layout_of({v}) != {p}",
    "size": "{v}.shape[{p}[0]] != {p}[1]",
    "cpu_scalar": "{v}.ndim != 0 or {v}.is_cuda is {p}",
}
_MISMATCH = (AttributeError, LookupError, TypeError, ValueError)


class _Writer:
    """Lines of the check under construction; every path is read once."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.constants: dict[str, object] = {}
        self._names: dict[Path, str] = {}

    def pool(self, value: object) -> str:
        name = f"K{len(self.constants)}"
        self.constants[name] = value
        return name

    def read(self, path: Path) -> str:
        if path.parent is None:
            return str(path.key)
        if path not in self._names:
            parent = self.read(path.parent)
            name = f"v{len(self._names)}"
            self.lines.append(f"{name} = {self._step(parent, path)}")
            self._names[path] = name
        return self._names[path]

    def _step(self, parent: str, path: Path) -> str:
        if path.kind == "attr":
            assert isinstance(path.key, str)
            return f"{parent}.{path.key}" if path.key.isidentifier() else f"getattr({parent}, {path.key!r})"
        if path.kind == "item":
            plain = type(path.key) in (int, str, bool)
            return f"{parent}[{path.key!r}]" if plain else f"{parent}[{self.pool(path.key)}]"
        return f"type({parent})" if path.kind == "type" else f"{parent}.item()"

    def check(self, condition: str) -> None:
        self.lines.append(f"if {condition}: return None")


_PYTHON = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "eq": "==", "ne": "!=", "lt": "<",
    "le": "<=", "and": "and", "or": "or", "bitand": "&", "bitor": "|", "bitxor": "^",
}  # fmt: skip
MAX_PRINTED = 64  # operations of a condition
_CALLS = {"not": "not ", "neg": "-", "bitnot": "~", "abs": "abs", "min": "min", "max": "max"}


def is_printable(condition: Expr) -> bool:
    """Whether a condition on captured scalars can be re-evaluated by the check, and its text is short."""
    length: dict[Expr, int] = {}  # of the text, in operations: shared ones stand there each time
    for e in walk(condition):
        is_plain = e.op in _PYTHON or e.op in _CALLS or e.op in ("const", "scalar", "lin")
        if not is_plain and (e.op != "cast" or e.dtype == "bool"):
            return False
        length[e] = 1 + sum(length[a] for a in e.args)
    return length[condition] <= MAX_PRINTED


def python_text(e: Expr, read: Callable[[int], str]) -> str:
    """Python source of an expression over constants and captured scalars."""
    if e.op == "const":
        return f"float({str(e.attr)!r})" if e.dtype == "f32" else repr(e.attr)
    if e.op == "scalar":
        assert isinstance(e.attr, int)
        return read(e.attr)
    args = [python_text(a, read) for a in e.args]
    if e.op == "lin":
        constant, coefficients = e.attr  # type: ignore[misc]
        return f"({constant} + " + " + ".join(f"{c} * {a}" for c, a in zip(coefficients, args, strict=True)) + ")"
    if e.op == "cast":
        return f"{'float' if e.dtype == 'f32' else 'int'}({args[0]})"
    if e.op in _PYTHON:
        return f"({args[0]} {_PYTHON[e.op]} {args[1]})"
    return f"({_CALLS[e.op]}({', '.join(args)}))"
