"""The part of 'jitgen doctor' that concerns the stores: where they are, whether they can be used, what they hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from jitgen import env
from jitgen.cache.admin import list_entries
from jitgen.cache.installed import installed_layers
from jitgen.cache.store import Store
from jitgen.cache.trust import check_trusted
from jitgen.cli_text import counted, size_text
from jitgen.doctor import ERROR, NOTE, OK, STORE, Finding
from jitgen.errors import CacheError

LEAST_FREE = 100 << 20  # bytes: a build needs a few MB; below this a user should know


def check_store() -> Iterator[Finding]:
    """The user store, then each prebuilt layer."""
    for path in (*env.prebuilt_dirs(), *installed_layers()):
        yield check_layer(path)
    if env.remote() is not None:
        uploads = "built kernels are sent there" if env.remote_upload() else "nothing is sent there"
        yield Finding(STORE, "remote", OK, f"{env.remote()}: asked before compiling, for {env.remote_timeout():g} s; {uploads}")
    root = env.cache_dir()
    if root is None:
        yield Finding(
            STORE, "user store", NOTE, "there is no home directory: kernels are compiled in each process",
            "Set JITGEN_CACHE_DIR to a directory that you can write.",
        )  # fmt: skip
        return
    yield from check_user_store(root)
    if env.is_frozen():
        yield Finding(STORE, "mode", NOTE, "frozen: a kernel that no layer and no store holds is an error")


def check_user_store(root: Path) -> Iterator[Finding]:
    """Whether kernels can be kept and loaded there."""
    untrusted = trust_problem(root)
    if untrusted:
        yield Finding(STORE, "user store", ERROR, untrusted)
        return
    problem = write_problem(root)
    if problem:
        yield Finding(
            STORE, "user store", NOTE, f"{root} cannot be written ({problem}): kernels are compiled in each process",
            "Set JITGEN_CACHE_DIR to a directory that you can write.",
        )  # fmt: skip
    else:
        yield Finding(STORE, "user store", OK, f"{root}: {contents(root)}")
    parent = nearest_existing(root)
    if os.statvfs(parent).f_flag & os.ST_NOEXEC:
        yield Finding(
            STORE, "file system", ERROR, f"{parent} is mounted noexec: no kernel can be loaded from it",
            "Set JITGEN_CACHE_DIR to a directory elsewhere.",
        )  # fmt: skip
    state = os.statvfs(parent)
    free = state.f_bavail * state.f_frsize
    if free < LEAST_FREE:
        yield Finding(STORE, "free space", NOTE, f"{size_text(free)} left at {parent}", "Free some, or move the store.")


def check_layer(path: Path) -> Finding:
    """A directory of JITGEN_PREBUILT."""
    if not path.is_dir():
        return Finding(STORE, "prebuilt", NOTE, f"{path} is not a directory", "Correct JITGEN_PREBUILT.")
    untrusted = trust_problem(path)
    if untrusted:
        return Finding(STORE, "prebuilt", ERROR, untrusted)
    if not Store(path).names():
        return Finding(STORE, "prebuilt", NOTE, f"{path} holds no kernels", "Copy the store of a run there.")
    return Finding(STORE, "prebuilt", OK, f"{path}: {contents(path)}")


def trust_problem(path: Path) -> str:
    """Why nothing may be loaded from a directory, with the command that mends it; empty if all is well."""
    try:
        check_trusted(path, "choose a directory that only you can write")
    except CacheError as error:
        return str(error)
    except OSError:
        return ""  # it does not exist yet
    return ""


def write_problem(root: Path) -> str:
    """Why a build cannot be kept in a store, found by trying; empty if it can, or if nothing is to be built."""
    if env.is_frozen():
        return ""
    try:
        Store(root).private_dir().rmdir()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def contents(root: Path) -> str:
    """Number and size of the kernels, and what is wrong with some."""
    entries = list_entries(root)
    damaged = sum(info.label == "damaged" for info in entries)
    text = f"{counted(len(entries), 'kernel')}, {size_text(sum(info.size for info in entries))}"
    return text + (f", {damaged} damaged (rebuilt when needed)" if damaged else "")


def nearest_existing(path: Path) -> Path:
    """The directory itself, or the lowest one above it that exists."""
    return next(p for p in (path, *path.parents) if p.exists())
