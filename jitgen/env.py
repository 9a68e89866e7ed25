"""The one reader of environment variables: every variable, its allowed values, its default, its meaning.

Values are read at the moment of use and parsed strictly: a value that is not allowed is an EnvError, never ignored.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from jitgen.errors import EnvError
from jitgen.records import record


@record
class Variable:
    """One environment variable, as documented in the README."""

    name: str
    values: str
    default: str
    meaning: str


VARIABLES = (
    Variable("JITGEN_CACHE_DIR", "path", "$XDG_CACHE_HOME/jitgen or ~/.cache/jitgen", "the user store"),
    Variable("JITGEN_MODE", "auto, frozen", "auto", "frozen never compiles: a kernel that is not stored is an error"),
    Variable("JITGEN_PREBUILT", "paths joined by ':'", "none", "read-only directories searched before the user store"),
    Variable("JITGEN_RECORD", "path", "none", "file to which every kernel asked for is added, for 'jitgen prebuild'"),
    Variable("JITGEN_REMOTE", "URL", "none", "a layer for a fleet, through fsspec: s3://, gs://, file:// and others"),
    Variable("JITGEN_REMOTE_UPLOAD", "0, 1", "0", "add what is built here to the remote layer"),
    Variable("JITGEN_REMOTE_TIMEOUT", "seconds", "10", "the longest wait for the remote layer, after which it is left alone"),
    Variable("JITGEN_PROGRESS", "auto, on, off", "auto", "progress line while compiling; auto: only on a terminal"),
    Variable("JITGEN_LOG", "debug, info, warning, off", "off", "print jitgen's log to stderr from this level on"),
    Variable("JITGEN_LINE_MAP", "0, 1", "1", "compiler messages name the template's lines; 0 when profiling"),
    Variable("JITGEN_CXX", "program", "g++, c++ or clang++ on PATH", "the C++ compiler"),
    Variable("JITGEN_NVCC", "program", "the CUDA toolkit's", "nvcc; the toolkit is the one it belongs to"),
    Variable("CUDA_HOME", "path", "found from nvcc", "root of the CUDA toolkit (CUDA_PATH is read too)"),
    Variable("JITGEN_CUDA_ARCH", "like 8.0 or 9.0a", "the device's", "compile CUDA kernels for this architecture"),
    Variable("JITGEN_CPU_ISA", "auto, amx, avx512, avx2, portable", "auto", "instruction set of CPU kernels"),
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
    path = _expanded(name, given)
    if not path.is_absolute():
        raise EnvError(f"{name}={given!r} is a relative path. Use an absolute one: it must not depend on where you start.")
    return path


def _expanded(name: str, given: str) -> Path:
    try:
        return Path(given).expanduser()
    except RuntimeError:
        raise EnvError(f"{name}={given!r} begins with a home directory that is not known. Write the path in full.") from None


def cache_dir() -> Path | None:
    """The user store: JITGEN_CACHE_DIR, else the XDG cache directory, else ~/.cache; None without a full path to a home."""
    given = _path("JITGEN_CACHE_DIR")
    if given is not None:
        return given
    xdg = _text("XDG_CACHE_HOME")
    if xdg is not None and os.path.isabs(xdg):
        return Path(xdg) / "jitgen"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / ".cache" / "jitgen" if home.is_absolute() else None


def is_frozen() -> bool:
    """Whether compiling is forbidden (JITGEN_MODE=frozen)."""
    return _choice("JITGEN_MODE", ("auto", "frozen"), "auto") == "frozen"


def prebuilt_dirs() -> tuple[Path, ...]:
    """Directories of prebuilt kernels, in look-up order."""
    given = _text("JITGEN_PREBUILT")
    return tuple(_expanded("JITGEN_PREBUILT", part) for part in given.split(os.pathsep) if part) if given else ()


def record() -> Path | None:
    """The file that kernels are recorded in."""
    return _path("JITGEN_RECORD")


def remote() -> str | None:
    """URL of the remote layer, without a slash at its end."""
    given = _text("JITGEN_REMOTE")
    if given is not None and not re.match(r"[a-z][a-z0-9+.-]*://.", given):
        raise EnvError(f"JITGEN_REMOTE={given!r} is not a URL. Use one like s3://bucket/kernels or file:///srv/kernels.")
    return given.rstrip("/") if given else None


def remote_upload() -> bool:
    """Whether builds go to the remote layer."""
    return _choice("JITGEN_REMOTE_UPLOAD", ("0", "1"), "0", {"off": "0", "on": "1"}) == "1"


def remote_timeout() -> float:
    """Seconds that one exchange with the remote layer may take."""
    given = _text("JITGEN_REMOTE_TIMEOUT") or "10"
    if not re.fullmatch(r"\d+(\.\d+)?", given) or float(given) <= 0:
        raise EnvError(f"JITGEN_REMOTE_TIMEOUT={given!r} is not a number of seconds. Use one like 10 or 2.5.")
    return float(given)


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
    """Instruction set of CPU kernels: auto, amx, avx512, avx2 or portable."""
    return _choice("JITGEN_CPU_ISA", ("auto", "amx", "avx512", "avx2", "portable"), "auto", {"0": "portable"})
