"""Dense calls of few rows over many keys on a GPU: by the decode kernel of plans, which cuts the keys among the CTAs.

A dense batch is a paged one in which the keys of each request are one page. The planner runs where lengths have changed, or
what the mask reads; the layers of a model share what it wrote.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable

import torch

from jitgen import runtime
from jitgen.checks import dtype_name
from jitgen.errors import KernelNotPrebuilt, ToolchainMissing
from jitgen.families import serving_spec
from jitgen.graph_capture import GraphTable, capture_number, memory_apart
from jitgen.ir import PACKED, walk
from jitgen.program import Program, uses_index
from jitgen.serving_checks import MAX_CUDA_BATCH
from jitgen.serving_kernels import (
    ALL_ROWS,
    DECODE_ROWS,
    FILLS,
    NUM_STRIDES,
    can_overlap,
    measure,
    pack_batch,
    pack_fixed,
    pack_launch,
    pack_memory,
    pack_planner,
)
from jitgen.spec import CUDA_DTYPES, KernelSpec
from jitgen.streams import call_on, current_stream

Tensor = torch.Tensor
LEAST_KEYS = 512  # of a request
# Query heads of all requests that keep a GPU busy as they are, where none shares its keys with another. Those that do are 1.5
# times as slow in the other kernels, which read their keys once for each.
MANY_HEADS = 256
MAX_ROOMS = 64  # that are kept, each of some MB, besides those of CUDA graphs
ALIGNMENT = 256  # bytes


def split_call(
    program: Program, q: Tensor, k: Tensor, v: Tensor, o_stride: tuple[int, ...], scale: float, local: bool
) -> SplitCall | None:
    """The call by the decode kernel; None where that is slower, cannot be made so, or has no kernel on a machine that compiles
    none.

    Shapes:  as jitgen.attention.
    Errors:  CompileError, CacheError.
    """
    if not pays(q.shape, k.shape) or not can_split(program, q, k, v, o_stride):
        return None
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    head_dims = q.shape[3], v.shape[3]
    spec = serving_spec(program, dtype_name(q.dtype), head_dims, q.device, "paged", family="decode", rows=rows)
    kernel = find_kernel(spec)
    return None if kernel is None else SplitCall(kernel, q, k, v, scale, local)


def find_kernel(spec: KernelSpec) -> runtime.CompiledKernel | None:
    """The decode kernel; None on a machine that has none and compiles none, where the kernel for any lengths may be there. It
    is looked for once: a step of a model has a new length."""
    key = spec.digest, spec.target
    if key in _absent:
        return None
    try:
        return runtime.get_kernel(spec)
    except (KernelNotPrebuilt, ToolchainMissing):
        _absent.add(key)
        return None


def pays(q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> bool:
    """Whether keys are worth cutting: there are many, for few rows."""
    (batch, num_q_heads, q_len, _), (_, num_kv_heads, kv_len, _) = q_shape, k_shape
    is_busy = num_q_heads == num_kv_heads and batch * num_q_heads >= MANY_HEADS
    return 0 < q_len * num_q_heads <= DECODE_ROWS * num_kv_heads and kv_len >= LEAST_KEYS and not is_busy


def is_divisible(program: Program) -> bool:
    """Whether the decode kernel computes what the dense one does, from parts of the keys."""
    is_joined = program.can_split or program.norm.adds_up  # type: ignore[union-attr]
    return is_joined and program.rows is None and not any(uses_index(program, name) for name in PACKED)


def can_split(program: Program, q: Tensor, k: Tensor, v: Tensor, o_stride: tuple[int, ...]) -> bool:
    """Whether the decode kernel computes the same, and from tensors that lie like these."""
    batch, _, q_len, _ = q.shape
    if dtype_name(q.dtype) not in CUDA_DTYPES or not 0 < batch <= MAX_CUDA_BATCH or not is_divisible(program):
        return False
    # the rows of all requests are one after the other, and the heads of keys apart
    has_rows = all(batch == 1 or q_len == 1 or stride[0] == q_len * stride[2] for stride in (q.stride(), o_stride))
    has_heads = all(t.shape[1] == 1 or t.stride(1) for t in (k, v))
    return has_rows and has_heads and is_shared(k, batch) == is_shared(v, batch)


def is_shared(t: Tensor, batch: int) -> bool:
    """Whether all requests have the same keys or values."""
    return batch > 1 and (t.shape[0] == 1 or t.stride(0) == 0)


class SplitCall:
    """Everything about a call that depends on shapes, strides and dtypes only."""

    def __init__(self, kernel: runtime.CompiledKernel, q: Tensor, k: Tensor, v: Tensor, scale: float, local: bool) -> None:
        self.kernel, self.device = kernel, q.device
        self.batch, num_q_heads, self.q_len, _ = q.shape
        _, num_kv_heads, self.kv_len, _ = k.shape
        self.is_shared = is_shared(k, self.batch)
        self.sizes = self.batch, num_q_heads, num_kv_heads, self.batch * self.q_len
        pages, list_stride = (1, 0) if self.is_shared else (self.batch, 1)
        self._batch = pack_batch(*self.sizes, self.kv_len, pages, list_stride, 0)
        self._local, self._scale = bool(local), scale
        self._q_stride = self._row_strides(q.stride())
        self._kv_stride = tuple(t.stride(axis) for t in (k, v) for axis in (0, 2, 1))
        read = [(n.op, int(str(n.attr))) for n in walk(kernel.spec.program.mask) if n.op in ("scalar", "load")]
        self._mask_numbers = tuple(dict.fromkeys(slot for op, slot in read if op == "scalar"))
        self._mask_reads_tensors = any(op == "load" for op, _ in read)

    def _row_strides(self, stride: tuple[int, ...]) -> tuple[int, int]:
        """Elements between rows, over all requests, and between heads."""
        return stride[0] if self.q_len == 1 else stride[2], stride[1]

    def start(self, inputs: tuple[int, ...], out: Tensor, lse: Tensor | None, tail: bytes, values: list[object]) -> None:
        """Launch on the current stream of the device. ``inputs``: addresses of q, k and v.

        Shapes:  out [batch, num_q_heads, q_len, head_dim_v], lse [batch, num_q_heads, q_len].
        Errors:  LaunchError.
        """
        rows, stats = out, lse
        has_rows = self.batch == 1 or self.q_len == 1 or out.stride(0) == self.q_len * out.stride(2)
        if not has_rows or out.data_ptr() & 15:
            rows = out.new_empty(self.batch, self.q_len, *out.shape[1::2]).transpose(1, 2)
        if lse is not None and self.q_len > 1:
            stats = lse.new_empty(self.batch, self.q_len, lse.shape[1]).transpose(1, 2)
        call_on(self.device.index, self._launch, inputs, rows, stats, tail, values)
        if rows is not out:
            out.copy_(rows)
        if stats is not lse:
            lse.copy_(stats)  # type: ignore[union-attr, arg-type]

    def _launch(self, inputs: tuple[int, ...], out: Tensor, lse: Tensor | None, tail: bytes, values: list[object]) -> None:
        """``start``, with the device current and results whose rows follow each other over all requests."""
        stream = current_stream(self.device.index)
        room = self._room(stream, capture_number(stream), tail)
        addresses = *inputs, out.data_ptr(), 0 if lse is None else lse.data_ptr()
        with room.lock:  # another thread may plan for other lengths
            self._plan(room, stream, tail, tuple(values[slot] for slot in self._mask_numbers))
            strides = self._q_stride + self._row_strides(out.stride()) + self._kv_stride
            numbers = self._batch + self._fixed(room.num_ctas, can_overlap(), strides)
            code = self.kernel.launch(pack_launch(*addresses, room.memory, 0, room.pages.data_ptr(), stream, 0, numbers) + tail)
        if code:
            self.kernel.raise_error(code)

    def _fixed(self, num_ctas: int, programmatic: bool = False, strides: tuple[int, ...] = (0,) * NUM_STRIDES) -> bytes:
        return pack_fixed(self._local, num_ctas, ALL_ROWS, 1, programmatic, self._scale, *strides)

    def _room(self, stream: int, capture: int, tail: bytes) -> Room:
        """The memory for this call, made when it is first needed."""
        key = (self.kernel, self.sizes, self.is_shared, self.device.index, stream)
        rooms = _captured.of(capture, stream) if capture else _rooms
        room = rooms.get(key)
        if room is None:
            _captured.drop()
            if not capture and len(rooms) >= MAX_ROOMS:
                rooms.clear()
            with torch.inference_mode(False):  # what is made in that mode cannot be changed outside of it
                room = rooms[key] = Room(self, stream, tail, is_captured=bool(capture))
        return room

    def planner_args(self, num_ctas: int, memory: bytes, stream: int, tail: bytes) -> bytes:
        """Arguments of the planner."""
        return pack_planner(self.sizes, memory, self._fixed(num_ctas), stream) + tail

    def _plan(self, room: Room, stream: int, tail: bytes, mask_numbers: tuple[object, ...]) -> None:
        """Plan for the lengths of this call, unless that has been done."""
        wanted = (self.kv_len, self._local, mask_numbers)
        if wanted == room.planned and not self._mask_reads_tensors:
            return
        room.planned = None
        room.take_length(self.kv_len)
        code = self.kernel.function("jitgen_plan")(self.planner_args(room.num_ctas, room.memory, stream, tail))
        if code:
            self.kernel.raise_error(code)
        room.planned = wanted


class Room:
    """Memory of the calls of one kernel for one batch on one stream, or in one CUDA graph: these follow each other.

    It is none of a graph's own, so a graph of torch.compile finds no memory of its pool in use that it knows nothing of.
    """

    def __init__(self, call: SplitCall, stream: int, tail: bytes, *, is_captured: bool) -> None:
        batch = call.batch
        self.lock = threading.Lock()
        self.planned: tuple[object, ...] | None = None
        self._kv_len = 0
        no_memory = pack_memory(0, 0, 0, 0)
        # the device is current
        self.num_ctas, sizes = measure(call.kernel, None, lambda ctas: call.planner_args(ctas, no_memory, stream, tail))
        places = [-(-size // ALIGNMENT) * ALIGNMENT for size in (*sizes, 4 * batch + 4, 4 * batch, 4 * batch)]
        memory = memory_apart(sum(places), call.device, None if is_captured else stream)
        plan, workspace, starts, lengths, pages = (t.view(torch.int32) for t in memory.split(places))
        self.pages, self._lengths = pages[:batch], lengths[:batch]
        torch.arange(0, (batch + 1) * call.q_len, call.q_len, out=starts[: batch + 1], device=call.device)
        torch.arange(batch, out=self.pages, device=call.device)
        if call.is_shared:
            self.pages.zero_()
        for t, fill in zip((plan, workspace), FILLS, strict=True):
            t.fill_(fill)
        self.memory = pack_memory(*(t.data_ptr() for t in (workspace, plan, starts, lengths)))

    def take_length(self, kv_len: int) -> None:
        """Keys of each request, for the planner."""
        if self._kv_len != kv_len:
            self._lengths.fill_(kv_len)
            self._kv_len = kv_len


_absent: set[tuple[str, object]] = set()
_rooms: dict[Hashable, Room] = {}
_captured = GraphTable()  # those of graphs, which may be replayed as long as they live
