"""Masks by bits: all columns that a thread has in a row of a tile are compared at once, and give a bit each.

A comparison of kv_idx with what is known per row keeps a run of columns, which is a shift; ``and``, ``or`` and ``not`` join the
words. So a mask costs a select an element, whatever it says, where the element form costs two to four operations. The types
are in ``include/jitgen/column_bits.cuh``.

A comparison with the element at kv_idx of an ascending tensor, such as the number of a document, keeps a run of columns too.
Where it ends is searched once for each row of a query tile, by warps that have little else to do, and is the leaf 'found'.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from jitgen import ir
from jitgen.emit_lower import Block, Lowering, Unit
from jitgen.emit_mask import operands
from jitgen.emit_ops import COMPARE, print_op
from jitgen.emit_text import Term
from jitgen.ir import Expr
from jitgen.program import Program, Slot

_Q, _KV, _FOUND = ir.index("q_idx"), ir.index("kv_idx"), ir.index("found")


@dataclass(frozen=True)
class Search:
    """First key whose element of an ascending tensor is not below a value of the row, or (``above``) exceeds it."""

    slot: int
    value: Expr
    above: bool


@dataclass(frozen=True)
class BitsMask:
    """A mask as runs of columns, over the leaf 'found' if it has a search."""

    mask: Expr
    search: Search | None


def mask_by_bits(program: Program) -> BitsMask | None:
    """The mask of a program as runs of columns; None if it is not made of them, or of more searches than there is room for."""
    if program.mask is None:
        return None
    searches: list[Search] = []
    mask = _runs(_one_sided(program.mask, program.slots), program.slots, searches)
    if mask is None or len(searches) > 1:
        return None
    if searches and program.score is not None and program.score.deps & {"q_idx", "kv_idx"}:
        return None  # what such scores work out early may take the same room in shared memory
    return BitsMask(mask, searches[0] if searches else None)


def _runs(node: Expr, slots: Sequence[Slot], searches: list[Search]) -> Expr | None:
    if "kv_idx" not in node.deps:
        return node
    if node.op in ("and", "or", "not"):
        parts = [_runs(part, slots, searches) for part in node.args]
        return None if None in parts else ir.make(node.op, *[part for part in parts if part is not None])
    if node.op not in COMPARE or not node.args[0].is_int:
        return None
    left, right = node.args
    for column, value in ((left, right), (right, left)):
        if "kv_idx" in value.deps:
            continue
        if column is _KV:
            return node
        if _is_ascending_column(column, slots):
            return _searched(node, column, value, searches)
    return node if _is_bound(ir.make("sub", left, right)) else None


def _is_bound(difference: Expr) -> bool:
    """Whether a sum is kv_idx, or its negative, and what is known per row: such a comparison is printed as a bound."""
    if difference.op != "lin":
        return False
    found = [(c, a) for c, a in zip(difference.attr[1], difference.args, strict=True) if "kv_idx" in a.deps]
    return len(found) == 1 and abs(found[0][0]) == 1 and _bare(found[0][1]) is _KV


def _bare(x: Expr) -> Expr:
    return x.args[0] if x.op == "cast" and x.is_int else x


def _is_ascending_column(node: Expr, slots: Sequence[Slot]) -> bool:
    """Whether this is the element at kv_idx of a tensor declared ascending."""
    return node.op == "load" and node.args == (_KV,) and slots[int(node.attr)].is_sorted


def _searched(node: Expr, column: Expr, value: Expr, searches: list[Search]) -> Expr:
    """A comparison with an ascending column as one of kv_idx with what is found."""

    def before(above: bool) -> Expr:
        search = Search(int(column.attr), value, above)
        if search not in searches:
            searches.append(search)
        return ir.make("lt", _KV, _FOUND)

    if node.op in ("lt", "le"):
        is_first = node.args[0] is column
        part = before(above=(node.op == "le") == is_first)
        return part if is_first else ir.make("not", part)
    both = ir.make("and", before(above=True), ir.make("not", before(above=False)))  # two searches: mask_by_bits gives up
    return both if node.op == "eq" else ir.make("not", both)


def _one_sided(mask: Expr, slots: Sequence[Slot]) -> Expr:
    """The mask with equalities x[q_idx] == x[kv_idx] of an ascending x, beside kv_idx <= q_idx, as x[q_idx] <= x[kv_idx]."""
    parts = operands(mask, "and")
    if ir.make("le", _KV, _Q) not in parts:
        return mask
    return functools.reduce(lambda a, b: ir.make("and", a, b), [_lower_side(part, slots) for part in parts])


def _lower_side(part: Expr, slots: Sequence[Slot]) -> Expr:
    if part.op != "eq":
        return part
    for column, row in (part.args, part.args[::-1]):
        if _is_ascending_column(column, slots) and row.op == "load" and row.attr == column.attr and row.args == (_Q,):
            return ir.make("le", row, column)
    return part


def print_bits(low: Lowering, node: Expr, at: Block, narrow: bool) -> Term:
    """Text of one operation over all columns of a thread: truth is a word."""
    term = print_op(low, node, at, narrow)
    return Term(term.text, term.prec, "auto") if node.dtype == "bool" and "kv_idx" in node.deps else term


def search_text(unit: Unit, search: Search, value: str) -> str:
    """The search of a row, whose value is given."""
    function = "first_above" if search.above else "first_at_least"
    return f"jg::{function}(args.{unit.slot_names[search.slot]}, head.kv_len, {value})"
