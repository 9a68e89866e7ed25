"""From the hooks of a variant to its Program: running each hook on stand-ins, and what it must return."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any

import torch

from jitgen import ir
from jitgen.captures import Capture, Captures
from jitgen.deep import goes_deep
from jitgen.errors import VariantError
from jitgen.guards import Path
from jitgen.ir import Expr
from jitgen.ir_ops import PAGE_OPS
from jitgen.location import definition_of, refuse
from jitgen.norm_hooks import NormTracer, check_merge
from jitgen.norms import OnlineNorm
from jitgen.program import NormProgram, Program, RowHooks, RowProgram, all_roots
from jitgen.records import record
from jitgen.row_hooks import POSITION, row_arguments, split_rotation, trace_row
from jitgen.signatures import HOOKS, POSITIONAL, ROW_TRANSFORMS, check_hook, code_of, name_of, shown
from jitgen.symbols import Sym, as_operand
from jitgen.trace import Tracer, trace_lock

Check = Callable[..., "list[object] | None"]
SINK = Path(None, "root", "sink")


@record
class Trace:
    """A program and the function that says whether it still is what the hooks mean, and what they capture now."""

    program: Program
    check: Check  # (*hooks, bound) -> captured values by slot, or None
    names: frozenset[str]  # captured names, which Variant.bind accepts
    paths: tuple[Path, ...]  # of all values that the check reads


# ---- one hook -----------------------------------------------------------------------------------------------------------


def _context_value(name: str, key: str = "kv_idx") -> Expr:
    """What a hook asks for by a keyword-only parameter; ``key`` is the index that numbers keys."""
    if name in PAGE_OPS:
        return ir.make(name, ir.index("b"), ir.index(key))
    return ir.make("add", ir.index("q_idx"), ir.index("q_first")) if name == "q_tok" else ir.index(name)


class HookTracer:
    """Traces the hooks of one variant; captures and guards are shared."""

    def __init__(self, bound: Mapping[str, object]) -> None:
        self.tracer = Tracer()
        self.captures = Captures(self.tracer, bound)

    def paths(self, used: Sequence[Capture]) -> tuple[Path, ...]:
        """Where all values lie that the trace depends on."""
        return (*self.tracer.guards.paths(), *(c.path for c in used), *self.tracer.scalar_paths.values())

    def value(self, kind: str, hook: Any, dtype: str) -> Expr | None:
        """A hook that returns one value."""
        if hook is None:
            return None
        signature = check_hook(kind, hook)
        label, code = f"{kind} '{name_of(hook)}'", code_of(hook)
        call = self.captures.wrap(hook, Path(None, "root", kind), name_of(hook))
        arguments = [Sym(ir.index(n)) for n in POSITIONAL[kind]]
        context = {n: Sym(_context_value(n)) for n in signature.context}

        def finish(returned: object) -> tuple[Expr, ...]:
            return (converted(returned, dtype, label, code),)

        return self.tracer.run(label, code, lambda: call(*arguments, **context), finish)[0]

    def output(self, hook: Any) -> Expr | None:
        """The output transform: captured rows run along the head dim."""
        self.tracer.row_axis = "d"
        try:
            return self.value("output_transform", hook, "f32")
        finally:
            self.tracer.row_axis = None

    def sink(self, sink: Any) -> Expr | None:
        """A sink: one logit per query head, given as a tensor, a number or a function."""
        if sink is None or (callable(sink) and not isinstance(sink, torch.Tensor)):
            return self.value("sink", sink, "f32")
        if isinstance(sink, torch.Tensor) and sink.dim() > 1:
            raise VariantError(
                f"sink has shape {tuple(sink.shape)}, expected [num_q_heads]. Flatten it, or pass (b, h) -> logit."
            )
        if isinstance(sink, bool) or not isinstance(sink, (torch.Tensor, int, float)):
            raise VariantError(
                f"sink is {sink!r} of type {type(sink).__name__}, expected a tensor [num_q_heads], a number or (b, h) -> logit."
            )
        wrapped = self.captures.wrap(sink, SINK, "sink")
        per_head = isinstance(sink, torch.Tensor) and sink.dim() == 1

        def finish(returned: object) -> tuple[Expr, ...]:
            return (converted(returned, "f32", "sink", None),)

        return self.tracer.run("sink", None, lambda: wrapped[Sym(ir.index("h"))] if per_head else wrapped, finish)[0]

    def row(self, kind: str, hook: Any) -> RowProgram:
        """A transform of the rows of q, k or v."""
        if hook is None:
            return RowProgram()
        names = check_hook(kind, hook).context
        unknown = [name for name in names if name not in PAGE_OPS]
        if unknown:
            raise VariantError(
                f"{kind} '{name_of(hook)}' asks for keyword-only '{unknown[0]}'; rows of k and v have "
                f"{' and '.join(sorted(PAGE_OPS))}, those of q no context. Capture the value."
            )
        context = {name: Sym(_context_value(name, POSITION)) for name in names}
        label, code = f"{kind} '{name_of(hook)}'", code_of(hook)
        call = self.captures.wrap(hook, Path(None, "root", kind), name_of(hook))
        root, rope = trace_row(
            self.tracer,
            label,
            code,
            lambda: call(*row_arguments(), **context),
            lambda returned: converted(returned, "f32", label, code),
        )
        return split_rotation(root, rope, label, code)

    def rows(self, *hooks: Any) -> RowHooks | None:
        """The transforms of the rows of q, k and v; None without any."""
        if all(hook is None for hook in hooks):
            return None
        return RowHooks(*(self.row(kind, hook) for kind, hook in zip(ROW_TRANSFORMS, hooks, strict=True)))

    def norm(self, norm: OnlineNorm | None) -> NormProgram | None:
        """An instance of an OnlineNorm subclass."""
        return None if norm is None else NormTracer(self.tracer, self.captures, norm, converted).program()


_CONVERT = {
    "bool": "Compare the value, or put the bias in score_mod.",
    "f32": "Make it a mask_mod, or torch.where(cond, score, -inf).",
}


def converted(returned: object, dtype: str, label: str, code: CodeType | None) -> Expr:
    """What a hook returned, as an expression of the type it must have."""
    operand = as_operand(returned)
    if operand is None:
        missing = "nothing (None). Return the value" if returned is None else f"{shown(returned)}, expected {dtype}"
        refuse(f"{label} returned {missing}.", at=definition_of(code))
    if isinstance(operand, tuple):
        if len(operand) != 1:
            refuse(f"{label} returned a row of {len(operand)} values, expected one. Reduce it.", at=definition_of(code))
        (operand,) = operand
    if dtype == "bool" and operand.dtype != "bool":
        refuse(f"{label} returned {operand.dtype}, expected bool. {_CONVERT['bool']}", at=definition_of(code))
    if operand.dtype == "bool" and label.startswith("score_mod"):
        refuse(f"{label} returned bool, expected a number. {_CONVERT['f32']}", at=definition_of(code))
    return ir.cast(operand, dtype)


# ---- all hooks ----------------------------------------------------------------------------------------------------------


@goes_deep
def trace_hooks(hooks: Sequence[Any], bound: Mapping[str, object]) -> Trace:
    """Trace the hooks of a variant, given in the order of HOOKS.

    Errors:  VariantError, UnsupportedVariant.
    Cost:    about a millisecond a hook.
    """
    score_mod, mask_mod, sink, softmax, output_transform, lse_transform, *row_transforms = hooks
    if softmax is not None and sink is not None:
        raise VariantError("sink and softmax were both given; a sink belongs to softmax. Put its weight into the OnlineNorm.")
    with trace_lock:
        tracing = HookTracer(bound)
        score = tracing.value("score_mod", score_mod, "f32")
        mask = tracing.value("mask_mod", mask_mod, "bool")
        norm = tracing.norm(softmax)
        if norm is None and score is not None:
            score, mask = move_mask(score, mask)
        program = Program(
            score=None if score is ir.index("score") else score,
            mask=None if mask is ir.TRUE else mask,
            sink=tracing.sink(sink),
            norm=norm,
            output=tracing.output(output_transform),
            lse=tracing.value("lse_transform", lse_transform, "f32"),
            rows=tracing.rows(*row_transforms),
        )
        check_lse(program)
        check_norm(program.norm)
        program, used = with_slots(program, tracing.captures.found)
        tracer = tracing.tracer
        if program.norm is not None:
            check_merge(program.norm, [tracer.scalar_values.get(c.slot) for c in used], softmax)
        check = tracer.guards.compile((*HOOKS, "bound"), [c.path for c in used], tracer.scalar_paths)
        return Trace(program, check, frozenset(tracing.captures.names), tracing.paths(used))


def check_lse(program: Program) -> None:
    """Hooks that read the logsumexp need a norm that has one."""
    if program.norm is None or program.norm.lse is not None:
        return
    if program.lse is not None or (program.output is not None and "lse" in program.output.deps):
        raise VariantError("a hook reads lse, but the variant's OnlineNorm has none. Give it a method lse(state).")


def check_norm(norm: NormProgram | None) -> None:
    """What a norm hands from tile to tile is one number a row: logits enter it through reductions over the row.

    Errors:  VariantError.
    """
    if norm is None:
        return
    named = zip(norm.state_names, norm.next_state, strict=True)
    for what, value in (("factor", norm.rescale), *((f"state '{name}'", value) for name, value in named)):
        if value.deps & {"score", "kv_idx"}:
            raise VariantError(
                f"the norm's {what} differs from key to key, expected one number a row. ``score`` is a single logit, of which "
                "score.max() and score.sum() are itself: reduce over the row with jitgen.row_max or jitgen.row_sum."
            )


def move_mask(score: Expr, mask: Expr | None) -> tuple[Expr, Expr | None]:
    """Move conditions that set a logit to -inf from the score into the mask, where they let tiles be skipped."""
    while True:
        found = _excluding(score)
        if found is None:
            return score, mask
        score, keep = found
        mask = keep if mask is None else ir.make("and", mask, keep)


def _excluding(score: Expr) -> tuple[Expr, Expr] | None:
    """(logit, condition) of ``where(condition, logit, -inf)`` or ``x + where(condition, y, -inf)`` at the root of a score."""
    if score.op == "where" and "score" not in score.args[0].deps:
        condition, yes, no = score.args
        if _is_excluded(no):
            return yes, condition
        if _is_excluded(yes):
            return no, ir.make("not", condition)
    if score.op == "add":
        for x, y in (score.args, score.args[::-1]):
            inner = _excluding(y)
            if inner is not None:
                return ir.make("add", x, inner[0]), inner[1]
    return None


def _is_excluded(e: Expr) -> bool:
    return e.is_const and e.attr == -math.inf


def with_slots(program: Program, found: Sequence[Capture]) -> tuple[Program, list[Capture]]:
    """The program over the captures it reads, numbered by first use; a capture nobody reads is no launch argument."""
    number: dict[int, int] = {}
    rows, roots = program.rows, all_roots(program)
    for node in ir.walk(*roots):
        if node.op in ("scalar", "load"):
            number.setdefault(int(str(node.attr)), len(number))
    done = ir.renumbered(roots, number)

    def new(e: Expr | None) -> Expr | None:
        return None if e is None else done[e]

    used = [found[slot] for slot in number]
    norm = program.norm
    if norm is not None:
        norm = norm.over(new)
    if rows is not None:
        rows = RowHooks(*(RowProgram(new(p.before), p.rope, new(p.position), new(p.after)) for p in (rows.q, rows.k, rows.v)))
    slots = tuple(c.as_slot() for c in used)
    sinks = (i for i, c in enumerate(used) if c.path == SINK and c.kind == "tensor" and c.layout)
    return Program(
        new(program.score), new(program.mask), new(program.sink), norm, new(program.output), new(program.lse), slots, rows,
        sink_slot=next(sinks, None),
    ), used  # fmt: skip
