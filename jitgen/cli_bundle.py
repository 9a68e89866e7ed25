"""Ship kernels as one file: a layer that 'jitgen prebuild' made, or a store.

  pack DIR... -o OUT      OUT ends in .tar.zst, .tar.xz, .tar.gz or .whl, or is a directory
  verify BUNDLE           compare every file with what was packed
  unpack BUNDLE -o DIR    for JITGEN_PREBUILT=DIR; a wheel can also be installed, and is then found by itself
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from jitgen.cli_text import counted, short_arch, size_text
from jitgen.errors import BundleError

if TYPE_CHECKING:
    from jitgen.cache.bundle import Contents


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print JSON")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    adders = {name: actions.add_parser(name, parents=[shared], help=help) for name, (help, _) in ACTIONS.items()}
    adders["pack"].add_argument("layers", metavar="DIR", type=Path, nargs="+", help="layers or stores")
    adders["pack"].add_argument("-o", "--out", metavar="OUT", type=Path, required=True, help="file or directory")
    adders["verify"].add_argument("bundle", metavar="BUNDLE", type=Path)
    adders["unpack"].add_argument("bundle", metavar="BUNDLE", type=Path)
    adders["unpack"].add_argument("-o", "--out", metavar="DIR", type=Path, required=True, help="directory")


def run(args: argparse.Namespace) -> int:
    try:
        contents, said = ACTIONS[args.action][1](args)
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        raise BundleError(f"{what}{error.strerror or error}.") from error
    if args.json:
        facts = {**contents._asdict(), "path": str(contents.path)}
        print(json.dumps(facts, indent=1))
        return 0
    archs = ", ".join(dict.fromkeys(map(short_arch, contents.archs)))
    print(f"{said}: {counted(len(contents.kernels), 'kernel')} for {archs}, {size_text(contents.size)}")
    if contents.glibc:
        print(f"needs glibc {contents.glibc} or later")
    return 0


def run_pack(args: argparse.Namespace) -> tuple[Contents, str]:
    from jitgen.cache.bundle import pack

    contents = pack(args.layers, args.out)
    return contents, f"packed {contents.path}"


def run_verify(args: argparse.Namespace) -> tuple[Contents, str]:
    from jitgen.cache.bundle import verify

    return verify(args.bundle), f"{args.bundle} is as it was packed"


def run_unpack(args: argparse.Namespace) -> tuple[Contents, str]:
    from jitgen.cache.bundle import unpack

    return unpack(args.bundle, args.out), f"unpacked {args.bundle} to {args.out}"


ACTIONS: dict[str, tuple[str, Callable[[argparse.Namespace], tuple[Contents, str]]]] = {
    "pack": ("pack kernels", run_pack),
    "verify": ("check a bundle", run_verify),
    "unpack": ("unpack a bundle", run_unpack),
}
