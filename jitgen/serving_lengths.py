"""What Plan.update is given: lengths of requests, a cascade or a selection, checked and kept as the kernels take them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from jitgen.checks import as_int32
from jitgen.errors import PlanMismatch, ShapeMismatch, UnsupportedDevice
from jitgen.program import Program, uses_index
from jitgen.serving_cascade import Cascade
from jitgen.serving_checks import check_lengths
from jitgen.serving_entries import ChosenEntries
from jitgen.serving_lists import KVLists, check_indices
from jitgen.serving_segments import check_cascade
from jitgen.serving_selection import ChosenKeys

if TYPE_CHECKING:
    from jitgen.serving_plan import Plan

Tensor = torch.Tensor


def take(plan: Plan, lengths: object, kv_len: Tensor | None, kv_indptr: Tensor | None) -> None:
    """Keep what an update is given. ``lengths``: the first row of each request, or lists in the place of all lengths.

    Errors:  PlanMismatch, ShapeMismatch, UnsupportedDtype, UnsupportedDevice; InvalidType.
    """
    if isinstance(lengths, KVLists) or plan.levels > 1 or plan.selection is not None:
        _take_lists(plan, lengths, kv_len, kv_indptr)
    else:
        _take_lengths(plan, lengths, kv_len, kv_indptr)  # type: ignore[arg-type]


def look_at_lengths(plan: Plan, program: Program, check: bool) -> None:
    """What the host may know of the lengths, and whether they are right."""
    q_indptr, kv_len = plan.request_lengths
    on_host = plan.device.type == "cpu"
    if on_host or check:
        if isinstance(plan.lists, Cascade):
            check_cascade(plan.lists)
        elif plan.lists is not None:
            plan.lists.check(plan.selection == "even")
        check_lengths(plan, q_indptr.cpu(), kv_len.cpu(), uses_index(program, "q_idx"))
    plan.rows = int(q_indptr[-1]) if on_host else -1
    if on_host:
        plan.longest_q = int(q_indptr.diff().max()) if plan.num_requests else 0
        plan.longest_kv = int(kv_len.max()) if plan.num_requests else 0


def _take_lengths(plan: Plan, q_indptr: Tensor, kv_len: Tensor | None, kv_indptr: Tensor | None) -> None:
    """Lengths of whole requests, cut here where ``split`` says so."""
    kv_start, kv_len = _key_lengths(plan, kv_len, kv_indptr)
    check_indices("q_indptr", q_indptr, 1)
    batch = q_indptr.shape[0] - 1
    if batch != kv_len.shape[0]:
        raise ShapeMismatch(f"q_indptr has {batch + 1} entries, kv_len {kv_len.shape[0]}. Expected batch + 1 and batch.")
    _check_batch(plan, batch, {"q_indptr": q_indptr, "kv_len": kv_len})
    plan.batch = plan.num_requests = batch
    plan.request_lengths = plan.q_indptr, plan.kv_len = as_int32(q_indptr), as_int32(kv_len)
    plan.kv_start = kv_start
    if plan.device.type == "cpu":  # the caller may reuse its tensors for the next step
        plan.request_lengths = plan.q_indptr, plan.kv_len = plan.q_indptr.clone(), plan.kv_len.clone()
        kv_start = plan.kv_start = None if kv_start is None else kv_start.clone()
    if plan.segments is not None and batch:
        piece = int(plan.kv_split or 0)
        plan.segments.divide_lengths(plan.q_indptr, plan.kv_len, piece, plan.cut_len, kv_start)
        _take_segments(plan, plan.segments.levels * (batch + 1) - 1)


def _take_lists(plan: Plan, lists: object, kv_len: Tensor | None, kv_indptr: Tensor | None) -> None:
    """Lists that say themselves which rows and how many keys they are for."""
    kind = {Cascade: "Cascade", ChosenKeys: "Selection"}
    if plan.levels == 1 and plan.selection is None:
        given = next((name for of, name in kind.items() if isinstance(lists, of)), type(lists).__name__)
        option = "levels=" if given == "Cascade" else "selection="
        raise PlanMismatch(f"update was given a {given}, and the plan was made for whole requests. Make it with {option}.")
    wanted: Any = Cascade if plan.levels > 1 else ChosenKeys
    if not isinstance(lists, wanted) or kv_len is not None or kv_indptr is not None:
        made = f"levels={plan.levels}" if plan.levels > 1 else f"selection={plan.selection!r}"
        raise PlanMismatch(f"the plan was made for {made}, whose update takes a jitgen.{kind[wanted]} and no lengths.")
    if isinstance(lists, Cascade):
        _take_cascade(plan, lists)
    else:
        _take_chosen(plan, lists)
    plan.lists = lists


def _take_cascade(plan: Plan, cascade: Cascade) -> None:
    """Lengths of the groups of a cascade."""
    assert plan.segments is not None
    for level in cascade.levels:
        _check_batch(plan, level.size, {"the cascade": level.kv_len})
    cascade.refresh()
    plan.segments.divide_cascade(cascade)
    plan.num_requests = cascade.batch
    _take_segments(plan, cascade.num_entries)
    plan.kv_start = cascade.kv_start
    last, lengths = cascade.levels[-1].q_indptr, plan.segments.request_kv_len[: cascade.batch]
    plan.request_lengths = last, lengths


def _take_chosen(plan: Plan, keys: ChosenKeys) -> None:
    """Lengths of chosen lists."""
    assert isinstance(plan.entries, ChosenEntries)
    _check_batch(plan, keys.batch, {"the selection": keys.pages})
    if keys.page_size != plan.page_size or (keys.head_stride and keys.pages.shape[1] != plan.num_kv_heads):
        heads = f" and lists of {keys.pages.shape[1]} KV heads" if keys.head_stride else ""
        raise PlanMismatch(
            f"the selection has pages of {keys.page_size} keys{heads}, the plan was made for page_size={plan.page_size} "
            f"and num_kv_heads={plan.num_kv_heads}."
        )
    keys.refresh()
    plan.entries.take(keys)
    plan.batch, plan.num_requests = keys.batch, keys.kv_len.shape[0]
    plan.q_indptr, plan.kv_len, plan.kv_start = keys.list_indptr, keys.list_len, keys.kv_start
    plan.request_lengths = keys.q_indptr, keys.kv_len
    plan.chosen_version = keys.version


def _take_segments(plan: Plan, count: int) -> None:
    """Entries are those of the segments."""
    segments = plan.segments
    assert segments is not None
    plan.batch = count
    plan.q_indptr, plan.kv_len, plan.kv_start = segments.q_indptr[: count + 1], segments.kv_len[:count], segments.kv_start


def _check_batch(plan: Plan, batch: int, tensors: dict[str, Tensor]) -> None:
    if batch > plan.max_batch:
        what = "requests" if plan.selection is None else "lists"
        raise PlanMismatch(f"the lengths are those of {batch} {what}, the plan was made for max_batch={plan.max_batch}.")
    for name, t in tensors.items():
        if t.device != plan.device:
            raise UnsupportedDevice(
                f"{name} is on {t.device}, the plan on {plan.device}. Move it there, or make the plan with "
                f"device={str(t.device)!r}."
            )


def _key_lengths(plan: Plan, kv_len: Tensor | None, kv_indptr: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """First row of each request in k (ragged only), and its number of keys."""
    if (plan.layout == "ragged") != (kv_indptr is not None):
        needed = "kv_indptr" if plan.layout == "ragged" else "kv_len, and no kv_indptr: the page table says where keys lie"
        raise PlanMismatch(f"the plan was made for layout={plan.layout!r}, whose update takes {needed}.")
    if kv_indptr is not None:
        check_indices("kv_indptr", kv_indptr, 1)
        kv_indptr = as_int32(kv_indptr)
    if kv_len is None:
        if kv_indptr is None:
            raise PlanMismatch("update was given no kv_len, the number of keys of each request.")
        kv_len = kv_indptr.diff()
    check_indices("kv_len", kv_len, 1)
    if kv_indptr is not None and kv_indptr.shape[0] != kv_len.shape[0] + 1:
        raise ShapeMismatch(f"kv_indptr has {kv_indptr.shape[0]} entries, kv_len {kv_len.shape[0]}, expected one more.")
    return kv_indptr, kv_len
