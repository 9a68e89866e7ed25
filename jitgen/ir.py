"""The expression IR: typed, interned, canonical nodes that every hook of a variant is traced into.

A node is built by :func:`make` (or one of the leaf builders) and is canonical at birth: constants are folded, integer sums
are kept as one linear combination, operands of commutative operations are sorted by content, comparisons point one way.
Two hooks that mean the same therefore are, in most cases, the very same object, and ``node.key`` (a content digest) is the
same in every process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from jitgen.ir_nodes import (
    FALSE,
    INDEX_DTYPE,
    INT32_MAX,
    INT32_MIN,
    INT64_MAX,
    INT64_MIN,
    INT_DTYPES,
    PACKED,
    TRUE,
    Expr,
    const,
    index,
    intern,
    load,
    scalar,
    serialize,
    state,
    walk,
)
from jitgen.ir_ops import OPS, Op

__all__ = [
    "FALSE", "INDEX_DTYPE", "INT32_MAX", "INT32_MIN", "INT64_MAX", "INT64_MIN", "INT_DTYPES", "PACKED", "TRUE", "Expr", "cast",
    "const", "index", "load", "make", "make_lin", "promote", "rebuild", "remake", "renumbered", "rotated", "scalar",
    "serialize", "state", "walk",
]  # fmt: skip
RANK = {"bool": 0, "i32": 1, "i64": 2, "f32": 3}


# ---- types --------------------------------------------------------------------------------------------------------------


def promote(*dtypes: str) -> str:
    """Widest of the types in the order bool < i32 < i64 < f32."""
    return max(dtypes, key=RANK.__getitem__)


def cast(x: Expr, dtype: str) -> Expr:
    """Value conversion; to bool means ``!= 0``, float to int truncates towards zero."""
    if x.dtype == dtype:
        return x
    if x.is_const:
        v = x.attr
        if not (dtype in INT_DTYPES and isinstance(v, float) and not math.isfinite(v)):
            return const(bool(v) if dtype == "bool" else int(v) if dtype in INT_DTYPES else float(v), dtype)
    if dtype == "bool":
        return make("ne", x, const(0, x.dtype))
    if x.op == "lin" and dtype == "i64":
        const_part, coeffs = x.attr
        return make_lin(const_part, [(c, cast(a, "i64")) for c, a in zip(coeffs, x.args, strict=True)], "i64")
    return intern("cast", (x,), dtype, dtype)


def rotated(x: Expr, position: Expr) -> Expr:
    """An element of a row after the rotation of the row by a position; which rotation is said outside of the IR."""
    return intern("rotate", (cast(x, "f32"), position), None, "f32")


# ---- integer linear combinations ------------------------------------------------------------------------------------------


def _lin_terms(x: Expr) -> tuple[int, list[tuple[int, Expr]]]:
    if x.is_const:
        return int(x.attr), []
    if x.op == "lin":
        c, coeffs = x.attr
        return c, list(zip(coeffs, x.args, strict=True))
    return 0, [(1, x)]


def make_lin(constant: int, terms: Sequence[tuple[int, Expr]], dtype: str) -> Expr:
    """``constant + sum(coeff * term)`` over integers, terms merged and sorted by content."""
    merged: dict[Expr, int] = {}
    for coeff, term in terms:
        term = cast(term, dtype) if term.op != "lin" else term
        merged[term] = merged.get(term, 0) + coeff
    kept = sorted(((t, c) for t, c in merged.items() if c != 0), key=lambda tc: tc[0].key)
    large = [n for n in (constant, *(c for _, c in kept)) if not INT64_MIN <= n <= INT64_MAX]
    if large:
        raise TypeError(f"the integer {large[0]}, into which constants are combined, does not fit 64 bits: use a float")
    if not kept:
        return const(constant, dtype)
    if constant == 0 and len(kept) == 1 and kept[0][1] == 1:
        return kept[0][0]
    return intern("lin", tuple(t for t, _ in kept), (constant, tuple(c for _, c in kept)), dtype)


def _combine(a: Expr, b: Expr, sign: int, dtype: str) -> Expr:
    ca, ta = _lin_terms(a)
    cb, tb = _lin_terms(b)
    return make_lin(ca + sign * cb, ta + [(sign * c, t) for c, t in tb], dtype)


def _scaled(x: Expr, factor: int, dtype: str) -> Expr:
    c, terms = _lin_terms(x)
    return make_lin(c * factor, [(k * factor, t) for k, t in terms], dtype)


# ---- construction ---------------------------------------------------------------------------------------------------------


def make(op: str, *args: Expr) -> Expr:
    """Canonical node of ``op``; operands are converted as the operation's row in OPS says."""
    row = OPS[op]
    if row.arity >= 0 and len(args) != row.arity:
        raise TypeError(f"{op} takes {row.arity} operands, got {len(args)}")
    args, dtype = _typed(op, row, args)
    if row.fold is not None and all(a.is_const for a in args):
        folded = _fold(row, args, dtype)
        if folded is not None:
            return folded
    if dtype in INT_DTYPES:
        linear = _linear(op, args, dtype)
        if linear is not None:
            return linear
    simple = _simplify(op, args, dtype)
    if simple is not None:
        return simple
    if row.commutative:
        args = tuple(sorted(args, key=lambda a: a.key))
    return intern(op, args, None, dtype)


def _typed(op: str, row: Op, args: tuple[Expr, ...]) -> tuple[tuple[Expr, ...], str]:
    """Operands after promotion, and the type of the result."""
    if row.result == "where":
        dtype = promote(args[1].dtype, args[2].dtype)
        return (cast(args[0], "bool"), cast(args[1], dtype), cast(args[2], dtype)), dtype
    if row.result == "float":
        return tuple(cast(a, "f32") for a in args), "f32"
    wide = promote(*(a.dtype for a in args))
    if op in ("and", "or", "not"):
        return tuple(cast(a, "bool") for a in args), "bool"
    if row.result == "bool":
        return tuple(cast(a, wide) for a in args), "bool"
    if row.result == "int":
        wide = promote(wide, "i32")
        if wide == "f32":
            raise TypeError(f"{op} needs integers, got {', '.join(a.dtype for a in args)}")
        return tuple(cast(a, wide) for a in args), wide
    wide = promote(wide, "i32")  # arithmetic on bool counts: True + True == 2
    return tuple(cast(a, wide) for a in args), wide


def _fold(row: Op, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    assert row.fold is not None
    try:
        value = row.fold(*(a.attr for a in args))
    except (ValueError, OverflowError, ZeroDivisionError):
        return None  # log(0), exp(1000): left to the kernel, which follows IEEE
    if dtype == "i32" and not INT32_MIN <= int(value) <= INT32_MAX:
        return None
    return const(value, dtype)


def _linear(op: str, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    if op == "add":
        return _combine(args[0], args[1], 1, dtype)
    if op == "sub":
        return _combine(args[0], args[1], -1, dtype)
    if op == "neg":
        return _scaled(args[0], -1, dtype)
    if op == "mul":
        for a, b in (args, args[::-1]):
            if b.is_const:
                return _scaled(a, int(b.attr), dtype)
    if op in ("shl", "shr") and args[1].is_const and 0 <= args[1].attr < 31:  # 31: the factor is an i32
        factor = 1 << int(args[1].attr)
        return _scaled(args[0], factor, dtype) if op == "shl" else make("floordiv", args[0], const(factor, dtype))
    if op in ("floordiv", "mod") and args[1].is_const and args[1].attr == 1:
        return args[0] if op == "floordiv" else const(0, dtype)
    return None


def _simplify(op: str, args: tuple[Expr, ...], dtype: str) -> Expr | None:
    if op in ("and", "or"):
        return _simplify_logic(op, args)
    if op == "not":
        return _negated(args[0])
    if op == "where":
        cond, a, b = args
        if cond.is_const:
            return a if cond.attr else b
        if a is b:
            return a
        return _simplify_choice(cond, a, b) if dtype == "bool" else None
    if op in ("eq", "le") and args[0] is args[1] and args[0].dtype != "f32":
        return TRUE
    if op in ("ne", "lt") and args[0] is args[1] and args[0].dtype != "f32":
        return FALSE
    if op in ("min", "max") and args[0] is args[1]:
        return args[0]
    if dtype == "f32" and op in ("mul", "truediv") and args[1].is_const and args[1].attr == 1.0:
        return args[0]
    if dtype == "f32" and op == "mul" and args[0].is_const and args[0].attr == 1.0:
        return args[1]
    if dtype == "f32" and op in ("add", "sub") and args[1].is_const and args[1].attr == 0.0:
        return args[0]
    if dtype == "f32" and op == "add" and args[0].is_const and args[0].attr == 0.0:
        return args[1]
    return None


def _simplify_choice(cond: Expr, a: Expr, b: Expr) -> Expr | None:
    """A choice between booleans as the and/or that it is: Python's own ``and`` and ``or`` are traced as choices."""
    if a is cond or (a.is_const and a.attr):
        return make("or", cond, b)
    if b is cond or (b.is_const and not b.attr):
        return make("and", cond, a)
    if a.is_const:
        return make("and", make("not", cond), b)
    if b.is_const:
        return make("or", make("not", cond), a)
    return None


def _simplify_logic(op: str, args: tuple[Expr, ...]) -> Expr | None:
    absorbing = op == "or"
    for a, b in (args, args[::-1]):
        if a.is_const:
            return a if bool(a.attr) == absorbing else b
    return args[0] if args[0] is args[1] else None


def _negated(x: Expr) -> Expr | None:
    if x.op == "not":
        return x.args[0]
    if x.op in ("eq", "ne"):
        return make("ne" if x.op == "eq" else "eq", *x.args)
    if x.op in ("lt", "le") and x.args[0].dtype != "f32":  # not valid for floats: NaN
        return make("le" if x.op == "lt" else "lt", x.args[1], x.args[0])
    return None


# ---- walking --------------------------------------------------------------------------------------------------------------


def rebuild(root: Expr, leaf: Callable[[Expr], Expr | None]) -> Expr:
    """Copy of ``root`` with every node for which ``leaf`` returns a replacement exchanged; the rest is re-canonicalised. What
    is only below exchanged nodes is not looked at."""
    done: dict[Expr, Expr] = {}
    stack = [(root, False)]
    while stack:
        node, ready = stack.pop()
        if node in done:
            continue
        if ready:
            args = tuple(done[a] for a in node.args)
            done[node] = node if args == node.args else remake(node, args)
            continue
        new = leaf(node)
        if new is not None:
            done[node] = new
        else:
            stack.append((node, True))
            stack.extend((a, False) for a in reversed(node.args))
    return done[root]


def remake(node: Expr, args: tuple[Expr, ...]) -> Expr:
    """A node like ``node`` over other operands."""
    if node.op == "lin":
        constant, coeffs = node.attr
        total = const(constant, node.dtype)
        for c, a in zip(coeffs, args, strict=True):
            total = make("add", total, make("mul", const(c), a))
        return cast(total, node.dtype)
    if node.op == "load":
        return load(node.attr, node.dtype, args)
    if node.op == "cast":
        return cast(args[0], node.dtype)
    if node.op == "rotate":
        return rotated(*args)
    return make(node.op, *args)


def renumbered(roots: Sequence[Expr | None], number: Mapping[int, int]) -> dict[Expr, Expr]:
    """Every node of ``roots`` as it is where capture i has the slot ``number[i]``."""
    done: dict[Expr, Expr] = {}
    for node in walk(*roots):
        args = tuple(done[a] for a in node.args)
        if node.op == "scalar":
            done[node] = scalar(number[int(str(node.attr))], node.dtype)
        elif node.op == "load":
            done[node] = load(number[int(str(node.attr))], node.dtype, args)
        else:
            done[node] = node if args == node.args else remake(node, args)
    return done
