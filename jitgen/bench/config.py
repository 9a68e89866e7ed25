"""What the user asked of a benchmark run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jitgen.bench.method import Budget, CpuTimer, CudaTimer, Timer


def say_at_once(text: str) -> None:
    """Print without waiting for a full buffer."""
    print(text, flush=True)


@dataclass(frozen=True)
class BenchConfig:
    """Options shared by all suites.

    ``filters`` keep a cell when each of them occurs in its label; ``peers`` keeps contenders by name (empty: all);
    ``families`` are the kernel families of ours to run (empty: what jitgen chooses by itself). ``say`` prints figures
    as they are found: a run that is cut short has at least shown those.
    """

    device: str
    quick: bool = False
    filters: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    rounds: int | None = None
    graph: bool = False
    seed: int = 0
    say: Callable[[str], None] = say_at_once

    def keeps(self, label: str) -> bool:
        """Whether a cell is wanted."""
        return all(text in label for text in self.filters)

    def keeps_peer(self, name: str) -> bool:
        """Whether a contender is wanted; our own always are."""
        return not self.peers or name.startswith("jitgen") or name in self.peers

    def budget(self) -> Budget:
        """How many samples each contender of a cell gets."""
        if self.device == "cuda":
            budget = Budget(7, 7, 1.0) if self.quick else Budget(9, 25, 1.0)
        else:
            budget = Budget(3, 5, 0.5) if self.quick else Budget(3, 15, 2.0)
        return budget if self.rounds is None else Budget(self.rounds, self.rounds, float("inf"))

    def first_call_limit(self) -> float:
        """Seconds a contender may take until its first output; compiling included."""
        return 45.0 if self.quick else 180.0

    def timer(self) -> Timer:
        """The clock of this device."""
        return CudaTimer(use_graph=self.graph) if self.device == "cuda" else CpuTimer()
