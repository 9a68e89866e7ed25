"""Validation of serving calls: a message names the plan's value and the call's, and says which to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jitgen.checks import INT32, check_is_tensor, dtype_name, first_of
from jitgen.emit_ranges import POSITION_LIMIT
from jitgen.errors import InvalidType, PlanMismatch, ShapeMismatch, UnsupportedDevice, UnsupportedDtype, VariantError
from jitgen.families import CUDA_HEAD_DIMS, check_pages, padded_head_dims
from jitgen.layouts import check_own_rows
from jitgen.program import Program, check_numbers, check_sink, direct_indices, too_short, uses_index
from jitgen.serving_pages import KeyPlace, check_not_nested
from jitgen.serving_scales import stored_dtype
from jitgen.spec import CPU_DTYPES, CUDA_DTYPES, MAX_CPU_HEAD_DIM, MLA_DIMS, STORED_DTYPES

if TYPE_CHECKING:
    from jitgen.serving_plan import Plan

Tensor = torch.Tensor
NUMBERS = ("max_batch", "max_tokens", "num_q_heads", "num_kv_heads")
OPTIONAL_NUMBERS = ("max_q_len", "max_kv_len", "max_kv_tokens", "page_size", "kv_split")
MAX_LEVELS = 1 << 16  # far more than anybody shares keys in; memory goes with them
MAX_CUDA_BATCH = 4096  # kPlanMaxBatch in plan.cuh


def check_plan_numbers(plan: Plan) -> None:
    """What a plan is made from is possible."""
    for name in ("dtype", "kv_dtype"):
        value = getattr(plan, name)
        if not isinstance(value, torch.dtype) and (name == "dtype" or value is not None):
            raise InvalidType(f"{name} is {value!r} of type {type(value).__name__}, expected one like torch.bfloat16.")
    for name in NUMBERS:
        value = getattr(plan, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ShapeMismatch(f"{name} is {value!r}, expected a positive integer.")
    for name in OPTIONAL_NUMBERS:
        value = getattr(plan, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ShapeMismatch(f"{name} is {value!r}, expected a positive integer or None.")
    for name in (*NUMBERS, *OPTIONAL_NUMBERS):
        if (getattr(plan, name) or 0) > INT32.max:
            raise ShapeMismatch(f"{name} is {getattr(plan, name)}, expected at most {INT32.max}.")
    if plan.num_q_heads % plan.num_kv_heads:
        raise ShapeMismatch(
            f"num_q_heads is {plan.num_q_heads}, num_kv_heads {plan.num_kv_heads}. The number of query heads must be a "
            "multiple of the number of key/value heads."
        )
    dims = {"head_dim": plan.head_dim, "head_dim_v": plan.head_dim_v}
    for name, value in dims.items():
        if type(value) is not int:
            raise ShapeMismatch(f"{name} is {value!r} of type {type(value).__name__}, expected an integer.")
    is_latent = tuple(dims.values()) == MLA_DIMS
    for name, value in dims.items():
        if value % 8 or not (8 <= value <= MAX_CPU_HEAD_DIM or is_latent):
            raise ShapeMismatch(f"{name} is {value!r}, expected a multiple of 8 from 8 to {MAX_CPU_HEAD_DIM}.")
    device = plan.device.type
    if device == "cuda" and plan.max_batch > MAX_CUDA_BATCH:
        raise ShapeMismatch(f"max_batch is {plan.max_batch}, expected at most {MAX_CUDA_BATCH} on cuda. Split the batch.")
    if device not in ("cpu", "cuda"):
        raise UnsupportedDevice(f"device is {plan.device}, expected cpu or cuda.")
    allowed = CPU_DTYPES if device == "cpu" else CUDA_DTYPES
    if dtype_name(plan.dtype) not in allowed:
        name = dtype_name(plan.dtype)
        remedy = f" It is that of q: a cache of 8 bits is kv_dtype=torch.{name}." if name in STORED_DTYPES else ""
        raise UnsupportedDtype(f"dtype is {name}, expected {' or '.join(allowed)} on {device}.{remedy}")
    _check_stored(plan)
    if (plan.head_dim, plan.head_dim_v) == MLA_DIMS:
        _check_latent(plan)
    elif device == "cuda" and padded_head_dims(plan.head_dim, plan.head_dim_v) != (plan.head_dim, plan.head_dim_v):
        dims = ", ".join(str(d) for d in CUDA_HEAD_DIMS)
        raise ShapeMismatch(
            f"head_dim is {plan.head_dim}, head_dim_v {plan.head_dim_v}; on cuda the cache must be stored with both one of "
            f"{dims}, or 192 and 128. Allocate it with the next larger one, zeros behind the last column."
        )
    for name in ("layout", "split", "selection", "family"):
        value = getattr(plan, name)
        if not isinstance(value, str) and (value is not None or name in ("layout", "split")):
            raise InvalidType(f"{name} is {value!r} of type {type(value).__name__}, expected a name.")
    if plan.page_size is not None and plan.layout != "paged":
        raise ShapeMismatch(f"page_size is {plan.page_size} and layout {plan.layout!r}: only paged plans take a page_size.")
    if plan.layout not in ("paged", "ragged"):
        raise ShapeMismatch(f"layout={plan.layout!r} is not a layout of a plan. Use 'paged' or 'ragged'.")
    if plan.split not in ("balanced", "fixed", "none"):
        raise ShapeMismatch(f"split={plan.split!r} is not a way to split. Use 'balanced', 'fixed' or 'none'.")
    if not isinstance(plan.levels, int) or isinstance(plan.levels, bool) or not 1 <= plan.levels <= MAX_LEVELS:
        raise ShapeMismatch(f"levels is {plan.levels!r}, expected an integer from 1 to {MAX_LEVELS}.")
    if plan.levels > 1 and (plan.layout != "paged" or plan.split == "fixed"):
        raise ShapeMismatch(
            f"levels={plan.levels} goes with layout='paged' and split='balanced' or 'none', not with "
            f"layout={plan.layout!r} and split={plan.split!r}."
        )
    _check_selection(plan)
    if (plan.split == "fixed") != (plan.kv_split is not None):
        raise ShapeMismatch(
            f"split={plan.split!r} and kv_split={plan.kv_split!r} do not go together. "
            "split='fixed' needs kv_split=, the keys of a piece, and no other split takes it."
        )


def _check_selection(plan: Plan) -> None:
    """What goes with chosen lists."""
    if plan.selection is None:
        return
    if plan.selection not in ("even", "uneven"):
        raise ShapeMismatch(f"selection={plan.selection!r} is none. Use 'even', or 'uneven' where lists end differently.")
    others = (plan.layout != "paged", plan.page_size is None, plan.levels > 1, plan.split == "fixed")
    if any(others):
        raise ShapeMismatch(
            f"selection={plan.selection!r} goes with layout='paged', page_size=, levels=1 and split='balanced' or 'none', not "
            f"with layout={plan.layout!r}, page_size={plan.page_size}, levels={plan.levels} and split={plan.split!r}."
        )


def _check_latent(plan: Plan) -> None:
    """Latent attention has one key head, in pages; what its CUDA kernel lacks is refused."""
    if plan.num_kv_heads != 1 or plan.layout != "paged":
        raise ShapeMismatch(
            f"num_kv_heads is {plan.num_kv_heads} and layout {plan.layout!r}, head dims {MLA_DIMS} are those of absorbed "
            "latent attention: one key head, layout 'paged'."
        )
    if stored_dtype(plan):
        raise UnsupportedDtype(
            f"kv_dtype is {stored_dtype(plan)}; a cache for head dims {MLA_DIMS} must have the plan's dtype. Leave it out."
        )
    if plan.device.type == "cuda" and (plan.levels > 1 or plan.split == "fixed"):
        raise ShapeMismatch(
            f"levels is {plan.levels} and split {plan.split!r}; with head dims {MLA_DIMS} on cuda levels must be 1, split "
            "'balanced' or 'none'."
        )


def _check_stored(plan: Plan) -> None:
    """Keys and values of 8 bits are of a kind that the kernels read."""
    stored = stored_dtype(plan)
    if not stored:
        return
    if stored not in STORED_DTYPES:
        raise UnsupportedDtype(
            f"kv_dtype is {stored}, expected {dtype_name(plan.dtype)} as dtype, or {', '.join(STORED_DTYPES)}."
        )
    if plan.device.type != "cuda":
        return
    if plan.head_dim % 64 or plan.head_dim_v % 64:
        raise ShapeMismatch(
            f"head_dim is {plan.head_dim}, head_dim_v {plan.head_dim_v}; on cuda a cache of {stored} must be stored with both "
            "a multiple of 64. Allocate it with the next larger one, zeros behind the last column."
        )
    if plan.family not in (None, "decode"):
        raise UnsupportedDtype(f"family={plan.family!r} does not read a cache of {stored}. Leave family out.")


def check_lengths(plan: Plan, q_indptr: Tensor, kv_len: Tensor, reads_q_idx: bool) -> None:
    """Lengths on the host are ones that the plan was made for."""
    q_len = q_indptr.diff()
    if int(q_indptr[0]) != 0 or bool((q_len < 0).any()):
        raise ShapeMismatch(f"q_indptr is {first_of(q_indptr)}, expected numbers that start with 0 and never fall.")
    if int(q_indptr[-1]) > plan.max_tokens:
        raise PlanMismatch(f"q_indptr ends with {int(q_indptr[-1])} rows, the plan was made for max_tokens={plan.max_tokens}.")
    rows = q_len if plan.selection is None else plan.q_indptr.cpu().diff()  # type: ignore[union-attr]
    if plan.max_q_len is not None and bool((rows > plan.max_q_len).any()):
        what = "request" if plan.selection is None else "list"
        raise PlanMismatch(f"a {what} has {int(rows.max())} query rows, the plan was made for max_q_len={plan.max_q_len}.")
    if bool((kv_len < 0).any()):
        raise ShapeMismatch(f"kv_len is {first_of(kv_len)}, expected no negative length.")
    if bool((kv_len > POSITION_LIMIT).any()):
        raise ShapeMismatch(
            f"kv_len is {first_of(kv_len)}, expected at most {POSITION_LIMIT} keys. Is it in bytes, or garbage?"
        )
    if plan.max_kv_len is not None and bool((kv_len > plan.max_kv_len).any()):
        raise PlanMismatch(f"a request has {int(kv_len.max())} keys, the plan was made for max_kv_len={plan.max_kv_len}.")
    if reads_q_idx and plan.q_index == "absolute" and bool(((q_len > kv_len) & (q_len > 0)).any()):
        b = int((q_len > kv_len).nonzero()[0])
        raise ShapeMismatch(
            f"request {b} has q_len {int(q_len[b])} and kv_len {int(kv_len[b])}, and the variant reads q_idx, which counts "
            "from kv_len - q_len. kv_len includes the new keys: append them first, or make the variant with q_index='local'."
        )


def check_packed(plan: Plan, program: Program) -> None:
    """Keys are where kv_off says: one request after the other, and not in pages or in a copy; or where kv_slot and page say."""
    check_pages(program, plan.layout)
    if not uses_index(program, "kv_off"):
        return
    if plan.layout != "ragged":
        raise VariantError("the variant reads kv_off, and keys in pages have no rows. Index by b and kv_idx, or by kv_slot.")
    if plan.stage is not None and (plan.stage.changes_keys or plan.stage.gathers_bytes):
        raise VariantError("the variant reads kv_off, and this plan copies keys on their way. Capture kv_indptr instead.")


def check_query(plan: Plan, q: Tensor) -> None:
    """q is what the plan was made for."""
    check_is_tensor(q=q)
    check_not_nested("q", q)
    if q.layout is not torch.strided:
        raise UnsupportedDevice(f"q has layout {q.layout}, expected torch.strided. Convert it with .to_dense().")
    if q.dim() != 3:
        raise ShapeMismatch(
            f"q has shape {tuple(q.shape)}, expected [total_q, num_q_heads, head_dim]: the rows of all requests."
        )
    if q.shape[1:] != (plan.num_q_heads, plan.head_dim):
        raise PlanMismatch(
            f"q has {q.shape[1]} heads of head_dim {q.shape[2]}, the plan was made for num_q_heads={plan.num_q_heads} and "
            f"head_dim={plan.head_dim}. Make a plan for each head layout."
        )
    if q.shape[0] > plan.max_tokens:
        raise PlanMismatch(f"q has {q.shape[0]} rows, the plan was made for max_tokens={plan.max_tokens}.")
    if q.device != plan.device:
        raise UnsupportedDevice(f"q is on {q.device}, the plan on {plan.device}. Both must be on one device.")
    if q.dtype != plan.dtype:
        raise PlanMismatch(f"q has dtype {dtype_name(q.dtype)}, the plan was made for dtype={dtype_name(plan.dtype)}.")


def check_keys(plan: Plan, place: KeyPlace, tensors: tuple[Tensor, ...]) -> None:
    """k and v, paged or ragged, are what the plan was made for."""
    found = (place.num_kv_heads, place.head_dim, place.head_dim_v)
    if found != (plan.num_kv_heads, plan.head_dim, plan.head_dim_v):
        hint = ' Is kv_layout right ("NHD" or "HND")?' if place.page_size == plan.num_kv_heads else ""
        raise PlanMismatch(
            f"k and v have {found[0]} heads of head_dim {found[1]} and {found[2]}, the plan was made for "
            f"num_kv_heads={plan.num_kv_heads}, head_dim={plan.head_dim} and head_dim_v={plan.head_dim_v}.{hint}"
        )
    for t in tensors:
        if t.device != plan.device:
            raise UnsupportedDevice(f"k or v is on {t.device}, the plan on {plan.device}. All must be on one device.")
        if t.dtype != (plan.kv_dtype or plan.dtype):
            name, wanted = ("dtype", plan.dtype) if plan.kv_dtype is None else ("kv_dtype", plan.kv_dtype)
            raise PlanMismatch(f"k or v has dtype {dtype_name(t.dtype)}, the plan was made for {name}={dtype_name(wanted)}.")
    if plan.page_size is not None and place.page_size != plan.page_size:
        raise PlanMismatch(
            f"the kv cache has pages of {place.page_size} keys, the plan was made for page_size={plan.page_size}."
        )
    whole = 16 if stored_dtype(plan) else 8
    if plan.device.type == "cuda" and any(s % whole for s in place.strides):
        raise ShapeMismatch(
            f"k and v have strides {place.strides} (page, row, head of k, then of v), expected multiples of {whole} elements "
            "on cuda."
        )


def check_results(plan: Plan, q: Tensor, out: Tensor | None, lse: Tensor | None) -> None:
    """``out=`` and ``lse=`` are what the call would have allocated."""
    shape = (q.shape[0], plan.num_q_heads, plan.head_dim_v)
    if out is not None:
        if tuple(out.shape) != shape:
            raise ShapeMismatch(f"out has shape {tuple(out.shape)}, expected {shape}.")
        if out.dtype != q.dtype:
            raise UnsupportedDtype(f"out has dtype {dtype_name(out.dtype)}, q has {dtype_name(q.dtype)}. Both must match.")
        if out.device != q.device:
            raise UnsupportedDevice(f"out is on {out.device}, q is on {q.device}. Both must be on one device.")
        if out.stride(2) != 1 or (q.is_cuda and (out.stride(0) % 8 or out.stride(1) % 8)):
            raise ShapeMismatch(
                f"out has strides {tuple(out.stride())}, expected unit stride along head_dim, rows of 16 bytes."
            )
        check_own_rows(out)
    if lse is not None:
        if tuple(lse.shape) != shape[:2] or not lse.is_contiguous():
            raise ShapeMismatch(f"lse has shape {tuple(lse.shape)}, expected {shape[:2]}, contiguous.")
        if lse.dtype != torch.float32:
            raise UnsupportedDtype(f"lse has dtype {dtype_name(lse.dtype)}, expected float32.")
        if lse.device != q.device:
            raise UnsupportedDevice(f"lse is on {lse.device}, q is on {q.device}. Both must be on one device.")


def check_captures(plan: Plan, program: Program, values: list[object]) -> None:
    """Captured tensors are on the plan's device and reach as far as they are indexed without a clamp."""
    if len(values) == len(plan.checked_values) and all(a is b for a, b in zip(values, plan.checked_values, strict=True)):
        return
    for slot, value in zip(program.slots, values, strict=True):
        if slot.kind == "tensor" and value.device != plan.device:  # type: ignore[attr-defined]
            raise UnsupportedDevice(
                f"captured tensor '{slot.name}' is on {value.device}, the plan on {plan.device}. "  # type: ignore[attr-defined]
                f"Move it there before building the variant."
            )
    check_numbers(program, values)
    check_sink(program, values, plan.num_q_heads)
    for i, dim, index in direct_indices(program):
        least = _reach(plan, program.slots[i].name, index)
        size = values[i].shape[dim]  # type: ignore[attr-defined]
        if size < least:
            raise too_short(program.slots[i].name, dim, size, index, least, " in this plan")
    plan.checked_values = list(values)


def _reach(plan: Plan, name: str, index: str) -> int:
    """One more than the largest value of an index under this plan."""
    known = {"b": plan.num_requests, "h": plan.num_q_heads, "kv_h": plan.num_kv_heads, "d": plan.head_dim_v, "any": 1}
    if index in known:
        return known[index]
    counts_rows = index == "q_idx" and plan.q_index == "local"
    if plan.device.type == "cpu":
        return plan.longest_q if counts_rows else plan.longest_kv
    if counts_rows:
        return plan.max_tokens if plan.selection is not None else min(plan.max_q_len or plan.max_tokens, plan.max_tokens)
    if plan.max_kv_len is None:
        raise PlanMismatch(
            f"the variant reads '{name}' at {index}, and the plan was made without max_kv_len, so it cannot be checked that "
            "the tensor is long enough. Make the plan with max_kv_len=, the most keys a request may have."
        )
    return plan.max_kv_len
