"""The operator that torch.compile sees: one opaque node with a fake kernel, whatever the variant.

A graph can carry tensors and numbers, not Python functions. The hooks are therefore registered once, while Dynamo traces,
and the graph holds their handle. Captured values are read when the operator runs, as in eager mode: a changed global or
attribute takes effect without a recompile.
"""

from __future__ import annotations

import threading

import torch

from jitgen.api import attention

_hooks: list[tuple[object, object]] = []
_handles: dict[tuple[int, int], int] = {}
_lock = threading.Lock()


def _register(score_mod: object, mask_mod: object) -> int:
    key = (id(score_mod), id(mask_mod))
    with _lock:
        if key not in _handles:  # the list keeps both alive, so the ids stay theirs
            _hooks.append((score_mod, mask_mod))
            _handles[key] = len(_hooks) - 1
        return _handles[key]


# Dynamo runs this while tracing and keeps the number; hooks must exist outside the compiled function.
register_hooks = torch._dynamo.assume_constant_result(_register)
# jitgen.attention as traced code calls it: between two graphs, as Dynamo would look into every function of it
attention_outside = torch.compiler.disable(attention)


@torch.library.custom_op("jitgen::flex_attention", mutates_args=())
def flex_attention_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    handle: int,
    scale: float | None,
    want_lse: bool,
    family: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run registered hooks. The second result is empty unless want_lse."""
    from jitgen.flex import eager

    score_mod, mask_mod = _hooks[handle]
    out, lse = eager(query, key, value, score_mod, mask_mod, scale, want_lse, family)
    return out, query.new_empty(0, dtype=torch.float32) if lse is None else lse


@flex_attention_op.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    handle: int,
    scale: float | None,
    want_lse: bool,
    family: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from jitgen.fp8 import output_dtype
    from jitgen.layouts import stride_like

    shape = (*query.shape[:3], value.shape[3])
    dtype = output_dtype(query.dtype, None)
    out = torch.empty_strided(shape, stride_like(query, shape), dtype=dtype, device=query.device)
    lse_shape = tuple(query.shape[:3]) if want_lse else (0,)
    return out, query.new_empty(lse_shape, dtype=torch.float32)


def call_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: object,
    mask_mod: object,
    scale: float | None,
    want_lse: bool,
    family: str | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The operator as traced code calls it."""
    handle = register_hooks(score_mod, mask_mod)
    out, lse = flex_attention_op(query, key, value, handle, scale, want_lse, family)
    return out, lse if want_lse else None
