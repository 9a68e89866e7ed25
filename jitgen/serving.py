"""Attention over a batch of requests of any lengths, their keys in pages or one after the other: the serving calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_compiling

from jitgen.checks import check_grad
from jitgen.errors import PlanMismatch, UnsupportedDevice
from jitgen.program import Program, uses_index
from jitgen.serving_cascade import Cascade
from jitgen.serving_checks import check_keys, check_query
from jitgen.serving_kernels import kernels_of, merge_kernel
from jitgen.serving_launch import PreparedCall, RecentCall, launches_of, run
from jitgen.serving_op import call_paged, call_ragged, check_traced
from jitgen.serving_pages import KeyPlace, PageTable, cache_place, ragged_place
from jitgen.serving_plan import Plan, default_scale
from jitgen.serving_scales import Scale, scale_words

if TYPE_CHECKING:
    from jitgen.variant import Variant

Tensor = torch.Tensor
_NO_SCALES: list[object] = []
MAX_PREPARED_CALLS = 256  # of one plan: its layers differ in little but the address of their cache


def paged_attention(
    q: Tensor,
    kv_cache: Tensor | tuple[Tensor, Tensor],
    page_table: PageTable | Cascade | Tensor | tuple[Tensor, Tensor],
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

    kv_cache      one tensor, index 0 along axis 1 the keys and index 1 the values, or a pair
    page_table    a jitgen.PageTable, a block table [batch, max_pages], or a pair (indptr, indices); the jitgen.Cascade of the
                  last update for a plan with levels
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
             for the results. Inside torch.compile the call is one operator, without variant=, out=, lse= and captures.
    """
    if is_compiling():
        check_traced(variant, out, lse, captures)
        return call_paged(q, kv_cache, page_table, plan, scale, kv_layout, return_lse, k_scale, v_scale)
    program, values = _resolve(plan, variant, captures)
    table = page_table if type(page_table) in (PageTable, Cascade) else PageTable.of(page_table)
    pair = type(kv_cache) is tuple or type(kv_cache) is list
    tensors = (q, *kv_cache) if pair else (q, kv_cache)
    options = (program, kv_layout, scale, pair, table.device)
    recent = plan.recent
    if recent is not None and options == recent.options and recent.looks_same(*tensors):
        call, total_q = recent.call, recent.total_q
    else:
        call, total_q = _prepared_paged(plan, kv_cache, tensors, options), q.shape[0]
    if table.batch < plan.num_requests or plan.segments is not None:
        start, pages, list_stride = _segment_lists(plan, table, call.page_size)
    else:
        if call.on_host:
            _check_table(plan, table, call.page_size)
        start = 0 if table.indptr is None else table.indptr.data_ptr()
        pages, list_stride = table.pages.data_ptr(), table.list_stride
    keys = (tensors[1].data_ptr(), tensors[-1].data_ptr() + call.v_offset, start, pages, list_stride)
    scales = _NO_SCALES
    if plan.kv_dtype is not None or k_scale is not None or v_scale is not None:
        scales = scale_words(plan, call.numbers[3], call.numbers[2], k_scale, v_scale)
    return run(plan, call, values, q, total_q, keys, scales, return_lse, out, lse)


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
    if is_compiling():
        check_traced(variant, out, lse, captures)
        return call_ragged(q, k, v, plan, scale, return_lse, k_scale, v_scale)
    program, values = _resolve(plan, variant, captures)
    options = (program, scale)
    recent = plan.recent
    if recent is not None and options == recent.options and recent.looks_same(q, k, v):
        call, total_q = recent.call, recent.total_q
    else:
        call, total_q = _prepared_ragged(plan, (q, k, v), options), q.shape[0]
    keys = (k.data_ptr(), v.data_ptr(), plan.kv_start.data_ptr(), 0, 0)  # type: ignore[union-attr]
    scales = _NO_SCALES
    if plan.kv_dtype is not None or k_scale is not None or v_scale is not None:
        scales = scale_words(plan, call.numbers[3], call.numbers[2], k_scale, v_scale)
    return run(plan, call, values, q, total_q, keys, scales, return_lse, out, lse)


def _resolve(plan: Plan, variant: object, captures: dict[str, object]) -> tuple[Program, list[object]]:
    """Program and captured values of a call."""
    if type(plan) is not Plan:
        raise TypeError(f"plan is a {type(plan).__name__}, expected a jitgen.Plan.")
    return plan.trace_other(variant, captures) if captures or variant is not None else plan.trace()


def _check_ready(plan: Plan, layout: str) -> None:
    """The plan is one for this call, and knows lengths."""
    if plan.layout != layout:
        raise PlanMismatch(f"the plan was made for layout={plan.layout!r}, this is the call for {layout!r} keys.")
    if plan.version == 0:
        raise PlanMismatch("the plan has no lengths yet. Call plan.update(q_indptr, kv_len) first.")


def _prepared_paged(
    plan: Plan, kv_cache: object, tensors: tuple[Tensor, ...], options: tuple[Program, str, float | None, bool, torch.device]
) -> PreparedCall:
    """The prepared call for a paged call that is unlike the last one."""
    program, kv_layout, scale, _, device = options
    key = _key_of(tensors, options)
    call = plan.calls.get(key)
    if call is None:
        _check_ready(plan, "paged")
        if device != plan.device:
            raise UnsupportedDevice(f"the page table is on {device}, the plan on {plan.device}. Move it there.")
        call = _prepare(plan, key, program, tensors, cache_place(kv_cache, kv_layout), scale)
    check_grad(*tensors[:2], tensors[-1])
    if not is_compiling():  # Dynamo looks into every function that a call runs outside of a graph
        plan.recent = RecentCall.of(call, options, *tensors)
    return call


def _prepared_ragged(plan: Plan, tensors: tuple[Tensor, Tensor, Tensor], options: tuple[Program, float | None]) -> PreparedCall:
    """As ``_prepared_paged``, for a ragged call."""
    program, scale = options
    key = _key_of(tensors, options)
    call = plan.calls.get(key)
    if call is None:
        _check_ready(plan, "ragged")
        call = _prepare(plan, key, program, tensors, ragged_place(*tensors[1:]), scale)
    check_grad(*tensors)
    if not is_compiling():
        plan.recent = RecentCall.of(call, options, *tensors)
    return call


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
    check_keys(plan, place, tensors[1:])
    scale = default_scale(plan) if scale is None else float(scale)
    on_host = plan.device.type == "cpu"
    q_factor = 1.0
    if not on_host and scale <= 0 and not uses_index(program, "scale"):
        # CUDA kernels take the maximum of q . k before they scale it
        q_factor, scale = (-1.0, -scale) if scale < 0 else (0.0, 1.0)
    out_shape = (plan.num_q_heads, plan.head_dim_v)
    o_stride = (plan.num_q_heads * plan.head_dim_v, plan.head_dim_v)
    q_stride = q.stride()[:2]
    kernels = kernels_of(plan, program)
    call = PreparedCall(
        program=program,
        kernels=kernels,
        merge=merge_kernel(plan, program),
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
        out_like_q=tuple(q.shape[1:]) == out_shape and q.stride() == (*o_stride, 1),
    )
    if len(plan.calls) >= MAX_PREPARED_CALLS:
        plan.calls.clear()
    plan.calls[key] = call
    return call


def _segment_lists(plan: Plan, table: PageTable | Cascade, page_size: int) -> tuple[int, int, int]:
    """Addresses of kv_start and pages, and the stride of lists, where entries are parts of requests."""
    if plan.cascade is not None or isinstance(table, Cascade):
        if table is not plan.cascade:
            given = "another Cascade than" if isinstance(table, Cascade) else f"a {type(table).__name__}, not the Cascade that"
            raise PlanMismatch(f"the page table is {given} plan.update was given. Give both the same.")
        if plan.device.type == "cpu":
            for level in table.levels:
                level.page_table.check_extent(level.kv_len, page_size)
        return table.kv_start.data_ptr(), table.pages.data_ptr(), 0
    if table.batch < plan.num_requests:
        raise PlanMismatch(
            f"the page table has {table.batch} requests, plan.update was given {plan.num_requests}. Both must match."
        )
    piece = int(plan.kv_split or 0)
    if piece % page_size:
        raise PlanMismatch(f"kv_split is {piece}, and pages have {page_size} keys. Pieces must be whole pages: use a multiple.")
    plan.segments.list_starts(table, plan.num_requests, piece // page_size)  # type: ignore[union-attr]
    return plan.segments.kv_start.data_ptr(), table.pages.data_ptr(), 0  # type: ignore[union-attr]


def _check_table(plan: Plan, table: PageTable, page_size: int) -> None:
    """On the CPU: page lists are long enough; looked at again only when lengths or lists have changed."""
    start = table.indptr
    changes = 0 if start is None else -1 if start.is_inference() else start._version  # inference tensors count no changes
    state = (plan.version, page_size, table.pages.shape, changes)
    known, seen = plan.checked_table
    if changes < 0 or known is not start or seen != state:
        table.check_extent(plan.kv_len, page_size)  # type: ignore[arg-type]
        plan.checked_table = start, state  # holding the tensor keeps its memory from becoming another's
