"""Manifests: TOML files that say which kernels to prebuild, written by people (`[[kernel]]`) or by a recording (`[[request]]`).

    [[kernel]]
    variant = "models.gemma:softcap"      # module:name, path.py:name (from the manifest's directory), or a built-in name
    dtype = ["bfloat16", "float16"]       # lists are multiplied out
    head_dim = [128, 256]
    arch = ["9.0a", "8.0"]                # default: --arch

A `[[request]]` holds all of one kernel, its expressions included: it is built without the Python that defined it.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jitgen.errors import ManifestError

KERNEL_OPTIONS = (
    "variant", "dtype", "head_dim", "head_dim_v", "family", "arch", "q_len", "layout", "rows", "page_size", "captures",
)  # fmt: skip
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
LINE_LENGTH = 120  # columns up to which a value stays on one line


class Manifest(NamedTuple):
    """What one file asks for; `folder` is what its relative paths start from."""

    path: Path
    kernels: tuple[dict[str, Any], ...]
    requests: tuple[dict[str, Any], ...]

    @property
    def folder(self) -> Path:
        return self.path.resolve().parent


# ---- reading ------------------------------------------------------------------------------------------------------------


def read_manifest(path: Path) -> Manifest:
    """Read a manifest and check its form; what its values mean is checked when it is expanded.

    Errors:  ManifestError naming the file and what is wrong.
    """
    try:
        return parse_manifest(path.read_text("utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def parse_manifest(text: str, path: Path) -> Manifest:
    """The manifest that a text says; `path` is what messages and relative paths refer to."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ManifestError(f"{path} is not TOML: {error}.") from error
    unknown = sorted(set(found) - {"kernel", "request"})
    if unknown:
        raise ManifestError(f"{path} has {unknown[0]!r}. A manifest holds [[kernel]] and [[request]] tables.")
    tables = [found.get(name, []) for name in ("kernel", "request")]
    for name, table in zip(("kernel", "request"), tables, strict=True):
        if not isinstance(table, list) or not all(isinstance(item, dict) for item in table):
            raise ManifestError(f"{path}: write [[{name}]], in double brackets.")
    kernels, requests = tables
    for number, kernel in enumerate(kernels, start=1):
        _check_kernel(kernel, f"{path}: [[kernel]] {number}")
    each = [{**kernel, "variant": variant} for kernel in kernels for variant in _variants_of(kernel)]
    return Manifest(path, tuple(each), tuple(requests))


def _variants_of(kernel: Mapping[str, Any]) -> list[Any]:
    variant = kernel.get("variant", [])
    return variant if isinstance(variant, list) else [variant]


def _check_kernel(kernel: Mapping[str, Any], where: str) -> None:
    variants = _variants_of(kernel)
    if not variants or not all(isinstance(variant, str) for variant in variants):
        found = f"the variant {kernel['variant']!r}" if "variant" in kernel else "no variant"
        raise ManifestError(f'{where} has {found}. Write variant = "module:name", or a list of such names.')
    for name in kernel:
        if name not in KERNEL_OPTIONS:
            raise ManifestError(f"{where} has {name!r}. Options are {', '.join(KERNEL_OPTIONS)}.")
    for name in ("dtype", "head_dim"):
        if name not in kernel:
            raise ManifestError(f"{where} has no {name}: one value or a list.")


# ---- writing ------------------------------------------------------------------------------------------------------------


def request_text(request: Mapping[str, Any], title: str) -> str:
    """A `[[request]]` table with a comment that says what it is; arguments that have fields get a table each."""
    lines = ["[[request]]", *(f"# {line}" for line in title.splitlines())]
    arguments = request["arguments"]
    has_tables = bool(arguments) and all(isinstance(argument, Mapping) for argument in arguments)
    lines += [f"{name} = {toml_value(value)}" for name, value in request.items() if not (has_tables and name == "arguments")]
    for argument in arguments if has_tables else ():
        lines += ["[[request.arguments]]", *(f"{_toml_key(name)} = {toml_value(value)}" for name, value in argument.items())]
    return "\n".join(lines) + "\n"


def toml_value(value: Any, indent: int = 0) -> str:
    """A plain value as TOML; a list that is too long for its line gets one line for each item.

    Errors:  TypeError for what TOML cannot say.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return ("-inf" if value < 0 else "inf") if math.isinf(value) else "nan" if math.isnan(value) else repr(value)
    if isinstance(value, str):
        return _toml_string(value)
    if isinstance(value, Mapping):
        items = ", ".join(f"{_toml_key(name)} = {toml_value(item, indent)}" for name, item in value.items())
        return f"{{ {items} }}" if items else "{}"
    if isinstance(value, (list, tuple)):
        flat = [toml_value(item, indent + 2) for item in value]
        line = f"[{', '.join(flat)}]"
        if indent + len(line) <= LINE_LENGTH or not flat:
            return line
        pad = " " * (indent + 2)
        return "[\n" + "".join(f"{pad}{item},\n" for item in flat) + " " * indent + "]"
    raise TypeError(f"TOML cannot hold a {type(value).__name__}: {value!r}")


def _toml_key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _toml_string(name)


def _toml_string(text: str) -> str:
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(escapes.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '"'
