"""A program becomes the variant section: the part of a kernel's source that says what the variant means.

The section is the same text for CPU and CUDA. Its statements are made here and in the ``emit_*`` modules, its structure is
``kernel_templates/attention/variant.h.jinja``. What each function of it is given and returns is written in that template.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace

from jitgen import ir
from jitgen.abi import ArgField
from jitgen.emit_bits import BitsMask, mask_by_bits, print_bits, search_text
from jitgen.emit_early import (
    ahead_loads,
    drop_relative,
    level_marks,
    looks_up_columns,
    take_copied,
    take_initial,
    take_offset,
    take_relative,
)
from jitgen.emit_load import add_row_word, index_term
from jitgen.emit_lower import HOOK_LEVELS, HOST_CHECKED, Block, Lowering, Unit, join_levels
from jitgen.emit_mask import MaskAnalysisText, emit_mask_analysis, is_causal, position_parts
from jitgen.emit_norm import NormText, OutputText, emit_norm, emit_output
from jitgen.emit_split import divided, outer_factor, split_floats
from jitgen.emit_text import ELEMENT_CTYPE
from jitgen.ir import Expr
from jitgen.ir_ops import PAGE_OPS
from jitgen.program import Program, reads_pages, uses_index

CAPS = ("tanh", "tanh_approx")
WITHIN_ONE = (*CAPS, "sigmoid", "erf", "sin", "cos")  # functions whose values stay within [-1, 1]
ELEMENT_NAMES = frozenset(("args", "head", "row", "col", "ahead", "odd", "relative", "score", "q_idx", "kv_idx"))  # parameters
ROWS_CHECKED = frozenset(("kv_h",))  # of what transforms of rows index: see kv_emit.py
ELEMENT_BLOCKS = {"row": "row.", "col": "col.", "elem": ""}


@dataclass(frozen=True)
class BlockText:
    """Statements of one function and the fields of the struct they fill."""

    fields: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class HookText:
    """A hook evaluated per element: what it computes per row, per column, and the value."""

    row: BlockText = BlockText()
    col: BlockText = BlockText()
    lines: tuple[str, ...] = ()
    value: str = ""


@dataclass(frozen=True)
class EarlyText:
    """What of a score is worked out before the logits are there: see emit_early.py."""

    relative: HookText = HookText()  # over `distance`
    flat: HookText = HookText()  # the hook where `relative` is the same in the whole tile, without it
    level: HookText = HookText()  # what is added to all logits there, over `relative`
    marks: tuple[HookText, ...] = ()  # over `distance`: where all are the same at both ends of a tile, `relative` is level
    ahead: BlockText = BlockText()
    paired: str = ""  # condition under which neighbouring columns may be read as one word
    offset: HookText = HookText()  # over the first column of a tile
    cap_scale: HookText = HookText()  # what tanh is given is the score hook's value times this
    initial: HookText = HookText()  # over the values of a column


@dataclass(frozen=True)
class CopiedText:
    """A captured tensor that is copied in tiles of rows and keys."""

    name: str = ""
    dtype: str = ""
    sizes: tuple[str, ...] = ()  # keys, rows, two more
    strides: tuple[str, ...] = ()  # all but that of keys, which is 1
    places: tuple[str, ...] = ()  # in the two others


@dataclass(frozen=True)
class VariantSection:
    """Everything ``variant.h.jinja`` prints, and what the kernel templates and the launcher must know of it."""

    backend: str
    args: tuple[ArgField, ...]
    copied: CopiedText
    head: BlockText
    score: HookText
    early: EarlyText
    score_factor: HookText
    mask: HookText
    mask_positions: HookText  # the part of the mask that reads no tensor
    mask_search: HookText  # of a row, the key that `found` stands for in a mask by bits
    analysis: MaskAnalysisText
    sink: HookText
    norm: NormText
    lse: HookText
    value: HookText
    prefetches: tuple[str, ...]
    output: OutputText
    raw_scores: bool
    reads_q_off: bool
    reads_q_first: bool
    reads_kv_off: bool
    reads_pages: bool
    has_value: bool
    prefetches_keys: bool
    hoists_columns: bool  # decode looks them up with those of `value`; alone they are looked up as fast where they are used
    has_score: bool
    score_is_bounded: bool
    score_is_capped: bool
    has_relative: bool
    has_flat: bool
    flat_is_plain: bool
    flat_is_marked: bool
    has_ahead: bool
    ahead_serves_batch: bool
    has_offset: bool
    has_distance_offset: bool
    has_initial: bool
    initial_by_column: bool
    initial_by_tile: bool
    initial_by_steps: bool
    score_is_initial: bool
    score_columns: bool
    mask_columns: bool
    looks_ahead: bool
    has_early: bool
    has_mask: bool
    has_mask_positions: bool
    has_mask_bits: bool  # `mask` is over all columns of a thread: see emit_bits.py
    has_mask_search: bool
    has_position_bits: bool
    mask_scans: bool
    mask_spans_together: bool
    mask_reads_head: bool  # of either kind
    mask_reads_query_head: bool  # so that the query heads of a KV head share no rectangle
    mask_reads_tensors: bool
    mask_is_causal: bool
    has_sink: bool
    custom_norm: bool
    norm_rescales: bool
    norm_reverse: bool
    norm_needs_cumsum: bool
    has_norm_lse: bool
    norm_has_order: bool
    can_split: bool  # parts of a row's keys can be joined
    has_lse_mod: bool
    has_output: bool


def section_context(section: VariantSection, layout: str = "dense") -> dict[str, object]:
    """Template context of ``variant.h.jinja``: the fields of the section, and the layout, which says where lengths are."""
    return {"layout": layout} | {f.name: getattr(section, f.name) for f in fields(section)}


def emit_variant(
    program: Program, *, backend: str, raw_scores: bool = False, early: frozenset[str] = frozenset()
) -> VariantSection:
    """The variant section of ``program``; ``backend`` is 'cpu' or 'cuda'.

    With ``raw_scores`` score_elem is given q . k as it is, and what it returns is still to be multiplied by score_factor:
    decide alone, 'bits' where it masks by bits (emit_bits.py); 'prefetch' where it asks for what is stored by slot beforehand.
    ``early`` names what of a score the template takes over (emit_early.py): 'relative', 'columns', 'ahead', 'cap', 'initial',
    'tile', 'offset'; 'late' where a mask is to have few values by column; 'positions' where it tells tiles whose mask positions
    decide alone, and 'bits' where it masks by bits (emit_bits.py).

    Errors:  UnsupportedVariant when an operation has no meaning where the program uses it.
    """
    unit = Unit(program.slots)
    score = program.score if program.score is not ir.index("score") else None
    mask = program.mask if program.mask is not ir.TRUE else None
    norm = emit_norm(unit, program.norm)
    factor = relative = offset = initial = rows = copied = None
    if "relative" in early and score is not None:
        score, relative = take_relative(score)
    if "tile" in early and score is not None:
        score, initial, copied = take_copied(score, program.slots)
    if raw_scores and score is not None:
        score, factor = _raw_score(score, keep_units=program.norm is not None)
    if "offset" in early and score is not None and program.norm is None:
        score, offset = take_offset(score)
    ahead = ahead_loads(score, program.slots) if "ahead" in early and score is not None else []
    by_column = False
    if copied is not None:
        initial = split_floats(ir.make("mul", initial, ir.make("truediv", ir.const(1.0), ir.index("scale"))), _level)
    if "initial" in early and copied is None and score is not None and program.norm is None:
        score, initial, rows = take_initial(score)
        by_column = initial is not None and "kv_idx" in initial.deps
        if by_column:  # they are counted from the tile's first, which the offset has
            rows = ir.const(0.0) if rows is None else rows
        offset = rows if offset is None else offset if rows is None else ir.make("add", offset, rows)
    positions = position_parts(mask) if "positions" in early else []
    analysis = emit_mask_analysis(unit, mask, by_positions="positions" in early)
    is_capped = "cap" in early and score is not None and score.op in CAPS and program.norm is None
    score_text, early_text = _emit_score(
        unit, score, relative, ahead, offset, initial, keep_units=program.norm is not None, is_capped=is_capped
    )
    factor_text = _emit_value(unit, factor, {})
    bits = mask_by_bits(program) if "bits" in early and mask is not None else None
    mask_text, positions_text = _emit_mask(unit, mask, positions, bits, compares_late="late" in early)
    text = dict(
        score=score_text,
        early=early_text,
        score_factor=factor_text,
        mask=mask_text,
        mask_positions=positions_text,
        mask_search=_emit_search(unit, bits),
        analysis=analysis,
        sink=_emit_value(unit, program.sink, {}),
        norm=norm,
        lse=_emit_value(unit, program.lse, {"q_idx": "elem", "lse": "elem"}),
        value=_emit_value(unit, program.value, {"kv_idx": "elem"}, host_checked=ROWS_CHECKED),
        prefetches=_prefetches(unit, program) if "prefetch" in early else (),
        output=emit_output(unit, program.output),
    )
    columns = BlockText() if initial is not None else score_text.col
    shared = None if relative is not None or "columns" not in early else column_table(columns, mask_text.col)
    read = ahead if copied is None else [*ahead, copied]
    looks_ahead = relative is not None or bool(ahead) or shared is not None
    return VariantSection(
        backend=backend,
        args=capture_fields(unit),
        copied=_copied_text(unit, copied),
        head=_block_text(unit.head),
        **text,  # type: ignore[arg-type]
        raw_scores=raw_scores,
        **{f"reads_{name}": uses_index(program, name) for name in ir.PACKED},  # type: ignore[arg-type]
        reads_pages=bool(reads_pages(*program.roots())),
        hoists_columns=program.value is not None and looks_up_columns(program),
        has_value=program.value is not None,
        prefetches_keys=text["prefetches"] != (),
        has_score=score is not None,
        score_is_bounded=score is not None and score.op in WITHIN_ONE,
        score_is_capped=is_capped,
        has_relative=relative is not None,
        has_flat=early_text.flat.value != "",
        flat_is_plain=early_text.flat.value == "score" and not early_text.flat.lines,
        flat_is_marked=bool(early_text.marks),
        has_ahead=bool(ahead),
        ahead_serves_batch=bool(read) and all(n.deps.isdisjoint(("b", *ir.PACKED)) for n in read),
        has_offset=early_text.offset.value != "" or early_text.flat.value != "",
        has_distance_offset=early_text.offset.value != "",
        has_initial=initial is not None,
        initial_by_column=by_column,
        initial_by_tile=copied is not None,
        initial_by_steps=initial is not None and not by_column and copied is None,
        score_is_initial=initial is not None and score is ir.index("score"),
        score_columns=shared == "score",
        mask_columns=shared == "mask",
        looks_ahead=looks_ahead,
        has_early=looks_ahead or early_text.offset.value != "",
        has_mask=mask is not None,
        has_mask_positions=bool(positions),
        has_mask_bits=bits is not None,
        has_mask_search=bits is not None and bits.search is not None,
        has_position_bits=bits is not None and bool(positions),
        mask_scans=analysis.scans,
        mask_spans_together=analysis.spans_together,
        mask_reads_head=mask is not None and not mask.deps.isdisjoint(("h", "kv_h")),
        mask_reads_query_head=mask is not None and "h" in mask.deps,
        mask_reads_tensors=mask is not None and any(n.op == "load" for n in ir.walk(mask)),
        mask_is_causal=is_causal(mask),
        has_sink=program.sink is not None,
        custom_norm=program.norm is not None,
        norm_rescales=norm.rescales,
        norm_reverse=norm.reverse,
        norm_needs_cumsum=norm.needs_cumsum,
        has_norm_lse=norm.lse.value != "",
        norm_has_order=program.norm is not None and program.norm.has_order,
        can_split=program.can_split,
        has_lse_mod=program.lse is not None,
        has_output=program.output is not None,
    )


def _prefetches(unit: Unit, program: Program) -> tuple[str, ...]:
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


def column_table(score: BlockText, mask: BlockText) -> str | None:
    """The hook whose values per column are worth a table in shared memory, where a thread computes one for all rows: the score,
    whose values every tile needs, else the mask. There is room for one value of 4 bytes."""
    for name, block in (("score", score), ("mask", mask)):
        if len(block.fields) == 1 and block.fields[0].split()[0] in ("int", "float"):
            return name
    return None


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


def _copied_text(unit: Unit, load: Expr | None) -> CopiedText:
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


def _block_text(block: Block) -> BlockText:
    return BlockText(tuple(m.text for m in block.members), tuple(block.lines))


def _raw_score(score: Expr, *, keep_units: bool) -> tuple[Expr, Expr]:
    """A score as a function of q . k, and the factor that turns its value into natural units."""
    logit, scale = ir.index("score"), ir.index("scale")
    scaled = ir.make("mul", logit, scale)
    value = ir.rebuild(score, lambda n: scaled if n is logit else None)
    if not keep_units and "scale" not in score.deps:
        quotient = divided(value, scaled, logit, ir.make("truediv", ir.const(1.0), scale))
        if quotient is not None:
            return split_floats(quotient, _level), scale
    value = split_floats(value, _level)
    return (value, ir.const(1.0)) if keep_units else outer_factor(value, _level)


def _level(node: Expr) -> str:
    return join_levels({HOOK_LEVELS.get(d, "head") for d in node.deps})


def _emit_mask(
    unit: Unit, root: Expr | None, positions: list[Expr], bits: BitsMask | None, *, compares_late: bool
) -> tuple[HookText, HookText]:
    """The mask hook, split into rows, columns and elements, and the conjunction of some of its parts over the same values."""
    if root is None:
        return HookText(), HookText()
    alone = [functools.reduce(lambda a, b: ir.make("and", a, b), positions)] if positions else []
    root = split_floats(root, _level) if bits is None else bits.mask
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


def _emit_search(unit: Unit, bits: BitsMask | None) -> HookText:
    """The search of a mask by bits, as a function of the row."""
    if bits is None or bits.search is None:
        return HookText()
    text = _emit_value(unit, bits.search.value, {"q_idx": "elem"})
    return replace(text, value=search_text(unit, bits.search, text.value))


def _element_lowering(unit: Unit, roots: list[Expr]) -> Lowering:
    blocks = {level: Block(level, prefix, taken=set(ELEMENT_NAMES)) for level, prefix in ELEMENT_BLOCKS.items()}
    return Lowering(unit, {"head": unit.head, **blocks}, HOOK_LEVELS, roots)


def _hook_text(low: Lowering, root: Expr) -> HookText:
    value = low.term(root, low.blocks["elem"]).text
    return HookText(_block_text(low.blocks["row"]), _block_text(low.blocks["col"]), tuple(low.blocks["elem"].lines), value)


def _emit_score(
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
    root = split_floats(root, _level)
    flat = drop_relative(root) if relative is not None and not keep_units else None
    rest, level = flat if flat is not None and flat[0] is not None else (None, None)
    cap_scale = None
    if is_capped:
        root, cap_scale = outer_factor(root.args[0], _level)
    low = _element_lowering(unit, [x for x in (root, offset, rest, initial) if x is not None])
    words = Block("elem", "ahead.", taken={"args", "head", "row", "kv_idx", "step", "last"})
    paired = " & ".join(dict.fromkeys(add_row_word(low, node, words) for node in ahead))
    score = _hook_text(low, root)
    others = []
    for other in (rest, offset, initial):
        low.blocks["elem"] = Block("elem", taken=set(ELEMENT_NAMES))
        others.append(HookText() if other is None else _hook_text(low, other))
    score = HookText(_block_text(low.blocks["row"]), _block_text(low.blocks["col"]), score.lines, score.value)
    by_distance = _emit_value(unit, relative, {"distance": "elem"})
    level_text = _emit_value(unit, level, {"relative": "elem"})
    marks = level_marks(relative) if flat is not None and relative is not None else None
    mark_texts = tuple(_emit_value(unit, mark, {"distance": "elem"}) for mark in marks or ())
    cap_text = _emit_value(unit, cap_scale, {})
    flat_text, offset_text, initial_text = others
    return score, EarlyText(
        by_distance, flat_text, level_text, mark_texts, _block_text(words), paired, offset_text, cap_text, initial_text
    )


def _emit_value(
    unit: Unit, root: Expr | None, levels: dict[str, str], host_checked: frozenset[str] = HOST_CHECKED
) -> HookText:
    """A hook that yields one value, not one per element."""
    if root is None:
        return HookText()
    block = Block("elem", taken={"args", "head", "lse", "q_idx", "kv_idx"})
    low = Lowering(unit, {level: block for level in ("row", "col", "elem")} | {"head": unit.head}, levels, [root])
    low.host_checked = host_checked
    value = low.term(root, block).text  # adds to the lines of block
    return HookText(lines=tuple(block.lines), value=value)
