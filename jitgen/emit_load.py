"""Reading one element of a captured tensor: offsets by level, clamped indices, host-checked indices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jitgen.emit_text import ATOM, ELEMENT_CTYPE, PRODUCT, SUM, Term
from jitgen.ir import Expr
from jitgen.ir_ops import PAGE_OPS
from jitgen.program import ELEMENT_TO_IR

if TYPE_CHECKING:
    from jitgen.emit_lower import Block, Lowering


def print_load(low: Lowering, node: Expr, at: Block, narrow: bool) -> Term:
    """``jg::load(base, offset)``: what of the offset is known further out is part of the base pointer."""
    slot = low.unit.slots[node.attr]
    ctype = {"f32": "float", "bool": "bool", "i64": "long long"}.get(node.dtype, "int")
    ctype = "int" if ELEMENT_TO_IR[slot.dtype] == "bool" and node.dtype != "bool" else ctype
    base, here = f"args.{low.unit.slot_names[node.attr]}", []
    grouped = _by_level(low, node)
    for level, dims in grouped.items():
        if level == at.level or not dims:
            here += dims
        elif level == "col" and at.level == "elem":
            here += [d if _is_plain(low, node, d) else (d, _column_offset(low, node, d)) for d in dims]
        else:
            base = _pointer(low, node, level, base, tuple(d for lv, ds in grouped.items() for d in ds if _outer(lv, level)))
    terms = [d[1] if isinstance(d, tuple) else offset_term(low, node, d, at) for d in here]
    offset = " + ".join(t.at(SUM) for t in terms) if terms else "0"
    text = f"jg::load({base}, {offset})"
    if ctype == "bool":
        return Term(f"{text} != 0", 45, "bool")
    return Term(text, ATOM, ctype)


def _by_level(low: Lowering, node: Expr) -> dict[str, list[int]]:
    """Dimensions that move the offset, by the level of their index."""
    layout = low.unit.slots[node.attr].layout
    grouped: dict[str, list[int]] = {level: [] for level in ("head", "row", "col", "elem")}
    for dim, index in enumerate(node.args):
        if layout[dim] != "0":
            grouped[low.level(index)].append(dim)
    return grouped


def _outer(level: str, than: str) -> bool:
    return level == than or level == "head"


def _is_plain(low: Lowering, node: Expr, dim: int) -> bool:
    index, layout = node.args[dim], low.unit.slots[node.attr].layout
    return index.op == "index" and index.attr in low.host_checked and layout[dim] == "c"


def offset_term(low: Lowering, node: Expr, dim: int, at: Block) -> Term:
    """Elements to skip along one dimension, as seen from ``at``."""
    slot, name = low.unit.slots[node.attr], low.unit.slot_names[node.attr]
    index = index_term(low, node, dim, at)
    if slot.layout[dim] == "c":
        return index
    return Term(f"{index.at(PRODUCT)} * args.{name}_stride{dim}", PRODUCT, "long long")


def index_term(low: Lowering, node: Expr, dim: int, at: Block) -> Term:
    """The index along one dimension: clamped, unless the host checks that it fits."""
    index, name = node.args[dim], low.unit.slot_names[node.attr]
    if (index.op == "index" and index.attr in low.host_checked) or index.op in PAGE_OPS:
        return low.term(index, at)
    term = low.term(index, at, narrow=at.level == "elem")
    size = f"args.{name}_size{dim}" if term.ctype == "long long" else f"(int)args.{name}_size{dim}"
    text = term.text if low.ranges.is_non_negative(index) else f"jg::wrap_index({term.text}, {size})"
    return Term(f"jg::clamp_index({text}, {size})", ATOM, term.ctype)


def _pointer(low: Lowering, node: Expr, level: str, base: str, dims: tuple[int, ...]) -> str:
    """Name of the tensor's address with everything added that is known at ``level``; a member of that level's block."""
    home, slot, name = low.blocks[level], low.unit.slots[node.attr], low.unit.slot_names[node.attr]
    key = ("pointer", node.attr, tuple((d, node.args[d]) for d in dims))
    found = home.find(key)
    if found is not None:
        return found.text
    own = [d for d in dims if low.level(node.args[d]) == level]
    offset = " + ".join(offset_term(low, node, d, home).at(SUM) for d in own)
    ctype, text = f"const {ELEMENT_CTYPE[slot.dtype]}*", f"{base} + {offset}"
    comment = f"{name}[{', '.join(low.unit.comment(a) if d in dims else ':' for d, a in enumerate(node.args))}]"
    if home.prefix:
        return home.add_member(key, ctype, name, text, comment).text
    return home.add_local(key, ctype, name, text).text


def print_pointer(low: Lowering, node: Expr, dims: list[int]) -> str:
    """Address of a tensor after its per-head dimensions, for a user that steps through the others itself."""
    base = f"args.{low.unit.slot_names[node.attr]}"
    return _pointer(low, node, "head", base, tuple(dims)) if dims else base


def _column_offset(low: Lowering, node: Expr, dim: int) -> Term:
    """Offset along a dimension indexed by the key column alone, computed once per column."""
    home = low.blocks["col"]
    key = ("offset", node.attr, dim, node.args[dim])
    found = home.find(key)
    if found is not None:
        return found
    term = offset_term(low, node, dim, home)
    if not home.prefix:
        return term
    name = f"{low.unit.slot_names[node.attr]}_offset"
    return home.add_member(key, term.ctype, name, term.text, low.unit.comment(node.args[dim]))


def add_row_word(low: Lowering, node: Expr, words: Block) -> str:
    """Has ``words`` read two neighbouring columns of a row of a tensor, and the hook take the element from there; returns the
    condition under which every such pair is an aligned word."""
    slot, name = low.unit.slots[node.attr], low.unit.slot_names[node.attr]
    last = next(d for d, index in enumerate(node.args) if "kv_idx" in index.deps)
    dims = [d for d in range(slot.rank) if d != last and slot.layout[d] != "0"]
    outer = tuple(d for d in dims if low.level(node.args[d]) == "head")
    base = _pointer(low, node, "head", f"args.{name}", outer) if outer else f"args.{name}"
    row = _pointer(low, node, "row", base, tuple(dims))
    text = f"jg::load_pair<kPaired>({row}, kv_idx, step, last)"
    word = words.add_member((node, False), f"jg::Pair<{ELEMENT_CTYPE[slot.dtype]}>", name, text, low.unit.comment(node))
    low.given[node] = Term(f"{word.text}.at(odd)", ATOM, "float")
    return f"jg::is_paired({', '.join((f'args.{name}', *(f'args.{name}_stride{d}' for d in dims)))})"
