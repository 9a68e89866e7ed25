"""Transforms of the rows of K and V inside the decode kernel: what its spec, its arguments and its template hold of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from jitgen import ir
from jitgen.abi import ArgField
from jitgen.checks import dtype_name
from jitgen.ir import Expr
from jitgen.kv_launch import Turn
from jitgen.kv_spec import Rotation, RowsSpec, StreamSpec, rotation_args, rotations_of
from jitgen.program import Program, RowProgram, Slot, reads_pages
from jitgen.records import record
from jitgen.target import CompileTarget

CHUNK = 8  # elements of 16 bits that a lane loads at once
ROTATED_CHUNKS = 2 * CHUNK  # a rotation is of whole chunks
ELEMENT = ir.index("o")


@record
class DecodeRows:
    """The transforms of a decode kernel: streams 'k' and 'v', as far as these are transformed."""

    streams: tuple[StreamSpec, ...]

    def shape(self) -> tuple[object, ...]:
        """Identity as plain values."""
        return tuple(s.shape() for s in self.streams)

    def roots(self) -> tuple[Expr | None, ...]:
        """The expressions of the transforms."""
        return tuple(e for s in self.streams for e in s.roots())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(s.name for s in self.streams)

    @property
    def args(self) -> tuple[ArgField, ...]:
        """Launch arguments in front of the captures."""
        return rotation_args(rotations_of(self.streams))

    def section(self, slots: Sequence[Slot], target: CompileTarget) -> str:
        """The part of the kernel's source that holds the transforms, with line marks."""
        from dataclasses import fields

        from jitgen.kv_emit import emit_streams
        from jitgen.render import render_template

        context = emit_streams(RowsSpec(self.streams, "rows", target, tuple(slots)))
        text = render_template("cache_ops/decode_rows.h.jinja", {f.name: getattr(context, f.name) for f in fields(context)})
        return text.rstrip("\n")


def fits_decode(program: Program, head_dim: int, head_dim_v: int) -> bool:
    """Whether the decode kernel can transform the keys and values: rotations must be of whole chunks."""
    rows = program.rows
    return rows is None or all(
        p.rope is None or p.rope.dim_of(dim) % ROTATED_CHUNKS == 0 for p, dim in ((rows.k, head_dim), (rows.v, head_dim_v))
    )


def value_factor(program: Program) -> Expr | None:
    """What a key's value is multiplied by, over kv_idx, where that is all that is done to it, and it is stored by slot or page:
    the weight of the key is multiplied instead. None for other transforms."""
    rows = program.rows
    if rows is None or rows.v.rope is not None or rows.v.before is None:
        return None
    factor, rest = ir.const(1.0), rows.v.before
    while rest is not ELEMENT:
        if rest.op not in ("mul", "truediv"):
            return None
        others = [a for a in rest.args if "o" not in a.deps]
        if len(others) != 1 or others[0].deps & {"d", "row"} or (rest.op == "truediv" and others[0] is rest.args[0]):
            return None
        factor = ir.make(rest.op, factor, others[0])
        rest = next(a for a in rest.args if a is not others[0])
    key = ir.rebuild(factor, lambda n: ir.index("kv_idx") if n is ir.index("q_idx") else None)
    return key if reads_pages(key) else None


@lru_cache(maxsize=256)
def with_value_factor(program: Program) -> Program:
    """The program with the factor of values as a hook of its own, and not as a transform, where there is one."""
    factor = value_factor(program)
    return program if factor is None else replace(program, value=factor, rows=replace(program.rows, v=RowProgram()))


def transforms_of(program: Program, head_dim: int, head_dim_v: int) -> list[tuple[str, RowProgram, int]]:
    """Name, transform and head dim of K and V, as far as they are transformed."""
    rows = program.rows
    assert rows is not None
    return [(n, p, dim) for n, p, dim in (("k", rows.k, head_dim), ("v", rows.v, head_dim_v)) if not p.is_empty]


def turns_in_decode(program: Program, head_dim: int, head_dim_v: int) -> list[Turn]:
    """The different rotations of K and V, by their number."""
    found: dict[tuple[int, int], Turn] = {}
    for _, p, dim in transforms_of(program, head_dim, head_dim_v):
        if p.rope is not None:
            turned = p.rope.dim_of(dim)
            found.setdefault((id(p.rope), turned), (p.rope, turned))
    return list(found.values())


def rows_in_decode(program: Program, dtype: str, head_dim: int, head_dim_v: int) -> DecodeRows:
    """The transforms of a program, for a decode kernel of ``dtype``."""
    turns = turns_in_decode(program, head_dim, head_dim_v)
    streams = []
    for name, p, dim in transforms_of(program, head_dim, head_dim_v):
        rotation = None
        if p.rope is not None:
            turned = p.rope.dim_of(dim)
            number = next(i for i, (rope, d) in enumerate(turns) if rope is p.rope and d == turned)
            table = "" if p.rope.cos_sin is None else dtype_name(p.rope.cos_sin.dtype)
            rotation = Rotation(turned, p.rope.interleave, table, number)
        streams.append(StreamSpec(name, dtype, dtype, dim, CHUNK, "", rotation, p.before, p.after, p.position))
    return DecodeRows(tuple(streams))
