"""Suite jit: what it asks of fresh processes, and what those processes do."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from bench_fakes import config

import jitgen
from jitgen.bench import fresh, jit, probe, spellings
from jitgen.bench.fresh import Fresh, ProbeFailed
from jitgen.bench.jit import JitSuite

TOTALS = {"cold": 1.5, "hit": 0.012}


class FakeProbe:
    """Answers as a process would; a first call is cold when its store is new."""

    def __init__(self):
        self.asked, self.stores = [], set()

    def __call__(self, task, arguments, store):
        self.asked.append(task)
        if task == "hot_calls":
            return {"plain": {"call": 9.0, "empty": 0.1, "overhead": 7.5}, "torch SDPA": {"call": 4.0}}
        if task == "count_modules":
            return {"variants": 10, "shapes": 10, "calls": 100, "distinct": 5, "modules": 5, "seconds": 7.0}
        total = TOTALS["hit" if store in self.stores else "cold"]
        self.stores.add(store)
        if task == "first_step":
            return dict.fromkeys(jit.STEP_PARTS, total)
        found = {"total": total, "module_bytes": 43000}
        return {**found, "split": dict.fromkeys(jit.STEP_NAMES, 0.25)} if arguments["split"] else found


def measured(fake, **options):
    suite = JitSuite(config(**options), fake)
    for label in jit.labels(suite.config):
        suite.measure(label)
    return suite


def test_cold_calls_have_empty_stores_and_hits_reuse_one():
    suite = measured(FakeProbe(), peers=("none",), rounds=3)
    found = suite.first["first call jitgen causal"]
    assert found["cold_s"] == [1.5] * 3
    assert found["hit_s"] == [0.012] * 3
    assert [[step["plan"] for step in suite.steps[kind]] for kind in ("cold", "disk hit")] == [[1.5] * 3, [0.012] * 3]


def test_tables_show_first_calls_and_steps_hot_calls_and_modules():
    first, steps, hot, modules = measured(FakeProbe(), quick=True).report().tables
    assert steps.rows == (("cold", "6.00", *["1500.0"] * 4), ("disk hit", "0.05", *["12.0"] * 4))
    assert first.rows[0] == ("jitgen causal", "1.50", "12.0", *["250.0"] * 6, "43")
    assert hot.rows == (("jitgen", "plain", "9.00", "0.10", "7.50"), ("torch", "torch SDPA", "4.00", "-", "-"))
    assert modules.rows == (("jitgen", "10", "10", "100", "5", "5", "7.0"),)


def test_failed_process_is_a_fault_of_ours_and_a_note_of_flex():
    def fail(task, arguments, store):
        raise ProbeFailed("no compiler")

    report = measured(fail).report()
    assert report.tables == ()
    assert "hot call jitgen: no compiler" in report.faults
    assert all("flex" in note for note in report.notes)
    assert len(report.notes) == 1


def test_each_family_is_measured():
    labels = jit.labels(jit.BenchConfig("cuda", quick=True, families=("sm80", "sm90")))
    assert [label for label in labels if label.startswith("hot")] == ["hot call jitgen-sm80", "hot call jitgen-sm90"]
    assert "first call jitgen-sm90 causal" in labels


# ---- fresh processes ----


@pytest.fixture(scope="module")
def processes():
    with Fresh("jitgen.bench.probe") as started:
        yield started


def test_fresh_process_that_fails_says_its_last_line(processes, tmp_path):
    with pytest.raises(ProbeFailed, match=r"^KeyError: 'nothing'$"):
        processes("nothing", {}, tmp_path)


def test_first_call_in_a_fresh_process_divides_into_its_steps(processes, tmp_path):
    arguments = {"device": "cpu", "variant": "causal", "contender": "jitgen", "family": None}
    cold = processes("first_call", {**arguments, "split": True}, tmp_path)
    assert cold["split"].keys() == set(jit.STEP_NAMES)
    assert sum(cold["split"].values()) == pytest.approx(cold["total"])
    assert all(cold["split"][step] > 0 for step in ("import", "trace", "render", "compile", "load"))
    hit = processes("first_call", {**arguments, "split": True}, tmp_path)
    assert hit["split"]["compile"] == hit["split"]["render"] == 0.0
    assert hit["module_bytes"] == cold["module_bytes"] > 1000


def test_first_step_of_a_serving_loop_leaves_its_kernels_in_the_store(processes, tmp_path):
    cold, hit = (processes("first_step", {"device": "cpu"}, tmp_path) for _ in range(2))
    assert cold.keys() == hit.keys() == set(jit.STEP_PARTS)
    assert len(list(tmp_path.glob("jitgen/*/module.so"))) == 3  # attention, append, sample


SERVE = """
import os, signal
from jitgen.bench.fresh import serve
serve({"mark": lambda: {"mark": os.environ["JITGEN_MARK"], "print": print("no answer")},
       "kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "late": lambda: signal.raise_signal(signal.SIGALRM)})
"""


def test_each_task_has_its_own_process_and_environment():
    asked = [["mark", {}, {"JITGEN_MARK": "1"}], ["kill", {}, {}], ["late", {}, {}], ["mark", {}, {"JITGEN_MARK": "2"}]]
    lines = "".join(f"{json.dumps(request)}\n" for request in asked)
    answers = subprocess.run([sys.executable, "-c", SERVE], input=lines, capture_output=True, text=True, check=True).stdout
    assert [json.loads(line) for line in answers.splitlines()] == [
        [{"mark": "1", "print": None}, ""],
        [None, "ended by SIGKILL"],
        [None, f"no answer after {fresh.LIMIT_S} s"],
        [{"mark": "2", "print": None}, ""],
    ]


# ---- what they do ----


def test_call_without_its_kernel_runs_all_but_the_kernel(monkeypatch):
    monkeypatch.setattr(probe, "HOT_CALLS", 2)
    q, k, v = (torch.randn(1, 1, 1, 64) for _ in range(3))
    want = jitgen.attention(q, k, v)
    out = torch.full_like(want, 7.0)
    assert probe.without_kernel(lambda: jitgen.attention(q, k, v, out=out)) > 0
    assert bool((out == 7.0).all())  # nobody wrote it
    assert torch.equal(jitgen.attention(q, k, v, out=out), want)  # and the kernel is back


def test_microseconds_of_a_call_are_those_of_the_host(monkeypatch):
    monkeypatch.setattr(probe, "HOT_CALLS", 2)
    monkeypatch.setattr(probe, "HOT_BATCHES", 3)
    assert probe.microseconds(lambda: time.sleep(0.002), "cpu") >= 2000


@pytest.mark.parametrize("pair", spellings.SPELLINGS, ids=lambda pair: pair[0].__name__)
def test_two_spellings_are_one_program_whatever_they_capture(pair):
    programs = {jitgen.Variant(**make(number, "cpu")).trace().program.id for make in pair for number in (0, 3)}
    assert len(programs) == 1


def test_variants_are_as_many_as_asked_and_shapes_differ():
    assert [len(group) for group in spellings.variants("cpu", 50)] == [10] * 5
    shapes = spellings.shapes(50)
    assert len(set(shapes)) == 50
    assert all(q_heads % kv_heads == 0 and q_len <= kv_len for _, q_heads, kv_heads, q_len, kv_len in shapes)
