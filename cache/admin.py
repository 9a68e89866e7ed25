"""Looking after a store: listing, clearing, removing what crashes and old versions left, comparing two entries."""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from jitgen.cache import usage
from jitgen.cache.entry import ENTRY_NAME, MODULE, Corrupt, read_key, read_manifest, verify
from jitgen.cache.key import explain
from jitgen.cache.store import Store, discard
from jitgen.errors import CacheError

ABANDONED_AFTER = 24 * 3600  # seconds: no build takes a day; its process may run on another host, where we cannot look


class EntryInfo(NamedTuple):
    """One line of a listing."""

    name: str
    label: str
    arch: str
    size: int  # bytes of all files
    age: float  # seconds since it was built


def list_entries(root: Path) -> list[EntryInfo]:
    """What a store holds, newest first; a damaged entry is listed as such."""
    listed = []
    for name in Store(root).names():
        directory = root / name
        try:
            label = read_manifest(directory)["label"]
            arch = str(read_key(directory)["target"]["arch"])
        except (Corrupt, OSError, ValueError, KeyError, TypeError):
            label, arch = "damaged", "?"
        with suppress(OSError):
            listed.append(EntryInfo(name, label, arch, tree_size(directory), time.time() - directory.stat().st_mtime))
    return sorted(listed, key=lambda info: info.age)


def summary(root: Path) -> dict[str, object]:
    """What a store holds in numbers; leftovers are what collect_garbage looks through."""
    entries = list_entries(root)
    return {
        "root": str(root),
        "exists": root.is_dir(),
        "kernels": len(entries),
        "bytes": sum(info.size for info in entries),
        "leftovers": {
            "failed builds": len(_children(root / "failed")),
            "damaged kernels": len(_children(root / "corrupt")),
            "abandoned builds": sum(map(_is_abandoned, _children(root / "tmp"))),
        },
    }


def describe(root: Path, given: str) -> dict[str, object]:
    """All about one entry: label, age, target, files.

    Errors:  CacheError when it is not found, not unique or damaged.
    """
    directory = _resolve(root, given)
    try:
        manifest, key = read_manifest(directory), read_key(directory)
    except (Corrupt, OSError, ValueError) as error:
        raise CacheError(f"{directory} is damaged: {error}. Remove it: the next call builds it again.") from error
    return {
        "name": directory.name,
        "path": str(directory),
        "label": manifest["label"],
        "age": time.time() - directory.stat().st_mtime,
        "target": key["target"],
        "files": {name: size for name, (size, _) in sorted(manifest["files"].items())},
    }


class KernelStats(NamedTuple):
    """What one kernel cost and saved: builds and the seconds they took, loads by processes and the seconds they saved."""

    name: str
    label: str
    size: int  # bytes of all files, 0 where it is in none of the stores any more
    builds: int
    build_seconds: float
    loads: int
    saved_seconds: float


def stats(root: Path, layers: Iterable[Path] = ()) -> list[KernelStats]:
    """Use of every kernel of the user store and of layers, most seconds saved first.

    A load saves what the build took, as the kernel's manifest says.
    """
    places = [directory / name for directory in (root, *layers) for name in Store(directory).names()]
    known = {place.name: place for place in reversed(places)}
    counts = usage.read(root)
    found = []
    for name in sorted({*known, *counts}):
        count = counts.get(name, usage.Usage())
        label, size, seconds = "removed", 0, count.build_seconds / max(1, count.builds)
        if name in known:
            size = tree_size(known[name])
            with suppress(Corrupt):
                manifest = read_manifest(known[name])
                label, seconds = manifest["label"], float(manifest.get("seconds", 0.0)) or seconds
        saved = round(seconds * count.loads, 2)
        found.append(KernelStats(name, label, size, count.builds, count.build_seconds, count.loads, saved))
    return sorted(found, key=lambda kernel: (-kernel.saved_seconds, kernel.name))


def verify_entries(root: Path) -> Iterator[tuple[str, str]]:
    """Every entry with what is wrong with it; an empty text where all files are as its manifest says."""
    for name in Store(root).names():
        try:
            verify(root / name)
        except Corrupt as error:
            yield name, str(error)
        else:
            yield name, ""


def tree_size(directory: Path) -> int:
    """Bytes of all files below a directory."""
    total = 0
    for path in directory.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def collect_garbage(root: Path, *, older_than: float | None = None) -> list[Path]:
    """Remove abandoned builds, damaged entries, aliases of nothing and kept failures; return what was removed.

    With older_than (seconds), also entries built longer ago than that.
    """
    store = Store(root)
    removed = [path for path in _children(root / "tmp") if _is_abandoned(path)]
    removed += [*_children(root / "corrupt"), *_children(root / "failed")]
    if older_than is not None:
        removed += [root / info.name for info in list_entries(root) if info.age > older_than]
    for path in removed:
        discard(store, path)
    usage.compact(root)
    for path in (*_children(root / "index"), *_children(root / "locks")):
        if _is_dangling(root, path):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def clear(root: Path) -> int:
    """Remove every entry of a store and all that belongs to it; return the number of entries."""
    store = Store(root)
    names = store.names()
    for name in names:
        discard(store, root / name)
    for folder in ("corrupt", "failed", "index", "locks", "programs", "tmp"):
        discard(store, root / folder)
    (root / usage.LOG).unlink(missing_ok=True)
    return len(names)


def compare(root: Path, first: str, second: str) -> list[str]:
    """Lines that say why two entries are two: the parts of the key that differ, then the difference of the sources.

    An entry is given by its name, the beginning of its name or digest, or its path.
    Errors:  CacheError when one is not found, not unique, or damaged.
    """
    old, new = _resolve(root, first), _resolve(root, second)
    lines = explain(_key_of(old), _key_of(new))
    for path in sorted({*_sources(old), *_sources(new)}):
        texts = [(entry / path).read_text("utf-8").splitlines() if (entry / path).is_file() else [] for entry in (old, new)]
        lines += difflib.unified_diff(*texts, f"{old.name}/{path}", f"{new.name}/{path}", lineterm="", n=1)
    return lines


def _key_of(entry: Path) -> dict:
    try:
        return read_key(entry)
    except (OSError, ValueError) as e:
        raise CacheError(f"the key of {entry} cannot be read ({e}). 'jitgen cache verify' says what is damaged.") from e


def _resolve(root: Path, given: str) -> Path:
    if os.sep in given and Path(given).is_dir():
        return Path(given)
    names = Store(root).names()
    found = [name for name in names if name.startswith(given) or name.rpartition("-")[2].startswith(given)]
    if len(found) != 1:
        which = f"fits {len(found)} entries" if found else "is no entry"
        raise CacheError(f"{given!r} {which} of {root}. 'jitgen cache ls' lists them.")
    return root / found[0]


def _sources(entry: Path) -> Iterable[Path]:
    return [path.relative_to(entry) for path in entry.rglob("*") if path.suffix in (".cpp", ".cu", ".h", ".cuh")]


def _children(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _is_abandoned(build: Path) -> bool:
    """Whether the process that made a private directory is gone, or so long ago that it must be."""
    host, _, rest = build.name.rpartition("-")[0].rpartition("-")
    if host == os.uname().nodename and rest.isdigit() and not Path(f"/proc/{rest}").exists():
        return True
    with suppress(OSError):
        return time.time() - build.stat().st_mtime > ABANDONED_AFTER
    return False


def _is_dangling(root: Path, path: Path) -> bool:
    """Whether an alias belongs to no entry, or a lock was not used for so long that nobody holds it."""
    with suppress(OSError, UnicodeDecodeError):
        if path.parent.name == "locks":
            return time.time() - path.stat().st_mtime > ABANDONED_AFTER
        name = path.read_text("ascii").strip()
        return ENTRY_NAME.fullmatch(name) is None or not (root / name / MODULE).is_file()
    return False
