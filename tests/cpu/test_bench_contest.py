"""A contest: only right outputs are timed, whatever fails is listed with its reason and stops nobody else."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from bench_fakes import CELL, FakeTimer, config, peer, with_row, zeros

from jitgen.bench import check
from jitgen.bench.config import BenchConfig
from jitgen.bench.contest import Contest, one_line
from jitgen.bench.peers import FLEX_ELEMENTS, Peer, Unsupported, refuse_large_captures
from jitgen.bench.workloads import Hooks, ProblemSet


def run(*peers, cells=(CELL,), timer=None, **options):
    timer = timer or FakeTimer()
    return Contest(config(**options), peers, timer).run(cells), timer


def test_right_contenders_are_timed_in_the_order_given():
    results, _ = run(peer("jitgen", ms=2.0), peer("other", ms=3.0))
    assert [(result.contender, result.ms, result.status) for result in results] == [
        ("jitgen", 2.0, ""),
        ("other", 3.0, ""),
    ]


@pytest.mark.parametrize(
    "change",
    [zeros, lambda out: out * 1.01, lambda out: with_row(out, 0, torch.nan), lambda out: out[:, :, :-1]],
    ids=["zeros", "one percent off", "a NaN", "shape"],
)
def test_wrong_output_is_refused_and_not_timed(change):
    results, timer = run(peer("right"), peer("jitgen", change=change))
    wrong = results[1]
    assert (wrong.status, wrong.samples) == ("wrong", None)
    assert wrong.reason.startswith("wrong output: ")
    assert wrong.is_fault
    assert all(names == ["right"] for names in timer.rounds)


def test_wrong_row_outside_the_sample_is_found_by_comparing_with_a_contender_that_passed(monkeypatch):
    monkeypatch.setattr(check, "sample_rows", lambda length, device: torch.tensor([0, 1]))
    results, _ = run(peer("right"), peer("jitgen", change=lambda out: with_row(out, 20, 0.0)))
    assert [result.status for result in results] == ["", "wrong"]
    assert "off right" in results[1].reason


def test_ours_is_compared_with_a_peer_even_when_listed_first(monkeypatch):
    monkeypatch.setattr(check, "sample_rows", lambda length, device: torch.tensor([0, 1]))
    results, _ = run(peer("jitgen", change=lambda out: with_row(out, 20, 0.0)), peer("right"))
    assert {result.contender: result.status for result in results} == {"jitgen": "wrong", "right": ""}


@pytest.mark.parametrize(
    ("fail", "status", "reason"),
    [
        (Unsupported("no such mask"), "unsupported", "no such mask"),
        (RuntimeError("out of luck\nsecond line"), "failed", "RuntimeError: out of luck"),
    ],
    ids=["unsupported", "failed"],
)
def test_contender_that_cannot_is_listed_with_its_reason(fail, status, reason):
    results, _ = run(peer("bad", fail=fail), peer("good"))
    assert (results[0].status, results[0].reason, results[0].samples) == (status, reason, None)
    assert results[1].samples is not None


def test_peer_that_is_not_installed_is_remembered_once_and_tried_once():
    tried = []

    def prepare(problem):
        tried.append(problem.cell)
        raise ModuleNotFoundError("No module named 'fast_library'")

    contest = Contest(config(), [Peer("fast", prepare, ("cpu",)), peer("good")], FakeTimer())
    results = contest.run([CELL, dataclasses.replace(CELL, variant="full"), dataclasses.replace(CELL, length=32)])
    assert len(tried) == 1
    assert contest.absent == {"fast": "ModuleNotFoundError: No module named 'fast_library'"}
    assert {result.contender for result in results} == {"good"}


def test_contender_without_an_output_in_time_is_given_up():
    class Hurried(BenchConfig):
        def first_call_limit(self):
            return 1.0

    def prepare(problem):
        time.sleep(10)

    hurried = Hurried("cpu", rounds=1, say=[].append)
    results = Contest(hurried, [Peer("slow", prepare, ("cpu",)), peer("good")], FakeTimer()).run([CELL])
    assert (results[0].status, results[0].reason) == ("slow", "no output after 1 s")
    assert results[1].samples is not None


def test_output_of_the_adapted_call_is_checked_too():
    class Replays(FakeTimer):
        def adapt(self, call):
            return lambda: torch.zeros_like(call())

    results, timer = run(peer("jitgen"), timer=Replays())
    assert results[0].status == "wrong"
    assert results[0].reason.startswith("as a graph: ")
    assert timer.rounds == []


def test_error_that_no_contender_owns_leaves_results_of_every_cell():
    class Dies(FakeTimer):
        def run_round(self, calls):
            raise RuntimeError("device lost")

    results, _ = run(peer("a"), peer("b"), timer=Dies())
    assert [result.reason for result in results] == ["while timed: RuntimeError: device lost"] * 2


def test_flex_is_left_out_where_a_captured_tensor_is_too_large_for_its_offsets():
    def hooks(elements):
        bias = torch.empty(elements, device="meta")
        return Hooks(score_mod=lambda score, b, h, q_idx, kv_idx: score + bias[q_idx])

    refuse_large_captures(hooks(FLEX_ELEMENTS))
    with pytest.raises(Unsupported, match="2147483649 elements"):
        refuse_large_captures(hooks(FLEX_ELEMENTS + 1))


def test_problem_that_cannot_be_made_fails_its_cell_only(monkeypatch):
    make = ProblemSet.problem

    def scarce(self, cell):
        if cell.length == 64:
            raise MemoryError("too large")
        return make(self, cell)

    monkeypatch.setattr(ProblemSet, "problem", scarce)
    results, _ = run(peer("a"), cells=[dataclasses.replace(CELL, length=64), CELL])
    assert [result.status for result in results] == ["failed", ""]
    assert "too large" in results[0].reason


def test_cells_of_one_shape_take_turns_with_each_other():
    full = dataclasses.replace(CELL, variant="full")
    _, timer = run(peer("a"), peer("b"), cells=[CELL, full])
    assert [len(names) for names in timer.rounds] == [4, 4, 4]


def test_figures_are_said_as_each_group_ends():
    chosen = config()
    Contest(chosen, [peer("jitgen", ms=2.0), peer("other", ms=3.0)], FakeTimer()).run([CELL])
    said = "\n".join(chosen.say.__self__)
    assert "fp32 hd16 2/2 1x48 causal" in said
    assert "jitgen 1.500x" in said


def test_one_line_keeps_the_first_line_and_a_limit():
    assert one_line(ValueError("first\nsecond")) == "ValueError: first"
    assert len(one_line(ValueError("x" * 1000))) == 160
