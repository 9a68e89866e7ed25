"""What of a score is known before the logits of a tile are: parts that a kernel works out while Q K^T runs.

- *relative*: a part that depends on positions through ``q_idx - kv_idx`` alone, such as a bucketed bias. A tile has far fewer
  distances than logits (191 for 64 x 128), so the part is evaluated once for each. Where it is the same for all of them,
  as it may be far from the diagonal, and is a term of the score, it joins the offset.
- *columns*: what a hook computes per column, once instead of by every thread that has a row. There is room for one value, so
  *late* leaves comparisons to the elements.
- *ahead*: an element of a captured tensor that is contiguous along kv_idx, such as a dense bias. Two neighbouring columns are
  read as one word, and their latency passes under the product.
- *tile*: where such a tensor is a term of the score, its elements have 16 bits and q_idx and kv_idx index it as they are, the
  copy engine brings a tile of it to each warp group, and the product begins from it. Loads would take 2 columns of 8 rows at a
  time, and the first cache nearly as long as the products take.
- *cap*: a tanh around the whole score. The template bends a tile at once, and by a polynomial where all of it is far from the
  cap: the unit that knows tanh has the exponentials to compute. What all of a tile is multiplied by goes into its coefficients.
- *offset*: a multiple of the distance, as in ALiBi. Up to the first column of a tile it is the same for a whole row of the tile
  and joins the row's maximum.
- *initial*: what the product begins from. Terms that kv_idx alone determines, such as a bias per key, are evaluated by the warp
  that copies keys, once for all rows of a CTA; terms of the row alone then join the offset. So do steps from the first column,
  what is left of a multiple of the distance.
- *bits* is for masks: they are applied to all columns of a thread at once (emit_bits.py), and with *positions* tiles are told
  apart in which positions decide alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from jitgen import ir
from jitgen.emit_bits import mask_by_bits
from jitgen.ir import Expr, walk
from jitgen.program import Program, Slot, reads_pages

POSITIONS = frozenset(("q_idx", "kv_idx"))
PAIRED_DTYPES = ("float16", "bfloat16", "float32")  # of which two elements are one word
COPIED_DTYPES = ("float16", "bfloat16")
CAPS = ("tanh", "tanh_approx")
_Q, _KV, _DISTANCE = ir.index("q_idx"), ir.index("kv_idx"), ir.index("distance")
_AFFINE = frozenset(("index", "lin", "cast", "add", "sub", "mul", "neg"))


def early_parts(program: Program, layout: str, head_dim_v: int) -> frozenset[str]:
    """What of the above the sm90 kernel of a program does."""
    # rows of other layouts are heads as well
    parts = {"relative", "cap", "offset", "initial"} if layout == "dense" else {"offset"}
    if layout == "dense" and head_dim_v < 256:  # whose descriptors take the uniform registers
        parts.add("columns")
    if layout == "dense" and is_copied(program):
        parts.add("tile")
    if layout != "dense" and head_dim_v < 256 and _has_shared_columns(program):
        parts |= {"columns", "late"}
    if layout != "dense" and head_dim_v < 256 and reads_pages(program.score) and looks_up_columns(program):
        parts.add("columns")
    if layout == "dense" and mask_by_bits(program) is not None:
        parts |= {"bits", "positions"}
    words = 0 if program.score is None else ahead_words(ahead_loads(program.score, program.slots), program.slots)
    if words <= (2 if head_dim_v < 256 else 1):  # more would not stay in registers
        parts.add("ahead")
    return frozenset(parts)


def _has_shared_columns(program: Program) -> bool:
    """Whether the mask is the only hook that looks at columns, and its columns are the same to all query heads of a KV head."""
    mask, score = program.mask, program.score
    return mask is not None and "h" not in mask.deps and (score is None or "kv_idx" not in score.deps)


def looks_up_columns(program: Program) -> bool:
    """Whether hooks on logits look up what is stored by slot or page, two loads and a division, and their columns are the same
    to all query heads of a KV head."""
    roots = [root for root in (program.score, program.mask) if root is not None]
    return bool(reads_pages(*roots)) and not any("h" in root.deps for root in roots)


# ---- parts of the distance -----------------------------------------------------------------------------------------------


def take_relative(score: Expr) -> tuple[Expr, Expr | None]:
    """The score over the leaf 'relative', and what that stands for over the leaf 'distance'; None if there is no such part."""
    parts = [part for part in _relative_parts(score) if _is_worth_a_table(part)]
    if not parts:
        return score, None
    part = max(parts, key=lambda n: sum(1 for _ in walk(n)))
    return ir.rebuild(score, lambda n: ir.index("relative") if n is part else None), of_distance(part)


def _relative_parts(root: Expr) -> Iterator[Expr]:
    """The largest floats in ``root`` that depend on the distance alone."""
    seen: set[Expr] = set()
    pending = [root]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.dtype == "f32" and POSITIONS <= node.deps and "score" not in node.deps and of_distance(node) is not None:
            yield node
        else:
            pending += reversed(node.args)


def _is_worth_a_table(part: Expr) -> bool:
    return any(n.op not in _AFFINE for n in walk(part) if n.deps & POSITIONS)


def of_distance(root: Expr) -> Expr | None:
    """``root`` over the leaf 'distance' (q_idx - kv_idx); None if it depends on positions in another way."""
    done: dict[Expr, Expr] = {}
    for node in walk(root):
        args = tuple(done[a] for a in node.args)
        if node.op == "lin":
            done[node] = _lin_of_distance(node, args)
        else:
            done[node] = node if args == node.args else ir.remake(node, args)
    return None if done[root].deps & POSITIONS else done[root]


def _lin_of_distance(node: Expr, args: tuple[Expr, ...]) -> Expr:
    constant, coeffs = node.attr
    coefficient = {_position(a): c for c, a in zip(coeffs, node.args, strict=True)}
    if coefficient.get(_Q, 0) == 0 or coefficient.get(_Q) != -coefficient.get(_KV, 0):
        return node if args == node.args else ir.remake(node, args)
    others = [(c, new) for c, old, new in zip(coeffs, node.args, args, strict=True) if _position(old) not in (_Q, _KV)]
    return ir.make_lin(constant, [(coefficient[_Q], _DISTANCE), *others], node.dtype)


def _position(term: Expr) -> Expr:
    return term.args[0] if term.op == "cast" and term.args[0] in (_Q, _KV) else term


# Operations that may stay where their operand rises: without one of them two distances never have the same value.
_RESTING = frozenset(("min", "max", "floordiv", "floor", "ceil", "round", "trunc", "relu", "sign", "lt", "le"))
# Operations that never fall where their operand rises.
_RISING = frozenset(("cast", "floor", "ceil", "round", "trunc", "sign", "relu", "exp", "exp2", "log", "log2", "log1p", "sqrt"))


@lru_cache(maxsize=4096)  # what is shared is looked at once
def level_marks(node: Expr) -> tuple[Expr, ...] | None:
    """Values of 'distance' that tell where ``node`` is level: if each is the same at both ends of a range of distances, so is
    ``node`` in all of it. None if there are none."""
    if "distance" not in node.deps:
        return ()
    if _direction(node) is not None:
        return (node,) if any(n.op in _RESTING or _truncates(n) for n in walk(node)) else None
    parts = [level_marks(arg) for arg in (node.args[:1] if node.op == "where" else node.args)]
    if any(part is None for part in parts):
        return None
    marks = tuple(dict.fromkeys(mark for part in parts for mark in part or ()))
    if node.op != "where":
        return marks or None
    return None if None in map(_direction, node.args[1:]) else (*marks, node)


@lru_cache(maxsize=4096)
def _direction(node: Expr) -> int | None:
    """1 if ``node`` never falls as the distance grows, -1 if it never rises, 0 if it does not depend on it; else None."""
    if "distance" not in node.deps:
        return 0
    if node is _DISTANCE:
        return 1
    args = [_direction(arg) for arg in node.args]
    if None in args:
        return None
    signs = [sign for sign in args if sign is not None]
    if node.op in _RISING:
        return None if node.dtype == "bool" else signs[0]
    if node.op in ("add", "min", "max"):
        return _common(signs)
    if node.op == "lin":
        return _common([sign if c > 0 else -sign for c, sign in zip(node.attr[1], signs, strict=True)])
    if node.op in ("sub", "lt", "le"):  # of booleans, true counts as more
        return _common([signs[0], -signs[1]] if node.op == "sub" else [-signs[0], signs[1]])
    if node.op in ("neg", "not"):
        return -signs[0]
    if node.op in ("mul", "truediv", "floordiv") and node.args[1].op == "const" and node.args[1].attr != 0:
        return signs[0] if node.args[1].attr > 0 else -signs[0]
    return None


def _truncates(node: Expr) -> bool:
    return node.op == "cast" and node.is_int and not node.args[0].is_int


def _common(signs: Sequence[int]) -> int | None:
    found = {sign for sign in signs if sign != 0}
    return found.pop() if len(found) == 1 else None


def drop_relative(root: Expr) -> tuple[Expr | None, Expr] | None:
    """``root`` without its term 'relative' (or a multiple of it), and that term; None if it has no such term, or 'relative'
    elsewhere too. The rest is None where nothing is left."""
    found = _drop_term(root)
    return None if found is None or (found[0] is not None and "relative" in found[0].deps) else found


def _drop_term(root: Expr) -> tuple[Expr | None, Expr] | None:
    leaf = ir.index("relative")
    if root is leaf or (root.op == "mul" and leaf in root.args and not _other(root, leaf).deps & (POSITIONS | {"score"})):
        return None, root
    if root.op not in ("add", "sub", "neg") or root.dtype != "f32":
        return None
    for i, term in enumerate(root.args):
        found = _drop_term(term)
        if found is not None:
            is_negative = root.op == "neg" or (root.op == "sub" and i == 1)
            offset = ir.make("neg", found[1]) if is_negative else found[1]
            return _without(root, i, found[0]), offset
    return None


def _without(root: Expr, i: int, rest: Expr | None) -> Expr | None:
    if rest is not None:
        return ir.make(root.op, *root.args[:i], rest, *root.args[i + 1 :])
    if root.op == "neg":
        return None
    other = root.args[1 - i]
    return ir.make("neg", other) if root.op == "sub" and i == 0 else other


def _other(product: Expr, factor: Expr) -> Expr:
    return product.args[1] if product.args[0] is factor else product.args[0]


# ---- elements that can be read ahead ---------------------------------------------------------------------------------------


def ahead_loads(score: Expr, slots: Sequence[Slot]) -> list[Expr]:
    """Loads of a score that walk along a row of a captured tensor as kv_idx does."""
    return [n for n in walk(score) if n.op == "load" and _is_row_load(n, slots[int(n.attr)])]


def ahead_words(loads: Sequence[Expr], slots: Sequence[Slot]) -> int:
    """Registers that two neighbouring columns take."""
    return sum(2 if slots[int(n.attr)].dtype == "float32" else 1 for n in loads)


def _is_row_load(node: Expr, slot: Slot) -> bool:
    dims = [d for d, index in enumerate(node.args) if "kv_idx" in index.deps]
    if slot.dtype not in PAIRED_DTYPES or len(dims) != 1 or "q_idx" not in node.deps:
        return False
    return node.args[dims[0]] is _KV and slot.layout[dims[0]] == "c"


# ---- a tensor that is copied in tiles ---------------------------------------------------------------------------------------


def is_copied(program: Program) -> bool:
    """Whether a kernel may copy a dense bias of this program in tiles: nothing else of it needs many registers."""
    score = program.score
    if score is None or program.norm is not None or take_relative(score)[1] is not None:
        return False
    rest, _, load = take_copied(score, program.slots)
    others = [n for n in walk(rest) if n.op == "load" and "kv_idx" in n.deps]
    searched = [n for n in walk(program.mask) if n.op == "load" and n.deps & POSITIONS]
    return load is not None and not others and all(program.slots[int(n.attr)].is_sorted for n in searched)


def take_copied(root: Expr, slots: Sequence[Slot]) -> tuple[Expr, Expr | None, Expr | None]:
    """``root`` without its term of a dense bias; that term over the leaf 'copied', and the load that it stands for. None where
    there is no such term, or ``score`` occurs otherwise than as one."""
    loads = ahead_loads(root, slots)
    terms = list(_signed_terms(root, 1))
    if [(s, t) for s, t in terms if "score" in t.deps] != [(1, ir.index("score"))] or len(loads) != 1:
        return root, None, None
    (load,) = loads
    mine = [(s, t) for s, t in terms if any(n is load for n in walk(t))]
    rest = [term for term in terms if term not in mine]
    term = ir.rebuild(_sum_of(mine), lambda n: ir.index("copied") if n is load else None)
    if not _is_copied_in_tiles(load, slots[int(load.attr)]) or term.deps & (_VARYING | POSITIONS):
        return root, None, None
    return _sum_of(rest), term, load


def _is_copied_in_tiles(load: Expr, slot: Slot) -> bool:
    """Whether the copy engine can take a tile of rows and keys of a tensor: a box of two dimensions, at a place in two more."""
    rows = [d for d, index in enumerate(load.args) if "q_idx" in index.deps]
    if slot.dtype not in COPIED_DTYPES or len(rows) != 1:
        return False
    return load.args[rows[0]] is _Q and slot.layout[rows[0]] == "s"


# ---- terms of columns and of rows -------------------------------------------------------------------------------------------


_VARYING = frozenset(("q_idx", "kv_idx", "score", "relative", "step"))


def take_initial(root: Expr) -> tuple[Expr, Expr | None, Expr | None]:
    """``root`` without its terms of the column alone and of the row alone; the former; the latter. None where there are none.

    All stay where ``score`` occurs otherwise than as one term.
    """
    terms = list(_signed_terms(root, 1))
    scores = [(s, t) for s, t in terms if "score" in t.deps]
    columns = [(s, t) for s, t in terms if t.deps & _VARYING in ({"step"}, {"kv_idx"})]
    if scores != [(1, ir.index("score"))] or not columns:
        return root, None, None
    rows = [(s, t) for s, t in terms if t.deps & _VARYING <= {"q_idx"}]
    rest = [term for term in terms if term not in columns and term not in rows]
    return _sum_of(rest), _sum_of(columns), _sum_of(rows) if rows else None


def _signed_terms(node: Expr, sign: int) -> Iterator[tuple[int, Expr]]:
    if node.dtype == "f32" and node.op in ("add", "sub", "neg"):
        for i, arg in enumerate(node.args):
            yield from _signed_terms(arg, -sign if node.op == "neg" or (node.op == "sub" and i == 1) else sign)
    else:
        yield sign, node


def _sum_of(terms: list[tuple[int, Expr]]) -> Expr:
    (sign, total), *others = sorted(terms, key=lambda term: -term[0])  # a positive one first
    total = total if sign > 0 else ir.make("neg", total)
    for sign, term in others:
        total = ir.make("add" if sign > 0 else "sub", total, term)
    return total


# ---- multiples of the distance ----------------------------------------------------------------------------------------------


def take_offset(root: Expr) -> tuple[Expr, Expr | None]:
    """``root`` with its multiple of the distance counted from the tile's first column (leaf 'step'), and what was left out
    (over the leaf 'start', that column); None if no term of it is one."""
    if root.op in ("add", "sub", "neg") and root.dtype == "f32":
        for i, term in enumerate(root.args):
            rest, offset = take_offset(term)
            if offset is not None:
                is_negative = root.op == "neg" or (root.op == "sub" and i == 1)
                args = (*root.args[:i], rest, *root.args[i + 1 :])
                return ir.make(root.op, *args), ir.make("neg", offset) if is_negative else offset
    if root.op == "mul":
        for distance, factor in (root.args, root.args[::-1]):
            split = _split_distance(distance)
            if split is not None and not factor.deps & (POSITIONS | {"score", "relative"}):
                return ir.make("mul", split[0], factor), ir.make("mul", split[1], factor)
    return _split_distance(root) or (root, None)


def _split_distance(node: Expr) -> tuple[Expr, Expr] | None:
    """``kv_idx - x`` of floats as the steps from the tile's first column, and the rest; the same for ``x - kv_idx``."""
    if node.op != "sub":
        return None
    left, right = node.args
    step, start, column = ir.index("step"), ir.index("start"), ir.cast(_KV, "f32")
    if left is column and not right.deps & {"kv_idx", "score", "relative"}:
        return step, ir.make("sub", start, right)
    if right is column and not left.deps & {"kv_idx", "score", "relative"}:
        return ir.make("neg", step), ir.make("sub", left, start)
    return None
