"""Suite decode: its batches, and that wrong or missing contenders are named and never timed."""

from __future__ import annotations

import pytest
import torch
from bench_fakes import FakeTimer

from jitgen.bench import check, decode, decode_peers
from jitgen.bench.config import BenchConfig
from jitgen.bench.decode_peers import DecodeCalls, DecodeCell, expected, key_counts, make_problem
from jitgen.bench.method import TimeLimit

TINY = DecodeCell(3, 40, "zipf", 4, 2, 16, 16, "float32")


class Config(BenchConfig):
    def timer(self):
        return FakeTimer()


def config(**options):
    return Config("cpu", **{"rounds": 2, "say": [].append, **options})


@pytest.fixture
def one_cell(monkeypatch):
    monkeypatch.setattr(decode, "cells", lambda config: [TINY])


def right(problem):
    return DecodeCalls(lambda: None, lambda: expected(problem).float())


def wrong(problem):
    return DecodeCalls(lambda: None, lambda: expected(problem).float().roll(1, 0))


def missing(problem):
    raise ImportError("no such package")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True])
def test_labels_are_distinct(device, quick):
    found = decode.labels(BenchConfig(device, quick=quick))
    assert found and len(set(found)) == len(found)


@pytest.mark.parametrize("lengths", decode_peers.LENGTHS)
def test_batches_have_the_total_of_their_mean(lengths):
    counts = key_counts(DecodeCell(128, 1024, lengths))
    assert len(counts) == 128 and min(counts) >= 1
    assert 0.99 * 128 * 1024 <= sum(counts) <= 128 * 1024 + 128
    if lengths == "zipf":
        assert 30 * 1024 <= max(counts) <= 40 * 1024


def test_bytes_are_those_of_keys_and_values():
    assert DecodeCell(2, 100, "const", 8, 2, 64, 16, "bfloat16").bytes == 2 * 200 * 2 * 64 * 2


def test_keys_of_a_request_are_those_in_its_pages():
    problem = make_problem(TINY, "cpu")
    k, v = problem.keys_of(1)
    assert k.shape == v.shape == (key_counts(TINY)[1], 2, 16)
    page = problem.indices[problem.indptr[1]]
    assert torch.equal(k[0], problem.cache[page, 0, 0]) and torch.equal(v[0], problem.cache[page, 1, 0])


def test_prefills_are_among_the_decodes():
    cell = DecodeCell(3, 40, "const", 4, 2, 16, 16, "float32", prefills=2)
    problem = make_problem(cell, "cpu")
    assert decode_peers.row_counts(cell) == [40, 40, 1] and problem.q_indptr.tolist() == [0, 40, 80, 81]
    halves = decode_peers.Halves.of(problem)
    assert halves.rows == 80 and halves.decode[0].tolist() == [0, 1] and halves.prefill[3].tolist() == [8, 8]
    assert torch.equal(torch.cat([halves.prefill[2], halves.decode[2]]), problem.indices)
    calls = decode_peers.prepare_jitgen(problem)
    calls.plan()
    assert (calls.run().double() - expected(problem)).abs().max() < 1e-5
    for prepare in (decode_peers.prepare_sdpa, decode_peers.prepare_flashinfer_pod):
        with pytest.raises((decode_peers.Unsupported, ImportError)):
            prepare(problem)


def test_ours_is_right_and_timed(one_cell, monkeypatch):
    monkeypatch.setattr(decode, "PEERS", {"sdpa": (decode_peers.prepare_sdpa, ("cpu",))})
    (report,) = decode.run(config())
    results = {r["contender"]: r for r in report.data["results"]}
    assert not report.faults and set(results) == {"sdpa", "jitgen"}
    assert all(r["ms"]["samples"] == 2 and r["error"] < 1e-5 and r["gb_per_s"] > 0 for r in results.values())
    text = report.to_text()
    assert "decode: GB/s" in text and "speed of ours over the best" in text and TINY.label in text


def test_wrong_and_missing_peers_are_named_and_not_timed(one_cell, monkeypatch):
    monkeypatch.setattr(decode, "PEERS", {n: (f, ("cpu",)) for n, f in (("bad", wrong), ("gone", missing), ("good", right))})
    (report,) = decode.run(config())
    results = {r["contender"]: r for r in report.data["results"]}
    assert results["bad"]["ms"] is None and results["bad"]["status"] == "wrong"
    assert results["good"]["ms"] is not None and "gone" not in results
    notes = "\n".join(report.notes)
    assert "gone: not installed (ImportError: no such package)" in notes and "bad: a row is" in notes


def test_an_output_of_decode_that_nobody_writes_is_wrong(one_cell, monkeypatch):
    given = []
    monkeypatch.setattr(check, "poison_memory", lambda *form: [t.fill_(torch.nan) for t in given])

    def first(problem):
        want = expected(problem).float()
        given.append(want.clone())
        return DecodeCalls(lambda: None, lambda: given[0].copy_(want))

    monkeypatch.setattr(decode, "PEERS", {"first": (first, ("cpu",))})
    monkeypatch.setattr(decode, "prepare_jitgen", lambda problem: DecodeCalls(lambda: None, lambda: given[0]))
    (report,) = decode.run(config())
    assert [fault.split(": ", 1)[1] for fault in report.faults] == ["wrong: a row is inf of its norm off float64"]


def test_a_cell_of_decode_that_cannot_be_made_is_reported(one_cell, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decode, "make_problem", fail)
    (report,) = decode.run(config())
    assert "failed: the cell was given up: OutOfMemoryError: CUDA out of memory" in report.faults[0]


def test_a_wrong_output_of_ours_is_a_fault(one_cell, monkeypatch):
    monkeypatch.setattr(decode, "PEERS", {})
    monkeypatch.setattr(decode, "prepare_jitgen", wrong)
    (report,) = decode.run(config())
    assert report.faults and report.faults[0].startswith(f"jitgen, {TINY.label}: wrong: a row is")


def test_a_contender_of_decode_that_takes_too_long_stops_nobody_else(monkeypatch):
    def late(problem):
        raise TimeLimit("no output after 3 s")

    monkeypatch.setattr(decode, "PEERS", {"late": (late, ("cpu",))})
    found = {r.contender: r for r in decode.run_cell(TINY, config(), {})}
    assert found["late"].status == "slow" and found["jitgen"].samples
