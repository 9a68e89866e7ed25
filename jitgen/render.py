"""Rendering: a KernelSpec becomes source text. The one Jinja environment of the project lives here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jitgen.abi import ArgField
from jitgen.deep import goes_deep
from jitgen.emit import emit_variant
from jitgen.emit_early import early_parts
from jitgen.emit_section import CopiedText, VariantSection, VariantTraits, section_context
from jitgen.linemap import LineMarks, Rendered, strip_marks, with_line_directives
from jitgen.paths import template_dir
from jitgen.program import Program
from jitgen.spec import MLA_FAMILIES, KernelSpec
from jitgen.target import CompileTarget
from jitgen.tiles_fp8 import fp8_early_parts
from jitgen.tiles_sm90 import adds_terms_by_product, has_room

TEMPLATE_OF_FAMILY = {
    "cpu": "attention/cpu.cpp.jinja",
    "sm80": "attention/sm80.cu.jinja",
    "sm90": "attention/sm90.cu.jinja",
    "sm90_wide": "attention/sm80.cu.jinja",
    "sm90_fp8": "attention/sm90_fp8.cu.jinja",
    "decode": "attention/decode.cu.jinja",
    "mla": "attention/mla.cu.jinja",
    "mla_decode": "attention/mla_decode.cu.jinja",
    "sm80_mla": "attention/sm80_mla.cu.jinja",
}
SERVING_TEMPLATE_OF_FAMILY = {  # layouts other than dense
    **TEMPLATE_OF_FAMILY,
    "cpu": "attention/cpu_serving.cpp.jinja",
    "sm80": "attention/sm80_serving.cu.jinja",
    "sm90_wide": "attention/sm80_serving.cu.jinja",
    "sm90": "attention/sm90_serving.cu.jinja",
    "merge": "attention/merge.cu.jinja",
    "merge_cpu": "attention/merge.cpp.jinja",
    "merge_outs": "attention/merge_outs.cu.jinja",
}
# Their templates take part of the scaling out of the element loop.
RAW_SCORE_FAMILIES = ("sm80", "sm90", "sm90_wide", "sm90_fp8", "decode", "mla", "mla_decode", "sm80_mla")
MAX_TEXT = 300  # characters of a hook in a comment
_INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """One translation unit: what is hashed, what is compiled, and the headers it reaches."""

    text: str
    mapped_text: str  # text with #line directives that point into the templates
    includes: Mapping[str, str]  # relative path -> content, transitively
    suffix: str  # '.cpp' or '.cu'


@dataclass(frozen=True, kw_only=True)
class KernelContext(VariantTraits):
    """Everything a kernel template may name."""

    header_comment: str
    args_fields: tuple[ArgField, ...]
    variant_section: str
    rows_section: str  # transforms of K and V inside of the kernel
    transforms_keys: bool
    transforms_values: bool
    layout: str  # 'dense', 'ragged' or 'paged'
    has_states: bool  # results are parts of rows, in float, to be merged
    head_dim: int
    head_dim_v: int
    dtype: str
    kv_dtype: str  # of K and V where they are stored in 8 bits; empty: dtype
    out_dtype: str
    cuda_arch: int  # 90 for sm_90a; 0 on the CPU
    products: str  # how a CPU kernel multiplies: 'vector' or 'amx', of include/jitgen/cpu_*.h
    tile_q: int
    tile_kv: int
    num_warps: int
    num_stages: int
    by_rows: bool  # K and V of a paged sm90 kernel come by loads, from pages of any size
    by_groups: bool  # the products of an sm80 template are those of whole warp groups: of the sm90_wide family
    pairs_groups: bool  # two CTAs take the same keys, each for a head group of its own
    reads_lse: bool  # a hook does
    terms_by_product: bool  # where initial_by_column: column_terms.cuh
    packing: str  # log2 of the heads that share a row of a query tile, as an expression of group_size
    copied: CopiedText  # of the captured tensor where initial_by_tile


def print_value(value: object) -> str:
    """What ``{{ }}`` may print: text, integers and booleans; anything else is a mistake of the Python side."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, StrictUndefined):
        return str(value)  # raises, naming the missing variable
    raise TypeError(f"cannot print {value!r} ({type(value).__name__}) into source text: convert it in render.py")


@cache
def environment() -> Environment:
    """The project's template environment; every variable must exist and every tag stands alone on its line."""
    return Environment(
        loader=FileSystemLoader(template_dir()),
        extensions=[LineMarks],
        undefined=StrictUndefined,
        finalize=print_value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
        optimized=False,  # it looks for constants, and takes a fifth of the time that a template takes to load
    )


def _fields_of(context: object) -> dict[str, object]:
    return {f.name: getattr(context, f.name) for f in fields(context)}  # type: ignore[arg-type]


def render_template(name: str, context: Mapping[str, object]) -> str:
    """Rendered text, still with line marks."""
    return environment().get_template(name).render(**context)


def template_of(spec: KernelSpec) -> str:
    """Name of the template that generates ``spec``."""
    return (TEMPLATE_OF_FAMILY if spec.layout == "dense" else SERVING_TEMPLATE_OF_FAMILY)[spec.family]


@goes_deep
def render_kernel(spec: KernelSpec) -> Source:
    """Generate the translation unit of ``spec``."""
    backend = spec.target.kind
    section = _section_of(spec)
    variant_text = render_template("attention/variant.h.jinja", section_context(section, spec.layout))
    context = kernel_context(spec, section, variant_text.rstrip("\n"))
    rendered = strip_marks(render_template(template_of(spec), _fields_of(context)))
    return Source(
        text=rendered.text,
        mapped_text=_mapped(rendered),
        includes=reached_headers(rendered.text),
        suffix=".cpp" if backend == "cpu" else ".cu",
    )


def _section_of(spec: KernelSpec) -> VariantSection:
    """The variant section, without what of a score the shared memory of an sm90 kernel has no room for."""
    early, raw = _early_of(spec), spec.family in RAW_SCORE_FAMILIES
    section = emit_variant(spec.program, backend=spec.target.kind, raw_scores=raw, early=early)
    if spec.family != "sm90" or spec.layout != "dense" or has_room(spec.tiles, spec.head_dim, spec.head_dim_v, section):
        return section
    return emit_variant(spec.program, backend=spec.target.kind, raw_scores=raw, early=early - {"initial"})


def _early_of(spec: KernelSpec) -> frozenset[str]:
    """What the template of a kernel does early: see emit_variant."""
    if spec.family == "sm90":
        parts = early_parts(spec.program, spec.layout, spec.head_dim_v)
        # masks by bits gain where a thread has 32 columns of a tile: 1 to 5 % slower with half of them
        parts = parts if spec.tiles.tile_kv > 64 else parts - {"bits", "positions"}
        return parts if spec.copies else parts - {"tile"}
    if spec.family == "decode":
        return frozenset({"prefetch"})
    if spec.family == "sm90_fp8":
        return fp8_early_parts(spec.program, spec.head_dim)
    if spec.family in ("sm80", "sm90_wide"):
        return frozenset({"offset", "positions"} if spec.layout == "dense" else {"offset"})
    return frozenset()


def _mapped(rendered: Rendered) -> str:
    return with_line_directives(rendered, "kernel_templates")


def kernel_context(spec: KernelSpec, section: VariantSection, variant_text: str) -> KernelContext:
    """Template context of a spec."""
    traits = {f.name: getattr(section, f.name) for f in fields(VariantTraits)}
    return KernelContext(
        header_comment=_header_comment(spec),
        args_fields=spec.own_args + section.args,
        variant_section=variant_text,
        rows_section="" if spec.rows is None else spec.rows.section(spec.program.slots, spec.target),
        transforms_keys=spec.rows is not None and "k" in spec.rows.names,
        transforms_values=spec.rows is not None and "v" in spec.rows.names,
        copied=section.copied,
        layout=spec.layout.removesuffix("_states"),
        has_states=spec.layout.endswith("_states"),
        head_dim=spec.head_dim,
        head_dim_v=spec.head_dim_v,
        dtype=spec.dtype,
        kv_dtype=spec.kv_dtype,
        out_dtype=spec.out_dtype or spec.dtype,
        cuda_arch=_cuda_arch(spec.target),
        products="amx" if uses_amx(spec) else "vector",
        tile_q=spec.tiles.tile_q,
        tile_kv=spec.tiles.tile_kv,
        num_warps=spec.tiles.num_warps,
        num_stages=spec.tiles.num_stages,
        by_rows=spec.family == "sm90" and spec.layout.startswith("paged") and not spec.copies,
        by_groups=spec.family == "sm90_wide",
        pairs_groups=spec.family in MLA_FAMILIES,
        reads_lse=_reads_lse(spec.program),
        terms_by_product=adds_terms_by_product(section, spec.head_dim),
        packing=f"jg::packing_shift(group_size{_most_packing(spec)})",
        **traits,
    )


def _most_packing(spec: KernelSpec) -> str:
    """Argument that says how many heads a packed row may have: in latent attention as many as the tile has rows."""
    return f", {spec.tiles.tile_q.bit_length() - 1}" if spec.family in MLA_FAMILIES else ""


def _reads_lse(program: Program) -> bool:
    return program.lse is not None or (program.output is not None and "lse" in program.output.deps)


def uses_amx(spec: KernelSpec) -> bool:
    """Whether a CPU kernel multiplies in the tile registers of AMX: bfloat16, and keys of that type once they are packed."""
    is_packed = not spec.kv_dtype or spec.layout == "dense"
    return spec.family == "cpu" and spec.target.isa == "amx" and spec.dtype == "bfloat16" and is_packed


def _cuda_arch(target: CompileTarget) -> int:
    if target.kind != "cuda":
        return 0
    major, minor = target.compute_capability
    return 10 * major + minor


def _header_comment(spec: KernelSpec) -> str:
    from jitgen import __version__
    from jitgen.ir_text import to_text

    names = [s.name for s in spec.program.slots]
    lines = [f"generated by jitgen {__version__} from {template_of(spec)}: do not edit", f"{spec.label}"]
    for hook in ("score", "mask", "sink", "output", "lse"):
        root = getattr(spec.program, hook)
        if root is not None:
            lines.append(f"{hook} = {to_text(root, names, MAX_TEXT)}")
    return "\n".join(f"// {line}" for line in lines)


def reached_headers(text: str) -> dict[str, str]:
    """Our own headers that ``text`` includes, directly or through others, by their path below include/."""
    found: dict[str, str] = {}
    pending = list(_INCLUDE.findall(text))
    while pending:
        name = pending.pop()
        if name in found:
            continue
        content = _header_text(name)
        found[name] = content
        pending.extend(_INCLUDE.findall(content))
    return dict(sorted(found.items()))


@cache
def _header_text(name: str) -> str:
    return (template_dir() / "include" / name).read_text("utf-8")
