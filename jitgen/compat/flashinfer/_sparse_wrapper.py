"""What the sparse wrappers of the shim have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from jitgen.api import attention
from jitgen.block_lists import BlockLists
from jitgen.block_sparse import LateCheck
from jitgen.compat.flashinfer._batch import Heads
from jitgen.compat.flashinfer._hooks import Options, Scale, hooks_for, softmax_scale
from jitgen.compat.flashinfer._inputs import result
from jitgen.compat.flashinfer._options import check_backend, check_dtype, check_workspace
from jitgen.errors import ShapeMismatch, UnsupportedOption, VariantError
from jitgen.variant import Variant


class SparseWrapper:
    """What both wrappers have: a device, a plan, and the call."""

    def __init__(self, float_workspace_buffer: torch.Tensor, backend: str = "auto") -> None:
        check_backend(backend)
        self.device = check_workspace(float_workspace_buffer)
        self._planned: tuple[Heads, Options, bool] | None = None
        self._check: LateCheck | None = None
        self._lists: BlockLists | None = None  # of whole blocks that all heads share, if the plan is of such
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
        mask_mod: Callable[..., Any],
        scales: tuple[Scale, Scale, Scale],
        out: torch.Tensor,
        options: Options | None = None,
    ) -> torch.Tensor:
        """Attention of head-major q, k and v [heads, rows, dim], written to head-major ``out``; returns lse [heads, rows]."""
        heads, planned, _ = self._plan_of()
        options = options or planned
        if self._check is not None:
            self._check.look()
        scale = softmax_scale(options, heads.dim_qk, *scales[:2])
        q, k, v = (t.unsqueeze(0) for t in qkv)
        same = out.dtype == q.dtype
        if self._lists is not None and same:
            plain = self._variant(None, options, scales)
            if self._lists.serve(q, k, v, plain.trace().program):
                _, lse = self._lists.attend(q, k, v, plain, scale, out.unsqueeze(0), True)
                return lse[0]  # type: ignore[index]
        variant = self._variant(mask_mod, options, scales)
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
