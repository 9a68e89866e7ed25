"""The table from torch functions and tensor methods to IR.

FUNCTIONS is looked up for ``torch.name(...)``, METHODS for ``x.name(...)``; a name in neither is refused. Reductions and norms
of rows are in ops_rows.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from jitgen import arith, ir
from jitgen.gather import SymTensor
from jitgen.ir import Expr, const, make
from jitgen.location import refuse
from jitgen.ops_rows import elements_of
from jitgen.symbols import TORCH_TO_IR, Sym, Traced, Value, as_operand, lift, register

# ---- elementwise ----------------------------------------------------------------------------------------------------------


def _unary(build: Callable[[Expr], Expr]) -> Callable[..., Value]:
    def handler(x: object, *, out: None = None, inplace: bool = False) -> Value:
        return lift(build, x)

    return handler


def _binary(build: Callable[[Expr, Expr], Expr]) -> Callable[..., Value]:
    return lambda x, other: lift(build, x, other)


def _scaled(build: Callable[[Expr, Expr], Expr]) -> Callable[..., Value]:
    def handler(x: object, other: object, *, alpha: object = 1) -> Value:
        return lift(build, x, other if alpha == 1 else lift(arith.mul, other, alpha))

    return handler


def _bool_op(op: str) -> Callable[..., Expr]:
    return lambda *xs: make(op, *(ir.cast(x, "bool") for x in xs))


def _c_mod(a: Expr, b: Expr) -> Expr:
    if not (a.dtype == "f32" or b.dtype == "f32"):
        raise TypeError("torch.fmod of integers truncates towards zero: use % (floor) or torch.remainder")
    return make("sub", a, make("mul", b, make("trunc", make("truediv", a, b))))


_UNARY: dict[str, Callable[[Expr], Expr]] = {
    **{name: arith.op(name) for name in (
        "exp", "log", "log2", "tanh", "sigmoid", "sin", "cos", "sqrt", "rsqrt", "silu", "sign", "relu",
    )},
    **{f"{name} special_{name}": arith.op(name) for name in ("erf", "exp2", "log1p")},
    "expit special_expit": arith.op("sigmoid"), "logsigmoid log_sigmoid": arith.op("logsigmoid"),
    "tanh_approx": arith.op("tanh_approx"),
    "abs absolute fabs": arith.op("abs"), "neg negative": arith.neg, "positive": lambda a: a, "sgn": arith.op("sign"),
    "floor": arith.round_like("floor"), "ceil": arith.round_like("ceil"), "trunc fix": arith.round_like("trunc"),
    "isfinite": arith.classify("isfinite", True), "isnan": arith.classify("isnan", False),
    "isinf": arith.classify("isinf", False),
    "logical_not": _bool_op("not"), "bitwise_not": arith.invert,
    "square": lambda a: make("mul", a, a), "reciprocal": lambda a: make("truediv", const(1.0), a),
    "relu6": lambda a: make("min", make("relu", a), const(6.0)),
}  # fmt: skip
_BINARY: dict[str, Callable[[Expr, Expr], Expr]] = {
    "mul multiply": arith.mul, "true_divide divide": arith.op("truediv"), "floor_divide": arith.op("floordiv"),
    "remainder": arith.op("mod"), "fmod": _c_mod, "pow float_power": arith.power, "rsub": lambda a, b: arith.sub(b, a),
    "maximum fmax": arith.op("max"), "minimum fmin": arith.op("min"),
    "bitwise_and": arith.bit_and, "bitwise_or": arith.bit_or, "bitwise_xor": arith.bit_xor,
    "bitwise_left_shift": arith.op("shl"), "bitwise_right_shift": arith.op("shr"),
    "logical_and": _bool_op("and"), "logical_or": _bool_op("or"), "logical_xor": _bool_op("ne"),
    "eq": arith.COMPARE["eq"], "ne not_equal": arith.COMPARE["ne"], "lt less": arith.COMPARE["lt"],
    "le less_equal": arith.COMPARE["le"],
    "gt greater": arith.COMPARE["gt"], "ge greater_equal": arith.COMPARE["ge"],
}  # fmt: skip


def _clamp(x: object, min: object = None, max: object = None) -> Value:
    if min is not None:
        x = lift(arith.op("max"), x, min)
    return lift(arith.op("min"), x, max) if max is not None else lift(lambda a: a, x)


def _where(cond: object, x: object = None, other: object = None, *, input: object = None) -> Value:
    if x is None and input is None:
        refuse("torch.where(cond) lists positions, which a kernel cannot. Use torch.where(cond, a, b).")
    return lift(arith.where, cond, input if x is None else x, other)


def _round(x: object, *, decimals: int = 0) -> Value:
    if decimals:
        refuse(f"torch.round with decimals={decimals} is not available. Scale by 10**{decimals}, round, and scale back.")
    return lift(arith.round_like("round"), x)


def _div(x: object, other: object, *, rounding_mode: str | None = None) -> Value:
    if rounding_mode == "trunc":
        refuse("division with rounding_mode='trunc' is not available. Use '//' (floor) or torch.trunc(a / b).")
    return lift(arith.op("floordiv" if rounding_mode == "floor" else "truediv"), x, other)


def _gelu(x: object, *, approximate: str = "none") -> Value:
    return lift(arith.op("gelu" if approximate == "none" else "gelu_tanh"), x)


def _softplus(x: object, beta: float = 1, threshold: float = 20) -> Value:
    if beta == 1:
        return lift(arith.op("softplus"), x)
    return lift(lambda a: make("truediv", make("softplus", make("mul", a, const(float(beta)))), const(float(beta))), x)


def _leaky_relu(x: object, negative_slope: float = 0.01, inplace: bool = False) -> Value:
    return lift(lambda a: make("where", make("lt", const(0.0), a), a, make("mul", a, const(float(negative_slope)))), x)


# ---- types and constants ----------------------------------------------------------------------------------------------------


def _convert(x: Any, dtype: torch.dtype) -> object:
    if isinstance(x, SymTensor):
        return x.as_dtype(dtype)
    if dtype not in TORCH_TO_IR:
        refuse(f"conversion of a traced value to {dtype}. Kernels compute in bool, int32, int64 and float32.")
    return lift(lambda a: ir.cast(a, TORCH_TO_IR[dtype]), x)


def _to(x: Any, *args: object, **kwargs: object) -> object:
    for a in (*args, *kwargs.values()):
        if isinstance(a, torch.dtype):
            return _convert(x, a)
        if isinstance(a, (Traced, torch.Tensor)):
            return _convert(x, a.dtype)
    return x  # a device: captured tensors and indices are already where the kernel runs


def _filled(x: object, size: object = (), fill: object = 0, *, dtype: torch.dtype | None = None, **_: object) -> object:
    if not (isinstance(size, (tuple, list)) and all(s == 1 for s in size)):
        refuse(f"a tensor of size {size!r} is made inside the hook. Make it outside and capture it, or use size ().")
    value = Sym(operand) if isinstance(operand := as_operand(fill), Expr) else fill
    return value if dtype is None else _convert(value, dtype)


def _like(fill: object) -> Callable[..., object]:
    def handler(x: Any, *args: object, dtype: torch.dtype | None = None, **_: object) -> object:
        return _convert(lift(lambda a: a, args[0] if fill is None else fill), dtype or x.dtype)

    return handler


def _new_ones(value: int) -> Callable[..., object]:
    def handler(x: Any, *size: Any, dtype: torch.dtype | None = None, **_: object) -> object:
        shape = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list)) else size
        return _filled(x, shape, value, dtype=dtype or x.dtype)

    return handler


def _item(x: object) -> object:
    elements = elements_of(x)
    if len(elements) != 1:
        refuse(f".item() of a row of {len(elements)} values, expected one. Index it.")
    if elements[0].deps:
        refuse(".item() of a traced value, which is known only in the kernel. Keep it as it is.")
    return Sym(elements[0])


def _fill_table() -> None:
    for names, build in _UNARY.items():
        register(names, _unary(build))
    for names, binary in _BINARY.items():
        register(names, _binary(binary))
    for name, binary in (*arith.BINARY.items(), *arith.COMPARE.items()):  # a tensor made inside the hook on the left
        register(f"__{name}__", _binary(binary))
    register("add", _scaled(arith.add))
    register("sub subtract", _scaled(arith.sub))
    register("clamp clip", _clamp)
    register("hardtanh", lambda x, min_val=-1.0, max_val=1.0, inplace=False: _clamp(x, min_val, max_val))
    register("clamp_min", _clamp)
    register("clamp_max", lambda x, max: _clamp(x, None, max))
    register("where", _where, method=False)
    register("where", lambda x, cond, other: _where(cond, x, other), function=False)
    register("masked_fill", lambda x, mask, value: _where(mask, value, x))
    register("round", _round)
    register("div", _div)
    register("gelu", _gelu)
    register("softplus", _softplus)
    register("leaky_relu", _leaky_relu)
    register("lerp", lambda a, b, w: a + w * (b - a))
    register("addcmul", lambda x, a, b, *, value=1: x + value * a * b)
    register("embedding", lambda index, weight, *a, **k: weight[index], method=False)
    _fill_types()


def _fill_types() -> None:
    register("to", _to)
    register("type", lambda x, dtype=None: _convert(x, dtype))
    register("type_as", _to)
    for name, dtype in {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64,
                        "int": torch.int32, "long": torch.int64, "short": torch.int16, "bool": torch.bool}.items():  # fmt: skip
        register(name, lambda x, dtype=dtype: _convert(x, dtype))
    register("new_ones", _new_ones(1))
    register("new_zeros", _new_ones(0))
    register("new_full", lambda x, size, fill, **k: _filled(x, size, fill, dtype=k.get("dtype") or x.dtype))
    register("new_tensor", lambda x, v, **k: _filled(x, (), v, dtype=k.get("dtype") or x.dtype))
    register("full", lambda size, fill_value, **k: _filled(None, size, fill_value, **k), method=False)
    register("scalar_tensor", lambda v, **k: _filled(None, (), v, **k), method=False)
    register("full_like", lambda x, fill_value, **k: _like(None)(x, fill_value, **k))
    register("zeros_like", _like(0))
    register("ones_like", _like(1))
    register("detach clone contiguous cpu cuda squeeze", _same)
    register("unsqueeze expand view reshape flatten", _reshaped)
    register("item", _item)
    register("is_floating_point", lambda x: x.dtype.is_floating_point)
    register("size", lambda x, dim=None: x.shape if dim is None else x.shape[dim])
    register("dim", lambda x: x.ndim)
    register("numel", lambda x: x.shape.numel())
    register("unbind", _unbind)
    register("__getitem__", lambda x, item: x[item] if isinstance(x, Traced) else _made_inside(x), function=False)


def _same(x: object, *args: object, **kwargs: object) -> object:
    return x


def _reshaped(x: Any, *args: object, **kwargs: object) -> object:
    if not isinstance(x, Sym):
        refuse(f"change of shape of {x!r}. Index captured tensors with t[i, j] instead, and reshape outside the hook.")
    return x  # one number has one element in every shape


def _unbind(x: Any, dim: int = 0) -> tuple[object, ...]:
    if dim % x.ndim == 0:
        return tuple(x)
    return tuple(x[(slice(None),) * (dim % x.ndim) + (i,)] for i in range(x.shape[dim]))


def _made_inside(x: torch.Tensor) -> object:
    refuse(f"a tensor of shape {tuple(x.shape)} made inside the hook is indexed. Make it outside the hook and capture it.")


_fill_table()
