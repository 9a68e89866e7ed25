"""Attention of many query rows a request: flashinfer.prefill."""

from jitgen.compat.flashinfer._prefill_paged import BatchPrefillWithPagedKVCacheWrapper
from jitgen.compat.flashinfer._prefill_ragged import BatchPrefillWithRaggedKVCacheWrapper
from jitgen.compat.flashinfer._single import single_prefill_with_kv_cache, single_prefill_with_kv_cache_return_lse
from jitgen.compat.flashinfer.jit import gen_batch_prefill_module, gen_single_prefill_module

__all__ = [
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "gen_batch_prefill_module",
    "gen_single_prefill_module",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
]
