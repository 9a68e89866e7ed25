"""Attention over a batch of requests of any lengths, their keys in pages or one after the other: the serving calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_compiling, is_dynamo_compiling

from jitgen.checks import check_grad, check_memory, check_scale, is_traced
from jitgen.errors import InvalidType, PlanMismatch, UnsupportedDevice, VariantError
from jitgen.looks import can_be_asked, looks_of
from jitgen.program import Program, all_roots, reads_pages, uses_index
from jitgen.serving_cascade import Cascade
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
    run,
    starter_of,
)
from jitgen.serving_lists import KVLists, PageTable
from jitgen.serving_op import call_paged, call_ragged
from jitgen.serving_pages import KeyPlace, cache_place, join_latent, latent_parts, latent_place, ragged_place
from jitgen.serving_plan import Plan, default_scale
from jitgen.serving_scales import Scale, scale_words
from jitgen.serving_selection import ChosenKeys

if TYPE_CHECKING:
    from jitgen.variant import Variant

Tensor = torch.Tensor
_NO_SCALES: list[object] = []
_NO_TABLE = object()
MAX_PREPARED_CALLS = 256  # of one plan: its layers differ in little but the address of their cache


def paged_attention(
    q: Tensor,
    kv_cache: Tensor | tuple[Tensor, Tensor],
    page_table: KVLists | Tensor | tuple[Tensor, Tensor],
    plan: Plan,
    *,
    variant: Variant | Any = None,
    scale: float | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    kv_layout: str = "NHD",
    return_lse: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    **captures: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the query rows of many requests over their keys in a paged cache.

    Prefill, decode and speculative rows may be mixed. The lengths are those of the last ``plan.update``: request b has the
    rows ``q[q_indptr[b] : q_indptr[b + 1]]`` and the first ``kv_len[b]`` keys of its pages, the new ones included, so
    ``kv_idx <= q_idx`` is causal for all of them. Rows of q past ``q_indptr[batch]`` are padding: they are not read, and
    their results are not written.

    kv_cache      one tensor, index 0 along axis 1 the keys and index 1 the values, or a pair. With a plan of head_dim 576 and
                  head_dim_v 512, absorbed latent attention (MLA): one tensor [pages, page_size, 576] whose first 512 elements
                  are the values too, or a pair of [pages, page_size, 512] and [pages, page_size, 64], which the CPU copies
    page_table    a jitgen.PageTable, a block table [batch, max_pages], or a pair (indptr, indices); the jitgen.Cascade or
                  jitgen.Selection of the last update for a plan that takes these
    variant       default the plan's; another must have the plan's mask, as layers may differ in score_mod or sinks
    captures      values by the names under which the variant captures them, in place of the captured ones; what the mask
                  reads is given to ``plan.update`` instead
    k_scale,      of a plan made with kv_dtype: what a stored key or value is multiplied by, default 1. A number or a tensor of
    v_scale       one element; one for each key head; or one for each slot of the cache and key head, as ``jitgen.append``
                  writes them. Codes of NaN and infinity in the cache are not looked for
    out, lse      where to write the results; whole tensors, rows of padding included

    Shapes:  q [total_q, num_q_heads, head_dim]; kv_cache [pages, 2, page_size, num_kv_heads, head_dim] for
             kv_layout="NHD", [pages, 2, num_kv_heads, page_size, head_dim] for "HND", or a pair without the axis of 2 and
             with any head_dim_v. Any strides, but for unit stride along head_dim. k_scale and v_scale float32, [], [1],
             [num_kv_heads], [pages, page_size, num_kv_heads] or [pages * page_size, num_kv_heads]. Returns [total_q,
             num_q_heads, head_dim_v] in q's dtype and, with return_lse, the logsumexp [total_q, num_q_heads] in float32.
    Units:   scale multiplies q . k before score_mod, default 1/sqrt(head_dim); logsumexp is a natural logarithm.
    Errors:  PlanMismatch, ShapeMismatch, UnsupportedDtype, UnsupportedDevice, GradNotSupported; on the CPU also LaunchError
             for a page number that the cache does not have. On a GPU page numbers and lengths are trusted.
    Cost:    compiles nothing that the plan has not; one launch for each of the plan's kernels, no wait, no allocation but
             for the results. A variant's q_transform is one launch more and a copy of q; so are transforms of keys and values
             where the plan gathers these (see max_kv_tokens of jitgen.Plan). Inside torch.compile the call is one operator,
             but variant=, out=, lse= and captures break the graph.
    """
    if is_compiling() and is_traced(q):
        if variant is not None or captures or out is not None or lse is not None:
            from jitgen.serving_outside import paged_outside

            return paged_outside(
                q, kv_cache, page_table, plan, variant=variant, scale=scale, kv_layout=kv_layout, k_scale=k_scale,
                v_scale=v_scale, return_lse=return_lse, out=out, lse=lse, **captures,
            )  # fmt: skip
        return call_paged(q, kv_cache, page_table, plan, scale, kv_layout, return_lse, k_scale, v_scale)
    if type(plan) is not Plan:
        raise InvalidType(f"plan is a {type(plan).__name__}, expected a jitgen.Plan.")
    program, values = plan.trace_other(variant, captures) if captures or variant is not None else plan.trace()
    if plan.is_latent and plan.device_index is None:
        kv_cache = join_latent(kv_cache)
    pair = type(kv_cache) is tuple or type(kv_cache) is list
    tensors = (q, *kv_cache) if pair else (q, kv_cache)
    options = (program, scale, kv_layout, pair)
    recent = plan.recent
    if not (
        recent is not None
        and page_table is recent.table
        and plan.version == recent.version
        and options == recent.options
        and can_be_asked(q)
        and recent.looks_same(*tensors)
    ):
        recent = _recall_paged(plan, kv_cache, page_table, tensors, options)
    has_scales = plan.kv_dtype is not None or k_scale is not None or v_scale is not None
    if recent.start is not None and not (values or has_scales or return_lse) and out is None and lse is None:
        found = recent.start(q, tensors[1], tensors[-1])
        if found is not None:
            return found
    call, lists_at = recent.call, recent.lists_at
    if lists_at is None:
        lists_at = _addresses_now(plan, recent.lists, call.page_size)
    elif call.on_host:
        _check_table(plan, recent.lists, call.page_size)
    k = tensors[1].data_ptr()
    keys = k, (tensors[2].data_ptr() if pair else k) + call.v_offset, *lists_at
    scales = scale_words(plan, call.numbers[3], call.numbers[2], k_scale, v_scale) if has_scales else _NO_SCALES
    return run(plan, recent, values, q, keys, scales, return_lse, out, lse)


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    variant: Variant | Any = None,
    scale: float | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    **captures: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the query rows of many requests over keys that lie one request after the other.

    The lengths are those of the last ``plan.update(q_indptr, kv_indptr=kv_indptr)``: request b has the rows
    ``q[q_indptr[b] : q_indptr[b + 1]]`` and the keys ``k[kv_indptr[b] : kv_indptr[b + 1]]``, or the first ``kv_len[b]`` of
    these. For the rest see ``paged_attention``.

    Shapes:  q [total_q, num_q_heads, head_dim]; k [total_kv, num_kv_heads, head_dim]; v [total_kv, num_kv_heads,
             head_dim_v]; k_scale and v_scale by slot [total_kv, num_kv_heads]; returns [total_q, num_q_heads, head_dim_v]
             and, with return_lse, [total_q, num_q_heads].
    Units:   as paged_attention.
    Errors:  as paged_attention; on the CPU LaunchError for lengths that reach past the rows of k and v.
    Cost:    as paged_attention.
    """
    if is_compiling() and is_traced(q):
        if variant is not None or captures or out is not None or lse is not None:
            from jitgen.serving_outside import ragged_outside

            return ragged_outside(
                q, k, v, plan, variant=variant, scale=scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse, out=out,
                lse=lse, **captures,
            )  # fmt: skip
        return call_ragged(q, k, v, plan, scale, return_lse, k_scale, v_scale)
    if type(plan) is not Plan:
        raise InvalidType(f"plan is a {type(plan).__name__}, expected a jitgen.Plan.")
    program, values = plan.trace_other(variant, captures) if captures or variant is not None else plan.trace()
    options = (program, scale)
    recent = plan.recent
    if not (
        recent is not None
        and plan.version == recent.version
        and options == recent.options
        and can_be_asked(q, k, v)
        and recent.looks_same(q, k, v)
    ):
        recent = _recall(plan, "ragged", (q, k, v), options, lambda: ragged_place(k, v), None, None)
    has_scales = plan.kv_dtype is not None or k_scale is not None or v_scale is not None
    if recent.start is not None and not (values or has_scales or return_lse) and out is None and lse is None:
        found = recent.start(q, k, v)
        if found is not None:
            return found
    keys = k.data_ptr(), v.data_ptr(), *recent.lists_at
    numbers = recent.call.numbers
    scales = scale_words(plan, numbers[3], numbers[2], k_scale, v_scale) if has_scales else _NO_SCALES
    return run(plan, recent, values, q, keys, scales, return_lse, out, lse)


def _recall_paged(
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

    return _recall(plan, "paged", tensors, options, find_place, page_table, lists)


def _recall(
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
        call = plan.calls.get(key)
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


def _addresses_now(plan: Plan, lists: KVLists, page_size: int) -> tuple[int, int]:
    """Addresses of kv_start and pages where entries are not requests."""
    if plan.lists is not None or not isinstance(lists, PageTable):
        _check_lists(plan, lists, page_size)
        return lists.addresses
    piece = int(plan.kv_split or 0)
    if piece % page_size:
        raise PlanMismatch(f"kv_split is {piece}, and pages have {page_size} keys. Pieces must be whole pages: use a multiple.")
    plan.segments.list_starts(lists, plan.num_requests, piece // page_size)  # type: ignore[union-attr]
    return plan.segments.kv_start.data_ptr(), lists.pages.data_ptr()  # type: ignore[union-attr]


def _check_lists(plan: Plan, lists: KVLists, page_size: int) -> None:
    """The lists of a call are those that the plan was updated for."""
    if lists is not plan.lists:
        name, planned = type(lists).__name__, "Cascade" if isinstance(plan.lists or lists, Cascade) else "Selection"
        given = f"another {planned} than" if name == planned else f"a {name}, not the {planned} that"
        raise PlanMismatch(f"the page table is {given} plan.update was given. Give both the same.")
    if isinstance(lists, ChosenKeys) and plan.selection == "uneven" and lists.version != plan.chosen_version:
        raise PlanMismatch(
            "the selection has chosen other blocks since plan.update, and with selection='uneven' lists may have other numbers "
            "of keys then. Call plan.update(selection) after choose()."
        )
    if isinstance(lists, Cascade) and plan.device_index is None:
        for level in lists.levels:
            level.page_table.check_extent(level.kv_len, page_size)


def _check_table(plan: Plan, table: PageTable, page_size: int) -> None:
    """On the CPU: page lists are long enough; looked at again only when lengths or lists have changed."""
    start = table.indptr
    changes = 0 if start is None else -1 if start.is_inference() else start._version  # inference tensors count no changes
    state = (plan.version, page_size, table.pages.shape, changes)
    known, seen = plan.checked_table
    if changes < 0 or known is not start or seen != state:
        table.check_extent(plan.kv_len, page_size)  # type: ignore[arg-type]
        plan.checked_table = start, state  # holding the tensor keeps its memory from becoming another's
