"""Running a prepared serving call: results, arguments, launches. This is what a step of a model pays for in every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from jitgen import runtime
from jitgen.checks import check_is_tensor
from jitgen.errors import PlanMismatch, UnsupportedDevice
from jitgen.program import Program
from jitgen.serving_checks import check_captures, check_query, check_results
from jitgen.serving_kernels import KernelClass, pack_batch, pack_launch, tail_words
from jitgen.serving_lists import KVLists
from jitgen.serving_plan import Plan, check_lse
from jitgen.serving_segments import Beside
from jitgen.serving_slots import check_slots, page_words
from jitgen.streams import call_and_leave, current_stream, make_current, stream_of

try:
    from torch._C._dynamo.guards import _empty_strided_cuda
except ImportError:  # a torch without it, or for CPUs
    _empty_strided_cuda = None

Tensor = torch.Tensor
Launches = tuple[tuple[runtime.CompiledKernel, KernelClass, bytes], ...]  # a kernel, its class, the run ``fixed`` of its fields
Blocks = tuple[tuple[runtime.CompiledKernel, bytes, bytes], ...]  # a kernel, the runs ``memory``, and ``batch`` and ``fixed``
KeyAddresses = tuple[int, int, int, int]  # the fields k, v, kv_start, pages


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
    reads_pages: bool  # hooks do, or transforms of rows
    is_plain: bool  # q goes to the kernels as it is, and they write the results


@dataclass(frozen=True, slots=True)
class RecentCall:
    """The last call of a plan, ready to be made again: one with its options and page table, whose tensors look like its own,
    lacks nothing but addresses."""

    call: PreparedCall
    options: tuple[object, ...]
    looks_same: Callable[..., bool]  # of the tensors of a call
    total_q: int
    version: int  # of the plan: lengths are those of this update
    table: object  # what the call was given as page table, if it may be taken for ``lists`` again; None for ragged keys
    lists: KVLists | None
    lists_at: tuple[int, int] | None  # the fields kv_start and pages; None where each call makes them anew
    blocks: Blocks  # none where there is nothing to do
    new_out: Callable[[], Tensor]  # with the plan's device current
    start: Callable[[Tensor, Tensor, Tensor], Tensor | None] | None  # see starter_of


def launches_of(
    plan: Plan,
    kernels: tuple[runtime.CompiledKernel, ...],
    scale: float,
    q_stride: tuple[int, ...],
    o_stride: tuple[int, ...],
    kv_stride: tuple[int, ...],
) -> Launches:
    """What the plan and the shapes of a call fix about its launches."""
    launches = []
    for kernel, c in zip(kernels, plan.classes, strict=True):
        strides = (*q_stride, *o_stride, *(plan.stage.strides if c.staged else kv_stride))
        launches.append((kernel, c, c.fixed(plan, c.programmatic, scale, strides)))
    return tuple(launches)


def blocks_of(plan: Plan, call: PreparedCall, launches: Launches, total_q: int, list_strides: tuple[int, int]) -> Blocks:
    """What the lengths of the plan fix besides."""
    if plan.batch == 0 or total_q == 0:
        return ()
    num_q_heads, num_kv_heads, page_size, num_pages = call.numbers
    own = plan.batch, num_q_heads, num_kv_heads, total_q
    batch = pack_batch(*own, page_size, num_pages, *list_strides)
    if plan.stage is None:
        return tuple((kernel, c.memory(plan), batch + fixed) for kernel, c, fixed in launches)
    staged = pack_batch(*own, 0, plan.stage.capacity, 0, 0)
    return tuple((kernel, c.memory(plan), (staged if c.staged else batch) + fixed) for kernel, c, fixed in launches)


def check_rows(plan: Plan, q: Tensor) -> int:
    """Rows of q, which the plan must have been made and updated for."""
    total_q = q.shape[0]
    if total_q > plan.max_tokens or total_q < plan.rows:
        check_query(plan, q)
        raise PlanMismatch(f"q has {total_q} rows, plan.update was given {plan.rows}. Both must match, but for padding.")
    return total_q


def maker_of(plan: Plan, total_q: int) -> Callable[[], Tensor]:
    """What allocates an output, with the plan's device current."""
    shape = (total_q, plan.num_q_heads, plan.head_dim_v)
    if plan.device_index is None or _empty_strided_cuda is None:
        return partial(torch.empty, shape, dtype=plan.dtype, device=plan.device)
    strides = (plan.num_q_heads * plan.head_dim_v, plan.head_dim_v, 1)
    return partial(_empty_strided_cuda, shape, strides, plan.dtype)  # 1.1 us: torch.empty_like takes 1.7, and others more


def starter_of(
    plan: Plan, call: PreparedCall, blocks: Blocks, lists_at: tuple[int, int] | None, new_out: Callable[[], Tensor]
) -> Callable[[Tensor, Tensor, Tensor], Tensor | None] | None:
    """A call without captured values, scales and results to write to, as a function of q, k and v that returns the output.

    The function does what ``run`` does, with all that it knows bound to it: 0.5 us less. It returns None, with nothing done,
    where memory is not aligned. There is none for the CPU, and for what is more than launches.
    """
    index = plan.device_index
    if index is None or not blocks or lists_at is None or not call.is_plain:
        return None
    (kv_start, pages), v_offset = lists_at, call.v_offset
    launches = [(kernel, kernel.launch, memory, rest) for kernel, memory, rest in blocks]

    def start(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        q_at, k_at = q.data_ptr(), k.data_ptr()
        v_at = k_at + v_offset if v is k else v.data_ptr()
        if (q_at | k_at | v_at) & 15:
            return None
        before = make_current(index)
        if before != index:
            return call_and_leave(before, start, q, k, v)
        out = new_out()
        out_at, stream = out.data_ptr(), current_stream(index)
        for kernel, launch, memory, rest in launches:
            code = launch(pack_launch(q_at, k_at, v_at, out_at, 0, memory, kv_start, pages, stream, 0, rest))
            if code:
                kernel.raise_error(code)
        return out

    return start


def run(
    plan: Plan,
    recent: RecentCall,
    values: list[object],
    q: Tensor,
    keys: KeyAddresses,
    scales: list[object],
    want_lse: bool,
    out: Tensor | None,
    lse: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Allocate the results, check what they and captured values can be wrong about, and start the kernels."""
    index = plan.device_index
    before = None if index is None else make_current(index)
    if before != index:
        return call_and_leave(before, run, plan, recent, values, q, keys, scales, want_lse, out, lse)
    call, blocks = recent.call, recent.blocks
    if out is not None or lse is not None:
        blocks = _check_results(plan, recent, q, out, lse)
    if out is None:
        out = recent.new_out()
    if want_lse or lse is not None:
        check_lse(call.program)
        lse = q.new_empty((recent.total_q, plan.num_q_heads), dtype=torch.float32) if lse is None else lse
    if blocks:
        lse_at = 0 if lse is None else lse.data_ptr()
        if call.is_plain and not values and not scales:
            _start(call, index, blocks, q, keys, out.data_ptr(), lse_at)
        else:
            _run_with_values(plan, recent, blocks, values, q, keys, scales, out, lse_at)
    return (out, lse) if want_lse else out  # type: ignore[return-value]


def _run_with_values(
    plan: Plan,
    recent: RecentCall,
    blocks: Blocks,
    values: list[object],
    q: Tensor,
    keys: KeyAddresses,
    scales: list[object],
    out: Tensor,
    lse_at: int,
) -> None:
    """Start the kernels for captured values or scales, for a q that must be changed, or for requests in parts."""
    call = recent.call
    if call.mask_slots:
        plan.check_values(call.mask_slots, call.program, values)
    if call.has_tensors:
        check_captures(plan, call.program, values)
    of_pages: list[object] = []
    if call.reads_pages:
        _, _, page_size, num_pages = call.numbers
        check_slots(call.program, values, num_pages, page_size)
        of_pages = page_words(keys[3], keys[2], list_strides_of(plan, recent.lists), page_size)
    if plan.stage is not None:
        plan.stage.check_captures(call.program, values)
        q = plan.stage.transform_q(call.program, values, q) if plan.stage.changes_q else q
    if call.q_factor != 1.0:
        q = _copy(q).mul_(call.q_factor)
    segments, results, beside = plan.segments, (out.data_ptr(), lse_at), None
    if segments is not None:
        blocks, results, beside = recent.blocks, segments.addresses, segments.beside
    if plan.stage is not None:
        _start_staged(plan, recent, blocks, values, q, keys, results, scales, of_pages)
    else:
        words = tail_words(plan, call.program, values, scales + of_pages)
        tail = blocks[0][0].pack_tail(words) if words else b""
        _start(call, plan.device_index, blocks, q, keys, *results, tail, beside)
    if call.merge is not None:
        captures = runtime.capture_words(call.program, values)
        _merge(plan, call, (out.data_ptr(), lse_at), recent.total_q, (*out.stride()[:2], *captures))


def _check_results(plan: Plan, recent: RecentCall, q: Tensor, out: Tensor | None, lse: Tensor | None) -> Blocks:
    """``out=`` and ``lse=`` are as they must be; returns the blocks for the strides of ``out``."""
    check_is_tensor(**{name: t for name, t in (("out", out), ("lse", lse)) if t is not None})
    call = recent.call
    given = (q.shape[0], q.dtype, *[t if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in (out, lse)])
    if given != plan.checked_results:
        check_results(plan, q, out, lse)
        plan.checked_results = given
    if out is None or out.stride()[:2] == call.o_stride:
        return recent.blocks
    launches = launches_of(plan, call.kernels, call.scale, call.q_stride, out.stride()[:2], call.kv_stride)
    return blocks_of(plan, call, launches, recent.total_q, list_strides_of(plan, recent.lists))


def list_strides_of(plan: Plan, lists: KVLists | None) -> tuple[int, int]:
    """The fields page_list_stride and head_list_stride."""
    return (0, 0) if lists is None or plan.segments is not None else (lists.list_stride, lists.head_stride)


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
    stream, threads = stream_of(plan.device_index), torch.get_num_threads() if call.on_host else 0
    numbers = (stream, threads, plan.num_requests, *call.numbers[:2], total_q, segments.levels, segments.max_tokens,
               plan.q_index == "local", call.scale)  # fmt: skip
    packed = kernel.pack(*segments.addresses, *results, *segments.row_addresses, *numbers, *rest)
    code = kernel.launch(packed)
    if code:
        kernel.raise_error(code)


def _start(
    call: PreparedCall,
    index: int | None,
    blocks: Blocks,
    q: Tensor,
    keys: KeyAddresses,
    out: int,
    lse: int,
    tail: bytes = b"",
    beside: Beside | None = None,
) -> None:
    """Start every kernel, in order, on the current stream. ``tail``: the last fields; ``beside``: for the second of two."""
    k, v, kv_start, pages = keys
    q_at, threads, stream = q.data_ptr(), 0, 0
    if index is None:
        threads = torch.get_num_threads()
    else:
        stream = current_stream(index)
        if (q_at | k | v | out) & 15:
            q = _aligned(q, k | v, out)
            q_at = q.data_ptr()
    on = stream
    if beside is not None and len(blocks) > 1:
        on, blocks = beside.fork(), blocks[::-1]  # the prefill kernel first
    for kernel, memory, rest in blocks:
        code = kernel.launch(pack_launch(q_at, k, v, out, lse, memory, kv_start, pages, on, threads, rest) + tail)
        if code:
            kernel.raise_error(code)
        on = stream
    if beside is not None and len(blocks) > 1:
        beside.join()


def _start_staged(
    plan: Plan,
    recent: RecentCall,
    blocks: Blocks,
    values: list[object],
    q: Tensor,
    keys: KeyAddresses,
    results: tuple[int, int],
    scales: list[object],
    of_pages: list[object],
) -> None:
    """As ``_start``, where kernels differ in the keys that they read; those of the plan's stage are put there first."""
    call, stage = recent.call, plan.stage
    assert stage is not None
    program, list_stride = call.program, list_strides_of(plan, recent.lists)[0]
    if any(c.staged for c in plan.classes):
        stage.gather(program, values, call.numbers, call.kv_stride, keys, list_stride, scales)
    in_stage = stage.k.data_ptr(), stage.v.data_ptr(), stage.start.data_ptr(), 0
    for c, block in zip(plan.classes, blocks, strict=True):
        own = c.words(plan, program, scales) + (of_pages if block[0].spec.reads_pages else [])
        words = tail_words(plan, program, values, own)
        tail = block[0].pack_tail(words) if words else b""
        _start(call, plan.device_index, (block,), q, in_stage if c.staged else keys, *results, tail)
