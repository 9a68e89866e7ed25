"""Attention of one request."""

from __future__ import annotations

import functools
from typing import Any

import torch

from jitgen.api import attention
from jitgen.compat.flashinfer._batch import Batch, Heads, Plans, rotated
from jitgen.compat.flashinfer._hooks import Options, Scale, check_sinks, hooks_for, softmax_scale
from jitgen.compat.flashinfer._inputs import Planned, check_inputs, mask_bits
from jitgen.compat.flashinfer._options import LAYOUTS, attention_dtypes, check_backend, check_choice, rows_first
from jitgen.errors import ShapeMismatch, UnsupportedDtype
from jitgen.streams import stream_of

FEW_ROWS = 32  # query rows * query heads of a KV head up to which the decode kernel, which splits the keys, is the faster one
MAX_STREAMS = 64  # whose plans are kept

_plans: dict[tuple[torch.device, int], Plans] = {}  # by device and stream: calls on two streams may not share partial results


def single_decode_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: Scale = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of one query row against the keys of one request.

    Differs from FlashInfer: use_tensor_cores is a hint without effect; scales may be tensors, and v_scale costs no second
    pass. ROPE_LLAMA rotates copies of q and k before attention.

    Shapes:  q [num_q_heads, head_dim]; k, v [kv_len, num_kv_heads, head_dim] (NHD) or [num_kv_heads, kv_len, head_dim] (HND);
             returns [num_q_heads, head_dim_v] and, with return_lse, float32 [num_q_heads].
    Units:   lse is a logarithm of base 2; window_left counts keys before the query's own, -1: all.
    Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedOption.
    """
    if q.dim() != 2:
        raise ShapeMismatch(f"q has shape {tuple(q.shape)}, expected [num_q_heads, head_dim].")
    options = Options(None, window_left, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta)
    out, lse = single_request(q.unsqueeze(0), k, v, kv_layout, options, (q_scale, k_scale, v_scale))
    return (out[0], lse[0]) if return_lse else out[0]


def single_prefill_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale_q: Scale = None,
    scale_k: Scale = None,
    scale_v: Scale = None,
    o_dtype: str | torch.dtype | None = None,
    custom_mask: torch.Tensor | None = None,
    packed_custom_mask: torch.Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: object = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
) -> Any:
    """Attention of the last rows of one request.

    Differs from FlashInfer: use_fp16_qk_reduction is a hint without effect; scale_q [num_q_heads], scale_k and scale_v
    [num_kv_heads] are honoured for every dtype; ROPE_LLAMA rotates copies of q and k before attention.

    Shapes:  q [q_len, num_q_heads, head_dim]; k, v [kv_len, num_kv_heads, head_dim(_v)] (NHD) or [num_kv_heads, kv_len, ...]
             (HND); custom_mask bool [q_len, kv_len], True keeps, in place of causal; packed_custom_mask uint8, its bits
             little-endian; returns [q_len, num_q_heads, head_dim_v] and, with return_lse, float32 [q_len, num_q_heads].
    Units:   lse is a logarithm of base 2; row i is at position kv_len - q_len + i.
    Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedOption.
    """
    check_backend(backend, kv_cache_sf=kv_cache_sf)
    check_request(q, k, v, kv_layout)
    kv_len = k.shape[0 if kv_layout == "NHD" else 1]
    lengths = (torch.tensor([q.shape[0]], device="cpu"), torch.tensor([kv_len], device="cpu"))
    bits, start = mask_bits(custom_mask, packed_custom_mask, *lengths, q.device) or (None, None)
    options = Options(
        0 if causal else None, window_left, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta, bits, start
    )
    scales = (scale_q, both(scale_k, k_scale), both(scale_v, v_scale))
    out, lse = single_request(q, k, v, kv_layout, options, scales)
    if o_dtype is not None:
        out = out.to(attention_dtypes(q.dtype, k.dtype, o_dtype)[2])
    return (out, lse) if return_lse else out


single_prefill_with_kv_cache_return_lse = functools.partial(single_prefill_with_kv_cache, return_lse=True)


def both(first: Scale, second: Scale) -> Scale:
    """The product of two scales of the same tensor, either of which may be absent."""
    if first is None or second is None:
        return second if first is None else first
    return first * second


def single_request(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layout: str,
    options: Options,
    scales: tuple[Scale, Scale, Scale] = (None, None, None),
    sinks: torch.Tensor | None = None,
    held: HeldRequest | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and logsumexp (base 2) of one request. ``held``: by a plan of serving, which divides its keys among CTAs, whatever
    its rows, and holds for as long as the lengths do.

    Shapes:  q [q_len, num_q_heads, head_dim]; k, v [kv_len, num_kv_heads, head_dim(_v)] or, HND, [num_kv_heads, kv_len, ...];
             returns [q_len, num_q_heads, head_dim_v] and float32 [q_len, num_q_heads].
    """
    check_request(q, k, v, kv_layout)
    k, v = rows_first(k, kv_layout), rows_first(v, kv_layout)
    heads = Heads(q.shape[1], k.shape[1], q.shape[2], v.shape[2], q.dtype, q.dtype)
    batch = (one_request if held is None else held.batch)(q.shape[0], k.shape[0], q.device)
    check_inputs(Planned(batch, heads, options, q.shape[0]), q, k, v)
    check_sinks(sinks, heads.num_q, q.device)
    hooks = hooks_for(options, heads.num_q, heads.num_kv, q.device, *scales)
    variant = hooks.variant(sinks)
    if options.rotates:
        batch, q, k, v = rotated(batch, q, k, v, options.rope)
    scale = softmax_scale(options, heads.dim_qk, *scales[:2])
    plans = None if held is None else held.plans
    if plans is None and q.is_cuda and 0 < q.shape[0] * (heads.num_q // heads.num_kv) <= FEW_ROWS:
        key = (q.device, stream_of(q.device.index))
        if key not in _plans and len(_plans) >= MAX_STREAMS:
            _plans.clear()
        plans = _plans.setdefault(key, Plans(q.device))
    if plans is not None:
        out, lse = plans.attend(batch, heads, hooks, variant, q, (k, v), "NHD", scale, None, None, True)
        return out, lse
    q4, k4, v4 = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    out, lse = attention(q4, k4, v4, variant, scale=scale, return_lse=True)
    return out[0].transpose(0, 1), lse[0].T.contiguous()


def check_request(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_layout: str) -> None:
    """Inputs have three axes and one dtype."""
    check_choice("kv_layout", kv_layout, LAYOUTS)
    if q.dim() != 3:
        raise ShapeMismatch(f"q has shape {tuple(q.shape)}, expected [q_len, num_q_heads, head_dim].")
    for name, t in (("k", k), ("v", v)):
        if t.dim() != 3:
            raise ShapeMismatch(f"{name} has shape {tuple(t.shape)}, expected 3 axes in the layout {kv_layout}.")
        if t.dtype != q.dtype:
            raise UnsupportedDtype(
                f"{name} has dtype {t.dtype}, q has {q.dtype}. Both must match: convert with .to(), or keep keys of 8 bits in "
                "a paged cache, which the wrappers read."
            )


def one_request(q_len: int, kv_len: int, device: torch.device) -> Batch:
    """A ragged batch of one request."""
    kv_start = bounds(kv_len, device)
    return Batch(bounds(q_len, device), kv_start[1:], kv_start, None, 0, max_q_len=q_len)


class HeldRequest:
    """Plans for a request that is attended again and again: the same batch for the same lengths."""

    def __init__(self, device: torch.device) -> None:
        self.plans = Plans(device)
        self._sizes: tuple[int, int] | None = None

    def batch(self, q_len: int, kv_len: int, device: torch.device) -> Batch:
        """The batch of these lengths."""
        if self._sizes != (q_len, kv_len):
            self._sizes, self._batch = (q_len, kv_len), one_request(q_len, kv_len, device)
        return self._batch


def bounds(length: int, device: torch.device) -> torch.Tensor:
    """int32 [0, length], made by a kernel: a copy from the host could not be captured in a CUDA graph."""
    return torch.arange(2, dtype=torch.int32, device=device) * length
