"""Attention over blocks of the matrix of logits: flashinfer.sparse."""

from __future__ import annotations

import functools
from typing import Any

import torch

from jitgen.block_sparse import BlockSparse
from jitgen.compat.flashinfer._batch import Heads
from jitgen.compat.flashinfer._hooks import Options, Scale
from jitgen.compat.flashinfer._inputs import result
from jitgen.compat.flashinfer._options import attention_dtypes
from jitgen.compat.flashinfer._sparse_wrapper import MaskedBlocks, SparseWrapper, check_tensor, finished
from jitgen.errors import ShapeMismatch, UnsupportedOption

Dtype = str | torch.dtype | None


class BlockSparseAttentionWrapper(SparseWrapper):
    """Attention over the listed blocks of a matrix of M query rows and N keys.

    Differs from FlashInfer: positions are those of the whole matrix, so with causal row i sees keys up to N - M + i, and the
    ALiBi bias of a key does not depend on which blocks are listed. Block columns are checked against N / C; on a GPU without a
    wait, so that the error comes from plan() or a later run(). A row without a key is 0, its lse -inf. o_data_type defaults to
    q_data_type. ROPE_LLAMA is refused. Tiles without a listed block are skipped.
    """

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        M: int,
        N: int,
        R: int,
        C: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        mask: torch.Tensor | None = None,
        packed_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Dtype = "float16",
        kv_data_type: Dtype = None,
        o_data_type: Dtype = None,
        non_blocking: bool = True,
        block_mask: object = None,
        kv_block_lens: object = None,
        q2k_indices: object = None,
        q2k_num: object = None,
        kv_splits: int | None = None,
        use_clc: bool | None = None,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
    ) -> None:
        """Prepare run() for these blocks.

        Shapes:  indptr [MB + 1], indices [nnz] block columns, MB = ceil(M / R); mask bool [nnz, R, C]; packed_mask its bits,
                 little-endian, joined.
        Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedOption.
        Cost:    builds tables of MB * N / C entries; no wait for the device.
        """
        given = {
            "block_mask": block_mask, "kv_block_lens": kv_block_lens, "q2k_indices": q2k_indices, "q2k_num": q2k_num,
            "kv_splits": kv_splits, "use_clc": use_clc, "q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale,
        }  # fmt: skip
        for name, value in given.items():
            if value is not None:
                raise UnsupportedOption(
                    f"{name} was given, which belongs to another backend of FlashInfer. Give scales to run(); a torch "
                    "BlockMask is taken by jitgen.flex_attention(block_mask=...)."
                )
        if N % C:
            raise ShapeMismatch(
                f"N is {N}, C is {C}: block columns must divide the keys. Pad the keys, and list what is there."
            )
        if indptr.shape != (-(-M // R) + 1,):
            raise ShapeMismatch(f"indptr has shape {tuple(indptr.shape)}, expected [{-(-M // R) + 1}] for M={M} and R={R}.")
        q_dtype, _, o_dtype = attention_dtypes(q_data_type, kv_data_type, o_data_type)
        lists = indptr.to(self.device), indices.to(self.device)
        self._masked = MaskedBlocks(BlockSparse.bsr(*lists, (M, N), (R, C), mask=mask, packed_mask=packed_mask), causal)
        self._sizes = (M, N)
        options = Options(None, -1, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta)
        self._adopt(Heads(num_qo_heads, num_kv_heads, head_dim, head_dim, q_dtype, o_dtype), options, causal)

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale_q: Scale = None,
        scale_k: Scale = None,
        scale_v: Scale = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> Any:
        """Attention over the planned blocks.

        Shapes:  q [M, num_q_heads, head_dim]; k, v [N, num_kv_heads, head_dim]; returns like q and, with return_lse, float32
                 [M, num_q_heads].
        Units:   lse is a logarithm of base 2.
        Errors:  ShapeMismatch, UnsupportedDtype, VariantError before plan().
        """
        heads = self._plan_of()[0]
        rows, keys = self._sizes
        check_tensor("q", q, (rows, heads.num_q, heads.dim_qk), heads.q_dtype)
        check_tensor("k", k, (keys, heads.num_kv, heads.dim_qk), heads.q_dtype)
        check_tensor("v", v, (keys, heads.num_kv, heads.dim_vo), heads.q_dtype)
        out = result(out, tuple(q.shape), heads.o_dtype, q, "out")
        qkv = (q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))
        found = self._attend(qkv, self._masked, (scale_q, scale_k, scale_v), out.transpose(0, 1))
        return finished(out, found.T, lse, return_lse, q)

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale_q: Scale = None,
        scale_k: Scale = None,
        scale_v: Scale = None,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Any:
        """As run(), with options in place of the planned ones from here on."""
        self._forward_options(pos_encoding_mode, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        return self.run(q, k, v, scale_q, scale_k, scale_v)


class VariableBlockSparseAttentionWrapper(SparseWrapper):
    """Attention over chosen blocks whose rows and columns have any sizes, for each KV head.

    Differs from FlashInfer: with causal, row i sees keys up to kv_len - q_len + i of the whole matrix; sizes are checked
    against q and k, on a GPU without a wait. ROPE_LLAMA is refused. Tiles without a chosen block are skipped.
    """

    def plan(
        self,
        block_mask_map: torch.Tensor,
        block_row_sz: torch.Tensor,
        block_col_sz: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        q_data_type: Dtype = "float16",
        kv_data_type: Dtype = None,
    ) -> None:
        """Prepare run() for these blocks.

        Shapes:  block_mask_map bool [num_kv_heads, MB, NB]; block_row_sz int [num_kv_heads, MB]; block_col_sz int
                 [num_kv_heads, NB].
        Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedOption.
        """
        if block_mask_map.shape != (num_kv_heads, block_row_sz.shape[-1], block_col_sz.shape[-1]):
            raise ShapeMismatch(
                f"block_mask_map has shape {tuple(block_mask_map.shape)}, expected [{num_kv_heads}, {block_row_sz.shape[-1]}, "
                f"{block_col_sz.shape[-1]}]: KV heads, block rows and block columns."
            )
        q_dtype, _, o_dtype = attention_dtypes(q_data_type, kv_data_type, None)
        self._blocks = tuple(t.to(self.device) for t in (block_mask_map.bool(), block_row_sz, block_col_sz))
        self._masked: dict[tuple[int, int], MaskedBlocks] = {}
        options = Options(None, -1, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta)
        self._adopt(Heads(num_qo_heads, num_kv_heads, head_dim, head_dim, q_dtype, o_dtype), options, causal)

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> Any:
        """Attention over the planned blocks.

        Shapes:  q [num_q_heads, q_len, head_dim]; k, v [num_kv_heads, kv_len, head_dim]; returns like q and, with return_lse,
                 float32 [num_q_heads, q_len].
        Units:   lse is a logarithm of base 2.
        Errors:  ShapeMismatch, UnsupportedDtype, VariantError before plan().
        Cost:    the first call after plan() builds tables of q_len and kv_len entries for each KV head.
        """
        heads, _, causal = self._plan_of()
        for name, t in (("q", q), ("k", k)):
            if t.dim() != 3:
                raise ShapeMismatch(f"{name} has shape {tuple(t.shape)}, expected [heads, rows, head_dim].")
        check_tensor("q", q, (heads.num_q, q.shape[1], heads.dim_qk), heads.q_dtype)
        check_tensor("k", k, (heads.num_kv, k.shape[1], heads.dim_qk), heads.q_dtype)
        check_tensor("v", v, (heads.num_kv, k.shape[1], heads.dim_vo), heads.q_dtype)
        lengths = (q.shape[1], k.shape[1])
        if lengths not in self._masked:
            self._masked[lengths] = MaskedBlocks(BlockSparse.variable(*self._blocks, lengths), causal)
        out = result(out, tuple(q.shape), heads.o_dtype, q, "out")
        found = self._attend((q, k, v), self._masked[lengths], (None, None, None), out)
        return finished(out, found, lse, return_lse, q)

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Any:
        """As run(), with options in place of the planned ones from here on."""
        self._forward_options(pos_encoding_mode, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        return self.run(q, k, v)
