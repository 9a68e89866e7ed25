"""Replacements of softmax for tests on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import jitgen


class Sigmoid(jitgen.OnlineNorm):
    """Weights that are a function of the logit alone: no denominator and no logsumexp."""

    def update(self, s, st):
        return torch.sigmoid(s), 1.0, st


class StickBreaking(jitgen.OnlineNorm):
    """From the last key to the first, each takes its share of what the later ones left over."""

    state = {"carry": 0.0}  # noqa: RUF012
    order = "reverse"

    def update(self, s, st):
        left = -F.softplus(s)
        after = jitgen.row_cumsum(left) - left
        weight = torch.exp(F.logsigmoid(s) + st["carry"] + after)
        return weight, 1.0, {"carry": st["carry"] + jitgen.row_sum(left)}

    def lse(self, st):
        return st["carry"]


# ---- norms whose parts can be joined ----


class MergedSigmoid(Sigmoid):
    """Parts are added."""

    def merge(self, a, b):
        return {}, 1.0, 1.0


class MergedStickBreaking(StickBreaking):
    """The keys of b are visited after those of a: they get a share of what those left over."""

    def merge(self, a, b):
        return {"carry": a["carry"] + b["carry"]}, 1.0, torch.exp(a["carry"])


class MergedSoftmax(jitgen.OnlineNorm):
    """Softmax itself, written as a replacement."""

    state = {"largest": -float("inf"), "total": 0.0}  # noqa: RUF012

    def update(self, s, st):
        largest = torch.maximum(st["largest"], jitgen.row_max(s))
        base = self.base(largest)
        weight, factor = torch.exp(s - base), torch.exp(st["largest"] - base)
        return weight, factor, {"largest": largest, "total": st["total"] * factor + jitgen.row_sum(weight)}

    def finalize(self, o, st):
        return o / torch.where(st["total"] == 0, 1.0, st["total"])

    def lse(self, st):
        return torch.log(st["total"]) + self.base(st["largest"])

    def merge(self, a, b):
        largest = torch.maximum(a["largest"], b["largest"])
        of_a, of_b = (torch.exp(part["largest"] - self.base(largest)) for part in (a, b))
        return {"largest": largest, "total": a["total"] * of_a + b["total"] * of_b}, of_a, of_b

    def base(self, largest):
        """What exponents are relative to: that of a row without keys would make NaN."""
        return torch.where(largest == -float("inf"), 0.0, largest)


class Power(jitgen.OnlineNorm):
    """relu(s) to a power, divided by the sum of the weights and a little more."""

    state = {"total": 1e-3}  # noqa: RUF012

    def __init__(self, power: float = 1.5) -> None:
        self.power = power

    def update(self, s, st):
        weight = F.relu(s) ** self.power
        return weight, 1.0, {"total": st["total"] + jitgen.row_sum(weight)}

    def finalize(self, o, st):
        return o / st["total"]

    def merge(self, a, b):
        return {"total": a["total"] + b["total"] - 1e-3}, 1.0, 1.0  # both began with the little more


class Forgetting(jitgen.OnlineNorm):
    """From the first key to the last, what came before loses 2 % of itself with each key that weighs 1: O is rescaled."""

    state = {"seen": 0.0}  # noqa: RUF012
    order = "forward"
    rate = 0.02

    def update(self, s, st):
        own = torch.sigmoid(s)
        behind = jitgen.row_sum(own) - jitgen.row_cumsum(own)
        factor = torch.exp(-self.rate * jitgen.row_sum(own))
        return own * torch.exp(-self.rate * behind), factor, {"seen": st["seen"] + jitgen.row_sum(own)}

    def lse(self, st):
        return st["seen"]

    def merge(self, a, b):
        return {"seen": a["seen"] + b["seen"]}, torch.exp(-self.rate * b["seen"]), 1.0


MERGED = {
    "sigmoid": MergedSigmoid,
    "stick_breaking": MergedStickBreaking,
    "softmax": MergedSoftmax,
    "power": Power,
    "forgetting": Forgetting,
}
