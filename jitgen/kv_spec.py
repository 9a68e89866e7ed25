"""RowsSpec: one kernel that moves rows of new tokens, to a KV cache or in place; its launch arguments and its rendering."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING

from jitgen.abi import DIVISOR_ARGS, ArgField, pack_format, pointer
from jitgen.deep import goes_deep
from jitgen.ir import Expr
from jitgen.ir_nodes import attr_bytes
from jitgen.program import Slot, reads_pages
from jitgen.records import record
from jitgen.target import CompileTarget

if TYPE_CHECKING:
    from jitgen.render import Source

TEMPLATES = {"cpu": "cache_ops/rows.cpp.jinja", "cuda": "cache_ops/rows.cu.jinja"}
FLOATS = ("float32", "bfloat16", "float16")
BYTES = ("float8_e4m3fn", "float8_e5m2", "int8")
SIZE_OF = {"float32": 4, "bfloat16": 2, "float16": 2, **dict.fromkeys(BYTES, 1)}
ACCESS_BYTES = 16  # most bytes of one access to memory
MAX_HEAD_DIM = 1024
MAX_PAIRS = 384  # of all rotations of a launch: their speeds are launch arguments, of which there may be 4 kB
PLACES = {"rows": "kRows", "slots": "kSlots", "pages": "kPages", "from_pages": "kFromPages", "from_rows": "kFromRows"}
SCALES = {"": "kNone", "given": "kGiven", "stored": "kStored", "read": "kRead"}


TOKEN_ARGS: tuple[ArgField, ...] = (
    pointer("const void", "positions", "[num_tokens] position of each token; may be null"),
    pointer("const void", "batch_indices", "[num_tokens] request of each token; may be null"),
    pointer("const void", "slot_mapping", "[num_tokens] page * page_size + offset; null unless places are slots"),
    pointer("const int", "q_indptr", "[batch + 1] first token of each request, in place of positions and batch_indices"),
    pointer("const int", "lengths", "[batch] with q_indptr: position of the first token, or of the one after the last"),
    pointer("const int", "list_start", "[batch + 1] first entry of each request in pages; null: b * list_stride"),
    pointer("const int", "pages", "page numbers in logical order"),
    ArgField("int64_t", "wide", "which indices are int64: 1 positions, 2 batch_indices, 4 slot_mapping"),
    ArgField("int64_t", "from_end", "1: lengths count from the end of a request's tokens"),
    ArgField("int64_t", "num_tokens"),
    ArgField("int64_t", "batch", "requests of the page table"),
    ArgField("int64_t", "page_size"),
    ArgField("int64_t", "num_pages"),
    ArgField("int64_t", "list_stride", "entries between the page lists of two requests"),
    ArgField("int64_t", "list_length", "entries of such a list"),
    ArgField("int64_t", "stream", "CUDA stream"),
    ArgField("int64_t", "num_threads", "CPU threads; 0: the OpenMP default"),
)


def stream_args(name: str) -> tuple[ArgField, ...]:
    """The launch arguments of one stream of rows."""
    return (
        pointer("const void", name, "[num_tokens, heads, head_dim]"),
        pointer("void", f"{name}_out"),
        pointer("float", f"{name}_scale", "divides what is written: per head, or per slot and head; null: scale_value"),
        ArgField("double", f"{name}_scale_value", format="d"),
        *(ArgField("int64_t", f"{name}_{n}") for n in ("heads", "heads_per_unit", "blocks", "stride_t", "stride_h")),
        *(ArgField("int64_t", f"{name}_out_stride_{n}") for n in "psh"),
        *(ArgField("int64_t", f"{name}_scale_stride_{n}") for n in "sh"),
    )


@record
class Rotation:
    """How the rows of a stream are rotated: what of a Rope is compiled in."""

    rotary_dim: int
    interleave: bool = False
    table: str = ""  # dtype of a table of cosines and sines; empty: speeds are launch arguments
    number: int = 0  # of the rotation among those of the launch


@record
class StreamSpec:
    """The rows of one tensor: read, transformed, rotated, transformed again, scaled, written."""

    name: str  # 'q', 'k' or 'v'
    dtype: str
    out_dtype: str
    head_dim: int
    vec: int  # elements of one access to memory
    # '' none; 'given' per head, or the same for all; 'stored' found for each row and written by slot; 'read' of what is read
    scale: str = ""
    rotation: Rotation | None = None
    before: Expr | None = None  # of the element 'o' of a row
    after: Expr | None = None
    position: Expr | None = None  # of the rotation; None: that of the token

    def roots(self) -> tuple[Expr | None, ...]:
        """The expressions of the transform."""
        return (self.before, self.after, self.position)

    def shape(self) -> tuple[object, ...]:
        """Identity as plain values."""
        turn = self.rotation and (
            self.rotation.rotary_dim,
            self.rotation.interleave,
            self.rotation.table,
            self.rotation.number,
        )
        exprs = tuple("" if e is None else e.key.hex() for e in self.roots())
        return (self.name, self.dtype, self.out_dtype, self.head_dim, self.vec, self.scale, turn, *exprs)


@record
class RowsSpec:
    """One kernel. Numbers of tokens, heads and pages, strides and captured values are not in here."""

    streams: tuple[StreamSpec, ...]
    places: str  # where rows go: 'rows', 'slots' or 'pages'; or where they come from: 'from_pages' or 'from_rows'
    target: CompileTarget
    slots: tuple[Slot, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Identity of the spec under one generator."""
        slots = tuple(s.signature() for s in self.slots)
        return hashlib.sha256(attr_bytes((self.places, slots, *(s.shape() for s in self.streams)))).hexdigest()[:32]

    @property
    def family(self) -> str:
        return f"rows_{self.target.kind}"

    @property
    def label(self) -> str:
        """Short description for progress lines and logs."""
        to = "in place" if self.places == "rows" else self.places if self.places.startswith("from") else f"to {self.places}"
        what = ", ".join(f"{s.name} {s.dtype} hd{s.head_dim} as {s.out_dtype}" for s in self.streams)
        return f"rows {to}: {what}"

    @property
    def template(self) -> str:
        return TEMPLATES[self.target.kind]

    @cached_property
    def rotations(self) -> tuple[Rotation, ...]:
        """The rotations of the streams by number."""
        return rotations_of(self.streams)

    @cached_property
    def args(self) -> tuple[ArgField, ...]:
        """Fields of ``struct Args``, captures last."""
        from jitgen.runtime import capture_fields

        return self.own_args + capture_fields(self)  # type: ignore[arg-type]

    @cached_property
    def own_args(self) -> tuple[ArgField, ...]:
        """Fields of ``struct Args`` without the captures."""
        found = [*TOKEN_ARGS]
        for s in self.streams:
            found += stream_args(s.name)
        return (*found, *rotation_args(self.rotations), *(DIVISOR_ARGS if self.reads_pages else ()))

    @cached_property
    def reads_pages(self) -> bool:
        """Whether a transform reads where keys lie in a paged cache."""
        return bool(reads_pages(*(e for s in self.streams for e in s.roots())))

    @property
    def pack_format(self) -> str:
        return pack_format(self.args)


def rotations_of(streams: Sequence[StreamSpec]) -> tuple[Rotation, ...]:
    """The rotations of streams by number."""
    found = {s.rotation.number: s.rotation for s in streams if s.rotation is not None}
    return tuple(found[n] for n in sorted(found))


def rotation_args(rotations: Sequence[Rotation]) -> tuple[ArgField, ...]:
    """The launch arguments of rotations."""
    found: list[ArgField] = []
    for r in rotations:
        if r.table:
            found.append(pointer("const void", f"table{r.number}", "[rows, rotary_dim]: cosines, then sines"))
            found += [ArgField("int64_t", f"table{r.number}_rows"), ArgField("int64_t", f"table{r.number}_stride")]
        else:
            pairs = r.rotary_dim // 2
            found.append(ArgField("jg::Turns", f"turns{r.number}[{pairs}]", "of each pair", f"{8 * pairs}s"))
    return tuple(found)


def widest_access(head_dim: int, rotation: Rotation | None, sizes: tuple[int, ...], aligned_to: int) -> int:
    """Elements of one access: as many as 16 bytes hold of the larger type, that divide the rows into whole chunks.

    ``sizes``: bytes of an element read and of one written. ``aligned_to``: elements by whose multiples rows are apart, 0 for
    any number of them.
    """
    vec = math.gcd(ACCESS_BYTES // max(sizes), head_dim, aligned_to)
    if rotation is not None:
        vec = math.gcd(vec, rotation.rotary_dim // 2)
    return vec & -vec  # the largest power of two in it


# What is in flight hides the latency of memory: 16 warps a multiprocessor, each lane with 32 bytes of four heads. On an H100
# 3 CTAs with two heads each were 0 to 9 % slower.
HEADS_AHEAD, BLOCKS_PER_PROCESSOR = 4, 2


def heads_ahead(stream: StreamSpec, target: CompileTarget) -> int:
    """Heads that a lane loads at once: fewer where it has more than two chunks of each, or no instruction to round to float8,
    which takes registers."""
    chunks = -(-stream.head_dim // (64 * stream.vec))
    return max(1, HEADS_AHEAD // (2 if rounds_itself(stream, target) else 1) // chunks)


def rounds_itself(stream: StreamSpec, target: CompileTarget) -> bool:
    """Whether the GPU lacks the instruction to round to what is written, so that registers are scarce."""
    return target.kind == "cuda" and stream.out_dtype.startswith("float8") and target.compute_capability < (8, 9)


@dataclass(frozen=True)
class StreamText:
    """What ``streams.h.jinja`` prints of a stream."""

    name: str
    struct: str
    dtype: str
    out_dtype: str
    head_dim: int
    vec: int
    ahead: int  # heads whose rows a lane loads before it works on the first
    rotary_dim: int
    interleave: bool
    scale: str
    turns: str  # name of the launch argument with the speeds of pairs
    table: str  # or of that with cosines and sines
    table_dtype: str
    constants: tuple[str, ...]  # what a lane reads once of captured rows, for its element i
    before: tuple[str, ...]
    after: tuple[str, ...]
    position_is_own: bool  # the rotation is by the token's position
    position_lines: tuple[str, ...]
    position: str


@dataclass(frozen=True)
class StreamsContext:
    """Everything ``streams.h.jinja`` may name."""

    args_fields: tuple[ArgField, ...]
    has_transform: bool
    reads_pages: bool
    head_fields: tuple[str, ...]
    head_lines: tuple[str, ...]
    places: str
    streams: tuple[StreamText, ...]


@dataclass(frozen=True)
class RowsContext:
    """Everything ``rows.cu.jinja`` and ``rows.cpp.jinja`` may name."""

    header_comment: str
    streams_section: str
    places: str
    streams: tuple[StreamText, ...]
    heads_of_token: str
    blocks_per_processor: int


@goes_deep
def render_rows(spec: RowsSpec) -> Source:
    """Generate the translation unit of ``spec``.

    Errors:  UnsupportedVariant when an operation of a transform has no meaning for a row.
    """
    from jitgen import __version__
    from jitgen.kv_emit import emit_streams
    from jitgen.linemap import strip_marks, with_line_directives
    from jitgen.render import Source, reached_headers, render_template

    section = emit_streams(spec, holds_constants=spec.target.kind == "cuda")
    text = render_template("cache_ops/streams.h.jinja", {f.name: getattr(section, f.name) for f in fields(section)})
    lines = [f"generated by jitgen {__version__} from {spec.template}: do not edit", spec.label]
    context = RowsContext(
        header_comment="\n".join(f"// {line}" for line in lines),
        streams_section=text.rstrip("\n"),
        places=section.places,
        streams=section.streams,
        heads_of_token=" + ".join(f"args.{s.name}_heads" for s in spec.streams),
        blocks_per_processor=BLOCKS_PER_PROCESSOR,
    )
    rendered = strip_marks(render_template(spec.template, {f.name: getattr(context, f.name) for f in fields(context)}))
    return Source(
        text=rendered.text,
        mapped_text=with_line_directives(rendered, "kernel_templates"),
        includes=reached_headers(rendered.text),
        suffix=spec.target.suffix,
    )
