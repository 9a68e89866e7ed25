"""Suite jit: what the generator costs. Every figure comes from a process of its own; jitgen.bench.probe says what it times.

first call   from hooks to a finished output in a process that has imported torch: cold with an empty store, then again
             in further processes that find the module there. FlexAttention likewise, with an empty cache of its own
first step   the same for a step of a serving loop: a plan, keys appended, attention over pages, tokens sampled
hot call     host time of a call that finds its kernel in memory
modules      how many modules many variants on many shapes compile

About a minute on a GPU, half of it with --quick: fewer samples, no peer. --rounds N: N cold calls of each, N from the store.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jitgen.bench.config import BenchConfig
from jitgen.bench.fresh import Fresh, ProbeFailed
from jitgen.bench.report import SuiteReport, Table

FIRST_VARIANTS = ("causal", "document")
FLEX_VARIANTS = ("causal",)
ROUNDS = 2
STEP_NAMES = ("import", "trace", "render", "compile", "load", "rest")
STEP_PARTS = ("plan", "append", "attention", "sample")  # the import is in the first

Probe = Callable[[str, dict[str, Any], Path], dict[str, Any]]


# ---- what there is to measure ---------------------------------------------------------------------------------------


def families(config: BenchConfig) -> tuple[str | None, ...]:
    """Families of ours, None for the one that jitgen chooses."""
    return tuple(None if name == "auto" else name for name in config.families) or (None,)


def contender(family: str | None) -> str:
    """Name of a family of ours in tables."""
    return f"jitgen-{family}" if family else "jitgen"


def first_call_labels(config: BenchConfig) -> dict[str, tuple[str, str | None, str]]:
    """Label -> (contender, family, variant) of the first calls."""
    variants = FIRST_VARIANTS[:1] if config.quick else FIRST_VARIANTS
    found = {
        f"first call {contender(family)} {variant}": ("jitgen", family, variant)
        for family in families(config)
        for variant in variants
    }
    if config.keeps_peer("flex") and not config.quick:
        found |= {f"first call flex {variant}": ("flex", None, variant) for variant in FLEX_VARIANTS}
    return found


def labels(config: BenchConfig) -> list[str]:
    """What --filter is compared with."""
    ours = [contender(family) for family in families(config)]
    return [
        *(f"hot call {name}" for name in ours),
        "first step jitgen",
        *first_call_labels(config),
        *(f"modules {name}" for name in ours),
    ]


def run(config: BenchConfig) -> list[SuiteReport]:
    """Measure what the filters keep. Hot calls go first: their processes leave compiled bytecode for the others."""
    with Fresh("jitgen.bench.probe") as probe:
        suite = JitSuite(config, probe)
        for label in labels(config):
            if config.keeps(label):
                suite.measure(label)
    return [suite.report()]


class JitSuite:
    """Figures as they are found, by label."""

    def __init__(self, config: BenchConfig, probe: Probe) -> None:
        self.config, self.probe = config, probe
        self.first: dict[str, dict[str, Any]] = {}
        self.steps: dict[str, list[dict[str, float]]] = {}
        self.hot: dict[str, dict[str, Any]] = {}
        self.modules: dict[str, dict[str, Any]] = {}
        self.faults: list[str] = []
        self.notes: list[str] = []

    @property
    def rounds(self) -> int:
        """Cold calls of each kind, and calls from the store."""
        return self.config.rounds or (1 if self.config.quick else ROUNDS)

    def measure(self, label: str) -> None:
        """Measure one label; a failure is noted and stops nothing else."""
        by_name = {contender(family): family for family in families(self.config)}
        try:
            with tempfile.TemporaryDirectory(prefix="jitgen-bench-") as scratch:
                if label.startswith("first call "):
                    self.first[label] = self.first_call(*first_call_labels(self.config)[label], Path(scratch))
                elif label.startswith("first step "):
                    self.first_steps(Path(scratch))
                else:
                    kind, _, name = label.rpartition(" ")
                    self.many_calls(kind, name, {"device": self.config.device, "family": by_name[name]}, Path(scratch))
        except ProbeFailed as failure:
            (self.notes if "flex" in label else self.faults).append(f"{label}: {failure}")
        self.config.say(f"[{label}] done")

    def many_calls(self, kind: str, name: str, arguments: dict[str, Any], scratch: Path) -> None:
        """What one process measures: hot calls, or how many modules are built."""
        if kind == "hot call":
            self.hot[name] = self.probe("hot_calls", arguments, scratch)
        else:
            count = 10 if self.config.quick else 50
            self.modules[name] = self.probe("count_modules", {**arguments, "num_variants": count, "num_shapes": count}, scratch)

    def first_steps(self, scratch: Path) -> None:
        """First steps of a serving loop: cold, each with an empty store, and from the store of the last one."""
        stores = [scratch / str(number) for number in range(self.rounds)]
        for kind, places in (("cold", stores), ("disk hit", stores[-1:] * self.rounds)):
            self.steps[kind] = [self.probe("first_step", {"device": self.config.device}, store) for store in places]

    def first_call(self, name: str, family: str | None, variant: str, scratch: Path) -> dict[str, Any]:
        """Cold first calls, each with an empty store, and first calls that find the module of the last one.

        The last cold call of ours is the one whose parts are timed.
        """
        arguments = {"device": self.config.device, "variant": variant, "contender": name, "family": family}
        cold = []
        for number in range(rounds := self.rounds if name == "jitgen" else 1):
            store = scratch / str(number)
            is_split = name == "jitgen" and number == rounds - 1
            cold.append(self.probe("first_call", {**arguments, "split": is_split}, store))
        hits = [self.probe("first_call", {**arguments, "split": False}, store) for _ in range(rounds)]
        return {
            "variant": variant,
            "cold_s": [found["total"] for found in cold],
            "hit_s": [found["total"] for found in hits],
            "split": cold[-1].get("split"),
            "module_bytes": cold[-1].get("module_bytes"),
        }

    # ---- report ----

    def report(self) -> SuiteReport:
        """Tables of what was measured."""
        made = (self.first_table(), self.steps_table(), self.hot_table(), self.modules_table())
        tables = [table for table in made if table.rows]
        device = self.config.device
        data = {"first_call": self.first, "first_step": self.steps, "hot_call": self.hot, "modules": self.modules}
        return SuiteReport("jit", device, tuple(tables), tuple(self.notes), data, tuple(self.faults))

    def first_table(self) -> Table:
        """Medians; the split is of the last cold process."""
        rows = []
        for label, found in self.first.items():
            split, size = found["split"], found["module_bytes"]
            rows.append((
                label.removeprefix("first call "),
                f"{statistics.median(found['cold_s']):.2f}",
                f"{1e3 * statistics.median(found['hit_s']):.1f}",
                *(f"{1e3 * split[step]:.1f}" if split else "-" for step in STEP_NAMES),
                f"{size / 1e3:.0f}" if size else "-",
            ))  # fmt: skip
        title = (
            f"jit, {self.config.device}: first call in a fresh process with torch imported, median; "
            "and how the last cold call divides"
        )
        steps = tuple(f"{step}\nms" for step in STEP_NAMES)
        return Table(title, ("contender, variant", "cold\ns", "disk hit\nms", *steps, "module\nkB"), tuple(rows))

    def steps_table(self) -> Table:
        """Medians of each part, in milliseconds; the total is that of the parts."""
        rows = []
        for kind, found in self.steps.items():
            parts = [1e3 * statistics.median(step[part] for step in found) for part in STEP_PARTS]
            rows.append((kind, f"{sum(parts) / 1e3:.2f}", *(f"{part:.1f}" for part in parts)))
        title = f"jit, {self.config.device}: first step of a serving loop in a fresh process with torch imported, medians"
        return Table(title, ("store", "total\ns", *(f"{part}\nms" for part in STEP_PARTS)), tuple(rows))

    def hot_table(self) -> Table:
        """Microseconds of host time."""
        rows = []
        for name, cases in self.hot.items():
            for case, found in cases.items():
                shown = [f"{found[part]:.2f}" if part in found else "-" for part in ("call", "empty", "overhead")]
                rows.append(("torch" if case.startswith("torch") else name, case, *shown))
        what = "the call" if self.config.device == "cuda" else "the call without its kernel"
        title = f"jit, {self.config.device}: host us of a call on one position; overhead: {what} less an empty call"
        return Table(title, ("contender", "hooks", "call", "empty call", "overhead"), tuple(rows), left=2)

    def modules_table(self) -> Table:
        """Modules built against kernels that differ."""
        parts = ("variants", "shapes", "calls", "distinct", "modules")
        rows = [
            (name, *(str(found[part]) for part in parts), f"{found['seconds']:.1f}") for name, found in self.modules.items()
        ]
        heads = ("contender", "variants", "shapes", "calls", "distinct\nkernels", "modules\nbuilt", "seconds\nin all")
        return Table(f"jit, {self.config.device}: modules of many variants on many shapes", heads, tuple(rows))
