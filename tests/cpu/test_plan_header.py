"""plan.cuh is plain C++ but for the planner's threads: compiled for the host, it gives the integers of the Python planner."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import astuple, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jitgen import paths, toolchain
from jitgen.serving_balance import NEVER_CUT, NOT_FOR_MANY, GivenOut, PlanShape, Share, balance

SOURCE = r"""
#include <cstddef>
#include <vector>
#include "jitgen/plan.cuh"

// What make_plan does, one tile after the other; every row sees every key. Returns the number of tiles.
// `order`: the tiles of the last groups; then how many pieces they have.
extern "C" int make_shares(const int* q_len, const int* kv_len, int batch, const jg::PlanShape* shape, int* starts,
                           int* given_out, int* order) {
  std::vector<jg::PlanTile> tiles;
  std::vector<int> first_tile;
  std::vector<unsigned> first_line;
  unsigned places = 0;
  for (int b = 0; b <= batch; ++b) {
    first_tile.push_back(static_cast<int>(tiles.size()));
    first_line.push_back(places);
    const int count = b < batch ? jg::tiles_of_request(q_len[b], kv_len[b], *shape) : 0;
    for (int index = 0; index < count; ++index) {
      jg::PlanTile tile = {b, 0, q_len[b], kv_len[b], index, count, 0, kv_len[b], places};
      places += shape->fixed_cost + jg::units_of({tile.begin, tile.end}, shape->unit_keys);
      tiles.push_back(tile);
    }
  }
  const unsigned length = places * shape->groups;
  bool is_even = true;
  const auto cost = [&](const jg::PlanTile& tile) { return jg::units_of({tile.begin, tile.end}, shape->unit_keys); };
  for (const jg::PlanTile& tile : tiles)
    is_even &= jg::is_better_even(*shape, tile.count, shape->fixed_cost + cost(tile)) && cost(tile) == cost(tiles[0]);
  unsigned long long beside = 0;
  for (int b = 0; b < batch; ++b)
    if (!jg::tiles_of_request(q_len[b], kv_len[b], *shape)) beside += jg::work_beside(q_len[b], kv_len[b], *shape);
  const int wanted = jg::shares_beside(*shape, length, beside);
  const int used = jg::shares_in_use(*shape, wanted, length, static_cast<int>(tiles.size()) * shape->groups, is_even);
  const jg::Line line = {first_tile.data(), first_line.data(), tiles.data(), batch, static_cast<int>(tiles.size())};
  for (int c = 0; c <= shape->shares; ++c) {
    const jg::Share share = jg::share_start(line, *shape, length, used, c);
    const int words[4] = {share.tile, share.group, share.unit, static_cast<int>(share.line)};
    for (int i = 0; i < 4; ++i) starts[4 * c + i] = words[i];
  }
  const int num_tiles = static_cast<int>(tiles.size()), items = num_tiles * shape->groups;
  jg::PlanHeader header = {num_tiles};
  if (jg::gives_out(items, *shape)) {
    int most = 0, pieces = 0;
    unsigned line = 0;
    for (const jg::PlanTile& tile : tiles) most = cost(tile) > most ? cost(tile) : most;
    header.places = places;
    header.tail_groups = jg::tail_groups_of(places, most + shape->fixed_cost, *shape);
    header.whole_groups = shape->groups - header.tail_groups;
    header.least_units = jg::least_units_of(items, *shape);
    for (int place = 0; place < num_tiles; ++place) {
      const unsigned rest = (places - line) * header.tail_groups;
      const int at = order[place], before = place * header.tail_groups;
      const int wanted = jg::pieces_wanted(cost(tiles[at]), rest, before, header.least_units, *shape);
      order[place] = jg::pieces_given(wanted, pieces, header, *shape);
      line += cost(tiles[at]) + shape->fixed_cost;
      pieces += wanted > 1 ? wanted : 0;
    }
    header.pieces = pieces;
  }
  const int places_of_group = static_cast<int>(header.places);
  const int words[5] = {header.whole_groups, header.tail_groups, places_of_group, header.least_units, header.pieces};
  for (int i = 0; i < 5; ++i) given_out[i] = words[i];
  return num_tiles;
}
// Whether the share of every place is the one whose part of the line it is in.
extern "C" int closed_form_holds(unsigned length, unsigned shares) {
  for (unsigned c = 0; c < shares; ++c)
    for (unsigned x = jg::cut(c, length, shares); x < jg::cut(c + 1, length, shares); ++x)
      if (jg::share_of(x, length, shares) != c) return 0;
  return 1;
}
"""
pytestmark = pytest.mark.skipif(toolchain.find_cxx() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plan")
    (directory / "plan.cpp").write_text(SOURCE)
    command = [str(toolchain.require_cxx().path), "-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC"]
    command += [f"-I{paths.template_dir() / 'include'}", "-o", str(directory / "plan.so"), str(directory / "plan.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(directory / "plan.so"))


shapes = st.builds(
    PlanShape,
    tile_rows=st.sampled_from([8, 32, 128]),
    unit_keys=st.sampled_from([16, 64, 128]),
    pack=st.sampled_from([1, 4, 8]),
    groups=st.integers(1, 8),
    class_pack=st.sampled_from([1, 8]),
    least_rows=st.sampled_from([1, 33]),
    most_rows=st.sampled_from([32, NEVER_CUT]),
    least_keys=st.integers(0, 1),
    fixed_cost=st.integers(0, 2),
    least_piece=st.sampled_from([0, 1, 3, NEVER_CUT]),
    whole_items=st.sampled_from([0, 64]),
    many_items=st.sampled_from([0, 1, 2, NOT_FOR_MANY]),
    shares=st.sampled_from([1, 2, 7, 132]),
)
lengths = st.lists(st.tuples(st.one_of(st.integers(0, 3), st.integers(0, 200)), st.integers(0, 9000)), max_size=12)


@settings(max_examples=300, deadline=None)
@given(lengths, shapes, st.sampled_from([(0, 0), (40 << 10, 0), (0, 163), (1000, 7)]), st.booleans())
def test_header_cuts_the_line_as_the_python_planner_does(header, lengths, shape, beside, keeps_some):
    least = max(shape.shares * 5 // 12, 1) if keeps_some else 1
    shape = replace(shape, beside_key=beside[0], beside_row=beside[1], least_shares=least)
    q_len, kv_len = ([n[i] for n in lengths] for i in (0, 1))
    starts = (ctypes.c_int * (4 * (shape.shares + 1)))()
    numbers = (ctypes.c_int * 16)(*astuple(shape))
    batch = len(lengths)
    plan = balance(q_len, kv_len, shape)
    given_out, order = (ctypes.c_int * 5)(), (ctypes.c_int * len(plan.tiles))(*(tile.at for tile in plan.tiles))
    lens = (ctypes.c_int * batch)(*q_len), (ctypes.c_int * batch)(*kv_len)
    tiles = header.make_shares(*lens, batch, numbers, starts, given_out, order)
    assert tiles == len(plan.tiles)
    assert [Share(*starts[4 * c : 4 * c + 4]) for c in range(shape.shares + 1)] == list(plan.shares)
    assert GivenOut(*given_out) == plan.given_out
    tail = plan.items(shape)[plan.given_out.whole_groups * tiles :: plan.given_out.tail_groups or 1]
    assert [pieces for _, _, pieces, _ in tail] == (list(order) if plan.given_out.tail_groups else [])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 300))
def test_share_of_a_place_is_the_one_it_lies_in(header, length, shares):
    assert header.closed_form_holds(length, min(shares, length))
