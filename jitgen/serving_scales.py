"""Scales of a cache whose elements have 8 bits: by tensor, by key head, or by slot and key head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jitgen.checks import dtype_name
from jitgen.errors import InvalidType, ShapeMismatch, UnsupportedDevice, UnsupportedDtype
from jitgen.spec import STORED_DTYPES

if TYPE_CHECKING:
    from jitgen.serving_plan import Plan

Tensor = torch.Tensor
Scale = float | Tensor | None


def stored_dtype(plan: Plan) -> str:
    """Dtype of K and V where it is one of 8 bits; empty where it is the plan's own."""
    return "" if plan.kv_dtype is None else dtype_name(plan.kv_dtype)


def scale_words(plan: Plan, num_pages: int, page_size: int, k_scale: Scale, v_scale: Scale) -> list[object]:
    """Values for SCALE_ARGS; none where K and V are not stored in 8 bits.

    Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedDevice.
    """
    if not stored_dtype(plan):
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if scale is not None:
                raise UnsupportedDtype(
                    f"{name} was given, and the plan was made for keys and values of {dtype_name(plan.dtype)}, which have no "
                    f"scales. Make it with kv_dtype= one of {', '.join(STORED_DTYPES)}, or leave {name} out."
                )
        return []
    k, v = (_words(plan, num_pages, page_size, name, s) for name, s in (("k_scale", k_scale), ("v_scale", v_scale)))
    return [k[0], v[0], *k[1:3], *v[1:3], k[3], v[3]]


def no_scales(plan: Plan) -> list[object]:
    """Values for SCALE_ARGS of a launch that reads no keys."""
    return scale_words(plan, 0, 0, None, None)


def _words(plan: Plan, num_pages: int, page_size: int, name: str, scale: Scale) -> tuple[object, ...]:
    """Address, strides by slot and head, and factor of one scale."""
    if scale is None:
        return 0, 0, 0, 1.0
    if not isinstance(scale, Tensor):
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise InvalidType(f"{name} is a {type(scale).__name__}, expected a number or a float32 tensor.")
        return 0, 0, 0, float(scale)
    if scale.dtype != torch.float32:
        raise UnsupportedDtype(f"{name} has dtype {dtype_name(scale.dtype)}, expected float32.")
    if scale.device != plan.device:
        raise UnsupportedDevice(f"{name} is on {scale.device}, the plan on {plan.device}. Move it there.")
    heads, shape = plan.num_kv_heads, tuple(scale.shape)
    slots = num_pages * max(page_size, 1)
    by_slot = [(slots, heads)] + ([(num_pages, page_size, heads)] if page_size else [])
    if shape in ((), (1,)):
        strides = 0, 0
    elif shape == (heads,):
        strides = 0, scale.stride(0)
    elif shape in by_slot and scale.is_contiguous():
        strides = heads, 1
    else:
        forms = " or ".join(str(list(form)) for form in by_slot)
        what = "is not contiguous" if shape in by_slot else f"has shape {list(shape)}"
        raise ShapeMismatch(
            f"{name} {what}, expected a number, [1], [{heads}] for each key head, or contiguous {forms} for each slot of the "
            "cache and key head."
        )
    return scale.data_ptr(), *strides, 1.0
