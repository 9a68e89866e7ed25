"""The operator that torch.compile sees: one opaque node with a fake kernel, whatever the variant.

A graph can carry tensors and numbers, not Python functions. While Dynamo traces the call, ``lift_call`` takes the hooks apart:
what they capture becomes an input of the node, and a recipe (recipes.py) that the node holds by its number makes them again
when it runs. Hooks may therefore be made inside of the compiled function, be given to it, or exist outside. What cannot be
taken apart leaves the graph and is called between two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._dynamo.comptime import comptime

from jitgen import api, flex
from jitgen.checks import check_grad
from jitgen.layouts import stride_like
from jitgen.lifted import CAN_LIFT, lift_here, made, register, trace_of_attention
from jitgen.recipes import constant

Tensor = torch.Tensor
ARGUMENTS = ("variant", "score_mod", "mask_mod", "sink", "scale_q", "scale_k", "scale_v")
REMEDY = (
    "jitgen cannot take the hooks of this call apart while torch.compile traces it, and leaves the graph. Without "
    "fullgraph=True that is a graph break and no error; with it, make hooks plain functions, partials or methods that capture "
    "tensors, numbers, modules and containers of these, and make no attention call with out= there"
)

# The calls between two graphs, as Dynamo would look into every function of them
attention_outside = torch.compiler.disable(api.attention, reason=REMEDY)
flex_outside = torch.compiler.disable(flex.eager, reason=REMEDY)
refuse_grad = torch.compiler.disable(
    check_grad, reason="an input requires grad, and jitgen computes no gradients: call under torch.no_grad(), or detach it"
)


@torch.library.custom_op("jitgen::attention", mutates_args=())
def attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tensors: Sequence[Tensor],
    ints: Sequence[int],
    handle: int,
    convention: str,
    scale: float | None,
    want_lse: bool,
    out_dtype: torch.dtype | None,
    family: str | None,
) -> tuple[Tensor, Tensor]:
    """A call of jitgen.attention, or of jitgen.flex_attention where ``convention`` is "flex"; else it is what q_index counts,
    or empty. tensors and ints are what its hooks capture. The second result is empty unless want_lse."""
    given = made(handle, tensors, ints)
    if convention == "flex":
        out, lse = flex.eager(query, key, value, given["score_mod"], given["mask_mod"], scale, want_lse, family)
    else:
        found = api.attention(
            query, key, value, **given, q_index=convention or None, scale=scale, return_lse=want_lse, out_dtype=out_dtype,
            family=family,
        )  # fmt: skip
        out, lse = found if want_lse else (found, None)  # type: ignore[assignment]
    strides = stride_like(query, tuple(out.shape))
    if out.stride() != strides:  # the columns of a padded head dim have been cut off; a graph is told that they never were
        out = torch.empty_strided(out.shape, strides, dtype=out.dtype, device=out.device).copy_(out)
    return out, query.new_empty(0, dtype=torch.float32) if lse is None else lse


@attention_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tensors: Sequence[Tensor],
    ints: Sequence[int],
    handle: int,
    convention: str,
    scale: float | None,
    want_lse: bool,
    out_dtype: torch.dtype | None,
    family: str | None,
) -> tuple[Tensor, Tensor]:
    from jitgen.fp8 import output_dtype

    shape = (*query.shape[:3], value.shape[3])
    dtype = output_dtype(query.dtype, out_dtype)
    out = torch.empty_strided(shape, stride_like(query, shape), dtype=dtype, device=query.device)
    lse_shape = tuple(query.shape[:3]) if want_lse else (0,)
    return out, query.new_empty(lse_shape, dtype=torch.float32)


def lift_call(context: Any) -> None:
    """Dynamo runs this where it meets the call: the handle and the inputs for the hooks go to the local list ``found``."""
    lift_here(context, ARGUMENTS, trace_of_attention, register)


def fits_schema(key: object, value: object, convention: object, scale: object, out_dtype: object, family: object) -> bool:
    """Whether a node of the graph can hold these; else the call outside of it says what is wrong."""
    names = isinstance(convention, str) and (family is None or isinstance(family, str))
    numbers = not isinstance(scale, bool | str | list | tuple | dict | Tensor)
    dtypes = out_dtype is None or isinstance(out_dtype, torch.dtype)
    return isinstance(key, Tensor) and isinstance(value, Tensor) and names and numbers and dtypes


def call_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    variant: object = None,
    score_mod: object = None,
    mask_mod: object = None,
    sink: object = None,
    scale_q: object = None,
    scale_k: object = None,
    scale_v: object = None,
    *,
    convention: str,
    scale: float | None,
    want_lse: bool,
    out_dtype: torch.dtype | None = None,
    family: str | None,
) -> tuple[Tensor, Tensor | None]:
    """The operator as traced code calls it."""
    takes = fits_schema(key, value, convention, scale, out_dtype, family)
    if takes and torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        refuse_grad(query, key, value)
    found: list[Any] = [] if CAN_LIFT and takes else [-1]
    if CAN_LIFT and takes:
        comptime(lift_call)
    if not found:  # traced by running, as torch.export may: hooks stay as they are
        given = zip(ARGUMENTS, (variant, score_mod, mask_mod, sink, scale_q, scale_k, scale_v), strict=True)
        found = [register({name: constant(value) for name, value in given}), [], []]
    if found[0] < 0:
        if convention == "flex":
            return flex_outside(query, key, value, score_mod, mask_mod, scale, want_lse, family)  # type: ignore[no-any-return]
        result = attention_outside(
            query, key, value, variant, score_mod=score_mod, mask_mod=mask_mod, sink=sink, scale=scale, scale_q=scale_q,
            scale_k=scale_k, scale_v=scale_v, q_index=convention or None, return_lse=want_lse, out_dtype=out_dtype,
            family=family,
        )  # fmt: skip
        return result if want_lse else (result, None)
    handle, tensors, ints = found
    out, lse = attention_op(query, key, value, tensors, ints, handle, convention, scale, want_lse, out_dtype, family)
    return out, lse if want_lse else None
