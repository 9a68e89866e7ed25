"""Which masks the sm90 kernels apply by bits, and what they make of them."""

from __future__ import annotations

import pytest
import torch

import jitgen
from jitgen.emit_bits import mask_by_bits
from jitgen.emit_mask import is_causal
from jitgen.evaluate import evaluate
from jitgen.families import cuda_spec
from jitgen.render import render_kernel
from jitgen.target import cuda_target

IDS = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 5, 5, 5, 9, 9], dtype=torch.int32)
Q, KV = torch.arange(len(IDS))[:, None], torch.arange(len(IDS))[None, :]
DOC, UNSORTED, WIDTHS = jitgen.sorted(IDS), IDS.flip(0).contiguous(), torch.tensor([3, 5], dtype=torch.int32)
LIMITS = torch.tensor([5, 0, 12, 3, 3, 1, 9, 0, 2, 11, 4, 6, 7], dtype=torch.int32)
WIDTH = 4

MASKS = {
    "causal": (lambda b, h, q, k: k <= q, True),
    "window": (lambda b, h, q, k: (k <= q) & (q - k < WIDTH), True),
    "window of a head": (lambda b, h, q, k: (k <= q) & (q - k <= WIDTHS[h]), True),
    "limit of a row": (lambda b, h, q, k: k <= LIMITS[q], True),
    "sinks": (lambda b, h, q, k: (k <= q) & ((q - k < WIDTH) | (k < 2)), True),
    "rows alone": (lambda b, h, q, k: (q % 3 == 1) | (k > q), True),
    "not the diagonal": (lambda b, h, q, k: k != q, True),
    "documents": (lambda b, h, q, k: (DOC[q] == DOC[k]) & (k <= q), True),
    "documents both ways": (lambda b, h, q, k: DOC[q] == DOC[k], False),  # two searches
    "documents in a window": (lambda b, h, q, k: (k <= q) & (DOC[k] == DOC[q]) & (q - k < WIDTH), True),
    "documents before": (lambda b, h, q, k: DOC[k] < DOC[q], True),
    "documents up to this": (lambda b, h, q, k: (DOC[k] <= DOC[q]) & (q - k < WIDTH), True),
    "documents from this": (lambda b, h, q, k: DOC[q] <= DOC[k], True),
    "documents behind": (lambda b, h, q, k: (DOC[q] + 1 < DOC[k]) | (k == q), True),
    "next document": (lambda b, h, q, k: (DOC[q] + 1 == DOC[k]) & (k >= q), False),
    "unsorted": (lambda b, h, q, k: (UNSORTED[q] == UNSORTED[k]) & (k <= q), False),
    "blocks": (lambda b, h, q, k: (k // 4 == q // 4) & (k <= q), False),
    "distance": (lambda b, h, q, k: torch.abs(q - k) < WIDTH, False),
    "twice as far": (lambda b, h, q, k: 2 * k <= q, False),
    "shifted document": (lambda b, h, q, k: DOC[torch.clamp(k - 1, 0, 100)] == DOC[q], False),
}


def leaves(**more):
    zero = torch.zeros((), dtype=torch.int64)
    return {"b": zero, "h": zero + 1, "q_idx": Q, "kv_idx": KV, **more}


@pytest.mark.parametrize("name", MASKS)
def test_bits_are_for_masks_that_keep_runs_of_columns(name):
    mask_mod, expected = MASKS[name]
    program = jitgen.Variant(mask_mod=mask_mod).trace().program
    assert (mask_by_bits(program) is not None) == expected
    source = render_kernel(cuda_spec(program, "bfloat16", (128, 128), "sm90", cuda_target("9.0a"))).text
    assert ("mask_bits(" in source) == expected
    assert ("mask_elem(" in source) != expected
    assert ("mask_search(" in source) == (expected and "document" in name)


def has_halves(name, layout):
    program = jitgen.Variant(mask_mod=MASKS[name][0]).trace().program
    source = render_kernel(cuda_spec(program, "bfloat16", (128, 128), "sm90", cuda_target("9.0a"), layout=layout)).text
    assert ("VisibleHalves" in source) != ("VisibleTiles" in source)
    return "VisibleHalves" in source


@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_lanes_look_at_halves_of_tiles_unless_a_warp_scans_rows_together(layout):
    for name, expected in (("causal", True), ("window", True), ("documents", True), ("limit of a row", False)):
        assert has_halves(name, layout) == expected, name


def test_lanes_look_at_halves_of_pages_for_masks_of_positions_that_hide_keys_on_both_sides():
    for name, expected in (("causal", False), ("window", True), ("documents", False), ("window of a head", False)):
        assert has_halves(name, "paged") == expected, name


@pytest.mark.parametrize("name", [name for name, (_, expected) in MASKS.items() if expected])
def test_mask_over_what_is_found_is_the_mask(name):
    trace = jitgen.Variant(mask_mod=MASKS[name][0]).trace()
    bits = mask_by_bits(trace.program)
    found = torch.zeros(len(IDS), 1, dtype=torch.int64)
    if bits.search is not None:
        value = evaluate(bits.search.value, trace.values(), leaves()).expand(len(IDS), 1)
        found = torch.searchsorted(IDS.long(), value.long().contiguous(), right=bits.search.above)
    want = evaluate(trace.program.mask, trace.values(), leaves()).expand(len(IDS), len(IDS))
    assert torch.equal(evaluate(bits.mask, trace.values(), leaves(found=found)).expand(want.shape), want)


def test_scores_with_tables_of_their_own_leave_no_room_for_a_search():
    program = jitgen.Variant(score_mod=lambda s, b, h, q, k: s + k, mask_mod=MASKS["documents"][0]).trace().program
    assert mask_by_bits(program) is None


@pytest.mark.parametrize("name", MASKS)
def test_causal_masks_hide_the_keys_behind_a_query(name):
    trace = jitgen.Variant(mask_mod=MASKS[name][0]).trace()
    shown = evaluate(trace.program.mask, trace.values(), leaves()).expand(len(IDS), len(IDS))
    says = {"causal", "window", "window of a head", "sinks", "documents", "documents in a window", "unsorted", "blocks"}
    assert is_causal(trace.program.mask) == (name in says)
    assert not (name in says and bool((shown & (KV > Q)).any()))
