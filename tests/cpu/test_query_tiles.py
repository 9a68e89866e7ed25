"""Query tiles of two sizes (sm90_schedule.cuh), by the header's own code: whose rows are whose, and when a launch ends."""

from __future__ import annotations

import ctypes
from itertools import product

import pytest
import query_tiles

TILE_Q, NUM_SMS = 192, 132


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return query_tiles.build(tmp_path_factory.mktemp("tiles")) or pytest.skip("no C++ compiler on this machine")


def schedule_of(library, q_len: int, heads: int) -> tuple[int, ...]:
    return query_tiles.schedule_of(library, q_len, heads, TILE_Q, NUM_SMS)


@pytest.mark.parametrize("heads", [1, 3, 16, 64])
@pytest.mark.parametrize("q_len", [1, 63, 64, 65, 192, 193, 320, 1000, 1024, 2048, 4095, 4096, 8192])
def test_each_row_is_one_groups(library, q_len, heads):
    num_tiles, _, _, _ = schedule_of(library, q_len, heads)
    counts, shortness = (ctypes.c_int * (heads * (q_len + 1)))(), (ctypes.c_int * num_tiles)()
    library.rows_of_groups(q_len, heads, TILE_Q, NUM_SMS, counts, shortness)
    assert list(counts) == ([1] * q_len + [0]) * heads
    assert list(shortness) == sorted(shortness), "short tiles come last"


@pytest.mark.parametrize(
    ("q_len", "heads", "before", "after"),
    [(4096, 64, 44, 43), (16384, 16, 44, 43), (4096, 16, 12, 11), (8192, 16, 24, 22)],
)
def test_launches_end_earlier(library, q_len, heads, before, after):
    """In quarters of the time of a whole tile, by a simulation of CTAs that take tiles as they are done with others."""
    num_tiles, num_query_tiles, num_short, absent = schedule_of(library, q_len, heads)
    assert num_short > 0 and absent < 64 and num_tiles == heads * num_query_tiles

    def end_of(tiles):
        free = [0] * NUM_SMS
        for cost in tiles:
            free.sort()
            free[0] += cost
        return max(free)

    first = {128: 2, 64: 3, 0: 4}[-q_len % TILE_Q]  # what is missing is of the first tile, which comes last
    assert end_of([4] * heads * (-(-q_len // TILE_Q) - 1) + [first] * heads) == before
    assert end_of([4] * heads * (num_query_tiles - num_short) + [3] * heads * num_short) == after


def test_tiles_hold_the_rows_and_no_group_more(library):
    for q_len, heads in product((500, 1024, 3000, 4096, 6000), (1, 2, 5, 8, 24, 32, 100)):
        _, num_query_tiles, num_short, _ = schedule_of(library, q_len, heads)
        if num_short == 0:
            assert num_query_tiles == -(-q_len // TILE_Q)
        else:
            rows = num_short * 128 + (num_query_tiles - num_short) * TILE_Q
            assert q_len <= rows < q_len + 64
