"""Compile the kernels that manifests ask for, without a GPU, into a directory to ship.

A manifest is a TOML file: written by hand (see the README), or recorded by running a program with JITGEN_RECORD=FILE.

examples:
  jitgen prebuild kernels.toml --arch 9.0a,8.0 --out layer
  jitgen prebuild recorded.toml --out layer --shard 2/4 --json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jitgen.cli_text import counted, duration_text, paint, positive, short_arch, size_text, table

if TYPE_CHECKING:
    from jitgen.prebuild import Report

SHOWN_LINES = 8  # of an error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("manifests", metavar="MANIFEST", type=Path, nargs="+", help="TOML file")
    add("--out", metavar="DIR", type=Path, help="the layer's directory; kernels that it holds are kept")
    add("--arch", metavar="A,B", type=archs, help="targets: 9.0a, 8.0, ... and amx, avx512, avx2, portable, or cpu: this one")
    add("--jobs", metavar="N", type=positive, help="processes at once; default: one for each core")
    add("--shard", metavar="I/N", type=shard, default=(1, 1), help="build the I-th of N parts, for several machines")
    add("--list", action="store_true", help="list the kernels and build nothing")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Exit code 1 when a kernel failed."""
    if args.out is None and not args.list:
        args.usage_error("--out DIR is missing")
    from jitgen import prebuild

    if args.list:
        units = prebuild.plan(args.manifests, archs=args.arch, shard=args.shard)
        if args.json:
            print(json.dumps([{"what": unit.what, "arch": unit.arch} for unit in units], indent=1))
        else:
            print("\n".join(table([("kernel", "for"), *((unit.what, short_arch(unit.arch)) for unit in units)])))
            print(f"\n{counted(len(units), 'kernel')}")
        return 0
    from jitgen.progress import Bar

    with Bar("prebuilding") as bar:
        report = prebuild.build(
            args.manifests,
            args.out,
            archs=args.arch,
            jobs=args.jobs,
            shard=args.shard,
            on_done=lambda built, done, total: bar.show(done, total, built.what),
        )
    print_report(report, as_json=args.json)
    return 1 if report.failed else 0


def print_report(report: Report, *, as_json: bool) -> None:
    """One line for each kernel, then what failed and why."""
    if as_json:
        kernels = [built._asdict() for built in report.results]
        print(json.dumps({"out": str(report.out), "seconds": report.seconds, "kernels": kernels}, indent=1))
        return
    rows = [("kernel", "for", "time", "size", "")]
    for built in report.results:
        size = size_text(built.size) if built.size else "-"
        rows.append((built.what, short_arch(built.arch), duration_text(built.seconds), size, built.outcome))
    print("\n".join(table(rows, right=(2, 3))))
    outcomes = [built.outcome for built in report.results]
    counts = ", ".join(f"{outcomes.count(name)} {name}" for name in ("built", "hit", "failed") if name in outcomes)
    print(f"\n{counted(len(outcomes), 'kernel')} in {duration_text(report.seconds)}: {counts or 'nothing to do'}; {report.out}")
    for built in report.failed:
        lines = built.error.splitlines()
        print(f"{paint('failed', 'red')}  {built.what} for {built.arch}: " + "\n  ".join(lines[:SHOWN_LINES]), file=sys.stderr)


def archs(text: str) -> list[str]:
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise argparse.ArgumentTypeError("it names no target")
    return found


def shard(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N")
    return int(number), int(count)
