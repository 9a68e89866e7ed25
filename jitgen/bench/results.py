"""What one contender did in one cell, and how results are compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from jitgen.bench.check import Deviation
from jitgen.bench.method import Samples
from jitgen.bench.workloads import Cell

# Why a contender has no times. The first is no fault; the others are, and ours must have none of them.
UNSUPPORTED, WRONG, FAILED, SLOW = "unsupported", "wrong", "failed", "slow"


@dataclass(frozen=True)
class Result:
    """One contender in one cell: its times, or why it has none.

    Units:   first_call_s seconds, compiling included; host_us microseconds of host time of a warm call (cuda only).
    """

    cell: Cell
    contender: str
    pairs: int  # unmasked (query, key) pairs of one head
    block_pairs: int  # pairs in the 128 x 128 blocks that hold an unmasked one
    samples: Samples | None = None
    status: str = ""
    reason: str = ""
    first_call_s: float | None = None
    host_us: float | None = None
    error: Deviation | None = None

    @property
    def is_ours(self) -> bool:
        return self.contender.startswith("jitgen")

    @property
    def is_fault(self) -> bool:
        """Whether ours should have been timed and was not."""
        return self.is_ours and self.status in (WRONG, FAILED, SLOW)

    @property
    def ms(self) -> float | None:
        """Median in milliseconds."""
        return self.samples.median if self.samples else None

    @property
    def tflops(self) -> float | None:
        """10^12 operations a second of the two matrix products, unmasked pairs only."""
        return self.cell.flops(self.pairs) / self.ms / 1e9 if self.ms else None

    @property
    def area_speed(self) -> float | None:
        """Visited pairs a millisecond."""
        return self.block_pairs / self.ms if self.ms else None

    def to_json(self) -> dict[str, object]:
        """Everything, with the median and quartiles in place of the samples."""
        return {
            "cell": {"label": self.cell.label, **asdict(self.cell)},
            "contender": self.contender,
            "unmasked_pairs": self.pairs,
            "visited_pairs": self.block_pairs,
            "ms": self.samples.to_json() if self.samples else None,
            "tflops": self.tflops,
            "status": self.status or "timed",
            "reason": self.reason,
            "first_call_s": self.first_call_s,
            "host_us": self.host_us,
            "error": {name: finite(value) for name, value in asdict(self.error).items()} if self.error else None,
        }


def finite(value: float) -> float | str:
    """The value, or its name: JSON has no infinity."""
    return value if math.isfinite(value) else str(value)


def geometric_mean(values: Iterable[float]) -> float | None:
    """Geometric mean; None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


def by_cell(results: Iterable[Result]) -> dict[Cell, dict[str, Result]]:
    """Results by cell and contender, in the order they came."""
    found: dict[Cell, dict[str, Result]] = {}
    for result in results:
        found.setdefault(result.cell, {})[result.contender] = result
    return found


def names(results: Iterable[Result], *, ours: bool | None = None) -> list[str]:
    """Contenders that occur, in order; only ours or only peers if asked."""
    found = dict.fromkeys(result.contender for result in results if ours in (None, result.is_ours))
    return list(found)


def best_peer(contest: dict[str, Result]) -> Result | None:
    """The fastest peer of a cell."""
    timed = [result for result in contest.values() if result.ms and not result.is_ours]
    return min(timed, key=lambda result: result.ms or math.inf, default=None)


def speed_up(ours: Result | None, other: Result | None) -> float | None:
    """How many times as fast as the other ours is; None where one of them has no time."""
    return other.ms / ours.ms if ours and other and ours.ms and other.ms else None


def speed_ups(results: Sequence[Result], ours: str, peer: str | None) -> dict[str, float]:
    """Speed-up of a contender of ours by cell label, over one peer or (None) over the best of each cell."""
    found = {}
    for cell, contest in by_cell(results).items():
        other = best_peer(contest) if peer is None else contest.get(peer)
        ratio = speed_up(contest.get(ours), other)
        if ratio is not None:
            found[cell.label] = ratio
    return found
