"""A builder that compiles nothing, for tests of the cache: its modules are the source's text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from jitgen.cache import Request

TARGET = {"kind": "cpu", "arch": "x86_64", "flags": ("-O3",), "compiler": "g++ 12", "toolkit": ""}


@dataclasses.dataclass(frozen=True)
class FakeSource:
    text: str = "int kernel;\n"
    mapped_text: str = "int kernel;\n"
    includes: Mapping[str, str] = dataclasses.field(default_factory=dict)


class FakeBuilder:
    """Writes what a build leaves behind, and counts how often it was asked to."""

    def __init__(self, before: Callable[[Path], None] | None = None) -> None:
        self.num_builds = 0
        self._before = before

    def __call__(self, source: FakeSource, name: str, directory: Path) -> None:
        self.num_builds += 1
        if self._before is not None:
            self._before(directory)
        (directory / "kernel.cpp").write_text(source.text)
        (directory / "build.log").write_text("")
        (directory / "module.so").write_bytes(b"\x7fELF" + source.text.encode() * 100)


def request(source: FakeSource | None = None, *, spec: str = "spec", target: Mapping[str, object] = TARGET) -> Request:
    """A kernel that renders to the given source."""
    return Request("cpu", "fake kernel", spec, target, lambda: source or FakeSource())
