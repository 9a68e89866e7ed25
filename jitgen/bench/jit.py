"""Suite jit: what the generator costs. Every figure comes from a fresh process; jitgen.bench.probe says what it times.

first call   from hooks to a finished output in a process that has imported torch: cold with an empty store, then again
             in further processes that find the module there. FlexAttention likewise, with an empty cache of its own.
hot call     host time of a call that finds its kernel in memory
modules      how many modules many variants on many shapes compile
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jitgen.bench.config import BenchConfig
from jitgen.bench.report import SuiteReport, Table

FIRST_VARIANTS = ("causal", "softcap", "document")
PROCESS_LIMIT_S = 400
# variables of the caller that would change what is measured
UNWANTED = ("JITGEN_PREBUILT", "JITGEN_MODE", "PYTHONDONTWRITEBYTECODE")
STEP_NAMES = ("import", "trace", "render", "compile", "load", "rest")

Probe = Callable[[str, dict[str, Any], Path], dict[str, Any]]


class ProbeFailed(Exception):
    """A fresh process gave no figure; the message is the last line it printed."""


def run_probe(task: str, arguments: dict[str, Any], store: Path) -> dict[str, Any]:
    """Run one task in a fresh process, its caches below ``store``.

    Errors:  ProbeFailed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in UNWANTED}
    environment |= {
        "JITGEN_CACHE_DIR": str(store / "jitgen"),
        "TORCHINDUCTOR_CACHE_DIR": str(store / "inductor"),
        "TRITON_CACHE_DIR": str(store / "triton"),
    }
    command = [sys.executable, "-m", "jitgen.bench.probe", task, json.dumps(arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROCESS_LIMIT_S, env=environment)
    except subprocess.TimeoutExpired:
        raise ProbeFailed(f"no answer after {PROCESS_LIMIT_S} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise ProbeFailed(lines[-1] if lines else f"exit status {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---- what there is to measure ---------------------------------------------------------------------------------------


def families(config: BenchConfig) -> tuple[str | None, ...]:
    """Families of ours, None for the one that jitgen chooses."""
    return tuple(None if name == "auto" else name for name in config.families) or (None,)


def contender(family: str | None) -> str:
    """Name of a family of ours in tables."""
    return f"jitgen-{family}" if family else "jitgen"


def first_call_labels(config: BenchConfig) -> dict[str, tuple[str, str | None, str]]:
    """Label -> (contender, family, variant) of the first calls."""
    variants = FIRST_VARIANTS[:2] if config.quick else FIRST_VARIANTS
    found = {
        f"first call {contender(family)} {variant}": ("jitgen", family, variant)
        for family in families(config)
        for variant in variants
    }
    if config.keeps_peer("flex") and not config.quick:
        found |= {f"first call flex {variant}": ("flex", None, variant) for variant in variants}
    return found


def labels(config: BenchConfig) -> list[str]:
    """What --filter is compared with."""
    ours = [contender(family) for family in families(config)]
    return [
        *(f"hot call {name}" for name in ours),
        *first_call_labels(config),
        *(f"modules {name}" for name in ours),
    ]


def run(config: BenchConfig) -> list[SuiteReport]:
    """Measure what the filters keep. Hot calls go first: their processes leave compiled bytecode for the others."""
    suite = JitSuite(config, run_probe)
    kept = [label for label in labels(config) if config.keeps(label)]
    for label in kept:
        suite.measure(label)
    return [suite.report()]


class JitSuite:
    """Figures as they are found, by label."""

    def __init__(self, config: BenchConfig, probe: Probe) -> None:
        self.config, self.probe = config, probe
        self.first: dict[str, dict[str, Any]] = {}
        self.hot: dict[str, dict[str, Any]] = {}
        self.modules: dict[str, dict[str, Any]] = {}
        self.faults: list[str] = []
        self.notes: list[str] = []

    def measure(self, label: str) -> None:
        """Measure one label; a failure is noted and stops nothing else."""
        by_name = {contender(family): family for family in families(self.config)}
        try:
            with tempfile.TemporaryDirectory(prefix="jitgen-bench-") as scratch:
                if label.startswith("first call "):
                    self.first[label] = self.first_call(*first_call_labels(self.config)[label], Path(scratch))
                    return
                kind, _, name = label.rpartition(" ")
                arguments: dict[str, Any] = {"device": self.config.device, "family": by_name[name]}
                if kind == "hot call":
                    self.hot[name] = self.probe("hot_calls", arguments, Path(scratch))
                else:
                    count = 10 if self.config.quick else 50
                    arguments |= {"num_variants": count, "num_shapes": count}
                    self.modules[name] = self.probe("count_modules", arguments, Path(scratch))
        except ProbeFailed as failure:
            (self.notes if "flex" in label else self.faults).append(f"{label}: {failure}")
        self.config.say(f"[{label}] done")

    def first_call(self, name: str, family: str | None, variant: str, scratch: Path) -> dict[str, Any]:
        """Cold first calls, each with an empty store, and first calls that find the module of the last one."""
        arguments = {"device": self.config.device, "variant": variant, "contender": name, "family": family}
        repeats = 1 if self.config.quick or name != "jitgen" else 3
        cold = []
        for number in range(repeats):
            store = scratch / str(number)
            cold.append(self.probe("first_call", {**arguments, "split": False}, store))
        split = self.probe("first_call", {**arguments, "split": True}, scratch / "split") if name == "jitgen" else {}
        hits = [self.probe("first_call", {**arguments, "split": False}, store) for _ in range(repeats + 2)]
        return {
            "variant": variant,
            "cold_s": [found["total"] for found in cold],
            "hit_s": [found["total"] for found in hits],
            "split": split.get("split"),
            "split_total_s": split.get("total"),
            "module_bytes": cold[-1].get("module_bytes"),
        }

    # ---- report ----

    def report(self) -> SuiteReport:
        """Tables of what was measured."""
        tables = [table for table in (self.first_table(), self.hot_table(), self.modules_table()) if table.rows]
        device = self.config.device
        data = {"first_call": self.first, "hot_call": self.hot, "modules": self.modules}
        return SuiteReport("jit", device, tuple(tables), tuple(self.notes), data, tuple(self.faults))

    def first_table(self) -> Table:
        """Medians; the split is of one further cold process, whose total differs a little."""
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
            "and how one more cold call divides"
        )
        steps = tuple(f"{step}\nms" for step in STEP_NAMES)
        return Table(title, ("contender, variant", "cold\ns", "disk hit\nms", *steps, "module\nkB"), tuple(rows))

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
