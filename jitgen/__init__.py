"""jitgen: attention variants written in Python, compiled just in time.

Names are imported when they are first used: ``import jitgen`` loads neither torch nor the generator.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jitgen import prebuild, reference, sampling
    from jitgen.api import attention
    from jitgen.block_sparse import BlockSparse, block_sparse_attention
    from jitgen.errors import JitgenError
    from jitgen.events import on_event
    from jitgen.flex import flex_attention
    from jitgen.kv_append import append
    from jitgen.masks import and_masks, or_masks, sorted, static
    from jitgen.norms import OnlineNorm
    from jitgen.rotary import Rope, rope
    from jitgen.rows import row_cumsum, row_max, row_sum
    from jitgen.sampling import apply_penalties, apply_token_bitmask, mask_logits, process_logits, renorm, sample, softmax
    from jitgen.sampling_processors import Penalties
    from jitgen.sampling_speculative import speculative_verify
    from jitgen.serving import paged_attention, ragged_attention
    from jitgen.serving_cascade import Cascade, CascadeLevel
    from jitgen.serving_lists import PageTable
    from jitgen.serving_masks import bit_mask, pack_mask, tree_mask
    from jitgen.serving_merge import merge_state, merge_states
    from jitgen.serving_plan import Plan
    from jitgen.serving_selection import Selection
    from jitgen.variant import Variant

_HOME = {
    "attention": "jitgen.api",
    "flex_attention": "jitgen.flex",
    "JitgenError": "jitgen.errors",
    "and_masks": "jitgen.masks",
    "on_event": "jitgen.events",
    "or_masks": "jitgen.masks",
    "sorted": "jitgen.masks",
    "static": "jitgen.masks",
    "OnlineNorm": "jitgen.norms",
    "row_cumsum": "jitgen.rows",
    "row_max": "jitgen.rows",
    "row_sum": "jitgen.rows",
    "Variant": "jitgen.variant",
    "BlockSparse": "jitgen.block_sparse",
    "block_sparse_attention": "jitgen.block_sparse",
    "Cascade": "jitgen.serving_cascade",
    "CascadeLevel": "jitgen.serving_cascade",
    "Selection": "jitgen.serving_selection",
    "bit_mask": "jitgen.serving_masks",
    "pack_mask": "jitgen.serving_masks",
    "tree_mask": "jitgen.serving_masks",
    "merge_state": "jitgen.serving_merge",
    "merge_states": "jitgen.serving_merge",
    "PageTable": "jitgen.serving_lists",
    "Plan": "jitgen.serving_plan",
    "paged_attention": "jitgen.serving",
    "append": "jitgen.kv_append",
    "Rope": "jitgen.rotary",
    "rope": "jitgen.rotary",
    "ragged_attention": "jitgen.serving",
    "Penalties": "jitgen.sampling_processors",
    "apply_penalties": "jitgen.sampling",
    "apply_token_bitmask": "jitgen.sampling",
    "mask_logits": "jitgen.sampling",
    "process_logits": "jitgen.sampling",
    "renorm": "jitgen.sampling",
    "sample": "jitgen.sampling",
    "softmax": "jitgen.sampling",
    "speculative_verify": "jitgen.sampling_speculative",
}
_MODULES = ("reference", "errors", "prebuild", "sampling")

__all__ = [
    "BlockSparse",
    "Cascade",
    "CascadeLevel",
    "JitgenError",
    "OnlineNorm",
    "PageTable",
    "Penalties",
    "Plan",
    "Rope",
    "Selection",
    "Variant",
    "and_masks",
    "append",
    "apply_penalties",
    "apply_token_bitmask",
    "attention",
    "bit_mask",
    "block_sparse_attention",
    "errors",
    "flex_attention",
    "mask_logits",
    "merge_state",
    "merge_states",
    "on_event",
    "or_masks",
    "pack_mask",
    "paged_attention",
    "prebuild",
    "process_logits",
    "ragged_attention",
    "reference",
    "renorm",
    "rope",
    "row_cumsum",
    "row_max",
    "row_sum",
    "sample",
    "sampling",
    "softmax",
    "sorted",
    "speculative_verify",
    "static",
    "tree_mask",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"jitgen.{name}")
    if name in ("cache", "kernel_templates"):
        return _installed(name)
    if name not in _HOME:
        raise AttributeError(f"module 'jitgen' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def _installed(name: str) -> Any:
    """A part that lies beside the package in a checkout, and inside of it where it is installed."""
    try:
        return import_module(f"jitgen.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"jitgen.{name}":
            raise
        raise ImportError(
            f"jitgen was imported from the checkout {__file__.rpartition('/jitgen/')[0]}, which is not installed in place. "
            "Run 'pip install -e .' in it, or start Python from another directory to have the installed jitgen."
        ) from None


def __dir__() -> list[str]:
    return [*dict.fromkeys((*globals(), *__all__))]
