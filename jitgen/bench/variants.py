"""Suite variants: what a hook costs, beside our plain kernels of the same shape and beside peers that can do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jitgen.bench.config import BenchConfig
from jitgen.bench.contest import Contest
from jitgen.bench.peers import RAGGED, contenders
from jitgen.bench.report import SuiteReport
from jitgen.bench.tables import PLAIN, make_report, variant_tables
from jitgen.bench.workloads import VARIANTS, Cell, same_area

CUDA_SHAPES = (Cell(4, 16, 16, 4096, 128, "bfloat16"), Cell(1, 16, 16, 16384, 128, "bfloat16"))
CPU_SHAPES = (Cell(1, 4, 4, 2048, 64, "float32"), Cell(1, 4, 4, 2048, 64, "bfloat16"))


def cells(config: BenchConfig) -> list[Cell]:
    """Every variant in every shape; --quick keeps one shape, on the CPU a shorter one."""
    shapes = CUDA_SHAPES if config.device == "cuda" else CPU_SHAPES
    if config.quick:
        shapes = (replace(shapes[0], length=4096 if config.device == "cuda" else 1024),)
    return [replace(shape, variant=variant) for shape in shapes for variant in VARIANTS]


def labels(config: BenchConfig) -> list[str]:
    """What --filter is compared with."""
    return [cell.label for cell in cells(config)]


def with_plain(chosen: Sequence[Cell], device: str) -> list[Cell]:
    """The cells and, before those of each shape, the plain kernels they are compared with: causal and full ones of the same
    length, and full ones over fewer keys, which visit the same area."""
    found: dict[Cell, None] = {}
    for cell in chosen:
        found |= dict.fromkeys(replace(cell, variant=plain) for plain in PLAIN)
        if cell.variant not in PLAIN:
            found[same_area(cell, device)] = None
        found[cell] = None
    return list(found)


def run(config: BenchConfig) -> list[SuiteReport]:
    """Time the cells that the filters keep, and plain attention in their shapes."""
    peers, notes = contenders(config, RAGGED)
    contest = Contest(config, peers)
    results = contest.run(with_plain([cell for cell in cells(config) if config.keeps(cell.label)], config.device))
    notes += [f"{name}: not installed ({why})" for name, why in contest.absent.items()]
    tables = variant_tables("variants", results, config.device)
    return [make_report("variants", config.device, tables, results, notes)]
