"""The planner's arithmetic: every unit of every item in one share, shares equal, cuts few; and the pieces of the CPU kernel."""

from __future__ import annotations

import random
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import Sigmoid, StickBreaking
from serving_batch import Batch

import jitgen
from jitgen.families import prefill_family, serving_spec
from jitgen.render import render_kernel
from jitgen.serving_balance import NEVER_CUT, SHARES_AT, TAIL_PIECES, PlanShape, balance, cuts_nothing
from jitgen.serving_explain import host_pieces, share_loads

shapes = st.builds(
    PlanShape,
    tile_rows=st.sampled_from([8, 32, 64, 128]),
    unit_keys=st.sampled_from([16, 32, 64, 128]),
    pack=st.sampled_from([1, 2, 4, 8]),
    groups=st.integers(1, 8),
    class_pack=st.sampled_from([1, 4, 8]),
    least_rows=st.sampled_from([1, 33]),
    most_rows=st.sampled_from([32, NEVER_CUT]),
    least_keys=st.integers(0, 1),
    fixed_cost=st.integers(0, 3),
    least_piece=st.sampled_from([0, 1, 2, 4]),
    many_items=st.sampled_from([0, 1, 2]),
    shares=st.sampled_from([1, 2, 7, 132, 300]),
)
batches = st.lists(st.tuples(st.one_of(st.integers(0, 3), st.integers(0, 400)), st.integers(0, 3000)), max_size=12)


def windowed(lengths):
    """Keys that a causal window of 500 leaves visible to some rows."""

    def visible(b, first, last):
        q_len, kv_len = lengths[b]
        offset = kv_len - q_len
        begin, end = max(0, offset + first - 499), min(kv_len, offset + last + 1)
        return (begin, end) if begin < end else (0, 0)

    return visible


def made(lengths, shape, visible=None):
    return balance([q for q, _ in lengths], [k for _, k in lengths], shape, visible)


@settings(max_examples=200, deadline=None)
@given(batches, shapes, st.booleans())
def test_every_unit_of_every_item_is_in_one_share(lengths, shape, is_windowed):
    record = made(lengths, shape, windowed(lengths) if is_windowed else None)
    wanted = {(t, g): tile.units(shape.unit_keys) for t, tile in enumerate(record.tiles) for g in range(shape.groups)}
    done: dict[tuple[int, int], int] = {}
    for c in range(shape.shares):
        for tile, group, first, end in record.segments(shape, c):
            assert done.get((tile, group), 0) == first < end, "units in order, each once, no piece empty"
            done[tile, group] = end
    assert done == wanted


@settings(max_examples=200, deadline=None)
@given(batches, shapes)
def test_tiles_cover_the_rows_of_the_requests_of_the_class(lengths, shape):
    record, start = made(lengths, shape), 0
    for b, (q_len, kv_len) in enumerate(lengths):
        tiles = [t for t in record.tiles if t.request == b]
        in_class = q_len > 0 and shape.least_rows <= q_len * shape.class_pack <= shape.most_rows
        assert bool(tiles) == (in_class and kv_len >= shape.least_keys)
        assert [t.index for t in tiles] == list(range(len(tiles)))
        assert all((t.count, t.q_start, t.q_len, t.kv_len) == (len(tiles), start, q_len, kv_len) for t in tiles)
        if tiles:
            assert (len(tiles) - 1) * shape.tile_rows < q_len * shape.pack <= len(tiles) * shape.tile_rows
        start += q_len


@settings(max_examples=200, deadline=None)
@given(batches, shapes)
def test_shares_are_equal_but_for_a_unit_and_the_snapping_of_cuts(lengths, shape):
    record = made(lengths, shape)
    if not record.tiles:
        return
    assert record.length == sum(shape.fixed_cost + t.units(shape.unit_keys) for t in record.tiles) * shape.groups
    mean = record.length / record.used
    slack = 1 + shape.fixed_cost + max(shape.least_piece, 1)  # at each end: a cut moves by that much
    assert all(load <= mean + 2 * slack for load in share_loads(record))


@settings(max_examples=100, deadline=None)
@given(batches, shapes)
def test_items_stay_whole_when_told_so(lengths, shape):
    whole = PlanShape(**{**vars(shape), "least_piece": NEVER_CUT})
    record = made(lengths, whole)
    for c in range(whole.shares):
        for tile, _, first, end in record.segments(whole, c):
            assert first == 0 and end == record.tiles[tile].units(whole.unit_keys)


@settings(max_examples=200, deadline=None)
@given(batches, shapes, st.booleans())
def test_items_given_out_are_all_there_and_their_pieces_have_room(lengths, shape, is_windowed):
    record = made(lengths, shape, windowed(lengths) if is_windowed else None)
    at, items = record.given_out, record.items(shape)
    if not at.tail_groups:
        assert not shape.many_items or len(record.tiles) * shape.groups < max(shape.many_items * shape.shares, 1)
        return
    assert sorted((tile, group) for tile, group, _, _ in items) == [
        (tile, group) for tile in range(len(record.tiles)) for group in range(shape.groups)
    ]
    slots = sorted(slot + i for _, _, pieces, slot in items if pieces > 1 for i in range(pieces))
    assert len(set(slots)) == len(slots) and (not slots or slots[-1] < TAIL_PIECES * shape.shares)
    cut = [(record.tiles[tile].units(shape.unit_keys), pieces) for tile, _, pieces, _ in items if pieces > 1]
    assert all(units >= pieces * at.least_units for units, pieces in cut)


def prefill_shape(groups):
    """As the kernel of Hopper asks for: head_dim 128, four query heads for each of ``groups`` KV heads."""
    return PlanShape(192, 128, 4, groups, 4, 1, NEVER_CUT, 0, 2, 8, 0, 2, 132)


def causal_keys(lengths):
    def visible(b, first, last):
        q_len, kv_len = lengths[b]
        return 0, kv_len - q_len + last + 1

    return visible


def time_over_mean(record, shape):
    """When the last CTA ends, over the mean, where CTAs take the next piece as they finish one.

    Rows that a tile lacks save three quarters of their part of its time, as measured.
    """
    free = [0.0] * shape.shares
    for number, _, pieces, _ in record.items(shape):
        tile = record.tiles[number]
        lacking = max(0, (tile.index + 1) * shape.tile_rows - tile.q_len * shape.pack) / shape.tile_rows
        for _ in range(pieces):
            at = free.index(min(free))
            free[at] += shape.fixed_cost + tile.units(shape.unit_keys) * (1 - 0.75 * lacking) / pieces
    return max(free) / (sum(free) / len(free))


@pytest.mark.parametrize(
    ("lengths", "most"),
    [
        ([(4096, 4096)] * 2, 1.03),
        ([(2048, 2048)] * 8, 1.02),
        ([(n, n) for n in (5000, 300, 2500, 1200, 7000)], 1.02),
        ([(16384, 16384)] + [(1024, 1024)] * 32, 1.01),
        ([(512, 8192)] * 8, 1.06),  # 5.3 items of a length for each CTA: 1.12 if none were cut
        ([(2048, 32768)], 1.07),  # 2.6 items: 1.15
        ([(512, 8192)] * 4, 1.15),  # 2.7 items too short to cut: 320 whole ones, so three for some CTA in any order
        ([(300, 1500), (900, 28000), (150, 20000), (700, 3000), (130, 31000), (500, 9000)] * 2, 1.02),
    ],
)
def test_items_given_out_end_nearly_together(lengths, most):
    shape = prefill_shape(8)
    record = made(lengths, shape, causal_keys(lengths))
    assert record.given_out.tail_groups and time_over_mean(record, shape) <= most


def block_lists(density, seed=0, long=()):
    """Block rows of 128 x 128 as requests: each lists the first of 128 columns and others at random, those of ``long`` all."""
    chance = random.Random(seed)
    columns = [1 + sum(chance.random() < density for _ in range(127)) for _ in range(128)]
    return [(128, 128 * (128 if row in long else n)) for row, n in enumerate(columns)]


@pytest.mark.parametrize(
    ("lists", "groups", "cut", "most"),
    [
        (block_lists(0.1), 8, 0, 1.02),
        (block_lists(0.25), 8, 0, 1.02),
        (block_lists(0.1, long=(60,)), 8, 0, 1.02),  # a long row is given out first, early enough
        (block_lists(0.1, long=(60,)), 2, 6, 1.08),  # and cut where nothing would balance it: 1.42 if it were not
        (block_lists(0.02, long=(3, 60)), 2, 12, 1.08),  # 3.1
        ([(128, 128)] * 128, 8, 0, 1.03),
    ],
)
def test_items_are_cut_where_whole_ones_would_not_end_together(lists, groups, cut, most):
    shape = prefill_shape(groups)
    record = made(lists, shape)
    assert sum(pieces > 1 for _, _, pieces, _ in record.items(shape)) == cut
    assert time_over_mean(record, shape) <= most
    whole = PlanShape(**{**vars(shape), "least_piece": NEVER_CUT})
    assert (time_over_mean(made(lists, whole), whole) > most) == (cut > 0)


def test_header_tells_that_nothing_is_cut():
    def header(tail_groups, pieces):
        return struct.pack("@iiI4iI2i6i", 9, 132, 999, 0, 0, 7, tail_groups, 111, 24, pieces, *[0] * 6)

    assert len(header(1, 0)) == SHARES_AT
    assert cuts_nothing(header(1, 0)) and not cuts_nothing(header(1, 2))
    assert not cuts_nothing(header(0, 0)), "shares of the line, which cut items"


def test_skewed_batches_are_balanced():
    lengths = [(1, 60000)] + [(1, 200)] * 63
    shape = PlanShape(8, 32, 4, 2, 4, 1, 32, 0, 1, 1, 0, 0, 132)
    loads = share_loads(made(lengths, shape))
    assert max(loads) <= 1.02 * sum(loads) / len(loads) + 1


@pytest.mark.parametrize(
    ("batch", "keys", "unit", "used", "load"), [(8, 1024, 128, 128, 4), (1, 4096, 128, 128, 2), (1, 1024, 128, 64, 1)]
)
def test_cuts_of_equal_items_fall_on_their_ends(batch, keys, unit, used, load):
    shape = PlanShape(8, unit, 4, 8, 4, 1, 32, 0, 0, 1, 64, 0, 132)
    record = made([(1, keys)] * batch, shape)
    assert record.used == used
    assert all(len(record.segments(shape, c)) == 1 and share_loads(record)[c] == load for c in range(used))


def test_equal_items_stay_whole_where_few_ctas_are_idle_for_it():
    shape = PlanShape(8, 32, 4, 2, 4, 1, 32, 0, 0, 1, 64, 0, 132)
    record = made([(1, 1024)] * 128, shape)  # 256 items
    assert record.used == 128
    assert all([first for _, _, first, _ in record.segments(shape, c)] == [0, 0] for c in range(128))
    assert made([(1, 4096)] * 128, shape).used == 132  # long ones are cut
    assert made([(1, 1024)] * 75, shape).used == 130  # 150 items have no divisor from 124 to 132: 4800 units, 37 each


@pytest.mark.parametrize(
    "arch, max_kv_len, head_dim, family",
    [
        ("9.0", None, 256, "sm90"),
        ("9.0", 1 << 22, 128, "sm80"),
        ("9.0", 1 << 22, 512, "sm90_wide"),
        ("8.0", None, 512, "sm80"),
        ("8.9", None, 128, "sm80"),
    ],
)
def test_prefill_kernel_of_hopper_is_chosen_where_it_can_be_used(monkeypatch, arch, max_kv_len, head_dim, family):
    monkeypatch.setenv("JITGEN_CUDA_ARCH", arch)
    assert prefill_family(torch.device("cuda", 0), max_kv_len, head_dim) == family


@pytest.mark.parametrize(
    "layout, page_size, by_boxes",
    [("paged", 16, True), ("paged", 8, True), ("paged", 12, False), ("paged", 1, False), ("paged", None, False),
     ("paged_states", None, False), ("ragged", None, True)],
)  # fmt: skip
def test_keys_are_copied_in_boxes_where_pages_have_them(monkeypatch, layout, page_size, by_boxes):
    monkeypatch.setenv("JITGEN_CUDA_ARCH", "9.0")
    program = jitgen.Variant().trace().program
    spec = serving_spec(program, "bfloat16", (128, 128), torch.device("cuda", 0), layout, page_size=page_size)
    assert (spec.family, spec.copies) == ("sm90", by_boxes)
    assert ("copy_rows(" in render_kernel(spec).text) is not by_boxes


# ---- the CPU ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


LENGTHS = [(1, 20000), (1, 3), (300, 900), (0, 50), (4, 0), (2, 700)]


def pieces_of(batch, plan):
    return host_pieces(plan, plan.classes[0], plan._program, plan._values)


@pytest.mark.parametrize(
    "split", [{}, {"split": "fixed", "kv_split": 1000}, {"split": "none"}], ids=["balanced", "fixed", "none"]
)
def test_pieces_of_the_cpu_cover_every_row_and_key_once(four_threads, split):
    batch = Batch(LENGTHS, 8, 2)
    pieces = pieces_of(batch, batch.plan(**split))
    for b, (rows, keys) in enumerate(LENGTHS):
        seen = torch.zeros(8, rows, max(keys, 1), dtype=torch.int32)
        for request, kv_h, head, heads, row, count, first, end in pieces.tolist():
            if request == b:
                assert kv_h * 4 <= head and head + heads <= kv_h * 4 + 4
                seen[head : head + heads, row : row + count, first : max(end, first)] += 1
        assert (seen[:, :, :keys] == 1).all()
    if split:
        assert all(p[7] - p[6] <= 1024 for p in pieces.tolist()) == (split["split"] == "fixed")


def test_one_long_decode_keeps_all_threads_of_the_cpu_busy(four_threads):
    batch = Batch([(1, 20000)], 4, 1)
    pieces = pieces_of(batch, batch.plan())
    keys = pieces[:, 7] - pieces[:, 6]
    assert len(pieces) >= 4 and keys.max() <= 20000 / 4


def test_hidden_keys_cost_the_cpu_nothing():
    def window(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < 100)

    batch = Batch([(1, 20000)])
    pieces = pieces_of(batch, batch.plan(window))
    assert pieces[:, 6].min() >= 20000 - 100 - 256 and (pieces[:, 7] - pieces[:, 6]).sum() <= 2 * (100 + 2 * 256)


def test_explain_says_how_the_work_is_divided(four_threads):
    batch = Batch([(1, 20000), (300, 900)], 8, 2)
    text = batch.plan(causal).explain(rows=3)
    assert "2 requests, 301 query rows, 20900 keys; 8 query heads on 2 KV heads; split balanced; cpu" in text
    assert "for 4 threads" in text and "a thread's part 25.0%" in text
    assert len(text.splitlines()) == 7  # the batch, the kernel, titles, three pieces, how many more


@pytest.mark.parametrize("norm, adds_up", [(Sigmoid, True), (StickBreaking, False)])
def test_explain_says_that_norms_are_not_cut(norm, adds_up, four_threads):
    variant = jitgen.Variant(softmax=norm)
    assert variant.trace().program.norm.adds_up is adds_up  # which decode on a GPU cuts
    text = Batch([(1, 20000)]).plan(variant).explain()
    assert "cpu: requests are not cut, as the norm has no merge(a, b)" in text
    assert "not cut" not in Batch([(1, 20000)]).plan(causal).explain()


def test_explain_needs_lengths():
    with pytest.raises(jitgen.errors.PlanMismatch, match=r"Call plan.update\(q_indptr, kv_len\) first"):
        jitgen.Plan(1, 1, 4, 2, 16, dtype=torch.float32, device="cpu").explain()


def test_shares_are_left_to_a_kernel_beside():
    shape = PlanShape(128, 128, 4, 8, 4, 33, NEVER_CUT, 1, 2, 8, 0, 0, 132, beside_key=40 << 10)
    record = made([(64, 32768)] + [(1, 256)] * 64, shape)
    assert record.used == 112
    assert made([(64, 32768)], shape).used == 128
    assert made([(128, 32768)] + [(1, 128)] * 128, shape).used == 128  # 122 are wanted, 32 items are to be cut alike


def test_decode_beside_a_prefill_ends_with_it_or_keeps_memory_busy():
    shape = PlanShape(8, 32, 4, 2, 4, 1, 32, 0, 0, 1, 64, 0, 132, beside_row=163, least_shares=55)
    decodes = [(1, 3500 + 20 * b) for b in range(64)]
    assert made(decodes, shape).used > 128
    assert made([(512, 4096), *decodes], shape).used in range(120, 125)
    assert made([(4096, 4096), (4096, 4096), *decodes], shape).used in range(57, 60)
    assert made([(4096, 4096)] * 8 + decodes, shape).used == 55


def test_tiles_of_a_shared_prefix_are_cut_at_the_same_keys():
    shape = PlanShape(128, 128, 4, 8, 4, 33, NEVER_CUT, 1, 2, 8, 0, 2, 132)
    record = made([(64, 32768)], shape)  # 256 packed rows in two tiles for each of 8 heads
    assert record.used == 128
    cuts = {(t, g): set() for t in range(2) for g in range(8)}
    for c in range(record.used):
        for tile, group, first, _ in record.segments(shape, c):
            cuts[tile, group].add(first)
    assert all(len(found) == 8 for found in cuts.values())
    assert all(abs(a - b) <= 1 for g in range(8) for a, b in zip(sorted(cuts[0, g]), sorted(cuts[1, g]), strict=True))
