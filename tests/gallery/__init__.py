"""The gallery: every attention variant that jitgen must express, as plain FlexAttention-style functions.

Used by tests of the tracer, of tile classes, of the CPU kernels and of the CUDA kernels.
"""

from gallery import grids, masks, models, norms, pages, scores
from gallery.case import CASES, PAGED_CASES, Cache, Case, PagedCase, Sizes

__all__ = [
    "CASES", "PAGED_CASES", "Cache", "Case", "PagedCase", "Sizes", "grids", "masks", "models", "norms", "pages", "scores",
]  # fmt: skip
