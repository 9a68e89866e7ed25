"""Transforms of rows as C++: the functions before and after the rotation, and the position of the rotation."""

from __future__ import annotations

from jitgen import ir
from jitgen.emit import capture_fields
from jitgen.emit_lower import Unit
from jitgen.emit_norm import RowLowering
from jitgen.emit_split import split_floats
from jitgen.ir import Expr
from jitgen.kv_spec import PLACES, SCALES, RowsSpec, StreamsContext, StreamSpec, StreamText, heads_ahead
from jitgen.target import CompileTarget

ELEMENT = ("o", "d")
# The host knows how many heads and elements of a row there are; requests and positions are clamped to what is captured.
HOST_CHECKED = frozenset(("kv_h", "d"))


def emit_streams(spec: RowsSpec) -> StreamsContext:
    """What the template of the streams prints.

    Errors:  UnsupportedVariant when an operation has no meaning for a row.
    """
    unit = Unit(spec.slots)
    streams = tuple(_stream(unit, s, spec.target) for s in spec.streams)
    return StreamsContext(
        args_fields=spec.own_args + capture_fields(unit),
        has_transform=any(s.before or s.after or not s.position_is_own for s in streams),
        head_fields=tuple(m.text for m in unit.head.members),
        head_lines=tuple(unit.head.lines),
        places=PLACES[spec.places],
        streams=streams,
    )


def _stream(unit: Unit, s: StreamSpec, target: CompileTarget) -> StreamText:
    turn = s.rotation
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
        table_dtype={"bfloat16": "bf16_16", "float16": "half16"}.get(turn.table, "float32") if turn and turn.table else "",
        before=_row(unit, s.before, s.head_dim),
        after=_row(unit, s.after, s.head_dim),
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


def _row(unit: Unit, root: Expr | None, head_dim: int) -> tuple[str, ...]:
    """Statements that replace every element of a row."""
    if root is None:
        return ()
    length = ir.index("head_dim_v")  # differs between the streams of a kernel
    root = ir.rebuild(root, lambda n: ir.const(head_dim) if n is length else None)
    root = split_floats(root, _lowering(unit, root, ELEMENT).level)
    low = _lowering(unit, root, ELEMENT)
    low.rewrite_each(root, None)
    return tuple(low.body.lines)


def _position(unit: Unit, root: Expr | None) -> tuple[tuple[str, ...], str]:
    if root is None or root is ir.index("q_idx"):
        return (), "pos"
    low = _lowering(unit, root, ())
    value = low.term(root, low.body).text
    return tuple(low.body.lines), f"static_cast<int>({value})"
