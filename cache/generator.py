"""Digest of the generator itself: a changed template, header or module must not find kernels of the old one."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache, partial

from jitgen import paths
from jitgen.memo import recalled

# Modules that cannot change a rendered source; all others count, since an alias missed costs only a rendering.
NOT_GENERATING = {
    *("doctor", "progress", "build", "memo", "toolchain", "__main__", "op", "env", "errors", "show", "demo"),
    *("events", "manifest", "portable", "recording", "loader"),
}
NOT_GENERATING_PREFIXES = ("cli", "doctor_", "show_", "prebuild")  # the command line and what ships kernels


@lru_cache(maxsize=1)
def generator_digest() -> str:
    """Digest of all templates, headers and generating modules: their contents and relative names, never their times.

    Cost:    once in a process; 0.4 ms for a look at some 100 files, or 2 ms to read them when one of them is not as it
             was. The time of the last change (ctime) cannot be set, so an edit never goes unnoticed.
    """
    files = _generator_files()
    states = (f"{f.path}\0{s.st_ino}\0{s.st_size}\0{s.st_mtime_ns}\0{s.st_ctime_ns}" for _, f in files for s in (f.stat(),))
    return recalled("\n".join(("generator", *states)), partial(_read_digest, files))


def _read_digest(files: list[tuple[str, os.DirEntry[str]]]) -> str:
    total = hashlib.sha256()
    for root, file in files:
        name = file.path[len(root) + 1 :].encode()
        with open(file.path, "rb") as stream:
            data = stream.read()
        total.update(b"%d:%s%d:" % (len(name), name, len(data)))
        total.update(data)
    return total.hexdigest()


def _generator_files() -> list[tuple[str, os.DirEntry[str]]]:
    templates, package = str(paths.template_dir()), str(paths.package_dir())
    found = [(templates, file) for file in _files_below(templates, (".jinja", ".h", ".cuh"))]
    for file in sorted(os.scandir(package), key=lambda file: file.name):
        stem, _, suffix = file.name.partition(".")
        if suffix == "py" and stem not in NOT_GENERATING and not stem.startswith(NOT_GENERATING_PREFIXES):
            found.append((package, file))
    return found


def _files_below(root: str, suffixes: tuple[str, ...]) -> list[os.DirEntry[str]]:
    found = []
    for item in sorted(os.scandir(root), key=lambda item: item.name):
        if item.is_dir():
            found += _files_below(item.path, suffixes)
        elif item.name.endswith(suffixes):
            found.append(item)
    return found
