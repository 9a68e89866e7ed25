"""Tracing a transform of a row, and what it is split into: one language for jitgen.append and for hooks of a variant.

The first parameter stands for an element of the row, captured rows run along the head dim, ``.sum()``, ``.mean()`` and
``.rms()`` are over it, and a jitgen.Rope rotates the row, at most once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jitgen import ir
from jitgen.ir import Expr, walk
from jitgen.location import definition_of, refuse
from jitgen.program import RowProgram
from jitgen.symbols import Sym
from jitgen.trace import Tracer

# The names in the IR of an element of the row and of its position, which are shared with other hooks.
ELEMENT, POSITION = "o", "q_idx"


def row_arguments() -> tuple[Sym, Sym, Sym, Sym]:
    """What a transform is called with: the row, its request, its head and its position."""
    row, b, head, position = (Sym(ir.index(name)) for name in (ELEMENT, "b", "kv_h", POSITION))
    return row, b, head, position


def trace_row(
    tracer: Tracer, label: str, code: Any, call: Callable[[], object], finish: Callable[[object], Expr]
) -> tuple[Expr, Any]:
    """The expression of a transformed element, and the jitgen.Rope in it or None.

    ``finish`` turns what ``call`` returns into the expression.

    Errors:  UnsupportedVariant.
    """
    ropes: list[object] = []
    tracer.rotations, tracer.row_axis = ropes, "d"
    try:
        (root,) = tracer.run(label, code, call, lambda returned: (finish(returned),))
    finally:
        tracer.rotations = tracer.row_axis = None
    turns = [n for n in walk(root) if n.op == "rotate"]
    if not turns:
        return root, None
    used = {id(r): r for r in ropes}
    if len(turns) > 1 or len(used) > 1:
        refuse(
            f"{label} rotates a row more than once, or in two ways. Rotate it once, by a position that may vary.",
            at=definition_of(code),
        )
    return root, next(iter(used.values()))


def split_rotation(root: Expr, rope: Any, label: str, code: Any) -> RowProgram:
    """A row's expression as what is done before its rotation and after it."""
    element = ir.index(ELEMENT)
    if rope is None:
        return RowProgram(before=None if root is element else root)
    (turn,) = (n for n in walk(root) if n.op == "rotate")
    before, position = turn.args
    mark = ir.index("score")  # stands for the rotated element while the rest is searched for the original one
    rest = ir.rebuild(root, lambda n: mark if n is turn else None)
    if any(n is element for n in walk(rest)):
        refuse(
            f"{label} uses a row before and after its rotation. What follows it may use the rotated row only.",
            at=definition_of(code),
        )
    after = ir.rebuild(rest, lambda n: element if n is mark else None)
    return RowProgram(
        None if before is element else before,
        rope,
        None if position is ir.index(POSITION) else position,
        None if after is element else after,
    )
