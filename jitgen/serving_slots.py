"""Where keys lie in a paged cache, for hooks that read kv_slot or page: launch arguments, and sizes of captured tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jitgen.abi import divisor_words
from jitgen.emit_ranges import SLOT_LIMIT
from jitgen.errors import ShapeMismatch
from jitgen.ir import walk
from jitgen.ir_ops import PAGE_OPS
from jitgen.program import Program, all_roots

NO_PAGES: list[object] = [0, 0, 0, 0, *divisor_words(1)]  # PAGE_ARGS of a launch that reads no keys


def page_words(pages: int, kv_start: int, strides: tuple[int, int], page_size: int) -> list[object]:
    """Values for PAGE_ARGS. ``strides``: entries between the lists of two requests, and of two KV heads."""
    return [pages, kv_start, *strides, *divisor_words(page_size)]


def check_slots(program: Program, values: Sequence[Any], num_pages: int, page_size: int) -> None:
    """Captured tensors have an entry for each slot, or page, where these index them: generated code does not clamp them.

    Errors:  ShapeMismatch.
    """
    slots = num_pages * page_size
    if slots > SLOT_LIMIT:
        raise ShapeMismatch(f"the kv cache has {slots} slots, and kv_slot counts to {SLOT_LIMIT - 1}. Divide the cache.")
    for slot, dim, name in _indexed(program):
        size, least = values[slot].shape[dim], slots if name == "kv_slot" else num_pages
        if size < least:
            of = f"{num_pages} pages of {page_size} keys" if name == "kv_slot" else f"{num_pages} pages"
            raise ShapeMismatch(
                f"captured tensor '{program.slots[slot].name}' has size {size} along axis {dim}, which {name} indexes up to "
                f"{least - 1}: the kv cache has {of}. Give it at least {least} entries there."
            )


@lru_cache(maxsize=256)
def _indexed(program: Program) -> tuple[tuple[int, int, str], ...]:
    """(slot, dimension, name) of every tensor that kv_slot or page indexes as it is."""
    loads = [n for n in walk(*all_roots(program)) if n.op == "load"]
    return tuple((int(str(n.attr)), dim, i.op) for n in loads for dim, i in enumerate(n.args) if i.op in PAGE_OPS)
