"""Multi-head latent attention: flashinfer.mla. Refused until jitgen has kernels for 576-wide keys that hold their values."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from jitgen.compat.flashinfer._options import check_backend, check_workspace
from jitgen.compat.flashinfer.jit import gen_batch_mla_module  # noqa: F401
from jitgen.errors import UnsupportedOption


class BatchMLAPagedAttentionWrapper:
    """Absorbed MLA decode over a paged cache; plan() and run() are refused: no kernel reads a cache of 512 + 64 yet.

    append_paged_mla_kv_cache fills the cache. Until the kernel exists, decompress the keys and use the paged prefill wrapper
    with head_dim_qk 192 and head_dim_vo 128.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: torch.Tensor | None = None,
        kv_indptr: torch.Tensor | None = None,
        kv_indices: torch.Tensor | None = None,
        kv_len_arr: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        check_backend(backend)
        self.device = check_workspace(float_workspace_buffer)

    def plan(self, *args: Any, **options: Any) -> NoReturn:
        """Refused."""
        refuse()

    def run(self, *args: Any, **options: Any) -> NoReturn:
        """Refused."""
        refuse()


def refuse() -> NoReturn:
    raise UnsupportedOption(
        "BatchMLAPagedAttentionWrapper: jitgen has no kernel for a 576-wide MLA cache yet. Decompress the keys and values and "
        "use BatchPrefillWithPagedKVCacheWrapper with head_dim_qk=192, head_dim_vo=128."
    )
