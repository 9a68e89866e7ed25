"""Transforms of new keys and values: a Python function (k, v, b, kv_h, pos) -> (k, v), traced into two expressions.

The tracer is that of attention variants. ``k`` and ``v`` stand for an element of a row, captured rows run along the head dim,
``.sum()``, ``.mean()`` and ``.rms()`` are over it, and a jitgen.Rope rotates a row, at most once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jitgen import ir
from jitgen.errors import VariantError
from jitgen.guards import Path
from jitgen.hooks import HookTracer, converted, with_slots
from jitgen.ir import Expr, walk
from jitgen.location import definition_of, refuse
from jitgen.program import Program, RowProgram, Slot
from jitgen.records import record
from jitgen.rotary import Rope
from jitgen.row_hooks import POSITION, row_arguments, split_rotation, trace_row
from jitgen.signatures import check_parameters, code_of, name_of, trace_key
from jitgen.symbols import Sym
from jitgen.trace import keep_trace, trace_lock

Transform = Callable[..., Any]
PARAMETERS = ("k", "v", "b", "kv_h", "pos")
OTHER = "x"  # in the IR: an element of the other row


@record
class TransformTrace:
    """A traced transform, and the check that finds it still valid and reads what it captures."""

    k: RowProgram
    v: RowProgram
    slots: tuple[Slot, ...]
    reads_request: bool
    reads_position: bool
    check: Callable[..., list[object] | None]
    paths: tuple[Path, ...] = ()  # of all values that the check reads


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
    keep_trace(_traces, key, trace)
    return trace, values


def trace_transform(transform: Transform) -> TransformTrace:
    """Trace a transform, once for each of the two rows."""
    check_parameters("transform", transform, PARAMETERS)
    with trace_lock:
        tracing = HookTracer({})
        call = tracing.captures.wrap(transform, Path(None, "root", "transform"), name_of(transform))
        k, k_rope = _trace_row(tracing, transform, call, 0)
        v, v_rope = _trace_row(tracing, transform, call, 1)
        program, used = with_slots(Program(score=k, output=v), tracing.captures.found)
        check = tracing.tracer.guards.compile(("transform", "bound"), [c.path for c in used], tracing.tracer.scalar_paths)
        paths = tracing.paths(used)
    label, code = f"transform '{name_of(transform)}'", code_of(transform)
    reads = {str(n.attr) for n in walk(*program.roots()) if n.op == "index"}
    return TransformTrace(
        split_rotation(program.score, k_rope, label, code),  # type: ignore[arg-type]
        split_rotation(program.output, v_rope, label, code),  # type: ignore[arg-type]
        program.slots,
        "b" in reads,
        POSITION in reads,
        check,
        paths,
    )


def _trace_row(tracing: HookTracer, transform: Transform, call: Any, which: int) -> tuple[Expr, Rope | None]:
    """The expression of one of the two results, and the rotation in it."""
    label, code = f"transform '{name_of(transform)}'", code_of(transform)
    rows = [Sym(ir.index(OTHER)), Sym(ir.index(OTHER))]
    element, *rest = row_arguments()
    rows[which] = element

    def finish(returned: object) -> Expr:
        if not (isinstance(returned, tuple) and len(returned) == 2):
            what = f"{len(returned)} values" if isinstance(returned, tuple) else f"a {type(returned).__name__}"
            refuse(f"{label} returned {what}, expected (k, v).", at=definition_of(code))
        return converted(returned[which], "f32", label, code)

    root, rope = trace_row(tracing.tracer, label, code, lambda: call(*rows, *rest), finish)
    other = "vk"[which]
    if any(n.op == "index" and n.attr == OTHER for n in walk(root)):
        refuse(
            f"{label} computes {'kv'[which]} from {other}. The rows are written apart: use its own row only.",
            at=definition_of(code),
        )
    return root, rope
