"""Hooks of a variant for parts of requests: positions, lengths and request numbers are looked up instead of counted.

A kernel numbers what it works on from 0: the entries of its batch, the rows and the keys of an entry. Where an entry is only
a part of one or several requests, as in a cascade, the hooks of the variant still mean the requests. ``place`` rewrites them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from jitgen import ir
from jitgen.ir import Expr, index, load, make
from jitgen.program import Program, RowProgram, Slot

# Tables by entry, and by row of q, in the order of the slots they are given: see Segments.
ENTRY_TABLES = ("entry_row", "kv_base")
ROW_TABLES = ("row_position", "row_request", "row_q_len", "row_kv_len")


@lru_cache(maxsize=256)
def place(program: Program) -> tuple[Program, tuple[str, ...]]:
    """The score, the mask and the transforms of keys and values of ``program`` for entries that are parts of requests, without
    the hooks of finished rows. A transform of rows that many requests share sees the first of these.

    Returns the program and the names of the tables that it captures, as int32 tensors, after the captures of ``program``.
    """
    wanted = {str(n.attr) for n in ir.walk(program.score, program.mask) if n.op == "index"}
    if program.rows is not None and program.rows.changes_keys:
        wanted |= {"kv_idx"} | ({"b"} & {str(n.attr) for n in ir.walk(*program.rows.roots()) if n.op == "index"})
    tables = _tables_for(wanted)
    slots = (*program.slots, *(Slot("tensor", "int32", 1, "c", False, name) for name in tables))
    number = {name: len(program.slots) + i for i, name in enumerate(tables)}

    def read(table: str, at: Expr) -> Expr:
        return load(number[table], "i32", (at,))

    def placed(node: Expr) -> Expr | None:
        if node.op != "index":
            return None
        if node.attr == "kv_idx":
            return make("add", node, read("kv_base", index("b")))
        if node.attr not in _ROW_TABLE_OF:
            return None
        row = make("add", read("entry_row", index("b")), index("q_idx"))
        if node.attr == "ctx_len":
            return make("sub", read("row_kv_len", row), read("row_q_len", row))
        return read(_ROW_TABLE_OF[str(node.attr)], row)

    rows = program.rows
    if rows is not None:

        def placed_row(node: Expr) -> Expr | None:
            if node.op != "index" or node.attr not in ("q_idx", "b"):
                return None
            if node.attr == "b":
                return read("row_request", read("entry_row", node))
            return make("add", node, read("kv_base", index("b")))

        def placed_rows(p: RowProgram) -> RowProgram:
            position = index("q_idx") if p.position is None and p.rope is not None else p.position
            before, position, after = (None if e is None else ir.rebuild(e, placed_row) for e in (p.before, position, p.after))
            return RowProgram(before, p.rope, position, after)

        rows = replace(rows, k=placed_rows(rows.k), v=placed_rows(rows.v))
    score, mask = (None if root is None else ir.rebuild(root, placed) for root in (program.score, program.mask))
    return replace(program, score=score, mask=mask, sink=None, output=None, lse=None, slots=slots, rows=rows), tables


_ROW_TABLE_OF = {"q_idx": "row_position", "b": "row_request", "q_len": "row_q_len", "kv_len": "row_kv_len", "ctx_len": ""}


def _tables_for(wanted: set[str]) -> tuple[str, ...]:
    used = {_ROW_TABLE_OF[name] for name in wanted if _ROW_TABLE_OF.get(name)}
    if "ctx_len" in wanted:
        used |= {"row_q_len", "row_kv_len"}
    if used:
        used.add("entry_row")
    if "kv_idx" in wanted:
        used.add("kv_base")
    return tuple(name for name in (*ENTRY_TABLES, *ROW_TABLES) if name in used)


@lru_cache(maxsize=256)
def finishing(program: Program) -> Program:
    """The hooks of ``program`` that see finished rows only."""
    return replace(program, score=None, mask=None)
