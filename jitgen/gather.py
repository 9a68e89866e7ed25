"""Captured tensors inside a hook: chained and partial indexing that ends in one gather."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from jitgen import ir
from jitgen.ir import Expr
from jitgen.location import refuse
from jitgen.program import ELEMENT_TO_IR
from jitgen.records import record
from jitgen.symbols import IR_TO_TORCH, MAX_UNROLL, TORCH_TO_IR, Sym, SymVector, Traced, as_operand, state

Index = Expr | tuple[Expr, ...]


if TYPE_CHECKING:  # a Protocol costs half a millisecond to define

    class TensorCapture(Protocol):
        """What a view needs to know about the captured tensor behind it."""

        slot: int
        name: str
        tensor: torch.Tensor

        def guard_size(self, dim: int) -> int: ...
        def mark_sorted(self) -> None: ...


@record
class Axis:
    """One remaining axis of a view: a range of a source axis, or a new axis of length 1 (source None)."""

    source: int | None
    start: int = 0
    step: int = 1
    length: int | None = None  # None: all of the source axis

    @property
    def is_whole(self) -> bool:
        return self.length is None and self.source is not None

    def at(self, i: Expr) -> Expr:
        return i if self.is_whole else ir.make("add", ir.const(self.start), ir.make("mul", i, ir.const(self.step)))


class SymTensor(Traced):
    """A captured tensor with some axes already indexed."""

    __slots__ = ("axes", "capture", "cast_to", "fixed")

    def __init__(
        self, capture: TensorCapture, axes: tuple[Axis, ...], fixed: dict[int, Expr], cast_to: str | None = None
    ) -> None:
        self.capture, self.axes, self.fixed, self.cast_to = capture, axes, fixed, cast_to

    @classmethod
    def whole(cls, capture: TensorCapture) -> SymTensor:
        return cls(capture, tuple(Axis(i) for i in range(capture.tensor.dim())), {})

    def __repr__(self) -> str:
        return f"SymTensor({self.capture.name}, {len(self.axes)} axes left)"

    def _with(self, axes: tuple[Axis, ...], fixed: dict[int, Expr] | None = None) -> SymTensor:
        return SymTensor(self.capture, axes, self.fixed if fixed is None else fixed, self.cast_to)

    # ---- sizes: constants of the trace, guarded ----
    def _length(self, axis: Axis) -> int:
        if axis.source is None:
            return 1
        return self.capture.guard_size(axis.source) if axis.length is None else axis.length

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._length(a) for a in self.axes)

    @property
    def ndim(self) -> int:
        return len(self.axes)

    @property
    def dtype(self) -> torch.dtype:
        return self.capture.tensor.dtype if self.cast_to is None else IR_TO_TORCH[self.cast_to]

    @property
    def device(self) -> torch.device:
        return self.capture.tensor.device

    @property
    def is_cuda(self) -> bool:
        return self.capture.tensor.is_cuda

    requires_grad = False

    def __len__(self) -> int:
        return self._length(self.axes[0])

    def __iter__(self) -> Iterator[Any]:
        n = len(self)
        if n > MAX_UNROLL:
            refuse(f"loop over captured tensor '{self.capture.name}' of length {n}, limit {MAX_UNROLL}. Index it instead.")
        return (self[i] for i in range(n))

    # ---- indexing ----
    def __getitem__(self, item: Any) -> Any:
        items = self._expanded(item if isinstance(item, tuple) else (item,))
        axes, fixed = list[Axis](), dict(self.fixed)
        rows: list[tuple[Axis, tuple[Expr, ...]]] = []
        source = iter(self.axes)
        for it in items:
            if it is None:
                axes.append(Axis(None))
                continue
            axis = next(source)
            if isinstance(it, slice):
                axes.append(self._sliced(axis, it))
                continue
            index = self._index(it)
            if isinstance(index, tuple):
                rows.append((axis, index))
            elif axis.source is not None:
                fixed[axis.source] = axis.at(index)
        view = self._with((*axes, *source), fixed)
        return view._by_rows(rows) if rows else view._settled()

    def _expanded(self, items: tuple[Any, ...]) -> list[Any]:
        """Items with Ellipsis replaced by full slices; too many indices are refused."""
        used = sum(1 for it in items if it is not None and it is not Ellipsis)
        missing = len(self.axes) - used
        if missing < 0:
            rank = len(self.axes)
            refuse(
                f"captured tensor '{self.capture.name}' has {rank} axes left, got {used} indices. Index at most {rank} axes."
            )
        out: list[Any] = []
        for it in items:
            out.extend([slice(None)] * missing if it is Ellipsis else [it])
        return out

    def _sliced(self, axis: Axis, s: slice) -> Axis:
        if s.start is None and s.stop is None and s.step is None:
            return axis
        start, stop, step = s.indices(self._length(axis))
        if step < 1:
            refuse(f"slice with step {step} of captured tensor '{self.capture.name}'. Torch takes positive steps only.")
        return replace(axis, start=axis.start + start * axis.step, step=axis.step * step, length=len(range(start, stop, step)))

    def _index(self, it: Any) -> Index:
        if isinstance(it, (bool, list)):
            refuse(f"captured tensor '{self.capture.name}' is indexed with {it!r}. Use integers, traced values or slices.")
        if isinstance(it, Traced) or isinstance(it, torch.Tensor):
            index = as_operand(it)
            assert index is not None
            for e in index if isinstance(index, tuple) else (index,):
                if not e.is_int:
                    refuse(
                        f"captured tensor '{self.capture.name}' is indexed with a {e.dtype} value, expected an integer. "
                        f"{'Convert it with .long().' if e.dtype == 'f32' else 'Use torch.where instead of a boolean index.'}"
                    )
            return index
        return ir.const(operator.index(it))

    def _by_rows(self, rows: list[tuple[Axis, tuple[Expr, ...]]]) -> SymVector:
        if any(self._length(a) != 1 for a in self.axes):
            refuse(f"captured tensor '{self.capture.name}' is indexed by a row and by a slice at once. Index one at a time.")
        values = []
        for i in range(max(len(r) for _, r in rows)):
            fixed = dict(self.fixed)
            for axis, r in rows:
                if axis.source is not None:
                    fixed[axis.source] = axis.at(r[i if len(r) > 1 else 0])
            values.append(self._with((), fixed)._load())
        return SymVector(tuple(values))

    def _settled(self) -> SymTensor | Sym:
        return self if any(a.source is not None for a in self.axes) else Sym(self._load())

    def _load(self, *extra: tuple[Axis, Expr]) -> Expr:
        at = dict(self.fixed)
        for axis, i in extra:
            if axis.source is not None:
                at[axis.source] = axis.at(i)
        tensor = self.capture.tensor
        state().count_op()
        element = str(tensor.dtype).removeprefix("torch.")
        value = ir.load(self.capture.slot, ELEMENT_TO_IR[element], [at[d] for d in range(tensor.dim())])
        return value if self.cast_to is None else ir.cast(value, self.cast_to)

    def operand(self) -> Expr | tuple[Expr, ...]:
        """The view as a value: one element, or a row of static length (a row along the head dim in output hooks)."""
        row_axis = state().row_axis
        zero = ir.const(0)
        long = [a for a in self.axes if self._length(a) != 1]
        short = [(a, zero) for a in self.axes if a not in long]
        if not long:
            return self._load(*short)
        if len(long) > 1:
            refuse(
                f"captured tensor '{self.capture.name}' is used with {len(long)} axes not indexed, shape {tuple(self.shape)}. "
                f"Index it down to one value, or to one short row."
            )
        if row_axis is not None:
            return self._load(*short, (long[0], ir.index(row_axis)))
        n = self._length(long[0])
        if n > MAX_UNROLL:
            refuse(
                f"a row of {n} values of captured tensor '{self.capture.name}' is used in arithmetic, limit {MAX_UNROLL}. "
                f"Index it, or precompute what the row is reduced to."
            )
        return tuple(self._load(*short, (long[0], ir.const(i))) for i in range(n))

    def __bool__(self) -> bool:
        value = self.operand()
        return bool(Sym(value) if isinstance(value, Expr) else SymVector(value))

    def __index__(self) -> int:
        refuse(f"Python needs an integer of captured tensor '{self.capture.name}'. Capture a Python int, or keep it traced.")

    __int__ = __float__ = __index__  # type: ignore[assignment]

    # ---- views ----
    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self._length(self.axes[dim])

    def dim(self) -> int:
        return len(self.axes)

    def numel(self) -> int:
        return self.shape.numel()

    def unsqueeze(self, dim: int) -> SymTensor:
        at = dim if dim >= 0 else len(self.axes) + 1 + dim
        return self._with((*self.axes[:at], Axis(None), *self.axes[at:]))

    def squeeze(self, dim: int | None = None) -> Any:
        keep = [a for i, a in enumerate(self.axes) if not (dim is None or i == dim % len(self.axes)) or self._length(a) != 1]
        gone = {a.source: a.at(ir.const(0)) for a in self.axes if a not in keep and a.source is not None}
        return self._with(tuple(keep), {**self.fixed, **gone})._settled()

    def permute(self, *dims: Any) -> SymTensor:
        order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
        return self._with(tuple(self.axes[d] for d in order))

    def transpose(self, a: int, b: int) -> SymTensor:
        axes = list(self.axes)
        axes[a], axes[b] = axes[b], axes[a]
        return self._with(tuple(axes))

    @property
    def T(self) -> SymTensor:
        return self._with(self.axes[::-1])

    def t(self) -> SymTensor:
        return self.T

    def as_dtype(self, dtype: torch.dtype) -> SymTensor:
        if dtype not in TORCH_TO_IR:
            refuse(f"captured tensor '{self.capture.name}' is converted to {dtype}, which kernels do not have.")
        return SymTensor(self.capture, self.axes, self.fixed, TORCH_TO_IR[dtype])
