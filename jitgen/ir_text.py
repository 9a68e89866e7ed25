"""Expressions as readable text: for messages, comments in generated code, and ``jitgen show``."""

from __future__ import annotations

from collections.abc import Sequence

from jitgen.ir_nodes import Expr
from jitgen.ir_ops import PAGE_OPS

INFIX = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "eq": "==", "ne": "!=", "lt": "<",
    "le": "<=", "and": "and", "or": "or", "bitand": "&", "bitor": "|", "bitxor": "^", "shl": "<<", "shr": ">>",
}  # fmt: skip
Part = str | Expr


def to_text(node: Expr, names: Sequence[str] = (), limit: int | None = None) -> str:
    """Readable infix form. ``names`` are the captures' names by slot.

    ``limit``: of a longer text no more than this many characters, the last three of them dots; what is shared in an expression
    stands in its text each time, which can be longer than any memory.
    """
    pieces: list[str] = []
    size, pending = 0, list[Part]([node])
    while pending and (limit is None or size <= limit):
        part = pending.pop()
        if isinstance(part, str):
            pieces.append(part)
            size += len(part)
        else:
            pending += reversed(_parts(part, names))
    text = "".join(pieces)
    return text if limit is None or size <= limit else text[: limit - 3] + "..."


def _parts(n: Expr, names: Sequence[str]) -> list[Part]:
    """Text of one operation, with its operands in between."""
    if n.op == "const":
        return [repr(n.attr)]
    if n.op in ("index", "state"):
        return [str(n.attr)]
    if n.op == "scalar":
        return [_name_of(n.attr, names)]
    if n.op == "load":
        return [f"{_name_of(n.attr, names)}[", *_joined(n.args), "]"]
    if n.op == "lin":
        return _lin_parts(n)
    if n.op in PAGE_OPS:
        return [n.op]
    if n.op in INFIX:
        return ["(", n.args[0], f" {INFIX[n.op]} ", n.args[1], ")"]
    return [f"{n.dtype if n.op == 'cast' else n.op}(", *_joined(n.args), ")"]


def _joined(args: Sequence[Expr]) -> list[Part]:
    return [part for i, a in enumerate(args) for part in ((", ", a) if i else (a,))]


def _name_of(slot: object, names: Sequence[str]) -> str:
    return names[int(str(slot))] if int(str(slot)) < len(names) else f"a{slot}"


def _lin_parts(n: Expr) -> list[Part]:
    constant, coeffs = n.attr  # type: ignore[misc]
    parts: list[Part] = ["("]
    for i, (c, a) in enumerate(sorted(zip(coeffs, n.args, strict=True), key=lambda ca: ca[0] < 0)):
        sign = f" {'-' if c < 0 else '+'} " if i else "-" if c < 0 else ""
        parts += [sign + ("" if abs(c) == 1 else f"{abs(c)} * "), a]
    if constant:
        parts.append(f" {'-' if constant < 0 else '+'} {abs(constant)}")
    return [*parts, ")"]
