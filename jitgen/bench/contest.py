"""One group of contenders, start to end: prepare, check, time in turns. What fails is listed and stops nobody else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jitgen.bench.check import Checker, poison
from jitgen.bench.config import BenchConfig
from jitgen.bench.method import Call, Samples, TimeLimit, Timer, interleave, release, synchronize, time_limit
from jitgen.bench.peers import Peer, Unsupported
from jitgen.bench.results import FAILED, SLOW, UNSUPPORTED, WRONG, Result
from jitgen.bench.tables import detail_lines
from jitgen.bench.workloads import Cell, Problem, ProblemSet

REASON_COLUMNS = 160


class Contest:
    """Runs the same contenders over many cells, and remembers who is not installed."""

    def __init__(self, config: BenchConfig, peers: Sequence[Peer], timer: Timer | None = None) -> None:
        self.config, self.peers = config, list(peers)
        self.timer = timer or config.timer()
        self.absent: dict[str, str] = {}  # peer -> why it could not be imported

    def run(self, cells: Sequence[Cell]) -> list[Result]:
        """Results of all cells. Cells of one shape share tensors and are timed against each other, in turns."""
        groups: dict[Cell, list[Cell]] = {}
        for cell in cells:
            groups.setdefault(cell.shape, []).append(cell)
        results: list[Result] = []
        for number, group in enumerate(groups.values(), 1):
            begun = time.monotonic()
            found = self.run_group(group, seed=self.config.seed + number)
            release(self.config.device)
            seconds = time.monotonic() - begun
            self.config.say(f"[{number}/{len(groups)}] {group[0].shape_label}, {seconds:.0f} s")
            for line in detail_lines(found, self.config.device):
                self.config.say(line)
            results += found
        return results

    def run_group(self, cells: Sequence[Cell], seed: int = 0) -> list[Result]:
        """Results of cells of one shape, by cell and in the order of the contenders."""
        problems = ProblemSet(self.config.device, self.config.seed)
        admitted: dict[str, tuple[Result, Call]] = {}
        results: dict[tuple[Cell, str], Result] = {}
        for cell in cells:
            for result, call in self.admit_all(cell, problems):
                results[cell, result.contender] = result
                if call is not None:
                    admitted[f"{cell.label} {result.contender}"] = (result, call)
        calls = {name: call for name, (_, call) in admitted.items()}
        try:
            times = interleave(calls, self.timer, self.config.budget(), seed)
        except Exception as error:  # a CUDA error that is found late is nobody's in particular
            times = dict.fromkeys(calls, error)
        for name, (result, _) in admitted.items():
            found = times[name]
            timed = isinstance(found, Samples)
            change = {"samples": found} if timed else {"status": FAILED, "reason": f"while timed: {one_line(found)}"}
            results[result.cell, result.contender] = replace(result, **change)
        present = [peer.name for peer in self.peers if peer.name not in self.absent]
        return [results[cell, name] for cell in cells for name in present if (cell, name) in results]

    def admit_all(self, cell: Cell, problems: ProblemSet) -> list[tuple[Result, Call | None]]:
        """Every contender's first output, checked; with the call to time where it was right.

        Peers go before ours: outputs are compared with the first right one, and that should not be our own.
        """
        try:
            problem = problems.problem(cell)
            checker = Checker(problem)
        except Exception as error:  # too little memory, most likely
            reason = f"the problem could not be made: {one_line(error)}"
            return [(Result(cell, peer.name, 0, 0, status=FAILED, reason=reason), None) for peer in self.peers]
        ordered = sorted(self.peers, key=lambda peer: peer.name.startswith("jitgen"))
        found = [self.admit(peer, problem, checker) for peer in ordered if peer.name not in self.absent]
        return [entry for entry in found if entry[0].contender not in self.absent]

    def admit(self, peer: Peer, problem: Problem, checker: Checker) -> tuple[Result, Call | None]:
        """A contender's first output, checked; with the call to time if it was right."""
        blank = Result(problem.cell, peer.name, problem.pairs, problem.block_pairs)
        try:
            with time_limit(self.config.first_call_limit()):
                poison(problem)
                start = time.perf_counter()
                call = peer.prepare(problem)
                output = call()
                synchronize(self.config.device)
                blank = replace(blank, first_call_s=time.perf_counter() - start)
            error, reason = checker.check(peer.name, output)
            blank = replace(blank, error=error)
            if reason:
                return replace(blank, status=WRONG, reason=reason), None
            del output
            host_us = self.timer.warm_up(call)
            timed = self.timer.adapt(call)
            if timed is not call:  # a captured graph: what is timed must be right, not what it was made from
                error, reason = checker.check(peer.name, timed())
                if reason:
                    return replace(blank, error=error, status=WRONG, reason=f"as a graph: {reason}"), None
            return replace(blank, host_us=host_us if self.config.device == "cuda" else None), timed
        except Unsupported as refusal:
            return replace(blank, status=UNSUPPORTED, reason=str(refusal)), None
        except ImportError as missing:
            if not blank.is_ours:
                self.absent[peer.name] = one_line(missing)
            return replace(blank, status=FAILED, reason=one_line(missing)), None
        except TimeLimit as late:
            return replace(blank, status=SLOW, reason=str(late)), None
        except Exception as failure:
            return replace(blank, status=FAILED, reason=one_line(failure)), None


def one_line(error: object) -> str:
    """Kind and first line of an error, cut to a sensible length."""
    text = " ".join(str(error).split("\n")[0].split())
    shown = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return shown if len(shown) <= REASON_COLUMNS else shown[: REASON_COLUMNS - 3] + "..."


def time_right(
    contenders: Mapping[str, Callable[[], Callable[[], Any]]], check: Callable[[str, Any], str], config: BenchConfig
) -> tuple[dict[str, Samples], dict[str, str]]:
    """Times of the contenders whose output is right, and why the others have none.

    Each is prepared, and gives the call; ``check`` says what is wrong about a contender's output, or nothing.
    """
    timer = config.timer()
    calls: dict[str, Call] = {}
    absent: dict[str, str] = {}
    for name, prepare in contenders.items():
        try:
            with time_limit(config.first_call_limit()):
                call = prepare()
                output = call()
                synchronize(config.device)
            reason = check(name, output)
            if not reason:
                timer.warm_up(call)
                timed = timer.adapt(call)
                reason = check(name, timed()) if timed is not call else ""  # a captured graph must be right too
            if reason:
                absent[name] = reason
                continue
            calls[name] = timed
        except ImportError as error:
            absent[name] = f"not installed ({error})"
        except (Exception, TimeLimit) as error:
            absent[name] = f"{type(error).__name__}: {error}"
    found = interleave(calls, timer, config.budget(), config.seed)
    absent |= {name: f"failed: {value}" for name, value in found.items() if isinstance(value, Exception)}
    return {name: value for name, value in found.items() if isinstance(value, Samples)}, absent
