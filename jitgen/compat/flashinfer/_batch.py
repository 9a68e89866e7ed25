"""The requests of a plan, and attention over them: where the wrappers of the shim meet jitgen's own serving calls."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from jitgen.checks import plain_int
from jitgen.compat.flashinfer._hooks import Hooks, Place
from jitgen.compat.flashinfer.rope import positions_of
from jitgen.errors import InvalidType, ShapeMismatch
from jitgen.program import Program
from jitgen.rotary import rope as rope_rows
from jitgen.serving import paged_attention, ragged_attention
from jitgen.serving_lists import PageTable
from jitgen.serving_plan import Plan
from jitgen.variant import Variant

MAX_PLANS = 16  # of one wrapper in eager mode: masks and sizes that it remembers


@dataclass(frozen=True)
class Heads:
    """Head counts, head dims and dtypes of a plan."""

    num_q: int
    num_kv: int
    dim_qk: int
    dim_vo: int
    q_dtype: torch.dtype
    o_dtype: torch.dtype
    kv_dtype: torch.dtype | None = None  # of the cache, if not q_dtype

    def __post_init__(self) -> None:
        for name, value in (("num_qo_heads", self.num_q), ("num_kv_heads", self.num_kv)):
            if not isinstance(plain_int(value), int) or isinstance(value, bool):
                raise InvalidType(f"{name} is {value!r} of type {type(value).__name__}, expected an int.")
        if self.num_kv < 1 or self.num_q % self.num_kv:
            raise ShapeMismatch(
                f"num_qo_heads is {self.num_q}, num_kv_heads is {self.num_kv}: the first must be a multiple of the second."
            )


@dataclass(frozen=True)
class Batch:
    """Where each request's rows and keys are. Everything is on the device; nothing of it is read by the host.

    Shapes:  q_indptr int32 [batch + 1] rows of q; kv_len int32 [batch]; kv_start int32 [batch + 1]: first row of k when
             ragged, first entry of pages when paged; pages int32 page numbers, None when ragged.
    """

    q_indptr: torch.Tensor
    kv_len: torch.Tensor
    kv_start: torch.Tensor
    pages: torch.Tensor | None
    page_size: int
    split: str = "balanced"
    kv_split: int | None = None
    max_q_len: int | None = None  # most rows of a request, where it is known

    def __post_init__(self) -> None:
        if self.pages is not None and self.page_size < 1:
            raise ShapeMismatch(f"page_size is {self.page_size}, expected the number of keys of a page, 1 at least.")

    @property
    def size(self) -> int:
        """Number of requests."""
        return self.kv_len.shape[0]

    @functools.cached_property
    def page_table(self) -> PageTable:
        """The page lists of a paged batch."""
        return PageTable.csr(self.kv_start, self.pages)  # type: ignore[arg-type]


@dataclass
class Held:
    """A jitgen plan, and what it was last updated for."""

    plan: Plan
    program: Program  # keeps its id in the key valid
    variant: Variant | None  # what the plan was made with, as it was given
    batch: Batch
    mask_tensors: dict[str, torch.Tensor]

    def update(self) -> None:
        """Plan for the lengths of the batch and the tensors that the mask reads."""
        kv_indptr = self.batch.kv_start if self.batch.pages is None else None
        self.plan.update(self.batch.q_indptr, self.batch.kv_len, kv_indptr=kv_indptr, **self.mask_tensors)

    def holds_for(self, batch: Batch, mask_tensors: dict[str, torch.Tensor]) -> bool:
        """Whether it was last updated for these."""
        return self.batch is batch and all(t is mask_tensors[name] for name, t in self.mask_tensors.items())


class Plans:
    """The jitgen plans of a wrapper: one for each mask, head layout and size that was called for.

    Under CUDA graphs every plan is kept and updated with each new batch, since a captured call reads it; else plans are
    updated when they are next used.
    """

    def __init__(self, device: torch.device, in_graphs: bool = False) -> None:
        self.device, self.in_graphs = device, in_graphs
        self._held: dict[tuple[object, ...], Held] = {}
        self._last: tuple[Variant, Batch, int, tuple[Plan, Variant | None]] | None = None  # a model's layers call alike

    def renew(self, batch: Batch, num_rows: int | None) -> None:
        """Under CUDA graphs: update every plan for new lengths, at the addresses of the old ones.

        Errors:  ShapeMismatch if there are more rows than a call had before, as far as the host knows.
        """
        if not self.in_graphs:
            return
        for held in self._held.values():
            if num_rows is not None and num_rows > held.plan.max_tokens:
                raise ShapeMismatch(
                    f"the plan has {num_rows} query rows, an earlier run() of this CUDA graph wrapper had "
                    f"{held.plan.max_tokens}, and a graph may hold it. Capture with the most rows there will be."
                )
            held.batch = batch
            held.update()

    def attend(
        self,
        batch: Batch,
        heads: Heads,
        hooks: Hooks,
        variant: Variant,
        q: torch.Tensor,
        kv: Any,
        layout: str,
        scale: float,
        out: torch.Tensor | None,
        lse: torch.Tensor | None,
        return_lse: bool,
    ) -> Any:
        """Attention of a batch: out or (out, lse), in the tensors given for them if any.

        Shapes:  q [total_q, num_q_heads, head_dim]; kv a paged cache in ``layout`` or ragged k and v; returns [total_q,
                 num_q_heads, head_dim_v] and float32 [total_q, num_q_heads].
        """
        plan, variant = self.plan_for(batch, heads, hooks, variant, q.shape[0])
        results = {"out": out, "lse": lse, "return_lse": return_lse}
        if batch.pages is None:
            return ragged_attention(q, *kv, plan, variant=variant, scale=scale, **results)
        return paged_attention(q, kv, batch.page_table, plan, variant=variant, scale=scale, kv_layout=layout, **results)

    def plan_for(self, batch: Batch, heads: Heads, hooks: Hooks, variant: Variant, rows: int) -> tuple[Plan, Variant | None]:
        """The plan of a call, updated for its batch, and the variant unless it is the plan's own.

        The plan is made first if there is none for the mask and the sizes.
        """
        last = self._last
        if last is not None and last[0] is variant and last[1] is batch and last[2] == rows:
            return last[3]
        program, tensors = variant.trace().program, hooks.mask_tensors
        sizes = (batch.size, max(rows, 1)) if self.in_graphs else (power_of_two(batch.size), power_of_two(rows))
        layout, page_size = ("ragged", None) if batch.pages is None else ("paged", batch.page_size)
        key = (id(program), hooks.mask_numbers, heads, layout, page_size, batch.split, batch.kv_split, batch.max_q_len, sizes)
        if self.in_graphs:  # a captured call reads what its plan was updated for: no two masks may share one
            key += tuple(map(id, tensors.values()))
        held = self._held.get(key)
        if held is None:
            plan = Plan(
                *sizes, heads.num_q, heads.num_kv, heads.dim_qk, head_dim_v=heads.dim_vo, dtype=heads.q_dtype,
                kv_dtype=heads.kv_dtype, variant=variant.bind(**tensors) if tensors else variant, layout=layout,
                max_q_len=batch.max_q_len, page_size=page_size, split=batch.split, kv_split=batch.kv_split,
                device=self.device,
            )  # fmt: skip
            if not self.in_graphs and len(self._held) >= MAX_PLANS:
                del self._held[next(iter(self._held))]
            held = self._held[key] = Held(plan, program, None if tensors else variant, batch, tensors)
            held.update()
        elif not held.holds_for(batch, tensors):
            held.batch, held.mask_tensors = batch, tensors
            held.update()
        found = (held.plan, None if held.variant is variant else variant)
        self._last = (variant, batch, rows, found)
        return found


def power_of_two(n: int) -> int:
    """The least power of two that is not less, so that a growing batch needs few plans."""
    return 1 << max(n - 1, 0).bit_length()


# ---- rotation before attention --------------------------------------------------------------------------------------------


def row_positions(batch: Batch, num_rows: int) -> torch.Tensor:
    """Position of each row of q in its request: the last rows stand at the last keys. int64 [num_rows]."""
    return positions_of(batch.q_indptr, batch.kv_len - batch.q_indptr.diff(), num_rows)


def rotated_rows(batch: Batch, q: torch.Tensor, rope: tuple[float, float]) -> torch.Tensor:
    """q turned to the positions of its rows."""
    scale, theta = rope
    return rope_rows(q, None, row_positions(batch, q.shape[0]), theta=theta, scale=scale)[0]


def rotated(
    batch: Batch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: tuple[float, float], place: Place | None = None
) -> tuple[Batch, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q and k turned to their positions, and the batch that they are read with.

    A paged cache is read into a copy whose pages lie in the order of the page lists: a page may stand at different positions
    in two requests.

    Cost:    copies q and the keys, of a paged cache the values too; no wait for the device.
    """
    scale, theta = rope
    rows, base = row_positions(batch, q.shape[0]), torch.zeros_like(batch.kv_len)
    if place is not None:
        rows, base = place.row_position[: q.shape[0]], place.kv_base
    q, _ = rope_rows(q, None, rows, theta=theta, scale=scale)
    if batch.pages is None:
        positions = positions_of(batch.kv_start, base, k.shape[0])
        return batch, q, rope_rows(k, None, positions, theta=theta, scale=scale)[0], v
    listed = batch.pages.long().clamp(0, max(k.shape[0] - 1, 0))  # a buffer may end in entries that were never set
    entry = torch.arange(listed.shape[0], device=listed.device)
    request = (torch.searchsorted(batch.kv_start.long(), entry, right=True) - 1).clamp(0, batch.size - 1)
    first = base[request] + (entry - batch.kv_start[request]) * batch.page_size
    positions = first[:, None] + torch.arange(batch.page_size, device=first.device)
    keys, _ = rope_rows(k[listed].flatten(0, 1), None, positions.flatten(), theta=theta, scale=scale)
    return replace(batch, pages=entry.int()), q, keys.view(-1, *k.shape[1:]), v[listed]
