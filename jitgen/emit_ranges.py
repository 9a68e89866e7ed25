"""Static ranges of integer nodes: what a value can be whatever the launch arguments are.

They decide the C++ type (int or long long), whether `//` and `%` need the floor form, whether a gather index may be
negative, and whether interval arithmetic in 64 bits is exact. Positions and lengths are below 2**28, head counts below
2**16, the batch below 2**24, rows of all requests and slots of a cache below 2**30; a captured scalar or element may be
anything its type holds.
"""

from __future__ import annotations

from collections.abc import Sequence

from jitgen.ir import INT32_MAX, INT32_MIN, Expr, walk
from jitgen.program import Slot

Range = tuple[int, int]

POSITION_LIMIT = 2**28
ROW_LIMIT = 2**30
SLOT_LIMIT = 2**30
I64: Range = (-(2**63), 2**63 - 1)
I32: Range = (INT32_MIN, INT32_MAX)
_POSITION: Range = (0, POSITION_LIMIT - 1)
_LENGTH: Range = (0, POSITION_LIMIT)
_ROW: Range = (0, ROW_LIMIT)
_SLOT: Range = (0, SLOT_LIMIT - 1)
INDEX_RANGE: dict[str, Range] = {
    "b": (0, 2**24), "h": (0, 2**16), "kv_h": (0, 2**16), "q_idx": _POSITION, "kv_idx": _POSITION, "q_len": _LENGTH,
    "kv_len": _LENGTH, "ctx_len": (-POSITION_LIMIT, POSITION_LIMIT), "d": (0, 2**16), "num_q_heads": (1, 2**16),
    "q_off": _ROW, "q_first": (-POSITION_LIMIT, ROW_LIMIT), "kv_off": _ROW,
    "num_kv_heads": (1, 2**16), "head_dim_v": (1, 2**16), "distance": (-POSITION_LIMIT, POSITION_LIMIT), "found": _LENGTH,
}  # fmt: skip
ELEMENT_RANGE: dict[str, Range] = {
    "bool": (0, 1), "uint8": (0, 255), "int8": (-128, 127), "int16": (-(2**15), 2**15 - 1), "int32": I32, "int64": I64,
}  # fmt: skip


class Ranges:
    """Ranges of the integer nodes of one program; bool nodes count as 0..1.

    ``i64`` is the range assumed for 64-bit captures: interval arithmetic passes a smaller one and checks it at run time.
    """

    def __init__(self, slots: Sequence[Slot], i64: Range = I64) -> None:
        self.slots = slots
        self.i64 = i64
        self._known: dict[Expr, Range] = {}

    def of(self, node: Expr) -> Range:
        """Smallest range this analysis can prove for an integer or bool node."""
        if node not in self._known:
            for n in walk(node):
                if n not in self._known and n.dtype != "f32":
                    self._known[n] = self._range(n)
        return self._known[node]

    def is_wide(self, node: Expr) -> bool:
        """True if the value may not fit an int."""
        lo, hi = self.of(node)
        return lo < INT32_MIN or hi > INT32_MAX

    def is_non_negative(self, node: Expr) -> bool:
        return self.of(node)[0] >= 0

    def _range(self, n: Expr) -> Range:
        if n.dtype == "bool":
            return (int(n.attr), int(n.attr)) if n.is_const else (0, 1)
        if n.op == "const":
            return (n.attr, n.attr)
        if n.op == "index":
            return INDEX_RANGE[n.attr]
        if n.op == "scalar":
            return I32 if n.dtype == "i32" else self.i64
        if n.op == "load":
            element = self.slots[n.attr].dtype
            return self.i64 if element == "int64" else ELEMENT_RANGE[element]
        if any(a.dtype == "f32" for a in n.args):  # a float truncated
            return I32 if n.dtype == "i32" else self.i64
        args = [self._known[a] for a in n.args]
        found = _RULES[n.op](n, args)
        if found is not None:
            return found
        return I32 if all(lo >= INT32_MIN and hi <= INT32_MAX for lo, hi in args) else self.i64  # a bit operation


def _hull(*ranges: Range) -> Range:
    return min(r[0] for r in ranges), max(r[1] for r in ranges)


def _lin(n: Expr, args: list[Range]) -> Range:
    lo = hi = n.attr[0]
    for c, (a, b) in zip(n.attr[1], args, strict=True):
        lo, hi = lo + min(c * a, c * b), hi + max(c * a, c * b)
    return lo, hi


def _mul(n: Expr, args: list[Range]) -> Range:
    corners = [x * y for x in args[0] for y in args[1]]
    return min(corners), max(corners)


def _floordiv(n: Expr, args: list[Range]) -> Range:
    (lo, hi), (dlo, dhi) = args
    if dlo > 0:
        corners = [x // y for x in (lo, hi) for y in (dlo, dhi)]
        return min(corners), max(corners)
    far = max(abs(lo), abs(hi))
    return -far, far


def _mod(n: Expr, args: list[Range]) -> Range:
    (lo, hi), (dlo, dhi) = args
    if lo >= 0 and dlo >= 0:
        return 0, max(min(hi, dhi - 1), 0)
    return min(dlo + 1, 0), max(dhi - 1, 0)


def _abs(n: Expr, args: list[Range]) -> Range:
    lo, hi = args[0]
    return (0 if lo <= 0 <= hi else min(abs(lo), abs(hi))), max(abs(lo), abs(hi))


def _bitand(n: Expr, args: list[Range]) -> Range | None:
    caps = [hi for lo, hi in args if lo >= 0]
    return (0, min(caps)) if caps else None


def _bitor(n: Expr, args: list[Range]) -> Range | None:
    if min(lo for lo, _ in args) < 0:
        return None
    return 0, 2 ** max(hi.bit_length() for _, hi in args) - 1


def _shl(n: Expr, args: list[Range]) -> Range | None:
    (lo, hi), (least, most) = args
    if not 0 <= least <= most < 63:
        return I64
    return min(lo << least, lo << most), max(hi << least, hi << most)


def _shr(n: Expr, args: list[Range]) -> Range:
    lo, hi = args[0]
    return min(lo, 0), max(hi, -1)


_RULES = {
    "kv_slot": lambda n, a: _SLOT,
    "page": lambda n, a: _SLOT,
    "lin": _lin,
    "mul": _mul,
    "floordiv": _floordiv,
    "mod": _mod,
    "abs": _abs,
    "bitand": _bitand,
    "bitor": _bitor,
    "bitxor": _bitor,
    "shl": _shl,
    "shr": _shr,
    "neg": lambda n, a: (-a[0][1], -a[0][0]),
    "min": lambda n, a: (min(a[0][0], a[1][0]), min(a[0][1], a[1][1])),
    "max": lambda n, a: (max(a[0][0], a[1][0]), max(a[0][1], a[1][1])),
    "relu": lambda n, a: (max(a[0][0], 0), max(a[0][1], 0)),
    "sign": lambda n, a: (-1 if a[0][0] < 0 else 0, 1 if a[0][1] > 0 else 0),
    "bitnot": lambda n, a: (~a[0][1], ~a[0][0]),
    "popcount": lambda n, a: (0, 64),
    "where": lambda n, a: _hull(a[1], a[2]),
    "cast": lambda n, a: a[0],
}
