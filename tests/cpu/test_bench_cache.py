"""Suite cache of ``jitgen bench``: it runs, checks what it times, and says why a contender is absent."""

from __future__ import annotations

import pytest
import torch

from jitgen.bench import cache
from jitgen.bench.cache import OPS, CacheCell, check, make_data, moved_bytes, prepare_jitgen, run
from jitgen.bench.config import BenchConfig


def test_suite_times_every_operation_beside_a_copy(monkeypatch):
    monkeypatch.setattr(cache, "TOKENS", {"cpu": (32,), "cuda": (32,)})
    said = []
    (report,) = run(BenchConfig("cpu", rounds=1, say=said.append))
    assert not report.faults and len(said) == len(OPS) == len(report.data["results"])
    for found in report.data["results"]:
        assert set(found["ms"]) == {"jitgen", "copy"} and "flashinfer" in found["absent"]
    assert "append_rope 32" in report.to_text() and "flashinfer: not installed" in report.to_text()


@pytest.mark.parametrize("op", OPS)
def test_wrong_output_is_refused(op):
    cell = CacheCell(op, 32)
    data = make_data(cell, BenchConfig("cpu"))
    output = prepare_jitgen(cell, data)()
    assert check(cell, data, output) == ""
    written = output[1] if OPS[op][0] is None else output[0]
    written.copy_(torch.zeros_like(written, dtype=torch.float32).to(written.dtype))
    assert "of its row's largest off float64" in check(cell, data, output)


def test_bytes_count_what_is_read_and_written():
    rows = 2 * 64 * 8 * 128
    assert moved_bytes(CacheCell("append", 64)) == moved_bytes(CacheCell("rope", 64)) == 4 * rows
    assert moved_bytes(CacheCell("append_rope_fp8", 64)) == 3 * rows
