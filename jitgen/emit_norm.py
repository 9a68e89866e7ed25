"""Softmax replacements and output transforms: code that sees one row at a time through the Row accessor."""

from __future__ import annotations

from dataclasses import dataclass, field

from jitgen import ir
from jitgen.emit_lower import HOST_CHECKED, Block, Lowering, Unit
from jitgen.emit_split import split_floats
from jitgen.emit_text import ATOM, TERNARY, Term, float_literal, identifier
from jitgen.errors import UnsupportedVariant
from jitgen.ir import Expr, walk
from jitgen.ir_ops import ROW_OPS
from jitgen.program import NormProgram

MASKED = "x == -INFINITY"  # what the mask left of an excluded logit


@dataclass(frozen=True)
class ValueText:
    """Statements and the value they lead to."""

    lines: tuple[str, ...] = ()
    value: str = ""


@dataclass(frozen=True)
class NormText:
    """The functions of a softmax replacement."""

    fields: tuple[str, ...] = ()
    init_lines: tuple[str, ...] = ()
    update_lines: tuple[str, ...] = ()
    rescale: str = "1.0f"
    finalize_lines: tuple[str, ...] = ()
    lse: ValueText = field(default_factory=ValueText)
    rescales: bool = False
    reverse: bool = False
    needs_cumsum: bool = False
    merge_lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class OutputText:
    """The body of output_row."""

    lines: tuple[str, ...] = ()


class RowLowering(Lowering):
    """Prints code of one row: values of the row are locals, values per element go into lambdas.

    ``x`` and ``i`` are the element and its index (kv_idx for logits, d for outputs).
    """

    def __init__(self, unit: Unit, roots: list[Expr], elements: tuple[str, ...], guard: bool) -> None:
        states = {str(n.attr) for n in walk(*roots) if n.op == "state"}
        levels = {"row": "row", "lse": "row", "q_idx": "row", **dict.fromkeys(states, "row"), **dict.fromkeys(elements, "elem")}
        self.body = Block("row", taken={"args", "head", "row", "state", "x", "i", "lse", "q_idx", "inclusive"})
        super().__init__(unit, {"head": unit.head, "row": self.body}, levels, roots)
        self.guard = guard
        self.leaves.update(score="x", kv_idx="i", o="x", d="i")
        self.host_checked = HOST_CHECKED - {"kv_idx"}  # the last tile's rows reach past kv_len
        print_plain = self.print_op
        self.print_op = lambda low, node, at, narrow: (
            self.print_row_op(node, at) if node.op in ROW_OPS else print_plain(low, node, at, narrow)
        )

    def level(self, node: Expr) -> str:
        return "row" if super().level(node) == "col" else super().level(node)

    def element(self, root: Expr, masked: str | None) -> list[str]:
        """Body of a lambda: statements, then the value with what stands for an excluded element."""
        block = Block("elem", taken=set(self.body.taken))
        self.blocks["elem"] = block
        value = self.term(root, block)
        text = value.text if masked is None else f"{MASKED} ? {masked} : {value.at(TERNARY)}"
        return [*block.lines, text]

    def print_row_op(self, node: Expr, at: Block) -> Term:
        if node.op == "row_cumsum":
            if at is not self.blocks.get("elem") or not self.in_weight:
                raise UnsupportedVariant("row_cumsum inside another row reduction is not available: use it in the weight only.")
            return Term("inclusive", ATOM, "float")
        function = "max" if node.op == "row_max" else "sum"
        outer, weight = self.blocks.get("elem"), self.in_weight
        self.in_weight = False
        masked = {"row_max": "-INFINITY", "row_sum": "0.0f"}.get(node.op) if self.guard else None
        *lines, value = self.element(node.args[0], masked)
        self.in_weight = weight
        if outer is not None:
            self.blocks["elem"] = outer
        varying = "largest" if function == "max" else "total"
        head = f"row.{function}([&](float x, {self.place} i) {{"
        call = [head, *(f"  {line}" for line in lines), f"  return {value};", "});"]
        name = self.body.add_local((node, False), "float", varying, " ".join(p.strip() for p in call[:-1]))
        self.body.lines.pop()
        self.body.lines += [f"const float {name.text} = {call[0]}", *call[1:]]
        return name

    in_weight = False
    place = "int"  # type of the index of an element

    def rewrite_each(self, root: Expr, masked: str | None) -> None:
        """Replaces every element of the row by ``root`` of it."""
        sums = {n for n in walk(root) if n.op == "row_cumsum"}
        if len(sums) > 1:
            raise UnsupportedVariant(f"the weight uses {len(sums)} different row_cumsum, expected at most 1. Combine them.")
        for node in sums:
            *lines, value = self.element(node.args[0], "0.0f")
            self._call(f"row.cumsum([&](float x, {self.place} i) {{", lines, f"return {value};")
        self.in_weight = True
        *lines, value = self.element(root, masked)
        self.in_weight = False
        if sums:
            self._call(f"row.each_with_cumsum([&](float& x, {self.place} i, float inclusive) {{", lines, f"x = {value};")
        else:
            self._call(f"row.each([&](float& x, {self.place} i) {{", lines, f"x = {value};")

    def _call(self, head: str, lines: list[str], last: str) -> None:
        self.body.lines += [head, *(f"  {line}" for line in (*lines, last)), "});"]


def emit_norm(unit: Unit, norm: NormProgram | None) -> NormText:
    """The section's functions for a softmax replacement."""
    if norm is None:
        return NormText()
    names = [identifier(n) for n in norm.state_names]
    update, rescale = _emit_update(unit, norm)
    finalize = _emit_each(unit, norm.finalize, ("o", "d"))
    return NormText(
        fields=tuple(f"float {n};" for n in names),
        init_lines=tuple(f"state.{n} = {float_literal(v)};" for n, v in zip(names, norm.state_init, strict=True)),
        update_lines=update,
        rescale=rescale,
        finalize_lines=finalize,
        lse=_emit_lse(unit, norm.lse),
        rescales=rescale != "1.0f",
        reverse=norm.order == "reverse",
        needs_cumsum=any(n.op == "row_cumsum" for n in walk(*norm.roots())),
        merge_lines=_emit_merge(unit, norm),
    )


def _emit_update(unit: Unit, norm: NormProgram) -> tuple[tuple[str, ...], str]:
    """norm_update: new state and factor from the logits, then the weights in their place, then the state."""
    roots = [norm.weight, norm.rescale, *norm.next_state]
    low = RowLowering(unit, roots, ("score", "kv_idx"), guard=True)
    rewritten = [split_floats(r, low.level) for r in roots]
    low = RowLowering(unit, rewritten, ("score", "kv_idx"), guard=True)
    weight, rescale, *next_state = rewritten
    factor = _named(low, rescale, "factor")
    assignments = []
    for name, before, value in zip(norm.state_names, norm.state_names, next_state, strict=True):
        if value is not ir.state(before):
            term = _named(low, value, f"next_{identifier(name)}")
            assignments.append(f"state.{identifier(name)} = {term};")
    low.rewrite_each(weight, "0.0f")
    return (*low.body.lines, *assignments), factor


def _emit_merge(unit: Unit, norm: NormProgram) -> tuple[str, ...]:
    """norm_merge: the state of two parts together, then what their outputs are multiplied by."""
    if not norm.merges:
        return ()
    low = RowLowering(unit, list(norm.merge), (), guard=False)
    roots = [split_floats(r, low.level) for r in norm.merge]
    low = RowLowering(unit, roots, (), guard=False)
    low.body.taken.update(("a", "b", "scale_a", "scale_b"))
    targets = [*(f"state.{identifier(n)}" for n in norm.state_names), "scale_a", "scale_b"]
    values = [low.term(root, low.body).text for root in roots]
    return (*low.body.lines, *(f"{target} = {value};" for target, value in zip(targets, values, strict=True)))


def _named(low: RowLowering, root: Expr, name: str) -> str:
    """A value of the row, computed now: the logits and the state it reads are about to change."""
    term = low.term(root, low.body)
    if root.is_const or term.text in {t.text for t in low.body.local_of.values()}:
        return term.text
    return low.body.add_local((name,), "float", name, term.text).text


def _emit_each(unit: Unit, root: Expr, elements: tuple[str, ...]) -> tuple[str, ...]:
    """A transform of every element of an output row."""
    if root is ir.index("o"):
        return ()
    low = RowLowering(unit, [root], elements, guard=False)
    root = split_floats(root, low.level)
    low = RowLowering(unit, [root], elements, guard=False)
    low.rewrite_each(root, None)
    return tuple(low.body.lines)


def _emit_lse(unit: Unit, root: Expr | None) -> ValueText:
    if root is None:
        return ValueText()
    low = RowLowering(unit, [root], (), guard=False)
    value = low.term(root, low.body).text
    return ValueText(tuple(low.body.lines), value)


def emit_output(unit: Unit, root: Expr | None) -> OutputText:
    """The section's output_row."""
    return OutputText() if root is None else OutputText(_emit_each(unit, root, ("o", "d")))
