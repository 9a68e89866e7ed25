"""From rows to a started kernel: what jitgen.rope and jitgen.append share."""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from jitgen import runtime
from jitgen.abi import divisor_words, pack_format
from jitgen.checks import dtype_name
from jitgen.errors import ShapeMismatch, UnsupportedDevice
from jitgen.kv_hooks import NO_TRANSFORM, TransformTrace
from jitgen.kv_spec import (
    MAX_PAIRS,
    SIZE_OF,
    TOKEN_ARGS,
    Rotation,
    RowsSpec,
    StreamSpec,
    render_rows,
    stream_args,
    widest_access,
)
from jitgen.kv_tokens import Tokens
from jitgen.program import Program, RowProgram
from jitgen.rotary import Rope
from jitgen.streams import cuda_index, start, stream_of
from jitgen.target import CompileTarget, detect_cpu, detect_cuda

Tensor = torch.Tensor
_NO_PROGRAM = RowProgram()
# Heads that a team of lanes goes through, so that angles are computed once for all of them; fewer where a launch has few
# tokens, so that all multiprocessors have work.
MOST_HEADS, BUSY_LANES = 8, 132 * 1024
MAX_FOUND = 1024  # ways to a kernel that are remembered: a new rotation, or transform, is another


@dataclass(slots=True)
class Stream:
    """Rows to read and where to write them."""

    name: str
    x: Tensor  # [num_tokens, heads, head_dim]
    written: Tensor
    out_address: int
    out_strides: tuple[int, int, int]  # page, slot, head
    rope: Rope | None = None
    program: RowProgram = _NO_PROGRAM
    scale: str = ""  # as in StreamSpec
    scale_address: int = 0
    scale_value: float = 1.0
    scale_strides: tuple[int, int] = (0, 0)  # slot, head
    gathers: bool = False  # x lies in places, with the strides ``out_strides``, and ``written`` is by token

    @property
    def by_token(self) -> Tensor:
        """The rows that are numbered by token: [num_tokens, heads, head_dim]."""
        return self.written if self.gathers else self.x

    def words(self) -> tuple[int, int, int, float]:
        """What of it a call is given each time."""
        return self.x.data_ptr(), self.out_address, self.scale_address, self.scale_value

    @classmethod
    def in_rows(cls, name: str, x: Tensor, written: Tensor, rope: Rope) -> Stream:
        """Rows that are written as they are numbered."""
        return cls(name, x, written, written.data_ptr(), (0, *written.stride()[:2]), rope)

    @classmethod
    def gathered(cls, name: str, x: Tensor, written: Tensor, program: RowProgram) -> Stream:
        """Rows of x [pages, page_size, heads, head_dim], written by token."""
        s = cls(name, x, written, written.data_ptr(), x.stride()[:3], program.rope, program)
        s.gathers = True
        return s


# ---- kernels ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Table:
    """Kernels by what calls differ in."""

    found: dict[tuple[object, ...], tuple[runtime.CompiledKernel, TransformTrace | Program]] = field(default_factory=dict)
    loaded: dict[tuple[str, CompileTarget], runtime.CompiledKernel] = field(default_factory=dict)
    targets: dict[torch.device, CompileTarget] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


_table = _Table()


def module_path(spec: RowsSpec) -> Path:
    """Path of the spec's shared library, which is built when no layer has it."""
    from jitgen.build import get_module

    call = (module_path, spec)
    return get_module(spec.digest, spec.family, spec.label, lambda: render_rows(spec), spec.target, call=call)


def _target_of(device: torch.device) -> CompileTarget:
    target = _table.targets.get(device)
    if target is None:
        target = _table.targets[device] = detect_cpu() if device.type == "cpu" else detect_cuda(device.index)
    return target


def _load(spec: RowsSpec) -> runtime.CompiledKernel:
    with _table.lock:
        kernel = _table.loaded.get((spec.digest, spec.target))
        if kernel is None:
            kernel = runtime.CompiledKernel(module_path(spec), spec, spec.args)  # type: ignore[arg-type]
            _table.loaded[spec.digest, spec.target] = kernel
    return kernel


Turn = tuple[Rope, int]  # a rotation and the elements of a row that it rotates


def _get_kernel(
    streams: Sequence[Stream], turns: list[Turn], places: str, trace: TransformTrace | Program, device: torch.device
) -> runtime.CompiledKernel:
    """The kernel for these rows; each of ``turns`` is a rotation of the launch, by its number."""
    shapes = [
        (s.name, s.x.dtype, s.written.dtype, s.x.shape[-1], _alignment(s), s.scale, id(s.program), _number(s, turns))
        for s in streams
    ]
    kinds = [(dim, r.interleave, r.cos_sin is not None and r.cos_sin.dtype) for r, dim in turns]
    key = (places, device, id(trace), *shapes, *kinds)
    found = _table.found.get(key)
    if found is None:
        specs = tuple(_stream_spec(s, turns) for s in streams)
        spec = RowsSpec(specs, places, _target_of(device), trace.slots)
        if sum(r.rotary_dim for r in spec.rotations if not r.table) > 2 * MAX_PAIRS:
            raise ShapeMismatch(f"rotations of more than {2 * MAX_PAIRS} elements in one call. Use a cos_sin table.")
        if len(_table.found) >= MAX_FOUND:
            _table.found.clear()
        found = _table.found[key] = (_load(spec), trace)  # keeps the trace, so its id stays its own
    return found[0]


def _turns_of(streams: Sequence[Stream]) -> list[Turn]:
    """The different rotations of a launch."""
    found = {(id(s.rope), s.x.shape[-1]): s for s in streams if s.rope is not None}
    turns = [(s.rope, s.rope.dim_of(s.x.shape[-1])) for s in found.values()]  # type: ignore[union-attr]
    return list({(id(r), dim): (r, dim) for r, dim in turns}.values())  # type: ignore[misc]


def _number(s: Stream, turns: list[Turn]) -> int:
    """Which of the launch's rotations a stream has; -1 for none."""
    if s.rope is None:
        return -1
    return next(i for i, (r, dim) in enumerate(turns) if r is s.rope and dim == s.rope.dim_of(s.x.shape[-1]))


def _alignment(s: Stream) -> int:
    """Elements by whose multiples all rows lie apart, and from address 0; at most what one access needs."""
    x_size, out_size = s.x.element_size(), s.written.element_size()
    return math.gcd(16, s.x.data_ptr() // x_size, s.out_address // out_size, *s.out_strides, *_strides(s.by_token))


def _strides(x: Tensor) -> tuple[int, int]:
    """Strides of tokens and heads; 0 where there is one, whose stride means nothing."""
    return (x.stride(0) if x.shape[0] > 1 else 0), (x.stride(1) if x.shape[1] > 1 else 0)


def _stream_spec(s: Stream, turns: list[Turn]) -> StreamSpec:
    head_dim, number, rotation = s.x.shape[-1], _number(s, turns), None
    if number >= 0:
        turn, dim = turns[number]
        table = "" if turn.cos_sin is None else dtype_name(turn.cos_sin.dtype)
        rotation = Rotation(dim, turn.interleave, table, number)
    dtypes = dtype_name(s.x.dtype), dtype_name(s.written.dtype)
    vec = widest_access(head_dim, rotation, (SIZE_OF[dtypes[0]], SIZE_OF[dtypes[1]]), _alignment(s))
    p = s.program
    return StreamSpec(s.name, *dtypes, head_dim, vec, s.scale, rotation, p.before, p.after, p.position)


def _heads_per_unit(x: Tensor) -> int:
    heads = min(MOST_HEADS, x.shape[1])
    lanes = x.shape[0] * max(x.shape[2] // 16, 1)
    while heads > 1 and lanes * -(-x.shape[1] // heads) < BUSY_LANES:
        heads = (heads + 1) // 2
    return heads


@dataclass(slots=True)
class RowsCall:
    """A checked call: everything but addresses, scales given as numbers, and captured values."""

    kernel: runtime.CompiledKernel
    pack: Callable[..., bytes]  # what is not in `turns` nor captured
    numbers: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]  # of each stream
    turns: bytes  # of rotations: speeds of pairs, or the address of a table, which is kept alive elsewhere; DIVISOR_ARGS
    pack_captures: Callable[..., bytes]
    trace: TransformTrace | Program  # whose slots the captures have
    device: torch.device

    def run(
        self,
        tokens: Sequence[int],
        streams: Sequence[tuple[int, int, int, float]],
        values: Sequence[object],
        turns: bytes | None = None,
    ) -> None:
        """Start the kernel on the current stream.

        ``tokens``: the pointers of TOKEN_ARGS. ``streams``: addresses of rows, of where they go, of scales, and the scale.
        ``turns``: in place of those that the call was prepared with.
        """
        index = cuda_index(self.device)
        words: list[object] = [*tokens, *self.numbers, stream_of(index), torch.get_num_threads() if index is None else 0]
        for own, rows in zip(streams, self.rows, strict=True):
            words += own
            words += rows
        packed = self.pack(*words) + (self.turns if turns is None else turns)
        if values:
            packed += self.pack_captures(*runtime.capture_words(self.trace, list(values)))  # type: ignore[arg-type]
        start(self.kernel, index, packed)


def turn_words(turns: Sequence[Turn]) -> list[object]:
    """The launch arguments of rotations: speeds of pairs, or a table."""
    words: list[object] = []
    for turn, dim in turns:
        table = turn.cos_sin
        if table is None:
            words.append(struct.pack(f"{dim}f", *turn.speeds(dim)))
        else:
            words += (table.data_ptr(), table.shape[0], table.stride(0))
    return words


def prepare_rows(
    streams: Sequence[Stream],
    places: str,
    tokens: Tokens,
    device: torch.device,
    trace: TransformTrace | Program = NO_TRANSFORM,
) -> RowsCall | None:
    """The call that moves the rows of all streams; None where there is no token.

    Errors:  ShapeMismatch, UnsupportedDevice, CompileError, ToolchainMissing.
    """
    turns = _turns_of(streams)
    for turn, _ in turns:
        if turn.cos_sin is not None and turn.cos_sin.device != device:
            raise UnsupportedDevice(f"cos_sin is on {turn.cos_sin.device}, the rows are on {device}. Move it there.")
    if tokens.count == 0:
        return None
    kernel = _get_kernel(streams, turns, places, trace, device)
    spec = kernel.spec
    num_fields = len(TOKEN_ARGS) + sum(len(stream_args(s.name)) for s in streams)
    heads = [(s.by_token.shape[1], _heads_per_unit(s.by_token), 0, *s.by_token.stride()[:2]) for s in streams]
    own = spec.own_args  # type: ignore[attr-defined]
    of_pages = divisor_words(tokens.page_size) if spec.reads_pages else ()
    return RowsCall(
        kernel,
        struct.Struct(pack_format(own[:num_fields])).pack,
        tokens.numbers(),
        tuple((*h, *s.out_strides, *s.scale_strides) for h, s in zip(heads, streams, strict=True)),
        struct.pack(pack_format(own[num_fields:]), *turn_words(turns), *of_pages),
        struct.Struct(pack_format(runtime.capture_fields(trace))).pack,  # type: ignore[arg-type]
        trace,
        device,
    )
