"""Attention of one query row a request: flashinfer.decode."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from jitgen.compat.flashinfer._batch import Batch
from jitgen.compat.flashinfer._hooks import Options, Scale
from jitgen.compat.flashinfer._options import (
    attention_dtypes,
    check_fp16_skipping,
    check_no_extras,
    check_scale_factors,
    named_options,
    split_cache,
)
from jitgen.compat.flashinfer._wrapper import Heads, Planned, Wrapper
from jitgen.compat.flashinfer.jit import refused_module
from jitgen.compat.flashinfer.page import get_seq_lens
from jitgen.compat.flashinfer.prefill import single_prefill_with_kv_cache
from jitgen.errors import ShapeMismatch

Cache = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

# the order in which FlashInfer took the options of plan() by position
PLAN_OPTIONS = (
    "pos_encoding_mode", "window_left", "logits_soft_cap", "q_data_type", "kv_data_type", "o_data_type", "data_type", "sm_scale",
    "rope_scale", "rope_theta", "non_blocking", "block_tables", "seq_lens", "fixed_split_size", "disable_split_kv",
    "q_len_per_req",
)  # fmt: skip


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

    Differs from FlashInfer: use_tensor_cores is a hint without effect; scales may be tensors and cost no second pass.
    ROPE_LLAMA rotates copies of q and k before attention.

    Shapes:  q [num_q_heads, head_dim]; k, v [kv_len, num_kv_heads, head_dim] (NHD) or [num_kv_heads, kv_len, head_dim] (HND);
             returns [num_q_heads, head_dim_v] and, with return_lse, float32 [num_q_heads].
    Units:   lse is a logarithm of base 2.
    Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedOption.
    """
    if q.dim() != 2:
        raise ShapeMismatch(f"q has shape {tuple(q.shape)}, expected [num_q_heads, head_dim].")
    options = Options(None, window_left, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta)
    from jitgen.compat.flashinfer.prefill import single_request

    out, lse = single_request(q.unsqueeze(0), k, v, kv_layout, options, q_scale, k_scale, v_scale)
    return (out[0], lse[0]) if return_lse else out[0]
