"""SamplingSpec: one sampling kernel to generate, its launch arguments, and its rendering."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING

from jitgen.abi import ArgField, pack_format, pointer
from jitgen.deep import goes_deep
from jitgen.ir_nodes import attr_bytes
from jitgen.program import Program
from jitgen.target import CompileTarget

if TYPE_CHECKING:
    from jitgen.render import Source

OPS = ("sample", "probs", "mask", "process", "verify")
TEMPLATES = {
    ("row", "cpu"): "sampling/row.cpp.jinja",
    ("row", "cuda"): "sampling/row.cu.jinja",
    ("verify", "cpu"): "sampling/verify.cpp.jinja",
    ("verify", "cuda"): "sampling/verify.cu.jinja",
}
# CTAs of a row by the length of its slice: 16k values are 64 kB of shared memory, which three CTAs of a multiprocessor can
# have at a time. The batch has no say, so a row's sums, and with them its token, do not depend on it.
TEAM_SLICE, MAX_TEAM = 8192, 8
CLUSTER_CAPABILITY = (9, 0)
MAX_TEXT = 300  # characters of a processor in a comment
NO_PROCESSOR = Program()
_COPIED = ("op", "dtype", "out_dtype", "from_probs", "has_top_k", "has_top_p", "has_min_p", "top_k_first")


def _pair(ctype: str, name: str, comment: str) -> tuple[ArgField, ArgField]:
    """A parameter given per row or, where the pointer is null, once for all rows."""
    is_float = ctype.endswith("float")
    number = ArgField("double" if is_float else "int64_t", f"{name}_value", format="d" if is_float else "q")
    return pointer(ctype, name, comment), number


ROW_ARGS: tuple[ArgField, ...] = (
    pointer("const void", "x", "[rows, vocab]: logits or probabilities"),
    pointer("void", "out", "[batch]: tokens, or [batch, vocab]: values"),
    pointer("unsigned char", "status", "[batch]: why a row has no token; may be null"),
    pointer("bool", "valid", "[batch]: whether a row has a token; may be null"),
    pointer("const int", "indices", "[batch]: row of x for each row of the output; null: the same"),
    *_pair("const float", "temperature", "[batch]"),
    *_pair("const int", "top_k", "[batch]"),
    *_pair("const float", "top_p", "[batch]"),
    *_pair("const float", "min_p", "[batch]"),
    *_pair("const int64_t", "seed", "[batch]"),
    *_pair("int64_t", "offset", "[batch]: first position of the stream"),
    ArgField("int64_t", "advance", "1: add kDrawsPerCall to the offsets"),
    ArgField("int64_t", "bad_token", "written where there is no token"),
    ArgField("int64_t", "out_is_wide", "1: tokens are int64, 0: int32"),
    ArgField("int64_t", "stream", "CUDA stream"),
    ArgField("int64_t", "num_threads", "CPU threads; 0: the OpenMP default"),
    ArgField("int64_t", "team", "slices of a row: how many CTAs may share it"),
    ArgField("int64_t", "batch"),
    ArgField("int64_t", "x_rows", "rows of x"),
    ArgField("int64_t", "vocab"),
    ArgField("int64_t", "x_stride", "elements between rows"),
    ArgField("int64_t", "out_stride"),
)

VERIFY_ARGS: tuple[ArgField, ...] = (
    pointer("const void", "draft_probs", "[batch, num_draft, vocab]; null: the draft is certain of its tokens"),
    pointer("const void", "target_probs", "[batch, num_draft + 1, vocab]: after the context, then after each draft token"),
    pointer("const int", "draft_ids", "[batch, num_draft]"),
    pointer("const int", "parents", "[batch, num_draft]: draft token before each, -1: the context; null: a chain"),
    pointer("int", "ids", "[batch, num_draft + 1]: tokens, then -1"),
    pointer("int", "path", "[batch, num_draft]: the accepted draft tokens by number, then -1"),
    pointer("int", "accepted", "[batch]: draft tokens that pass, each by itself"),
    pointer("int", "emitted", "[batch]: draft tokens among ids"),
    pointer("unsigned char", "status", "[batch]: why a row has no last token; may be null"),
    *_pair("const int64_t", "seed", "[batch]"),
    *_pair("int64_t", "offset", "[batch]: first position of the stream"),
    ArgField("int64_t", "advance", "1: add kDrawsPerCall to the offsets"),
    ArgField("int64_t", "stream", "CUDA stream"),
    ArgField("int64_t", "num_threads", "CPU threads; 0: the OpenMP default"),
    ArgField("int64_t", "team", "slices of a row: how many CTAs may share it"),
    ArgField("int64_t", "batch"),
    ArgField("int64_t", "vocab"),
    ArgField("int64_t", "num_draft"),
    ArgField("int64_t", "draft_stride_b", "elements"),
    ArgField("int64_t", "draft_stride_i"),
    ArgField("int64_t", "target_stride_b"),
    ArgField("int64_t", "target_stride_i"),
)


@dataclass(frozen=True)
class SamplingSpec:
    """One sampling kernel. Batch sizes, vocabularies and parameter values are not in here."""

    op: str  # 'sample': a token; 'probs': probabilities; 'mask': logits; 'process': processed logits; 'verify': speculation
    dtype: str
    target: CompileTarget
    out_dtype: str = ""  # of the values written; empty where tokens are
    from_probs: bool = False
    has_top_k: bool = False
    has_top_p: bool = False
    has_min_p: bool = False
    top_k_first: bool = False
    program: Program = NO_PROCESSOR

    @cached_property
    def digest(self) -> str:
        """Identity of the spec under one generator."""
        flags = (self.from_probs, self.has_top_k, self.has_top_p, self.has_min_p, self.top_k_first)
        return hashlib.sha256(attr_bytes((self.op, self.dtype, self.out_dtype, *flags, self.program.id))).hexdigest()[:32]

    @property
    def family(self) -> str:
        return f"sampling_{self.target.kind}"

    @property
    def label(self) -> str:
        """Short description for progress lines and logs."""
        filters = [name for name in ("top_k", "top_p", "min_p") if getattr(self, f"has_{name}")]
        source = "probs" if self.from_probs else "logits"
        return " ".join(["sampling", self.op, "of", self.dtype, source, *filters])

    @property
    def template(self) -> str:
        return TEMPLATES["verify" if self.op == "verify" else "row", self.target.kind]

    @cached_property
    def args(self) -> tuple[ArgField, ...]:
        """Fields of ``struct Args``, captures last."""
        from jitgen.runtime import capture_fields

        return (VERIFY_ARGS if self.op == "verify" else ROW_ARGS) + capture_fields(self.program)

    @property
    def pack_format(self) -> str:
        return pack_format(self.args)


def team_size(vocab: int, target: CompileTarget) -> int:
    """CTAs that share a row."""
    if target.kind == "cpu" or target.compute_capability < CLUSTER_CAPABILITY:
        return 1
    team = 1
    while team < MAX_TEAM and vocab > team * TEAM_SLICE:
        team *= 2
    return team


@dataclass(frozen=True)
class RowContext:
    """Everything a sampling template may name."""

    header_comment: str
    args_fields: tuple[ArgField, ...]
    processor_section: str
    op: str
    dtype: str
    out_dtype: str
    from_probs: bool
    has_processor: bool
    has_top_k: bool
    has_top_p: bool
    has_min_p: bool
    top_k_first: bool
    revisits: bool
    streams: bool
    threads: int
    blocks_per_processor: int
    groups_ahead: int


@goes_deep
def render_sampling(spec: SamplingSpec) -> Source:
    """Generate the translation unit of ``spec``."""
    from jitgen.linemap import strip_marks, with_line_directives
    from jitgen.render import Source, reached_headers, render_template
    from jitgen.sampling_hooks import emit_processors

    section = emit_processors(spec.program)
    processors = render_template("sampling/processor.h.jinja", {f.name: getattr(section, f.name) for f in fields(section)})
    context = row_context(spec, section.args, processors.rstrip("\n"))
    rendered = strip_marks(render_template(spec.template, {f.name: getattr(context, f.name) for f in fields(context)}))
    return Source(
        text=rendered.text,
        mapped_text=with_line_directives(rendered, "kernel_templates"),
        includes=reached_headers(rendered.text),
        suffix=spec.target.suffix,
    )


def _has_filters(spec: SamplingSpec) -> bool:
    return spec.has_top_k or spec.has_top_p or spec.has_min_p


def _revisits(spec: SamplingSpec) -> bool:
    """Whether the row is kept on chip for further passes."""
    return _has_filters(spec) or spec.op in ("probs", "mask")


def _shape(spec: SamplingSpec) -> tuple[int, int]:
    """Threads of a CTA, and CTAs that shall fit a multiprocessor, which decides how many registers they may use.

    CTAs that filter a row wait for each other and for memory: three small ones hide more of it than two large ones. On an H100,
    512 rows of 128,256: top-p 162 us in place of 186, renormalisation 757 in place of 1219; a softmax gains nothing. Without
    clusters a CTA that holds its row takes all of the shared memory, so it may have all of the registers too.
    """
    has_clusters = spec.target.kind == "cuda" and spec.target.compute_capability >= CLUSTER_CAPABILITY
    if spec.op == "verify" or (_revisits(spec) and not has_clusters):
        return 512, 1
    if _has_filters(spec):
        return 256, 3
    return 512, 4 if _is_thin_stream(spec) else 2


def _groups_ahead(spec: SamplingSpec) -> int:
    """Loads that a thread has in flight: as many as leave registers for what is computed of them."""
    if spec.program.score is not None or _is_thin_stream(spec):
        return 1
    if spec.op == "verify":
        return 2
    return 8 if spec.dtype == "float32" and _has_filters(spec) else 4


def _is_thin_stream(spec: SamplingSpec) -> bool:
    """Float32 rows that pass through once: with four CTAs a multiprocessor one load of each thread is enough in flight. On an
    H100 128 and 512 rows of 128,256 take 32.5 and 95 us (with two loads 34.5 and 98; two CTAs with four loads 31.7 and 109),
    where reading them takes torch 29 and 92. Of bfloat16, two CTAs: 17.8 and 54 us, reading 18.6 and 50."""
    return spec.op == "sample" and spec.dtype == "float32" and spec.program.score is None and not _has_filters(spec)


def row_context(spec: SamplingSpec, captures: tuple[ArgField, ...], processors: str) -> RowContext:
    """Template context of a spec."""
    from jitgen import __version__
    from jitgen.ir_text import to_text

    lines = [f"generated by jitgen {__version__} from {spec.template}: do not edit", spec.label]
    if spec.program.score is not None:
        text = to_text(spec.program.score, [s.name for s in spec.program.slots], 2 * MAX_TEXT)
        for of_attention, here in (("score", "logit"), ("kv_idx", "token"), ("q_idx", "row")):
            text = re.sub(rf"\b{of_attention}\b", here, text)
        lines.append(f"logit = {text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + '...'}")
    threads, blocks_per_processor = _shape(spec)
    own = VERIFY_ARGS if spec.op == "verify" else ROW_ARGS
    return RowContext(
        header_comment="\n".join(f"// {line}" for line in lines),
        args_fields=own + captures,
        processor_section=processors,
        has_processor=spec.program.score is not None,
        revisits=_revisits(spec),
        streams=spec.op == "sample" and not _revisits(spec),
        threads=threads,
        blocks_per_processor=blocks_per_processor,
        groups_ahead=_groups_ahead(spec),
        **{name: getattr(spec, name) for name in _COPIED},
    )
