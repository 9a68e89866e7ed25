"""Reductions, norms and joins of rows of values: what torch names of them a hook may call.

A row is a SymVector of static length, or, of q, k, v and the output, a Sym whose expression is one element of the head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from jitgen import arith, ir
from jitgen.ir import Expr, const
from jitgen.location import refuse
from jitgen.symbols import ROTATE, Sym, SymVector, Value, as_operand, is_head_row, lift, register


def elements_of(x: object) -> Sequence[Expr]:
    """The values of a row, or a value by itself."""
    operand = as_operand(x)
    assert operand is not None
    return (operand,) if isinstance(operand, Expr) else operand


def _reduction(
    build: Callable[[Expr, Expr], Expr], prepare: Callable[[Expr], Expr], name: str, *empty: Expr
) -> Callable[..., Value]:
    def handler(x: object, dim: int | None = None, keepdim: bool = False, **_: object) -> Value:
        if is_head_row(x):
            refuse(f".{name}() over the head dim is not available. Rows of the output have .sum(), .mean() and .rms().")
        return Sym(functools.reduce(build, map(prepare, elements_of(x)), *empty))

    return handler


def _sum(x: object, dim: int | None = None, keepdim: bool = False, *, dtype: object = None) -> Value:
    if is_head_row(x):
        return lift(arith.op("d_sum"), x)
    as_count = (ir.cast(e, "i32") if e.dtype == "bool" else e for e in elements_of(x))
    return Sym(functools.reduce(arith.add, as_count, const(0)))


def _mean(x: object, dim: int | None = None, keepdim: bool = False) -> Value:
    n = Sym(ir.index("head_dim_v")) if is_head_row(x) else len(elements_of(x))
    return lift(arith.op("truediv"), _sum(x), n)


def _rms(x: Any, eps: float = 1e-6) -> Value:
    """Root of the mean square along the head dim; ``eps`` is added under the root."""
    return lift(arith.op("sqrt"), lift(arith.add, _mean(lift(arith.mul, x, x)), eps))


def _rms_norm(x: Any, shape: object = None, weight: object = None, eps: float | None = None) -> Value:
    row = lift(arith.op("truediv"), x, _rms(x, torch.finfo(torch.float32).eps if eps is None else eps))
    return row if weight is None else row * weight  # type: ignore[operator]


def _layer_norm(x: Any, shape: object, weight: object = None, bias: object = None, eps: float = 1e-5, *_: object) -> Value:
    x = lift(arith.sub, x, _mean(x))
    row = lift(arith.op("truediv"), x, _rms(x, eps))
    row = row if weight is None else row * weight  # type: ignore[operator]
    return row if bias is None else row + bias  # type: ignore[operator]


def _norm(x: Any, p: object = 2, dim: int | None = None, keepdim: bool = False, **_: object) -> Value:
    if p not in (2, 2.0, "fro", None):
        refuse(f"a norm with p={p!r} is not available. Use p=2, or write it with .sum().")
    return lift(arith.op("sqrt"), _sum(lift(arith.mul, x, x)))


def _normalize(x: Any, p: object = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Value:
    return lift(arith.op("truediv"), x, lift(arith.op("max"), _norm(x, p), eps))


def _dot(x: object, other: object) -> Value:
    return _sum(lift(arith.mul, x, other))


def _min_max(op: str) -> Callable[..., Value]:
    reduce = _reduction(arith.op(op), lambda e: e, op)

    def handler(x: object, other: object = None, **kwargs: Any) -> Value:
        return reduce(x, other, **kwargs) if other is None or isinstance(other, int) else lift(arith.op(op), x, other)

    return handler


def _stack(values: Sequence[object], dim: int = 0) -> Value:
    if any(map(is_head_row, values)):
        refuse(f"rows along the head dim were joined. {ROTATE}")
    return SymVector(tuple(e for v in values for e in elements_of(v)))


def _row_op(op: str) -> Callable[..., Value]:
    return lambda x: lift(arith.op(op), x)


def _as_bool(e: Expr) -> Expr:
    return ir.cast(e, "bool")


def _fill_table() -> None:
    register("any", _reduction(arith.op("or"), _as_bool, "any", ir.FALSE))
    register("all", _reduction(arith.op("and"), _as_bool, "all", ir.TRUE))
    register("amax", _reduction(arith.op("max"), lambda e: e, "amax"))
    register("amin", _reduction(arith.op("min"), lambda e: e, "amin"))
    register("prod", _reduction(arith.mul, lambda e: ir.cast(e, "i32") if e.dtype == "bool" else e, "prod"))
    register("sum", _sum)
    register("mean", _mean)
    register("max", _min_max("max"))
    register("min", _min_max("min"))
    register("dot vdot inner", _dot)
    register("rms", _rms, function=False)
    register("norm", _norm)
    register("linalg_norm linalg_vector_norm", lambda x, ord=None, *args, **kwargs: _norm(x, ord), method=False)
    register("rms_norm", _rms_norm, method=False)
    register("layer_norm", _layer_norm, method=False)
    register("normalize", _normalize, method=False)
    register("stack hstack cat concat", _stack, method=False)
    for name in ("row_max", "row_sum", "row_cumsum"):
        register(name, _row_op(name), function=False)


_fill_table()
