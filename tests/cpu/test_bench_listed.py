"""Suites whose cells bring their own contenders: the cells, and that wrong or missing contenders are named, never timed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from bench_fakes import FakeTimer

from jitgen.bench import cascade, fp8, mla, prefill, short, sparse
from jitgen.bench.config import BenchConfig
from jitgen.bench.contest import time_right
from jitgen.bench.listed import Cell, run_suite
from jitgen.bench.method import TimeLimit

HEADS = (4, 2, 16)


class Config(BenchConfig):
    def timer(self):
        return FakeTimer()


def config(**options):
    return Config("cpu", **{"rounds": 2, "say": [].append, **options})


def tiny_cascade(device, seed):
    return cascade.SharedPrefix(device, 3, 64, 32, "float32", seed, HEADS)


def tiny_latent(device, seed, q_len=1):
    return mla.Latent(device, 3, 100, 4, q_len, "float32", seed)


def tiny_prompts(device, seed, page_size=0, window=0, q_len=40, lengths="const"):
    return prefill.Prompts(device, 3, q_len, 40, page_size, window, lengths, "float32", seed, HEADS)


def tiny_blocks(device, seed):
    return sparse.Blocks(device, 256, 0.4, "float32", seed, 64, HEADS)


@pytest.mark.parametrize("suite", [cascade, fp8, mla, prefill, short, sparse], ids=lambda suite: suite.__name__.split(".")[2])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True])
def test_labels_are_distinct(suite, device, quick):
    found = suite.labels(BenchConfig(device, quick=quick))
    assert found and len(set(found)) == len(found)


TINY = {
    "cascade": tiny_cascade, "sparse": tiny_blocks, "mla": tiny_latent, "mla-q3": partial(tiny_latent, q_len=3),
    "ragged": tiny_prompts, "ragged-window": partial(tiny_prompts, window=7), "pages": partial(tiny_prompts, page_size=16),
    "chunk-uniform": partial(tiny_prompts, page_size=16, q_len=9, lengths="uniform"),
}  # fmt: skip


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_ours_are_right_and_timed(make):
    (report,) = run_suite("tiny", [Cell("cell", make)], config(), "note")
    results = {r["contender"]: r for r in report.data["results"]}
    assert not report.faults and "jitgen" in results
    assert all(r["ms"]["samples"] == 2 and r["error"] < 1e-5 and r["figure"] for r in results.values())
    assert "tiny: speed of ours over each" in report.to_text()


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_eight_bits_are_compared_with_the_same_numbers_in_sixteen(is_causal):
    make = Cell("cell", partial(fp8.EightBits, 64, 2, 2, 96, is_causal))
    (report,) = run_suite("tiny", [make], config(), "note")
    results = {r["contender"]: r for r in report.data["results"]}
    assert not report.faults and set(results) == {"jitgen", fp8.SIXTEEN, fp8.UNROUNDED}
    assert results[fp8.SIXTEEN]["error"] < 1e-2 and results[fp8.UNROUNDED]["error"] < 1e-2 and results["jitgen"]["error"] < 6e-2
    ratio = results[fp8.SIXTEEN]["ms"]["median"] / results["jitgen"]["ms"]["median"]
    assert results["jitgen"]["figure"].endswith(f"{ratio:.2f} of bf16")


@pytest.mark.parametrize("q_len", [1, 3])
def test_few_rows_over_many_keys(q_len):
    make = Cell("cell", partial(short.Step, 64, 4, 2, 2, q_len, 200))
    (report,) = run_suite("tiny", [make], config(peers=("sdpa",)), "note")
    results = {r["contender"]: r for r in report.data["results"]}
    assert not report.faults and set(results) == {"jitgen", "sdpa"}
    assert all(r["error"] < 1e-2 and r["figure"].endswith(" GB/s") for r in results.values())


def test_dense_attention_takes_turns_with_blocks():
    (report,) = run_suite("tiny", [Cell("cell", tiny_blocks)], config(), "note")
    figures = {r["contender"]: r["figure"] for r in report.data["results"]}
    ms = {r["contender"]: r["ms"]["median"] for r in report.data["results"]}
    share = tiny_blocks("cpu", 0).share
    assert sparse.DENSE in figures and "of dense" not in figures[sparse.DENSE]
    assert figures["jitgen"].endswith(f"{share * ms[sparse.DENSE] / ms['jitgen']:.1%} of dense per block")


def test_wrong_and_missing_contenders_are_named_and_not_timed():
    def missing():
        raise ImportError("no such package")

    class Problem(cascade.SharedPrefix):
        def contenders(self):
            good = super().contenders()
            return {"bad": lambda: lambda: torch.zeros_like(self.q), "gone": missing, "jitgen": good["jitgen"]}

    (report,) = run_suite("tiny", [Cell("cell", lambda d, s: Problem(d, 3, 64, 32, "float32", s, HEADS))], config(), "note")
    results = {r["contender"]: r for r in report.data["results"]}
    assert results["bad"]["status"] == "wrong" and results["bad"]["ms"] is None and "gone" not in results
    assert any("gone: not installed" in note for note in report.notes) and not report.faults


class Unwritten:
    """Two contenders, the second of which writes nothing to the output that it allocates."""

    dtype, rows = "float32", torch.arange(3)

    def expected(self, contender):
        return torch.ones(3, 2, 4, dtype=torch.float64)

    def contenders(self):
        return {"peer": lambda: lambda: torch.ones(3, 2, 4), "jitgen": lambda: lambda: torch.empty(3, 2, 4)}

    def figure(self, name, ms, of):
        return ""


def test_an_output_that_nobody_writes_is_wrong_whatever_was_in_its_memory(monkeypatch):
    """The allocator, here one that gives out the memory that was freed last, hands the second what the first has written."""
    memory, full = torch.zeros(3, 2, 4), torch.full
    monkeypatch.setattr(
        torch, "ones", lambda *shape, **options: memory.fill_(1.0) if not options else full(shape, 1.0, **options)
    )
    monkeypatch.setattr(torch, "full", lambda shape, value, **options: memory.fill_(value))
    monkeypatch.setattr(torch, "empty", lambda *shape: memory)
    (report,) = run_suite("tiny", [Cell("cell", lambda device, seed: Unwritten())], config(), "note")
    assert report.faults == ("jitgen, cell: wrong: a row is inf of its norm off float64",)


def test_a_cell_that_cannot_be_made_loses_no_other():
    def fail(device, seed):
        raise torch.OutOfMemoryError("CUDA out of memory")

    (report,) = run_suite("tiny", [Cell("first", tiny_cascade), Cell("second", fail)], config(), "note")
    assert report.faults == ("jitgen, second: failed: the cell was given up: OutOfMemoryError: CUDA out of memory",)
    assert any(r["cell"] == "first" and r["ms"] for r in report.data["results"])


def test_a_wrong_output_of_ours_is_a_fault():
    class Problem(sparse.Blocks):
        def contenders(self):
            return {"jitgen": lambda: lambda: torch.zeros_like(self.q)}

    (report,) = run_suite("tiny", [Cell("cell", lambda d, s: Problem(d, 256, 0.4, "float32", s, 64, HEADS))], config(), "note")
    assert report.faults and report.faults[0].startswith("jitgen, cell: wrong: a row is")


def test_figures_of_latent_attention_count_rows_once_and_visible_pairs():
    problem = mla.Latent("cpu", 2, 100, 4, 3, "bfloat16", 0)
    num_bytes, pairs = 2 * 100 * 576 * 2, 2 * (100 + 99 + 98)
    assert problem.figure("jitgen", 1e-6, {}) == f"{num_bytes} GB/s, {2 * pairs * 4 * (576 + 512) / 1e3:.0f} TFLOP/s"


def test_wrong_and_missing_contenders_of_latent_attention_are_named_and_not_timed():
    def missing():
        raise ImportError("no such package")

    class Problem(mla.Latent):
        def contenders(self):
            right = super().contenders()
            late = {"late": lambda: lambda: right["sdpa"]()().roll(1, 0)}  # the rows of other requests
            return {**late, "gone": missing, **right}

    (report,) = run_suite("tiny", [Cell("cell", lambda d, s: Problem(d, 3, 100, 4, 2, "float32", s))], config(), "note")
    results = {r["contender"]: r for r in report.data["results"]}
    assert results["late"]["status"] == "wrong" and results["late"]["ms"] is None and "gone" not in results
    assert results["sdpa"]["ms"] and results["jitgen"]["ms"] and not report.faults
    assert any("gone: not installed" in note for note in report.notes)


def contest(contenders, timer=FakeTimer):
    """Results of one cell with these contenders, made of ours, and the report."""

    class Problem(cascade.SharedPrefix):
        def contenders(self):
            return contenders(self, super().contenders()["jitgen"])

    class TimerConfig(Config):
        def timer(self):
            return timer()

    cell = Cell("cell", lambda d, s: Problem(d, 3, 64, 32, "float32", s, HEADS))
    (report,) = run_suite("tiny", [cell], TimerConfig("cpu", rounds=2, say=[].append), "note")
    return {r["contender"]: r for r in report.data["results"]}, report


def test_a_contender_that_takes_too_long_stops_nobody_else():
    def late():
        raise TimeLimit("no output after 3 s")

    results, report = contest(lambda problem, ours: {"late": late, "jitgen": ours})
    assert results["late"]["status"] == "slow" and results["late"]["reason"] == "no output after 3 s"
    assert results["jitgen"]["ms"] and not report.faults


def test_a_missing_import_of_ours_is_a_fault():
    def missing():
        raise ImportError("no such package")

    _, report = contest(lambda problem, ours: {"jitgen": missing})
    assert report.faults == ("jitgen, cell: failed: ImportError: no such package",)


def test_what_is_timed_is_checked_where_it_is_not_what_was_called():
    class Graphs(FakeTimer):
        def adapt(self, call):
            return lambda: torch.zeros_like(call())

    class GraphConfig(BenchConfig):
        def timer(self):
            return Graphs()

    results, report = contest(lambda problem, ours: {"jitgen": ours}, Graphs)
    assert results["jitgen"]["status"] == "wrong" and results["jitgen"]["ms"] is None and len(report.faults) == 1
    found, absent = time_right(
        {"one": lambda: lambda: torch.ones(3)}, lambda name, out: "" if out.all() else "zeros", GraphConfig("cpu", rounds=2)
    )
    assert not found and absent == {"one": "zeros"}
