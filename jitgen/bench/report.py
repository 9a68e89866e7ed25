"""What is printed and written: tables as text, the header that says what was measured on what, JSON."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from jitgen.bench.config import BenchConfig
from jitgen.bench.method import device_name
from jitgen.bench.peers import versions

GAP = "  "
NOTE_COLUMNS = 116
# load average per core at the start: a process that shares a core has its parallel loops wait 10 ms and more
BUSY = 0.3
WORK = "FLOPs: 4 x batch x heads x head_dim x unmasked (query, key) pairs; ms are medians, [ ] are quartiles"


@dataclass(frozen=True)
class Table:
    """A table of text. A column's name may have two lines; the first ``left`` columns are flush left."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1

    def to_text(self) -> str:
        """Title, names, a rule, rows."""
        named = [name.split("\n") for name in self.columns]
        depth = max(len(lines) for lines in named)
        head = [[""] * (depth - len(lines)) + lines for lines in named]
        lines = [*zip(*head, strict=True), *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(named))]
        shown = [self._line(line, widths) for line in lines]
        rule = "-" * max(len(line) for line in shown)
        return "\n".join([self.title, *shown[:depth], rule, *shown[depth:]])

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        fitted = [
            text.ljust(width) if i < self.left else text.rjust(width)
            for i, (text, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return GAP.join(fitted).rstrip()


@dataclass(frozen=True)
class SuiteReport:
    """What one suite found. ``data`` goes to JSON; ``faults`` name what of ours should have run and did not."""

    suite: str
    device: str
    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    data: dict[str, Any] = field(default_factory=dict)
    faults: tuple[str, ...] = ()

    def to_text(self) -> str:
        """Tables, notes, and last what went wrong with ours."""
        tables = [table for table in self.tables if table.rows]  # without a peer there is nothing to compare with
        parts = [table.to_text() for table in tables]
        parts += [wrapped(f"- {note}") for note in self.notes]
        parts += [wrapped(f"FAULT {fault}") for fault in self.faults]
        return "\n\n".join(parts[: len(tables)]) + "\n" + "\n".join(parts[len(tables) :])

    def to_json(self) -> dict[str, Any]:
        """Suite, data, notes and faults."""
        found = {"suite": self.suite, "device": self.device, "notes": list(self.notes), "faults": list(self.faults)}
        return {**found, **self.data}


def wrapped(text: str) -> str:
    """Text broken at NOTE_COLUMNS, further lines indented."""
    import textwrap

    return "\n".join(textwrap.wrap(text, NOTE_COLUMNS, subsequent_indent="  ", break_long_words=False) or [""])


def make_header(config: BenchConfig, command: Sequence[str], methods: dict[str, str]) -> dict[str, Any]:
    """What was measured, on what, with what, how. ``methods`` says it for each device."""
    return {
        "command": ["jitgen", "bench", *command],
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "devices": {device: device_name(device) for device in methods},
        "cpu": device_name("cpu"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": versions(),
        "methods": methods,
        "work": WORK,
        "quick": config.quick,
        "seed": config.seed,
    }


def header_text(header: dict[str, Any]) -> str:
    """The header in a few lines."""
    installed = {name: version for name, version in header["versions"].items() if version != "not installed"}
    lines = [f"{' '.join(header['command'])}   {header['date']}"]
    lines += [f"{device}: {name}" for device, name in header["devices"].items()]
    lines.append(
        f"{header['cores']} cores, {header['threads']} threads, load average {header['load_average']:.1f} at start; "
        f"Python {header['python']}, CUDA {header['cuda'] or 'none'}"
    )
    lines.append(", ".join(f"{name} {version}" for name, version in installed.items()))
    lines += [f"method on {device}: {method}" for device, method in header["methods"].items()]
    lines.append(header["work"])
    if "cpu" in header["devices"] and header["load_average"] > BUSY * header["cores"]:
        lines.append("NOTE: the machine is busy with other work: these figures say little")
    if header["quick"]:
        lines.append("--quick: few samples and few cells; see that it works, do not quote it")
    return "\n".join(wrapped(line) for line in lines)


def to_document(header: dict[str, Any], reports: Sequence[SuiteReport]) -> dict[str, Any]:
    """Everything that JSON holds."""
    return {"header": header, "suites": [report.to_json() for report in reports]}


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a document; the file is whole or the old one, also when the run is cut short."""
    fresh = path.with_name(path.name + ".part")
    fresh.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    os.replace(fresh, path)
