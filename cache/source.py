"""What the cache needs of its neighbours, as types: a rendered source, a builder, a way to show that one waits.

Imported by type checkers only: the definitions cost more time than the rest of a cache hit's imports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol


class Source(Protocol):
    """A rendered kernel.

    text is what is keyed; mapped_text is the same with line directives; includes holds the headers it reaches, by the
    path it names them by.
    """

    @property
    def text(self) -> str: ...

    @property
    def mapped_text(self) -> str: ...

    @property
    def includes(self) -> Mapping[str, str]: ...


# Fills a private directory with a module, its source and its build log; the name is the entry's.
Builder = Callable[[Source, str, Path], None]
# Shown while another process builds: takes a sentence about whose build it is.
Waiting = Callable[[str], AbstractContextManager[object]]
