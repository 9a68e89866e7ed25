"""Statements of each hook of a variant: split into what is computed per row, per column, and per element."""

from __future__ import annotations

import functools
from dataclasses import replace

from jitgen import ir
from jitgen.abi import ArgField
from jitgen.emit_bits import BitsMask, print_bits, search_text
from jitgen.emit_early import drop_relative, level_marks
from jitgen.emit_load import add_row_word, index_term
from jitgen.emit_lower import HOOK_LEVELS, HOST_CHECKED, Block, Lowering, Unit
from jitgen.emit_section import BlockText, CopiedText, EarlyText, HookText
from jitgen.emit_split import level_of, outer_factor, split_floats
from jitgen.emit_text import ELEMENT_CTYPE
from jitgen.ir import Expr
from jitgen.ir_ops import PAGE_OPS
from jitgen.program import Program, reads_pages

ELEMENT_NAMES = frozenset(("args", "head", "row", "col", "ahead", "odd", "relative", "score", "q_idx", "kv_idx"))  # parameters
ELEMENT_BLOCKS = {"row": "row.", "col": "col.", "elem": ""}


def prefetches(unit: Unit, program: Program) -> tuple[str, ...]:
    """Statements that ask for what is stored of a key by slot or page, where nothing else but the KV head says where."""
    lines: dict[str, None] = {}
    for node in ir.walk(program.score, program.mask, program.value):
        if node.op != "load" or not any(i.op in PAGE_OPS for i in node.args):
            continue
        name, offsets = unit.slot_names[node.attr], []
        for dim, i in enumerate(node.args):
            place = {"kv_slot": "slot", "page": "page"}.get(i.op, "kv_h" if i is ir.index("kv_h") else None)
            stride = unit.slots[node.attr].layout[dim]
            if place is None:
                break
            if stride != "0":
                offsets.append(place if stride == "c" else f"{place} * args.{name}_stride{dim}")
        else:
            lines[f"jg::prefetch_line(args.{name} + {' + '.join(offsets)});"] = None
    return tuple(lines)


def capture_fields(unit: Unit) -> tuple[ArgField, ...]:
    """Launch arguments of the captures, by slot: a scalar is one field, a tensor its address, sizes and strides."""
    out: list[ArgField] = []
    for slot, name in zip(unit.slots, unit.slot_names, strict=True):
        if slot.kind == "scalar":
            is_float = slot.dtype == "f32"
            out.append(ArgField("double" if is_float else "int64_t", name, slot.dtype, "d" if is_float else "q"))
            continue
        out.append(ArgField(f"const {ELEMENT_CTYPE[slot.dtype]}*", name, f"{slot.dtype}, layout {slot.layout}", "P"))
        out += [ArgField("int64_t", f"{name}_size{d}") for d in range(slot.rank)]
        out += [ArgField("int64_t", f"{name}_stride{d}") for d in range(slot.rank)]
    return tuple(out)


def copied_text(unit: Unit, load: Expr | None) -> CopiedText:
    if load is None:
        return CopiedText()
    name, slot = unit.slot_names[load.attr], unit.slots[load.attr]
    keys, rows = (next(d for d, i in enumerate(load.args) if leaf in i.deps) for leaf in ("kv_idx", "q_idx"))
    others = [d for d in range(slot.rank) if d not in (keys, rows) and slot.layout[d] != "0"]
    low = _element_lowering(unit, [load])
    places = [index_term(low, load, d, unit.head).text for d in others]
    none = 2 - len(others)
    return CopiedText(
        name,
        slot.dtype,
        (*(f"args->{name}_size{d}" for d in (keys, rows, *others)), *["1"] * none),
        (*(f"args->{name}_stride{d}" for d in (rows, *others)), *["0"] * none),
        (*places, *["0"] * none),
    )


def block_text(block: Block) -> BlockText:
    return BlockText(tuple(m.text for m in block.members), tuple(block.lines))


def emit_mask(
    unit: Unit, root: Expr | None, positions: list[Expr], bits: BitsMask | None, *, compares_late: bool
) -> tuple[HookText, HookText]:
    """The mask hook, split into rows, columns and elements, and the conjunction of some of its parts over the same values."""
    if root is None:
        return HookText(), HookText()
    alone = [functools.reduce(lambda a, b: ir.make("and", a, b), positions)] if positions else []
    root = split_floats(root, level_of) if bits is None else bits.mask
    if compares_late:
        root = ir.rebuild(root, _as_number)
    low = _element_lowering(unit, [root, *alone])
    low.compares_late = compares_late
    if bits is not None:
        low.print_op = print_bits
    texts = []
    for part in (root, *alone):
        low.blocks["elem"] = Block("elem", taken=set(ELEMENT_NAMES))
        if bits is not None:
            low.blocks["col"] = low.blocks["elem"]  # there are no values of single columns
        texts.append(_hook_text(low, part))
    # values of rows and columns that the second part alone needs are in the blocks by now
    texts[0] = replace(texts[0], row=texts[-1].row, col=texts[-1].col)
    if bits is not None:
        texts = [replace(text, col=BlockText()) for text in texts]
    return texts[0], texts[1] if alone else HookText()


def _as_number(node: Expr) -> Expr | None:
    """A truth that is stored by slot or page, as a number that is compared: columns in shared memory are words."""
    if node.op == "load" and node.dtype == "bool" and reads_pages(node):
        return ir.make("ne", ir.load(int(str(node.attr)), "i32", node.args), ir.const(0))
    return None


def emit_search(unit: Unit, bits: BitsMask | None) -> HookText:
    """The search of a mask by bits, as a function of the row."""
    if bits is None or bits.search is None:
        return HookText()
    text = emit_value(unit, bits.search.value, {"q_idx": "elem"})
    return replace(text, value=search_text(unit, bits.search, text.value))


def _element_lowering(unit: Unit, roots: list[Expr]) -> Lowering:
    blocks = {level: Block(level, prefix, taken=set(ELEMENT_NAMES)) for level, prefix in ELEMENT_BLOCKS.items()}
    return Lowering(unit, {"head": unit.head, **blocks}, HOOK_LEVELS, roots)


def _hook_text(low: Lowering, root: Expr) -> HookText:
    value = low.term(root, low.blocks["elem"]).text
    return HookText(block_text(low.blocks["row"]), block_text(low.blocks["col"]), tuple(low.blocks["elem"].lines), value)


def emit_score(
    unit: Unit,
    root: Expr | None,
    relative: Expr | None,
    ahead: list[Expr],
    offset: Expr | None,
    initial: Expr | None,
    *,
    keep_units: bool,
    is_capped: bool,
) -> tuple[HookText, EarlyText]:
    """The score hook, and what of it comes before; its forms share the values of rows and columns."""
    if root is None:
        return HookText(), EarlyText()
    root = split_floats(root, level_of)
    flat = drop_relative(root) if relative is not None and not keep_units else None
    rest, level = flat if flat is not None and flat[0] is not None else (None, None)
    cap_scale = None
    if is_capped:
        root, cap_scale = outer_factor(root.args[0], level_of)
    low = _element_lowering(unit, [x for x in (root, offset, rest, initial) if x is not None])
    words = Block("elem", "ahead.", taken={"args", "head", "row", "kv_idx", "step", "last"})
    paired = " & ".join(dict.fromkeys(add_row_word(low, node, words) for node in ahead))
    score = _hook_text(low, root)
    others = []
    for other in (rest, offset, initial):
        low.blocks["elem"] = Block("elem", taken=set(ELEMENT_NAMES))
        others.append(HookText() if other is None else _hook_text(low, other))
    score = HookText(block_text(low.blocks["row"]), block_text(low.blocks["col"]), score.lines, score.value)
    by_distance = emit_value(unit, relative, {"distance": "elem"})
    level_text = emit_value(unit, level, {"relative": "elem"})
    marks = level_marks(relative) if flat is not None and relative is not None else None
    mark_texts = tuple(emit_value(unit, mark, {"distance": "elem"}) for mark in marks or ())
    cap_text = emit_value(unit, cap_scale, {})
    flat_text, offset_text, initial_text = others
    return score, EarlyText(
        by_distance, flat_text, level_text, mark_texts, block_text(words), paired, offset_text, cap_text, initial_text
    )


def emit_value(unit: Unit, root: Expr | None, levels: dict[str, str], host_checked: frozenset[str] = HOST_CHECKED) -> HookText:
    """A hook that yields one value, not one per element."""
    if root is None:
        return HookText()
    block = Block("elem", taken={"args", "head", "lse", "q_idx", "kv_idx"})
    low = Lowering(unit, {level: block for level in ("row", "col", "elem")} | {"head": unit.head}, levels, [root])
    low.host_checked = host_checked
    value = low.term(root, block).text  # adds to the lines of block
    return HookText(lines=tuple(block.lines), value=value)
