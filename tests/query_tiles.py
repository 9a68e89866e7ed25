"""The code of sm90_schedule.cuh that gives out query tiles, compiled for the CPU."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

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


def build(folder: Path) -> ctypes.CDLL | None:
    """The library, built in ``folder``; None without a C++ compiler."""
    cxx = toolchain.find_cxx()
    if cxx is None:
        return None
    header = (paths.template_dir() / "include/jitgen/sm90_schedule.cuh").read_text()
    code = header[header.index("// ---- query tiles ----") : header.index("// What a stage holds, in one word")]
    source = folder / "tiles.cpp"
    source.write_text(BEFORE + code + BEHIND)
    binary = source.with_suffix(".so")
    command = [str(cxx.path), "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", str(binary), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(binary))


def schedule_of(library: ctypes.CDLL, q_len: int, heads: int, tile_q: int, num_sms: int) -> tuple[int, ...]:
    """Of kernels without a mask: all tiles, those of a head, the short ones of a head, absent rows of its first."""
    found = (ctypes.c_int * 4)()
    library.schedule_of(q_len, heads, tile_q, num_sms, found)
    return tuple(found)
