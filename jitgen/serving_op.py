"""The operators that torch.compile sees in place of the serving calls.

A graph holds the tensors and the handle of the plan. Lengths, captured values and the kernels come from the plan when the
operator runs, so a graph compiled once serves every step: ``plan.update`` stays outside of it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from jitgen.serving_lists import PageTable
    from jitgen.serving_plan import Plan
    from jitgen.serving_scales import Scale

Tensor = torch.Tensor
_plans: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register_plan(plan: Plan) -> int:
    """Handle of a plan for as long as it lives."""
    handle = next(_numbers)
    _plans[handle] = plan
    return handle


@torch.library.custom_op("jitgen::paged_attention", mutates_args=())
def paged_op(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    pages: Tensor,
    indptr: Tensor | None,
    handle: int,
    head_dim_v: int,
    scale: float | None,
    kv_layout: str,
    want_lse: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    factors: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """A paged call. v is None where k is the whole cache; the second result is empty unless want_lse; factors are the scales
    that are numbers, if any are."""
    from jitgen.serving import paged_attention

    plan = _plans[handle]
    table = plan.lists or (pages if indptr is None else (indptr, pages))
    cache = k if v is None else (k, v)
    scales = _scales(k_scale, v_scale, factors)
    found = paged_attention(q, cache, table, plan, scale=scale, kv_layout=kv_layout, return_lse=want_lse, **scales)
    return found if want_lse else (found, q.new_empty(0, dtype=torch.float32))  # type: ignore[return-value]


@torch.library.custom_op("jitgen::ragged_attention", mutates_args=())
def ragged_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    handle: int,
    head_dim_v: int,
    scale: float | None,
    want_lse: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    factors: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """A ragged call. The second result is empty unless want_lse; for factors see paged_op."""
    from jitgen.serving import ragged_attention

    scales = _scales(k_scale, v_scale, factors)
    found = ragged_attention(q, k, v, _plans[handle], scale=scale, return_lse=want_lse, **scales)
    return found if want_lse else (found, q.new_empty(0, dtype=torch.float32))  # type: ignore[return-value]


def _scales(k_scale: Tensor | None, v_scale: Tensor | None, factors: Sequence[float]) -> dict[str, Any]:
    """Keyword arguments of a call."""
    k, v = factors or (None, None)
    return {"k_scale": k if k_scale is None else k_scale, "v_scale": v if v_scale is None else v_scale}


def _divided(k_scale: Scale, v_scale: Scale) -> tuple[Tensor | None, Tensor | None, list[float]]:
    """Scales as the operators take them."""
    tensors = [s if isinstance(s, Tensor) else None for s in (k_scale, v_scale)]
    numbers = [1.0 if s is None or isinstance(s, Tensor) else float(s) for s in (k_scale, v_scale)]
    return tensors[0], tensors[1], [] if k_scale is None and v_scale is None else numbers


def _fake_results(q: Tensor, head_dim_v: int, want_lse: bool) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:2] if want_lse else (0,), dtype=torch.float32)
    return q.new_empty((q.shape[0], q.shape[1], head_dim_v)), lse


@paged_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    pages: Tensor,
    indptr: Tensor | None,
    handle: int,
    head_dim_v: int,
    scale: float | None,
    kv_layout: str,
    want_lse: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    factors: Sequence[float],
) -> tuple[Tensor, Tensor]:
    return _fake_results(q, head_dim_v, want_lse)


@ragged_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    handle: int,
    head_dim_v: int,
    scale: float | None,
    want_lse: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    factors: Sequence[float],
) -> tuple[Tensor, Tensor]:
    return _fake_results(q, head_dim_v, want_lse)


def call_paged(
    q: Tensor,
    kv_cache: Tensor | tuple[Tensor, Tensor],
    page_table: PageTable | Tensor | tuple[Tensor, Tensor],
    plan: Plan,
    scale: float | None,
    kv_layout: str,
    want_lse: bool,
    k_scale: Scale = None,
    v_scale: Scale = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The operator as traced code calls it."""
    k, v = (kv_cache, None) if isinstance(kv_cache, Tensor) else kv_cache
    if isinstance(page_table, Tensor):
        pages, indptr = page_table, None
    elif isinstance(page_table, tuple):
        indptr, pages = page_table
    elif plan.lists is not None:
        pages, indptr = page_table.pages, None
    else:
        pages, indptr = page_table.pages, page_table.indptr
    scales = _divided(k_scale, v_scale)
    out, lse = paged_op(q, k, v, pages, indptr, plan.handle, plan.head_dim_v, scale, kv_layout, want_lse, *scales)
    return (out, lse) if want_lse else out


def call_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    scale: float | None,
    want_lse: bool,
    k_scale: Scale = None,
    v_scale: Scale = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The operator as traced code calls it."""
    out, lse = ragged_op(q, k, v, plan.handle, plan.head_dim_v, scale, want_lse, *_divided(k_scale, v_scale))
    return (out, lse) if want_lse else out
