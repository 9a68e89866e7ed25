"""Custom logit processors: Python functions (logit, token, row) -> logit, traced into one expression.

The tracer is that of attention variants: a processor may capture tensors and numbers and use torch operations and plain
control flow. Captured values are launch arguments, so a new penalty or another mask compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jitgen import ir
from jitgen.abi import ArgField
from jitgen.emit_hooks import capture_fields
from jitgen.emit_lower import Block, Lowering, Unit
from jitgen.emit_split import split_floats
from jitgen.errors import VariantError
from jitgen.guards import Path
from jitgen.hooks import HookTracer, converted, with_slots
from jitgen.ir import Expr
from jitgen.program import Program
from jitgen.sampling_spec import NO_PROCESSOR
from jitgen.signatures import check_parameters, code_of, name_of, trace_key
from jitgen.symbols import Sym
from jitgen.trace import keep_trace, trace_lock

Processor = Callable[..., Any]
PARAMETERS = ("logit", "token", "row")
# The names these parameters have in the IR, which it shares with attention hooks, and in generated code.
_LOGIT, _TOKEN, _ROW = "score", "kv_idx", "b"
_LEVELS = {_LOGIT: "elem", _TOKEN: "elem"}


@dataclass(frozen=True, eq=False)
class ProcessorTrace:
    """Processors as a program whose score is the processed logit, and the check that finds it still valid."""

    program: Program
    check: Callable[..., list[object] | None]
    paths: tuple[Path, ...]  # of all values that the check reads


@dataclass(frozen=True)
class ProcessorSection:
    """What ``processor.h.jinja`` prints. ``value`` is empty where there is no processor."""

    args: tuple[ArgField, ...] = ()
    fields: tuple[str, ...] = ()
    head_lines: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    value: str = ""


_traces: dict[tuple[object, ...], list[ProcessorTrace]] = {}


def resolve_processors(processors: Sequence[Processor]) -> tuple[Program, list[object]]:
    """Program of the processors, applied in order, and the values they capture now.

    Errors:  VariantError, UnsupportedVariant.
    Cost:    microseconds when nothing has changed, about a millisecond otherwise.
    """
    if not processors:
        return NO_PROCESSOR, []
    trace, values = _resolve(processors)
    return trace.program, values


def trace_of(processors: Sequence[Processor]) -> ProcessorTrace:
    """The trace of processors.

    Errors:  as resolve_processors.
    """
    return _resolve(processors)[0]


def _resolve(processors: Sequence[Processor]) -> tuple[ProcessorTrace, list[object]]:
    key = tuple(trace_key(p) for p in processors)
    for trace in _traces.get(key, ()):
        values = trace.check(*processors, {})
        if values is not None:
            return trace, values
    trace = trace_processors(processors)
    values = trace.check(*processors, {})
    if values is None:
        raise VariantError("a processor changed a value that it captures while it was traced. Processors must be pure.")
    keep_trace(_traces, key, trace)
    return trace, values


def trace_processors(processors: Sequence[Processor]) -> ProcessorTrace:
    """Trace processors, each on what the one before it returned."""
    with trace_lock:
        tracing = HookTracer({})
        names = [f"p{i}" for i in range(len(processors))]
        logit = ir.index(_LOGIT)
        for name, processor in zip(names, processors, strict=True):
            check_parameters("processor", processor, PARAMETERS)
            logit = _trace_one(tracing, processor, Path(None, "root", name), logit)
        program, used = with_slots(Program(score=logit), tracing.captures.found)
        check = tracing.tracer.guards.compile((*names, "bound"), [c.path for c in used], tracing.tracer.scalar_paths)
        return ProcessorTrace(program, check, tracing.paths(used))


def _trace_one(tracing: HookTracer, processor: Processor, path: Path, logit: Expr) -> Expr:
    label, code = f"processor '{name_of(processor)}'", code_of(processor)
    call = tracing.captures.wrap(processor, path, name_of(processor))
    arguments = (Sym(logit), Sym(ir.index(_TOKEN)), Sym(ir.index(_ROW)))

    def finish(returned: object) -> tuple[Expr, ...]:
        return (converted(returned, "f32", label, code),)

    return tracing.tracer.run(label, code, lambda: call(*arguments), finish)[0]


def emit_processors(program: Program) -> ProcessorSection:
    """The functions that a sampling kernel calls for each logit.

    Errors:  UnsupportedVariant when an operation has no meaning for one logit, such as a sum over the row.
    """
    unit = Unit(program.slots)
    if program.score is None:
        return ProcessorSection()
    root = split_floats(program.score, lambda n: "elem" if n.deps & set(_LEVELS) else "head")
    block = Block("elem", taken={"args", "head", *PARAMETERS})
    low = Lowering(unit, {"row": block, "col": block, "elem": block, "head": unit.head}, _LEVELS, [root])
    low.leaves.update({_LOGIT: "logit", _TOKEN: "token", _ROW: "head.row"})
    value = low.term(root, block).text
    head = unit.head
    return ProcessorSection(
        args=capture_fields(unit),
        fields=tuple(m.text for m in head.members),
        head_lines=tuple(head.lines),
        lines=tuple(block.lines),
        value=value,
    )
