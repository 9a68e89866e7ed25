"""A lock between processes, on a file: the system's own, which is given up when its holder dies."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path


class FileLock:
    """The lock of one file, which is created and stays. (The package filelock takes 30 ms to import before a build begins.)"""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def take(self) -> bool:
        """Take the lock; False while another holds it.

        Errors:  OSError when the file cannot be made, or its file system has no locks.
        """
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.utime(handle)  # in use: jitgen.cache.admin takes old ones away
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise
        self._handle = handle
        return True

    def give_up(self) -> None:
        """Let others have it."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
