"""Tile classes of a mask: which tiles kernels skip, visit with the mask, or visit without it.

The classes come from the generated interval code itself (``mask_span`` and ``mask_tile`` of the variant section),
compiled for the CPU in a module of its own, so they are those that a kernel with these tiles finds, on any device.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from jitgen.abi import ArgField, pack_format
from jitgen.deep import goes_deep
from jitgen.errors import ShapeMismatch
from jitgen.ir import TRUE
from jitgen.program import Program, direct_indices, too_short
from jitgen.render import Source
from jitgen.runtime import capture_fields, capture_words
from jitgen.target import CompileTarget, detect_cpu

TILE_NONE, TILE_PARTIAL, TILE_FULL = 0, 1, 2  # kTileNone, kTilePartial, kTileFull
CLASS_NAMES = ("none", "partial", "full")
FAMILY = "mask_tiles"
TEMPLATE = "attention/mask_tiles.cpp.jinja"
MAX_TEXT = 300  # characters of the mask in a comment

MASK_ARGS: tuple[ArgField, ...] = (
    ArgField("uint8_t*", "kinds", "[num_q_heads, q_tiles, kv_tiles]", "P"),
    *(ArgField("int64_t", name) for name in ("tile_q", "tile_kv")),
    *(ArgField("int64_t", name) for name in ("b", "num_q_heads", "num_kv_heads", "q_len", "kv_len")),
    ArgField("int64_t", "q_offset", "q_idx of row 0"),
    ArgField("double", "scale", "multiplies q . k", "d"),
)


@dataclass(frozen=True)
class MaskTilesContext:
    """Everything that mask_tiles.cpp.jinja names."""

    header_comment: str
    args_fields: tuple[ArgField, ...]
    variant_section: str


def classify(
    program: Program,
    values: Sequence[Any],
    *,
    q_len: int,
    kv_len: int,
    tile_q: int,
    tile_kv: int,
    num_q_heads: int = 1,
    num_kv_heads: int | None = None,
    b: int = 0,
    q_offset: int = 0,
    scale: float = 1.0,
) -> torch.Tensor:
    """Class of every tile of one request: TILE_NONE, TILE_PARTIAL or TILE_FULL.

    Only the mask of ``program`` matters; without one every tile is full. ``values`` are its captures, on any device.

    Shapes:  returns uint8 [num_q_heads, ceil(q_len / tile_q), ceil(kv_len / tile_kv)].
    Units:   q_offset is the q_idx of row 0: kv_len - q_len for jitgen.attention, 0 for jitgen.flex_attention.
    Errors:  ShapeMismatch; CompileError, ToolchainMissing, KernelNotPrebuilt on the first use of a mask.
    Cost:    compiles one small module per mask; then microseconds, more where tensors are looked through.
    """
    heads = num_kv_heads or num_q_heads
    shape = (num_q_heads, -(-q_len // tile_q), -(-kv_len // tile_kv))
    if program.mask is None or program.mask is TRUE:
        return torch.full(shape, TILE_FULL, dtype=torch.uint8, device="cpu")
    kinds = torch.empty(shape, dtype=torch.uint8, device="cpu")
    program = Program(mask=program.mask, slots=program.slots)
    sizes = {"b": b + 1, "h": num_q_heads, "kv_h": heads, "q_idx": q_offset + q_len, "kv_idx": kv_len, "any": 1}
    check_sizes(program, values, sizes)
    on_cpu = [host_copy(v) if isinstance(v, torch.Tensor) else v for v in values]
    pack = struct.Struct(pack_format(MASK_ARGS + capture_fields(program))).pack
    numbers = (tile_q, tile_kv, b, num_q_heads, heads, q_len, kv_len, q_offset, float(scale))
    library(program).jitgen_mask_tiles(pack(kinds.data_ptr(), *numbers, *capture_words(program, on_cpu)))
    return kinds


def check_sizes(program: Program, values: Sequence[Any], sizes: dict[str, int]) -> None:
    """Generated code does not clamp a plain position, so tensors must be as long as positions reach."""
    for slot, dim, name in direct_indices(program):
        size = values[slot].shape[dim]
        if size == 0:
            raise too_short(program.slots[slot].name, dim, size, "any", 1)
        if size < sizes[name]:
            raise ShapeMismatch(
                f"captured tensor '{program.slots[slot].name}' has size {size} along axis {dim}, which {name} indexes "
                f"up to {sizes[name] - 1}. Choose lengths and heads that it was made for."
            )


def host_copy(t: torch.Tensor) -> torch.Tensor:
    """A tensor in this machine's memory with the same strides: the generated code relies on them."""
    if t.device.type == "cpu":
        return t
    reach = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return t.as_strided((reach,), (1,)).cpu().as_strided(t.shape, t.stride())


_libraries: dict[str, ctypes.CDLL] = {}


def library(program: Program) -> ctypes.CDLL:
    """The compiled module of a program that has only a mask."""
    found = _libraries.get(program.id)
    if found is None:
        found = _libraries[program.id] = ctypes.CDLL(str(module_path(program, detect_cpu())))
        found.jitgen_mask_tiles.argtypes = [ctypes.c_char_p]
        found.jitgen_mask_tiles.restype = None
    return found


def module_path(program: Program, target: CompileTarget) -> Path:
    """Path of the shared library of a program that has only a mask, which is built when no layer has it."""
    from jitgen.build import get_module

    digest = hashlib.sha256(f"{FAMILY}:{program.id}".encode()).hexdigest()[:32]
    label = "tile classes of a mask"
    return get_module(digest, FAMILY, label, lambda: render_mask_tiles(program), target, call=(module_path, program, target))


def mask_tiles_context(program: Program) -> MaskTilesContext:
    """Template context for a program that has only a mask."""
    from jitgen import __version__
    from jitgen.emit import emit_variant
    from jitgen.emit_section import section_context
    from jitgen.ir_text import to_text
    from jitgen.render import render_template

    section = emit_variant(program, backend="cpu")
    text = "true" if program.mask is None else to_text(program.mask, [s.name for s in program.slots], MAX_TEXT)
    title = f"// generated by jitgen {__version__} from {TEMPLATE}: do not edit\n"
    return MaskTilesContext(
        header_comment=f"{title}// mask = {text}",
        args_fields=MASK_ARGS + section.args,
        variant_section=render_template("attention/variant.h.jinja", section_context(section)).rstrip("\n"),
    )


@goes_deep
def render_mask_tiles(program: Program) -> Source:
    """Generate the translation unit of a program that has only a mask."""
    from jitgen.linemap import strip_marks, with_line_directives
    from jitgen.render import reached_headers, render_template

    context = mask_tiles_context(program)
    rendered = strip_marks(render_template(TEMPLATE, {f.name: getattr(context, f.name) for f in fields(context)}))
    mapped = with_line_directives(rendered, "kernel_templates")
    return Source(rendered.text, mapped, reached_headers(rendered.text), ".cpp")
