"""Calls of every kind on a device of choice, compared with float64; and calls whose tensors lie on two devices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from append_cases import check_append, check_rope
from cascade_batch import SharedBatch
from mla_cases import check_mla
from sampling_cases import check_support, logits_of
from serving_batch import Batch, poisoned

import jitgen
from jitgen import reference

Tensor = torch.Tensor
HEADS, KV_HEADS, DIM, PAGE = 8, 2, 64, 16
MIXED_LENGTHS = [(130, 391), (1, 700), (0, 9), (257, 1024), (3, 300), (0, 0)]
DECODE_LENGTHS = [(1, 700), (1, 16), (1, 4097), (0, 40), (1, 33)]


@dataclass(frozen=True)
class Case:
    """A call that is ready to be made, any number of times, and the check of what it returns."""

    run: Callable[[], Any]
    check: Callable[[Any], None]

    def __call__(self) -> None:
        self.check(self.run())


def random(device: str, seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def inputs(device: str, seed: int, q_len: int, kv_len: int) -> list[Tensor]:
    shapes = ((HEADS, q_len), (KV_HEADS, kv_len), (KV_HEADS, kv_len))
    return [random(device, seed + i, 1, *shape, DIM) for i, shape in enumerate(shapes)]


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def alibi_of(device: str, seed: int) -> Callable[..., Any]:
    slopes = torch.logspace(-1, -3 - seed % 3, HEADS, base=2, device=device)
    return lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx)


def assert_near(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Output and logsumexp are on their device, all of them written, and right."""
    (out, lse), (exact, exact_lse) = got, want
    assert out.device == lse.device == exact.device
    assert not out.isnan().any()
    assert ((out.double() - exact).norm() / exact.norm()).item() <= 0.5 * torch.finfo(out.dtype).eps
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=2e-4)


# ---- calls ----------------------------------------------------------------------------------------------------------------


def dense(device: str, seed: int, q_len: int = 257, kv_len: int = 391) -> Case:
    q, k, v = inputs(device, seed, q_len, kv_len)
    variant = jitgen.Variant(score_mod=alibi_of(device, seed), mask_mod=causal)
    want = reference.attention(q, k, v, variant, return_lse=True)
    return Case(
        lambda: jitgen.attention(q, k, v, variant, out=torch.full_like(q, math.nan), return_lse=True),
        lambda got: assert_near(got, want),
    )


def plain_dense(device: str, seed: int) -> Case:
    """Without hooks: all devices share what is remembered of the program."""
    q, k, v = inputs(device, seed, 257, 391)
    want = reference.attention(q, k, v, return_lse=True)
    return Case(lambda: jitgen.attention(q, k, v, return_lse=True), lambda got: assert_near(got, want))


def requests(lengths: list[tuple[int, int]], device: str, seed: int, **options: Any) -> Case:
    """A plan, updated in each run, and its call."""
    batch = Batch(lengths, HEADS, KV_HEADS, DIM, dtype=torch.bfloat16, device=device, seed=seed)
    variant = jitgen.Variant(score_mod=alibi_of(device, seed), mask_mod=causal)
    plan = batch.plan(variant, page_size=PAGE, **options)
    k, v, lists = batch.pages(PAGE)
    table, q_indptr, kv_len = batch.block_table(lists), batch.q_indptr(), batch.kv_len()
    want = batch.expected(variant)

    def run() -> tuple[Tensor, Tensor]:
        plan.update(q_indptr, kv_len)
        out, lse = poisoned(plan, batch.q)
        jitgen.paged_attention(batch.q, (k, v), table, plan, out=out, lse=lse)
        return out, lse

    return Case(run, lambda got: assert_near(got, want))


def plain_decode(device: str, seed: int) -> Case:
    """The call that is prepared from the one before: nothing is given but q, the cache and the table."""
    lengths = [(1, 1 + 97 * i) for i in range(7)]
    batch = Batch(lengths, HEADS, KV_HEADS, DIM, dtype=torch.bfloat16, device=device, seed=seed)
    plan = batch.plan(max_q_len=1, page_size=PAGE)
    k, v, lists = batch.pages(PAGE)
    table, want = batch.block_table(lists), batch.expected()
    attend = partial(jitgen.paged_attention, batch.q, (k, v), table, plan)
    return Case(lambda: (attend(), attend()), lambda got: [assert_near((out, want[1].float()), want) for out in got] and None)


def ragged(device: str, seed: int) -> Case:
    batch = Batch(MIXED_LENGTHS, HEADS, KV_HEADS, DIM, dtype=torch.float16, device=device, seed=seed)
    plan = batch.plan(causal, layout="ragged", split="fixed", kv_split=256, max_kv_len=1024)
    (k, v), want = batch.ragged(), batch.expected(causal)

    def run() -> tuple[Tensor, Tensor]:
        out, lse = poisoned(plan, batch.q)
        jitgen.ragged_attention(batch.q, k, v, batch.update(plan), out=out, lse=lse)
        return out, lse

    return Case(run, lambda got: assert_near(got, want))


def cascade(device: str, seed: int) -> Case:
    shared = SharedBatch(
        [3, 1, 5, 2, 1], [[(2, 330), (3, 213)], [(1, 9), (1, 2), (1, 6), (1, 130), (1, 1)]], PAGE, HEADS, KV_HEADS, DIM,
        dtype=torch.bfloat16, device=device, seed=seed,
    )  # fmt: skip
    caches, levels = shared.build()
    plan, want = shared.plan(causal, page_size=PAGE), shared.whole.expected(causal)

    def run() -> tuple[Tensor, Tensor]:
        plan.update(levels)
        out, lse = poisoned(plan, shared.whole.q)
        jitgen.paged_attention(shared.whole.q, caches, levels, plan, out=out, lse=lse)
        return out, lse

    return Case(run, lambda got: assert_near(got, want))


def blocks(device: str, seed: int) -> Case:
    """Lists of whole blocks, which the host looks at later."""
    q_len, kv_len, size = 1000, 1152, 128
    chosen = torch.rand(8, 9, generator=torch.Generator().manual_seed(seed)) < 0.4
    counts = chosen.sum(1)
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int().to(device)
    found = jitgen.BlockSparse.bsr(indptr, chosen.nonzero()[:, 1].int().to(device), (q_len, kv_len), (size, size))
    q, k, v = inputs(device, seed, q_len, kv_len)
    keep = chosen.repeat_interleave(size, 0).repeat_interleave(size, 1)[:q_len].to(device)
    wide_k, wide_v = (t.double().repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    logits = (q.double() @ wide_k.mT / DIM**0.5).masked_fill(~keep, -math.inf)
    want = torch.nan_to_num(logits.softmax(-1)) @ wide_v, logits.logsumexp(-1)
    return Case(
        lambda: jitgen.block_sparse_attention(q, k, v, found, return_lse=True, out=torch.full_like(q, math.nan)),
        lambda got: assert_near(got, want),
    )


def merge(device: str, seed: int) -> Case:
    rows, count, heads = 33, 3, 4
    outs = random(device, seed, rows, count, heads, DIM)
    lses = 5 * random(device, seed + 1, rows, count, heads, dtype=torch.float32)
    lses[0] = lses[3, 1] = -math.inf
    merged = lses.double().logsumexp(1)
    weights = torch.nan_to_num((lses.double() - merged[:, None]).exp())
    want = (weights[..., None] * outs.double()).sum(1), merged
    return Case(lambda: jitgen.merge_states(outs, lses), lambda got: assert_near(got, want))


def sampling(device: str, seed: int) -> Case:
    x = logits_of(16, 32_003, torch.float32, device, seed=seed)
    seeds = torch.arange(16, device=device)

    def check(got: tuple[Tensor, Tensor]) -> None:
        probabilities, best = got
        torch.testing.assert_close(probabilities.double(), (x.double() / 0.7).softmax(-1), rtol=1e-5, atol=1e-9)
        assert torch.equal(best.long(), x.argmax(-1))

    return Case(lambda: (jitgen.softmax(x, temperature=0.7), jitgen.sample(x, top_k=1, seed=seeds)), check)


def draws(device: str) -> None:
    check_support(logits_of(1, 300, torch.bfloat16, device), top_p=0.7)


def checked(function: Callable[..., None], *args: object, **options: object) -> Callable[[str, int], Case]:
    """A case of a function that makes its inputs, calls and checks."""
    return lambda device, seed: Case(partial(function, device, *args, **options), lambda got: None)


CASES: dict[str, Callable[[str, int], Case]] = {
    "dense": dense,
    "plain dense": plain_dense,
    "few rows": partial(dense, q_len=1, kv_len=4097),  # whose keys are cut among the CTAs of the device
    "decode": partial(requests, DECODE_LENGTHS, max_q_len=1),
    "plain decode": plain_decode,
    "mixed": partial(requests, MIXED_LENGTHS),
    "ragged": ragged,
    "cascade": cascade,
    "blocks": blocks,
    "merge": merge,
    "sampling": sampling,
    "draws": checked(draws),
    "append": checked(check_append, torch.bfloat16, torch.bfloat16, transform=True),
    "rope": checked(check_rope, torch.bfloat16, (8, 2), 64, torch.int32),
    "mla": checked(check_mla, torch.bfloat16, [130, 1, 700], [1, 1, 2]),
}


# ---- tensors that lie apart -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Apart:
    """Inputs on one device; ``there`` is another."""

    here: str
    there: str

    def away(self, t: Tensor) -> Tensor:
        return t.to(self.there)

    @property
    def qkv(self) -> list[Tensor]:
        return [random(self.here, i, 1, 4, 40, DIM) for i in range(3)]

    def attend(self, which: str) -> object:
        """A call of a plan with one of its tensors away."""
        batch = Batch([(1, 40), (2, 20)], 4, 2, DIM, dtype=torch.bfloat16, device=self.here)
        bias = torch.zeros(4, device=self.there if which == "bias" else self.here)
        plan = batch.plan(lambda score, b, h, q_idx, kv_idx: score + bias[h], page_size=PAGE)
        k, v, lists = batch.pages(PAGE)
        out, lse = poisoned(plan, batch.q)
        given = {"q": batch.q, "k": k, "table": batch.block_table(lists), "out": out, "lse": lse, "lengths": batch.q_indptr()}
        if which in given:
            given[which] = self.away(given[which])
        if which == "lengths":
            return plan.update(given["lengths"], batch.kv_len())
        results = {"out": given["out"], "lse": given["lse"]}
        return jitgen.paged_attention(given["q"], (given["k"], v), given["table"], plan, **results)

    def append(self, which: str) -> object:
        kv, rows = torch.zeros(4, 2, PAGE, 2, DIM, device=self.here), random(self.here, 0, 3, 2, DIM, dtype=torch.float32)
        slots = torch.arange(3, device=self.here)
        given = {"kv": kv, "v": rows, "slots": slots}
        given[which] = self.away(given[which])
        return jitgen.append(given["kv"], rows, given["v"], slot_mapping=given["slots"])

    def merge(self, which: str) -> object:
        outs = [random(self.here, i, 5, 4, DIM) for i in range(2)]
        lses = [torch.zeros(5, 4, device=self.here) for _ in range(2)]
        given = {"outs": outs, "lses": lses}
        given[which][1] = self.away(given[which][1])
        return jitgen.merge_states(outs, lses)

    def captured(self) -> object:
        bias = torch.zeros(4, device=self.there)
        return jitgen.attention(*self.qkv, score_mod=lambda score, b, h, q_idx, kv_idx: score + bias[h])

    def sample(self, **given: Tensor) -> object:
        return jitgen.sample(torch.zeros(3, 50, device=self.here), **{name: self.away(t) for name, t in given.items()})

    def listed(self) -> object:
        indptr, indices = torch.tensor([0, 1], device=self.there), torch.zeros(1, dtype=torch.int32, device=self.there)
        found = jitgen.BlockSparse.bsr(indptr, indices, (40, 40), (40, 40))
        return jitgen.block_sparse_attention(*self.qkv, found)


APART: dict[str, Callable[[Apart], object]] = {
    "k": lambda a: jitgen.attention(a.qkv[0], a.away(a.qkv[1]), a.qkv[2]),
    "v": lambda a: jitgen.attention(a.qkv[0], a.qkv[1], a.away(a.qkv[2])),
    "out": lambda a: jitgen.attention(*a.qkv, out=a.away(a.qkv[0])),
    "captured": Apart.captured,
    **{f"paged {name}": partial(Apart.attend, which=name) for name in ("q", "k", "table", "out", "lse", "lengths", "bias")},
    **{f"append {name}": partial(Apart.append, which=name) for name in ("kv", "v", "slots")},
    **{f"merge {name}": partial(Apart.merge, which=name) for name in ("outs", "lses")},
    "rope positions": lambda a: jitgen.rope(a.qkv[0][0], None, a.away(torch.arange(4, device=a.here))),
    "rope k": lambda a: jitgen.rope(a.qkv[0][0], a.away(a.qkv[0][0]), torch.arange(4, device=a.here)),
    "top_p": lambda a: a.sample(top_p=torch.ones(3, device=a.here)),
    "seed": lambda a: a.sample(seed=torch.arange(3, device=a.here)),
    "blocks": Apart.listed,
}
