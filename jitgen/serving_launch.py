"""Running a prepared serving call: results, arguments, launches. This is what a step of a model pays for in every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from jitgen import runtime
from jitgen.errors import PlanMismatch, UnsupportedDevice
from jitgen.program import Program
from jitgen.serving_checks import check_captures, check_query, check_results
from jitgen.serving_kernels import pack_own, stream_of, tail_words
from jitgen.serving_plan import Plan, check_lse

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # a torch without it, or with another of its kind
    TensorGuards = None

Tensor = torch.Tensor
current_device = getattr(torch._C, "_cuda_getDevice", None)  # absent from a torch for CPUs
current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)

# Of one kernel: the kernel, the fields workspace and plan, and the packed fields from local_rows on but for captures.
Launches = tuple[tuple[runtime.CompiledKernel, int, int, bytes], ...]


@dataclass(frozen=True, slots=True)
class PreparedCall:
    """Everything about a call that depends on shapes, strides and dtypes only."""

    program: Program
    kernels: tuple[runtime.CompiledKernel, ...]
    merge: runtime.CompiledKernel | None  # joins what the kernels have left of each row, where they take requests in parts
    page_size: int
    v_offset: int  # bytes
    numbers: tuple[int, int, int, int]  # fields num_q_heads, num_kv_heads; page_size, num_pages
    scale: float
    q_stride: tuple[int, ...]
    o_stride: tuple[int, ...]  # of an output that the call allocates
    kv_stride: tuple[int, ...]
    launches: Launches  # for such an output
    mask_slots: tuple[tuple[int, int], ...]  # of the plan's program and of this one: what the mask reads
    q_factor: float  # of what the kernel gets as q; 1.0 but for scales that are not positive
    on_host: bool
    has_tensors: bool  # among the captures
    out_like_q: bool  # the output is laid out as torch.empty_like(q) would be


@dataclass(frozen=True, slots=True)
class RecentCall:
    """The last call of a plan. One whose tensors look like its own needs neither a key nor a table."""

    call: PreparedCall
    options: tuple[object, ...]
    looks_same: Callable[..., bool]  # of the tensors of a call
    total_q: int

    @classmethod
    def of(cls, call: PreparedCall, options: tuple[object, ...], *tensors: Tensor) -> RecentCall | None:
        """A record of a call, which costs a microsecond: where torch has guards, they compare in 0.3 us and not in 1 us.

        There is none for tensors that require grad: whether they may be used depends on more than their looks.
        """
        total_q = tensors[0].shape[0]
        if any(t.requires_grad for t in tensors):
            return None
        if TensorGuards is not None:
            sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
            guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
            return cls(call, options, guards.check, total_q)

        def looks_of(tensors: tuple[Tensor, ...]) -> list[object]:
            return [(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors]

        looks = looks_of(tensors)
        return cls(call, options, lambda *others: looks == looks_of(others), total_q)


KeyAddresses = tuple[int, int, int, int, int]  # k, v, kv_start, pages; and the field page_list_stride


def launches_of(
    plan: Plan,
    kernels: tuple[runtime.CompiledKernel, ...],
    scale: float,
    q_stride: tuple[int, ...],
    o_stride: tuple[int, ...],
    kv_stride: tuple[int, ...],
) -> Launches:
    """What the plan and the shapes of a call fix about its launches."""
    return tuple(
        (kernel, *c.addresses, c.fixed(plan, c.programmatic, scale, (*q_stride, *o_stride, *kv_stride)))
        for kernel, c in zip(kernels, plan.classes, strict=True)
    )


def run(
    plan: Plan,
    call: PreparedCall,
    values: list[object],
    q: Tensor,
    total_q: int,
    keys: KeyAddresses,
    scales: list[object],
    want_lse: bool,
    out: Tensor | None,
    lse: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Check what the plan knows of the batch, allocate the results, and start the kernels on the current stream."""
    if total_q > plan.max_tokens or total_q < plan.rows:
        check_query(plan, q)
        raise PlanMismatch(f"q has {total_q} rows, plan.update was given {plan.rows}. Both must match, but for padding.")
    launches = call.launches
    if out is not None or lse is not None:
        launches = _check_results(plan, call, q, out, lse)
    if out is None:
        out = torch.empty_like(q) if call.out_like_q else q.new_empty((total_q, plan.num_q_heads, plan.head_dim_v))
    if want_lse or lse is not None:
        check_lse(call.program)
        lse = q.new_empty((total_q, plan.num_q_heads), dtype=torch.float32) if lse is None else lse
    if plan.batch and total_q:
        if call.mask_slots:
            plan.check_values(call.mask_slots, call.program, values)
        if call.has_tensors:
            check_captures(plan, call.program, values)
        if call.q_factor != 1.0:
            q = _copy(q).mul_(call.q_factor)
        lse_at = 0 if lse is None else lse.data_ptr()
        results, tail = (out.data_ptr(), lse_at), scales
        if call.merge is not None:
            launches, results = call.launches, plan.segments.addresses  # type: ignore[union-attr]
        if values or call.merge is not None:
            tail = tail_words(plan, call.program, values, scales)
        _launch(plan, call, total_q, q, keys, results, launches, tail)
        if call.merge is not None:
            o_stride = out.stride()[:2]
            _merge(plan, call, (out.data_ptr(), lse_at), total_q, (*o_stride, *runtime.capture_words(call.program, values)))
    return (out, lse) if want_lse else out  # type: ignore[return-value]


def _check_results(plan: Plan, call: PreparedCall, q: Tensor, out: Tensor | None, lse: Tensor | None) -> Launches:
    """``out=`` and ``lse=`` are as they must be; returns the launches for the strides of ``out``."""
    given = (q.shape[0], q.dtype, *[t if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in (out, lse)])
    if given != plan.checked_results:
        check_results(plan, q, out, lse)
        plan.checked_results = given
    if out is None or out.stride()[:2] == call.o_stride:
        return call.launches
    return launches_of(plan, call.kernels, call.scale, call.q_stride, out.stride()[:2], call.kv_stride)


def _aligned(q: Tensor, keys: int, out: int) -> Tensor:
    """A copy of q that starts at a multiple of 16 bytes; a cache is too large to be copied."""
    if out & 15:
        raise UnsupportedDevice("the memory of out does not start at a multiple of 16 bytes, which the cuda kernels need.")
    if keys & 15:
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
    numbers = (stream, threads, plan.num_requests, *call.numbers[:2], total_q, segments.levels, segments.max_tokens,
               plan.q_index == "local", call.scale)  # fmt: skip
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
    total_q: int,
    q: Tensor,
    keys: KeyAddresses,
    results: tuple[int, int],
    launches: Launches,
    tail: list[object],
) -> None:
    """Start every kernel of the plan, in order, on the current stream. ``results``: fields o and lse; ``tail``: the last."""
    k, v, kv_start, pages, list_stride = keys
    out, lse = results
    q_at, stream, threads = q.data_ptr(), 0, 0
    if call.on_host:
        threads = torch.get_num_threads()
    else:
        index = plan.device_index
        if index != current_device():
            with torch.cuda.device(index):
                return _launch(plan, call, total_q, q, keys, results, launches, tail)
        if (q_at | k | v | out) & 15:
            q = _aligned(q, k | v, out)
            q_at = q.data_ptr()
        stream = current_stream(index)
    last = launches[0][0].pack_tail(tail)
    q_indptr, kv_len = plan.lengths
    num_q_heads, num_kv_heads, page_size, num_pages = call.numbers
    for kernel, workspace, planned, fixed in launches:
        own = pack_own(q_at, k, v, out, lse, workspace, planned, q_indptr, kv_len, kv_start, pages, stream, threads,
                       plan.batch, num_q_heads, num_kv_heads, total_q, page_size, num_pages, list_stride)  # fmt: skip
        code = kernel.launch(own + fixed + last)
        if code:
            kernel.raise_error(code)
