"""What a hook is traced into means what the function itself computes, index by index, in PyTorch."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from gallery import CASES, Case, Sizes

from jitgen.evaluate import evaluate
from jitgen.reference import index_leaves, mask_of

Q_LEN, KV_LEN = 71, 131  # odd and different, so that swapped or shifted positions show
SIZES = Sizes(Q_LEN, KV_LEN)
SHAPE = (SIZES.batch, SIZES.num_q_heads, Q_LEN, KV_LEN)
NUM_SAMPLES = 3000  # of a hook that can only be called for one index at a time


def context(hook, h):
    """The keyword-only values a hook asks for."""
    numbers = {"q_len": Q_LEN, "kv_len": KV_LEN, "ctx_len": KV_LEN - Q_LEN, "num_q_heads": SIZES.num_q_heads,
               "num_kv_heads": SIZES.num_kv_heads}  # fmt: skip
    known = {name: torch.tensor(n) for name, n in numbers.items()}
    known["kv_h"] = h // (SIZES.num_q_heads // SIZES.num_kv_heads)
    return {p.name: known[p.name] for p in inspect.signature(hook).parameters.values() if p.kind is p.KEYWORD_ONLY}


def chosen(case: Case) -> torch.Tensor:
    """Elements to compare, as flat indices: all of them where torch.vmap takes the hook."""
    total = torch.Size(SHAPE).numel()
    return (
        torch.randperm(total, generator=torch.Generator().manual_seed(2))[:NUM_SAMPLES] if case.forks else torch.arange(total)
    )


def computed(hook, arguments, forks: bool):
    """The hook called for every index: by torch.vmap, or one index at a time where it has Python control flow."""

    def call(*args):
        return torch.as_tensor(hook(*args, **context(hook, args[-3])))

    if not forks:
        return torch.vmap(call)(*arguments)
    return torch.stack([call(*args) for args in zip(*(t.unbind() for t in arguments), strict=True)])


def positions(q_offset):
    """b, h, q_idx and kv_idx of every element, as flat tensors."""
    b, h, q, k = torch.meshgrid(*(torch.arange(n) for n in (SIZES.batch, SIZES.num_q_heads, Q_LEN, KV_LEN)), indexing="ij")
    return [t.flatten() for t in (b, h, q + q_offset, k)]


def leaves(q_offset):
    return index_leaves(SIZES.batch, SIZES.num_q_heads, SIZES.num_kv_heads, Q_LEN, KV_LEN, q_offset, 1.0,
                        torch.float64, torch.device("cpu"))  # fmt: skip


OFFSETS = pytest.mark.parametrize("q_offset", [0, KV_LEN - Q_LEN], ids=["local", "absolute"])


def having(hook: str) -> list[Case]:
    return [c for c in CASES.values() if getattr(c.make(SIZES), hook) is not None]


@OFFSETS
@pytest.mark.parametrize("case", having("mask_mod"), ids=lambda c: c.name)
def test_traced_mask_is_the_function(case, q_offset):
    variant, sample = case.make(SIZES), chosen(case)
    want = computed(variant.mask_mod, [t[sample] for t in positions(q_offset)], case.forks)
    assert want.dtype == torch.bool
    traced = variant.trace()
    heads = {"batch": SIZES.batch, "num_q_heads": SIZES.num_q_heads, "num_kv_heads": SIZES.num_kv_heads}
    got = mask_of(traced.program, traced.values(), **heads, q_len=Q_LEN, kv_len=KV_LEN, q_offset=q_offset)
    assert torch.equal(got.flatten()[sample], want)
    assert 0 < want.double().mean() < 1, "a mask that keeps all or nothing proves little"


@OFFSETS
@pytest.mark.parametrize("case", having("score_mod"), ids=lambda c: c.name)
def test_traced_score_is_the_function(case, q_offset):
    variant, sample = case.make(SIZES), chosen(case)
    score = 3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = computed(variant.score_mod, [t[sample] for t in (score.flatten(), *positions(q_offset))], case.forks)
    traced = variant.trace()
    got = score
    if traced.program.score is not None:
        got = evaluate(traced.program.score, traced.values(), {**leaves(q_offset), "score": score}).expand(SHAPE)
    if variant.mask_mod is None and traced.program.mask is not None:  # exclusions written into the score were moved
        got = torch.where(evaluate(traced.program.mask, traced.values(), leaves(q_offset)), got, -torch.inf)
    # The function mixes in float32 where it captures float32 tensors; the oracle computes in float64 throughout.
    torch.testing.assert_close(got.flatten()[sample], want.double(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["computed_sink", "softmax_one", "gpt_oss"])
def test_traced_sink_is_the_function(name):
    variant = CASES[name].make(SIZES)
    traced = variant.trace()
    got = evaluate(traced.program.sink, traced.values(), leaves(0)).squeeze(-1).squeeze(-1)
    for b, h in itertools.product(range(SIZES.batch), range(SIZES.num_q_heads)):
        sink = variant.sink
        want = sink(b, h) if callable(sink) and not isinstance(sink, torch.Tensor) else sink
        want = want[h] if isinstance(want, torch.Tensor) and want.dim() else want
        assert float(got.expand(SIZES.batch, SIZES.num_q_heads)[b, h]) == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("name", ["gated_output", "gated_channels", "normalised_output", "channel_scale", "lse_weighted"])
def test_traced_output_transform_is_the_function(name):
    variant = CASES[name].make(SIZES)
    generator = torch.Generator().manual_seed(1)
    o = torch.randn((*SHAPE[:3], 16), generator=generator, dtype=torch.float64)
    lse = torch.randn((*SHAPE[:3], 1), generator=generator, dtype=torch.float64)
    traced = variant.trace()
    row = {**leaves(0), "o": o, "lse": lse, "d": torch.arange(16), "head_dim_v": torch.tensor(16)}
    got = evaluate(traced.program.output, traced.values(), row).expand(o.shape)
    for b, h, i in itertools.product(*map(range, SHAPE[:3])):
        want = variant.output_transform(Row.of(o[b, h, i]), lse[b, h, i, 0], b, h, i)
        torch.testing.assert_close(got[b, h, i], torch.Tensor(want).double(), rtol=1e-6, atol=1e-6)


class Row(torch.Tensor):
    """A row of an output, with the method that rows have inside a hook."""

    @staticmethod
    def of(values):
        return values.as_subclass(Row)

    def rms(self, eps):
        return (self.square().mean() + eps).sqrt()
