"""The command ``jitgen bench``: arguments, their errors, running the suites. torch is imported after the arguments."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jitgen.bench import SUITES

if TYPE_CHECKING:
    from jitgen.bench.config import BenchConfig
    from jitgen.bench.report import SuiteReport

DEVICES = ("auto", "cpu", "cuda")
FAMILY_NAMES = {"cpu": ("auto", "cpu"), "cuda": ("auto", "sm80", "sm90")}
USAGE_ERROR = 2


class UsageError(Exception):
    """What the user asked for does not exist or does not fit together."""


def main(argv: list[str]) -> int:
    """Run ``jitgen bench`` with the arguments after its name.

    Returns: 0; 1 when a contender of ours failed or was wrong; 2 when the arguments are.
    """
    try:
        options = make_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed why
        return int(stop.code or 0)
    try:
        config = make_config(options)
        suites = choose_suites(options.suites, config)
        if options.list:
            print(listing(suites, config))
            return 0
        return run_suites(suites, config, argv, options.json)
    except UsageError as error:
        print(f"jitgen bench: {error}", file=sys.stderr)
        return USAGE_ERROR


def make_parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    suites = "\n".join(f"  {name:<10} {line}" for name, (_, line) in SUITES.items())
    parser = argparse.ArgumentParser(
        prog="jitgen bench",
        description="Measure jitgen and the peers that are installed, side by side in one run.",
        epilog=f"suites:\n{suites}\n\nTables come last. A contender whose output is wrong is listed, not timed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("suites", nargs="*", metavar="SUITE", help=f"one or more of {', '.join(SUITES)}")
    add("--device", choices=DEVICES, default="auto", help="auto: cuda where there is one; suite cpu ignores it")
    add("--quick", action="store_true", help="few cells, few samples: to see that it works")
    add("--filter", action="append", default=[], metavar="TEXT", help="keep cells whose label holds each word of TEXT")
    add("--peers", type=words, default=(), metavar="A,B", help="keep these peers only; 'none' keeps ours alone")
    add("--families", type=words, default=(), metavar="A,B", help="ours to run: auto, sm80, sm90; each is a contender")
    add("--rounds", type=positive, metavar="N", help="samples of each contender")
    add("--graph", action="store_true", help="time replays of CUDA graphs")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--list", action="store_true", help="list the cells and run nothing")
    return parser


def words(text: str) -> tuple[str, ...]:
    """Words between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def positive(text: str) -> int:
    """A count of at least one."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count of at least 1")
    return int(text)


# ---- from arguments to a configuration ------------------------------------------------------------------------------


def make_config(options: argparse.Namespace) -> BenchConfig:
    """The configuration, once everything about it is known to be possible.

    Errors:  UsageError.
    """
    known = ", ".join(SUITES)
    if not options.suites:
        raise UsageError(f"no suite given. Name one or more of {known}.")
    for name in options.suites:
        if name not in SUITES:
            raise UsageError(f"{name!r} is not a suite. Use {known}.")
    if options.json is not None:
        check_file(options.json)

    import torch

    from jitgen.bench.config import BenchConfig
    from jitgen.bench.method import device_problem

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if set(options.suites) != {"cpu"} and device_problem(device):
        raise UsageError(device_problem(device))
    if options.graph and device != "cuda":
        raise UsageError("--graph times CUDA graphs, and the device is cpu. Leave it out.")
    check_names(options, device)
    return BenchConfig(
        device=device,
        quick=options.quick,
        filters=tuple(word for text in options.filter for word in text.split()),
        peers=options.peers,
        families=options.families,
        rounds=options.rounds,
        graph=options.graph,
    )


def check_file(path: Path) -> None:
    """A file can be written there; found out before the minutes of measuring, not after."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"--json {path}: there is no directory {parent}. Create it first.")
    if path.is_dir():
        raise UsageError(f"--json {path} is a directory. Name a file in it.")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"--json {path}: directory {parent} cannot be written. Name another.")


def check_names(options: argparse.Namespace, device: str) -> None:
    """Names of peers and families exist, and the families fit the device."""
    from jitgen.bench.peers import PEERS

    own = [getattr(import_module(SUITES[name][0]), "PEER_NAMES", ()) for name in options.suites]
    known = list(dict.fromkeys([*(peer.name for peer in PEERS), *(name for names in own for name in names)]))
    for name in options.peers:
        if name not in (*known, "none"):
            raise UsageError(f"--peers: {name!r} is not a peer. Use {', '.join(known)}, or none.")
    for name in options.families:
        if name not in FAMILY_NAMES[device]:
            raise UsageError(f"--families: {name!r} is not one for {device}. Use {', '.join(FAMILY_NAMES[device])}.")


def config_of(name: str, config: BenchConfig) -> BenchConfig:
    """The configuration a suite runs under: suite cpu stays on the CPU."""
    return replace(config, device="cpu", families=(), graph=False) if name == "cpu" else config


def choose_suites(asked: Sequence[str], config: BenchConfig) -> dict[str, Any]:
    """Modules of the suites that have a cell the filters keep, in the order asked.

    Errors:  UsageError when no cell of any is kept.
    """
    modules = {name: import_module(SUITES[name][0]) for name in dict.fromkeys(asked)}
    kept = {name: module for name, module in modules.items() if kept_labels(name, module, config)}
    if not kept:
        example = next(iter(modules.values())).labels(config_of(asked[0], config))[0]
        raise UsageError(
            f"--filter {' '.join(config.filters)!r} keeps no cell of {', '.join(modules)}. "
            f"Labels look like {example!r}; --list shows all."
        )
    return kept


def kept_labels(name: str, module: Any, config: BenchConfig) -> list[str]:
    """Labels of a suite's cells that the filters keep."""
    return [label for label in module.labels(config_of(name, config)) if config.keeps(label)]


def listing(suites: dict[str, Any], config: BenchConfig) -> str:
    """The cells that would run."""
    lines = []
    for name, module in suites.items():
        lines.append(f"{name}: {SUITES[name][1]}")
        lines += [f"  {label}" for label in kept_labels(name, module, config)]
    return "\n".join(lines)


# ---- running --------------------------------------------------------------------------------------------------------


def run_suites(suites: dict[str, Any], config: BenchConfig, argv: Sequence[str], json_path: Path | None) -> int:
    """Run the suites one after the other; print all tables at the end, and write JSON after each suite."""
    from jitgen.bench.report import header_text, make_header, to_document, write_json

    configs = {name: config_of(name, config) for name in suites}
    methods = {one.device: one.timer().describe() for one in configs.values()}
    header = make_header(config, argv, methods)
    config.say(header_text(header) + "\n")
    reports: list[SuiteReport] = []
    for name, module in suites.items():
        reports += module.run(configs[name])
        if json_path is not None:
            write_json(json_path, to_document(header, reports))
    config.say("\n" + header_text(header))
    for report in reports:
        config.say("\n" + report.to_text())
    return 1 if any(report.faults for report in reports) else 0
