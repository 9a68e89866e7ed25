"""Prebuilt layers that installed Python packages bring: those with an entry point in the group ``jitgen.prebuilt``.

Nothing is imported: an entry point names a package, and the layer is the directory of that package.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

from jitgen.memo import remembered

GROUP = "jitgen.prebuilt"
_NONE = "none"  # a memo must say something


def installed_layers() -> tuple[Path, ...]:
    """Directories of the layers, in the order of sys.path.

    Cost:    once in a process, a look at each directory of sys.path; what is in one is remembered while it is unchanged.
    """
    return _layers(tuple(sys.path))


@lru_cache(maxsize=4)
def _layers(search_path: tuple[str, ...]) -> tuple[Path, ...]:
    found: list[Path] = []
    for place in dict.fromkeys(search_path):
        if place and os.path.isdir(place):
            with suppress(OSError):
                named = remembered("prebuilt layers", Path(place), partial(_packages, place))
                found += [path for package in named.split() if package != _NONE for path in _directories(place, package)]
    return tuple(dict.fromkeys(found))


def _packages(place: str) -> str:
    """Names of the packages that distributions in a directory of sys.path register, separated by blanks."""
    named: list[str] = []
    for item in sorted(os.scandir(place), key=lambda item: item.name):
        if item.name.endswith((".dist-info", ".egg-info")):
            with suppress(OSError, UnicodeDecodeError):
                named += _registered(Path(item.path, "entry_points.txt").read_text("utf-8"))
    return " ".join(named) or _NONE


def _registered(text: str) -> list[str]:
    if GROUP not in text:
        return []
    from configparser import ConfigParser, Error

    parser = ConfigParser(delimiters=("=",), interpolation=None)
    try:
        parser.read_string(text)
    except Error:
        return []  # whose distribution it is has other problems
    return [value.strip() for _, value in parser.items(GROUP)] if parser.has_section(GROUP) else []


def _directories(place: str, package: str) -> list[Path]:
    """Where a package is: beside its distribution, else wherever Python finds it (an editable installation)."""
    if not all(part.isidentifier() for part in package.split(".")):
        return []
    beside = Path(place, *package.split("."))
    if beside.is_dir():
        return [beside]
    from importlib.util import find_spec

    with suppress(ImportError, ValueError):
        spec = find_spec(package)
        return [Path(path) for path in spec.submodule_search_locations or ()] if spec else []
    return []
