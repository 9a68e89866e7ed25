"""Transforms of rows as C++: the functions before and after the rotation, and the position of the rotation."""

from __future__ import annotations

from jitgen import ir
from jitgen.emit_hooks import capture_fields
from jitgen.emit_lower import Unit
from jitgen.emit_norm import RowLowering
from jitgen.emit_split import split_floats
from jitgen.emit_text import ATOM, Term
from jitgen.ir import Expr, walk
from jitgen.kv_spec import (
    PLACES,
    SCALES,
    RowsSpec,
    StreamsContext,
    StreamSpec,
    StreamText,
    heads_ahead,
    rounds_itself,
)
from jitgen.target import CompileTarget

ELEMENT = ("o", "d")
# The host knows how many heads and elements of a row there are; requests and positions are clamped to what is captured.
HOST_CHECKED = frozenset(("kv_h", "d"))
TABLE_TYPES = {"bfloat16": "jg::bf16_16", "float16": "jg::half16", "float32": "float"}
MAX_CONSTANTS = 2  # rows of which lanes hold their elements: 16 registers each for a head_dim of 128


def emit_streams(spec: RowsSpec, *, holds_constants: bool = False) -> StreamsContext:
    """What the template of the streams prints. ``holds_constants``: a lane keeps its elements of captured rows for all rows
    that it works on, as it does on a GPU where it has registers for them.

    Errors:  UnsupportedVariant when an operation has no meaning for a row.
    """
    unit = Unit(spec.slots)
    streams = tuple(_stream(unit, s, spec.target, holds_constants) for s in spec.streams)
    return StreamsContext(
        args_fields=spec.own_args + capture_fields(unit),
        has_transform=any(s.before or s.after or not s.position_is_own for s in streams),
        reads_pages=spec.reads_pages,
        head_fields=tuple(m.text for m in unit.head.members),
        head_lines=tuple(unit.head.lines),
        places=PLACES[spec.places],
        streams=streams,
    )


def _stream(unit: Unit, s: StreamSpec, target: CompileTarget, holds_constants: bool) -> StreamText:
    turn = s.rotation
    held = _constants(unit, s) if holds_constants and not rounds_itself(s, target) else {}
    lines, position = _position(unit, s.position)
    is_own = position == "pos"
    return StreamText(
        name=s.name,
        struct=s.name.upper(),
        dtype=s.dtype,
        out_dtype=s.out_dtype,
        head_dim=s.head_dim,
        vec=s.vec,
        ahead=heads_ahead(s, target),
        rotary_dim=turn.rotary_dim if turn else 0,
        interleave=turn.interleave if turn else False,
        scale=SCALES[s.scale],
        turns=f"turns{turn.number}" if turn and not turn.table else "",
        table=f"table{turn.number}" if turn and turn.table else "",
        table_dtype=TABLE_TYPES[turn.table] if turn and turn.table else "",
        constants=tuple(f"jg::load(args.{unit.slot_names[n.attr]}, i)" for n in held),
        before=_row(unit, s.before, s.head_dim, held),
        after=_row(unit, s.after, s.head_dim, held),
        position_is_own=is_own,
        position_lines=lines,
        position=position,
    )


def _lowering(unit: Unit, root: Expr, elements: tuple[str, ...]) -> RowLowering:
    low = RowLowering(unit, [root], elements, guard=False)
    low.leaves["q_idx"] = "pos"
    low.body.taken |= {"pos", "b", "kv_h"}
    low.host_checked = HOST_CHECKED
    return low


def _constants(unit: Unit, s: StreamSpec) -> dict[Expr, int]:
    """Elements of captured rows that are the same for every head and token, by number."""
    found: dict[Expr, int] = {}
    for n in walk(s.before, s.after):
        if n.op == "load" and n.args == (ir.index("d"),) and n.dtype == "f32" and unit.slots[n.attr].layout == "c":
            found.setdefault(n, len(found))
    return dict(list(found.items())[:MAX_CONSTANTS])


def _row(unit: Unit, root: Expr | None, head_dim: int, held: dict[Expr, int]) -> tuple[str, ...]:
    """Statements that replace every element of a row."""
    if root is None:
        return ()
    length = ir.index("head_dim_v")  # differs between the streams of a kernel
    root = ir.rebuild(root, lambda n: ir.const(head_dim) if n is length else None)
    root = split_floats(root, _lowering(unit, root, ELEMENT).level)
    low = _lowering(unit, root, ELEMENT)
    if held:
        low.place = "jg::Element"
        low.given.update({n: Term(f"row.constant({number}, i)", ATOM, "float") for n, number in held.items()})
    low.rewrite_each(root, None)
    return tuple(low.body.lines)


def _position(unit: Unit, root: Expr | None) -> tuple[tuple[str, ...], str]:
    if root is None or root is ir.index("q_idx"):
        return (), "pos"
    low = _lowering(unit, root, ())
    value = low.term(root, low.body).text
    return tuple(low.body.lines), f"static_cast<int>({value})"
