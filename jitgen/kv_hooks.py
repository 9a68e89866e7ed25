"""Transforms of new keys and values: a Python function (k, v, b, kv_h, pos) -> (k, v), traced into two expressions.

The tracer is that of attention variants. ``k`` and ``v`` stand for an element of a row, captured rows run along the head dim,
``.sum()``, ``.mean()`` and ``.rms()`` are over it, and a jitgen.Rope rotates a row, at most once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from jitgen import ir
from jitgen.errors import UnsupportedVariant, VariantError
from jitgen.guards import Path
from jitgen.hooks import HookTracer, check_parameters, code_of, converted, name_of, trace_key, with_slots
from jitgen.ir import Expr, walk
from jitgen.location import definition_of, refuse
from jitgen.program import Program, Slot
from jitgen.records import record
from jitgen.rotary import Rope
from jitgen.symbols import Sym
from jitgen.trace import trace_lock

Transform = Callable[..., Any]
PARAMETERS = ("k", "v", "b", "kv_h", "pos")
MAX_TRACES = 64
# The names of the parameters in the IR, which is shared with attention hooks: an element of the row, and the other row's.
_ELEMENT, _OTHER, _POSITION = "o", "x", "q_idx"


@record
class RowProgram:
    """What a transform makes of one row: ``before`` a rotation, the position it is by, and ``after`` it."""

    before: Expr | None = None
    rope: Rope | None = None
    position: Expr | None = None
    after: Expr | None = None


@record
class TransformTrace:
    """A traced transform, and the check that finds it still valid and reads what it captures."""

    k: RowProgram
    v: RowProgram
    slots: tuple[Slot, ...]
    reads_request: bool
    reads_position: bool
    check: Callable[..., list[object] | None]


NO_TRANSFORM = TransformTrace(RowProgram(), RowProgram(), (), False, False, lambda *_: [])
_traces: dict[object, list[TransformTrace]] = {}


def resolve_transform(transform: Transform | None) -> tuple[TransformTrace, list[object]]:
    """Trace of a transform and the values it captures now.

    Errors:  VariantError, UnsupportedVariant.
    Cost:    microseconds when nothing has changed, about a millisecond otherwise.
    """
    if transform is None:
        return NO_TRANSFORM, []
    key = trace_key(transform)
    for trace in _traces.get(key, ()):
        values = trace.check(transform, {})
        if values is not None:
            return trace, values
    trace = trace_transform(transform)
    values = trace.check(transform, {})
    if values is None:
        raise VariantError("the transform changed a value that it captures while it was traced. Transforms must be pure.")
    with trace_lock:
        kept = _traces.setdefault(key, [])
        kept.append(trace)
        del kept[:-MAX_TRACES]
    return trace, values


def trace_transform(transform: Transform) -> TransformTrace:
    """Trace a transform, once for each of the two rows."""
    check_parameters("transform", transform, PARAMETERS)
    with trace_lock:
        tracing = HookTracer({})
        tracing.tracer.row_axis = "d"
        call = tracing.captures.wrap(transform, Path(None, "root", "transform"), name_of(transform))
        k, k_rope = _trace_row(tracing, transform, call, 0)
        v, v_rope = _trace_row(tracing, transform, call, 1)
        program, used = with_slots(Program(score=k, output=v), tracing.captures.found)
        check = tracing.tracer.guards.compile(("transform", "bound"), [c.path for c in used], tracing.tracer.scalar_paths)
    label, code = f"transform '{name_of(transform)}'", code_of(transform)
    reads = {str(n.attr) for n in walk(*program.roots()) if n.op == "index"}
    return TransformTrace(
        _split(program.score, k_rope, label, code),  # type: ignore[arg-type]
        _split(program.output, v_rope, label, code),  # type: ignore[arg-type]
        program.slots,
        "b" in reads,
        _POSITION in reads,
        check,
    )


def _trace_row(tracing: HookTracer, transform: Transform, call: Any, which: int) -> tuple[Expr, Rope | None]:
    """The expression of one of the two results, and the rotation in it."""
    label, code = f"transform '{name_of(transform)}'", code_of(transform)
    tracer = tracing.tracer
    tracer.rotations = ropes = []
    rows = [Sym(ir.index(_OTHER)), Sym(ir.index(_OTHER))]
    rows[which] = Sym(ir.index(_ELEMENT))
    rest = (Sym(ir.index("b")), Sym(ir.index("kv_h")), Sym(ir.index(_POSITION)))

    def finish(returned: object) -> tuple[Expr, ...]:
        if not (isinstance(returned, tuple) and len(returned) == 2):
            what = f"{len(returned)} values" if isinstance(returned, tuple) else f"a {type(returned).__name__}"
            refuse(f"{label} returned {what}, expected (k, v).", at=definition_of(code))
        return (converted(returned[which], "f32", label, code),)

    try:
        (root,) = tracer.run(label, code, lambda: call(*rows, *rest), finish)
    finally:
        tracer.rotations = None
    other = "vk"[which]
    if any(n.op == "index" and n.attr == _OTHER for n in walk(root)):
        _refuse(f"{label} computes {'kv'[which]} from {other}. The rows are written apart: use its own row only.", code)
    turns = [n for n in walk(root) if n.op == "rotate"]
    if not turns:
        return root, None
    used = {id(r): r for r in ropes}
    if len(turns) > 1 or len(used) > 1:
        _refuse(f"{label} rotates a row more than once, or in two ways. Rotate it once, by a position that may vary.", code)
    return root, next(iter(used.values()))  # type: ignore[return-value]


def _refuse(message: str, code: Any) -> NoReturn:
    file, line = definition_of(code)
    raise UnsupportedVariant(message, file=file, line=line)


def _split(root: Expr, rope: Rope | None, label: str, code: Any) -> RowProgram:
    """A row's expression as what is done before its rotation and after it."""
    element = ir.index(_ELEMENT)
    if rope is None:
        return RowProgram(before=None if root is element else root)
    (turn,) = (n for n in walk(root) if n.op == "rotate")
    before, position = turn.args
    mark = ir.index("score")  # stands for the rotated element while the rest is searched for the original one
    rest = ir.rebuild(root, lambda n: mark if n is turn else None)
    if any(n is element for n in walk(rest)):
        _refuse(f"{label} uses a row before and after its rotation. What follows it may use the rotated row only.", code)
    after = ir.rebuild(rest, lambda n: element if n is mark else None)
    return RowProgram(
        None if before is element else before,
        rope,
        None if position is ir.index(_POSITION) else position,
        None if after is element else after,
    )
