"""Sampling on a CUDA device: the checks of the CPU, at sizes that need clusters, odd ones, and long rows."""

from __future__ import annotations

import pytest
import torch
from sampling_cases import (
    check_bad_rows,
    check_batch_invariance,
    check_distribution,
    check_speculation,
    check_support,
    logits_of,
    top_k_support,
)

import jitgen
from jitgen import sampling, sampling_launch, sampling_speculative

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


@pytest.fixture(params=["team", "alone"])
def team(request, monkeypatch):
    """Rows shared by a cluster of CTAs, and rows of one CTA, as on devices without clusters."""
    if request.param == "alone":
        monkeypatch.setattr(sampling_launch, "team_of", lambda vocab, device: 1)
        monkeypatch.setattr(sampling, "team_of", lambda vocab, device: 1)
        monkeypatch.setattr(sampling_speculative, "team_of", lambda vocab, device: 1)


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_draws_follow_the_filtered_distribution(team, filters):
    check_distribution(logits_of(1, 20_011, torch.float32, "cuda", seed=3), 200_000, **filters)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_from_a_full_vocabulary_follow_its_distribution(dtype):
    check_distribution(logits_of(1, 128_256, dtype, "cuda", seed=6, spread=4.0), 100_000)


@pytest.mark.parametrize("vocab", [1, 31, 4097, 32_003, 128_256])
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_supports_are_exact(team, vocab, filters):
    for dtype in DTYPES if filters == FILTERS["all"] else DTYPES[:1]:
        check_support(logits_of(9, vocab, dtype, "cuda", seed=vocab, spread=3.0), **filters)


@pytest.mark.parametrize("filters", [FILTERS["top_k"], FILTERS["top_p"]], ids=["top_k", "top_p"])
def test_rows_larger_than_shared_memory(filters):
    check_support(logits_of(3, 500_001, torch.float32, "cuda", spread=3.0), **filters)


def unlike_rows(vocab: int) -> torch.Tensor:
    """Rows whose largest values lie where a list of them is short, long or too long, and rows of equals."""
    x = logits_of(7, vocab, torch.float32, "cuda", seed=9)
    x[0, 100:900] += 20  # all in one slice
    x[1, torch.arange(64, device="cuda") * 2048 % vocab] += 20  # all of few threads
    x[2] = 1.0
    x[3, 50:] = 0.5
    x[4] = torch.arange(vocab, device="cuda") / 1000
    x[5, 7:] = -torch.inf
    x[6, ::2] = x[6, 1]
    return x


@pytest.mark.parametrize("k", [1, 12, 64, 100, 101, 600])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.7}, {"top_p": 0.7, "order": "joint"}, {"min_p": 0.1}], ids=str)
def test_top_k_of_unlike_rows(team, k, options):
    for vocab in (1500, 40_003):
        check_support(unlike_rows(vocab), top_k=k, **options)


@pytest.mark.parametrize("row", [0, 1])
def test_draws_from_crowded_rows_follow_their_distribution(team, row):
    for filters in ({"top_k": 90}, {"top_k": 200, "top_p": 0.8, "order": "joint"}, {"top_p": 0.3}):
        check_distribution(unlike_rows(20_011)[row : row + 1], 100_000, **filters)


@pytest.mark.parametrize("k", [1, 40, 5000, 40_000, 128_255])
def test_mask_keeps_the_k_largest_and_their_equals(team, k):
    for dtype in DTYPES:
        x = logits_of(5, 128_256, dtype, "cuda", spread=5.0)
        x[:, ::7] = -1e9 if dtype != torch.float16 else -6e4
        x[:, 3] = -torch.inf
        out = torch.full_like(x, float("nan"))
        assert sampling.mask_logits(x, top_k=k, out=out) is out
        assert torch.equal(out, torch.where(top_k_support(x.double(), k), x, -torch.inf))


def test_softmax_is_that_of_torch(team):
    for dtype in DTYPES:
        for vocab in (3001, 128_256):
            x = logits_of(7, vocab, dtype, "cuda", spread=8.0)
            temperature = torch.rand(7, device="cuda") + 0.3
            out = torch.full((7, vocab), float("nan"), device="cuda")
            sampling.softmax(x, temperature=temperature, out=out)
            want = (x.double() / temperature.double()[:, None]).softmax(-1)
            # the exponent x / T is rounded to float32 before it is used: relative error |x / T| 2^-23
            torch.testing.assert_close(out.double(), want, rtol=3e-5, atol=1e-9)


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_tokens_do_not_depend_on_the_batch(filters):
    check_batch_invariance(logits_of(300, 40_001, torch.float32, "cuda"), **filters)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1000, 128_256])
def test_bad_rows_are_reported_one_by_one(dtype, vocab):
    check_bad_rows("cuda", dtype, vocab)


def test_indices_outside_of_the_rows_are_reported():
    x = logits_of(2, 1000, torch.float32, "cuda")
    status = torch.zeros(3, dtype=torch.uint8, device="cuda")
    tokens = jitgen.sample(x, indices=torch.tensor([1, 5, -1], device="cuda"), seed=1, status=status, top_k=1)
    assert tokens.tolist() == [int(x[1].argmax()), -1, -1]
    assert [sampling.STATUS[s] for s in status.tolist()] == ["ok", "no such row", "no such row"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_speculation_draws_from_the_target(team, dtype):
    check_speculation("cuda", dtype, 333, 20_000)
    check_speculation("cuda", dtype, 16_411, 3000)


def test_processors_masks_and_penalties_are_those_of_torch():
    rows, vocab = 5, 32_003
    x = logits_of(rows, vocab, torch.float32, "cuda")
    bits = torch.randint(-(2**31), 2**31 - 1, (rows, (vocab + 31) // 32), dtype=torch.int32, device="cuda")
    token = torch.arange(vocab, device="cuda")
    allowed = ((bits[:, token // 32] >> (token % 32)) & 1).bool()
    assert torch.equal(jitgen.apply_token_bitmask(x.clone(), bits), torch.where(allowed, x, -torch.inf))
    counts = torch.randint(0, 3, (rows, vocab), dtype=torch.uint8, device="cuda")
    factor = torch.rand(rows, device="cuda") + 1
    want = torch.where(counts > 0, torch.where(x > 0, x / factor[:, None], x * factor[:, None]), x) - 0.25 * counts
    got = jitgen.process_logits(x, lambda logit, token, row: logit * 2, penalties=jitgen.Penalties(counts, None, factor, 0.25))
    torch.testing.assert_close(got, want * 2, rtol=1e-6, atol=1e-6)
    tokens = jitgen.sample(x, bitmask=bits, top_k=1, seed=1)
    assert torch.equal(tokens.long(), torch.where(allowed, x, -torch.inf).argmax(-1))


def test_graph_replays_draw_anew():
    x = logits_of(16, 32_003, torch.bfloat16, "cuda")
    seeds, offsets = torch.arange(16, device="cuda"), torch.zeros(16, dtype=torch.int64, device="cuda")
    eager = [jitgen.sample(x, seed=seeds, offset=64 * i, top_p=0.9).clone() for i in range(3)]
    out = torch.empty(16, dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        jitgen.sample(x, seed=seeds, offset=offsets, top_p=0.9, advance=True, out=out)
        with pytest.raises(ValueError, match="every replay would repeat"):
            jitgen.sample(x)
    offsets.zero_()
    for want in eager:
        graph.replay()
        assert torch.equal(out, want)


def test_cuda_generators_move_on():
    x = torch.zeros(4, 1000, device="cuda")
    generator = torch.Generator("cuda").manual_seed(3)
    first, second = jitgen.sample(x, generator=generator), jitgen.sample(x, generator=generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, jitgen.sample(x, generator=generator.manual_seed(3)))
