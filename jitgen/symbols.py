"""Stand-ins a hook is called with while it is traced: every operation on them builds an IR node.

``Sym`` is one value per (query, key) pair; ``SymVector`` is a short row of values of static length. Operators are defined
here; named functions and methods (``torch.where``, ``x.clamp``) come from the table in ops_torch.py.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch

from jitgen import arith, ir
from jitgen.ir import Expr
from jitgen.location import refuse
from jitgen.refusals import describe, refuse_number, refuse_op

MAX_UNROLL = 256

TORCH_TO_IR = {
    torch.bool: "bool", torch.uint8: "i32", torch.int8: "i32", torch.int16: "i32", torch.int32: "i32", torch.int64: "i64",
    torch.float16: "f32", torch.bfloat16: "f32", torch.float32: "f32", torch.float64: "f32",
}  # fmt: skip
IR_TO_TORCH = {"bool": torch.bool, "i32": torch.int32, "i64": torch.int64, "f32": torch.float32}

# Filled by ops_torch.py and ops_rows.py: name -> handler(self, *args, **kwargs).
METHODS: dict[str, Callable[..., object]] = {}
FUNCTIONS: dict[str, Callable[..., object]] = {}


def register(names: str, handler: Callable[..., object], *, method: bool = True, function: bool = True) -> None:
    """Note what methods and functions of torch of these names do with a stand-in."""
    for name in names.split():
        if function:
            FUNCTIONS[name] = handler
        if method:
            METHODS[name] = handler


if TYPE_CHECKING:  # a Protocol costs half a millisecond to define

    class TraceState(Protocol):
        """What the stand-ins need from the trace in progress."""

        row_axis: str | None

        def decide(self, condition: Expr) -> bool: ...
        def concrete(self, value: Expr) -> bool | int | float | None: ...
        def count_op(self) -> None: ...


class _Active:
    state: TraceState | None = None


active = _Active()  # one trace at a time: trace.py holds a lock


def state() -> TraceState:
    if active.state is None:
        refuse("a traced value was used after its hook had returned. Keep b, h, q_idx, kv_idx and score inside the hook.")
    return active.state


class Traced:
    """Base of all stand-ins: operators, torch dispatch, methods by name."""

    __slots__ = ()
    __array_ufunc__ = None  # NumPy scalars on the left give way to the reflected operators
    __hash__ = None  # type: ignore[assignment]

    def operand(self) -> Expr | tuple[Expr, ...]:
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:
        return call_torch(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        handler = METHODS.get(name)
        if handler is None:
            refuse_op(f"Tensor.{name}")
        return functools.partial(handler, self)

    def __matmul__(self, other: object) -> object:
        refuse_op("matmul (@)")

    __rmatmul__ = __matmul__

    def __divmod__(self, other: object) -> tuple[object, object]:
        return self // other, self % other  # type: ignore[operator]

    def __setitem__(self, item: object, value: object) -> None:
        refuse("an element of a captured tensor or traced value is assigned. Hooks are pure: use torch.where(cond, new, old).")

    def __contains__(self, item: object) -> bool:
        refuse("'in' on a traced value or captured tensor has no single answer. Write (t == x).any().")


def _install_operators() -> None:
    def forward(build: Callable[..., Expr]) -> Callable[..., object]:
        def method(self: Traced, other: object) -> object:
            return lift(build, self, other) if _is_operand(other) else NotImplemented

        return method

    def reflected(build: Callable[..., Expr]) -> Callable[..., object]:
        def method(self: Traced, other: object) -> object:
            return lift(build, other, self) if _is_operand(other) else NotImplemented

        return method

    def unary(build: Callable[..., Expr]) -> Callable[..., object]:
        return lambda self: lift(build, self)

    for name, build in arith.BINARY.items():
        setattr(Traced, f"__{name}__", forward(build))
        setattr(Traced, f"__r{name}__", reflected(build))
    for name, build in arith.COMPARE.items():
        setattr(Traced, f"__{name}__", forward(build))
    for name, build in arith.UNARY.items():
        setattr(Traced, f"__{name}__", unary(build))


_install_operators()


class Sym(Traced):
    """One traced value."""

    __slots__ = ("expr",)

    def __init__(self, expr: Expr) -> None:
        self.expr = expr

    def operand(self) -> Expr:
        return self.expr

    def __repr__(self) -> str:
        return f"Sym({self.expr})"

    # ---- what a 0-d tensor would answer ----
    @property
    def dtype(self) -> torch.dtype:
        return IR_TO_TORCH[self.expr.dtype]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def shape(self) -> torch.Size:
        return torch.Size(())

    @property
    def ndim(self) -> int:
        return 0

    requires_grad = is_cuda = False

    def __iter__(self) -> Iterator[object]:
        refuse(f"a traced value is a single number, got a loop over {describe(self.expr)}. Loop over a static range instead.")

    def __getitem__(self, item: object) -> Sym:
        parts = item if isinstance(item, tuple) else (item,)
        if all(p is None or p is Ellipsis for p in parts):
            return self
        if is_head_row(self):
            refuse(f"a row along the head dim is seen element by element, and was indexed. {ROTATE}")
        refuse(
            f"{describe(self.expr)} is a single number and cannot be indexed with {item!r}. Index a captured tensor instead."
        )

    # ---- where Python wants a plain value ----
    def __bool__(self) -> bool:
        return state().decide(ir.cast(self.expr, "bool"))

    def _number(self, convert: Callable[[Any], Any], wanted: str) -> Any:
        value = state().concrete(self.expr)
        if value is None:
            refuse_number(self.expr, wanted)
        return convert(value)

    def __index__(self) -> int:
        if self.expr.dtype == "f32":
            raise TypeError("a float cannot be used as an integer")
        return self._number(int, "an integer")  # type: ignore[no-any-return]

    def __int__(self) -> int:
        return self._number(int, "int()")  # type: ignore[no-any-return]

    def __float__(self) -> float:
        return self._number(float, "float()")  # type: ignore[no-any-return]

    def __floor__(self) -> Sym:
        return _to_int(self, "floor")

    def __ceil__(self) -> Sym:
        return _to_int(self, "ceil")

    def __trunc__(self) -> Sym:
        return _to_int(self, "trunc")

    def __round__(self, ndigits: int | None = None) -> Sym:
        if ndigits:
            refuse(f"round(x, {ndigits}) is not available. Use torch.round(x * 10**n) / 10**n.")
        return _to_int(self, "round")


class SymVector(Traced):
    """A row of traced values of static length."""

    __slots__ = ("exprs",)

    def __init__(self, exprs: tuple[Expr, ...]) -> None:
        self.exprs = exprs

    def operand(self) -> tuple[Expr, ...]:
        return self.exprs

    def __repr__(self) -> str:
        return f"SymVector({', '.join(map(str, self.exprs))})"

    @property
    def dtype(self) -> torch.dtype:
        return IR_TO_TORCH[ir.promote(*(e.dtype for e in self.exprs))]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.exprs),))

    @property
    def ndim(self) -> int:
        return 1

    def __len__(self) -> int:
        return len(self.exprs)

    def __iter__(self) -> Iterator[Sym]:
        return (Sym(e) for e in self.exprs)

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, tuple):
            item = [p for p in item if p is not None and p is not Ellipsis]
            if len(item) > 1:
                refuse(f"a row of {len(self.exprs)} values takes one index, got {len(item)}.")
            item = item[0] if item else slice(None)
        if isinstance(item, slice):
            return SymVector(self.exprs[item])
        if item is None or item is Ellipsis:
            return self
        return Sym(self.exprs[operator.index(item)])

    def __bool__(self) -> bool:
        refuse(f"a row of {len(self.exprs)} values has no single truth value. Reduce it with .any(-1) or .all(-1).")


Value = Sym | SymVector


def as_operand(value: object) -> Expr | tuple[Expr, ...] | None:
    """IR of a value that may take part in arithmetic, or None."""
    if isinstance(value, Traced):
        return value.operand()
    if isinstance(value, (bool, int, float)):
        if isinstance(value, int) and not ir.INT64_MIN <= value <= ir.INT64_MAX:
            refuse(f"the integer {value} does not fit 64 bits. Use a float.")
        return ir.const(value)
    if isinstance(value, torch.Tensor):
        return _constant_tensor(value)
    if hasattr(value, "item") and hasattr(value, "dtype") and getattr(value, "shape", None) == ():
        return ir.const(value.item())  # NumPy scalar
    return None


def _constant_tensor(t: torch.Tensor) -> Expr | tuple[Expr, ...]:
    """A tensor the hook made itself (captured ones arrive as stand-ins), such as ``torch.tensor(-math.inf)``."""
    dtype = TORCH_TO_IR.get(t.dtype)
    if dtype is None or t.dim() > 1 or t.numel() > MAX_UNROLL:
        refuse(
            f"a tensor of shape {tuple(t.shape)} and dtype {t.dtype} is made inside the hook. Make it outside and capture it."
        )
    if t.dim() == 0:
        return ir.const(t.item(), dtype)
    return tuple(ir.const(v, dtype) for v in t.tolist())


def _is_operand(value: object) -> bool:
    return isinstance(value, (Traced, bool, int, float, torch.Tensor)) or getattr(value, "shape", None) == ()


ROTATE = "Rotate it with a jitgen.Rope; cut and join captured tensors outside the hook."


def is_head_row(value: object) -> bool:
    """Whether a value stands for a row of q, k, v or the output: an expression of one element of it."""
    operand = as_operand(value)
    return isinstance(operand, Expr) and bool(operand.deps & {"o", "d"})


def lift(build: Callable[..., Expr], *values: object) -> Sym | SymVector:
    """Apply an IR builder to operands, element by element where some are rows."""
    operands = []
    for v in values:
        op = as_operand(v)
        if op is None:
            refuse(f"a traced value was combined with {v!r} of type {type(v).__name__}, which is no number or tensor.")
        operands.append(op)
    state().count_op()
    try:
        lengths = {len(o) for o in operands if isinstance(o, tuple)}
        if not lengths:
            return Sym(build(*operands))
        lengths -= {1} if len(lengths) > 1 else set()
        if len(lengths) > 1:
            refuse(f"rows of lengths {sorted(lengths)} were combined. They must have the same length.")
        (n,) = lengths
        rows = [o * (n // len(o)) if isinstance(o, tuple) else (o,) * n for o in operands]
        return SymVector(tuple(build(*column) for column in zip(*rows, strict=True)))
    except TypeError as e:
        refuse(f"{e}.")


def _to_int(x: Sym, op: str) -> Sym:
    if x.expr.dtype != "f32":
        return x
    return Sym(ir.cast(ir.make(op, x.expr), "i32"))


def call_torch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """A torch function was called with a stand-in among its arguments."""
    name = getattr(func, "__name__", str(func)).removesuffix(".default")
    if "tanh" in name and "approx" in str(func):
        return FUNCTIONS["tanh_approx"](*args, **kwargs)
    owner = getattr(func, "__objclass__", None)
    handler = METHODS.get(name) if owner is not None else FUNCTIONS.get(name)
    if handler is None:
        refuse_op(f"{'Tensor' if owner is not None else 'torch'}.{name}")
    return handler(*args, **kwargs)
