"""Rewrites of float expressions that move work out of the element loop.

- ``float(q - k + c)`` becomes ``float(q + c) - float(k)``: one subtraction of two values computed per row and per column.
  Both conversions are exact below 2**24, and the difference of nearby positions is exact too, so a distance bias keeps
  its accuracy: ``slope * (k - q)`` is one subtraction and one fused multiply-add. (``slope * k - slope * q`` would cost
  one operation less and lose the low bits of both products.)
- ``x / y`` with ``y`` known outside the element loop becomes ``x * (1 / y)``: at most one more rounding.
- in a product, factors known outside the element loop are multiplied first: ``(s * a) * b`` becomes ``s * (a * b)``.
- in a sum, terms that depend on the row only and on the column only are added first: ``s + f[q] - f[k]`` becomes
  ``s + (f[q] - f[k])``.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

from jitgen import ir
from jitgen.emit_lower import HOOK_LEVELS, join_levels
from jitgen.ir import Expr, walk

LevelOf = Callable[[Expr], str]
MAX_FACTORS = 32  # that are put in order within a product


def raw_score(score: Expr, *, keep_units: bool) -> tuple[Expr, Expr]:
    """A score as a function of q . k, and the factor that turns its value into natural units."""
    logit, scale = ir.index("score"), ir.index("scale")
    scaled = ir.make("mul", logit, scale)
    value = ir.rebuild(score, lambda n: scaled if n is logit else None)
    if not keep_units and "scale" not in score.deps:
        quotient = divided(value, scaled, logit, ir.make("truediv", ir.const(1.0), scale))
        if quotient is not None:
            return split_floats(quotient, level_of), scale
    value = split_floats(value, level_of)
    return (value, ir.const(1.0)) if keep_units else outer_factor(value, level_of)


def level_of(node: Expr) -> str:
    return join_levels({HOOK_LEVELS.get(d, "head") for d in node.deps})


def split_floats(root: Expr, level_of: LevelOf) -> Expr:
    """``root`` with the rewrites of this module applied to every element-level float."""
    users = Counter(a for n in walk(root) for a in n.args)
    done: dict[Expr, Expr] = {}
    absorbed = {a for n in walk(root) if _is_sum(n) for a in n.args if _is_sum(a) and users[a] == 1}
    for node in walk(root):
        args = tuple(done[a] for a in node.args)
        if node.dtype == "f32" and level_of(node) == "elem":
            done[node] = _rewritten(node, args, done, absorbed, level_of)
        else:
            done[node] = node if args == node.args else ir.remake(node, args)
    return done[root]


def _is_sum(node: Expr) -> bool:
    return node.dtype == "f32" and node.op in ("add", "sub")


def _rewritten(node: Expr, args: tuple[Expr, ...], done: dict[Expr, Expr], absorbed: set[Expr], level_of: LevelOf) -> Expr:
    if node.op == "cast" and node.args[0].op == "lin":
        return _split_cast(node.args[0], level_of) or ir.remake(node, args)
    if node.op == "truediv" and level_of(args[1]) != "elem":
        return _group_product(ir.make("mul", args[0], ir.make("truediv", ir.const(1.0), args[1])), level_of)
    if node.op == "mul":
        return _group_product(ir.remake(node, args), level_of)
    if _is_sum(node) and node not in absorbed:
        return _group_sum(_terms(node, 1, done, absorbed), level_of)
    return node if args == node.args else ir.remake(node, args)


def _group_product(node: Expr, level_of: LevelOf) -> Expr:
    groups: dict[str, Expr] = {}
    for factor in _factors(node, level_of):
        level = level_of(factor)
        groups[level] = ir.make("mul", groups[level], factor) if level in groups else factor
    outer = [groups[level] for level in ("head", "row", "col") if level in groups]
    if "elem" not in groups or not outer:
        return node
    return ir.make("mul", groups["elem"], functools.reduce(lambda a, b: ir.make("mul", a, b), outer))


def _factors(node: Expr, level_of: LevelOf) -> list[Expr]:
    """Factors of a product, in their order; some are products themselves where there are many: a value that is squared again
    and again has a number of factors that doubles each time."""
    found, pending = [], [node]
    while pending:
        factor = pending.pop()
        is_product = factor.op == "mul" and factor.dtype == "f32" and level_of(factor) == "elem"
        if is_product and len(found) + len(pending) + 2 <= MAX_FACTORS:
            pending += factor.args[::-1]
        else:
            found.append(factor)
    return found


def outer_factor(root: Expr, level_of: LevelOf) -> tuple[Expr, Expr]:
    """``root`` as a value times a factor that is the same for the whole head (1 if there is none)."""
    if root.op == "mul" and root.dtype == "f32":
        for value, factor in (root.args, root.args[::-1]):
            if level_of(factor) == "head" and level_of(value) != "head":
                return value, factor
    return root, ir.const(1.0)


def divided(root: Expr, scaled: Expr, logit: Expr, inverse: Expr) -> Expr | None:
    """``root * inverse`` where ``scaled`` occurs as a term of a sum only, and becomes ``logit``: a bias costs one fused
    multiply-add an element then. None where it occurs otherwise."""
    done: dict[Expr, Expr | None] = {}  # what is shared is divided once

    def of(node: Expr) -> Expr | None:
        if node not in done:
            done[node] = quotient(node)
        return done[node]

    def quotient(node: Expr) -> Expr | None:
        if node is scaled:
            return logit
        if "score" not in node.deps:
            return ir.make("mul", node, inverse)
        if node.op not in ("add", "sub", "where") or (node.op == "where" and "score" in node.args[0].deps):
            return None
        parts = [a if a.dtype == "bool" else of(a) for a in node.args]
        return None if any(p is None for p in parts) else ir.make(node.op, *parts)  # type: ignore[arg-type]

    return of(root)


def _split_cast(lin: Expr, level_of: LevelOf) -> Expr | None:
    """``float(sum)`` as a difference of floats by level; None if the sum has a term of element level."""
    constant, coeffs = lin.attr
    rows = [(c, a) for c, a in zip(coeffs, lin.args, strict=True) if level_of(a) in ("head", "row")]
    cols = [(c, a) for c, a in zip(coeffs, lin.args, strict=True) if level_of(a) == "col"]
    if len(rows) + len(cols) < len(coeffs) or not rows or not cols:
        return None
    # The constant goes with the longer part: `k` and `q + 1` rather than `k - 1` and `q`.
    side = rows if all(level_of(a) == "head" for _, a in rows) or len(cols) == 1 else cols
    total: Expr | None = None
    for part in sorted((rows, cols), key=lambda p: p[0][0] < 0):
        flip = total is not None and all(c < 0 for c, _ in part) and (part is not side or constant <= 0)
        sign = -1 if flip else 1
        value = ir.make_lin(sign * constant if part is side else 0, [(sign * c, a) for c, a in part], lin.dtype)
        as_float = ir.cast(value, "f32")
        total = as_float if total is None else ir.make("sub" if flip else "add", total, as_float)
    return total


Terms = list[tuple[int, Expr]]


def _terms(node: Expr, sign: int, done: dict[Expr, Expr], absorbed: set[Expr]) -> Terms:
    """The terms of a sum with their signs, sums inside it taken apart."""
    out: Terms = []
    for i, a in enumerate(node.args):
        s = -sign if node.op == "sub" and i == 1 else sign
        out += _terms(a, s, done, absorbed) if a in absorbed else [(s, done[a])]
    return out


def _group_sum(terms: Terms, level_of: LevelOf) -> Expr:
    groups: dict[str, Terms] = {"elem": [], "row": [], "col": []}
    for s, t in terms:
        level = level_of(t)
        groups["row" if level == "head" else level].append((s, t))
    outer = _total([t for name in ("row", "col") if groups[name] for t in [_total(groups[name])]])
    inner = _total(groups["elem"])
    whole = _total([t for t in (inner, outer) if t is not None])
    assert whole is not None
    sign, total = whole
    return total if sign > 0 else ir.make("neg", total)


def _total(terms: list[tuple[int, Expr] | None] | Terms) -> tuple[int, Expr] | None:
    """Sum of signed terms as one signed term, beginning with a positive one where there is any."""
    present = sorted((t for t in terms if t is not None), key=lambda t: t[0] < 0)
    if not present:
        return None
    first_sign, total = present[0]
    for sign, term in present[1:]:
        total = ir.make("add" if sign == first_sign else "sub", total, term)
    return first_sign, total
