"""A paged cache seen head by head: page lists of their own for every request and KV head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from jitgen.errors import ShapeMismatch
from jitgen.serving_pages import cache_place

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class HeadCache:
    """A cache whose pages hold one KV head each, in the memory of another: page p of head h is page ``numbers(p, h)``.

    Selections that differ by head (Quest, sparse attention learned per head) are then page lists like any others: a request
    and a KV head together are a request of the plan, with the query heads of that KV head.

    kv      what to call ``paged_attention`` with, kv_layout="NHD": a pair of [pages, page_size, 1, head_dim]
    """

    kv: tuple[Tensor, Tensor]
    page_step: int
    head_step: int

    @classmethod
    def of(cls, kv_cache: Tensor | tuple[Tensor, Tensor], kv_layout: str = "NHD") -> HeadCache:
        """The view of a cache in any form that ``paged_attention`` takes.

        Errors:  ShapeMismatch, UnsupportedDtype for what is no cache, and where K and V are not laid out alike.
        Cost:    copies nothing.
        """
        place = cache_place(kv_cache, kv_layout)
        k, v = (kv_cache[:, 0], kv_cache[:, 1]) if isinstance(kv_cache, Tensor) else kv_cache
        views, steps = [], []
        for t, (page, row, head) in ((k, place.strides[:3]), (v, place.strides[3:])):
            unit = math.gcd(page, head) if place.num_kv_heads > 1 else page
            count = (place.num_pages - 1) * (page // unit) + (place.num_kv_heads - 1) * (head // unit) + 1
            views.append(t.as_strided((count, place.page_size, 1, t.shape[-1]), (unit, row, unit, 1)))
            steps.append((page // unit, head // unit))
        if steps[0] != steps[1]:
            raise ShapeMismatch(
                f"pages and heads of k are {steps[0]} places apart, of v {steps[1]}. Lay both caches out in the same order."
            )
        return cls((views[0], views[1]), *steps[0])

    def numbers(self, pages: Tensor, heads: Tensor) -> Tensor:
        """Page numbers of this cache, for pages of the other one and KV heads; shapes broadcast."""
        return (pages * self.page_step + heads * self.head_step).to(torch.int32)
