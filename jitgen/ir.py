"""The expression IR: typed, interned, canonical nodes that every hook of a variant is traced into.

A node is built by :func:`make` (or one of the leaf builders) and is canonical at birth: constants are folded, integer sums
are kept as one linear combination, operands of commutative operations are sorted by content, comparisons point one way.
Two hooks that mean the same therefore are, in most cases, the very same object, and ``node.key`` (a content digest) is the
same in every process.
"""

from __future__ import annotations

import hashlib
import math
import struct
import threading
from collections.abc import Callable, Iterator, Sequence

from jitgen.ir_ops import OPS, PAGE_OPS, ROW_LOCAL, ROW_OPS, Op

RANK = {"bool": 0, "i32": 1, "i64": 2, "f32": 3}
INT_DTYPES = ("i32", "i64")
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1

# Where the rows of a request lie among those of all: its first row in q, what is to be added to q_idx for a row's own number,
# and its first row in ragged k.
PACKED = ("q_off", "q_first", "kv_off")
# Index leaves and their types. `score`, `o`, `lse` and `x` are the values a hook receives; `d` is the position in the head dim.
# Those of the last line stand for what was taken out of a score or a mask: see emit_early.py and emit_bits.py.
INDEX_DTYPE = {
    **dict.fromkeys(("b", "h", "q_idx", "kv_idx", "kv_h", "q_len", "kv_len", "ctx_len", "d"), "i32"),
    **dict.fromkeys(("num_q_heads", "num_kv_heads", "head_dim_v", *PACKED), "i32"),
    **dict.fromkeys(("score", "scale", "o", "lse", "x", "cumsum"), "f32"),
    **dict.fromkeys(("relative", "step", "start", "copied"), "f32"), **dict.fromkeys(("distance", "found"), "i32"),
}


class Expr:
    """One IR node. Compared and hashed by identity: equal content means the same object."""

    __slots__ = ("__weakref__", "_deps", "args", "attr", "dtype", "key", "op")

    def __init__(self, op: str, args: tuple[Expr, ...], attr: object, dtype: str, key: bytes) -> None:
        self.op, self.args, self.attr, self.dtype, self.key = op, args, attr, dtype, key
        self._deps: frozenset[str] | None = None

    @property
    def deps(self) -> frozenset[str]:
        """Names of the index leaves this value depends on (captures are not listed)."""
        if self._deps is None:
            own = frozenset((str(self.attr),)) if self.op in ("index", "state") else frozenset()
            if self.op in ROW_OPS:  # a reduction consumes what varies along its row
                own = frozenset(("row",))
                inner: frozenset[str] = frozenset().union(*(a.deps for a in self.args)) - ROW_LOCAL[self.op]
            else:
                inner = frozenset().union(*(a.deps for a in self.args))
            self._deps = own | inner
        return self._deps

    @property
    def is_const(self) -> bool:
        return self.op == "const"

    @property
    def is_int(self) -> bool:
        return self.dtype in INT_DTYPES

    def __repr__(self) -> str:
        return to_text(self)


_table: dict[tuple[object, ...], Expr] = {}
_table_lock = threading.Lock()


def _attr_bytes(attr: object) -> bytes:
    """Unambiguous bytes of a node attribute: type-tagged and length-prefixed, the same in every process."""
    if isinstance(attr, tuple):
        parts = [_attr_bytes(a) for a in attr]
        return b"t%d:" % len(parts) + b"".join(b"%d:" % len(p) + p for p in parts)
    if isinstance(attr, bool):
        return b"b1" if attr else b"b0"
    if isinstance(attr, int):
        return b"i%d" % attr
    if isinstance(attr, float):
        return b"f" + struct.pack("<d", attr)
    if isinstance(attr, str):
        return b"s" + attr.encode()
    if attr is None:
        return b"n"
    raise TypeError(f"IR attribute {attr!r} of type {type(attr).__name__} has no stable bytes")


def _intern(op: str, args: tuple[Expr, ...], attr: object, dtype: str) -> Expr:
    tag = _attr_bytes(attr)  # not attr itself: True == 1 == 1.0 in Python
    ident = (op, args, tag, dtype)
    node = _table.get(ident)
    if node is None:
        digest = hashlib.sha256(b"|".join((op.encode(), dtype.encode(), tag, *(a.key for a in args)))).digest()
        with _table_lock:
            node = _table.setdefault(ident, Expr(op, args, attr, dtype, digest))
    return node


# ---- leaves -------------------------------------------------------------------------------------------------------------


def const(value: bool | int | float, dtype: str | None = None) -> Expr:
    """Literal. A Python int is i32 when it fits, else i64; a float is f32."""
    if dtype is None:
        if isinstance(value, bool):
            dtype = "bool"
        elif isinstance(value, int):
            dtype = "i32" if INT32_MIN <= value <= INT32_MAX else "i64"
        else:
            dtype = "f32"
    value = {"bool": bool, "i32": int, "i64": int, "f32": float}[dtype](value)
    if dtype == "f32" and math.isnan(value):
        value = math.nan  # one NaN, whatever its payload
    return _intern("const", (), value, dtype)


def index(name: str) -> Expr:
    """A position or a context value by name (see INDEX_DTYPE)."""
    return _intern("index", (), name, INDEX_DTYPE[name])


def state(name: str) -> Expr:
    """A named running value of a softmax replacement."""
    return _intern("state", (), name, "f32")


def scalar(slot: int, dtype: str) -> Expr:
    """A captured scalar, read from the launch arguments."""
    return _intern("scalar", (), slot, dtype)


def load(slot: int, dtype: str, indices: Sequence[Expr]) -> Expr:
    """One element of a captured tensor; ``dtype`` is the IR type the element is widened to."""
    return _intern("load", tuple(indices), slot, dtype)


def rotated(x: Expr, position: Expr) -> Expr:
    """An element of a row after the rotation of the row by a position; which rotation is said outside of the IR."""
    return _intern("rotate", (cast(x, "f32"), position), None, "f32")


TRUE, FALSE = const(True), const(False)


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
    return _intern("cast", (x,), dtype, dtype)


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
    if not kept:
        return const(constant, dtype)
    if constant == 0 and len(kept) == 1 and kept[0][1] == 1:
        return kept[0][0]
    return _intern("lin", tuple(t for t, _ in kept), (constant, tuple(c for _, c in kept)), dtype)


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
    return _intern(op, args, None, dtype)


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


def walk(*roots: Expr | None) -> Iterator[Expr]:
    """Every node once, operands before users, in a fixed order."""
    seen: set[int] = set()
    stack: list[tuple[Expr, bool]] = [(r, False) for r in reversed(roots) if r is not None]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((a, False) for a in reversed(node.args) if id(a) not in seen)


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


def serialize(roots: Sequence[Expr | None]) -> bytes:
    """Canonical bytes of several expressions; equal bytes mean equal meaning."""
    return b"".join(b"-" * 32 if r is None else r.key for r in roots)


_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "eq": "==", "ne": "!=", "lt": "<",
    "le": "<=", "and": "and", "or": "or", "bitand": "&", "bitor": "|", "bitxor": "^", "shl": "<<", "shr": ">>",
}  # fmt: skip


def to_text(node: Expr, names: Sequence[str] = ()) -> str:
    """Readable infix form, for messages, ``jitgen show`` and tests. ``names`` are the captures' names by slot."""

    def name_of(slot: object) -> str:
        return names[int(str(slot))] if int(str(slot)) < len(names) else f"a{slot}"

    def text(n: Expr) -> str:
        if n.op == "const":
            return repr(n.attr)
        if n.op in ("index", "state"):
            return str(n.attr)
        if n.op == "scalar":
            return name_of(n.attr)
        if n.op == "load":
            return f"{name_of(n.attr)}[{', '.join(text(a) for a in n.args)}]"
        if n.op == "lin":
            return _lin_text(n, text)
        if n.op in PAGE_OPS:
            return n.op
        if n.op == "cast":
            return f"{n.dtype}({text(n.args[0])})"
        if n.op in _INFIX:
            return f"({text(n.args[0])} {_INFIX[n.op]} {text(n.args[1])})"
        return f"{n.op}({', '.join(text(a) for a in n.args)})"

    return text(node)


def _lin_text(n: Expr, text: Callable[[Expr], str]) -> str:
    constant, coeffs = n.attr
    positive_first = sorted(zip(coeffs, n.args, strict=True), key=lambda ca: ca[0] < 0)
    out = ""
    for c, a in positive_first:
        factor = "" if abs(c) == 1 else f"{abs(c)} * "
        out += (f" {'-' if c < 0 else '+'} " if out else "-" if c < 0 else "") + factor + text(a)
    if constant:
        out += f" {'-' if constant < 0 else '+'} {abs(constant)}"
    return f"({out})"
