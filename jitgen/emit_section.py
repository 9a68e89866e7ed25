"""The variant section of a kernel's source, as text by function: what ``variant.h.jinja`` prints."""

from __future__ import annotations

from dataclasses import dataclass, fields

from jitgen.abi import ArgField
from jitgen.emit_mask import MaskAnalysisText
from jitgen.emit_norm import NormText, OutputText


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


@dataclass(frozen=True, kw_only=True)
class VariantTraits:
    """What the text of a variant has and asks for: the conditions of ``variant.h.jinja`` and of the kernel templates."""

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
    mask_is_only_causal: bool  # with no bound on the other side
    has_sink: bool
    custom_norm: bool
    norm_rescales: bool
    norm_reverse: bool
    norm_needs_cumsum: bool
    norm_has_order: bool
    can_split: bool  # parts of a row's keys can be joined
    has_lse_mod: bool
    has_output: bool


@dataclass(frozen=True, kw_only=True)
class VariantSection(VariantTraits):
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
    has_norm_lse: bool


def section_context(section: VariantSection, layout: str = "dense") -> dict[str, object]:
    """Template context of ``variant.h.jinja``: the fields of the section, and the layout, which says where lengths are."""
    return {"layout": layout} | {f.name: getattr(section, f.name) for f in fields(section)}
