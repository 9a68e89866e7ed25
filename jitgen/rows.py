"""Functions over a row, for the hooks that see one: the logits of a row of a KV tile, in ``OnlineNorm.update``.

A row's keys come tile by tile, of a size that the kernel chooses: what holds for all of them is in the norm's state.
"""

from __future__ import annotations

from typing import Any


def row_max(x: Any) -> Any:
    """Largest value among the row's logits in this tile; excluded keys do not count."""
    return x.row_max()


def row_sum(x: Any) -> Any:
    """Sum over the row's logits in this tile; excluded keys count as 0."""
    return x.row_sum()


def row_cumsum(x: Any) -> Any:
    """Inclusive running sum along the row's logits in this tile, in the order in which the norm visits keys."""
    return x.row_cumsum()
