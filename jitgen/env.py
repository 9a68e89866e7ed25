"""The one reader of environment variables: every variable, its allowed values, its default, its meaning.

Values are read at the moment of use and parsed strictly: a value that is not allowed is an EnvError, never ignored.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from jitgen.errors import EnvError


class Variable(NamedTuple):
    """One environment variable, as documented in the README."""

    name: str
    values: str
    default: str
    meaning: str


VARIABLES = (
    Variable("JITGEN_CACHE_DIR", "path", "$XDG_CACHE_HOME/jitgen or ~/.cache/jitgen", "the user store"),
    Variable("JITGEN_MODE", "auto, frozen", "auto", "frozen never compiles: a kernel that is not stored is an error"),
    Variable("JITGEN_PREBUILT", "paths joined by ':'", "none", "read-only directories searched before the user store"),
    Variable("JITGEN_PROGRESS", "auto, on, off", "auto", "progress line while compiling; auto: only on a terminal"),
    Variable("JITGEN_LOG", "debug, info, warning, off", "off", "print jitgen's log to stderr from this level on"),
    Variable("JITGEN_LINE_MAP", "0, 1", "1", "compiler messages name the template's lines; 0 when profiling"),
    Variable("JITGEN_CXX", "program", "g++, c++ or clang++ on PATH", "the C++ compiler"),
    Variable("JITGEN_NVCC", "program", "the CUDA toolkit's", "nvcc; the toolkit is the one it belongs to"),
    Variable("CUDA_HOME", "path", "found from nvcc", "root of the CUDA toolkit (CUDA_PATH is read too)"),
    Variable("JITGEN_CUDA_ARCH", "like 8.0 or 9.0a", "the device's", "compile CUDA kernels for this architecture"),
    Variable("JITGEN_CPU_ISA", "auto, avx512, avx2, portable", "auto", "instruction set of CPU kernels"),
)


def _text(name: str) -> str | None:
    value = os.environ.get(name, "").strip()
    return value or None


def _choice(name: str, choices: tuple[str, ...], default: str, aliases: dict[str, str] | None = None) -> str:
    given = _text(name)
    if given is None:
        return default
    value = (aliases or {}).get(given.lower(), given.lower())
    if value not in choices:
        raise EnvError(f"{name}={given!r} is not allowed. Use {', '.join(choices[:-1])} or {choices[-1]}.")
    return value


def _path(name: str) -> Path | None:
    given = _text(name)
    if given is None:
        return None
    path = Path(given).expanduser()
    if not path.is_absolute():
        raise EnvError(f"{name}={given!r} is a relative path. Use an absolute one: it must not depend on where you start.")
    return path


def cache_dir() -> Path | None:
    """The user store: JITGEN_CACHE_DIR, else the XDG cache directory, else ~/.cache; None where there is no home."""
    given = _path("JITGEN_CACHE_DIR")
    if given is not None:
        return given
    xdg = _text("XDG_CACHE_HOME")
    if xdg is not None and os.path.isabs(xdg):
        return Path(xdg) / "jitgen"
    try:
        return Path.home() / ".cache" / "jitgen"
    except RuntimeError:
        return None


def is_frozen() -> bool:
    """Whether compiling is forbidden (JITGEN_MODE=frozen)."""
    return _choice("JITGEN_MODE", ("auto", "frozen"), "auto") == "frozen"


def prebuilt_dirs() -> tuple[Path, ...]:
    """Directories of prebuilt kernels, in look-up order."""
    given = _text("JITGEN_PREBUILT")
    return tuple(Path(part).expanduser() for part in given.split(os.pathsep) if part) if given else ()


def progress() -> str:
    """When to show progress: auto, on or off."""
    return _choice("JITGEN_PROGRESS", ("auto", "on", "off"), "auto", {"0": "off", "1": "on"})


def log_level() -> str:
    """Level from which the log goes to stderr: debug, info, warning, or off."""
    return _choice("JITGEN_LOG", ("debug", "info", "warning", "off"), "off", {"0": "off"})


def line_map() -> bool:
    """Whether generated sources carry #line directives that point at the templates."""
    return _choice("JITGEN_LINE_MAP", ("0", "1"), "1", {"off": "0", "on": "1"}) == "1"


def cxx() -> str | None:
    """C++ compiler asked for, a name or a path."""
    return _text("JITGEN_CXX")


def nvcc() -> str | None:
    """nvcc asked for, a name or a path."""
    return _text("JITGEN_NVCC")


def cuda_home() -> Path | None:
    """Toolkit root asked for."""
    return _path("CUDA_HOME") or _path("CUDA_PATH")


def cuda_arch() -> str | None:
    """Architecture to compile CUDA kernels for, like '8.0' or '9.0a'; None: the device's own."""
    given = _text("JITGEN_CUDA_ARCH")
    if given is not None and not re.fullmatch(r"[1-9][0-9]?\.[0-9][af]?", given):
        raise EnvError(f"JITGEN_CUDA_ARCH={given!r} is not an architecture. Use one like 8.0, 9.0 or 9.0a.")
    return given


def cpu_isa() -> str:
    """Instruction set of CPU kernels: auto, avx512, avx2 or portable."""
    return _choice("JITGEN_CPU_ISA", ("auto", "avx512", "avx2", "portable"), "auto", {"0": "portable"})
