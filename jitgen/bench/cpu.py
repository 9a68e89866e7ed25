"""Suite cpu: plain attention against torch SDPA and FlexAttention, then variants beside our plain kernels."""

from __future__ import annotations

from dataclasses import replace

from jitgen.bench.config import BenchConfig
from jitgen.bench.contest import Contest
from jitgen.bench.peers import contenders
from jitgen.bench.report import SuiteReport
from jitgen.bench.tables import make_report, throughput_tables, variant_tables
from jitgen.bench.variants import with_plain
from jitgen.bench.workloads import Cell

HEADS = 8
DTYPES = ("float32", "bfloat16")
VARIANT_NAMES = ("softcap", "alibi", "window", "document")


def plain_cells(config: BenchConfig) -> list[Cell]:
    """Plain attention; --quick keeps the smallest shape of each dtype."""
    head_dims, lengths = ((64,), (1024,)) if config.quick else ((64, 128), (1024, 4096))
    return [
        Cell(1, HEADS, HEADS, length, head_dim, dtype, variant)
        for dtype in DTYPES
        for head_dim in head_dims
        for length in lengths
        for variant in ("full", "causal")
    ]


def variant_cells(config: BenchConfig) -> list[Cell]:
    """Variants, at the longest length of the plain cells: short ones have too few tiles to skip."""
    longest = max(cell.length for cell in plain_cells(config))
    shapes = dict.fromkeys(replace(cell, variant="full") for cell in plain_cells(config) if cell.length == longest)
    return [replace(shape, variant=variant) for shape in shapes for variant in VARIANT_NAMES]


def labels(config: BenchConfig) -> list[str]:
    """What --filter is compared with."""
    return [cell.label for cell in (*plain_cells(config), *variant_cells(config))]


def run(config: BenchConfig) -> list[SuiteReport]:
    """Time the cells that the filters keep. FlexAttention compiles for seconds in each; it is left out of the variants
    here (suite variants has it), so that a run takes minutes.
    """
    config = replace(config, device="cpu", families=(), graph=False)
    peers, notes = contenders(config)
    reports = []
    plain = [cell for cell in plain_cells(config) if config.keeps(cell.label)]
    if plain:
        contest = Contest(config, peers)
        results = contest.run(plain)
        tables = throughput_tables("cpu", results, "cpu")
        absent = [f"{name}: not installed ({why})" for name, why in contest.absent.items()]
        reports.append(make_report("cpu", "cpu", tables, results, notes + absent))
    varied = [cell for cell in variant_cells(config) if config.keeps(cell.label)]
    if varied:
        results = Contest(config, [peer for peer in peers if peer.name != "flex"]).run(with_plain(varied, "cpu"))
        tables = variant_tables("cpu variants", results, "cpu")
        note = "flex is not in this part: see suite variants"
        reports.append(make_report("cpu variants", "cpu", tables, results, [note]))
    return reports
