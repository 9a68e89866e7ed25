"""What the attention wrappers of the shim have in common: buffers, the plan they hold, and the call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from jitgen.compat.flashinfer._batch import Heads, Plans, rotated
from jitgen.compat.flashinfer._hooks import Hooks, Options, Scale, as_number, check_sinks, hooks_for, softmax_scale
from jitgen.compat.flashinfer._inputs import Planned, check_inputs, fill, mask_bits, result
from jitgen.compat.flashinfer._options import LAYOUTS, check_backend, check_choice, check_workspace
from jitgen.errors import ShapeMismatch, VariantError
from jitgen.serving_plan import Plan
from jitgen.variant import Variant

MAX_READY = 256  # calls that a wrapper remembers between two plans: layers may have their own sinks and scales


class Wrapper:
    """Base of the wrappers: holds the buffers of CUDA graphs and the last plan, and calls attention."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        backend: str = "auto",
        jit_args: object = None,
    ) -> None:
        check_choice("kv_layout", kv_layout, LAYOUTS)
        check_backend(backend, jit_args)
        self.device = check_workspace(float_workspace_buffer)
        self._kv_layout = kv_layout
        self._use_cuda_graph = use_cuda_graph
        self._float_workspace_buffer = float_workspace_buffer
        self._planned: Planned | None = None
        self._plans = Plans(self.device, use_cuda_graph)
        self._ready: dict[tuple[object, ...], Ready] = {}  # calls under the present plan
        self._overridden: dict[tuple[object, ...], Options] = {}
        self._own: dict[str, torch.Tensor] = {}  # buffers of a CUDA graph that the user did not give
        self._paged_kv_indptr_buf: torch.Tensor | None = None
        self._paged_kv_indices_buf: torch.Tensor | None = None
        self._paged_kv_last_page_len_buf: torch.Tensor | None = None
        self._qo_indptr_buf: torch.Tensor | None = None
        self._custom_mask_buf: torch.Tensor | None = None
        self._mask_indptr_buf: torch.Tensor | None = None

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether plan() keeps the addresses of its buffers, for CUDA graphs that hold a run()."""
        return self._use_cuda_graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor | None = None
    ) -> None:
        """Take other workspaces; they are checked and not used."""
        if check_workspace(float_workspace_buffer) != self.device:
            raise ShapeMismatch(
                f"float_workspace_buffer is on {float_workspace_buffer.device}, the wrapper is on {self.device}."
            )
        if int_workspace_buffer is not None:
            check_workspace(int_workspace_buffer, "int_workspace_buffer")
        self._float_workspace_buffer = float_workspace_buffer

    def end_forward(self) -> None:
        """Does nothing; FlashInfer removed it in 0.7."""

    def prewarm_paged_kv_stride_variant(self, variant: str = "independent") -> None:
        """Does nothing: strides are launch arguments."""

    # ---- buffers ----
    def _held(self, name: str, value: torch.Tensor, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """``value`` on the device as int32; under CUDA graphs at an address that stays, in ``buffer`` if the user gave one."""
        if not self._use_cuda_graph:
            return value.to(self.device, torch.int32, non_blocking=True)
        if buffer is not None:
            fill(name, buffer, value)
            if buffer.dtype == torch.int32:
                return buffer
            value = buffer
        own = self._own.get(name)
        if own is None:
            own = self._own[name] = torch.zeros(value.shape[0], dtype=torch.int32, device=self.device)
        fill(name, own, value)
        return own

    def _check_buffers(self, *names: str) -> None:
        """A wrapper for CUDA graphs was given the buffers that its plans are kept in."""
        for name in names:
            buffer = getattr(self, f"_{name}")
            if not isinstance(buffer, torch.Tensor) or buffer.device != self.device:
                raise ShapeMismatch(
                    f"use_cuda_graph=True needs {name} on {self.device}, got "
                    f"{buffer.device if isinstance(buffer, torch.Tensor) else buffer!r}."
                )

    def _paged_tables(
        self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Page list bounds and page numbers, and the lengths of last pages, kept under FlashInfer's attribute names."""
        if indptr.dim() != 1 or indptr.shape[0] != last_page_len.shape[0] + 1:
            raise ShapeMismatch(
                f"the page indptr has shape {tuple(indptr.shape)}, last_page_len {tuple(last_page_len.shape)}. Expected "
                "[batch + 1] and [batch]."
            )
        bounds = self._held("paged_kv_indptr", indptr, self._paged_kv_indptr_buf)
        pages = self._held("paged_kv_indices", indices, self._paged_kv_indices_buf)
        last = self._held("paged_kv_last_page_len", last_page_len, self._paged_kv_last_page_len_buf)
        if not self._use_cuda_graph:
            self._paged_kv_indptr_buf, self._paged_kv_indices_buf, self._paged_kv_last_page_len_buf = bounds, pages, last
        return bounds, pages

    def _q_indptr(self, qo_indptr: torch.Tensor) -> torch.Tensor:
        """First row of each request, kept under FlashInfer's attribute name."""
        held = self._held("qo_indptr", qo_indptr, self._qo_indptr_buf)
        if not self._use_cuda_graph:
            self._qo_indptr_buf = held
        return held

    def _mask(
        self,
        custom_mask: torch.Tensor | None,
        packed_custom_mask: torch.Tensor | None,
        qo_indptr: torch.Tensor,
        kv_len: torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Bits of a custom mask and the first byte of each request; each plan has its own mask, or none."""
        found = mask_bits(custom_mask, packed_custom_mask, qo_indptr.diff(), kv_len, self.device)
        if found is None or not self._use_cuda_graph:
            return found or (None, None)
        if self._custom_mask_buf is None or self._mask_indptr_buf is None:
            raise ShapeMismatch(
                "a custom mask under CUDA graphs needs custom_mask_buf and mask_indptr_buf. Give both to the wrapper."
            )
        for name, buffer, value in zip(
            ("custom_mask", "mask_indptr"), (self._custom_mask_buf, self._mask_indptr_buf), found, strict=True
        ):
            fill(name, buffer, value)
        return self._custom_mask_buf, self._mask_indptr_buf

    def _replaced(
        self,
        causal: bool,
        window_left: int,
        logits_soft_cap: float | None,
        pos_encoding_mode: str,
        sm_scale: float | None,
        rope_scale: float | None,
        rope_theta: float | None,
    ) -> Options:
        """Options of forward(), with the mask of the plan."""
        return self._override(
            right=0 if causal else None, window_left=window_left, logits_soft_cap=logits_soft_cap,
            pos_encoding_mode=pos_encoding_mode, sm_scale=sm_scale, rope_scale=rope_scale, rope_theta=rope_theta,
        )  # fmt: skip

    def _check_batch(self, batch: int, fixed: torch.Tensor | None) -> None:
        """Under CUDA graphs the number of requests is that of the buffers."""
        if self._use_cuda_graph and fixed is not None and batch != fixed.shape[0] - 1:
            raise ShapeMismatch(
                f"the plan has {batch} requests, the buffers of this CUDA graph wrapper are for {fixed.shape[0] - 1}. "
                "Pad the batch with requests of no key, or make a wrapper for this size."
            )

    def _adopt(self, planned: Planned) -> None:
        """Make this the plan that run() uses."""
        self._plans.renew(planned.batch, planned.num_rows)
        self._planned = planned
        self._ready.clear()
        self._overridden.clear()

    def _workspace_bytes(self, batch: int, rows: int, heads: Heads, layout: str) -> tuple[int, int]:
        """Bytes of partial results and of tables that a jitgen plan of this size allocates."""
        plan = Plan(
            max(batch, 1), max(rows, 1), heads.num_q, heads.num_kv, heads.dim_qk, head_dim_v=heads.dim_vo, dtype=heads.q_dtype,
            layout=layout, device=self.device,
        )  # fmt: skip
        parts = [(c.workspace, c.plan) for c in plan.classes if c.workspace is not None and c.plan is not None]
        return sum(w.nbytes for w, _ in parts), sum(p.nbytes for _, p in parts)

    # ---- the call ----
    def _plan_of(self) -> Planned:
        if self._planned is None:
            raise VariantError(f"{type(self).__name__}.run() came before plan(). Call plan() first.")
        return self._planned

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        options: Options,
        *,
        scales: tuple[Scale, Scale, Scale] = (None, None, None),
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Check a call against the plan, run it, and return out or (out, lse)."""
        planned = self._plan_of()
        # a number in the host's memory may change between calls; a tensor is read by the kernel
        given = (options, *(s if as_number(s) is None else as_number(s) for s in scales), sinks)
        key = (*(x if isinstance(x, int | float | None) else id(x) for x in given), q.shape, k.shape, v.shape, q.dtype)
        ready = self._ready.get(key)
        if ready is None:
            ready = self._prepare(planned, given, q, k, v)
            if len(self._ready) >= MAX_READY:
                self._ready.clear()
            self._ready[key] = ready
        heads, batch = planned.heads, planned.batch
        out = result(out, (q.shape[0], heads.num_q, heads.dim_vo), heads.o_dtype, q, "out")
        if return_lse or lse is not None:
            lse = result(lse, (q.shape[0], heads.num_q), torch.float32, q, "lse")
        if options.rotates:
            batch, q, k, v = rotated(batch, q, k, v, options.rope, options.place)
        target = out if out.dtype == q.dtype else torch.empty_like(out, dtype=q.dtype)
        if batch.size and q.shape[0]:
            self._plans.attend(batch, heads, ready.hooks, ready.variant, q, k, v, ready.scale, target, lse)
        if target is not out:
            out.copy_(target)
        return (out, lse) if return_lse else out

    def _run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        changes: dict[str, Any],
        scales: tuple[Scale, Scale, Scale],
        sinks: torch.Tensor | None,
        results: tuple[torch.Tensor | None, torch.Tensor | None],
        return_lse: bool,
        lse_base: str,
        lse_layout: str,
    ) -> Any:
        """As _attend, with changes to the planned options and the logsumexp in the base and layout asked for."""
        check_choice("lse_base", lse_base, ("log2", "ln"))
        check_choice("lse_layout", lse_layout, ("NH", "HN"))
        if lse_base == "ln":
            changes = {**changes, "natural_lse": True}
        options = self._override(**changes) if changes else self._plan_of().options
        out, lse = results
        transposed = return_lse and lse_layout == "HN"
        found = self._attend(
            q, k, v, options, scales=scales, sinks=sinks, out=out, lse=None if transposed else lse, return_lse=return_lse
        )
        if not transposed:
            return found
        turned = found[1].T.contiguous()
        if lse is not None:
            turned = result(lse, tuple(turned.shape), torch.float32, q, "lse").copy_(turned)
        return found[0], turned

    def _prepare(self, planned: Planned, given: tuple[Any, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Ready:
        """What a call's options mean, after its inputs were checked."""
        options, *scales, sinks = given
        heads = planned.heads
        check_inputs(planned, q, k, v)
        check_sinks(sinks, heads.num_q, q.device)
        hooks = hooks_for(options, heads.num_q, heads.num_kv, self.device, *scales)
        return Ready(hooks, hooks.variant(sinks), softmax_scale(options, heads.dim_qk, *scales[:2]), given)

    def _override(self, **changes: Any) -> Options:
        """The planned options with some of them changed; one object for each change, as calls are remembered by it."""
        key = tuple(changes.items())
        if key not in self._overridden:
            self._overridden[key] = replace(self._plan_of().options, **changes)
        return self._overridden[key]


@dataclass(frozen=True)
class Ready:
    """What the options of a call were made into; ``given`` keeps the ids in its key valid."""

    hooks: Hooks
    variant: Variant
    scale: float
    given: tuple[object, ...]
