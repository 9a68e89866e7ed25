"""How contenders are timed: in turns, in shuffled order, until their budget is spent."""

from __future__ import annotations

import time

import pytest
from bench_fakes import FakeCall, FakeTimer

from jitgen.bench import method
from jitgen.bench.method import Budget, Samples, TimeLimit, interleave, time_limit


def calls(**ms):
    return {name: FakeCall(name, value, None) for name, value in ms.items()}


def test_every_round_times_each_contender_once():
    timer = FakeTimer()
    interleave(calls(a=1.0, b=2.0, c=3.0), timer, Budget(8, 8, 1e9))
    assert len(timer.rounds) == 8
    assert all(sorted(names) == ["a", "b", "c"] for names in timer.rounds)


def test_order_is_shuffled_anew_in_each_round():
    timer = FakeTimer()
    interleave(calls(a=1.0, b=2.0, c=3.0, d=4.0), timer, Budget(12, 12, 1e9), seed=1)
    assert len({tuple(names) for names in timer.rounds}) > 4
    assert {names[0] for names in timer.rounds} == {"a", "b", "c", "d"}


def test_order_repeats_with_the_seed():
    rounds = []
    for _ in range(2):
        timer = FakeTimer()
        interleave(calls(a=1.0, b=2.0, c=3.0), timer, Budget(6, 6, 1e9), seed=5)
        rounds.append(timer.rounds)
    assert rounds[0] == rounds[1]


def test_slow_contender_leaves_after_its_seconds_and_not_before_its_least_samples():
    found = interleave(calls(slow=600.0, fast=1.0), FakeTimer(), Budget(3, 20, 1.0))
    assert len(found["slow"].values) == 3
    assert len(found["fast"].values) == 20


def test_failing_contender_is_reported_and_the_others_go_on():
    class Breaks(FakeTimer):
        def run_round(self, calls):
            return [ValueError("lost") if call.name == "bad" else call.ms for call in calls]

    found = interleave(calls(bad=1.0, good=2.0), Breaks(), Budget(4, 4, 1e9))
    assert isinstance(found["bad"], ValueError)
    assert found["good"].values == (2.0,) * 4


@pytest.mark.parametrize(
    ("values", "median", "quartiles"),
    [((3.0,), 3.0, (3.0, 3.0)), ((4.0, 1.0, 3.0, 2.0, 5.0), 3.0, (2.0, 4.0))],
    ids=["one", "five"],
)
def test_samples_give_median_and_quartiles(values, median, quartiles):
    assert Samples(values).median == median
    assert Samples(values).quartiles == quartiles


def test_time_limit_interrupts_what_catches_exceptions():
    start = time.monotonic()
    with pytest.raises(TimeLimit, match=r"no output after 0\.1 s"), time_limit(0.1):
        while time.monotonic() - start < 20:
            try:
                time.sleep(0.01)
            except Exception:
                pass
    assert time.monotonic() - start < 10


def test_time_limit_is_off_after_its_block():
    with time_limit(0.05):
        pass
    time.sleep(0.1)  # an alarm left on would end the test here


def test_cpu_timer_turns_an_error_of_a_call_into_its_result():
    def broken():
        raise RuntimeError("no")

    times = method.CpuTimer().run_round([broken, lambda: None])
    assert isinstance(times[0], RuntimeError)
    assert times[1] >= 0.0


def test_cuda_is_refused_with_a_reason_where_there_is_none(monkeypatch):
    monkeypatch.setattr(method.torch.cuda, "is_available", lambda: False)
    assert "not usable" in method.device_problem("cuda")
    assert "--device cpu" in method.device_problem("cuda")
    assert method.device_problem("cpu") == ""
