"""Expressions to C++ statements, each value computed as far out as what it depends on allows.

A hook is printed into *blocks*: the head block (captures, b, h), the row block (adds q_idx), the column block (adds kv_idx)
and the element block. A value of an outer block becomes a member of that block's struct and is read as ``row.name``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jitgen import ir
from jitgen.emit_ranges import Ranges
from jitgen.emit_text import ATOM, PRODUCT, Term, identifier, literal, unique
from jitgen.ir import Expr, walk
from jitgen.ir_ops import PAGE_OPS
from jitgen.ir_text import to_text
from jitgen.program import Slot

# Where a leaf begins to vary; leaves not listed are known per (b, h). A row and a column value meet in an element.
HOOK_LEVELS = {
    "q_idx": "row",
    "kv_idx": "col",
    **dict.fromkeys(("score", "relative", "copied", "step", "start", "distance", "found"), "elem"),
}
LEAF_TEXT = {
    **{n: f"head.{n}" for n in ("b", "h", "kv_h", "q_len", "kv_len", "num_q_heads", "num_kv_heads", "scale", *ir.PACKED)},
    **{n: n for n in ("q_idx", "kv_idx", "score", "lse", "distance", "relative", "copied", "found")},
    **{n: f"kv_idx.{n}" for n in ("start", "step")},
    "o": "x",
    "d": "i",
    "head_dim_v": "kHeadDimV",
}
# Indices whose range the host knows before the launch: it checks the size of the dimension instead of a clamp here.
HOST_CHECKED = frozenset(("b", "h", "kv_h", "q_idx", "kv_idx"))
COMMENT_LENGTH = 72
MAX_NESTING = 60  # operations printed one inside of the other; clang takes 256 brackets
NARROW_LIMIT = 2**30  # jg::narrow saturates here: sums with positions (< 2**28) still fit an int


@dataclass(frozen=True)
class Member:
    """One field of a generated struct."""

    ctype: str
    name: str
    comment: str

    @property
    def text(self) -> str:
        gap = "" if self.ctype.endswith("*") else " "
        return f"{self.ctype}{gap}{self.name};" + (f"  // {self.comment}" if self.comment else "")


@dataclass
class Block:
    """Statements of one generated function; with a prefix, its results are members of the struct it returns."""

    level: str
    prefix: str = ""
    lines: list[str] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)
    member_of: dict[object, Member] = field(default_factory=dict)
    local_of: dict[object, Term] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def add_member(self, key: object, ctype: str, name: str, text: str, comment: str) -> Term:
        member = Member(ctype, unique(name, self.taken), comment)
        self.member_of[key] = member
        self.members.append(member)
        self.lines.append(f"{self.prefix}{member.name} = {text};")
        return Term(self.prefix + member.name, ATOM, ctype)

    def add_local(self, key: object, ctype: str, name: str, text: str) -> Term:
        term = Term(unique(name, self.taken), ATOM, ctype)
        self.local_of[key] = term
        declared = f"{ctype} const" if ctype.endswith("*") else f"const {ctype}"
        self.lines.append(f"{declared} {term.text} = {text};")
        return term

    def find(self, key: object) -> Term | None:
        """The name a value has in this block, if it was computed before."""
        if key in self.member_of:
            member = self.member_of[key]
            return Term(self.prefix + member.name, ATOM, member.ctype)
        return self.local_of.get(key)


@dataclass
class Unit:
    """What all hooks of one program share: the captures' names, the ranges, the head block."""

    slots: Sequence[Slot]
    ranges: Ranges = field(init=False)
    slot_names: tuple[str, ...] = field(init=False)
    head: Block = field(init=False)

    def __post_init__(self) -> None:
        self.ranges = Ranges(self.slots)
        plain = [identifier(s.name) for s in self.slots]
        self.slot_names = tuple(f"a{i}_{n}" if n else f"a{i}" for i, n in enumerate(plain))
        self.head = Block("head", "head.", taken=set(LEAF_TEXT) | {"args", "head"})

    def comment(self, node: Expr) -> str:
        """The user's form of an expression, short enough for one line."""
        text = to_text(node, self.slot_names, 2 * COMMENT_LENGTH)
        if text.startswith("("):  # around all of a sum, a comparison and the like
            text = text[1:].removesuffix(")")
        return text if len(text) <= COMMENT_LENGTH else f"{text[: COMMENT_LENGTH - 3]}..."


def _nested(roots: Sequence[Expr]) -> set[Expr]:
    """Values to be named although they are used once: compilers take a limited number of brackets in brackets."""
    height: dict[Expr, int] = {}
    for node in walk(*roots):
        height[node] = 1 + max((height[a] for a in node.args), default=0)
    return {node for node, h in height.items() if h % MAX_NESTING == 0}


def join_levels(levels: set[str]) -> str:
    """Level of a value computed from values of these levels."""
    if "elem" in levels or {"row", "col"} <= levels:
        return "elem"
    return "row" if "row" in levels else "col" if "col" in levels else "head"


class Lowering:
    """Prints the expressions of one hook. ``blocks`` maps every level to the block that computes it."""

    def __init__(self, unit: Unit, blocks: Mapping[str, Block], levels: Mapping[str, str], roots: Sequence[Expr]) -> None:
        from jitgen.emit_ops import print_op  # the two modules are one recursion

        self.unit, self.ranges, self.blocks, self.levels, self.roots = unit, unit.ranges, dict(blocks), levels, roots
        self.print_op = print_op
        self.users = Counter(a for n in walk(*roots) for a in n.args)
        self.nested = _nested(roots)
        self.leaves = dict(LEAF_TEXT)
        self.host_checked = HOST_CHECKED
        self.given: dict[Expr, Term] = {}  # values that the function is passed
        self.compares_late = False  # what is known of columns alone is compared for each element: fewer values by column

    def level(self, node: Expr) -> str:
        level = join_levels({self.levels.get(d, "head") for d in node.deps})
        is_late = self.compares_late and level == "col" and node.dtype == "bool" and node.op != "load"
        return "elem" if is_late else level

    def ctype(self, node: Expr) -> str:
        if node.dtype in ("f32", "bool"):
            return "float" if node.dtype == "f32" else "bool"
        return "long long" if self.ranges.is_wide(node) else "int"

    def term(self, node: Expr, at: Block, narrow: bool = False) -> Term:
        """Text of ``node`` as seen from block ``at``; whatever has to be computed before is added to the blocks.

        ``narrow``: the user is a comparison or a clamped index, so a long long from an outer block may be saturated.
        """
        leaf = self.given.get(node) or self.leaf(node)
        if leaf is not None:
            return leaf
        home = self.blocks[self.level(node)]
        if home is at or (not home.prefix and home.lines is at.lines):
            return self.compute(node, at, narrow)
        key = (node, narrow and self.ranges.is_wide(node)) if node.is_int else (node, False)
        if key in home.member_of or (not home.prefix and key in home.local_of):
            return home.find(key)  # type: ignore[return-value]
        value = self.print_op(self, node, home, False) if home.prefix else self.compute(node, home)
        if not home.prefix:
            name = value.text.isidentifier() or value.text.removeprefix("state.").isidentifier()
            return value if name else home.add_local(key, value.ctype, self.suggest(node), value.text)
        if key[1]:
            value = Term(f"jg::narrow({value.text})", ATOM, "int")
        return home.add_member(key, value.ctype, self.suggest(node), value.text, self.unit.comment(node))

    def leaf(self, node: Expr) -> Term | None:
        """Text of what needs no computing: literals, indices, captured scalars."""
        if node.op == "const":
            return literal(node.attr)
        if node.op == "index":
            if node.attr == "ctx_len":
                return Term("head.kv_len - head.q_len", 70, "int")
            return Term(self.leaves[node.attr], ATOM, "float" if node.dtype == "f32" else "int")
        if node.op == "state":
            of, _, name = node.attr.rpartition(".")  # of one of the two states of a merge
            return Term(f"{of or 'state'}.{identifier(name)}", ATOM, "float")
        return self.scalar(node) if node.op == "scalar" else None

    def scalar(self, node: Expr) -> Term:
        head, name = self.unit.head, self.unit.slot_names[node.attr]
        ctype = {"bool": "bool", "i32": "int", "i64": "long long", "f32": "float"}[node.dtype]
        key = (node, False)
        if key not in head.member_of:
            value = f"args.{name} != 0" if ctype == "bool" else f"({ctype})args.{name}"
            head.add_member(key, ctype, name, value, "")
        return head.find(key)  # type: ignore[return-value]

    def compute(self, node: Expr, at: Block, narrow: bool = False) -> Term:
        """Text of ``node`` computed in block ``at``; a value used twice gets a name."""
        found = at.find((node, False))
        if found is not None:
            return found
        value = self.print_op(self, node, at, narrow)
        if narrow or not (node in self.nested or (self.users[node] > 1 and self.is_worth_a_name(node))):
            return value
        return at.add_local((node, False), value.ctype, self.suggest(node), value.text)

    def is_worth_a_name(self, node: Expr) -> bool:
        simple = all(a.op in ("const", "index") for a in node.args)
        return not (simple and node.op in ("cast", "lin", "lt", "le", "eq", "ne") and len(node.args) <= 2)

    def name_loads(self, node: Expr, at: Block) -> None:
        """Reads what ``node`` loads in this block now, so that no load stands under a condition."""
        for n in walk(node):
            if n.op == "load" and n not in self.given and self.blocks[self.level(n)] is at and at.find((n, False)) is None:
                value = self.print_op(self, n, at, False)
                at.add_local((n, False), value.ctype, self.suggest(n), value.text)

    # ---- sums over rows, columns and elements ------------------------------------------------------------------------

    def split_lin(self, node: Expr) -> dict[str, Expr]:
        """The parts of an integer sum by level; captures and constants go with the rows, if there are any."""
        constant, coeffs = node.attr
        parts: dict[str, list[tuple[int, Expr]]] = {}
        for c, a in zip(coeffs, node.args, strict=True):
            level = self.level(a)
            parts.setdefault("row" if level == "head" else level, []).append((c, a))
        if constant:
            level = "row" if "row" in parts else "col" if "col" in parts else "elem"
            parts.setdefault(level, [])
        out = {}
        for level in ("row", "col", "elem"):
            if level in parts:
                out[level] = ir.make_lin(constant, parts[level], node.dtype)
                constant = 0
        return out

    def suggest(self, node: Expr) -> str:
        """A name for a value, from what it is made of."""
        varying = "".join(s for d, s in (("b", "b"), ("h", "h"), ("q_idx", "q"), ("kv_idx", "k")) if d in node.deps)
        suffix = f"_{varying}" if varying else ""
        if node.op in PAGE_OPS:
            return node.op
        if node.op in ("load", "scalar"):
            return self.unit.slot_names[node.attr] + suffix
        if node.op == "truediv" and node.args[0].is_const and node.args[0].attr == 1.0:
            return f"inv_{self.suggest(node.args[1])}"
        if node.op == "cast":
            return f"{self._base(node.args[0])}_{node.dtype}"
        if node.op in ("floordiv", "shr"):
            return f"{self._base(node.args[0])}_block"
        if node.op == "mod":
            return f"{self._base(node.args[0])}_mod"
        kind = {"lin": "sum", "add": "sum", "sub": "difference", "mul": "product", "truediv": "quotient", "where": "choice"}
        word = kind.get(node.op, "cond" if node.dtype == "bool" else f"{node.op}_value")
        return f"{word}{suffix}"

    def _base(self, node: Expr) -> str:
        if node.op == "index":
            return {"q_idx": "q", "kv_idx": "k"}.get(node.attr, node.attr)
        return self.suggest(node)


def product(coeff: int, value: Term, wide: bool) -> Term:
    """``coeff * value`` for a positive coefficient."""
    if coeff == 1:
        return value
    widen = wide and value.ctype == "int"
    return Term(f"{coeff}{'LL' if widen else ''} * {value.at(PRODUCT + 1)}", PRODUCT, "long long" if wide else value.ctype)
