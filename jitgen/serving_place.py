"""Hooks of a variant for parts of requests: positions, lengths and request numbers are looked up instead of counted.

A kernel numbers what it works on from 0: the entries of its batch, the rows and the keys of an entry. Where an entry is only
a part of one or several requests, as in a cascade, the hooks of the variant still mean the requests. ``place`` rewrites them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from jitgen import ir
from jitgen.ir import Expr, index, load, make
from jitgen.program import Program, Slot

# Tables by entry, and by row of q, in the order of the slots they are given: see Segments.
ENTRY_TABLES = ("entry_row", "kv_base")
ROW_TABLES = ("row_position", "row_request", "row_q_len", "row_kv_len")


@lru_cache(maxsize=256)
def place(program: Program) -> tuple[Program, tuple[str, ...]]:
    """The score and mask of ``program`` for entries that are parts of requests, without the hooks of finished rows.

    Returns the program and the names of the tables that it captures, as int32 tensors, after the captures of ``program``.
    """
    wanted = {str(n.attr) for n in ir.walk(program.score, program.mask) if n.op == "index"}
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

    score, mask = (None if root is None else ir.rebuild(root, placed) for root in (program.score, program.mask))
    return replace(program, score=score, mask=mask, sink=None, output=None, lse=None, slots=slots), tables


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
