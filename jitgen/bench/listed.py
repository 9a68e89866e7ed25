"""Suites whose cells bring their own contenders: run, checked against float64, timed in turns, and printed as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from jitgen.bench.check import TOLERANCE, OutputChecker
from jitgen.bench.config import BenchConfig
from jitgen.bench.contest import one_line
from jitgen.bench.method import Call, Samples, TimeLimit, interleave, release, time_limit
from jitgen.bench.report import SuiteReport, Table
from jitgen.bench.results import FAILED, SLOW, WRONG
from jitgen.bench.tables import NONE, ms_text, ratio_text


class Problem(Protocol):
    """The tensors of a cell."""

    dtype: str
    rows: torch.Tensor  # rows of the output that are compared

    def expected(self, contender: str) -> torch.Tensor:
        """What a contender's output of these rows is to be, in float64."""

    def contenders(self) -> Mapping[str, Callable[[], Callable[[], torch.Tensor]]]:
        """Who takes part, ours as 'jitgen': each is prepared, and gives the call, which returns the output row by row."""

    def figure(self, name: str, ms: float, of: Mapping[str, float]) -> str:
        """What a time means, given those of all contenders in ms."""


@dataclass(frozen=True)
class Cell:
    """A cell and what makes its tensors on a device."""

    label: str
    make: Callable[[str, int], Problem]


@dataclass(frozen=True)
class Found:
    """One contender in one cell."""

    cell: str
    contender: str
    samples: Samples | None = None
    status: str = ""
    reason: str = ""
    error: float | None = None
    figure: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "samples": None, "ms": self.samples.to_json() if self.samples else None}


def run_suite(suite: str, cells: Sequence[Cell], config: BenchConfig, note: str) -> list[SuiteReport]:
    """Time the cells that the filters keep."""
    absent: dict[str, str] = {}
    found: list[Found] = []
    for cell in cells:
        if config.keeps(cell.label):
            try:
                results = run_cell(cell, config, absent)
            except Exception as error:  # too little memory, most likely: what was measured before is still reported
                results = [Found(cell.label, "jitgen", status=FAILED, reason=f"the cell was given up: {one_line(error)}")]
            for one in results:
                config.say(detail_line(one))
                found.append(one)
            release(config.device)
    notes = [note, *(f"{name}: not installed ({why})" for name, why in absent.items())]
    notes += dict.fromkeys(f"{f.contender}: {f.reason}" for f in found if f.samples is None and not is_ours(f.contender))
    faults = [f"{f.contender}, {f.cell}: {f.status}: {f.reason}" for f in found if is_ours(f.contender) and not f.samples]
    data = {"results": [f.to_json() for f in found]}
    return [SuiteReport(suite=suite, device=config.device, tables=tables(suite, found), notes=tuple(notes), data=data,
                        faults=tuple(faults))]  # fmt: skip


def is_ours(contender: str) -> bool:
    """Whether a contender is one of jitgen."""
    return contender.startswith("jitgen")


def run_cell(cell: Cell, config: BenchConfig, absent: dict[str, str]) -> list[Found]:
    """Results of one cell; contenders take turns."""
    problem, timer = cell.make(config.device, config.seed), config.timer()
    found: dict[str, Found] = {}
    calls: dict[str, Call] = {}
    checker = OutputChecker(problem.rows)
    for name, prepare in problem.contenders().items():
        if name in absent or not config.keeps_peer(name):
            continue
        try:
            with time_limit(config.first_call_limit()):
                call = prepare()
                error = checker.first(call, problem.expected(name))
            timed = call
            if error <= TOLERANCE[problem.dtype]:
                timer.warm_up(call)
                timed = timer.adapt(call)
                if timed is not call:  # a captured graph: what is timed must be right, not what it was made from
                    error = checker.replayed(timed, problem.expected(name))
            if not error <= TOLERANCE[problem.dtype]:
                reason = f"a row is {error:.2g} of its norm off float64"
                found[name] = Found(cell.label, name, status=WRONG, reason=reason)
                continue
            calls[name] = timed
            found[name] = Found(cell.label, name, error=error)
        except TimeLimit as late:
            found[name] = Found(cell.label, name, status=SLOW, reason=str(late))
        except Exception as failure:
            if isinstance(failure, ImportError) and not is_ours(name):
                absent[name] = one_line(failure)
                continue
            found[name] = Found(cell.label, name, status=FAILED, reason=one_line(failure))
    times = interleave(calls, timer, config.budget(), config.seed)
    medians = {name: s.median for name, s in times.items() if isinstance(s, Samples)}
    for name, samples in times.items():
        if isinstance(samples, Samples):
            change: dict[str, Any] = {"samples": samples, "figure": problem.figure(name, samples.median, medians)}
        else:
            change = {"status": FAILED, "reason": one_line(samples)}
        found[name] = Found(**{**vars(found[name]), **change})
    return list(found.values())


def detail_line(found: Found) -> str:
    """All there is to say about one contender in one cell."""
    if found.samples is None:
        return f"{found.cell:<44} {found.contender:<18} {found.status}: {found.reason}"
    took = f"{ms_text(found.samples.median):>8} ms, {found.figure}"
    return f"{found.cell:<44} {found.contender:<18} {took}, error {found.error:.1g}"


def tables(suite: str, found: Sequence[Found]) -> tuple[Table, ...]:
    """Milliseconds, what they mean, and our speed over each other contender."""
    names = list(dict.fromkeys(f.contender for f in found))
    heads = [name.replace("-", "\n", 1) for name in names]
    rows: dict[str, list[tuple[str, ...]]] = {"ms": [], "figures": [], "speed of ours over each": []}
    for label in dict.fromkeys(f.cell for f in found):
        of = {f.contender: f for f in found if f.cell == label and f.samples}
        ours = of.get("jitgen")
        times = {name: f.samples.median for name, f in of.items() if f.samples}
        rows["ms"].append((label, *[ms_text(times.get(name)) for name in names]))
        rows["figures"].append((label, *[of[name].figure if name in of else NONE for name in names]))
        ratios = [ratio_text(times[name] / times["jitgen"]) if ours and name in times else NONE for name in names]
        rows["speed of ours over each"].append((label, *ratios))
    return tuple(Table(f"{suite}: {what}", ("cell", *heads), tuple(lines)) for what, lines in rows.items())
