"""Query tiles of two sizes (sm90_schedule.cuh), by the header's own code: whose rows are whose, and when a launch ends."""

from __future__ import annotations

import ctypes
import subprocess
from itertools import product

import pytest

from jitgen import paths, toolchain

BEFORE = """
#define JITGEN_FN inline
struct int4 { int x, y, z, w; };
namespace jg {
struct Divisor {
  unsigned value;
  int divide(int x) const { return x / static_cast<int>(value); }
};
inline Divisor make_divisor(unsigned value) { return {value}; }
inline int max(int a, int b) { return a > b ? a : b; }
"""
BEHIND = """
}  // namespace jg
static jg::Schedule mixed(int q_len, int heads, int tile_q, int num_sms) {
  jg::Schedule schedule = jg::make_schedule(q_len, 4096, tile_q, 512, heads, 1, false, -1, num_sms);
  jg::mix_tiles(schedule, q_len, tile_q, num_sms);
  return schedule;
}
extern "C" void schedule_of(int q_len, int heads, int tile_q, int num_sms, int* found) {
  const jg::Schedule schedule = mixed(q_len, heads, tile_q, num_sms);
  found[0] = schedule.num_tiles, found[1] = schedule.num_query_tiles;
  found[2] = schedule.num_late, found[3] = schedule.absent_rows;
}
// How often each row of each head, and any behind them, is some group's; and which tiles are short, in their order.
extern "C" void rows_of_groups(int q_len, int heads, int tile_q, int num_sms, int* counts, int* shortness) {
  const jg::Schedule schedule = mixed(q_len, heads, tile_q, num_sms);
  const jg::Divisors divisors = jg::make_divisors(schedule, heads, 1);
  for (int index = 0; index < schedule.num_tiles; ++index) {
    const jg::QueryTile tile = jg::query_tile_at<true>(index, schedule, divisors);
    const int first_row = jg::first_row_of<true>(tile.tile, schedule, tile_q);
    const int first_group = jg::first_group_of<true>(tile.tile, first_row, schedule);
    const int4 work = {first_row, tile.head, tile.batch, jg::kWorkTile | jg::short_flag<true>(tile.tile, schedule)};
    shortness[index] = tile.tile < schedule.num_late;
    for (int group = 0; group < 3; ++group)
      for (int i = 0, row = jg::group_row_of<true>(work, group); i < 64; ++i, ++row)
        if (row >= 0) counts[tile.head * (q_len + 1) + (row < q_len ? row : q_len)] += group < first_group ? 100 : 1;
  }
}
"""
TILE_Q, NUM_SMS = 192, 132


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    cxx = toolchain.find_cxx()
    if cxx is None:
        pytest.skip("no C++ compiler on this machine")
    header = (paths.template_dir() / "include/jitgen/sm90_schedule.cuh").read_text()
    code = header[header.index("// ---- query tiles ----") : header.index("// What a stage holds, in one word")]
    source = tmp_path_factory.mktemp("tiles") / "tiles.cpp"
    source.write_text(BEFORE + code + BEHIND)
    binary = source.with_suffix(".so")
    command = [str(cxx.path), "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", str(binary), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(binary))


def schedule_of(library, q_len: int, heads: int) -> tuple[int, ...]:
    """All tiles, those of a head, the short ones of a head, absent rows of its first."""
    found = (ctypes.c_int * 4)()
    library.schedule_of(q_len, heads, TILE_Q, NUM_SMS, found)
    return tuple(found)


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
