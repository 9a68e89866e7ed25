"""What the sparse wrappers of the shim have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from jitgen.api import attention
from jitgen.block_sparse import BlockSparse
from jitgen.compat.flashinfer._batch import Heads
from jitgen.compat.flashinfer._hooks import Options, Scale, hooks_for, softmax_scale
from jitgen.compat.flashinfer._inputs import result
from jitgen.compat.flashinfer._options import check_backend, check_dtype, check_workspace
from jitgen.errors import ShapeMismatch, UnsupportedOption, VariantError
from jitgen.masks import and_masks
from jitgen.variant import Variant


def causal_rows(b: Any, h: Any, row: Any, kv_idx: Any, *, ctx_len: Any) -> Any:
    """Causal, for rows that count from 0."""
    return kv_idx <= row + ctx_len


class MaskedBlocks:
    """Blocks with the mask of a plan: ``own`` is what narrows them, ``all`` the two together."""

    def __init__(self, blocks: BlockSparse, causal: bool) -> None:
        self.blocks = blocks
        self.own: Callable[..., Any] | None = causal_rows if causal else None
        self.all = and_masks(blocks.local_mask_mod, causal_rows) if causal else blocks.local_mask_mod


class SparseWrapper:
    """What both wrappers have: a device, a plan, and the call."""

    def __init__(self, float_workspace_buffer: torch.Tensor, backend: str = "auto") -> None:
        check_backend(backend)
        self.device = check_workspace(float_workspace_buffer)
        self._planned: tuple[Heads, Options, bool] | None = None
        self._made: dict[tuple[object, ...], tuple[Variant, object]] = {}

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor | None = None
    ) -> None:
        """Take other workspaces; the first is checked, neither is used."""
        if check_workspace(float_workspace_buffer) != self.device:
            raise ShapeMismatch(f"the new workspace is on {float_workspace_buffer.device}, the wrapper on {self.device}.")

    def end_forward(self) -> None:
        """Does nothing; FlashInfer removed it in 0.7."""

    def _adopt(self, heads: Heads, options: Options, causal: bool) -> None:
        """Make this the plan that run() uses."""
        if options.rotates:
            raise UnsupportedOption("pos_encoding_mode='ROPE_LLAMA' is not taken here. Rotate q and k with apply_rope first.")
        self._planned = (heads, options, causal)
        self._made.clear()

    def _plan_of(self) -> tuple[Heads, Options, bool]:
        if self._planned is None:
            raise VariantError(f"{type(self).__name__}.run() came before plan(). Call plan() first.")
        return self._planned

    def _attend(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        masked: MaskedBlocks,
        scales: tuple[Scale, Scale, Scale],
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of head-major q, k and v [heads, rows, dim], written to head-major ``out``; returns lse [heads, rows]."""
        heads, options, _ = self._plan_of()
        masked.blocks.check()
        scale = softmax_scale(options, heads.dim_qk, *scales[:2])
        q, k, v = (t.unsqueeze(0) for t in qkv)
        same, lists = out.dtype == q.dtype, masked.blocks.lists
        if lists is not None and same:
            bare = self._variant(masked.own, options, scales)
            if lists.serve(q, k, v, bare.trace().program):
                _, lse = lists.attend(q, k, v, bare, scale, out.unsqueeze(0), True)
                return lse[0]  # type: ignore[index]
        variant = self._variant(masked.all, options, scales)
        found, lse = attention(q, k, v, variant, scale=scale, return_lse=True, out=out.unsqueeze(0) if same else None)
        if not same:
            out.copy_(found[0])
        return lse[0]

    def _variant(
        self, mask_mod: Callable[..., Any] | None, options: Options, scales: tuple[Scale, Scale, Scale]
    ) -> Variant:
        """The variant of a call, remembered as long as the plan."""
        key = (id(mask_mod), id(options), *(x if isinstance(x, int | float | None) else id(x) for x in scales))
        if key not in self._made:
            heads = self._plan_of()[0]
            hooks = hooks_for(options, heads.num_q, heads.num_kv, self.device, *scales)
            self._made[key] = (hooks.variant(mask_mod=mask_mod), (mask_mod, options, scales))
        return self._made[key][0]

    def _forward_options(
        self,
        pos_encoding_mode: str,
        logits_soft_cap: float | None,
        sm_scale: float | None,
        rope_scale: float | None,
        rope_theta: float | None,
    ) -> None:
        """Put options of forward() in the place of the planned ones."""
        heads, _, causal = self._plan_of()
        self._adopt(heads, Options(None, -1, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta), causal)


def check_tensor(name: str, t: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A tensor has the shape and dtype that were planned."""
    check_dtype(name, t, dtype)
    if tuple(t.shape) != shape:
        raise ShapeMismatch(f"{name} has shape {tuple(t.shape)}, the plan says {shape}.")


def finished(out: torch.Tensor, found: torch.Tensor, lse: torch.Tensor | None, return_lse: bool, q: torch.Tensor) -> Any:
    """What run() returns; ``found`` is the logsumexp, copied to ``lse`` if that was given."""
    if lse is not None:
        found = result(lse, tuple(found.shape), torch.float32, q, "lse").copy_(found)
    return (out, found) if return_lse else out
