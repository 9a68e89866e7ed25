"""Store: a directory of entries, found by name or by the alias of the kernel they were built for."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from jitgen import paths
from jitgen.cache import entry as entries
from jitgen.cache.entry import ENTRY_NAME, Corrupt
from jitgen.cache.trust import check_trusted
from jitgen.cache.warned import warn


class Store:
    """A directory of entries.

    Layout: `<family>-<digest>/` entries; `index/<alias>` names of entries; `tmp/` builds under way; `locks/`;
    `failed/` sources and logs of failed builds; `corrupt/` damaged entries, moved aside; `programs/` memos.
    A layer is a store that is only read: nothing in it is mended.
    """

    def __init__(self, root: Path, *, is_layer: bool = False, kind: str = "") -> None:
        self.root = root
        self.is_layer = is_layer
        self.kind = kind or ("layer" if is_layer else "store")
        self._verified: dict[str, Path] = {}
        self._is_trusted = False

    def find(self, name: str) -> Path | None:
        """Path of the module of an entry, checked against its manifest on first use in this process; None if absent.

        A damaged entry counts as absent: in the user store it is moved aside, with a warning.
        Errors:  CacheError when another user could have written the store or the entry.
        """
        directory = self.root / name
        if not directory.is_dir():
            self._verified.pop(name, None)
            return None
        if name in self._verified:
            return self._verified[name]
        self._check_trust()
        remedy = "remove it"
        try:
            check_trusted(directory, remedy)
            entries.verify(directory, (entries.MODULE, entries.KEY))  # what is used; sources are 'jitgen cache verify's
            module = directory / entries.MODULE
            check_trusted(module, remedy)
        except FileNotFoundError:
            return None  # removed by another process while we looked
        except Corrupt as error:
            if directory.is_dir():
                self._set_aside(directory, str(error))
            return None
        self._verified[name] = module
        return module

    def find_alias(self, alias: str) -> Path | None:
        """Path of the module that an alias stands for, or None."""
        try:
            name = (self.root / "index" / alias).read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return self.find(name) if ENTRY_NAME.fullmatch(name) else None

    def remember_alias(self, alias: str, name: str) -> None:
        """Let an alias stand for an entry. An alias is a shortcut, so a failure to write it is no error."""
        if ENTRY_NAME.fullmatch(name) is None:
            raise ValueError(f"{name!r} is not the name of an entry")
        try:
            index = paths.make_private_dir(self.root / "index")
            handle, temporary = tempfile.mkstemp(prefix=".", dir=index)
            try:
                with os.fdopen(handle, "w") as stream:
                    stream.write(name + "\n")
                os.replace(temporary, index / alias)
            except OSError:
                os.unlink(temporary)
        except OSError:
            return

    def private_dir(self) -> Path:
        """A new empty directory in this store's file system, for one build.

        Errors:  OSError when the store cannot be written; CacheError when another user could write it.
        """
        paths.make_private_dir(self.root)
        self._check_trust()
        tmp = paths.make_private_dir(self.root / "tmp")
        return Path(tempfile.mkdtemp(prefix=f"{os.uname().nodename}-{os.getpid()}-", dir=tmp))

    def keep_failed(self, directory: Path, name: str) -> Path:
        """Move the directory of a failed build to where the user can look at it, in place of an earlier one."""
        kept = paths.make_private_dir(self.root / "failed") / name
        discard(self, kept)
        try:
            os.rename(directory, kept)
        except OSError:
            return directory
        return kept

    def names(self) -> list[str]:
        """Names of all entries, sorted."""
        try:
            return sorted(name for name in os.listdir(self.root) if ENTRY_NAME.fullmatch(name))
        except OSError:
            return []

    def _check_trust(self) -> None:
        if not self._is_trusted:
            variable = "JITGEN_PREBUILT" if self.is_layer else "JITGEN_CACHE_DIR"
            check_trusted(self.root, f"set {variable} to a directory that only you can write")
            self._is_trusted = True

    def _set_aside(self, directory: Path, reason: str) -> None:
        message = f"cache entry {directory} is damaged: {reason}. "
        if self.is_layer:
            warn(message + "It is not used; replace this prebuilt layer.")
            return
        try:
            aside = paths.make_private_dir(self.root / "corrupt") / f"{directory.name}-{time.time_ns()}"
            os.rename(directory, aside)
            message += f"It was moved to {aside} and will be built again."
        except OSError as error:
            message += f"It could not be moved aside ({error.strerror}) and is not used."
        warn(message)


def discard(store: Store, directory: Path) -> None:
    """Remove a directory: rename it out of sight first, so that nobody sees half of it."""
    if not directory.exists():
        return
    try:
        trash = Path(tempfile.mkdtemp(prefix="trash-", dir=paths.make_private_dir(store.root / "tmp")))
        os.rename(directory, trash / directory.name)
    except OSError:
        trash = directory
    shutil.rmtree(trash, ignore_errors=True)
