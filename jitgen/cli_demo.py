"""Compile an attention variant on this machine and compare it with the oracle.

Runs on the CPU, and on the GPU too where there is one.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only this one")
    parser.add_argument("--fresh", action="store_true", help="compile even if the kernel is stored from an earlier run")


def run(args: argparse.Namespace) -> int:
    from jitgen.demo import main

    return main(args.device, fresh=args.fresh)
