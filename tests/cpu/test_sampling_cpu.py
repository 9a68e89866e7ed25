"""Sampling on the CPU against float64: supports, distributions, independence of the batch and of the number of threads."""

from __future__ import annotations

import pytest
import torch
from sampling_cases import (
    FALSE_ALARM,
    check_bad_rows,
    check_batch_invariance,
    check_distribution,
    check_speculation,
    check_support,
    chi_square_tail,
    draw_many,
    filtered,
    logits_of,
    top_k_support,
)

import jitgen
from jitgen import sampling

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FILTERS = {
    "none": {},
    "top_k": {"top_k": 12},
    "top_p": {"top_p": 0.85},
    "min_p": {"min_p": 0.05},
    "k_then_p": {"top_k": 30, "top_p": 0.8},
    "joint": {"top_k": 30, "top_p": 0.8, "order": "joint"},
    "all": {"top_k": 50, "top_p": 0.95, "min_p": 0.02},
}


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_draws_follow_the_filtered_distribution(filters):
    check_distribution(logits_of(1, 1003, torch.float32, "cpu", seed=3), 40_000, **filters)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_of_each_dtype_follow_its_distribution(dtype):
    x = logits_of(1, 257, dtype, "cpu", seed=5)
    check_distribution(x, 30_000, temperature=0.7)
    check_distribution(x.float().softmax(-1).to(dtype), 30_000, from_logits=False)


def test_chi_square_notices_a_wrong_distribution():
    x = logits_of(1, 257, torch.float32, "cpu", seed=5)
    assert chi_square_tail(draw_many(x, 30_000, temperature=1.1), filtered(x)[0][0]) < FALSE_ALARM


@pytest.mark.parametrize("vocab", [1, 2, 31, 4096, 4097, 12345])
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_supports_are_exact(vocab, filters):
    for dtype in DTYPES if filters == FILTERS["all"] else DTYPES[:1]:
        check_support(logits_of(9, vocab, dtype, "cpu", seed=vocab), **filters)


def test_supports_of_flat_and_of_peaked_rows_are_exact():
    flat = torch.zeros(3, 5000)
    tokens = jitgen.sample(flat, top_k=3, seed=1)  # all are equal, so all are kept
    assert bool(((tokens >= 0) & (tokens < 5000)).all())
    peaked = logits_of(3, 5000, torch.float32, "cpu")
    peaked[:, 77] = 60.0
    assert jitgen.sample(peaked, top_p=0.9, seed=1).tolist() == [77] * 3
    assert jitgen.sample(peaked, top_p=0.0, seed=1).tolist() == [77] * 3
    assert jitgen.sample(peaked, top_k=1, seed=2).tolist() == [77] * 3
    assert jitgen.sample(peaked, min_p=1.0, seed=2).tolist() == [77] * 3
    assert jitgen.sample(peaked, temperature=0.0, seed=2).tolist() == [77] * 3


@pytest.mark.parametrize("k", [1, 7, 500, 4999, 5000, 6000])
def test_mask_keeps_the_k_largest_and_their_equals(k):
    for dtype in DTYPES:
        x = logits_of(5, 5000, dtype, "cpu", spread=5.0)
        x[:, ::7] = -1e9 if dtype != torch.float16 else -6e4
        x[:, 3] = -torch.inf
        out = torch.full_like(x, float("nan"))
        assert sampling.mask_logits(x, top_k=k, out=out) is out
        want = torch.where(top_k_support(x.double(), k), x, -torch.inf)
        assert torch.equal(out, want)


def test_ties_and_zeros_of_both_signs_at_the_threshold():
    x = torch.tensor([[-0.0, 0.0, -1.0, 2.0, 0.0, -1e-45, 1e-45, 3.0]])
    for k in range(1, 9):
        want = torch.where(top_k_support(x, k), x, -torch.inf)
        assert torch.equal(sampling.mask_logits(x, top_k=k), want), k


@pytest.mark.parametrize("seed", range(6))
def test_thresholds_are_found_among_values_of_any_bit_pattern(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-(2**31), 2**31 - 1, (4, 3001), generator=generator).to(torch.int32).view(torch.float32)
    x = torch.where(x.abs() < 1e38, x, 0.5)  # NaN and what softmax calls infinite are bad rows
    x[:, ::11] = x[:, 5:6]  # ties
    for k in torch.randint(1, 3001, (8,), generator=generator).tolist():
        assert torch.equal(sampling.mask_logits(x, top_k=k), torch.where(top_k_support(x, k), x, -torch.inf)), k


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
def test_mass_is_found_among_probabilities_of_all_magnitudes(top_p):
    probs = torch.exp2(-100 * torch.rand(5, 4001, generator=torch.Generator().manual_seed(8)))
    probs[:, ::9] = probs[:, 3:4]
    want, unsure = filtered(probs, from_logits=False, top_p=top_p)
    got = sampling.renorm(probs, top_p=top_p)
    assert torch.equal((got > 0) | unsure, (want > 0) | unsure)
    torch.testing.assert_close(got.sum(-1), torch.ones(5), rtol=1e-5, atol=0)


def test_softmax_is_that_of_torch():
    for dtype in DTYPES:
        x = logits_of(7, 3001, dtype, "cpu", spread=8.0)
        temperature = torch.rand(7) + 0.3
        want = (x.double() / temperature[:, None]).softmax(-1)
        torch.testing.assert_close(sampling.softmax(x, temperature=temperature).double(), want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_tokens_do_not_depend_on_the_batch(filters):
    check_batch_invariance(logits_of(7, 9001, torch.float32, "cpu"), **filters)


def test_tokens_do_not_depend_on_the_number_of_threads():
    x, before = logits_of(3, 30_000, torch.float32, "cpu"), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(jitgen.sample(x, top_p=0.9, seed=9).tolist())
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_rows_are_reported_one_by_one(dtype):
    check_bad_rows("cpu", dtype, 1000)


def test_per_row_parameters_are_those_of_the_output_row():
    x = logits_of(2, 400, torch.float32, "cpu")
    indices = torch.tensor([1, 0, 1, 0])
    top_k = torch.tensor([1, 1, 400, 2])
    tokens = torch.stack([jitgen.sample(x, indices=indices, top_k=top_k, seed=s) for s in range(200)])
    best = x.argmax(-1)
    assert bool((tokens[:, 0] == best[1]).all()) and bool((tokens[:, 1] == best[0]).all())
    assert len(tokens[:, 2].unique()) > 50
    assert set(tokens[:, 3].tolist()) == set(x[0].topk(2).indices.tolist())


def test_one_seed_gives_rows_streams_of_their_own():
    x = torch.zeros(64, 1000)
    assert len(jitgen.sample(x, seed=3).unique()) > 50
    same = jitgen.sample(x, seed=torch.full((64,), 3))
    assert len(same.unique()) == 1


def test_advance_moves_the_offsets_and_the_tokens():
    x, seeds, offsets = torch.zeros(8, 1000), torch.arange(8), torch.arange(8) * 3
    first = jitgen.sample(x, seed=seeds, offset=offsets, advance=True)
    assert offsets.tolist() == [64 + 3 * i for i in range(8)]
    second = jitgen.sample(x, seed=seeds, offset=offsets, advance=True)
    assert not torch.equal(first, second)
    assert torch.equal(second, jitgen.sample(x, seed=seeds, offset=torch.arange(8) * 3 + 64))


def test_generators_decide_the_tokens():
    x = torch.zeros(4, 1000)
    one, two = (jitgen.sample(x, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two)
    each = [torch.Generator().manual_seed(s) for s in (1, 2, 1, 3)]
    tokens = jitgen.sample(x, generator=each)
    assert int(tokens[0]) == int(tokens[2]) != int(tokens[1])
    torch.manual_seed(0)
    first = jitgen.sample(x)
    torch.manual_seed(0)
    assert torch.equal(first, jitgen.sample(x)) and not torch.equal(first, jitgen.sample(x))


def test_first_number_of_the_stream_is_philox():
    # known answer of Philox4x32-10 for key and counter 0 (Salmon et al. 2011)
    u = ((0x6627E8D5 << 32 | 0xE169C58D) >> 11) + 0.5
    x = torch.zeros(1, 1 << 20)
    assert jitgen.sample(x, seed=torch.zeros(1, dtype=torch.int64)).item() == int(u * 2.0**-53 * (1 << 20))


def test_strided_rows_and_outputs():
    wide = logits_of(4, 999, torch.float32, "cpu")
    x = wide[:, 17:900]
    assert torch.equal(jitgen.sample(x, seed=4, top_p=0.9), jitgen.sample(x.contiguous(), seed=4, top_p=0.9))
    out = torch.full((4, 2000), 7.0)
    sampling.softmax(x, out=out[:, 5:888])
    torch.testing.assert_close(out[:, 5:888], x.softmax(-1), rtol=1e-5, atol=1e-8)
    assert bool((out[:, :5] == 7).all()) and bool((out[:, 888:] == 7).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_speculation_draws_from_the_target(dtype):
    check_speculation("cpu", dtype, 33, 8000)


def test_speculation_of_equal_distributions_accepts_everything():
    t = logits_of(5, 100, torch.float32, "cpu").softmax(-1).expand(3, 5, 100)
    ids = torch.stack([torch.multinomial(t[0, i], 3, replacement=True) for i in range(4)], 1)
    found = jitgen.speculative_verify(t[:, :4], ids, t, seed=1)
    assert found.emitted.tolist() == found.accepted.tolist() == [4, 4, 4]
    assert torch.equal(found.ids[:, :4].long(), ids) and bool((found.ids[:, 4] >= 0).all())
    assert found.path.tolist() == [[0, 1, 2, 3]] * 3


def test_speculation_never_leaves_a_token_undefined():
    target = torch.zeros(2, 2, 8)
    target[:, :, 3] = 1.0
    draft = target[:, :1].clone()
    draft[:, :, 3] = 0.0
    draft[:, :, 5] = 1.0  # the draft's token is impossible: rejected, and the residual is the target
    found = jitgen.speculative_verify(draft, torch.full((2, 1), 5), target, seed=1)
    assert found.ids.tolist() == [[3, -1]] * 2 and found.emitted.tolist() == [0, 0]
    found = jitgen.speculative_verify(draft, torch.full((2, 1), 99), target, seed=1)  # not a token at all
    assert found.ids.tolist() == [[3, -1]] * 2
    status = torch.zeros(2, dtype=torch.uint8)
    found = jitgen.speculative_verify(draft, torch.full((2, 1), 5), torch.zeros_like(target), seed=1, status=status)
    assert found.ids.tolist() == [[-1, -1]] * 2 and [sampling.STATUS[s] for s in status] == ["empty"] * 2
