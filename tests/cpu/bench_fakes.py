"""Contenders and a clock for the tests of jitgen.bench: nothing is compiled, and time is what the test says."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from jitgen.bench.config import BenchConfig
from jitgen.bench.peers import Peer
from jitgen.bench.workloads import Cell

CELL = Cell(1, 2, 2, 48, 16, "float32", "causal")


class FakeTimer:
    """Runs each call and reads its milliseconds off the call itself; keeps the order of every round."""

    device = "cpu"

    def __init__(self):
        self.rounds = []

    def warm_up(self, call):
        call()
        return 1.0

    def adapt(self, call):
        return call

    def run_round(self, calls):
        self.rounds.append([getattr(call, "name", "") for call in calls])
        return [getattr(call, "ms", 1.0) for call in calls]

    def describe(self):
        return "a fake clock"


class FakeCall:
    """A call that gives an output and claims to take ``ms``."""

    def __init__(self, name, ms, output):
        self.name, self.ms, self.output = name, ms, output
        self.count = 0

    def __call__(self):
        self.count += 1
        return self.output().clone()


def right_output(problem):
    """Attention of a problem without a score_mod, by torch."""
    return F.scaled_dot_product_attention(problem.q, problem.k, problem.v, is_causal=problem.hooks.is_causal)


def peer(name, ms=1.0, change=None, fail=None):
    """A contender that is right, or whose output ``change`` alters, or that raises ``fail`` when prepared."""

    def prepare(problem):
        if fail is not None:
            raise fail
        output = right_output(problem)
        return FakeCall(name, ms, lambda: output if change is None else change(output))

    return Peer(name, prepare, ("cpu",))


def config(**options):
    """A configuration that prints into a list, ``config.say.__self__``."""
    return BenchConfig("cpu", **{"rounds": 3, "say": [].append, **options})


def with_row(output, row, value):
    """The output with one row of the last head replaced."""
    changed = output.clone()
    changed[0, -1, row] = value
    return changed


def zeros(output):
    return torch.zeros_like(output)
