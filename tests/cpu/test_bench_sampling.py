"""Suite sampling of ``jitgen bench``: it runs, checks what it times, and says why a contender is absent."""

from __future__ import annotations

import pytest
import torch

from jitgen.bench import sampling
from jitgen.bench.config import BenchConfig
from jitgen.bench.sampling import OPS, SamplingCell, check, keep_mask, make_rows, run


@pytest.fixture
def small(monkeypatch):
    """Rows of a small vocabulary."""
    monkeypatch.setattr(sampling, "VOCAB", 600)
    monkeypatch.setattr(sampling, "BATCHES", {"cpu": (3,), "cuda": (3,)})
    monkeypatch.setattr(sampling, "cells", lambda config: [SamplingCell(op, "fp32", 3, 600) for op in OPS])


def test_suite_times_every_operation_beside_torch(small):
    said = []
    (report,) = run(BenchConfig("cpu", rounds=1, say=said.append))
    assert not report.faults and len(said) == len(OPS) == len(report.data["results"])
    for found in report.data["results"]:
        assert set(found["ms"]) == {"jitgen", "torch"} and "flashinfer" in found["absent"]
    assert "sample fp32 3x600" in report.to_text() and "flashinfer: not installed" in report.to_text()


def test_peers_can_be_left_out(small):
    (report,) = run(BenchConfig("cpu", rounds=1, peers=("none",), filters=("top_k",), say=lambda text: None))
    assert all(set(found["ms"]) == {"jitgen"} for found in report.data["results"])


@pytest.mark.parametrize("op", OPS)
def test_wrong_outputs_are_refused(op):
    cell = SamplingCell(op, "fp32", 3, 600)
    x = make_rows(cell, BenchConfig("cpu"))
    if OPS[op].writes:
        assert "of its mass off float64" in check(cell, x, x)
        return
    probs = x.softmax(-1) if OPS[op].kind == "logits" else x
    assert "of a vocabulary of 600" in check(cell, x, torch.full((3,), 600))
    if OPS[op].filters:
        outside = (~keep_mask(probs, OPS[op].filters)).int().argmax(-1)
        assert "outside of the filtered support" in check(cell, x, outside)
    assert check(cell, x, probs.argmax(-1)) == ""
