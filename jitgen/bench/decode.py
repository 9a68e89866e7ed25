"""Suite decode: one token of every request against its keys in pages, as a serving engine does in every step.

What counts is bandwidth: all of K and V is read once and hardly computed with. Planning happens once per step and is a
figure of its own, since layers share a plan.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from jitgen.bench.check import TOLERANCE, OutputChecker
from jitgen.bench.config import BenchConfig
from jitgen.bench.contest import one_line
from jitgen.bench.decode_peers import (
    LENGTHS,
    PEERS,
    DecodeCalls,
    DecodeCell,
    DecodeProblem,
    expected,
    make_problem,
    prepare_jitgen,
)
from jitgen.bench.method import Call, Samples, TimeLimit, interleave, release, synchronize, time_limit
from jitgen.bench.peers import Unsupported
from jitgen.bench.report import SuiteReport, Table
from jitgen.bench.results import FAILED, SLOW, UNSUPPORTED, WRONG
from jitgen.bench.tables import NONE, ms_text, ratio_text

CUDA_BATCHES = ((1, 1024), (1, 4096), (8, 1024), (8, 4096), (16, 8192), (128, 1024), (128, 4096))
LARGE_BATCHES = CUDA_BATCHES[-3:]
OTHER_HEADS = (dict(num_q_heads=8), dict(num_q_heads=64), dict(head_dim=64), dict(head_dim=256))
CPU_BATCHES = ((1, 4096), (8, 1024), (16, 1024))
QUICK_BATCHES = {"cuda": ((8, 1024), (16, 8192)), "cpu": ((1, 2048), (8, 256))}
PLAN_SAMPLES = 9
PEER_NAMES = tuple(PEERS)


@dataclass(frozen=True)
class DecodeResult:
    """One contender in one cell. Units: host_us and plan_us microseconds; plan_us until the device is done."""

    cell: DecodeCell
    contender: str
    samples: Samples | None = None
    status: str = ""
    reason: str = ""
    error: float | None = None
    host_us: float | None = None
    plan_us: float | None = None

    @property
    def is_ours(self) -> bool:
        return self.contender.startswith("jitgen")

    @property
    def gbs(self) -> float | None:
        """Bytes of K and V a second, in 10^9."""
        return self.cell.bytes / self.samples.median / 1e6 if self.samples else None

    def to_json(self) -> dict[str, Any]:
        found = {name: value for name, value in vars(self).items() if name not in ("cell", "samples")}
        samples = self.samples.to_json() if self.samples else None
        return {"cell": {"label": self.cell.label, **asdict(self.cell)}, **found, "ms": samples, "gb_per_s": self.gbs}


def cells(config: BenchConfig) -> list[DecodeCell]:
    """All batches with lengths of every kind, large ones also in pages of one key; one request has one length."""
    batches = QUICK_BATCHES[config.device] if config.quick else CUDA_BATCHES if config.device == "cuda" else CPU_BATCHES
    dtype = "bfloat16" if config.device == "cuda" else "float32"
    found = [
        DecodeCell(batch, mean, lengths, dtype=dtype)
        for batch, mean in batches
        for lengths in (LENGTHS if batch > 1 else ("const",))
    ]
    if config.device == "cuda" and not config.quick:
        found += [DecodeCell(*batch, lengths, page_size=1) for batch in LARGE_BATCHES for lengths in LENGTHS]
        found += [DecodeCell(128, 4096, "const", **heads) for heads in OTHER_HEADS]
        found.append(DecodeCell(66, 4096, "const", prefills=2))
    return found


def labels(config: BenchConfig) -> list[str]:
    """What --filter is compared with."""
    return [cell.label for cell in cells(config)]


def run(config: BenchConfig) -> list[SuiteReport]:
    """Time the cells that the filters keep."""
    absent: dict[str, str] = {}
    results: list[DecodeResult] = []
    for cell in cells(config):
        if config.keeps(cell.label):
            try:
                found = run_cell(cell, config, absent)
            except Exception as error:  # too little memory, most likely: what was measured before is still reported
                found = [DecodeResult(cell, "jitgen", status=FAILED, reason=f"the cell was given up: {one_line(error)}")]
            for result in found:
                config.say(detail_line(result))
            results += found
            release(config.device)
    faults = [f"{r.contender}, {r.cell.label}: {r.status}: {r.reason}" for r in results if r.is_ours and not r.samples]
    return [
        SuiteReport(
            suite="decode",
            device=config.device,
            tables=tables(results),
            notes=tuple(notes(results, absent)),
            data={"results": [r.to_json() for r in results]},
            faults=tuple(faults),
        )
    ]


def contenders(config: BenchConfig) -> dict[str, Callable[[DecodeProblem], DecodeCalls]]:
    """Who takes part, peers first: the outputs of all are compared with float64."""
    peers = {
        name: prepare for name, (prepare, devices) in PEERS.items() if config.device in devices and config.keeps_peer(name)
    }
    return peers | {"jitgen": prepare_jitgen}


def run_cell(cell: DecodeCell, config: BenchConfig, absent: dict[str, str]) -> list[DecodeResult]:
    """Results of one cell; contenders take turns."""
    problem = make_problem(cell, config.device, config.seed)
    want, timer = expected(problem), config.timer()
    found: dict[str, DecodeResult] = {}
    calls: dict[str, Call] = {}
    checker = OutputChecker(slice(None))
    for name, prepare in contenders(config).items():
        if name in absent:
            continue
        try:
            with time_limit(config.first_call_limit()):
                made = prepare(problem)
                made.plan()
                error = checker.first(made.run, want)
            plan_us = host_us = None
            timed = made.run
            if error <= TOLERANCE[cell.dtype]:
                plan_us = timed_plan(made.plan, config.device)
                host_us = timer.warm_up(made.run) if config.device == "cuda" else None
                timed = timer.adapt(made.run)
                if timed is not made.run:  # a captured graph: what is timed must be right, not what it was made from
                    error = checker.replayed(timed, want)
            if not error <= TOLERANCE[cell.dtype]:
                found[name] = DecodeResult(cell, name, status=WRONG, reason=f"a row is {error:.2g} of its norm off float64")
                continue
            calls[name] = timed
            found[name] = DecodeResult(cell, name, error=error, host_us=host_us, plan_us=plan_us)
        except Unsupported as refusal:
            found[name] = DecodeResult(cell, name, status=UNSUPPORTED, reason=str(refusal))
        except TimeLimit as late:
            found[name] = DecodeResult(cell, name, status=SLOW, reason=str(late))
        except Exception as failure:
            if isinstance(failure, ImportError) and name != "jitgen":
                absent[name] = one_line(failure)
                continue
            found[name] = DecodeResult(cell, name, status=FAILED, reason=one_line(failure))
    for name, samples in interleave(calls, timer, config.budget(), config.seed).items():
        failed = isinstance(samples, Exception)
        change = {"status": FAILED, "reason": one_line(samples)} if failed else {"samples": samples}
        found[name] = DecodeResult(**{**vars(found[name]), **change})
    return list(found.values())


def timed_plan(plan: Call, device: str) -> float:
    """Median microseconds of a plan, until the device is done with it."""
    times = []
    for _ in range(PLAN_SAMPLES):
        synchronize(device)
        begun = time.perf_counter()
        plan()
        synchronize(device)
        times.append(1e6 * (time.perf_counter() - begun))
    return statistics.median(times)


# ---- tables ----------------------------------------------------------------------------------------------------------------


def detail_line(result: DecodeResult) -> str:
    """All there is to say about one contender in one cell."""
    if result.samples is None:
        return f"{result.cell.label:<42} {result.contender:<22} {result.status}: {result.reason}"
    parts = [f"{ms_text(result.samples.median):>8} ms", f"{result.gbs:.0f} GB/s", f"plan {result.plan_us:.0f} us"]
    parts += [f"host {result.host_us:.1f} us"] if result.host_us is not None else []
    return f"{result.cell.label:<42} {result.contender:<22} {', '.join(parts)}, error {result.error:.1g}"


def tables(results: list[DecodeResult]) -> tuple[Table, ...]:
    """Milliseconds, bandwidth, time of a plan, and our speed over the best peer."""
    names = list(dict.fromkeys(r.contender for r in results))
    rows: dict[str, list[tuple[str, ...]]] = {"ms": [], "GB/s": [], "plan, us": []}
    ratios = []
    for cell in dict.fromkeys(r.cell for r in results):
        of = {r.contender: r for r in results if r.cell == cell}
        shown = [of.get(name) for name in names]
        rows["ms"].append((cell.label, *[ms_text(r.samples.median) if r and r.samples else NONE for r in shown]))
        rows["GB/s"].append((cell.label, *[f"{r.gbs:.0f}" if r and r.gbs else NONE for r in shown]))
        rows["plan, us"].append((cell.label, *[f"{r.plan_us:.0f}" if r and r.plan_us is not None else NONE for r in shown]))
        peers = [r for r in of.values() if not r.is_ours and r.samples]
        best = min(peers, key=lambda r: r.samples.median, default=None)  # type: ignore[union-attr]
        ours = of.get("jitgen")
        if best and best.samples and ours and ours.samples:
            ratio = best.samples.median / ours.samples.median
            ratios.append((cell.label, best.contender, ms_text(best.samples.median), ratio_text(ratio)))
    heads = [name.replace("-", "\n", 1) for name in names]
    shown_tables = [Table(f"decode: {unit}", ("cell", *heads), tuple(lines)) for unit, lines in rows.items()]
    over = Table("decode: speed of ours over the best", ("cell", "best peer", "its ms", "jitgen"), tuple(ratios), left=2)
    return (*shown_tables, over) if ratios else tuple(shown_tables)


def notes(results: list[DecodeResult], absent: dict[str, str]) -> list[str]:
    """What the figures mean, and who is missing."""
    lines = [
        "GB/s: bytes of K and V; zipf: lengths proportional to rank ** -1.2, with the total of const; a plan serves all layers"
    ]
    lines += [f"{name}: not installed ({why})" for name, why in absent.items()]
    refused = dict.fromkeys((r.contender, r.reason) for r in results if r.samples is None and not r.is_ours)
    return lines + [f"{name}: {reason}" for name, reason in refused]
