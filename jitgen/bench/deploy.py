"""Suite deploy: what shipping kernels costs and saves. Every figure comes from fresh processes.

prebuild      seconds for 20 kernels by one process and by two, an empty directory each
frozen start  a process that finds 20 kernels in a prebuilt layer, torch being imported: all of them run once
race          32 processes ask for one kernel that nobody has: builds, and until the last one has it
bundle        size of 100 kernels as one file
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jitgen.bench.config import BenchConfig
from jitgen.bench.fresh import UNWANTED, ProbeFailed
from jitgen.bench.report import SuiteReport, Table

LABELS = ("prebuild", "frozen start", "race", "bundle")
VARIANTS = ("causal", "causal_window", "softcap", "alibi", "Capped")
DTYPES = ("bfloat16", "float16")
FEW_DIMS = (64, 128)  # with 5 variants and 2 dtypes: 20 kernels
MANY_DIMS = {"cpu": (32, 48, 64, 80, 96, 112, 128, 160, 192, 256), "cuda": (64, 96, 128, 192, 256)}
LIMIT_S = 1200
REPEATS = 5


def labels(config: BenchConfig) -> list[str]:
    """What --filter is compared with."""
    return list(LABELS)


def run(config: BenchConfig) -> list[SuiteReport]:
    """Measure what the filters keep."""
    with tempfile.TemporaryDirectory(prefix="jitgen-deploy-") as scratch:
        suite = DeploySuite(config, Path(scratch))
        for label in LABELS:
            if config.keeps(label):
                suite.measure(label)
        return [suite.report()]


def call_process(module: str, arguments: list[str], **variables: str) -> str:
    """Output of ``python -m module`` with variables of its own.

    Errors:  ProbeFailed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in UNWANTED} | variables
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment)
    except subprocess.TimeoutExpired:
        raise ProbeFailed(f"no answer after {LIMIT_S} s") from None
    if done.returncode:
        raise ProbeFailed((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return done.stdout


class DeploySuite:
    """Figures as they are found, by label."""

    def __init__(self, config: BenchConfig, scratch: Path) -> None:
        self.config, self.scratch = config, scratch
        self.found: dict[str, dict[str, Any]] = {}
        self.faults: list[str] = []
        self.arch = "cpu"
        if config.device == "cuda":
            import torch

            self.arch = "{}.{}".format(*torch.cuda.get_device_capability())

    def measure(self, label: str) -> None:
        """Measure one label; a failure is noted and stops nothing else."""
        tasks: dict[str, Callable[[], dict[str, Any]]] = {
            "prebuild": self.prebuild_scaling,
            "frozen start": self.frozen_start,
            "race": self.race,
            "bundle": self.bundle_size,
        }
        try:
            self.found[label] = tasks[label]()
        except ProbeFailed as failure:
            self.faults.append(f"{label}: {failure}")
        self.config.say(f"[{label}] {self.found.get(label, 'failed')}")

    def prebuild(
        self, out: Path, jobs: int | None = None, dims: tuple[int, ...] = FEW_DIMS, **options: object
    ) -> dict[str, Any]:
        """Build a manifest of all variants into a directory."""
        dims = dims[:1] if self.config.quick else dims
        options = {"dtype": list(DTYPES), "head_dim": list(dims), "arch": self.arch, "q_len": 1 << 20, **options}
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in options.items()]
        manifest = self.scratch / f"{out.name}.toml"
        tables = [f'[[kernel]]\nvariant = "jitgen.bench.deploy_variants:{name}"\n{"".join(lines)}' for name in VARIANTS]
        manifest.write_text("\n".join(tables))
        given = ["prebuild", str(manifest), "--out", str(out), "--json", *(["--jobs", str(jobs)] if jobs else [])]
        return json.loads(call_process("jitgen", given))

    def prebuild_scaling(self) -> dict[str, Any]:
        """One process against two; both times include importing torch in each."""
        seconds = {}
        for jobs in (1, 2):
            begun = time.perf_counter()
            report = self.prebuild(self.scratch / f"jobs{jobs}", jobs)
            seconds[jobs] = time.perf_counter() - begun
        return {"kernels": len(report["kernels"]), "one_s": seconds[1], "two_s": seconds[2], "ratio": seconds[1] / seconds[2]}

    def frozen_start(self) -> dict[str, Any]:
        """Median of fresh processes."""
        layer = self.scratch / "jobs2"
        if not layer.is_dir():
            self.prebuild(layer)
        dims = FEW_DIMS[:1] if self.config.quick else FEW_DIMS
        arguments = ["frozen_start", json.dumps({"device": self.config.device, "head_dims": dims, "dtypes": DTYPES})]
        variables = {"JITGEN_MODE": "frozen", "JITGEN_PREBUILT": str(layer), "JITGEN_CACHE_DIR": str(self.scratch / "store")}
        answers = [json.loads(call_process("jitgen.bench.deploy_probe", arguments, **variables)) for _ in range(REPEATS + 1)]
        middle = {name: statistics.median(answer[name] for answer in answers[1:]) for name in ("ms", "later_ms")}
        return {"kernels": answers[0]["kernels"], **middle}

    def race(self) -> dict[str, Any]:
        """One process alone, then many at once; an empty store each."""
        found = {}
        for count in (1, 8 if self.config.quick else 32):
            arguments = ["race", json.dumps({"arch": self.arch, "num_processes": count, "head_dim": 64})]
            store = str(self.scratch / f"race{count}")
            found[count] = json.loads(call_process("jitgen.bench.deploy_probe", arguments, JITGEN_CACHE_DIR=store))
        alone_s = found[1]["last_s"]
        return {**found[count], "alone_s": alone_s, "ratio": found[count]["last_s"] / alone_s}

    def bundle_size(self) -> dict[str, Any]:
        """Many kernels as .tar.xz and as .tar.zst where there is zstandard."""
        out = self.scratch / "many"
        kernels = self.prebuild(out, dims=MANY_DIMS[self.config.device])["kernels"]
        if self.config.device == "cuda":
            kernels += self.prebuild(out, dims=MANY_DIMS["cuda"], family="sm80")["kernels"]
        found: dict[str, Any] = {"modules_bytes": sum(kernel["size"] for kernel in kernels)}
        for suffix in (".tar.xz", ".tar.zst", ".tar.gz"):
            try:
                packed = call_process("jitgen", ["bundle", "pack", str(out), "-o", str(out) + suffix, "--json"])
            except ProbeFailed:
                continue  # this Python has no zstd
            facts = json.loads(packed)
            found |= {"kernels": len(facts["kernels"]), suffix.rpartition(".")[2]: facts["size"]}
        return found

    def report(self) -> SuiteReport:
        """One table of all figures with their bars."""
        rows = [row for label, found in self.found.items() for row in ROWS[label](found)]
        title = f"deploy, {self.config.device} ({self.arch}): figures of fresh processes, and the bars they are held against"
        table = Table(title, ("what", "figure", "bar"), tuple(rows))
        return SuiteReport("deploy", self.config.device, (table,), (), dict(self.found), tuple(self.faults))


Rows = list[tuple[str, str, str]]
ROWS: dict[str, Callable[[dict[str, Any]], Rows]] = {
    "prebuild": lambda f: [
        (f"prebuild of {f['kernels']} kernels, one process", f"{f['one_s']:.1f} s", ""),
        ("  two processes", f"{f['two_s']:.1f} s", ""),
        ("  one / two", f"{f['ratio']:.2f}", ">= 1.8"),
    ],
    "frozen start": lambda f: [
        (f"frozen start, {f['kernels']} kernels, beyond import torch", f"{f['ms']:.0f} ms", "<= 150 ms for 20"),
        ("  each further kernel, median", f"{f['later_ms']:.1f} ms", "<= 20 ms"),
    ],
    "race": lambda f: [
        (f"{f['processes']} processes, one kernel: builds", str(f["builds"]), "1"),
        ("  last one has it / one process alone", f"{f['ratio']:.2f}", "<= 1.2"),
    ],
    "bundle": lambda f: [
        (f"bundle of {f['kernels']} kernels, .tar.{form}", f"{f[form] / 1e6:.1f} MB", "<= 15 MB for 100")
        for form in ("xz", "zst", "gz")
        if form in f
    ],
}
