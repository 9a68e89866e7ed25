"""Variants drawn at random, for tests that look for combinations of hooks which nobody thought of.

Terms of scores, masks and outputs come from the tables below; each term draws its own numbers and tensors, so equal seeds are
equal variants. ``python -m pytest`` runs fixed seeds: what a longer search finds becomes a test of its own.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

import jitgen

CONTEXT = ("kv_h", "kv_len", "q_len")
Score = Callable[..., object]
Mask = Callable[..., object]


@dataclass
class Draw:
    """What terms are drawn for: a dense batch, or requests of at most ``kv_len`` keys whose rows are told by position alone."""

    seed: int
    num_q_heads: int
    kv_len: int
    q_len: int = 0  # rows of each sequence of a dense batch; 0: no term reads a tensor by row or by request
    batch: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.names: list[str] = []

    def normal(self, *shape: int) -> torch.Tensor:
        dtype = self.random.choice([torch.float32, torch.float16, torch.bfloat16])
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator).to(self.device)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=self.generator, dtype=torch.int32).to(self.device)

    def some(self, table: dict[str, Callable[[Draw], object]], count: int) -> list:
        names = [name for name in table if self.q_len or not name.startswith("dense")]
        chosen = self.random.sample(names, count)
        self.names += chosen
        return [table[name](self) for name in chosen]

    def variant(self, *, rows: bool = False) -> jitgen.Variant:
        """A variant of up to three terms of the score and two of the mask. ``rows``: it may rotate rows of q and k as well."""
        hooks: dict[str, object] = {}
        scores = self.some(SCORES, self.random.choice([0, 0, 1, 1, 2, 3]))
        masks = self.some(MASKS, self.random.choice([0, 1, 1, 1, 2]))
        if scores:
            hooks["score_mod"] = _in_turn(scores)
        if masks:
            join = self.random.choice([jitgen.and_masks, jitgen.and_masks, jitgen.or_masks])
            self.names.append(join.__name__)
            hooks["mask_mod"] = join(*masks)
        if self.random.random() < 0.25:
            sinks, share = self.normal(self.num_q_heads), self.random.choice([0.5, 2.0])
            hooks["sink"] = self.random.choice([sinks, 0.3, lambda b, h: sinks[h] * share])
            self.names.append("sink")
        if self.random.random() < 0.2:
            gates = self.uniform(self.num_q_heads)
            hooks["output_transform"] = lambda o, lse, b, h, q_idx: o * gates[h]
            self.names.append("gate")
        if rows and self.random.random() < 0.2:
            rope = jitgen.Rope(theta=1e4)
            hooks["q_transform"] = lambda q, b, h, q_idx: rope(q, q_idx)
            hooks["k_transform"] = lambda k, b, kv_h, kv_idx: rope(k, kv_idx)
            self.names.append("rope")
        return jitgen.Variant(**hooks)


def _in_turn(scores: list[Score]) -> Score:
    """Each on the result of the one before; context is asked for where one of them does."""
    asks = {name for term in scores for name in inspect.signature(term).parameters} & set(CONTEXT)

    def score_mod(score, b, h, q_idx, kv_idx, **context):
        for term in scores:
            own = {name: context[name] for name in context if name in inspect.signature(term).parameters}
            score = term(score, b, h, q_idx, kv_idx, **own)
        return score

    by_name = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in sorted(asks)]
    five = list(inspect.signature(score_mod).parameters.values())[:5]
    score_mod.__signature__ = inspect.Signature([*five, *by_name])  # type: ignore[attr-defined]
    return score_mod


# ---- terms of scores -----------------------------------------------------------------------------------------------------


def soft_cap(draw: Draw) -> Score:
    cap = draw.random.choice([5.0, 30.0])
    return lambda s, b, h, q_idx, kv_idx: cap * torch.tanh(s / cap)


def alibi(draw: Draw) -> Score:
    slopes = draw.uniform(draw.num_q_heads) * 0.1
    return lambda s, b, h, q_idx, kv_idx: s + slopes[h] * (kv_idx - q_idx)


def key_bias(draw: Draw) -> Score:
    bias = draw.normal(draw.kv_len + draw.random.choice([0, 8]))
    return lambda s, b, h, q_idx, kv_idx: s + bias[kv_idx]


def key_bias_of_heads(draw: Draw) -> Score:
    bias = draw.normal(draw.num_q_heads, draw.kv_len + 3)
    return lambda s, b, h, q_idx, kv_idx: s + bias[h, kv_idx]


def dense_bias(draw: Draw) -> Score:
    """Rows that are and rows that are not a whole number of 16 bytes apart."""
    width, before = draw.kv_len + draw.random.choice([0, 1, -draw.kv_len % 8]), draw.kv_len - draw.q_len
    bias = draw.normal(draw.num_q_heads, draw.q_len + 2, width)
    return lambda s, b, h, q_idx, kv_idx: s + bias[h, q_idx - before, kv_idx]


def table_of_distances(draw: Draw) -> Score:
    far = draw.random.choice([16, 64, 200])
    table = draw.normal(2 * far + 1, draw.num_q_heads)
    return lambda s, b, h, q_idx, kv_idx: s + table[torch.clamp(kv_idx - q_idx, -far, far) + far, h]


def every_few_keys(draw: Draw) -> Score:
    step = draw.random.choice([2, 3, 7])
    return lambda s, b, h, q_idx, kv_idx: torch.where(kv_idx % step == 0, s - 1.0, s)


def dense_temperature(draw: Draw) -> Score:
    """By request."""
    factor = draw.uniform(draw.batch) + 0.5
    return lambda s, b, h, q_idx, kv_idx: s * factor[b]


def swish(draw: Draw) -> Score:
    return lambda s, b, h, q_idx, kv_idx: s + 0.05 * s * torch.sigmoid(s)


def branches(draw: Draw) -> Score:
    near = draw.random.choice([10, 100])
    return lambda s, b, h, q_idx, kv_idx: s * 1.2 if abs(q_idx - kv_idx) < near and h % 2 == 0 else s


def row_terms(draw: Draw) -> Score:
    gain = draw.normal(draw.num_q_heads)
    return lambda s, b, h, q_idx, kv_idx: s * (1 + 0.1 * gain[h]) + 0.01 * q_idx


def log_distance(draw: Draw) -> Score:
    return lambda s, b, h, q_idx, kv_idx: s - torch.log1p(abs((q_idx - kv_idx).float()))


def bucketed(draw: Draw) -> Score:
    """A table of logarithmic buckets of the distance, as in T5."""
    table, most = draw.normal(8, draw.num_q_heads), draw.random.choice([32, 128])

    def score_mod(s, b, h, q_idx, kv_idx):
        distance = torch.clamp(q_idx - kv_idx, min=0)
        far = 4 + (torch.log(torch.clamp(distance, min=4) / 4) / math.log(most / 4) * 4).int()
        return s + table[torch.where(distance < 4, distance, torch.clamp(far, max=7)), h]

    return score_mod


def gathered_keys(draw: Draw) -> Score:
    """Through a tensor of numbers, of which some lie outside of what they index."""
    kind, bias = draw.integers(7, draw.kv_len + 1).long() - 1, draw.normal(5)
    return lambda s, b, h, q_idx, kv_idx: s + bias[kind[kv_idx]]


def dense_key_bias(draw: Draw) -> Score:
    """By request and key head."""
    bias = draw.normal(draw.batch, draw.num_q_heads, draw.kv_len)

    def score_mod(s, b, h, q_idx, kv_idx, *, kv_h):
        return s + bias[b, kv_h, kv_idx]

    return score_mod


def dense_bias_of_requests(draw: Draw) -> Score:
    before = draw.kv_len - draw.q_len
    bias = draw.normal(draw.batch, 1, draw.q_len, draw.kv_len + draw.random.choice([0, -draw.kv_len % 8]))
    return lambda s, b, h, q_idx, kv_idx: s + bias[b, 0, q_idx - before, kv_idx]


def share_of_length(draw: Draw) -> Score:
    def score_mod(s, b, h, q_idx, kv_idx, *, kv_len, q_len):
        return s * (1 + kv_idx / kv_len) + torch.minimum(torch.relu(s), torch.exp(-abs(s))) * (q_len % 3)

    return score_mod


SCORES: dict[str, Callable[[Draw], object]] = {
    f.__name__: f
    for f in (
        soft_cap, alibi, key_bias, key_bias_of_heads, dense_bias, table_of_distances, every_few_keys, dense_temperature, swish,
        branches, row_terms, log_distance, bucketed, gathered_keys, dense_key_bias, dense_bias_of_requests, share_of_length,
    )
}  # fmt: skip


# ---- terms of masks ------------------------------------------------------------------------------------------------------


def causal(draw: Draw) -> Mask:
    return lambda b, h, q_idx, kv_idx: kv_idx <= q_idx


def window(draw: Draw) -> Mask:
    left, right = draw.random.choice([1, 17, 128, 300]), draw.random.choice([0, 5, 100])
    return lambda b, h, q_idx, kv_idx: (q_idx - kv_idx < left) & (kv_idx - q_idx <= right)


def dense_documents(draw: Draw) -> Mask:
    cuts = draw.random.sample(range(draw.kv_len + 1), min(draw.random.choice([1, 4, 20]), draw.kv_len))
    numbers = torch.zeros(draw.kv_len + 1, dtype=torch.int32).index_fill_(0, torch.tensor(cuts), 1).cumsum(0).int()
    doc = jitgen.sorted(numbers.to(draw.device))
    return lambda b, h, q_idx, kv_idx: doc[q_idx] == doc[kv_idx]


def dense_kinds(draw: Draw) -> Mask:
    kind = draw.integers(3, draw.kv_len + 1)
    return lambda b, h, q_idx, kv_idx: kind[q_idx] == kind[kv_idx]


def dense_padding(draw: Draw) -> Mask:
    length = draw.integers(draw.kv_len + 2, draw.batch)
    return lambda b, h, q_idx, kv_idx: kv_idx < length[b]


def prefix(draw: Draw) -> Mask:
    length = draw.random.choice([1, 40, 200])
    return lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) | (kv_idx < length)


def strides(draw: Draw) -> Mask:
    step = draw.random.choice([2, 5])
    return lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % step == 0


def global_and_local(draw: Draw) -> Mask:
    near = draw.random.choice([4, 64])
    return lambda b, h, q_idx, kv_idx: ((kv_idx < 4) | (abs(q_idx - kv_idx) < near)) & (kv_idx <= q_idx)


def valid_keys(draw: Draw) -> Mask:
    valid = draw.uniform(draw.kv_len + 1) < 0.7
    return lambda b, h, q_idx, kv_idx: valid[kv_idx]


def chunks(draw: Draw) -> Mask:
    size = draw.random.choice([32, 100])
    return lambda b, h, q_idx, kv_idx: (q_idx // size == kv_idx // size) | ((h == 0) & (kv_idx <= q_idx))


def blocks(draw: Draw) -> Mask:
    """A table of blocks, whose first column is kept."""
    side = draw.random.choice([16, 64])
    count = draw.kv_len // side + 1
    kept = (draw.uniform(count, count) < 0.5) | (torch.arange(count, device=draw.device) == 0)
    return lambda b, h, q_idx, kv_idx: kept[q_idx // side, kv_idx // side]


def other_heads(draw: Draw) -> Mask:
    """Every second head looks back, the others look everywhere but at one key."""
    return lambda b, h, q_idx, kv_idx: kv_idx <= q_idx if h % 2 == 0 else kv_idx != 1


MASKS: dict[str, Callable[[Draw], object]] = {
    f.__name__: f
    for f in (
        causal, window, dense_documents, dense_kinds, dense_padding, prefix, strides, global_and_local, valid_keys, chunks,
        blocks, other_heads,
    )
}  # fmt: skip
