"""Custom logit processors, penalties and bitmasks: their values are those of the same functions on torch tensors."""

from __future__ import annotations

import pytest
import torch
from sampling_cases import logits_of, top_k_support

import jitgen
from jitgen import sampling, sampling_hooks, sampling_launch
from jitgen.errors import ShapeMismatch, UnsupportedVariant, VariantError

ROWS, VOCAB = 5, 1003


def eager(processor, x):
    """The processor on whole tensors."""
    token, row = torch.arange(x.shape[1]), torch.arange(x.shape[0])[:, None]
    return processor(x, token, row)


BIAS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2))
BANNED = torch.rand(ROWS, VOCAB, generator=torch.Generator().manual_seed(3)) < 0.3
SCALES = torch.rand(ROWS, generator=torch.Generator().manual_seed(4)) + 0.5

PROCESSORS = {
    "bias": lambda logit, token, row: logit + BIAS[token],
    "ban": lambda logit, token, row: torch.where(BANNED[row, token], -torch.inf, logit),
    "row_scale": lambda logit, token, row: logit * SCALES[row],
    "token_arithmetic": lambda logit, token, row: torch.where((token + row) % 3 == 0, logit, logit - 5.0),
    "soft_cap": lambda logit, token, row: 7.0 * torch.tanh(logit / 7.0),
    "typical": lambda logit, token, row: torch.clamp(logit, -2.0, 2.0) - 0.1 * torch.abs(logit),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_processed_logits_are_those_of_torch(name, dtype):
    x = logits_of(ROWS, VOCAB, dtype, "cpu")
    out = torch.full_like(x, float("nan"))
    jitgen.process_logits(x, PROCESSORS[name], out=out)
    want = eager(PROCESSORS[name], x.float()).to(dtype)
    torch.testing.assert_close(out, want, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6)


def test_python_control_flow_forks():
    def even_rows_only(logit, token, row):
        if row % 2 == 0 and token < 10:
            return logit * 2
        return logit

    x = logits_of(ROWS, VOCAB, torch.float32, "cpu")
    want = x.clone()
    want[::2, :10] *= 2
    assert torch.equal(jitgen.process_logits(x, even_rows_only), want)


def test_processors_apply_in_order_and_before_the_temperature():
    x = logits_of(ROWS, VOCAB, torch.float32, "cpu")
    both = jitgen.process_logits(x, [PROCESSORS["bias"], PROCESSORS["soft_cap"]], temperature=2.0)
    torch.testing.assert_close(both, eager(PROCESSORS["soft_cap"], eager(PROCESSORS["bias"], x)) / 2, rtol=1e-5, atol=1e-6)


def test_fused_processors_are_those_of_a_pass_of_their_own():
    x, seeds = logits_of(ROWS, VOCAB, torch.float32, "cpu"), torch.arange(ROWS)
    for filters in ({}, {"top_k": 9}, {"top_p": 0.7}):
        processed = jitgen.process_logits(x, PROCESSORS["ban"])
        want = jitgen.sample(processed, seed=seeds, **filters)
        assert torch.equal(jitgen.sample(x, processor=PROCESSORS["ban"], seed=seeds, **filters), want)
    torch.testing.assert_close(sampling.softmax(x, processor=PROCESSORS["ban"]), processed.softmax(-1), rtol=1e-5, atol=1e-8)


def test_new_captured_values_compile_and_trace_nothing(monkeypatch):
    x = logits_of(ROWS, VOCAB, torch.float32, "cpu")

    def shifted(by, table):
        return jitgen.process_logits(x, lambda logit, token, row: logit + by * table[token])

    shifted(1.0, BIAS)

    def refuse(*args):
        raise AssertionError("this should have been found")

    monkeypatch.setattr(sampling_launch, "_load", refuse)
    monkeypatch.setattr(sampling_hooks, "trace_processors", refuse)
    torch.testing.assert_close(shifted(-2.5, BIAS.flip(0)), x - 2.5 * BIAS.flip(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vocab", [31, 32, 1003])
def test_bitmask_allows_the_tokens_whose_bit_is_set(vocab):
    x = logits_of(ROWS, vocab, torch.float32, "cpu")
    bits = torch.randint(-(2**31), 2**31 - 1, (ROWS, (vocab + 31) // 32), dtype=torch.int32)
    token = torch.arange(vocab)
    allowed = ((bits[:, token // 32] >> (token % 32)) & 1).bool()
    want = torch.where(allowed, x, -torch.inf)
    assert torch.equal(jitgen.apply_token_bitmask(x, bits, out=torch.full_like(x, 3.0)), want)
    tokens = torch.stack([jitgen.sample(x, bitmask=bits, seed=s) for s in range(20)])
    assert bool(allowed.gather(1, tokens.T.long()).all())
    probs = sampling.softmax(x, bitmask=bits)
    torch.testing.assert_close(probs, want.softmax(-1), rtol=1e-5, atol=1e-8)
    assert jitgen.apply_token_bitmask(x, bits) is x and torch.equal(x, want)


def test_row_without_an_allowed_token_is_reported():
    bits = torch.full((3, 32), -1, dtype=torch.int32)
    bits[1] = 0
    tokens, valid = jitgen.sample(logits_of(3, VOCAB, torch.float32, "cpu"), bitmask=bits, seed=1, top_k=5, return_valid=True)
    assert valid.tolist() == [True, False, True] and int(tokens[1]) == -1


@pytest.mark.parametrize("counts_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("with_prompt", [False, True], ids=["output_only", "prompt"])
def test_penalties_follow_their_definition(counts_dtype, with_prompt):
    generator = torch.Generator().manual_seed(7)
    x = logits_of(ROWS, VOCAB, torch.float32, "cpu")
    counts = torch.randint(0, 4, (ROWS, VOCAB), generator=generator).to(counts_dtype)
    prompt = torch.rand(ROWS, VOCAB, generator=generator) < 0.2 if with_prompt else None
    repetition, presence = torch.rand(ROWS, generator=generator) + 1, torch.rand(ROWS, generator=generator)
    seen = (counts > 0) | prompt if with_prompt else counts > 0
    r = repetition[:, None]
    want = torch.where(seen, torch.where(x > 0, x / r, x * r), x) - 0.3 * counts - presence[:, None] * (counts > 0)
    penalties = jitgen.Penalties(counts, prompt, repetition=repetition, frequency=0.3, presence=presence)
    torch.testing.assert_close(jitgen.apply_penalties(x.clone(), penalties), want, rtol=1e-5, atol=1e-6)
    tokens = jitgen.sample(x, penalties=penalties, top_k=2, seed=4)
    assert bool(top_k_support(want, 2).gather(1, tokens.long()[:, None]).all())
    assert jitgen.sample(x, penalties=jitgen.Penalties(counts), temperature=0, seed=1).tolist() == x.argmax(-1).tolist()


def test_errors_name_the_processor_and_the_remedy():
    x = logits_of(2, 10, torch.float32, "cpu")
    cases = [
        (lambda a, b: a, VariantError, r"takes 2 positional parameters, expected 3: \(logit, token, row\)"),
        (5, VariantError, "processor is 5 of type int, expected a function"),
        (lambda logit, token, row: None, UnsupportedVariant, r"test_sampling_processors.py:\d+: .*returned nothing"),
        (lambda logit, token, row: logit + torch.zeros(3)[row], UnsupportedVariant, "made inside the hook"),
        (lambda logit, token, row: logit + BIAS[row, token], UnsupportedVariant, "BIAS|ind"),
    ]
    for processor, error, message in cases:
        with pytest.raises(error, match=message):
            jitgen.process_logits(x, processor)
    small = torch.zeros(2, 5)
    with pytest.raises(ShapeMismatch, match="captured tensor 'small' has size 5 along axis 1, which token indexes up to 9"):
        jitgen.process_logits(x, lambda logit, token, row: logit + small[row, token])
    with pytest.raises(VariantError, match="processors change logits"):
        jitgen.sample(x.softmax(-1), from_logits=False, processor=PROCESSORS["soft_cap"])
    with pytest.raises(ShapeMismatch, match=r"bitmask has shape \(2, 3\), expected \[batch, 32\]"):
        jitgen.sample(logits_of(2, VOCAB, torch.float32, "cpu"), bitmask=torch.zeros(2, 3, dtype=torch.int32))
