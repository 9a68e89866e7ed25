"""Where jitgen's own files are: the templates, and the directory that kernels are kept in."""

from __future__ import annotations

import os
from pathlib import Path

from jitgen import env
from jitgen.errors import TemplatesMissing


def template_dir() -> Path:
    """Directory of the templates: inside the package when installed, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for root in (here, here.parent):
        if (root / "kernel_templates" / "attention").is_dir():
            return root / "kernel_templates"
    raise TemplatesMissing(searched=(here, here.parent))


def package_dir() -> Path:
    """Directory of jitgen's Python modules."""
    return Path(__file__).resolve().parent


def cache_dir() -> Path | None:
    """The user store; None where the environment names none and there is no home directory."""
    return env.cache_dir()


def make_private_dir(path: Path) -> Path:
    """Create a directory, and those above it, that only this user may enter; leave an existing one as it is.

    Errors:  OSError as from mkdir.
    """
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass  # another process was faster
    return path
