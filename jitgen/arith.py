"""Python's operators as IR, with torch's meaning of bool and integer operands."""

from __future__ import annotations

import math
from collections.abc import Callable

from jitgen import ir
from jitgen.ir import Expr, const, make

MAX_UNROLLED_POWER = 64


def add(a: Expr, b: Expr) -> Expr:
    if a.dtype == b.dtype == "bool":  # as in torch; a bool and a number count
        return make("or", a, b)
    return make("add", a, b)


def sub(a: Expr, b: Expr) -> Expr:
    if a.dtype == b.dtype == "bool":
        raise TypeError("'-' is not defined on two bools: use ^ (exclusive or) or & ~")
    return make("sub", a, b)


def mul(a: Expr, b: Expr) -> Expr:
    if a.dtype == b.dtype == "bool":
        return make("and", a, b)
    return make("mul", a, b)


def _logic(logical: str, bitwise: str) -> Callable[[Expr, Expr], Expr]:
    def build(a: Expr, b: Expr) -> Expr:
        if a.dtype == b.dtype == "bool":
            return make(logical, a, b)
        if "f32" in (a.dtype, b.dtype):
            raise TypeError(f"bitwise operator on a float: got {a.dtype} and {b.dtype}; compare the values first")
        return make(bitwise, a, b)

    return build


bit_and, bit_or, bit_xor = _logic("and", "bitand"), _logic("or", "bitor"), _logic("ne", "bitxor")


def invert(a: Expr) -> Expr:
    if a.dtype == "f32":
        raise TypeError("'~' on a float: compare the value first")
    return make("not", a) if a.dtype == "bool" else make("bitnot", a)


def neg(a: Expr) -> Expr:
    if a.dtype == "bool":
        raise TypeError("'-' on a bool: use ~ for logical not")
    return make("neg", a)


def power(a: Expr, b: Expr) -> Expr:
    """``a ** b``: products for small constant integers, exp2 of a logarithm otherwise."""
    if b.is_const and float(b.attr).is_integer() and abs(b.attr) <= MAX_UNROLLED_POWER:
        return _integer_power(a, int(b.attr), is_int=a.dtype != "f32" and b.dtype != "f32")
    if b.is_const and b.attr == 0.5:
        return make("sqrt", a)
    if b.is_const and b.attr == -0.5:
        return make("rsqrt", a)
    if a.is_const and a.attr > 0:
        return make("exp2", mul(ir.cast(b, "f32"), const(math.log2(a.attr))))
    value = make("exp2", make("mul", b, make("log2", a)))
    return ir.cast(make("round", value), ir.promote(a.dtype, b.dtype)) if a.is_int and b.is_int else value


def _integer_power(a: Expr, n: int, *, is_int: bool) -> Expr:
    if n < 0:
        if is_int:
            raise TypeError(f"an integer to the power {n}: convert the base with .float() first")
        return make("truediv", const(1.0), _integer_power(a, -n, is_int=False))
    if n > 4 and a.dtype == "f32":
        return make("pow", a, const(float(n)))
    result, square = const(1 if is_int else 1.0), a
    while n:  # by repeated squaring
        result = make("mul", result, square) if n & 1 else result
        n >>= 1
        square = make("mul", square, square) if n else square
    return result


def round_like(op: str) -> Callable[[Expr], Expr]:
    """floor, ceil, round, trunc: identity on integers."""
    return lambda a: make(op, a) if a.dtype == "f32" else a


def classify(op: str, on_int: bool) -> Callable[[Expr], Expr]:
    """isfinite, isnan, isinf: constant on integers."""
    return lambda a: make(op, a) if a.dtype == "f32" else const(on_int)


def op(name: str) -> Callable[..., Expr]:
    return lambda *args: make(name, *args)


def where(c: Expr, a: Expr, b: Expr) -> Expr:
    return make("where", c, a, b)


BINARY: dict[str, Callable[[Expr, Expr], Expr]] = {
    "add": add, "sub": sub, "mul": mul, "truediv": op("truediv"), "floordiv": op("floordiv"), "mod": op("mod"),
    "pow": power, "and": bit_and, "or": bit_or, "xor": bit_xor, "lshift": op("shl"), "rshift": op("shr"),
}  # fmt: skip
COMPARE: dict[str, Callable[[Expr, Expr], Expr]] = {
    "eq": op("eq"), "ne": op("ne"), "lt": op("lt"), "le": op("le"),
    "gt": lambda a, b: make("lt", b, a), "ge": lambda a, b: make("le", b, a),
}  # fmt: skip
UNARY: dict[str, Callable[[Expr], Expr]] = {"neg": neg, "pos": lambda a: a, "invert": invert, "abs": op("abs")}
