"""A layer: a store made to be shipped, with a stamp that says which jitgen generated its kernels."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from jitgen import __version__
from jitgen.cache.generator import generator_digest

STAMP = "layer.json"
FORMAT = 1


def make_stamp() -> str:
    """The text of a layer's stamp, for kernels that this jitgen generates."""
    stamp = {"format": FORMAT, "jitgen": __version__, "generator": generator_digest()}
    return json.dumps(stamp, indent=1, sort_keys=True) + "\n"


def read_stamp(root: Path) -> dict[str, str] | None:
    """The stamp of a layer; None where there is none, as in a store that was shipped as it was."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        stamp = json.loads((root / STAMP).read_bytes())
        return {name: str(stamp[name]) for name in ("jitgen", "generator")}
    return None


def make_readable(root: Path) -> None:
    """Let every user read a layer: unlike a user store it is there for others, and its owner alone may still write.

    Errors:  OSError.
    """
    os.chmod(root, 0o755)
    for name in ("index", STAMP):
        path = root / name
        if path.is_dir():
            os.chmod(path, 0o755)
            for alias in path.iterdir():
                os.chmod(alias, 0o644)
        elif path.exists():
            os.chmod(path, 0o644)
