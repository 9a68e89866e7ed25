"""jitgen: attention variants written in Python, compiled just in time.

Names are imported when they are first used: ``import jitgen`` loads neither torch nor the generator.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jitgen import reference
    from jitgen.api import attention
    from jitgen.errors import JitgenError
    from jitgen.flex import flex_attention
    from jitgen.masks import and_masks, or_masks, sorted, static
    from jitgen.norms import OnlineNorm
    from jitgen.rows import row_cumsum, row_max, row_sum
    from jitgen.variant import Variant

_HOME = {
    "attention": "jitgen.api",
    "flex_attention": "jitgen.flex",
    "JitgenError": "jitgen.errors",
    "and_masks": "jitgen.masks",
    "or_masks": "jitgen.masks",
    "sorted": "jitgen.masks",
    "static": "jitgen.masks",
    "OnlineNorm": "jitgen.norms",
    "row_cumsum": "jitgen.rows",
    "row_max": "jitgen.rows",
    "row_sum": "jitgen.rows",
    "Variant": "jitgen.variant",
}
_MODULES = ("reference", "errors")

__all__ = [
    "JitgenError",
    "OnlineNorm",
    "Variant",
    "and_masks",
    "attention",
    "errors",
    "flex_attention",
    "or_masks",
    "reference",
    "row_cumsum",
    "row_max",
    "row_sum",
    "sorted",
    "static",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"jitgen.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'jitgen' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*dict.fromkeys((*globals(), *__all__))]
