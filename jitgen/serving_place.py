"""Hooks of a variant for parts of requests: positions, lengths and request numbers are looked up instead of counted.

A kernel numbers what it works on from 0: the entries of its batch, the rows and the keys of an entry. Where an entry is only
a part of one or several requests, as in a cascade, or its keys are some that were chosen, the hooks of the variant still mean
the requests. ``place`` rewrites them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from jitgen import ir
from jitgen.emit_ranges import POSITION_LIMIT
from jitgen.ir import Expr, const, index, load, make
from jitgen.ir_ops import PAGE_OPS
from jitgen.program import Program, RowProgram, Slot

# In the order of their slots: see Entries. By entry, by entry and KV head, by page of a list, and by row of q.
TABLES = (
    "entry_row", "kv_base", "entry_end", "list_start", "list_position", "row_position", "row_request", "row_q_len",
    "row_kv_len",
)  # fmt: skip
NO_POSITION = POSITION_LIMIT - 1  # in list_position, for a page that stands for no keys


@dataclass(frozen=True, slots=True)
class ChosenLists:
    """Lists of chosen pages, of which each has its own place in the request.

    is_even     the keys of an entry end at the same place in the lists of all KV heads, so that no mask has to say where
    """

    page_size: int
    is_even: bool


@lru_cache(maxsize=256)
def place(program: Program, chosen: ChosenLists | None = None, is_local: bool = False) -> tuple[Program, tuple[str, ...]]:
    """``program`` for entries that are parts of requests: without the hooks of finished rows, as a row is in several entries;
    or with all hooks for ``chosen`` lists, where it is in one. A transform of rows that many requests share sees the first of
    these. ``is_local``: the program's q_idx counts the rows of a request from 0.

    Returns the program and the names of the tables that it captures, as int32 tensors, after the captures of ``program``.
    """
    has_end = chosen is not None and not chosen.is_even
    finished = (None, None, None) if chosen is None else (program.sink, program.output, program.lse)
    wanted = _indices(program.score, program.mask, *finished)
    wanted |= {"kv_idx"} if has_end else set()
    rows = program.rows
    if rows is not None and rows.changes_keys:
        wanted |= {"kv_idx"} | ({"b"} & _indices(*rows.roots()))
    tables = _tables_for(wanted, chosen is not None, has_end)
    slots = (*program.slots, *(_table_slot(name, chosen is not None) for name in tables))
    places = _Places({name: len(program.slots) + i for i, name in enumerate(tables)}, chosen, is_local)
    score, mask, output, lse = (
        None if root is None else ir.rebuild(root, places.of_hook) for root in (program.score, program.mask, *finished[1:])
    )
    sink = None if finished[0] is None else ir.rebuild(finished[0], places.of_sink)
    if has_end:
        inside = make("lt", places.key(index("kv_idx")), places.read("entry_end", index("b")))
        mask = inside if mask is None else make("and", mask, inside)
    if rows is not None:
        rows = replace(rows, k=places.in_row(rows.k), v=places.in_row(rows.v))
    return replace(program, score=score, mask=mask, sink=sink, output=output, lse=lse, slots=slots, rows=rows), tables


def _indices(*roots: Expr | None) -> set[str]:
    """The indices that expressions read, but for those of where a key lies: that goes by the entry, and by its own keys."""
    found: set[str] = set()
    seen: set[Expr] = set()
    pending = [root for root in roots if root is not None]
    while pending:
        node = pending.pop()
        if node.op == "index":
            found.add(str(node.attr))
        elif node.op not in PAGE_OPS and node not in seen:
            seen.add(node)
            pending += node.args
    return found


class _Places:
    """What stands for an index of an entry: ``number`` has the slots of the tables."""

    def __init__(self, number: dict[str, int], chosen: ChosenLists | None, is_local: bool) -> None:
        self._number, self._chosen, self._is_local = number, chosen, is_local

    def read(self, table: str, *at: Expr) -> Expr:
        return load(self._number[table], "i32", at)

    def key(self, number: Expr) -> Expr:
        """Position in the request of a key of the entry."""
        if self._chosen is None:
            return make("add", number, self.read("kv_base", index("b")))
        page_size, bits = const(self._chosen.page_size), const(NO_POSITION)  # which say: not negative, nor too large to add to
        start = make("bitand", self.read("list_start", index("b"), index("kv_h")), bits)
        entry = make("add", start, make("floordiv", number, page_size))
        first = make("bitand", self.read("list_position", entry), bits)
        return make("add", first, make("mod", number, page_size))

    def of_hook(self, node: Expr) -> Expr | None:
        return self._of_request(node, index("q_idx"))

    def of_sink(self, node: Expr) -> Expr | None:
        """Sinks are the same for all rows of an entry, which are those of one request."""
        return self._of_request(node, const(0))

    def _of_request(self, node: Expr, row_of_entry: Expr) -> Expr | None:
        if node.op in PAGE_OPS:
            return node
        if node.op != "index":
            return None
        if node.attr == "kv_idx":
            return self.key(node)
        if node.attr == "kv_off":
            return make("sub", node, self.read("kv_base", index("b")))
        if node.attr not in _ROW_TABLES_OF:
            return None
        row = make("add", self.read("entry_row", index("b")), row_of_entry)
        tables = [self.read(name, row) for name in _ROW_TABLES_OF[str(node.attr)]]
        if node.attr == "ctx_len":
            return make("sub", *tables)
        if node.attr == "q_first" or (node.attr == "q_off" and self._is_local):
            return make("sub", row, tables[0])
        if node.attr == "q_off":
            position, kv_len, q_len = tables
            return make("add", make("sub", row, position), make("sub", kv_len, q_len))
        return tables[0]

    def in_row(self, p: RowProgram) -> RowProgram:
        """A transform of keys or values, whose rows are numbered by q_idx."""
        position = index("q_idx") if p.position is None and p.rope is not None else p.position
        before, position, after = (None if e is None else ir.rebuild(e, self._of_key) for e in (p.before, position, p.after))
        return RowProgram(before, p.rope, position, after)

    def _of_key(self, node: Expr) -> Expr | None:
        if node.op in PAGE_OPS:
            return node
        if node.op != "index" or node.attr not in ("q_idx", "b"):
            return None
        return self.read("row_request", self.read("entry_row", node)) if node.attr == "b" else self.key(node)


# What is read of a row for an index of its request.
_ROW_TABLES_OF = {
    "q_idx": ("row_position",),
    "b": ("row_request",),
    "q_len": ("row_q_len",),
    "kv_len": ("row_kv_len",),
    "ctx_len": ("row_kv_len", "row_q_len"),
    "q_first": ("row_position",),
    "q_off": ("row_position", "row_kv_len", "row_q_len"),
}


def _tables_for(wanted: set[str], is_chosen: bool, has_end: bool) -> tuple[str, ...]:
    used = {table for name in wanted for table in _ROW_TABLES_OF.get(name, ())}
    if used:
        used.add("entry_row")
    if "kv_idx" in wanted or "kv_off" in wanted:
        used |= {"list_start", "list_position"} if is_chosen else {"kv_base"}
    if has_end:
        used.add("entry_end")
    return tuple(name for name in TABLES if name in used)


def _table_slot(name: str, is_chosen: bool) -> Slot:
    rank = 2 if name == "list_start" else 1
    # ascending inside of a list, and of the rows of one request; nothing looks at more at once
    is_sorted = is_chosen and name in ("list_position", "row_position")
    return Slot("tensor", "int32", rank, "sc"[-rank:], is_sorted, name)


@lru_cache(maxsize=256)
def finishing(program: Program) -> Program:
    """The hooks of ``program`` that see finished rows only."""
    return replace(program, score=None, mask=None)
