"""A program becomes the variant section: the part of a kernel's source that says what the variant means.

The section is the same text for CPU and CUDA. Its statements are made in the ``emit_*`` modules, its structure is
``kernel_templates/attention/variant.h.jinja``. What each function of it is given and returns is written in that template.
"""

from __future__ import annotations

from jitgen import ir
from jitgen.emit_bits import mask_by_bits
from jitgen.emit_early import CAPS, ahead_loads, looks_up_columns, take_copied, take_initial, take_offset, take_relative
from jitgen.emit_hooks import (
    block_text,
    capture_fields,
    copied_text,
    emit_mask,
    emit_score,
    emit_search,
    emit_value,
    prefetches,
)
from jitgen.emit_lower import Unit
from jitgen.emit_mask import emit_mask_analysis, is_causal, position_parts
from jitgen.emit_norm import emit_norm, emit_output
from jitgen.emit_section import BlockText, VariantSection
from jitgen.emit_split import level_of, raw_score, split_floats
from jitgen.program import Program, reads_pages, uses_index

WITHIN_ONE = (*CAPS, "sigmoid", "erf", "sin", "cos")  # functions whose values stay within [-1, 1]
ROWS_CHECKED = frozenset(("kv_h",))  # of what transforms of rows index: see kv_emit.py


def emit_variant(
    program: Program, *, backend: str, raw_scores: bool = False, early: frozenset[str] = frozenset()
) -> VariantSection:
    """The variant section of ``program``; ``backend`` is 'cpu' or 'cuda'.

    With ``raw_scores`` score_elem is given q . k as it is, and what it returns is still to be multiplied by score_factor.
    ``early`` names what of a score the template takes over (emit_early.py): 'relative', 'columns', 'ahead', 'cap', 'initial',
    'tile', 'offset'; 'late' where a mask is to have few values by column; 'positions' where it tells tiles whose mask positions
    decide alone, 'bits' where it masks by bits (emit_bits.py), and 'prefetch' where it asks for what is stored by slot
    beforehand.

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
        score, factor = raw_score(score, keep_units=program.norm is not None)
    if "offset" in early and score is not None and program.norm is None:
        score, offset = take_offset(score)
    ahead = ahead_loads(score, program.slots) if "ahead" in early and score is not None else []
    by_column = False
    if copied is not None:
        initial = split_floats(ir.make("mul", initial, ir.make("truediv", ir.const(1.0), ir.index("scale"))), level_of)
    if "initial" in early and copied is None and score is not None and program.norm is None:
        score, initial, rows = take_initial(score)
        by_column = initial is not None and "kv_idx" in initial.deps
        if by_column:  # they are counted from the tile's first, which the offset has
            rows = ir.const(0.0) if rows is None else rows
        offset = rows if offset is None else offset if rows is None else ir.make("add", offset, rows)
    positions = position_parts(mask) if "positions" in early else []
    analysis = emit_mask_analysis(unit, mask, by_positions="positions" in early)
    is_capped = "cap" in early and score is not None and score.op in CAPS and program.norm is None
    score_text, early_text = emit_score(
        unit, score, relative, ahead, offset, initial, keep_units=program.norm is not None, is_capped=is_capped
    )
    factor_text = emit_value(unit, factor, {})
    bits = mask_by_bits(program) if "bits" in early and mask is not None else None
    mask_text, positions_text = emit_mask(unit, mask, positions, bits, compares_late="late" in early)
    text = dict(
        score=score_text,
        early=early_text,
        score_factor=factor_text,
        mask=mask_text,
        mask_positions=positions_text,
        mask_search=emit_search(unit, bits),
        analysis=analysis,
        sink=emit_value(unit, program.sink, {}),
        norm=norm,
        lse=emit_value(unit, program.lse, {"q_idx": "elem", "lse": "elem"}),
        value=emit_value(unit, program.value, {"kv_idx": "elem"}, host_checked=ROWS_CHECKED),
        prefetches=prefetches(unit, program) if "prefetch" in early else (),
        output=emit_output(unit, program.output),
    )
    columns = BlockText() if initial is not None else score_text.col
    shared = None if relative is not None or "columns" not in early else column_table(columns, mask_text.col)
    read = ahead if copied is None else [*ahead, copied]
    looks_ahead = relative is not None or bool(ahead) or shared is not None
    return VariantSection(
        backend=backend,
        args=capture_fields(unit),
        copied=copied_text(unit, copied),
        head=block_text(unit.head),
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
        mask_is_only_causal=mask is not None and mask.op != "and" and is_causal(mask),
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


def column_table(score: BlockText, mask: BlockText) -> str | None:
    """The hook whose values per column are worth a table in shared memory, where a thread computes one for all rows: the score,
    whose values every tile needs, else the mask. There is room for one value of 4 bytes."""
    for name, block in (("score", score), ("mask", mask)):
        if len(block.fields) == 1 and block.fields[0].split()[0] in ("int", "float"):
            return name
    return None
