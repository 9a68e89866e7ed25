"""Shared memory of sm90 kernels: whatever hooks come together, their tables fit beside the tiles."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

import jitgen
from jitgen.render import _section_of
from jitgen.spec import KernelSpec
from jitgen.target import cuda_target
from jitgen.tiles_sm90 import TILES, has_room, sm90_tiles

keys, rows, slopes, table = torch.zeros(4, 64), torch.zeros(4, 64), torch.zeros(4), torch.zeros(4, 33)
dense, wide = torch.zeros(4, 64, 64, dtype=torch.bfloat16), torch.zeros(4, 64, 64)
documents, others = jitgen.sorted(torch.zeros(64, dtype=torch.int32)), torch.zeros(64, dtype=torch.int32)
TERMS = {
    "keys": lambda s, b, h, q_idx, kv_idx: s + keys[h, kv_idx],
    "rows": lambda s, b, h, q_idx, kv_idx: s + rows[h, q_idx],
    "distance": lambda s, b, h, q_idx, kv_idx: s + slopes[h] * (kv_idx - q_idx),
    "table": lambda s, b, h, q_idx, kv_idx: s + table[h, torch.clamp(q_idx - kv_idx, 0, 32)],
    "dense": lambda s, b, h, q_idx, kv_idx: s + dense[h, q_idx, kv_idx],
    "wide": lambda s, b, h, q_idx, kv_idx: s + wide[h, q_idx, kv_idx],
    "factors": lambda s, b, h, q_idx, kv_idx: s * keys[h, kv_idx],
}
MASKS = {
    "unmasked": None,
    "documents": lambda b, h, q_idx, kv_idx: (documents[q_idx] == documents[kv_idx]) & (kv_idx <= q_idx),
    "shuffled": lambda b, h, q_idx, kv_idx: others[q_idx] == others[kv_idx],
}


def score_of(names):
    """The terms one after the other."""

    def score(s, b, h, q_idx, kv_idx):
        for name in names:
            s = TERMS[name](s, b, h, q_idx, kv_idx)
        return s

    return score


@pytest.mark.parametrize("mask", MASKS)
def test_whatever_comes_together_fits(mask):
    combined = [names for count in (1, 2, 3) for names in combinations(TERMS, count)]
    for names in combined:
        program = jitgen.Variant(score_mod=score_of(names), mask_mod=MASKS[mask]).trace().program
        for dims in TILES:
            for q_len in (1024, 4096):
                tiles = sm90_tiles(*dims, program, q_len=q_len)
                spec = KernelSpec("sm90", program, "bfloat16", *dims, tiles, cuda_target("9.0a"))
                assert has_room(tiles, *dims, _section_of(spec)), f"{names}, {mask}, head dims {dims}: {tiles}"


def test_terms_of_keys_are_left_to_consumers_beside_a_table_of_distances():
    """Of head dim 128 there is no room for both."""
    program = jitgen.Variant(score_mod=score_of(("keys", "table"))).trace().program
    found = {}
    for dims in ((64, 64), (128, 128)):
        spec = KernelSpec("sm90", program, "bfloat16", *dims, sm90_tiles(*dims, program), cuda_target("9.0a"))
        found[dims] = _section_of(spec).initial_by_column
    assert found == {(64, 64): True, (128, 128): False}
