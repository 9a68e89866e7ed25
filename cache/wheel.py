"""A bundle as a wheel: a Python package that holds a layer and registers it, so that installing it is all there is to do."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from pathlib import Path

from jitgen import __version__
from jitgen.cache.archive import Member
from jitgen.cache.installed import GROUP
from jitgen.errors import BundleError

LAYER = "layer"  # directory in the package
_NAME = re.compile(r"([a-z][a-z0-9_]*)-(\d+(?:\.\d+)*)(?:-py3-none-\w+)?\.whl")


def wheel_path(out: Path) -> Path:
    """The path of a wheel that may be given as name-version.whl, without the tags that pip wants.

    Errors:  BundleError.
    """
    parsed = _NAME.fullmatch(out.name)
    if parsed is None:
        raise BundleError(f"{out.name} is no name for a wheel. Use name-version.whl, like my_kernels-1.0.whl.")
    return out.with_name(f"{parsed[1]}-{parsed[2]}-py3-none-linux_{os.uname().machine}.whl")


def wheel_members(out: Path, layer: list[Member]) -> list[Member]:
    """All files of a wheel whose package holds a layer."""
    name, version = out.name.split("-")[:2]
    info = f"{name}-{version}.dist-info"
    tag = out.stem.split("-", 2)[2]
    texts = {
        f"{name}/__init__.py": '"""Kernels for jitgen, found by it once this package is installed."""\n',
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: Prebuilt kernels for jitgen {__version__}\n"
            f"Requires-Dist: jitgen=={__version__}\n"
        ),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: jitgen {__version__}\nRoot-Is-Purelib: false\nTag: {tag}\n",
        f"{info}/entry_points.txt": f"[{GROUP}]\n{name} = {name}.{LAYER}\n",
    }
    members = [member._replace(name=f"{name}/{LAYER}/{member.name}") for member in layer]
    members += [Member(path, text.encode()) for path, text in texts.items()]
    lines = [f"{member.name},sha256={_hash(member.data)},{len(member.data)}" for member in members]
    record = "\n".join([*sorted(lines), f"{info}/RECORD,,"]) + "\n"
    return [*members, Member(f"{info}/RECORD", record.encode())]


def _hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
