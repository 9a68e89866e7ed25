"""Digest of the generator itself: a changed template, header or module must not find kernels of the old one."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from jitgen import paths

# Modules that cannot change a rendered source; all others count, since an alias missed costs only a rendering.
NOT_GENERATING = {"doctor", "progress", "build", "memo", "toolchain", "__main__", "op", "env", "errors", "show", "demo"}
NOT_GENERATING_PREFIXES = ("cli", "doctor_", "show_")  # the command line


@lru_cache(maxsize=1)
def generator_digest() -> str:
    """Digest of all templates, headers and generating modules, read once in a process.

    Cost:    about 1 ms: some 40 files, their contents and relative names; never their times.
    """
    total = hashlib.sha256()
    for root, path in _generator_files():
        name = path[len(root) + 1 :].encode()
        with open(path, "rb") as stream:
            data = stream.read()
        total.update(b"%d:%s%d:" % (len(name), name, len(data)))
        total.update(data)
    return total.hexdigest()


def _generator_files() -> list[tuple[str, str]]:
    templates, package = str(paths.template_dir()), str(paths.package_dir())
    found = [(templates, path) for path in _files_below(templates, (".jinja", ".h", ".cuh"))]
    for item in sorted(os.scandir(package), key=lambda item: item.name):
        stem, _, suffix = item.name.partition(".")
        if suffix == "py" and stem not in NOT_GENERATING and not stem.startswith(NOT_GENERATING_PREFIXES):
            found.append((package, item.path))
    return found


def _files_below(root: str | Path, suffixes: tuple[str, ...]) -> list[str]:
    found = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories.sort()
        found += [os.path.join(directory, name) for name in sorted(names) if name.endswith(suffixes)]
    return found
