"""Validation of the inputs of jitgen.append: every error names the argument, what was expected and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from jitgen.checks import check_memory, dtype_name, first_of
from jitgen.errors import InvalidType, ShapeMismatch, UnsupportedDevice, UnsupportedDtype, VariantError
from jitgen.ir import walk
from jitgen.kv_hooks import TransformTrace
from jitgen.kv_spec import BYTES, FLOATS
from jitgen.kv_tokens import Tokens
from jitgen.layouts import check_own_rows
from jitgen.program import RowProgram, Slot, too_short
from jitgen.serving_lists import check_indices
from jitgen.serving_pages import KV_LAYOUTS

Tensor = torch.Tensor
CACHE_FORMS = (
    "a pair of [pages, page_size, num_kv_heads, head_dim], one [pages, 2, page_size, num_kv_heads, head_dim], or without the "
    "axis of heads a pair of [pages, page_size, head_dim]"
)


def caches_of(kv: object, kv_layout: str) -> tuple[Tensor, Tensor]:
    """K and V of a cache as [pages, page_size, num_kv_heads, head_dim]."""
    if not isinstance(kv_layout, str) or kv_layout not in KV_LAYOUTS:
        raise ShapeMismatch(f"kv_layout={kv_layout!r} is not a layout. Use 'NHD' or 'HND'.")
    if isinstance(kv, Tensor):
        if kv.dim() != 5 or kv.shape[1] != 2:
            raise ShapeMismatch(f"the kv cache has shape {tuple(kv.shape)}, expected {CACHE_FORMS}.")
        pair: Sequence[Tensor] = kv.unbind(1)
    elif isinstance(kv, tuple | list) and len(kv) == 2 and all(isinstance(t, Tensor) for t in kv):
        pair = kv
    else:
        raise InvalidType(f"the kv cache is a {type(kv).__name__}, expected {CACHE_FORMS}.")
    found = []
    for name, t in zip("kv", pair, strict=True):
        if t.dim() not in (3, 4):
            raise ShapeMismatch(f"the {name} cache has shape {tuple(t.shape)}, expected {CACHE_FORMS}.")
        found.append(t.unsqueeze(2) if t.dim() == 3 else t.transpose(1, 2) if kv_layout == "HND" else t)
    return found[0], found[1]


def check_cache(name: str, x: Tensor, cache: Tensor, k: Tensor) -> None:
    """Rows fit the cache; ``k``: the rows of k, of which those of v must be as many."""
    if x.shape[0] != k.shape[0]:
        raise ShapeMismatch(f"v has {x.shape[0]} tokens, k has {k.shape[0]} (axis 0). Both must match.")
    if tuple(x.shape[1:]) != tuple(cache.shape[2:]):
        raise ShapeMismatch(
            f"{name} has {x.shape[1]} heads of {x.shape[2]}, the {name} cache has {cache.shape[2]} of {cache.shape[3]}. "
            "Both must match; see kv_layout."
        )
    if dtype_name(cache.dtype) not in (*FLOATS, *BYTES):
        allowed = ", ".join((*FLOATS, *BYTES))
        raise UnsupportedDtype(f"the {name} cache has dtype {dtype_name(cache.dtype)}, expected one of {allowed}.")
    for what, t in ((name, x), (f"the {name} cache", cache)):
        if t.device != k.device:
            raise UnsupportedDevice(f"{what} is on {t.device}, k is on {k.device}. All must be on one device.")
    check_memory(**{f"the {name} cache": cache})
    check_own_rows(cache, f"the {name} cache")
    if cache.stride(3) != 1 and cache.shape[3] > 1:
        raise ShapeMismatch(f"the {name} cache has strides {cache.stride()}, expected unit stride along the head dim.")


def check_bounds(name: str, q_indptr: Tensor, count: int) -> None:
    """On the CPU: the bounds of requests are rows of ``name``, which has ``count``. To be asked in every call, as the device
    finds the request of a row by halves and could not tell."""
    check_indices("q_indptr", q_indptr, 1)
    bounds = q_indptr.tolist() if q_indptr.device.type == "cpu" else []
    if bounds and (bounds[0] < 0 or bounds[-1] > count or any(b < a for a, b in pairwise(bounds))):
        raise ShapeMismatch(
            f"q_indptr is {first_of(q_indptr)}, expected numbers that never fall, from 0 to at most {count}, the rows of "
            f"{name}."
        )


def check_reads(trace: TransformTrace, tokens: Tokens) -> None:
    """What the transform reads of tokens is known."""
    turns = trace.k.rope is not None or trace.v.rope is not None
    if (trace.reads_position or turns) and tokens.positions is None and tokens.q_indptr is None:
        raise VariantError("the transform uses pos, and with slot_mapping positions are not known. Give positions=.")
    if trace.reads_request and tokens.batch_indices is None and tokens.q_indptr is None:
        raise VariantError("the transform uses b, and with slot_mapping requests are not known. Give batch_indices=.")


def check_captures(trace: TransformTrace, values: Sequence[object], rows: tuple[Tensor, Tensor]) -> None:
    """Captured tensors are on the device of the rows and reach as far as heads and elements are indexed."""
    check_row_captures(trace.slots, values, list(zip((trace.k, trace.v), rows, strict=True)))


def check_row_captures(slots: Sequence[Slot], values: Sequence[object], rows: Sequence[tuple[RowProgram, Tensor]]) -> None:
    """The same for any transforms, each with rows [..., heads, head_dim] that it is for."""
    used = {int(str(n.attr)) for p, _ in rows for n in walk(*p.roots()) if n.op == "load"}
    device = rows[0][1].device
    for i, (slot, value) in enumerate(zip(slots, values, strict=True)):
        if i in used and value.device != device:  # type: ignore[attr-defined]
            raise UnsupportedDevice(
                f"captured tensor '{slot.name}' is on {value.device}, the rows are on {device}. "  # type: ignore[attr-defined]
                f"Move it with {slot.name}.to({str(device)!r})."
            )
    for program, x in rows:
        least = {"kv_h": x.shape[-2], "d": x.shape[-1], "any": 1}
        for i, dim, index in _direct_indices(program):
            _check_reach(slots[i], values[i], dim, index, least[index])  # type: ignore[arg-type]


def _direct_indices(program: RowProgram) -> set[tuple[int, int, str]]:
    """(slot, dimension, index) of what is read: at exactly kv_h or d, without a clamp; or at 'any', with one."""
    return {
        (int(str(n.attr)), dim, str(index.attr) if index.op == "index" and index.attr in ("kv_h", "d") else "any")
        for n in walk(program.before, program.position, program.after)
        if n.op == "load"
        for dim, index in enumerate(n.args)
    }


def _check_reach(slot: Slot, value: Tensor, dim: int, index: str, least: int) -> None:
    if value.shape[dim] < least and index == "any":
        raise too_short(slot.name, dim, 0, index, least)
    if value.shape[dim] < least:
        over = f"over {least} heads" if index == "kv_h" else f"along a row of {least} elements"
        raise ShapeMismatch(
            f"captured tensor '{slot.name}' has size {value.shape[dim]} along axis {dim}, which runs {over}. Give it {least} "
            "entries."
        )
