"""Kernels whose generated source is kept under review: few, and between them they take every branch of every template."""

from __future__ import annotations

from collections.abc import Callable

import torch

import jitgen
from jitgen.families import cuda_spec
from jitgen.spec import KernelSpec
from jitgen.target import cpu_target, cuda_target


class Sigmoid(jitgen.OnlineNorm):
    """Weights sigmoid(score), no denominator and no logsumexp."""

    state = {}  # noqa: RUF012
    order = "any"

    def update(self, s, st):
        return torch.sigmoid(s), 1.0, st

    def finalize(self, o, st):
        return o


class StickBreaking(jitgen.OnlineNorm):
    """Each key, from the last to the first, takes its share of what the later ones left over."""

    state = {"carry": 0.0}  # noqa: RUF012
    order = "reverse"

    def update(self, s, st):
        left = -torch.nn.functional.softplus(s)
        after = jitgen.row_cumsum(left) - left
        weight = torch.exp(torch.nn.functional.logsigmoid(s) + st["carry"] + after)
        return weight, 1.0, {"carry": st["carry"] + jitgen.row_sum(left)}

    def finalize(self, o, st):
        return o

    def lse(self, st):
        return st["carry"]


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def soft_cap_window() -> jitgen.Variant:
    cap, window = 50.0, 256

    def score(s, b, h, q_idx, kv_idx):
        return cap * torch.tanh(s / cap)

    def mask(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < window)

    return jitgen.Variant(score_mod=score, mask_mod=mask)


def every_hook() -> jitgen.Variant:
    doc, slopes, sinks, gate = torch.zeros(4096, dtype=torch.int32), torch.zeros(8), torch.zeros(8), torch.zeros(8)

    def score(s, b, h, q_idx, kv_idx):
        return s + slopes[h] * (kv_idx - q_idx)

    def mask(b, h, q_idx, kv_idx):
        return (doc[q_idx] == doc[kv_idx]) & (kv_idx <= q_idx)

    return jitgen.Variant(
        score_mod=score,
        mask_mod=mask,
        sink=sinks,
        output_transform=lambda o, lse, b, h, q_idx: o * torch.sigmoid(gate[h]),
        lse_transform=lambda lse, b, h, q_idx: lse * 1.4426950408889634,
    )


def plain() -> jitgen.Variant:
    return jitgen.Variant()


def sigmoid() -> jitgen.Variant:
    return jitgen.Variant(softmax=Sigmoid)


def stick_breaking() -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal, softmax=StickBreaking)


CASES: dict[str, tuple[Callable[[], jitgen.Variant], str, str, int]] = {
    "plain__cpu__float32": (plain, "cpu", "float32", 64),
    "soft_cap_window__cpu__bfloat16": (soft_cap_window, "cpu", "bfloat16", 128),
    "every_hook__cpu__float16": (every_hook, "cpu", "float16", 64),
    "sigmoid__cpu__float32": (sigmoid, "cpu", "float32", 64),
    "plain__sm80__bfloat16": (plain, "sm80", "bfloat16", 128),
    "every_hook__sm80__bfloat16": (every_hook, "sm80", "bfloat16", 64),
    "stick_breaking__sm80__float16": (stick_breaking, "sm80", "float16", 128),
    "stick_breaking__cpu__float32": (stick_breaking, "cpu", "float32", 64),
}


def case_spec(name: str) -> KernelSpec:
    """The kernel of a case; the target does not show in its source."""
    make, family, dtype, head_dim = CASES[name]
    program = make().trace().program
    if family != "cpu":
        return cuda_spec(program, dtype, (head_dim, head_dim), family, cuda_target("8.0"))
    from jitgen.families import cpu_tiles

    return KernelSpec("cpu", program, dtype, head_dim, head_dim, cpu_tiles(head_dim, head_dim), cpu_target("portable"))
