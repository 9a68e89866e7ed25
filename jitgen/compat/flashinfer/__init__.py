"""FlashInfer's names and semantics, served by jitgen.

``sys.modules["flashinfer"] = jitgen.compat.flashinfer``, or ``install()``, makes code written for FlashInfer 0.6 and 0.7 use
it. What an entry point does differently is said in its docstring; what is not supported is an error that names the
replacement. Names are imported when they are first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

__version__ = "0.7.0"  # of the interface: code asks for it to choose between signatures

_NAMES = {
    "decode": (
        "BatchDecodeWithPagedKVCacheWrapper",
        "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
        "fast_decode_plan",
        "single_decode_with_kv_cache",
    ),
    "prefill": (
        "BatchPrefillWithPagedKVCacheWrapper",
        "BatchPrefillWithRaggedKVCacheWrapper",
        "single_prefill_with_kv_cache",
        "single_prefill_with_kv_cache_return_lse",
    ),
    "attention": ("BatchAttention", "BatchAttentionWithAttentionSinkWrapper"),
    "cascade": (
        "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
        "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
        "MultiLevelCascadeAttentionWrapper",
        "merge_state",
        "merge_state_in_place",
        "merge_states",
    ),
    "sparse": ("BlockSparseAttentionWrapper", "VariableBlockSparseAttentionWrapper"),
    "page": ("append_paged_kv_cache", "append_paged_mla_kv_cache", "get_batch_indices_positions", "get_seq_lens"),
    "rope": (
        "apply_llama31_rope",
        "apply_llama31_rope_inplace",
        "apply_llama31_rope_pos_ids",
        "apply_llama31_rope_pos_ids_inplace",
        "apply_rope",
        "apply_rope_inplace",
        "apply_rope_pos_ids",
        "apply_rope_pos_ids_inplace",
        "apply_rope_with_cos_sin_cache",
        "apply_rope_with_cos_sin_cache_inplace",
    ),
    "quantization": ("packbits", "segment_packbits"),
    "sampling": (
        "chain_speculative_sampling",
        "min_p_sampling_from_probs",
        "sampling_from_logits",
        "sampling_from_probs",
        "softmax",
        "top_k_mask_logits",
        "top_k_renorm_probs",
        "top_k_sampling_from_probs",
        "top_k_top_p_sampling_from_logits",
        "top_k_top_p_sampling_from_probs",
        "top_p_renorm_probs",
        "top_p_sampling_from_probs",
    ),
    "mla": ("BatchMLAPagedAttentionWrapper",),
    "pod": ("BatchPODWithPagedKVCacheWrapper", "PODWithPagedKVCacheWrapper"),
    "activation": ("gelu_and_mul", "gelu_tanh_and_mul", "silu_and_mul"),
    "norm": ("fused_add_rmsnorm", "gemma_fused_add_rmsnorm", "gemma_rmsnorm", "rmsnorm"),
    "gemm": ("SegmentGEMMWrapper", "bmm_fp8"),
    "logits_processor": (
        "CompileError",
        "Compiler",
        "FusionRule",
        "LegalizationError",
        "LogitsPipe",
        "LogitsProcessor",
        "MinP",
        "Op",
        "ParameterizedOp",
        "Sample",
        "Softmax",
        "TaggedTensor",
        "Temperature",
        "TensorType",
        "TopK",
        "TopP",
        "compile_pipeline",
        "legalize_processors",
    ),
    "utils": (),
    "jit": (),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [*_HOME, *_NAMES, "install"]


def install() -> None:
    """Put this package and its modules into sys.modules under FlashInfer's names.

    Errors:  ImportError if FlashInfer itself has been imported.
    """
    present = sys.modules.get("flashinfer")
    own = sys.modules[__name__]
    if present is not None and present is not own:
        raise ImportError("flashinfer has already been imported. Call jitgen.compat.flashinfer.install() before it is.")
    sys.modules["flashinfer"] = own
    for module in _NAMES:
        sys.modules[f"flashinfer.{module}"] = import_module(f"{__name__}.{module}")


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return import_module(f"jitgen.compat.flashinfer.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'jitgen.compat.flashinfer' has no attribute {name!r}")
    value = getattr(import_module(f"jitgen.compat.flashinfer.{_HOME[name]}"), name)
    globals()[name] = value
    return value
