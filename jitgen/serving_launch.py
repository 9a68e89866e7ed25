"""Running a prepared serving call: results, arguments, launches. This is what a step of a model pays for in every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jitgen import runtime
from jitgen.checks import check_grad
from jitgen.errors import PlanMismatch, UnsupportedDevice
from jitgen.program import Program
from jitgen.serving_checks import check_captures, check_query, check_results
from jitgen.serving_kernels import KernelClass, stream_of
from jitgen.serving_plan import Plan, check_lse

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class PreparedCall:
    """Everything about a call that depends on shapes, strides and dtypes only."""

    program: Program
    kernels: tuple[runtime.CompiledKernel, ...]
    merge: runtime.CompiledKernel | None  # joins what the kernels have left of each row, where they take requests in parts
    page_size: int
    v_offset: int  # bytes
    heads: tuple[int, int]  # fields num_q_heads and num_kv_heads
    pages: tuple[int, int]  # fields page_size and num_pages
    head: tuple[float | int, ...]  # fields split to q_stride_h
    o_stride: tuple[int, int]  # of an output that the call allocates
    kv_stride: tuple[int, ...]
    local_rows: bool
    mask_slots: tuple[tuple[int, int], ...]  # of the plan's program and of this one: what the mask reads
    q_factor: float  # of what the kernel gets as q; 1.0 but for scales that are not positive
    on_host: bool
    has_tensors: bool
    out_like_q: bool  # the output is laid out as torch.empty_like(q) would be


KeyAddresses = tuple[int, int, int, int, int]  # k, v, kv_start, pages; and the field page_list_stride


def run(
    plan: Plan,
    call: PreparedCall,
    values: list[object],
    q: Tensor,
    keys: KeyAddresses,
    want_lse: bool,
    out: Tensor | None,
    lse: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Check what the plan knows of the batch, allocate the results, and start the kernels on the current stream."""
    total_q = q.shape[0]
    if total_q > plan.max_tokens or total_q < plan.rows:
        check_query(plan, q)
        raise PlanMismatch(f"q has {total_q} rows, plan.update was given {plan.rows}. Both must match, but for padding.")
    if q.requires_grad:
        check_grad(q, q, q)
    o_stride = call.o_stride
    if out is not None or lse is not None:
        given = (total_q, q.dtype, *[t if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in (out, lse)])
        if given != plan.checked_results:
            check_results(plan, q, out, lse)
            plan.checked_results = given
    if out is not None:
        o_stride = out.stride()[:2]
    elif call.out_like_q:
        out = torch.empty_like(q)
    else:
        out = q.new_empty((total_q, plan.num_q_heads, plan.head_dim_v))
    if want_lse or lse is not None:
        check_lse(call.program)
        lse = q.new_empty((total_q, plan.num_q_heads), dtype=torch.float32) if lse is None else lse
    if plan.batch and total_q:
        if call.mask_slots:
            plan.check_values(call.mask_slots, call.program, values)
        given_values = values
        if call.has_tensors:
            check_captures(plan, call.program, values)
            values = runtime.capture_words(call.program, values)
        if call.q_factor != 1.0:
            q = _copy(q).mul_(call.q_factor)
        if not call.on_host and (q.data_ptr() | keys[0] | keys[1] | out.data_ptr()) & 15:
            q = _aligned(q, keys, out)
        pointers = (q.data_ptr(), keys[0], keys[1], out.data_ptr(), 0 if lse is None else lse.data_ptr())
        numbers = (plan.batch, *call.heads, total_q, *call.pages, keys[4], call.local_rows)
        lengths = (*plan.lengths, keys[2], keys[3])
        if call.merge is None:
            _launch(plan, call, pointers, lengths, numbers, (*call.head, *o_stride, *call.kv_stride, *values))
        else:
            states = plan.segments
            rest = (*call.head, *call.o_stride, *call.kv_stride, *states.fields(call.program, given_values))  # type: ignore[union-attr]
            _launch(plan, call, (*pointers[:3], *states.addresses), lengths, numbers, rest)  # type: ignore[union-attr]
            _merge(plan, call, pointers[3:], total_q, (*o_stride, *values))
    return (out, lse) if want_lse else out  # type: ignore[return-value]


def _aligned(q: Tensor, keys: KeyAddresses, out: Tensor) -> Tensor:
    """A copy of q that starts at a multiple of 16 bytes; a cache is too large to be copied."""
    if out.data_ptr() & 15:
        raise UnsupportedDevice("the memory of out does not start at a multiple of 16 bytes, which the cuda kernels need.")
    if (keys[0] | keys[1]) & 15:
        raise UnsupportedDevice(
            "the memory of k or v does not start at a multiple of 16 bytes, which the cuda kernels need. "
            "Allocate the cache as a tensor of its own, or slice it at such a place."
        )
    return _copy(q)


def _copy(t: Tensor) -> Tensor:
    """A copy with the same strides: what was prepared for a call holds for it."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)


def _merge(plan: Plan, call: PreparedCall, results: tuple[int, ...], total_q: int, rest: tuple[object, ...]) -> None:
    """Join the states that the kernels have left of each row, on the current stream. ``rest``: fields from o_stride_s on."""
    kernel, segments = call.merge, plan.segments
    assert kernel is not None and segments is not None
    stream, threads = (0, torch.get_num_threads()) if call.on_host else (stream_of(plan.device), 0)
    numbers = (stream, threads, plan.num_requests, *call.heads, total_q, segments.levels, segments.max_tokens,
               plan.q_index == "local", call.head[2])  # fmt: skip
    packed = kernel.pack(*segments.addresses, *results, *segments.row_addresses, *numbers, *rest)
    if call.on_host or plan.device.index == torch._C._cuda_getDevice():
        code = kernel.launch(packed)
    else:
        with torch.cuda.device(plan.device.index):
            code = kernel.launch(packed)
    if code:
        kernel.raise_error(code)


def _launch(
    plan: Plan,
    call: PreparedCall,
    pointers: tuple[int, ...],
    lengths: tuple[int, ...],
    numbers: tuple[int, ...],
    rest: tuple[object, ...],
) -> None:
    """Start every kernel of the plan, in order, on the current stream. The tuples are runs of fields of SERVING_ARGS."""
    if call.on_host:
        kernel = call.kernels[0]
        code = kernel.launch(kernel.pack(*pointers, 0, 0, *lengths, 0, torch.get_num_threads(), *numbers, 0, 0, *rest))
        if code:
            kernel.raise_error(code)
        return
    index = plan.device.index
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return _launch(plan, call, pointers, lengths, numbers, rest)
    stream = torch._C._cuda_getCurrentRawStream(index)
    beside = None if plan.segments is None or len(plan.classes) < 2 else plan.segments.beside
    for kernel, c in zip(call.kernels, plan.classes, strict=True) if beside is None else _prefill_first(plan, call):
        on = stream if beside is None or c is not plan.classes[-1] else beside.fork()
        packed = kernel.pack(*pointers, *c.addresses, *lengths, on, 0, *numbers, c.num_ctas, c.class_rows, *rest)
        code = kernel.launch(packed)
        if code:
            kernel.raise_error(code)
    if beside is not None:
        beside.join()


def _prefill_first(plan: Plan, call: PreparedCall) -> list[tuple[runtime.CompiledKernel, KernelClass]]:
    """Kernels and classes in the order in which kernels that run beside each other are launched."""
    return list(zip(call.kernels, plan.classes, strict=True))[::-1]
