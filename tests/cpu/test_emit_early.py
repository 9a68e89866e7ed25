"""What of a score the sm90 kernels work out before the logits: the parts add up to the score."""

from __future__ import annotations

import re

import pytest
import torch

import jitgen
from jitgen import ir
from jitgen.emit_early import (
    ahead_loads,
    drop_relative,
    early_parts,
    level_marks,
    of_distance,
    take_copied,
    take_initial,
    take_offset,
    take_relative,
)
from jitgen.emit_split import level_of, split_floats
from jitgen.evaluate import evaluate
from jitgen.families import cuda_spec, loading_spec
from jitgen.render import render_kernel
from jitgen.serving_place import ChosenLists, place
from jitgen.target import cuda_target
from jitgen.tiles_sm90 import sm90_tiles

Q, KV = torch.arange(40)[:, None], torch.arange(50)[None, :]
SCORE = torch.linspace(-2, 2, 40 * 50, dtype=torch.float64).view(40, 50)


def traced(score_mod):
    return jitgen.Variant(score_mod=score_mod).trace()


def leaves(**more):
    zero = torch.zeros((), dtype=torch.int64)
    return {"b": zero, "h": zero + 1, "q_idx": Q, "kv_idx": KV, "score": SCORE, "scale": SCORE.new_tensor(0.5), **more}


def t5():
    table, far = torch.randn(2, 16, dtype=torch.float64).float(), 12
    return traced(lambda s, b, h, q_idx, kv_idx: s + table[h, torch.clamp(q_idx - kv_idx, 0, far)])


def buckets():
    """T5's logarithmic buckets, computed in the score."""
    table = torch.randn(2, 32).float()

    def score(s, b, h, q_idx, kv_idx):
        distance = torch.clamp(q_idx - kv_idx, 0, 1 << 20)
        far = 8 + (torch.log(torch.clamp(distance, 1, 1 << 20) / 8.0) * 3.0).to(torch.int32)
        return s + table[h, torch.where(distance < 8, distance, torch.clamp(far, 0, 31))]

    return traced(score)


def decay():
    return traced(lambda s, b, h, q_idx, kv_idx: s * torch.exp2(-0.1 * torch.abs(q_idx - kv_idx)))


@pytest.mark.parametrize("make", [t5, buckets, decay])
def test_part_of_the_distance_equals_the_part_of_positions(make):
    trace = make()
    rest, part = take_relative(trace.program.score)
    assert part is not None and part.deps <= {"distance", "h", "b"}
    table = evaluate(part, trace.values(), leaves(distance=Q - KV))
    got = evaluate(rest, trace.values(), leaves(relative=table))
    torch.testing.assert_close(got, evaluate(trace.program.score, trace.values(), leaves()))


@pytest.mark.parametrize(
    "score_mod",
    [
        lambda s, b, h, q_idx, kv_idx: s + 0.5 * (kv_idx - q_idx),  # a multiple of the distance is cheaper as it is
        lambda s, b, h, q_idx, kv_idx: s + torch.abs(q_idx - 2 * kv_idx),
        lambda s, b, h, q_idx, kv_idx: s + torch.where(q_idx % 4 == kv_idx % 4, 1.0, 0.0),
        lambda s, b, h, q_idx, kv_idx: torch.abs(s),
    ],
)
def test_what_is_no_part_of_the_distance_stays(score_mod):
    score = traced(score_mod).program.score
    assert take_relative(score) == (score, None)


def test_positions_that_remain_make_no_distance():
    q, k = ir.index("q_idx"), ir.index("kv_idx")
    assert of_distance(ir.make("abs", ir.make("sub", q, k))).deps == {"distance"}
    assert of_distance(ir.make("max", ir.make("sub", q, k), q)) is None


def test_term_of_the_distance_is_dropped_where_it_is_flat():
    trace = t5()
    rest, _ = take_relative(trace.program.score)
    without, term = drop_relative(rest)
    total = evaluate(without, [], leaves()) + evaluate(term, [], leaves(relative=SCORE.new_tensor(3.0)))
    torch.testing.assert_close(total, SCORE + 3.0)
    assert drop_relative(take_relative(decay().program.score)[0]) is None  # a factor is no term


@pytest.mark.parametrize(
    "score_mod",
    [
        lambda slopes: lambda s, b, h, q_idx, kv_idx: s + slopes[h] * (kv_idx - q_idx),
        lambda slopes: lambda s, b, h, q_idx, kv_idx: s - slopes[h] * (q_idx - kv_idx),
        lambda slopes: lambda s, b, h, q_idx, kv_idx: (q_idx - kv_idx + 3) - (slopes[h] - s),
    ],
)
def test_steps_and_offset_add_up_to_the_multiple_of_the_distance(score_mod):
    trace = traced(score_mod(torch.rand(2)))
    rest, offset = take_offset(split_floats(trace.program.score, level_of))
    assert offset is not None and "kv_idx" not in rest.deps | offset.deps
    start = (KV // 16 * 16).double()
    got = evaluate(rest, trace.values(), leaves(step=KV - start)) + evaluate(offset, trace.values(), leaves(start=start))
    torch.testing.assert_close(got, evaluate(trace.program.score, trace.values(), leaves()))


KEYS, GATES = torch.randn(2, 50), torch.randn(2, 50)


@pytest.mark.parametrize(
    ("score_mod", "has_rows"),
    [
        (lambda s, b, h, q_idx, kv_idx: s + KEYS[h, kv_idx], False),
        (lambda s, b, h, q_idx, kv_idx: KEYS[h, kv_idx] * 2.0 - (GATES[h, kv_idx] - s), False),
        (lambda s, b, h, q_idx, kv_idx: s + GATES[h, q_idx] - GATES[h, kv_idx] + 0.5, True),
        (lambda s, b, h, q_idx, kv_idx: s + 0.25 * (kv_idx - q_idx) + KEYS[h, kv_idx], False),
    ],
)
def test_terms_of_columns_and_rows_add_up_to_the_score(score_mod, has_rows):
    trace = traced(score_mod)
    score, offset = take_offset(split_floats(trace.program.score, level_of))
    rest, columns, rows = take_initial(score)
    assert rest is ir.index("score") and "q_idx" not in columns.deps and (rows is not None) is has_rows
    start = (KV // 16 * 16).double()
    at = leaves(step=KV - start, start=start)
    got = sum(evaluate(part, trace.values(), at) for part in (rest, columns, rows, offset) if part is not None)
    torch.testing.assert_close(got, evaluate(trace.program.score, trace.values(), leaves()))


@pytest.mark.parametrize(
    "score_mod",
    [
        lambda s, b, h, q_idx, kv_idx: s * 2.0 + KEYS[h, kv_idx],  # the product is not what S holds
        lambda s, b, h, q_idx, kv_idx: s + torch.sigmoid(s) + KEYS[h, kv_idx],
        lambda s, b, h, q_idx, kv_idx: s + KEYS[h, kv_idx] + s,
        lambda s, b, h, q_idx, kv_idx: torch.tanh(s + KEYS[h, kv_idx]),
        lambda s, b, h, q_idx, kv_idx: s + KEYS[h, q_idx],
        lambda s, b, h, q_idx, kv_idx: s + KEYS[h, kv_idx] * GATES[h, q_idx],
    ],
)
def test_products_begin_from_nothing_else(score_mod):
    score = split_floats(traced(score_mod).program.score, level_of)
    assert take_initial(score) == (score, None, None)


@pytest.mark.parametrize(
    ("dtype", "index", "is_ahead"),
    [
        (torch.bfloat16, lambda t, b, h, q, k: t[h, q, k], True),
        (torch.float32, lambda t, b, h, q, k: t[h, q, k], True),
        (torch.float64, lambda t, b, h, q, k: t[h, q, k], False),  # its pairs are no word
        (torch.float32, lambda t, b, h, q, k: t[h, k, q], False),  # runs across the rows
        (torch.float32, lambda t, b, h, q, k: t[h, q, k + 1], False),
    ],
)
def test_rows_along_the_keys_are_read_ahead(dtype, index, is_ahead):
    dense = torch.zeros(2, 64, 64, dtype=dtype)
    program = traced(lambda s, b, h, q_idx, kv_idx: s + index(dense, b, h, q_idx, kv_idx)).program
    assert bool(ahead_loads(program.score, program.slots)) is is_ahead


def test_too_many_words_are_not_read_ahead():
    one, two = torch.zeros(64, 64), torch.zeros(64, 64)
    program = traced(lambda s, b, h, q_idx, kv_idx: s + one[q_idx, kv_idx] + two[q_idx, kv_idx]).program
    assert "ahead" not in early_parts(program, "dense", 128)
    source = render_kernel(cuda_spec(program, "bfloat16", (128, 128), "sm90", cuda_target("9.0a")))
    assert "ScoreAhead" not in source.text and source.text.count("jg::load(row.") == 2


BIAS, WIDE, COLUMN = torch.zeros(2, 64, 64, dtype=torch.bfloat16), torch.zeros(2, 64, 64), torch.zeros(64)
SHARED = BIAS[:1].expand(2, 64, 64)


@pytest.mark.parametrize(
    ("score_mod", "copied"),
    [
        (lambda s, b, h, q_idx, kv_idx: s + BIAS[h, q_idx, kv_idx], True),
        (lambda s, b, h, q_idx, kv_idx: 0.5 * (kv_idx - q_idx) - 2.0 * BIAS[h, q_idx, kv_idx] + s, True),
        (lambda s, b, h, q_idx, kv_idx: s + SHARED[b, q_idx, kv_idx], True),
        (lambda s, b, h, q_idx, kv_idx: s * 2.0 + BIAS[h, q_idx, kv_idx], False),  # the product cannot begin from it
        (lambda s, b, h, q_idx, kv_idx: torch.tanh(s + BIAS[h, q_idx, kv_idx]), False),
        (lambda s, b, h, q_idx, kv_idx: s + torch.exp(BIAS[h, q_idx, kv_idx]) * kv_idx, False),
        (lambda s, b, h, q_idx, kv_idx: s + BIAS[h, q_idx, kv_idx] + COLUMN[kv_idx], False),
        (lambda s, b, h, q_idx, kv_idx: s + BIAS[h, q_idx + 1, kv_idx], False),
        (lambda s, b, h, q_idx, kv_idx: s + BIAS[h, kv_idx, q_idx], False),
        (lambda s, b, h, q_idx, kv_idx: s + BIAS[h, q_idx, kv_idx] + BIAS[b, q_idx, kv_idx], False),
        (lambda s, b, h, q_idx, kv_idx: s + WIDE[h, q_idx, kv_idx], False),
    ],
)
def test_a_dense_bias_of_16_bits_is_copied(score_mod, copied):
    program = traced(score_mod).program
    assert ("tile" in early_parts(program, "dense", 128)) is copied
    assert "tile" not in early_parts(program, "paged", 128)
    spec = cuda_spec(program, "bfloat16", (128, 128), "sm90", cuda_target("9.0a"))
    assert ("load_copied" in render_kernel(spec).text) is copied
    assert "load_copied" not in render_kernel(loading_spec(spec)).text


def test_what_is_copied_and_the_rest_are_the_score():
    dense = torch.randn(2, 40, 50).bfloat16()
    variant = traced(lambda s, b, h, q_idx, kv_idx: 0.5 * (kv_idx - q_idx) - 2.0 * dense[h, q_idx, kv_idx] + s)
    program, values = variant.program, variant.values()
    rest, term, load = take_copied(program.score, program.slots)
    copied = evaluate(load, values, leaves())
    got = evaluate(rest, values, leaves()) + evaluate(term, values, leaves(copied=copied))
    torch.testing.assert_close(got, evaluate(program.score, values, leaves()))


def test_cheap_hooks_keep_the_large_tile():
    doc = jitgen.sorted(torch.arange(64, dtype=torch.int32))
    documents = jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: doc[q_idx] == doc[kv_idx]).trace().program
    for program in (None, t5().program, documents):
        assert sm90_tiles(128, 128, program).tile_q == 192
    assert sm90_tiles(128, 128, t5().program, layout="paged").tile_q == 128  # its rows are heads as well


@pytest.mark.parametrize("is_even", [False, True])
def test_masks_of_chosen_keys_share_tiles_and_columns(is_even):
    """Places of keys are looked up by KV head: its query heads share a tile, and a thread looks up one column for all rows."""
    program = place(
        jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx).trace().program, ChosenLists(16, is_even)
    )[0]
    assert "columns" in early_parts(program, "paged", 128) and sm90_tiles(128, 128, program, layout="paged").tile_q == 192
    text = render_kernel(cuda_spec(program, "bfloat16", (128, 128), "sm90", cuda_target("9.0a"), layout="paged")).text
    assert "launch.packing = jg::packing_shift(group_size);" in text and "share_columns(args, make_head(" in text
    assert re.search(r"struct MaskCol {\n  int \w+;[^\n]*\n};", text)


def test_masks_of_query_heads_share_nothing():
    width = torch.zeros(8, dtype=torch.int32)
    hooks = jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: q_idx - kv_idx < width[h]).trace().program
    assert "columns" not in early_parts(hooks, "paged", 128)
    text = render_kernel(cuda_spec(hooks, "bfloat16", (128, 128), "sm90", cuda_target("9.0a"), layout="paged")).text
    assert "launch.packing = 0;" in text and "share_columns" not in text


def stepped():
    """Level between the multiples of 16, from 32 to 64 everywhere else."""
    table = torch.randn(2, 128).float()
    return traced(lambda s, b, h, q_idx, kv_idx: s + table[h, torch.clamp((q_idx - kv_idx) // 16, -2, 4) + 2])


def signed():
    """The buckets of both directions: their sign is a mark as well."""
    table = torch.randn(2, 64).float()

    def score(s, b, h, q_idx, kv_idx):
        distance = q_idx - kv_idx
        return s + torch.where(distance < 0, table[h, torch.clamp(-distance, 0, 20)], 1.5) * 0.5

    return traced(score)


@pytest.mark.parametrize("make", [t5, buckets, stepped])
def test_part_is_level_where_its_marks_are_the_same_at_both_ends(make):
    trace = make()
    part = take_relative(trace.program.score)[1]
    marks = level_marks(part)
    assert marks
    distances = torch.arange(-150, 400)
    at = leaves(distance=distances)
    values = evaluate(part, trace.values(), at).broadcast_to(distances.shape)
    found = [evaluate(mark, trace.values(), at).broadcast_to(distances.shape) for mark in marks]
    num_level = 0
    for first in range(0, len(distances), 7):
        for last in range(first, len(distances), 11):
            if all(bool(f[first] == f[last]) for f in found):
                num_level += last - first > 60
                assert (values[first : last + 1] == values[first]).all()
    assert num_level > 0  # far from the diagonal


@pytest.mark.parametrize("make", [signed, decay])
def test_part_that_rises_and_falls_has_no_marks(make):
    assert level_marks(take_relative(make().program.score)[1]) is None
