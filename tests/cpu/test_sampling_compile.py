"""Sampling calls inside torch.compile: one operator in the graph, whatever is given to them, and what it writes to is known."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import jitgen
from jitgen import errors

ROWS, VOCAB, DRAFT = 4, 50, 3
SHIFT = torch.linspace(-1, 1, VOCAB)


@pytest.fixture(autouse=True)
def new_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)


def double(logit, token, row):
    return logit * 2


def made_inside(x, shift):
    return jitgen.softmax(x, processor=[double, lambda logit, token, row: logit + shift[token]], temperature=0.7)


def over_a_global(x, temperature):
    return jitgen.process_logits(x, lambda logit, token, row: logit + SHIFT[token], temperature=temperature)


def in_place(x, bitmask):
    y = x * 2
    jitgen.apply_token_bitmask(y, bitmask)
    jitgen.apply_token_bitmask(x, bitmask)
    return y + 1


def with_new_penalties(x, counts, repetition):
    return jitgen.softmax(x, penalties=jitgen.Penalties(counts, repetition=repetition, presence=0.5))


def filters(x):
    probs = jitgen.softmax(logits=x)
    return (
        jitgen.renorm(probs, top_k=9, top_p=0.8),
        jitgen.mask_logits(x, top_k=7),
        jitgen.renorm(probs, min_p=0.1, order="joint"),
    )


def rows():
    return torch.randn(ROWS, VOCAB)


def seeds():
    return torch.arange(ROWS) * 11


def drafts():
    draft, target = (torch.softmax(torch.randn(ROWS, n, VOCAB), -1) for n in (DRAFT, DRAFT + 1))
    return draft, torch.randint(0, VOCAB, (ROWS, DRAFT), dtype=torch.int32), target


CALLS = {
    "sample": (lambda x, seed: jitgen.sample(x * 2, temperature=0.8, top_p=0.9, seed=seed) + 1, rows, seeds),
    "valid": (lambda x, seed: jitgen.sample(x, top_k=5, seed=seed, return_valid=True), rows, seeds),
    "probabilities": (lambda x, seed: jitgen.sample(torch.softmax(x, -1), from_logits=False, seed=seed), rows, seeds),
    "offsets advance": (
        lambda x, seed, offset: [jitgen.sample(x, seed=seed, offset=offset, advance=True) for _ in range(2)],
        rows, seeds, lambda: torch.zeros(ROWS, dtype=torch.int64),
    ),
    "given results": (
        lambda x, seed, out, status: jitgen.sample(x, seed=seed, out=out, status=status, bad_token=-7),
        lambda: torch.cat([rows()[1:], torch.full((1, VOCAB), torch.nan)]), seeds,
        lambda: torch.zeros(ROWS, dtype=torch.int64), lambda: torch.zeros(ROWS, dtype=torch.uint8),
    ),
    "chosen rows": (lambda x, at: jitgen.sample(x, seed=3, indices=at), rows, lambda: torch.tensor([3, 0, 0])),
    "made inside": (made_inside, rows, lambda: torch.randn(VOCAB)),
    "over a global": (over_a_global, rows, lambda: torch.rand(ROWS) + 0.5),
    "in place": (in_place, rows, lambda: torch.randint(-(2**31), 2**31 - 1, (ROWS, 2), dtype=torch.int32)),
    "new penalties": (with_new_penalties, rows, lambda: torch.randint(0, 3, (ROWS, VOCAB)), lambda: torch.rand(ROWS) + 0.5),
    "given penalties": (
        lambda x, penalties: jitgen.apply_penalties(x * 1, penalties),
        rows, lambda: jitgen.Penalties(torch.randint(0, 3, (ROWS, VOCAB)), repetition=1.5),
    ),
    "filters": (filters, rows),
    "verify": (
        lambda given, seed: jitgen.speculative_verify(*given, seed=seed), drafts, seeds
    ),
    "verify with offsets": (
        lambda given, seed, offset: jitgen.speculative_verify(
            None, given[1], target_probs=given[2], seed=seed, offset=offset, advance=True
        ).ids,
        drafts, seeds, lambda: torch.zeros(ROWS, dtype=torch.int64),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_compiled_calls_do_what_eager_ones_do(name):
    call, *inputs = CALLS[name]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        given = [make() for make in inputs]
        again = copy.deepcopy(given)
        torch.testing.assert_close(compiled(*given), call(*again), equal_nan=True)
        for one, other in zip(given, again, strict=True):  # also what it has written to
            if isinstance(one, torch.Tensor):
                torch.testing.assert_close(one, other, equal_nan=True)


def test_draws_without_a_seed_are_those_of_torch_and_no_two_are_the_same():
    def draw_twice(x):
        return jitgen.sample(x * 0), jitgen.sample(x * 0)

    x, compiled = rows(), torch.compile(draw_twice, fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    got = *compiled(x), *compiled(x)
    torch.manual_seed(5)
    want = *draw_twice(x), *draw_twice(x)
    assert all(map(torch.equal, got, want))
    assert len({tuple(t.tolist()) for t in got}) == 4


def test_one_graph_serves_any_number_of_rows_and_new_numbers():
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, seed, k, temperature, shift):
        return jitgen.sample(
            x, seed=seed, top_k=k, temperature=temperature, processor=lambda logit, token, row: logit + shift[token]
        )

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for n in range(2, 9):
        given = torch.randn(n, VOCAB), 7 * n, n + 1, torch.rand(n) + 0.5, torch.randn(VOCAB)
        assert torch.equal(compiled(*given), step(*given))
    assert counter.frame_count <= 3  # numbers as they are, then any


def test_a_generator_breaks_the_graph():
    def step(x, generator):
        return jitgen.sample(x * 2, generator=generator) + 1

    x = rows()
    got = torch.compile(step, backend="eager")(x, torch.Generator().manual_seed(3))
    assert torch.equal(got, step(x, torch.Generator().manual_seed(3)))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"sampling\.sample is no operator of a graph\. Call it outside"):
        torch.compile(step, backend="eager", fullgraph=True)(x, torch.Generator())


@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_take_other_tensors(strict):
    class Draw(torch.nn.Module):
        def forward(self, x, seed, temperature):
            penalties = jitgen.Penalties((x > 0).int(), repetition=1.2)
            return jitgen.sample(x * 2, seed=seed, temperature=temperature, penalties=penalties)

    given, other = ((rows(), seeds() + i, torch.rand(ROWS) + 0.5) for i in range(2))
    with torch.no_grad():
        program = torch.export.export(Draw(), given, strict=strict).module()
    assert torch.equal(program(*other), Draw()(*other))


def test_compiled_calls_are_refused_as_eager_ones_are():
    with pytest.raises(errors.InvalidValue, match=r"order is 'last', expected 'top_k_first'"):
        torch.compile(lambda x: jitgen.sample(x, order="last"), backend="eager")(rows())
    with pytest.raises(errors.GradNotSupported, match="x requires grad, and sampling has no gradient"):
        torch.compile(lambda x: jitgen.sample(x), backend="eager")(rows().requires_grad_())
    with pytest.raises(errors.UnsupportedVariant, match=r"test_sampling_compile\.py:\d+: \.item\(\) of a traced value"):
        torch.compile(lambda x: jitgen.process_logits(x, lambda p, t, r: p.item()), backend="eager")(rows())
