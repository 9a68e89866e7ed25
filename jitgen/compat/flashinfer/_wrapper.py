"""What the attention wrappers of the shim have in common: the plan they hold, and the call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from jitgen.compat.flashinfer._batch import Heads, Plans, rotated, rotated_rows
from jitgen.compat.flashinfer._buffers import Buffers
from jitgen.compat.flashinfer._hooks import Hooks, Options, Scale, as_number, check_sinks, hooks_for, softmax_scale
from jitgen.compat.flashinfer._inputs import Planned, check_inputs, result
from jitgen.compat.flashinfer._options import LAYOUTS, check_backend, check_choice, check_workspace, split_cache
from jitgen.errors import ShapeMismatch, UnsupportedDtype, VariantError
from jitgen.kv_decode import ROTATED_CHUNKS
from jitgen.serving_kernels import DECODE_ROWS
from jitgen.serving_plan import Plan
from jitgen.variant import Variant

Keys = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
MAX_OVERRIDDEN = 64  # options that a wrapper remembers
MAX_READY = 256  # calls that a wrapper remembers between two plans: layers may have their own sinks and scales


class Wrapper(Buffers):
    """Base of the wrappers: holds the last plan, and calls attention."""

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
        super().__init__(check_workspace(float_workspace_buffer), use_cuda_graph)
        self._kv_layout = kv_layout
        self._float_workspace_buffer = float_workspace_buffer
        self._planned: Planned | None = None
        self._plans = Plans(self.device, use_cuda_graph)
        self._ready: dict[tuple[object, ...], Ready] = {}  # calls under the present plan
        self._overridden: dict[tuple[object, ...], Options] = {}
        self._last: Ready | None = None

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

    def _adopt(self, planned: Planned) -> None:
        """Make this the plan that run() uses."""
        self._plans.renew(planned.batch, planned.num_rows)
        old = self._planned
        if old is not None and old.heads == planned.heads and same_options(old.options, planned.options):
            if old.batch.page_size == planned.batch.page_size:
                self._planned = replace(planned, options=old.options)  # what calls were made into holds on
                return
        self._planned = planned
        options = planned.options  # under the names that vLLM compares with its own values
        self._causal, self._window_left, self._sm_scale = options.right == 0, options.window_left, options.sm_scale
        self._logits_soft_cap = options.cap or 0.0
        self._ready.clear()
        self._overridden.clear()
        self._last = None

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
        kv: Keys,
        options: Options,
        *,
        scales: tuple[Scale, Scale, Scale] = (None, None, None),
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Check a call against the plan, run it, and return out or (out, lse).

        ``kv`` is a paged cache in the wrapper's layout or, ragged, k and v [total_kv, num_kv_heads, head_dim(_v)].
        """
        planned = self._plan_of()
        ready = self._ready_for(planned, q, kv, options, scales, sinks)
        batch, heads = planned.batch, planned.heads
        if planned.num_rows is not None and q.shape[0] < planned.num_rows:
            raise ShapeMismatch(f"q has {q.shape[0]} rows, the plan has {planned.num_rows}. Plan again for these rows.")
        layout = self._kv_layout
        if options.rotates:
            if heads.kv_dtype not in (None, heads.q_dtype):
                raise UnsupportedDtype(
                    f"pos_encoding_mode='ROPE_LLAMA' reads the cache as {heads.q_dtype}, and it is {heads.kv_dtype}. Rotate "
                    "keys when they are appended."
                )
            if ready.turns_keys:
                q = rotated_rows(batch, q, options.rope)
            else:
                batch, q, *kv = rotated(batch, q, *self._split(kv), options.rope, options.place)
                layout = "NHD"
        call = (heads, ready.hooks, ready.variant, q, kv, layout, ready.scale)
        if heads.o_dtype == q.dtype and batch.size:
            return self._plans.attend(batch, *call, out, lse, return_lse)
        out = result(out, (q.shape[0], heads.num_q, heads.dim_vo), heads.o_dtype, q, "out")
        if return_lse:
            lse = result(lse, (q.shape[0], heads.num_q), torch.float32, q, "lse")
        if batch.size:
            out.copy_(self._plans.attend(batch, *call, None, lse, False))
        return (out, lse) if return_lse else out

    def _split(self, kv: Keys) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as NHD."""
        if self._plan_of().batch.pages is None:
            k, v = kv
            return k, v
        return split_cache(kv, self._kv_layout)

    def _ready_for(
        self,
        planned: Planned,
        q: torch.Tensor,
        kv: Keys,
        options: Options,
        scales: tuple[Scale, Scale, Scale],
        sinks: torch.Tensor | None,
    ) -> Ready:
        """What a call's options mean; remembered, as layers of a model call alike."""
        shapes = (q.shape, kv.shape) if isinstance(kv, torch.Tensor) else (q.shape, kv[0].shape, kv[1].shape)
        has_tensors = any(isinstance(s, torch.Tensor) for s in scales)
        last = self._last
        if last is not None and not has_tensors and last.given == (scales, shapes, q.dtype):
            if last.options is options and last.sinks is sinks:
                return last
        # a number in the host's memory may change between calls; a tensor is read by the kernel
        scales = tuple(s if as_number(s) is None else as_number(s) for s in scales)  # type: ignore[assignment]
        key = (id(options), id(sinks), *(id(s) if isinstance(s, torch.Tensor) else s for s in scales), shapes, q.dtype)
        ready = self._ready.get(key)
        if ready is None:
            heads = planned.heads
            check_inputs(planned, q, *self._split(kv))
            check_sinks(sinks, heads.num_q, q.device)
            hooks = hooks_for(options, heads.num_q, heads.num_kv, self.device, *scales)
            scale = softmax_scale(options, heads.dim_qk, *scales[:2])
            turns_keys = turns_as_it_reads(planned, options)
            variant = hooks.variant(sinks, turns_keys=options.rope if turns_keys else None)
            ready = Ready(hooks, variant, turns_keys, scale, options, sinks, scales, (scales, shapes, q.dtype))
            if len(self._ready) >= MAX_READY:
                self._ready.clear()
            self._ready[key] = ready
        self._last = None if has_tensors else ready
        return ready

    def _run(
        self,
        q: torch.Tensor,
        kv: Keys,
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
            q, kv, options, scales=scales, sinks=sinks, out=out, lse=None if transposed else lse, return_lse=return_lse
        )
        if not transposed:
            return found
        turned = found[1].T.contiguous()
        if lse is not None:
            turned = result(lse, tuple(turned.shape), torch.float32, q, "lse").copy_(turned)
        return found[0], turned

    def _override(self, **changes: Any) -> Options:
        """The planned options with some of them changed; one object for each change, as calls are remembered by it."""
        key = tuple(changes.items())
        if key not in self._overridden:
            if len(self._overridden) >= MAX_OVERRIDDEN:  # plans of like options keep them, and places differ from plan to plan
                self._overridden.clear()
                self._ready.clear()
            self._overridden[key] = replace(self._plan_of().options, **changes)
        return self._overridden[key]


@dataclass(frozen=True)
class Ready:
    """What the options of a call were made into, and what keeps the ids in its key valid."""

    hooks: Hooks
    variant: Variant
    turns_keys: bool
    scale: float
    options: Options
    sinks: torch.Tensor | None
    scales: tuple[Scale, ...]
    given: tuple[object, ...]  # scales, shapes and dtype of a call whose scales are numbers


def turns_as_it_reads(planned: Planned, options: Options) -> bool:
    """Whether keys are to be rotated by the decode kernel as it reads them; others are rotated in copies."""
    heads, batch = planned.heads, planned.batch
    is_decode = batch.max_q_len is not None and batch.max_q_len * heads.num_q <= DECODE_ROWS * heads.num_kv
    fits = heads.kv_dtype in (None, heads.q_dtype) and heads.dim_qk % ROTATED_CHUNKS == 0
    return options.rotates and options.place is None and batch.pages is not None and is_decode and fits


def same_options(a: Options, b: Options) -> bool:
    """Equal numbers and names, and the same tensors."""
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(x is y or (isinstance(x, int | float | str) and x == y) for x, y in pairs)
