"""Plan: how a batch of requests is divided among the CTAs of a GPU, or the threads of a CPU."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from jitgen.checks import plain_int
from jitgen.errors import InvalidType, PlanMismatch, UnsupportedDevice, VariantError
from jitgen.graphs import between_graphs
from jitgen.program import Program
from jitgen.serving_cascade import Cascade
from jitgen.serving_checks import check_captures, check_packed, check_plan_numbers
from jitgen.serving_entries import Entries, make_chosen
from jitgen.serving_kernels import DECODE_ROWS, KernelClass, make_classes
from jitgen.serving_lengths import look_at_lengths, take
from jitgen.serving_match import check_values, match_mask, match_norm
from jitgen.serving_op import register_plan
from jitgen.serving_rows import Stage, make_stage
from jitgen.serving_segments import make_segments
from jitgen.serving_selection import ChosenKeys
from jitgen.spec import MLA_DIMS
from jitgen.streams import cuda_index
from jitgen.variant import Tracker, Variant

Tensor = torch.Tensor
# keyword arguments of a plan
OPTIONS = (
    "head_dim_v", "dtype", "kv_dtype", "variant", "layout", "max_q_len", "max_kv_len", "page_size", "split", "kv_split",
    "levels", "selection", "max_kv_tokens", "device", "family",
)  # fmt: skip


class Plan:
    """The division of a batch of requests of any lengths into equal shares of work, for one head layout and one mask.

    Make one plan for all layers that have the same heads and the same mask, once, for the largest batch there will be. Give
    it the lengths of every step with ``update``; then any number of calls use it. On a GPU the lengths stay on the device:
    ``update`` launches a kernel or two, waits for nothing, allocates nothing, and may be captured in a CUDA graph, as may
    the calls; a replay then plans for the lengths that the tensors hold at that time.

    max_batch     most requests of a step
    max_tokens    most query rows of a step, over all requests
    max_q_len     most query rows of one request, if that is known. With 1 (pure decode), or few, only the decode kernel is
                  compiled and launched
    max_kv_len    most keys of a request; needed on a GPU where a hook reads a tensor at exactly q_idx or kv_idx, because
                  kernels do not check that such a tensor is long enough
    layout        'paged' or 'ragged': which call will use the plan
    page_size     keys of a page, if known: from pages of a multiple of 8 the prefill kernel of Hopper has the copy engine bring
                  keys; without it, and of other sizes, they come row by row, at two thirds of the speed
    kv_dtype      dtype of the keys and values in the cache, if not ``dtype``: torch.float8_e4m3fn, torch.float8_e5m2 or
                  torch.int8, with scales that each call is given. On a GPU such plans have the decode kernel only, which
                  takes long prefills at its own speed, unless max_kv_tokens is given
    max_kv_tokens most keys, over all requests, that are gathered in a step on a GPU: those of requests with more query rows
                  than the decode kernel takes, of plans with a kv_dtype or a variant with k_transform or v_transform. They
                  are dequantised and transformed into memory that the plan holds, for the prefill kernel; requests beyond it
                  would give wrong results, which update notices with check=True
    split         'balanced': long requests are cut along their keys so that all CTAs are busy equally long. 'fixed': cut at
                  multiples of ``kv_split`` keys, so a request's result does not depend on what else is in the batch, bit by
                  bit. On a GPU requests of more rows than the decode kernel takes (32, counted once for each query head of a
                  KV head) stay whole, as do all without ``max_kv_len``. 'none': never cut.
                  Requests under a jitgen.OnlineNorm are cut if it has merge
    levels        most levels of the cascades that ``update`` is given in the place of lengths; 1: requests share no keys. The
                  plan then holds the states of max_tokens rows at every level
    selection     'even' or 'uneven': ``update`` is given a jitgen.Selection in the place of lengths; max_batch and max_q_len
                  are those of its lists. 'even': a list ends at the same place for all KV heads. Needs page_size
    head_dim      with head_dim 576, head_dim_v 512 and one KV head: absorbed latent attention (MLA) over a cache of compressed
                  keys, see jitgen.paged_attention; on a GPU of compute capability 9.0 pages of fewer than 8 keys are slow to
                  copy
    family        forces one kernel family: 'decode', 'sm80', 'sm90' or 'sm90_wide' on a GPU; for latent attention
                  'mla' or 'mla_decode' (up to 32 query rows of a request), of compute capability 9.0, or 'sm80_mla'

    Errors:  ShapeMismatch, UnsupportedDtype, UnsupportedDevice, VariantError; CompileError, ToolchainMissing.
    Cost:    compiles the kernels of the variant if no cache has them; allocates ``workspace_bytes``.
    """

    def __init__(
        self,
        max_batch: int,
        max_tokens: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        kv_dtype: torch.dtype | None = None,
        variant: Variant | Any = None,
        layout: str = "paged",
        max_q_len: int | None = None,
        max_kv_len: int | None = None,
        page_size: int | None = None,
        split: str = "balanced",
        kv_split: int | None = None,
        levels: int = 1,
        selection: str | None = None,
        max_kv_tokens: int | None = None,
        device: torch.device | str | None = None,
        family: str | None = None,
    ) -> None:
        self.max_batch, self.max_tokens = plain_int(max_batch), plain_int(max_tokens)
        self.num_q_heads, self.num_kv_heads = plain_int(num_q_heads), plain_int(num_kv_heads)
        self.head_dim = plain_int(head_dim)
        self.head_dim_v = self.head_dim if head_dim_v is None else plain_int(head_dim_v)
        self.dtype, self.kv_dtype = dtype, None if kv_dtype is dtype else kv_dtype
        self.layout, self.family = layout, family
        self.max_q_len, self.max_kv_len, self.page_size = plain_int(max_q_len), plain_int(max_kv_len), plain_int(page_size)
        self.split, self.kv_split, self.levels, self.selection = split, plain_int(kv_split), plain_int(levels), selection
        self.max_kv_tokens = plain_int(max_kv_tokens)
        self.device = _complete(device_of(device))
        check_plan_numbers(self)
        self.is_latent = (self.head_dim, self.head_dim_v) == MLA_DIMS  # absorbed MLA: the values are in the rows of keys
        self.variant = Variant() if variant is None else Variant.of(variant)
        self._tracker = Tracker(self.variant)
        self.q_index = self.variant.q_index or "absolute"
        self.handle = register_plan(self)  # what graphs of torch.compile hold
        self.version = 0  # counts updates
        self.is_planned = False  # the last update was right
        self.calls: dict[tuple[object, ...], Any] = {}  # prepared calls, by shapes and strides
        self.recent: Any = None  # the last of them
        self.device_index = cuda_index(self.device)
        self.checked_table: tuple[Tensor | None, object] = (None, None)
        self.checked_values: list[object] = []
        self.checked_results: object = None
        self.lengths = (0, 0)  # addresses of q_indptr and kv_len, of the entries
        self.longest_q = self.longest_kv = 0  # of the last update, on the CPU
        self.batch = self.rows = 0  # of the last update; rows: -1 where only the device knows
        self.num_requests = 0  # batch counts entries: more than requests where these are attended in parts
        self.chosen_version = 0  # of the selection of the last update
        self.lists: Cascade | ChosenKeys | None = None  # of the last update, if it was given any in the place of lengths
        self.q_indptr: Tensor | None = None
        self.kv_len: Tensor | None = None
        self.kv_start: Tensor | None = None
        self.is_whole = False  # nothing was cut, and nothing is to be merged
        self.request_lengths: Any = (None, None)  # q_indptr and kv_len of requests, where entries are parts of them
        self._program, self._values = self.trace()
        self.segments = make_segments(self, self._program)
        self.entries: Entries | None = self.segments or make_chosen(self, self._program)
        self.stage: Stage | None = None
        self.classes: tuple[KernelClass, ...] = ()
        self._choose_kernels(self._program, self._values)

    def _choose_kernels(self, program: Program, values: list[object]) -> None:
        """The kernels for a program, and what they need of it in front of them."""
        self.stage = make_stage(self, program)
        check_packed(self, program)
        self.classes = make_classes(self, program, values)
        if self.stage is not None:
            self.stage.set_classes(self.classes)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are new plans, made for the same, which have no lengths yet: two may not share memory."""
        sizes = (self.max_batch, self.max_tokens, self.num_q_heads, self.num_kv_heads, self.head_dim)
        return partial(Plan, **{name: getattr(self, name) for name in OPTIONS}), sizes

    def __repr__(self) -> str:
        heads = f"{self.num_q_heads}/{self.num_kv_heads} heads of {self.head_dim}"
        limits = f"max_batch={self.max_batch}, max_tokens={self.max_tokens}"
        return f"Plan({limits}, {heads}, {self.layout}, {self.split}, {self.device})"

    @property
    def workspace_bytes(self) -> int:
        """Memory of the device that the plan holds: what the planner writes, and partial results. Lengths do not change it."""
        states = 0 if self.entries is None else self.entries.nbytes
        states += 0 if self.stage is None else self.stage.nbytes
        return states + sum(c.plan.nbytes + c.workspace.nbytes for c in self.classes if c.plan is not None)

    @property
    def room(self) -> tuple[int, int]:
        """Most entries that kernels see as requests, and most rows of them."""
        return (self.max_batch, self.max_tokens) if self.entries is None else self.entries.room

    @property
    def cut_len(self) -> int:
        """Most query rows of a request that split='fixed' cuts on a GPU."""
        return DECODE_ROWS * self.num_kv_heads // self.num_q_heads

    def trace(self) -> tuple[Program, list[object]]:
        """Program of the plan's variant, and the captured values as they are now."""
        tracker = self._tracker
        values = tracker.check()
        if values is None:
            values = tracker.retrace()
        return tracker.trace.program, values

    def trace_other(self, variant: object, captures: dict[str, object]) -> tuple[Program, list[object]]:
        """As ``trace``, of a call's own variant and with captured values replaced by name."""
        variant = self.variant if variant is None else Variant.of(variant)
        if (variant.q_index or "absolute") != self.q_index:
            raise PlanMismatch(
                f"the variant has q_index={variant.q_index or 'absolute'!r}, the plan's has {self.q_index!r}. Both must match."
            )
        if captures:
            try:
                variant = variant.bind(**captures)
            except VariantError as error:
                raise VariantError(f"{error} Nor has the call an option of that name.") from None
        return variant.resolve()

    @between_graphs
    def update(
        self,
        q_indptr: Tensor | Cascade | ChosenKeys,
        kv_len: Tensor | None = None,
        *,
        kv_indptr: Tensor | None = None,
        check: bool | None = None,
        **captures: object,
    ) -> Plan:
        """Plan for these lengths; returns the plan itself.

        Ragged plans take ``kv_indptr``, the first row in k of every request, and ``kv_len`` only if requests do not fill
        their part of k. Plans made with ``levels`` take a jitgen.Cascade and no lengths, those made with ``selection`` a
        jitgen.Selection. Keyword arguments that the variant captures are used from here on in place of the captured values;
        values that the mask reads are fixed here until the next update.

        Shapes:  q_indptr [batch + 1], kv_indptr [batch + 1], kv_len [batch]; int32 or int64, on the plan's device. A
                 request may have no query rows, no keys, or both.
        Errors:  PlanMismatch, ShapeMismatch, UnsupportedDevice, UnsupportedDtype. Lengths are checked on the CPU; on a GPU
                 only with check=True, which waits for the device.
        Cost:    GPU: one small kernel for each of the plan's kernels, 2 to 5 us each; with int64 lengths one copy more. With
                 levels or a selection, and with split='fixed' where requests are cut, some 20 torch operations more.
        """
        self.is_planned = False  # lengths that are refused leave none: the tensors of those before may be gone
        self.version, self.checked_values = self.version + 1, []
        take(self, q_indptr, kv_len, kv_indptr)
        if captures:
            self.variant = self.variant.bind(**captures)
            self._tracker = Tracker(self.variant)
        program, values = self.trace()
        look_at_lengths(self, program, bool(check))
        self.lengths = (self.q_indptr.data_ptr(), self.kv_len.data_ptr())  # type: ignore[union-attr]
        if program is not self._program:
            match_norm(self._program, program)
            self._choose_kernels(program, values)
        if program is not self._program or self.is_whole:
            self.forget_calls()
        self._program, self._values = program, values
        check_captures(self, program, values)
        if self.stage is not None:
            self.stage.update(bool(check))
        for c in self.classes:
            c.launch_planner(self, program, values)
        self.is_planned = True
        return self

    def forget_calls(self, *, is_whole: bool = False) -> None:
        """Calls are prepared anew. ``is_whole``: the planner has cut no request of the last update, so they merge nothing."""
        self.is_whole = is_whole
        self.calls.clear()
        self.recent = None

    def check_planned(self) -> None:
        """There are lengths to work with.

        Errors:  PlanMismatch.
        """
        if not self.is_planned:
            state = "has no lengths yet" if self.version == 0 else "has no lengths since its last update was refused"
            raise PlanMismatch(f"the plan {state}. Call plan.update(q_indptr, kv_len) first.")

    def match_mask(self, program: Program) -> tuple[tuple[int, int], ...]:
        """Pairs of slots, the plan's and ``program``'s, that hold what the mask reads: see serving_match.py."""
        return match_mask(self._program, program)

    def check_values(self, pairs: tuple[tuple[int, int], ...], program: Program, values: list[object]) -> None:
        """What the mask of a call reads is what ``update`` saw."""
        check_values(self._values, pairs, program, values)

    def explain(self, rows: int = 16) -> str:
        """The plan of the last update as a table: how the work is divided, and how evenly.

        ``rows`` bounds the CTAs that are listed, those with the most work first.

        Errors:  PlanMismatch before the first update.
        Cost:    copies the plan from the device, waiting for it.
        """
        from jitgen.serving_explain import explain

        self.check_planned()
        return explain(self, self._program, self._values, rows)


def device_of(device: object) -> torch.device:
    """The device that an argument names; without one the GPU, or the CPU where there is none."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device, torch.device):
        return device
    try:
        return torch.device(device)  # type: ignore[call-overload, no-any-return]
    except (RuntimeError, TypeError, ValueError):
        raise InvalidType(
            f"device is {device!r} of type {type(device).__name__}, expected a torch.device, or a name like 'cuda:0'."
        ) from None


def _complete(device: torch.device) -> torch.device:
    """The device with its number, as tensors have it."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedDevice("device is cuda, and torch finds no GPU here. Use device='cpu', or ask 'jitgen doctor' why.")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise UnsupportedDevice(
            f"device is {device}, and torch finds {torch.cuda.device_count()} GPUs here, counted from cuda:0; "
            "CUDA_VISIBLE_DEVICES may hide others."
        )
    return device


def default_scale(plan: Plan) -> float:
    """What multiplies q . k unless the call says otherwise."""
    return 1.0 / math.sqrt(plan.head_dim)


def check_lse(program: Program) -> None:
    """A norm without logsumexp cannot return one."""
    if program.norm is not None and program.norm.lse is None:
        raise VariantError("the logsumexp was asked for, but the variant's OnlineNorm has none. Give it a method lse(state).")
