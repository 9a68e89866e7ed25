"""jitgen.attention: what the arguments mean, and which program they ask for; dense.py makes the call."""

from __future__ import annotations

import torch
from torch.compiler import is_compiling

from jitgen.checks import check_grad, check_tensors, is_traced
from jitgen.dense import run
from jitgen.errors import VariantError
from jitgen.fp8 import Scale, with_scales
from jitgen.layouts import check_apart
from jitgen.program import Program, without_rows
from jitgen.variant import Variant, check_q_index, resolve


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    variant: Variant | None = None,
    *,
    score_mod: object = None,
    mask_mod: object = None,
    sink: object = None,
    scale: float | None = None,
    scale_q: Scale = None,
    scale_k: Scale = None,
    scale_v: Scale = None,
    q_index: str | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    family: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention with a variant, over a dense batch.

    The last ``q_len`` positions of each sequence are the queries: row i has ``q_idx = kv_len - q_len + i``, so
    ``kv_idx <= q_idx`` is causal for prefill and for decode alike. ``q_index="local"`` counts rows from 0 instead.

    scale_q, scale_k and scale_v are what q, k and v are to be multiplied by: numbers, or float32 tensors of one value, of one
    a head, or of one a request and head [batch, heads]; the variant's hooks see the scaled score and output. With them q, k
    and v may be torch.float8_e4m3fn: computed in 8 bits on Hopper (no OnlineNorm there), as the same numbers in out_dtype on
    the CPU, and an error on other GPUs. The output is then out_dtype, bfloat16 (default) or float16.

    Shapes:  q [batch, num_q_heads, q_len, head_dim]; k [batch, num_kv_heads, kv_len, head_dim];
             v [batch, num_kv_heads, kv_len, head_dim_v]; returns [batch, num_q_heads, q_len, head_dim_v] in q's dtype (8-bit
             q: out_dtype) and, with return_lse, also the logsumexp [batch, num_q_heads, q_len] in float32. Any strides.
    Units:   scale multiplies q . k before score_mod, default 1/sqrt(head_dim); logsumexp is a natural logarithm.
    Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedDevice, InvalidType, GradNotSupported; UnsupportedVariant when a hook
             cannot be expressed; CompileError, ToolchainMissing on the first use of a variant.
    Cost:    compiles once per variant, head dim and dtype; later calls launch one kernel, 8-bit ones another that transposes
             v into a workspace of its size. On a GPU few rows over many keys (a decode step) take the decode kernel of plans,
             compiled too, and some MB of memory that is kept, or goes with the CUDA graph that holds the call; a small kernel
             divides the keys where their number has changed, or the mask reads tensors. q_transform, k_transform and
             v_transform are one more each, which copies. Under torch.compile the call is one operator, but breaks the graph
             where out is given.
    Source:  online softmax (Milakov & Gimelshein 2018), tiled as in FlashAttention (Dao et al. 2022).
    """
    if is_compiling() and out is None and is_traced(q):
        from jitgen.op import call_op

        result, lse = call_op(
            q, k, v, variant, score_mod, mask_mod, sink, scale_q, scale_k, scale_v,
            convention=q_index or "", scale=scale, want_lse=return_lse, out_dtype=out_dtype, family=family,
        )  # fmt: skip
        return (result, lse) if return_lse else result  # type: ignore[return-value]
    if is_compiling() and is_traced(q):
        from jitgen.op import attention_outside

        return attention_outside(  # type: ignore[no-any-return]
            q, k, v, variant, score_mod=score_mod, mask_mod=mask_mod, sink=sink, scale=scale, scale_q=scale_q, scale_k=scale_k,
            scale_v=scale_v, q_index=q_index, return_lse=return_lse, out=out, out_dtype=out_dtype, family=family,
        )  # fmt: skip
    if out is not None:
        check_apart(out, k=k, v=v)
    if variant is None:
        (program, values), variant_q_index = resolve(score_mod, mask_mod, sink), None
    else:
        program, values, variant_q_index = resolve_hooks(variant, score_mod, mask_mod, sink)
    if q_index is not None:
        check_q_index(q_index)
    local = (q_index or variant_q_index) == "local"
    has_scales = scale_q is not None or scale_k is not None or scale_v is not None
    if has_scales or program.rows is not None:
        check_grad(q, k, v)
        check_tensors(q, k, v)
        if has_scales and program.rows is not None:
            raise VariantError("the variant transforms rows, and scales were given too. Multiply by them in the transforms.")
        if has_scales:
            program, values = with_scales(program, values, q, k, (scale_q, scale_k, scale_v))
        else:
            program, q, k, v = with_transformed_rows(program, values, q, k, v, local)
    result, lse = run(
        program, values, q, k, v,
        scale=scale, local=local, want_lse=return_lse, out=out, family=family, out_dtype=out_dtype,
    )  # fmt: skip
    return (result, lse) if return_lse else result


def resolve_hooks(
    variant: Variant | None, score_mod: object, mask_mod: object, sink: object
) -> tuple[Program, list[object], str | None]:
    """Program, current captured values and q_index convention of a Variant or of raw hooks."""
    if variant is None:
        program, values = resolve(score_mod, mask_mod, sink)
        return program, values, None
    if score_mod is not None or mask_mod is not None or sink is not None:
        raise VariantError("variant and separate hooks were both given. Put score_mod, mask_mod and sink into the Variant.")
    variant = Variant.of(variant)
    program, values = variant.resolve()
    return program, values, variant.q_index


def with_transformed_rows(
    program: Program, values: list[object], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, local: bool
) -> tuple[Program, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The program without the transforms of rows, and copies of q, k and v that these have been through."""
    from jitgen.kv_gather import transform_dense

    return without_rows(program), *transform_dense(program, values, q, k, v, 0 if local else k.shape[2] - q.shape[2])
