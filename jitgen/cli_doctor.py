"""Say what works on this machine, and what to do about what does not.

Compiles and runs a small library for each kind of target. Exit code 0 when CPU kernels can be compiled and run.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    from jitgen import doctor

    return doctor.run(as_json=args.json)
