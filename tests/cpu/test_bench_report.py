"""What a benchmark prints and writes: tables, ratios, JSON."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from bench_fakes import CELL, config

from jitgen.bench.check import WORST, Deviation
from jitgen.bench.method import Samples
from jitgen.bench.report import SuiteReport, Table, header_text, make_header, to_document, write_json
from jitgen.bench.results import Result, best_peer, by_cell, geometric_mean, speed_ups
from jitgen.bench.tables import (
    SAME_AREA,
    area_ratios,
    detail_lines,
    make_report,
    ms_text,
    throughput_tables,
    variant_tables,
)

FULL = dataclasses.replace(CELL, variant="full")
SOFTCAP = dataclasses.replace(CELL, variant="softcap")


def result(cell, contender, ms=None, area=48 * 48, **fields):
    """A result whose three samples have the median ``ms``."""
    samples = None if ms is None else Samples((ms, ms * 0.9, ms * 1.2))
    return Result(cell, contender, 48 * 49 // 2, area, samples, **fields)


RESULTS = [
    result(CELL, "jitgen-sm90", 1.0),
    result(CELL, "sdpa-flash", 2.0),
    result(CELL, "flex", 4.0),
    result(FULL, "jitgen-sm90", 2.0),
    result(FULL, "sdpa-flash", 1.0),
    result(FULL, "flex", status="failed", reason="RuntimeError: no"),
]


@pytest.mark.parametrize(
    ("values", "mean"),
    [([4.0], 4.0), ([1.0, 4.0], 2.0), ([0.5, 2.0, 8.0], 2.0), ([], None)],
    ids=str,
)
def test_geometric_mean(values, mean):
    assert geometric_mean(values) == (None if mean is None else pytest.approx(mean, rel=1e-12))


def test_table_aligns_names_of_one_and_two_lines_and_numbers_to_the_right():
    table = Table("title", ("cell", "jitgen", "sdpa\nflash"), (("bf16 causal", "1.5", "12.25"), ("x", "-", "3")))
    assert table.to_text() == (
        "title\n"
        "                      sdpa\n"
        "cell         jitgen  flash\n"
        "--------------------------\n"
        "bf16 causal     1.5  12.25\n"
        "x                 -      3"
    )


def test_throughput_tables_show_ms_rates_and_our_speed_over_peers():
    shown = [table.to_text() for table in throughput_tables("dense", RESULTS, "cpu")]
    assert shown == [
        "dense: ms\n"
        "                           jitgen   sdpa\n"
        "cell                         sm90  flash   flex\n"
        "-----------------------------------------------\n"
        "fp32 hd16 2/2 1x48 causal   1.000  2.000  4.000\n"
        "fp32 hd16 2/2 1x48 full     2.000  1.000      -",
        "dense: GFLOP/s\n"
        "                           jitgen   sdpa\n"
        "cell                         sm90  flash  flex\n"
        "----------------------------------------------\n"
        "fp32 hd16 2/2 1x48 causal     0.2    0.1   0.0\n"
        "fp32 hd16 2/2 1x48 full       0.1    0.2     -",
        "dense: speed of ours over the best\n"
        "cell                       best peer   its ms  jitgen-sm90\n"
        "----------------------------------------------------------\n"
        "fp32 hd16 2/2 1x48 causal  sdpa-flash   2.000        2.000\n"
        "fp32 hd16 2/2 1x48 full    sdpa-flash   1.000        0.500",
        "dense: speed of ours over each peer, geometric mean (least, greatest; cells)\n"
        "peer                          jitgen-sm90\n"
        "-----------------------------------------\n"
        "sdpa-flash        1.000 (0.500, 2.000; 2)\n"
        "flex              4.000 (4.000, 4.000; 1)\n"
        "best of the cell  1.000 (0.500, 2.000; 2)",
    ]


def test_tables_without_a_row_are_left_out():
    alone = [one for one in RESULTS if one.is_ours]
    text = SuiteReport("dense", "cpu", throughput_tables("dense", alone, "cpu"), ("a note",)).to_text()
    assert "dense: ms" in text and "over the best" not in text and "over each peer" not in text and text.endswith("\n- a note")


def test_table_of_all_contenders_fits_into_120_columns():
    names = ("jitgen", "jitgen-sm80", "jitgen-sm90", "sdpa-flash", "sdpa-cudnn", "fa3", "fa4", "flashinfer", "flex")
    widest = dataclasses.replace(CELL, num_q_heads=32, num_kv_heads=32, length=16384, head_dim=128, dtype="bfloat16")
    results = [result(widest, name, 12.345) for name in names]
    for table in (*throughput_tables("dense", results, "cuda"), *variant_tables("variants", results, "cuda")):
        assert max(len(line) for line in table.to_text().splitlines()) <= 120


def test_best_peer_is_the_fastest_that_is_not_ours():
    contest = by_cell(RESULTS)[CELL]
    assert best_peer(contest).contender == "sdpa-flash"
    assert speed_ups(RESULTS, "jitgen-sm90", None) == {CELL.label: 2.0, FULL.label: 0.5}


def test_throughput_counts_unmasked_pairs():
    one = result(CELL, "jitgen", 2.0)
    assert one.tflops == pytest.approx(4 * 1 * 2 * (48 * 49 / 2) * 16 / 2e-3 / 1e12)


def test_variant_is_compared_with_our_plain_kernel_by_visited_area():
    results = [
        result(CELL, "jitgen", 1.0, area=1000),
        result(FULL, "jitgen", 1.6, area=2000),
        result(dataclasses.replace(FULL, num_keys=128), "jitgen", 0.25, area=500),
        result(SOFTCAP, "jitgen", 0.5, area=400),
        result(SOFTCAP, "flex", 1.5, area=400),
    ]
    assert area_ratios(results, "jitgen", "causal") == {SOFTCAP.label: pytest.approx(0.8)}
    assert area_ratios(results, "jitgen", "full") == {SOFTCAP.label: pytest.approx(800 / 1250)}
    assert area_ratios(results, "jitgen", SAME_AREA) == {SOFTCAP.label: pytest.approx(800 / 2000)}
    row = variant_tables("variants", results, "cuda")[0].rows[-1]
    assert row[:3] == ("softcap", "jitgen", "0.5000")
    assert row[5:9] == ("0.800", "0.400", "1.500", "3.000")


def test_contender_of_ours_without_times_is_a_fault_and_a_peer_a_note():
    bad = result(CELL, "jitgen", status="wrong", reason="wrong output: off")
    report = make_report("dense", "cpu", (), [*RESULTS, bad], ["fa3: not installed"])
    assert report.faults == ("jitgen, fp32 hd16 2/2 1x48 causal: wrong: wrong output: off",)
    assert report.notes == ("fa3: not installed", "flex: failed: RuntimeError: no (fp32 hd16 2/2 1x48 full)")
    assert report.to_text().splitlines()[-1].startswith("FAULT jitgen")


def test_note_on_a_peer_names_three_cells_and_counts_the_rest():
    cells = [dataclasses.replace(CELL, length=length) for length in (1, 2, 3, 4, 5)]
    refused = [result(cell, "sdpa", status="unsupported", reason="no such mask") for cell in cells]
    notes = make_report("variants", "cpu", (), refused, []).notes
    assert len(notes) == 1
    assert notes[0].startswith("sdpa: no such mask (")
    assert notes[0].endswith("1x3 causal and 2 more)")


def test_detail_shows_quartiles_and_rate_and_why_not():
    lines = detail_lines([*RESULTS[:2], RESULTS[5]], "cpu")
    assert lines[0] == "  fp32 hd16 2/2 1x48 causal"
    assert "2.000 ms [1.900, 2.200]" in lines[2]
    assert "GFLOP/s" in lines[2]
    assert lines[2].endswith("jitgen-sm90 2.000x")
    assert lines[4] == "    flex         failed: RuntimeError: no"


@pytest.mark.parametrize(
    ("ms", "text"),
    [(None, "-"), (0.01234, "0.0123"), (1.2345, "1.234"), (45.678, "45.68"), (1234.56, "1234.6")],
    ids=str,
)
def test_milliseconds_keep_four_digits_or_so(ms, text):
    assert ms_text(ms) == text


def test_json_holds_every_figure_and_comes_back_as_it_was(tmp_path):
    results = [*RESULTS, result(CELL, "odd", status="wrong", reason="r", error=WORST)]
    results[0] = dataclasses.replace(results[0], first_call_s=1.25, error=Deviation(1e-3, 2e-3))
    header = make_header(config(), ["dense"], {"cpu": "a fake clock"})
    document = to_document(header, [make_report("dense", "cpu", (), results, ["a note"])])
    path = tmp_path / "bench.json"
    write_json(path, document)
    read = json.loads(path.read_text())
    assert read == document
    first = read["suites"][0]["results"][0]
    assert first["cell"]["label"] == CELL.label
    assert first["ms"] == {"median": 1.0, "q1": 0.95, "q3": 1.1, "min": 0.9, "max": 1.2, "samples": 3}
    assert (first["first_call_s"], first["error"]) == (1.25, {"relative": 1e-3, "absolute": 2e-3})
    assert read["suites"][0]["results"][-1]["error"]["relative"] == str(math.inf)
    summary = read["suites"][0]["summary"]["jitgen-sm90"]["speed_up_over"]
    assert summary["best"] == {"geometric_mean": 1.0, "cells": {CELL.label: 2.0, FULL.label: 0.5}}
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_header_names_device_versions_and_method():
    header = make_header(config(quick=True), ["cpu", "--quick"], {"cpu": "a fake clock"})
    text = header_text(header)
    for part in ("jitgen bench cpu --quick", f"cpu: {header['cpu']}", "torch ", "method on cpu: a fake clock"):
        assert part in text
    assert "do not quote" in text
    assert max(len(line) for line in text.splitlines()) <= 120
