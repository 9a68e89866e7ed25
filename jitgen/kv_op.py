"""The operators that torch.compile sees in place of jitgen.append and jitgen.rope.

A graph holds tensors and numbers. The transform of an append is taken apart while Dynamo traces, as hooks of attention are
(op.py): what it captures becomes an input of the operator, and the graph holds the number of its recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo.comptime import comptime

from jitgen.kv_append import append
from jitgen.kv_hooks import resolve_transform
from jitgen.lifted import CAN_LIFT, lift_here, made, register
from jitgen.recipes import constant

if TYPE_CHECKING:
    from jitgen.serving_lists import PageTable

Tensor = torch.Tensor
REMEDY = (
    "jitgen cannot take the transform of this append apart while torch.compile traces it, and leaves the graph. Without "
    "fullgraph=True that is a graph break and no error; with it, make the transform a plain function, a partial or a method "
    "that captures tensors, numbers, modules and containers of these"
)
# The call between two graphs, as Dynamo would look into every function of it
append_outside = torch.compiler.disable(append, reason=REMEDY)


def lift_transform(context: Any) -> None:
    """Dynamo runs this where it meets the call: the handle and the inputs for the transform go to the local list ``found``."""
    lift_here(context, ("transform",), lambda examples: resolve_transform(examples["transform"])[0], register)


# ---- append -----------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("jitgen::append", mutates_args=("k_cache", "v_cache", "k_scale", "v_scale"))
def append_op(
    k_cache: Tensor,
    v_cache: Tensor | None,
    k: Tensor,
    v: Tensor,
    pages: Tensor | None,
    list_indptr: Tensor | None,
    indices: Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    ints: Sequence[int],
    handle: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    factors: Sequence[float],
    kv_layout: str,
) -> None:
    """A call of jitgen.append. v_cache is None where k_cache is the whole cache; indices: positions, batch_indices, q_indptr,
    kv_len, slot_mapping; tensors and ints: what the transform captures; factors: scales that are numbers, none without
    scales."""
    positions, batch_indices, q_indptr, kv_len, slot_mapping = indices
    table = pages if list_indptr is None else (list_indptr, pages)
    scales = None
    if factors:
        scales = (factors[0] if k_scale is None else k_scale, factors[1] if v_scale is None else v_scale)
    append(
        k_cache if v_cache is None else (k_cache, v_cache), k, v, table, positions, batch_indices,
        q_indptr=q_indptr, kv_len=kv_len, slot_mapping=slot_mapping, scales=scales, kv_layout=kv_layout,
        **made(handle, tensors, ints),
    )  # fmt: skip


@append_op.register_fake
def _(*args: Any) -> None:
    return None


def call_append(
    kv: Tensor | tuple[Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    page_table: PageTable | Tensor | tuple[Tensor, Tensor] | None,
    indices: list[Tensor | None],
    transform: object,
    scales: tuple[Any, Any] | None,
    kv_layout: str,
) -> None:
    """The operator as traced code calls it."""
    k_cache, v_cache = (kv, None) if isinstance(kv, Tensor) else kv
    if page_table is None or isinstance(page_table, Tensor):
        pages, indptr = page_table, None
    elif isinstance(page_table, tuple):
        indptr, pages = page_table
    else:
        pages, indptr = page_table.pages, page_table.indptr
    given = scales or (None, None)
    tensors = [s if isinstance(s, Tensor) else None for s in given]
    factors = [] if scales is None else [1.0 if s is None or isinstance(s, Tensor) else float(s) for s in scales]
    found: list[Any] = [] if CAN_LIFT else [-1]
    if CAN_LIFT:
        comptime(lift_transform)
    if not found:  # traced by running, as torch.export may: the transform stays as it is
        found = [register({"transform": constant(transform)}), [], []]
    if found[0] < 0:
        positions, batch_indices, q_indptr, kv_len, slot_mapping = indices
        append_outside(
            kv, k, v, page_table, positions, batch_indices, q_indptr=q_indptr, kv_len=kv_len, slot_mapping=slot_mapping,
            transform=transform, scales=scales, kv_layout=kv_layout,  # type: ignore[arg-type]
        )  # fmt: skip
        return
    handle, captured, ints = found
    append_op(k_cache, v_cache, k, v, pages, indptr, indices, captured, ints, handle, *tensors, factors, kv_layout)


# ---- rope -------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("jitgen::rope", mutates_args=())
def rope_op(
    q: Tensor,
    k: Tensor | None,
    where: Sequence[Tensor],
    theta: float,
    scale: float,
    rotary_dim: int | None,
    interleave: bool,
    llama31: Sequence[float],
    cos_sin: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A call of jitgen.rope; the second result is empty without k. where: positions, or q_indptr and first positions."""
    out, k_out = _run_rope(q, k, where, theta, scale, rotary_dim, interleave, llama31, cos_sin, None)
    return out, q.new_empty(0) if k_out is None else k_out


@rope_op.register_fake
def _(q: Tensor, k: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(0) if k is None else k.new_empty(k.shape)


@torch.library.custom_op("jitgen::rope_out", mutates_args=("q_out", "k_out"))
def rope_out_op(
    q: Tensor,
    k: Tensor | None,
    q_out: Tensor,
    k_out: Tensor | None,
    where: Sequence[Tensor],
    theta: float,
    scale: float,
    rotary_dim: int | None,
    interleave: bool,
    llama31: Sequence[float],
    cos_sin: Tensor | None,
) -> None:
    """The same, into tensors that there are."""
    _run_rope(q, k, where, theta, scale, rotary_dim, interleave, llama31, cos_sin, (q_out, k_out))


@rope_out_op.register_fake
def _(*args: Any) -> None:
    return None


def _run_rope(
    q: Tensor,
    k: Tensor | None,
    where: Sequence[Tensor],
    theta: float,
    scale: float,
    rotary_dim: int | None,
    interleave: bool,
    llama31: Sequence[float],
    cos_sin: Tensor | None,
    out: tuple[Tensor, Tensor | None] | None,
) -> tuple[Tensor, Tensor | None]:
    from jitgen.rotary import rope

    low, high, length = llama31 or (0.0, 0.0, 0.0)
    positions = where[0] if len(where) == 1 else (where[0], where[1])
    return rope(
        q, k, positions, theta=theta, scale=scale, rotary_dim=rotary_dim, interleave=interleave,
        llama31=(low, high, int(length)) if llama31 else None, cos_sin=cos_sin, out=out,
    )  # fmt: skip


def call_rope(
    q: Tensor,
    k: Tensor | None,
    positions: Tensor | tuple[Tensor, Tensor],
    options: tuple[Any, ...],
    cos_sin: Tensor | None,
    out: tuple[Tensor, Tensor | None] | None,
) -> tuple[Tensor, Tensor | None]:
    """The operator as traced code calls it. ``options``: theta, scale, rotary_dim, interleave, llama31."""
    where = [positions] if isinstance(positions, Tensor) else list(positions)
    theta, scale, rotary_dim, interleave, llama31 = options
    numbers = float(theta), float(scale), rotary_dim, interleave, [float(x) for x in llama31 or ()]
    if out is not None:
        rope_out_op(q, k, *out, where, *numbers, cos_sin)
        return out
    q_out, k_out = rope_op(q, k, where, *numbers, cos_sin)
    return q_out, None if k is None else k_out
