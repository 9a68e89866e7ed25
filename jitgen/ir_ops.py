"""The operation table of the IR: how many operands each operation has, its type, and what it means on Python numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

from jitgen.records import record


@record
class Op:
    """One row of the operation table: how many operands, what type comes out, what it means on Python numbers."""

    arity: int
    result: str  # a dtype, 'promote', 'float' (operands become f32), 'int', 'same' (type of operand 0), 'cast'
    fold: Callable[..., object] | None = None
    commutative: bool = False


def _mod(a: float, b: float) -> float:
    return 0 if b == 0 and isinstance(b, int) else (math.nan if b == 0 else a % b)


def _floordiv(a: float, b: float) -> float:
    return 0 if b == 0 and isinstance(b, int) else (math.nan if b == 0 else a // b)


def _gelu(x: float) -> float:
    return 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0)))


def _gelu_tanh(x: float) -> float:
    return 0.5 * x * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


FLOAT_UNARY: dict[str, Callable[[float], object]] = {
    "exp": math.exp, "exp2": lambda x: 2.0**x, "log": math.log, "log2": math.log2, "log1p": math.log1p,
    "tanh": math.tanh, "tanh_approx": math.tanh, "sigmoid": _sigmoid, "erf": math.erf, "sin": math.sin, "cos": math.cos,
    "sqrt": math.sqrt, "rsqrt": lambda x: 1.0 / math.sqrt(x), "gelu": _gelu, "gelu_tanh": _gelu_tanh,
    "silu": lambda x: x * _sigmoid(x), "softplus": _softplus, "logsigmoid": lambda x: -_softplus(-x),
    "floor": math.floor, "ceil": math.ceil, "round": round, "trunc": math.trunc,
}  # fmt: skip

OPS: dict[str, Op] = {
    "lin": Op(-1, "int"),  # integer linear combination: attr = (constant, coefficients), see make_lin
    "add": Op(2, "promote", lambda a, b: a + b, commutative=True),
    "sub": Op(2, "promote", lambda a, b: a - b),
    "mul": Op(2, "promote", lambda a, b: a * b, commutative=True),
    "truediv": Op(2, "float", lambda a, b: a / b),
    "floordiv": Op(2, "promote", _floordiv),
    "mod": Op(2, "promote", _mod),
    "neg": Op(1, "promote", lambda a: -a),
    "abs": Op(1, "promote", abs),
    "min": Op(2, "promote", min, commutative=True),
    "max": Op(2, "promote", max, commutative=True),
    "pow": Op(2, "float", lambda a, b: a**b),
    "sign": Op(1, "promote", lambda a: (a > 0) - (a < 0)),
    "relu": Op(1, "promote", lambda a: max(a, 0)),
    "eq": Op(2, "bool", lambda a, b: a == b, commutative=True),
    "ne": Op(2, "bool", lambda a, b: a != b, commutative=True),
    "lt": Op(2, "bool", lambda a, b: a < b),
    "le": Op(2, "bool", lambda a, b: a <= b),
    "and": Op(2, "bool", lambda a, b: a and b, commutative=True),
    "or": Op(2, "bool", lambda a, b: a or b, commutative=True),
    "not": Op(1, "bool", lambda a: not a),
    "bitand": Op(2, "int", lambda a, b: a & b, commutative=True),
    "bitor": Op(2, "int", lambda a, b: a | b, commutative=True),
    "bitxor": Op(2, "int", lambda a, b: a ^ b, commutative=True),
    "bitnot": Op(1, "int", lambda a: ~a),
    "shl": Op(2, "int", lambda a, b: a << (b & 63)),
    "shr": Op(2, "int", lambda a, b: a >> (b & 63)),
    "popcount": Op(1, "int", lambda a: bin(a & 0xFFFFFFFFFFFFFFFF).count("1")),
    "where": Op(3, "where"),
    "cast": Op(1, "cast"),
    "isfinite": Op(1, "bool", math.isfinite),
    "isnan": Op(1, "bool", math.isnan),
    "isinf": Op(1, "bool", math.isinf),
    **{name: Op(1, "float", fold) for name, fold in FLOAT_UNARY.items()},
    # Where a key lies in a paged cache, of its request and its number there: known to kernels over pages.
    "kv_slot": Op(2, "int"), "page": Op(2, "int"),
    # Reductions along a row of a KV tile (logits) or along the head dim (output); legal only in the hooks that say so.
    "row_max": Op(1, "float"), "row_sum": Op(1, "float"), "row_cumsum": Op(1, "float"), "d_sum": Op(1, "float"),
}  # fmt: skip
PAGE_OPS = frozenset(("kv_slot", "page"))
ROW_OPS = frozenset(("row_max", "row_sum", "row_cumsum", "d_sum"))
ROW_LOCAL = {
    "row_max": frozenset(("score", "kv_idx")),
    "row_sum": frozenset(("score", "kv_idx")),
    "row_cumsum": frozenset(),  # the running sum itself varies along the row
    "d_sum": frozenset(("o", "d")),
}
