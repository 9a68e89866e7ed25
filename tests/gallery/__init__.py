"""The gallery: every attention variant that jitgen must express, as plain FlexAttention-style functions.

Used by tests of the tracer, of tile classes, of the CPU kernels and of the CUDA kernels.
"""

from gallery import grids, masks, models, norms, scores
from gallery.case import CASES, Case, Sizes

__all__ = ["CASES", "Case", "Sizes", "grids", "masks", "models", "norms", "scores"]
