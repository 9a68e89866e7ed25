"""The interval form of a mask: the mask's expression once more, over jg::Bounds and jg::Truth.

``mask_span`` computes what depends on the query rows of a tile, ``mask_tile`` the rest. The rules of the operations are in
``include/jitgen/span.h``; tests compare its classes with the mask itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from jitgen import ir
from jitgen.emit_load import print_pointer
from jitgen.emit_lower import Block, Lowering, Unit, join_levels, product
from jitgen.emit_ops import COMPARE, print_compare, print_logic
from jitgen.emit_ranges import Ranges
from jitgen.emit_text import ATOM, PRODUCT, SUM, UNARY, Term, int_literal
from jitgen.ir import Expr, walk
from jitgen.program import reads_pages

SPAN_LEVELS = {"q_idx": "row", "kv_idx": "elem"}
FAR = 2**40  # jg::kFar: what 64-bit captures are assumed to stay below; checked at run time
EXACT = 2**62  # sums and products whose endpoints stay below this are computed as they are, others with a check


@dataclass(frozen=True)
class MaskAnalysisText:
    """Fields of MaskSpan beyond the row range, and the bodies of mask_span and mask_tile."""

    fields: tuple[str, ...] = ()
    span_lines: tuple[str, ...] = ()
    tile_lines: tuple[str, ...] = ()
    value: str = ""
    span_reads_rows: bool = False
    tile_reads_rows: bool = False
    tile_reads_columns: bool = False
    scans: bool = False  # mask_tile looks through a captured tensor, or at one for each KV head, which takes a while
    spans_together: bool = False  # mask_span does, by whole warps


def position_parts(mask: Expr | None) -> list[Expr]:
    """The parts of a conjunction that read no tensor by row or column; none if there are no others, or they are not plain
    comparisons of integers."""
    parts = [] if mask is None else operands(mask, "and")
    found = [p for p in parts if not any(n.op == "load" and n.deps & SPAN_LEVELS.keys() for n in walk(p))]
    return found if len(found) < len(parts) and not any(n.dtype == "f32" for p in found for n in walk(p)) else []


def is_causal(mask: Expr | None) -> bool:
    """Whether a mask hides, among others, the keys behind a query: the first rows see few keys then."""
    parts = [] if mask is None else operands(mask, "and")
    q_idx, kv_idx = ir.index("q_idx"), ir.index("kv_idx")
    return ir.make("le", kv_idx, q_idx) in parts or ir.make("lt", kv_idx, q_idx) in parts


def emit_mask_analysis(unit: Unit, mask: Expr | None, *, by_positions: bool = False) -> MaskAnalysisText:
    """mask_span and mask_tile of a mask.

    The parts of a conjunction (or disjunction) are decided one after the other, cheap ones first, so that a tile that a
    comparison of positions excludes costs no look at a tensor. With ``by_positions`` mask_tile tells tiles in which the
    tensors hide nothing (kTilePositions) from other partial ones, and positions are known to be inside of the tensors.
    """
    if mask is None:
        return MaskAnalysisText()
    taken = {"args", "head", "span", "q_idx", "kv_idx", "q_lo", "q_hi", "k_lo", "k_hi"}
    span, tile = Block("row", "span.", taken=set(taken)), Block("elem", taken=set(taken))
    low = BoundsLowering(unit, span, tile, mask, are_inside=by_positions)
    alone = position_parts(mask) if by_positions else []
    parts = sorted(operands(mask, mask.op), key=low.cost) if mask.op in ("and", "or") else [mask]
    absorbing = mask.op == "or"
    terms: list[str] = []
    others: list[str] = []  # of parts that read tensors, if those are to be told apart
    for i, part in enumerate(parts):
        term = low.term(part, tile)
        if len(parts) == 1:
            value = f"jg::tile_kind({term.text})"
            break
        name = term.text
        if term.prec != ATOM or not name.replace(".", "").isidentifier() or term.ctype == "bool":
            name = f"part{i}"
            tile.lines.append(f"const jg::Truth {name} = {term.text};  // {unit.comment(part)}")
        if i + 1 < len(parts):
            stop = f"{name}.must) return kTileFull;" if absorbing else f"!{name}.may) return kTileNone;"
            tile.lines.append(f"if ({stop}")
            # what the test has shown is said again: ptxas 13.0 takes it for its opposite where it has to work it out
            name = f"jg::{'unproven' if absorbing else 'possible'}({name})"
        (others if alone and part not in alone else terms).append(name)
    else:
        value = ", ".join((" | " if absorbing else " & ").join(group) for group in (terms, others) if group)
        value = f"jg::tile_kind({value})"
    return MaskAnalysisText(
        fields=tuple(m.text for m in span.members),
        span_lines=tuple(span.lines),
        tile_lines=tuple(tile.lines),
        value=value,
        span_reads_rows=("row", "q_idx") in low.reads,
        tile_reads_rows=("elem", "q_idx") in low.reads,
        tile_reads_columns=("elem", "kv_idx") in low.reads,
        scans=any(
            n.op == "load" and low.level(n) == "elem" and not (unit.slots[n.attr].is_sorted and "kv_h" not in n.deps)
            for n in walk(mask)
            if not reads_pages(n)
        ),
        spans_together=any("jg::scan_together(" in line for line in span.lines),
    )


def operands(node: Expr, op: str) -> list[Expr]:
    """The parts of a nested conjunction or disjunction."""
    if node.op != op:
        return [node]
    return [part for a in node.args for part in operands(a, op)]


class BoundsLowering(Lowering):
    """Prints values over a rectangle; what does not vary in it stays the scalar it is."""

    def __init__(self, unit: Unit, span: Block, tile: Block, mask: Expr, *, are_inside: bool = False) -> None:
        super().__init__(unit, {"head": unit.head, "row": span, "col": tile, "elem": tile}, SPAN_LEVELS, [mask])
        self.scalar_form = Lowering(unit, {"head": unit.head}, {}, [mask])
        self.near = Ranges(unit.slots, (-FAR, FAR))
        self.print_op = print_bounds
        self.reads: set[tuple[str, str]] = set()
        self.are_inside = are_inside  # positions, of the tensors they index

    def level(self, node: Expr) -> str:
        level = join_levels({self.levels.get(d, "head") for d in node.deps})
        return level if level == "head" or node.dtype != "f32" else "elem"

    def term(self, node: Expr, at: Block, narrow: bool = False) -> Term:
        if self.level(node) == "head":
            return self.scalar_form.term(node, at)
        if node.op == "index":
            self.reads.add((at.level, node.attr))
            return Term(node.attr, ATOM, "jg::Bounds")
        return super().term(node, at)

    def leaf(self, node: Expr) -> Term | None:
        return None

    def is_exact(self, node: Expr) -> bool:
        """Whether no step of a sum or product can overflow."""
        reach = [max(map(abs, self.near.of(a))) for a in node.args]
        if node.op == "mul":
            return reach[0] * reach[1] <= EXACT
        constant, coeffs = node.attr
        return abs(constant) + sum(abs(c) * r for c, r in zip(coeffs, reach, strict=True)) <= EXACT

    def cost(self, part: Expr) -> tuple[int, int]:
        """Gathers that mask_tile has to look through, then operations."""
        nodes = list(walk(part))
        return sum(n.op == "load" and self.level(n) == "elem" for n in nodes), len(nodes)


def print_bounds(low: BoundsLowering, node: Expr, at: Block, narrow: bool) -> Term:
    """Interval text of one operation."""
    if node.dtype == "bool":
        return print_truth(low, node, at)
    if any(a.dtype == "f32" for a in node.args):
        return fallback(low, node)
    if node.op in _BOUNDS:
        return _BOUNDS[node.op](low, node, at)
    if node.op in ("min", "max", "abs", "sign"):
        return _call(low, f"jg::{node.op}", node, at)
    return fallback(low, node)


def print_truth(low: BoundsLowering, node: Expr, at: Block) -> Term:
    if node.op == "load":
        return Term(f"jg::as_truth({_scan(low, node, at).text})", ATOM, "jg::Truth")
    if any(a.dtype == "f32" for a in node.args) or (node.op in ("lt", "le") and node.args[0].dtype == "bool"):
        return Term("jg::unsure()", ATOM, "jg::Truth")
    if node.op in COMPARE:
        return _as_truth(print_compare(low, node, at))
    if node.op in ("and", "or"):
        return _as_truth(print_logic(low, node, at))
    if node.op == "not":
        return Term(f"!{low.term(node.args[0], at).at(UNARY)}", UNARY, "jg::Truth")
    if node.op == "where":
        return _call(low, "jg::choose", node, at, "jg::Truth")
    return Term("jg::unsure()", ATOM, "jg::Truth")


def _as_truth(term: Term) -> Term:
    return Term(term.text, term.prec, "jg::Truth")


def _call(low: BoundsLowering, function: str, node: Expr, at: Block, ctype: str = "jg::Bounds") -> Term:
    """A call with at least one interval among its operands; the others convert."""
    texts = []
    for a in node.args:
        term = low.term(a, at)
        kind = "jg::Truth" if a.dtype == "bool" else "jg::Bounds"
        texts.append(term.text if term.ctype == kind else f"{kind}({term.text})")
    return Term(f"{function}({', '.join(texts)})", ATOM, ctype)


def fallback(low: BoundsLowering, node: Expr) -> Term:
    """What is true of the value whatever the operands: its static range."""
    lo, hi = low.near.of(node)
    known = not any(a.dtype == "f32" for a in node.args) and max(abs(lo), abs(hi)) < FAR
    text = f"jg::Bounds({int_literal(lo)}, {int_literal(hi)})" if known else "jg::anything()"
    return Term(text, ATOM, "jg::Bounds")


def _lin(low: BoundsLowering, node: Expr, at: Block) -> Term:
    constant, coeffs = node.attr
    terms = sorted(zip(coeffs, node.args, strict=True), key=lambda ca: ca[0] < 0)
    fixed = [(c, a) for c, a in terms if low.level(a) == "head"]
    parts = [(c, low.term(a, at)) for c, a in terms if low.level(a) != "head"]
    if fixed:
        scalar = ir.make_lin(constant, fixed, node.dtype)
        flip = scalar.op == "lin" and all(c < 0 for c in scalar.attr[1])
        scalar = ir.make("neg", scalar) if flip else scalar
        parts.append((-1 if flip else 1, low.scalar_form.term(scalar, at)))
        constant = 0
    checked = not low.is_exact(node)
    if checked:
        parts += [(1, Term(int_literal(constant), ATOM, "long long"))] if constant else []
        constant = 0
        parts = [(-1 if c < 0 else 1, Term(f"jg::times({int_literal(abs(c))}, {t.text})", ATOM, t.ctype)) for c, t in parts]
    out = ""
    for c, t in parts:
        text = product(abs(c), t, False).at(PRODUCT if not (c < 0 and t.prec == SUM) else ATOM)
        out += (f" {'-' if c < 0 else '+'} " if out else "-" if c < 0 else "") + text
    if constant:
        out += f" {'-' if constant < 0 else '+'} {int_literal(abs(constant))}"
    if checked:
        return Term(f"jg::near({out})", ATOM, "jg::Bounds")
    return Term(out, SUM if len(parts) > 1 or constant else UNARY if parts[0][0] == -1 else PRODUCT, "jg::Bounds")


def _mul(low: BoundsLowering, node: Expr, at: Block) -> Term:
    a, b = (low.term(x, at) for x in node.args)
    if not low.is_exact(node):
        return Term(f"jg::times({a.text}, {b.text})", ATOM, "jg::Bounds")
    return Term(f"{a.at(PRODUCT)} * {b.at(PRODUCT + 1)}", PRODUCT, "jg::Bounds")


def _division(function: str):  # type: ignore[no-untyped-def]
    return lambda low, node, at: _call(low, function, node, at)


def _relu(low: BoundsLowering, node: Expr, at: Block) -> Term:
    return Term(f"jg::max({low.term(node.args[0], at).text}, jg::Bounds(0))", ATOM, "jg::Bounds")


def _cast(low: BoundsLowering, node: Expr, at: Block) -> Term:
    source = low.term(node.args[0], at)
    return source if node.args[0].is_int else Term(f"jg::as_bounds({source.text})", ATOM, "jg::Bounds")


def _bitand(low: BoundsLowering, node: Expr, at: Block) -> Term:
    """``x & (2**n - 1)`` is a remainder; of other constants, the bits in which the interval's ends agree are known."""
    for x, mask in (node.args, node.args[::-1]):
        if mask.is_const and mask.attr > 0 and low.level(x) != "head":
            is_remainder = mask.attr & (mask.attr + 1) == 0
            function, second = ("floor_mod", mask.attr + 1) if is_remainder else ("keep_bits", mask.attr)
            return Term(f"jg::{function}({low.term(x, at).text}, {int_literal(second)})", ATOM, "jg::Bounds")
    return fallback(low, node)


def _scan(low: BoundsLowering, node: Expr, at: Block) -> Term:
    """Bounds of the elements in a box of a captured tensor."""
    slot, name = low.unit.slots[node.attr], low.unit.slot_names[node.attr]
    if reads_pages(*node.args):
        return fallback(low, node)
    fixed = [d for d, a in enumerate(node.args) if low.level(a) == "head" and slot.layout[d] != "0"]
    axes = []
    for d, index in enumerate(node.args):
        if low.level(index) != "head" and slot.layout[d] != "0":
            stride = "1" if slot.layout[d] == "c" else f"args.{name}_stride{d}"
            term = low.term(index, at)
            if low.are_inside and index.op == "index":
                axes.append(f"jg::inside({term.text}, {stride})")
            else:
                axes.append(f"jg::axis({term.text}, args.{name}_size{d}, {stride})")
    base = print_pointer(low.scalar_form, node, fixed)
    if len(axes) > 3 or not axes:
        return fallback(low, node)
    function = "scan"
    if len(axes) == 1:
        function = "scan_sorted" if slot.is_sorted else "scan_together" if at.level == "row" else "scan"
    return Term(f"jg::{function}({base}, {', '.join(axes)})", ATOM, "jg::Bounds")


_BOUNDS = {
    "lin": _lin, "mul": _mul, "floordiv": _division("jg::floor_div"), "mod": _division("jg::floor_mod"), "relu": _relu,
    "cast": _cast, "bitand": _bitand, "load": _scan,
    "bitor": lambda low, node, at: _call(low, "jg::join_bits", node, at),
    "where": lambda low, node, at: _call(low, "jg::choose", node, at),
}  # fmt: skip
