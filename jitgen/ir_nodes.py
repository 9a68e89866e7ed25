"""Nodes of the expression IR: typed, and interned, so that equal content is the same object; leaves; walking over them."""

from __future__ import annotations

import hashlib
import math
import struct
import threading
import weakref
from collections.abc import Iterator, Sequence

from jitgen.ir_ops import ROW_LOCAL, ROW_OPS

INT_DTYPES = ("i32", "i64")
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

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
            pending = [self]  # and no recursion: expressions may be deeper than Python's stack
            while pending:
                unknown = [a for a in pending[-1].args if a._deps is None]
                if unknown:
                    pending += unknown
                else:
                    node = pending.pop()
                    node._deps = _deps_of(node)
        return self._deps  # type: ignore[return-value]

    @property
    def is_const(self) -> bool:
        return self.op == "const"

    @property
    def is_int(self) -> bool:
        return self.dtype in INT_DTYPES

    def __repr__(self) -> str:
        from jitgen.ir_text import to_text

        return to_text(self, limit=1000)


def _deps_of(node: Expr) -> frozenset[str]:
    inner: frozenset[str] = frozenset().union(*(a._deps or () for a in node.args))
    if node.op in ROW_OPS:  # a reduction consumes what varies along its row
        return inner - ROW_LOCAL[node.op] | {"row"}
    return inner | {str(node.attr)} if node.op in ("index", "state") else inner


_table: weakref.WeakValueDictionary[tuple[object, ...], Expr] = weakref.WeakValueDictionary()  # a node goes with its last user
_table_lock = threading.Lock()


def attr_bytes(attr: object) -> bytes:
    """Unambiguous bytes of a node attribute: type-tagged and length-prefixed, the same in every process."""
    if isinstance(attr, tuple):
        parts = [attr_bytes(a) for a in attr]
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


def intern(op: str, args: tuple[Expr, ...], attr: object, dtype: str) -> Expr:
    """The one node of this content."""
    tag = attr_bytes(attr)  # not attr itself: True == 1 == 1.0 in Python
    ident = (op, args, tag, dtype)
    node = _table.get(ident)
    if node is None:
        digest = hashlib.sha256(b"|".join((op.encode(), dtype.encode(), tag, *(a.key for a in args)))).digest()
        with _table_lock:
            node = _table.setdefault(ident, Expr(op, args, attr, dtype, digest))
    return node


# ---- leaves -------------------------------------------------------------------------------------------------------------


def const(value: bool | int | float, dtype: str | None = None) -> Expr:
    """Literal. A Python int is i32 when it fits, else i64; a float is f32. TypeError for one beyond 64 bits."""
    if dtype is None:
        if isinstance(value, bool):
            dtype = "bool"
        elif isinstance(value, int):
            dtype = "i32" if INT32_MIN <= value <= INT32_MAX else "i64"
        else:
            dtype = "f32"
    value = {"bool": bool, "i32": int, "i64": int, "f32": float}[dtype](value)
    if dtype == "i64" and not INT64_MIN <= value <= INT64_MAX:
        raise TypeError(f"the integer {value} does not fit 64 bits: use a float")
    if dtype == "f32" and math.isnan(value):
        value = math.nan  # one NaN, whatever its payload
    return intern("const", (), value, dtype)


def index(name: str) -> Expr:
    """A position or a context value by name (see INDEX_DTYPE)."""
    return intern("index", (), name, INDEX_DTYPE[name])


def state(name: str) -> Expr:
    """A named running value of a softmax replacement."""
    return intern("state", (), name, "f32")


def scalar(slot: int, dtype: str) -> Expr:
    """A captured scalar, read from the launch arguments."""
    return intern("scalar", (), slot, dtype)


def load(slot: int, dtype: str, indices: Sequence[Expr]) -> Expr:
    """One element of a captured tensor; ``dtype`` is the IR type the element is widened to."""
    return intern("load", tuple(indices), slot, dtype)


TRUE, FALSE = const(True), const(False)


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


def serialize(roots: Sequence[Expr | None]) -> bytes:
    """Canonical bytes of several expressions; equal bytes mean equal meaning."""
    return b"".join(b"-" * 32 if r is None else r.key for r in roots)
