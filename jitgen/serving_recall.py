"""Serving calls that are unlike the last one of their plan: what is checked, and what is kept for the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from jitgen.checks import check_grad, check_memory, check_scale
from jitgen.errors import PlanMismatch, UnsupportedDevice, VariantError
from jitgen.looks import can_be_asked, looks_of
from jitgen.program import Program, all_roots, reads_pages, uses_index
from jitgen.serving_checks import check_keys, check_packed, check_query
from jitgen.serving_kernels import kernels_of, merge_kernel
from jitgen.serving_launch import (
    PreparedCall,
    RecentCall,
    blocks_of,
    check_rows,
    launches_of,
    list_strides_of,
    maker_of,
    starter_of,
)
from jitgen.serving_lists import KVLists, PageTable
from jitgen.serving_pages import KeyPlace, cache_place, latent_parts, latent_place
from jitgen.serving_plan import Plan, default_scale

Tensor = torch.Tensor
_NO_TABLE = object()
MAX_PREPARED_CALLS = 256  # of one plan: its layers differ in little but the address of their cache


def recall_paged(
    plan: Plan,
    kv_cache: object,
    page_table: object,
    tensors: tuple[Tensor, ...],
    options: tuple[Program, float | None, str, bool],
) -> RecentCall:
    """A paged call that is unlike the last one, ready to be made."""
    lists = page_table if isinstance(page_table, KVLists) else PageTable.of(page_table)
    if lists.device != plan.device:
        raise UnsupportedDevice(f"the page table is on {lists.device}, the plan on {plan.device}. Move it there.")

    def find_place() -> KeyPlace:
        parts = latent_parts(kv_cache) if plan.is_latent else None
        if parts is None:
            return cache_place(kv_cache, options[2])
        return latent_place(parts, isinstance(kv_cache, Tensor), plan.device_index is None)

    return recall(plan, "paged", tensors, options, find_place, page_table, lists)


def recall(
    plan: Plan,
    layout: str,
    tensors: tuple[Tensor, ...],
    options: tuple[Any, ...],
    find_place: Callable[[], KeyPlace],
    table: object,
    lists: KVLists | None,
) -> RecentCall:
    """A call that is unlike the last one, ready to be made. ``options``: program, scale, and what else the call depends on."""
    if plan.layout != layout:
        raise PlanMismatch(f"the plan was made for layout={plan.layout!r}, this is the call for {layout!r} keys.")
    plan.check_planned()
    recent = plan.recent
    if recent is not None and options == recent.options and can_be_asked(*tensors) and recent.looks_same(*tensors):
        call, looks_same = recent.call, recent.looks_same
    else:
        if not can_be_asked(*tensors):
            check_query(plan, tensors[0])
            find_place()  # says which one is no tensor, or nested
        names = ("q", "kv_cache") if len(tensors) == 2 else ("q", "k", "v")
        check_memory(**dict(zip(names, tensors, strict=True)))
        key = _key_of(tensors, options)
        try:
            call = plan.calls.get(key)
        except TypeError:  # of a kv_layout that has no hash
            find_place()
            raise
        if call is None:
            call = _prepare(plan, key, options[0], tensors, find_place(), options[1])
        check_grad(*tensors[:2], tensors[-1])
        looks_same = None
    total_q = check_rows(plan, tensors[0])
    if isinstance(lists, PageTable) and plan.lists is None and lists.batch < plan.num_requests:
        raise PlanMismatch(
            f"the page table has {lists.batch} requests, plan.update was given {plan.num_requests}. Both must match."
        )
    blocks = blocks_of(plan, call, call.launches, total_q, list_strides_of(plan, lists))
    lists_at, new_out = _addresses_of(plan, lists), maker_of(plan, total_q)
    start = starter_of(plan, call, blocks, lists_at, new_out)
    if is_dynamo_compiling():  # Dynamo looks into every function that a call runs outside of a graph
        return RecentCall(call, options, looks_of, total_q, plan.version, _NO_TABLE, lists, lists_at, blocks, new_out, start)
    if looks_same is None:
        looks_same = looks_of(tensors)
    kept = table if lists is None or _is_same(lists, table) else _NO_TABLE
    plan.recent = RecentCall(call, options, looks_same, total_q, plan.version, kept, lists, lists_at, blocks, new_out, start)
    return plan.recent


def _addresses_of(plan: Plan, lists: KVLists | None) -> tuple[int, int] | None:
    """Addresses of kv_start and pages until the next update; None where each call finds them, or looks at the lists."""
    if lists is None:
        return plan.kv_start.data_ptr(), 0  # type: ignore[union-attr]
    return None if plan.entries is not None or not isinstance(lists, PageTable) else lists.addresses


def _is_same(lists: KVLists, table: object) -> bool:
    """Whether ``lists`` has the memory of ``table``, so that it may be used for it again."""
    if isinstance(table, Tensor):
        return lists.pages is table
    return table is lists or (type(table) is tuple and lists.kv_start is table[0] and lists.pages is table[1])


def _key_of(tensors: tuple[Tensor, ...], options: tuple[object, ...]) -> tuple[object, ...]:
    """What a call is prepared for: all but the number of its query rows."""
    q = tensors[0]
    return (*options, q.shape[1:], q.stride(), q.dtype, q.device,
            *[(t.shape, t.stride(), t.dtype, t.device) for t in tensors[1:]])  # fmt: skip


def _prepare(
    plan: Plan,
    key: tuple[object, ...],
    program: Program,
    tensors: tuple[Tensor, ...],
    place: KeyPlace,
    scale: float | None,
) -> PreparedCall:
    """Check what shapes, strides and dtypes can be wrong about, and load the kernels."""
    q = tensors[0]
    mask_slots = plan.match_mask(program)
    check_query(plan, q)
    check_packed(plan, program)
    check_keys(plan, place, tensors[1:])
    if scale is None and plan.is_latent:
        raise VariantError(
            "scale has no default for latent attention: it is 1/sqrt of the head dim before absorption, 192 for DeepSeek. Give "
            "scale=."
        )
    check_scale(scale)
    scale = default_scale(plan) if scale is None else float(scale)
    on_host = plan.device.type == "cpu"
    q_factor = 1.0
    if not on_host and scale <= 0 and not uses_index(program, "scale"):
        # CUDA kernels take the maximum of q . k before they scale it
        q_factor, scale = (-1.0, -scale) if scale < 0 else (0.0, 1.0)
    o_stride = (plan.num_q_heads * plan.head_dim_v, plan.head_dim_v)
    q_stride = q.stride()[:2]
    if plan.stage is not None:
        plan.stage.check(program)
        q_stride = plan.stage.q_stride if plan.stage.changes_q else q_stride
    elif program.rows is not None:
        raise PlanMismatch("the variant transforms rows, the plan was made for one that does not. Make a plan with variant=.")
    kernels, merge = kernels_of(plan, program), merge_kernel(plan, program)
    reads = bool(reads_pages(*all_roots(program)))
    call = PreparedCall(
        program=program,
        kernels=kernels,
        merge=merge,
        page_size=place.page_size,
        v_offset=place.v_offset,
        numbers=(plan.num_q_heads, plan.num_kv_heads, place.page_size, place.num_pages),
        scale=scale,
        q_stride=q_stride,
        o_stride=o_stride,
        kv_stride=place.strides,
        launches=launches_of(plan, kernels, scale, q_stride, o_stride, place.strides),
        mask_slots=mask_slots,
        q_factor=q_factor,
        on_host=on_host,
        has_tensors=any(slot.kind == "tensor" for slot in program.slots),
        reads_pages=reads,
        is_plain=plan.entries is None and plan.stage is None and q_factor == 1.0 and not reads,
    )
    if len(plan.calls) >= MAX_PREPARED_CALLS:
        plan.calls.clear()
    plan.calls[key] = call
    return call
