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
