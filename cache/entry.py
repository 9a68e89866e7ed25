"""Entry: one directory with a module, what it was made from, and a manifest of all of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from jitgen.cache.key import digest, encode

MODULE = "module.so"
KEY = "key.json"
LOG = "build.log"
MANIFEST = "manifest.json"

ENTRY_NAME = re.compile(r"[a-z][a-z0-9_]*-[0-9a-f]{32}")


class Corrupt(Exception):
    """An entry is not what its manifest says; the message says what differs."""


def seal(directory: Path, name: str, key: Mapping[str, object], label: str, seconds: float = 0.0) -> None:
    """Complete an entry: write its key and, last, the manifest over all files; make everything durable.

    `seconds` is what the build took. Files become readable by others: whether they may reach them is the store's mode.
    Errors:  OSError as from writing.
    """
    (directory / KEY).write_text(json.dumps(key, indent=1, sort_keys=True) + "\n")
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            os.chmod(path, 0o755 if path.name == MODULE else 0o644)
            data = path.read_bytes()
            files[path.relative_to(directory).as_posix()] = [len(data), hashlib.sha256(data).hexdigest()]
            sync(path)
        else:
            os.chmod(path, 0o755)
    os.chmod(directory, 0o755)
    manifest = {"entry": name, "label": label, "seconds": round(seconds, 2), "files": files}
    # the manifest carries its own digest, so that a damaged one is noticed even where it still parses
    manifest["self"] = digest(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    os.chmod(directory / MANIFEST, 0o644)
    sync(directory / MANIFEST)
    sync(directory)


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(directory: Path) -> dict:
    """The manifest of an entry.

    Errors:  Corrupt when it is missing, does not parse, or was altered.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        stated = manifest.pop("self")
        encode(manifest)
        files = {name: (int(size), str(sha)) for name, (size, sha) in manifest["files"].items()}
    except FileNotFoundError:
        raise Corrupt(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(f"{MANIFEST} cannot be read ({error})") from error
    if digest(manifest) != stated or manifest["entry"] != directory.name:
        raise Corrupt(f"{MANIFEST} was altered or belongs to another entry")
    return {**manifest, "files": files}


def verify(directory: Path, only: Collection[str] | None = None) -> dict:
    """Compare the files of an entry, or only some of them, with the manifest and return the manifest.

    Errors:  Corrupt naming the first file that differs.
    Cost:    reads the files once, about 0.1 ms for a module of 100 kB.
    """
    manifest = read_manifest(directory)
    files = manifest["files"]
    if MODULE not in files or KEY not in files:
        raise Corrupt(f"{MANIFEST} does not list {MODULE} and {KEY}")
    for name in files if only is None else only:
        size, sha = files[name]
        try:
            data = (directory / name).read_bytes()
        except OSError as error:
            raise Corrupt(f"{name} cannot be read ({error.strerror})") from error
        if len(data) != size:
            raise Corrupt(f"{name} has {len(data)} bytes, its manifest says {size}")
        if hashlib.sha256(data).hexdigest() != sha:
            raise Corrupt(f"{name} differs from its manifest's SHA-256")
    return manifest


def read_key(directory: Path) -> dict:
    """The key of an entry in clear.

    Errors:  OSError, ValueError when it cannot be read.
    """
    return json.loads((directory / KEY).read_text())
