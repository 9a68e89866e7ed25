"""Tile classes of the generated interval code against the mask itself, on random rectangles."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from gallery import CASES, Sizes

import jitgen
from jitgen import emit, mask_tiles
from jitgen.mask_tiles import TILE_FULL, TILE_NONE, TILE_PARTIAL, classify
from jitgen.reference import mask_of

CALLS = [(101, 301), (301, 301), (1, 301), (257, 130)]
ROUNDS = 4
TILES_Q, TILES_KV = (1, 7, 16, 48, 64, 100), (1, 8, 16, 33, 64, 128)
MASKED = [c for c in CASES.values() if c.make(Sizes(8, 8)).trace().program.mask is not None]


def true_classes(keep: torch.Tensor, tile_q: int, tile_kv: int) -> torch.Tensor:
    """Classes [heads, q_tiles, kv_tiles] counted from the mask [heads, q_len, kv_len]."""
    heads, q_len, kv_len = keep.shape
    q_tiles, kv_tiles = -(-q_len // tile_q), -(-kv_len // tile_kv)
    ends = (0, kv_tiles * tile_kv - kv_len, 0, q_tiles * tile_q - q_len)

    def tiles(outside: int) -> torch.Tensor:
        return F.pad(keep.to(torch.uint8), ends, value=outside).view(heads, q_tiles, tile_q, kv_tiles, tile_kv)

    return tiles(1).amin((2, 4)) + tiles(0).amax((2, 4))


def classes_of(variant: jitgen.Variant, z: Sizes, b: int, q_offset: int, tile_q: int, tile_kv: int):
    """Classes found by the generated code, and the true ones."""
    traced = variant.trace()
    heads = {"num_q_heads": z.num_q_heads, "num_kv_heads": z.num_kv_heads}
    lengths = {"q_len": z.q_len, "kv_len": z.kv_len, "q_offset": q_offset}
    found = classify(traced.program, traced.values(), b=b, tile_q=tile_q, tile_kv=tile_kv, **heads, **lengths)
    keep = mask_of(traced.program, traced.values(), batch=z.batch, **heads, **lengths)[b]
    return found, true_classes(keep, tile_q, tile_kv)


def rectangles(seed: str):
    """Sizes, request, offset and tile sizes of the rounds of one case."""
    rng = random.Random(seed)
    for q_len, kv_len in CALLS:
        for _ in range(ROUNDS):
            q_offset = rng.choice([0, max(0, kv_len - q_len)])
            yield Sizes(q_len, kv_len), rng.randrange(2), q_offset, rng.choice(TILES_Q), rng.choice(TILES_KV)


@pytest.mark.parametrize("case", MASKED, ids=lambda c: c.name)
def test_tile_classes_are_never_wrong(case):
    assert TILE_NONE < TILE_PARTIAL < TILE_FULL
    for z, *rectangle in rectangles(case.name):
        found, true = classes_of(case.make(z), z, *rectangle)
        assert (true[found == TILE_NONE] == TILE_NONE).all(), f"{z}, {rectangle}: a tile with visible keys is skipped"
        assert (true[found == TILE_FULL] == TILE_FULL).all(), f"{z}, {rectangle}: a tile with hidden keys is not masked"


# Share of the empty tiles that must be found empty, and of the full ones found full; 1.0 wherever the bounds are exact.
SKIPPED = {
    "causal": (1.0, 1.0),
    "sliding_window": (1.0, 1.0),
    "gemma2": (1.0, 1.0),
    "gpt_oss": (1.0, 1.0),
    "streaming": (1.0, 0.9),
    "reference_window": (1.0, 0.9),
    "window_per_head": (1.0, 1.0),
    "prefix_lm": (1.0, 1.0),
    "chunked": (1.0, 1.0),
    "chunk_lookback": (1.0, 1.0),
    "batched_causal": (0.9, 1.0),
    "block_diffusion": (0.99, 0.99),
    "dilated_window": (0.95, 1.0),
    "packed_documents": (1.0, 1.0),
    "packed_sequences": (1.0, 1.0),
    "document_causal": (0.9, 1.0),
    "longformer": (1.0, 0.99),
    "shared_prefix_documents": (0.99, 0.99),
    "image_blocks": (0.9, 0.9),
    "padding": (0.99, 1.0),
    "spatial_head": (1.0, 0.99),
    "prefix_ranges": (1.0, 0.95),
    "neighbourhood": (0.9, 0.9),
    "tiled_neighbourhood": (0.8, 0.8),
    "sliding_tile": (0.95, 0.95),
    "morton_neighbourhood": (0.5, 0.5),
    "causal_in_score": (1.0, 1.0),
    "causal_per_request": (1.0, 1.0),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_simple_masks_are_bounded_tightly(name):
    least_none, least_full = SKIPPED[name]
    counts = {TILE_NONE: [0, 0], TILE_FULL: [0, 0]}
    for z, *rectangle in rectangles(name):
        found, true = classes_of(CASES[name].make(z), z, *rectangle)
        for kind, count in counts.items():
            count[0] += int(((found == kind) & (true == kind)).sum())
            count[1] += int((true == kind).sum())
    for kind, least in ((TILE_NONE, least_none), (TILE_FULL, least_full)):
        hit, total = counts[kind]
        assert hit >= least * total, f"class {kind}: found {hit} of {total} tiles"


def test_sorted_tensors_are_bounded_by_their_ends_however_long():
    document = jitgen.sorted(torch.arange(5000, dtype=torch.int32) // 100)
    variant = jitgen.Variant(mask_mod=lambda b, h, q, k: document[q] == document[k])
    z = Sizes(5000, 5000, num_q_heads=1, num_kv_heads=1)
    found, true = classes_of(variant, z, 0, 0, 2500, 2500)  # more elements than an unsorted gather is scanned for
    assert torch.equal(found, true)
    found, true = classes_of(variant, z, 0, 0, 100, 50)
    assert torch.equal(found, true)


TILE_POSITIONS = 3  # kTilePositions


@pytest.mark.parametrize("is_sorted", [True, False])
def test_tiles_that_positions_decide_hold_nothing_that_tensors_hide(is_sorted, monkeypatch, tmp_path):
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(mask_tiles, "_libraries", {})
    monkeypatch.setattr(emit, "emit_variant", partial(emit.emit_variant, early=frozenset({"positions"})))
    lengths = torch.tensor([1, 62, 2, 130, 64, 5, 77])
    document = torch.repeat_interleave(torch.arange(7, dtype=torch.int32), lengths)
    document = jitgen.sorted(document) if is_sorted else document
    variant = jitgen.Variant(mask_mod=lambda b, h, q, k: (document[q] == document[k]) & (k <= q))
    same = jitgen.Variant(mask_mod=lambda b, h, q, k: document[q] == document[k]).trace()
    told_apart = 0
    for z, b, q_offset, tile_q, tile_kv in rectangles("positions"):
        if z.q_len + q_offset > len(document) or z.kv_len > len(document):
            continue
        found, true = classes_of(variant, z, b, q_offset, tile_q, tile_kv)
        heads = {"num_q_heads": z.num_q_heads, "num_kv_heads": z.num_kv_heads, "batch": z.batch}
        keep = mask_of(same.program, same.values(), q_len=z.q_len, kv_len=z.kv_len, q_offset=q_offset, **heads)[b]
        assert (true_classes(keep, tile_q, tile_kv)[found == TILE_POSITIONS] == TILE_FULL).all()
        for kind in (TILE_NONE, TILE_FULL):
            assert (true[found == kind] == kind).all()
        told_apart += int((found == TILE_POSITIONS).sum())
    assert told_apart > 20


CHANGED = {"window": [0, 1, 7, 10**6, -3], "chunk": [1, 3, 1000, 0, -2], "shift": [0, 5, -5]}


@pytest.mark.parametrize("window", CHANGED["window"])
@pytest.mark.parametrize("chunk", CHANGED["chunk"])
@pytest.mark.parametrize("shift", CHANGED["shift"])
def test_tile_classes_hold_for_every_captured_value(window, chunk, shift):
    def mask(b, h, q, k):
        same = (q + shift) // chunk == (k - shift) // chunk
        near = (q - k) * chunk < window * shift + 40
        return (same | near) & ((q - shift) % chunk <= window) | (torch.minimum(q, k) << 1 > window * chunk)

    for z, *rectangle in list(rectangles(f"{window} {chunk} {shift}"))[::4]:
        found, true = classes_of(jitgen.Variant(mask_mod=mask), z, *rectangle)
        assert (true[found == TILE_NONE] == TILE_NONE).all() and (true[found == TILE_FULL] == TILE_FULL).all()


@pytest.mark.parametrize("huge", [2**31 - 1, -(2**31), 2**40, -(2**62), 2**62 + 12345])
def test_tile_classes_survive_captured_values_near_the_limits_of_integers(huge):
    def mask(b, h, q, k):
        return (k * 3 - q < huge) & (q + huge >= k) | (k % 7 == 2)

    for z, *rectangle in list(rectangles(str(huge)))[::4]:
        found, true = classes_of(jitgen.Variant(mask_mod=mask), z, *rectangle)
        assert (true[found == TILE_NONE] == TILE_NONE).all() and (true[found == TILE_FULL] == TILE_FULL).all()
