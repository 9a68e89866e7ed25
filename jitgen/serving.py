"""Attention over a batch of requests of any lengths, their keys in pages or one after the other: the serving calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_compiling

from jitgen.checks import check_scale, is_traced
from jitgen.errors import InvalidType, LaunchError, PlanMismatch
from jitgen.looks import can_be_asked
from jitgen.serving_cascade import Cascade
from jitgen.serving_launch import run
from jitgen.serving_lists import KVLists, PageTable
from jitgen.serving_op import call_paged, call_ragged
from jitgen.serving_pages import join_latent, ragged_place
from jitgen.serving_plan import Plan
from jitgen.serving_recall import recall, recall_paged
from jitgen.serving_scales import Scale, scale_words
from jitgen.serving_selection import ChosenKeys

if TYPE_CHECKING:
    from jitgen.variant import Variant

Tensor = torch.Tensor
_NO_SCALES: list[object] = []


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
    if scale is not None and type(scale) is not float:
        check_scale(scale)
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
        recent = recall_paged(plan, kv_cache, page_table, tensors, options)
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
    try:
        return run(plan, recent, values, q, keys, scales, return_lse, out, lse)
    except LaunchError as error:
        if call.on_host and isinstance(recent.lists, PageTable):
            missing = recent.lists.missing_page(plan.kv_len, *call.numbers[2:])
            if missing is not None:
                raise LaunchError(missing) from error
        raise


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
    if scale is not None and type(scale) is not float:
        check_scale(scale)
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
        recent = recall(plan, "ragged", (q, k, v), options, lambda: ragged_place(k, v), None, None)
    has_scales = plan.kv_dtype is not None or k_scale is not None or v_scale is not None
    if recent.start is not None and not (values or has_scales or return_lse) and out is None and lse is None:
        found = recent.start(q, k, v)
        if found is not None:
            return found
    keys = k.data_ptr(), v.data_ptr(), *recent.lists_at
    numbers = recent.call.numbers
    scales = scale_words(plan, numbers[3], numbers[2], k_scale, v_scale) if has_scales else _NO_SCALES
    return run(plan, recent, values, q, keys, scales, return_lse, out, lse)


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
    state = (plan.version, page_size, table.pages.shape, start is None)
    known, seen = plan.checked_table
    # the numbers are compared: torch counts no changes that are made through NumPy or in inference mode
    if seen != state or not (start is None or torch.equal(start, known)):  # type: ignore[arg-type]
        table.check_extent(plan.kv_len, page_size)  # type: ignore[arg-type]
        plan.checked_table = None if start is None else start.clone(), state
