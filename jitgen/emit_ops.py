"""One printer per kind of operation; what an operand looks like is asked of the Lowering."""

from __future__ import annotations

from jitgen import ir
from jitgen.emit_load import print_load
from jitgen.emit_lower import HOOK_LEVELS, NARROW_LIMIT, Block, Lowering, product
from jitgen.emit_text import (
    ATOM,
    BITAND,
    BITOR,
    BITXOR,
    EQUALITY,
    PRODUCT,
    RELATION,
    SHIFT,
    SUM,
    TERNARY,
    UNARY,
    Term,
    float_literal,
    int_literal,
)
from jitgen.errors import UnsupportedVariant
from jitgen.ir import Expr, index, make, make_lin
from jitgen.ir_ops import FLOAT_UNARY, PAGE_OPS

COMPARE = {"eq": ("==", EQUALITY), "ne": ("!=", EQUALITY), "lt": ("<", RELATION), "le": ("<=", RELATION)}
LOGIC = {"and": ("&", BITAND), "or": ("|", BITOR), "bitand": ("&", BITAND), "bitor": ("|", BITOR), "bitxor": ("^", BITXOR)}
JG_CALLS = {*FLOAT_UNARY, "isfinite", "isnan", "isinf"}
NARROW_OTHER = 2**29  # the other side of a comparison with a saturated value must stay below this


def print_op(low: Lowering, node: Expr, at: Block, narrow: bool) -> Term:
    """C++ text of one operation, computed in block ``at``."""
    op = node.op
    if op in _PRINTERS:
        return _PRINTERS[op](low, node, at, narrow)
    if op in COMPARE:
        return print_compare(low, node, at)
    if op in LOGIC:
        return print_logic(low, node, at)
    if op in JG_CALLS:
        return call(low, f"jg::{op}", node, at)
    raise UnsupportedVariant(f"operation {op} is not available in this hook: {node!r}")


def call(low: Lowering, function: str, node: Expr, at: Block) -> Term:
    """``function(operands)``; integer operands of different width are brought to the wider type."""
    terms = [low.term(a, at) for a in node.args]
    wide = any(t.ctype == "long long" for t in terms) or (node.is_int and low.ranges.is_wide(node))
    texts = [f"(long long){t.at(UNARY)}" if wide and t.ctype == "int" else t.text for t in terms]
    ctype = "long long" if wide and node.op != "popcount" and node.is_int else low.ctype(node)
    return Term(f"{function}({', '.join(texts)})", ATOM, ctype)


def print_lin(low: Lowering, node: Expr, at: Block, narrow: bool) -> Term:
    """An integer sum; at element level its row and column parts are computed outside."""
    wide = low.ranges.is_wide(node)
    pieces = low.split_lin(node) if at.level == "elem" else {}
    if len(pieces) > 1:
        return _sum(low, 0, [_signed(part) for part in pieces.values()], at, wide, narrow)
    constant, coeffs = node.attr
    return _sum(low, constant, list(zip(coeffs, node.args, strict=True)), at, wide, narrow)


def _signed(part: Expr) -> tuple[int, Expr]:
    """A partial sum as coefficient and value: a lone term keeps its own, an all-negative sum is subtracted."""
    if part.op != "lin":
        return 1, part
    constant, coeffs = part.attr
    if constant == 0 and len(coeffs) == 1:
        return coeffs[0], part.args[0]
    return (-1, ir.make("neg", part)) if all(c < 0 for c in coeffs) else (1, part)


def _sum(low: Lowering, constant: int, parts: list[tuple[int, Expr]], at: Block, wide: bool, narrow: bool) -> Term:
    parts = sorted(parts, key=lambda ca: ca[0] < 0)
    terms = [(c, low.term(a, at, narrow)) for c, a in parts]
    if wide and narrow and all(abs(c) == 1 for c, _ in terms) and all(t.ctype == "int" for _, t in terms):
        free = sum(max(map(abs, low.ranges.of(a))) for _, a in parts if not low.ranges.is_wide(a))
        wide = sum(low.ranges.is_wide(a) for _, a in parts) > 1 or free > NARROW_OTHER
    out, ctype = "", "long long" if wide or any(t.ctype == "long long" for _, t in terms) else "int"
    for i, (c, t) in enumerate(terms):
        p = product(abs(c), t, wide)
        if i == 0:
            widen = "(long long)" if wide and p.ctype == "int" else ""
            out = f"-{widen}{p.at(UNARY)}" if c < 0 else f"{widen}{p.at(UNARY if widen else PRODUCT)}"
        else:
            out += f" {'-' if c < 0 else '+'} {p.at(PRODUCT)}"
    if constant:
        out += f" {'-' if constant < 0 else '+'} {int_literal(abs(constant))}"
    single = len(terms) == 1 and not constant
    return Term(out, (UNARY if terms[0][0] == -1 else PRODUCT) if single else SUM, ctype)


def _infix(symbol: str, prec: int):  # type: ignore[no-untyped-def]
    def emit(low: Lowering, node: Expr, at: Block, narrow: bool) -> Term:
        a, b = (low.term(x, at) for x in node.args)
        left = a.at(prec)
        if node.is_int and low.ranges.is_wide(node) and a.ctype == b.ctype == "int":
            left = f"(long long){a.at(UNARY)}"
        return Term(f"{left} {symbol} {b.at(prec + 1)}", prec, _joined(low, node, a, b))

    return emit


def _joined(low: Lowering, node: Expr, a: Term, b: Term) -> str:
    """Type that C++ gives to an operation on these operands: a small result of a wide operand is still a long long."""
    return "long long" if "long long" in (a.ctype, b.ctype) else low.ctype(node)


_difference = _infix("-", SUM)


def print_sub(low: Lowering, node: Expr, at: Block, narrow: bool) -> Term:
    """A difference; from a column to what is known per row, templates count in steps from the first column of a tile."""
    left, right = node.args
    if at.level == "elem":
        if _is_column(low, left) and low.level(right) in ("head", "row"):
            return Term(f"jg::minus(kv_idx, {low.term(right, at).text})", ATOM, "float")
        if _is_column(low, right) and low.level(left) in ("head", "row"):
            return Term(f"jg::minus({low.term(left, at).text}, kv_idx)", ATOM, "float")
    return _difference(low, node, at, narrow)


def _is_column(low: Lowering, node: Expr) -> bool:
    """Whether a float is the index of the column, in a hook that is given columns."""
    return node.op == "cast" and node.dtype == "f32" and node.args[0] is index("kv_idx") and low.leaves["kv_idx"] == "kv_idx"


def print_add(low: Lowering, node: Expr, at: Block, narrow: bool) -> Term:
    """Float sum, with ``a + -b`` printed as a difference."""
    a, b = (low.term(x, at) for x in node.args)
    for first, second in ((a, b), (b, a)):
        if second.text.startswith("-") and second.prec == UNARY and not first.text.startswith("-"):
            return Term(f"{first.at(SUM)} - {second.text[1:]}", SUM, "float")
    if node.args[1].op == "index" and node.args[1].attr == "score":
        a, b = b, a
    return Term(f"{a.at(SUM)} + {b.at(SUM)}", SUM, "float")


def print_neg(low: Lowering, node: Expr, at: Block, narrow: bool) -> Term:
    a = low.term(node.args[0], at)
    return Term(f"-({a.text})" if a.text.startswith("-") else f"-{a.at(UNARY)}", UNARY, low.ctype(node))


def print_compare(low: Lowering, node: Expr, at: Block) -> Term:
    symbol, prec = COMPARE[node.op]
    bounded = _column_bound(low, node, at)
    if bounded is not None:
        left, right = bounded
        return Term(f"{left.at(prec + 1)} {symbol} {right.at(prec + 1)}", prec, "bool")
    a, b = node.args
    narrow = [False, False]
    if at.level == "elem" and a.is_int:
        narrow = [_below(low, b), _below(low, a)]
    left, right = low.term(a, at, narrow[0]), low.term(b, at, narrow[1])
    if left.ctype == "bool" and node.op in ("lt", "le"):
        prec_inner = ATOM
        return Term(f"(int){left.at(prec_inner)} {symbol} (int){right.at(prec_inner)}", prec, "bool")
    return Term(f"{left.at(prec + 1)} {symbol} {right.at(prec + 1)}", prec, "bool")


def _column_bound(low: Lowering, node: Expr, at: Block) -> tuple[Term, Term] | None:
    """Sides of a comparison of a distance, with the column alone on one of them: the other is computed once per row."""
    a, b = node.args
    column = index("kv_idx")
    if low.levels is not HOOK_LEVELS or at.level != "elem" or not a.is_int or column in (a, b):
        return None
    difference = make("sub", a, b)
    if difference.op != "lin":
        return None
    constant, coeffs = difference.attr
    rest = [(c, x) for c, x in zip(coeffs, difference.args, strict=True) if _bare(x) is not column]
    sign = sum(c for c, x in zip(coeffs, difference.args, strict=True) if _bare(x) is column)
    if abs(sign) != 1 or any(low.level(x) not in ("head", "row") for _, x in rest):
        return None
    bound = make_lin(-sign * constant, [(-sign * c, x) for c, x in rest], difference.dtype)
    sides = low.term(column, at), low.term(bound, at, narrow=True)
    return sides if sign > 0 else sides[::-1]


def _bare(x: Expr) -> Expr:
    return x.args[0] if x.op == "cast" and x.is_int else x


def _below(low: Lowering, node: Expr) -> bool:
    lo, hi = low.ranges.of(node)
    return max(abs(lo), abs(hi)) <= min(NARROW_OTHER, NARROW_LIMIT)


def print_logic(low: Lowering, node: Expr, at: Block) -> Term:
    """``&`` and ``|`` also on bool: no branch, so that a loop over elements vectorises."""
    symbol, prec = LOGIC[node.op]
    a, b = (low.term(x, at) for x in node.args)

    def side(t: Term) -> str:
        return (
            t.text if t.prec >= UNARY or ((t.prec == prec and node.op == "and") or t.prec == prec == BITOR) else f"({t.text})"
        )

    return Term(f"{side(a)} {symbol} {side(b)}", prec, _joined(low, node, a, b) if node.is_int else "bool")


def print_not(low: Lowering, node: Expr, at: Block, narrow: bool) -> Term:
    symbol, a = "!" if node.op == "not" else "~", low.term(node.args[0], at)
    return Term(f"{symbol}{a.at(UNARY)}", UNARY, a.ctype)


def print_floordiv(low: Lowering, node: Expr, at: Block, narrow: bool) -> Term:
    """Floor division: a shift, C's division where both are known to be non-negative, else the floor form."""
    a, b = node.args
    if node.dtype == "f32":
        return call(low, "jg::ffloor_div", node, at)
    if b.is_const and b.attr > 0:
        left = low.term(a, at)
        if b.attr & (b.attr - 1) == 0:
            return Term(f"{left.at(SHIFT + 1)} >> {b.attr.bit_length() - 1}", SHIFT, left.ctype)
        if low.ranges.is_non_negative(a):
            return Term(f"{left.at(PRODUCT)} / {int_literal(b.attr)}", PRODUCT, left.ctype)
    return call(low, "jg::floor_div", node, at)


def print_mod(low: Lowering, node: Expr, at: Block, narrow: bool) -> Term:
    """Floor remainder: a mask, C's remainder where both are known to be non-negative, else the floor form."""
    a, b = node.args
    if node.dtype == "f32":
        return call(low, "jg::ffloor_mod", node, at)
    if b.is_const and b.attr > 0:
        left = low.term(a, at)
        cast = "(int)" if left.ctype == "long long" and not low.ranges.is_wide(node) else ""
        if b.attr & (b.attr - 1) == 0:
            text = f"{left.at(UNARY)} & {int_literal(b.attr - 1)}"
            return Term(f"{cast}({text})", UNARY, "int") if cast else Term(text, BITAND, left.ctype)
        if low.ranges.is_non_negative(a):
            text = f"{left.at(PRODUCT)} % {int_literal(b.attr)}"
            return Term(f"{cast}({text})", UNARY, "int") if cast else Term(text, PRODUCT, left.ctype)
    return call(low, "jg::floor_mod", node, at)


def print_pow(low: Lowering, node: Expr, at: Block, narrow: bool) -> Term:
    """Whole powers by multiplication, roots by their own function, the rest for positive bases."""
    base, exponent = node.args
    x = low.term(base, at).text
    if exponent.is_const and exponent.attr in (0.5, -0.5):
        return Term(f"jg::{'sqrt' if exponent.attr > 0 else 'rsqrt'}({x})")
    if exponent.is_const and float(exponent.attr).is_integer() and abs(exponent.attr) <= 64:
        return Term(f"jg::pow({x}, {int(exponent.attr)})")
    y = low.term(exponent, at)
    return Term(f"jg::exp2({y.at(PRODUCT)} * jg::log2({x}))")


def print_shift(low: Lowering, node: Expr, at: Block, narrow: bool) -> Term:
    """A shift by a count that is not constant: small constant ones are products and quotients in the IR."""
    left, right = (low.term(x, at) for x in node.args)
    wide = low.ranges.is_wide(node) or left.ctype == "long long"
    return Term(f"jg::{node.op}({'(long long)' if wide else ''}{left.at(UNARY) if wide else left.text}, "
                f"{'(int)' if right.ctype != 'int' else ''}{right.at(UNARY) if right.ctype != 'int' else right.text})",
                ATOM, "long long" if wide else left.ctype)  # fmt: skip


def print_where(low: Lowering, node: Expr, at: Block, narrow: bool) -> Term:
    """A conditional; what its arms load is read before, so both arms are plain values."""
    cond, yes, no = node.args
    low.name_loads(yes, at)
    low.name_loads(no, at)
    c, a, b = low.term(cond, at), low.term(yes, at), low.term(no, at)
    ctype = "long long" if "long long" in (a.ctype, b.ctype) else a.ctype
    return Term(f"{c.at(TERNARY + 1)} ? {a.at(TERNARY + 1)} : {b.at(TERNARY)}", TERNARY, ctype)


def print_cast(low: Lowering, node: Expr, at: Block, narrow: bool) -> Term:
    """A conversion; between integers the C++ type follows the range, so there is nothing to print."""
    source = low.term(node.args[0], at)
    if node.is_int and node.args[0].is_int:
        return source
    ctype = low.ctype(node)
    if _is_column(low, node):
        return Term("jg::as_float(kv_idx)", ATOM, ctype)  # templates count columns in floats as well
    if ctype == "float" and source.ctype == "bool":
        return Term(f"{source.at(TERNARY + 1)} ? 1.0f : 0.0f", TERNARY, "float")
    return Term(f"({ctype}){source.at(UNARY)}", UNARY, ctype)


def print_sign(low: Lowering, node: Expr, at: Block, narrow: bool) -> Term:
    if node.dtype == "f32":
        return call(low, "jg::sign", node, at)
    a = low.term(node.args[0], at)
    return Term(f"({a.at(RELATION + 1)} > 0) - ({a.at(RELATION + 1)} < 0)", SUM, "int")


def print_relu(low: Lowering, node: Expr, at: Block, narrow: bool) -> Term:
    a = low.term(node.args[0], at)
    zero = float_literal(0.0) if node.dtype == "f32" else "0LL" if a.ctype == "long long" else "0"
    return Term(f"jg::max({a.text}, {zero})", ATOM, a.ctype)


def print_place(low: Lowering, node: Expr, at: Block, narrow: bool) -> Term:
    """Where a key lies in a paged cache."""
    function = "slot" if node.op == "kv_slot" else "page"
    return Term(f"head.keys.{function}({low.term(node.args[1], at).text})", ATOM, "int")


def _call(name: str):  # type: ignore[no-untyped-def]
    return lambda low, node, at, narrow: call(low, name, node, at)


_PRINTERS = {
    "lin": print_lin, "load": print_load, "add": print_add, "sub": print_sub, "mul": _infix("*", PRODUCT),
    "truediv": _infix("/", PRODUCT), "neg": print_neg, "not": print_not, "bitnot": print_not, "floordiv": print_floordiv,
    "mod": print_mod, "pow": print_pow, "shl": print_shift, "shr": print_shift, "where": print_where, "cast": print_cast,
    "sign": print_sign, "relu": print_relu, "min": _call("jg::min"), "max": _call("jg::max"), "abs": _call("jg::abs"),
    "popcount": _call("jg::popcount"), **dict.fromkeys(PAGE_OPS, print_place),
}  # fmt: skip
