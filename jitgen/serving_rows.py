"""Rows of q, k and v on their way to the kernels of a plan: transformed by the variant, or stored in 8 bits.

The decode kernel transforms keys and values itself where it can, so each is read once. Kernels that read tiles of keys by the
copy engine, or multiply them in tensor cores straight from where they lie, cannot: for their requests one kernel before them
gathers the keys and values into contiguous memory, the stage, transformed and dequantised. That costs a read and a write of
each key, and the attention of a request of n query rows then works n times on each. Rows of q are always transformed by a
kernel of their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from jitgen.errors import PlanMismatch, UnsupportedDevice, VariantError
from jitgen.kv_checks import check_row_captures
from jitgen.kv_decode import fits_decode, rows_in_decode, turns_in_decode, with_value_factor
from jitgen.kv_launch import RowsCall, Stream, prepare_rows, turn_words
from jitgen.kv_tokens import Tokens
from jitgen.program import Program, RowHooks, RowProgram, without_rows
from jitgen.serving_scales import stored_dtype
from jitgen.spec import MLA_DIMS, KernelSpec

if TYPE_CHECKING:
    from jitgen.serving_kernels import KernelClass
    from jitgen.serving_plan import Plan

Tensor = torch.Tensor
_AS_THEY_ARE = RowHooks()
MAX_PREPARED = 256  # kernels for rows with their arguments, by shapes


class Stage:
    """What a plan needs besides its attention kernels where rows are not read as they are stored.

    fits_decode  the decode kernel reads keys where they are stored, and transforms them itself
    capacity     keys that there is room for; on the CPU as many as the last update asks for
    """

    def __init__(self, plan: Plan, program: Program) -> None:
        self.plan, self.device = plan, plan.device
        self.kinds = _kinds(program)
        self.changes_q = program.rows is not None and not program.rows.q.is_empty
        self.changes_keys = program.rows is not None and program.rows.changes_keys
        dims = plan.head_dim, plan.head_dim_v
        on_gpu = self.device.type == "cuda"
        self.gathers_bytes = _gathers_bytes(plan)
        others = with_value_factor(program)
        is_left = others.rows is None or not others.rows.changes_keys  # by the decode kernel, which has nothing to transform
        self.fits_decode = on_gpu and (is_left or (not stored_dtype(plan) and fits_decode(program, *dims)))
        self.capacity = 0
        self.direct_rows = 0  # requests of no more rows (query rows * query heads of a KV head) are not staged
        self.start = torch.zeros(plan.room[0] + 1, dtype=torch.int32, device=self.device)  # first row of each entry
        self.no_lengths = torch.zeros(plan.max_batch, dtype=torch.int32, device=self.device)
        self.k, self.v = (self._rows(0, dim) for dim in dims)
        self._prepared: dict[tuple[object, ...], RowsCall] = {}
        self._checked: dict[tuple[object, ...], Program] = {}

    @property
    def nbytes(self) -> int:
        """Memory of the device."""
        return sum(t.nbytes for t in (self.start, self.no_lengths, self.k, self.v))

    @property
    def strides(self) -> tuple[int, ...]:
        """Page, row and head of k, then of v, as kernels for ragged keys take them."""
        return (0, *self.k.stride()[:2], 0, *self.v.stride()[:2])

    @property
    def q_stride(self) -> tuple[int, int]:
        """Rows and heads of a transformed q."""
        return self.plan.num_q_heads * self.plan.head_dim, self.plan.head_dim

    def _rows(self, count: int, dim: int) -> Tensor:
        return torch.empty(count, self.plan.num_kv_heads, dim, dtype=self.plan.dtype, device=self.device)

    def _reserve(self, count: int) -> None:
        if count > self.k.shape[0]:
            self.k, self.v = (self._rows(count, dim) for dim in (self.plan.head_dim, self.plan.head_dim_v))

    # ---- what the plan asks when it chooses its kernels ----

    def set_classes(self, classes: tuple[KernelClass, ...]) -> None:
        """Make room for the keys that the classes read from the stage."""
        staged = [c for c in classes if c.staged]
        self.direct_rows = max((c.class_rows for c in classes if not c.staged), default=0)
        if staged and self.plan.selection is not None:
            raise VariantError(
                "a kernel of the plan reads copies of keys that are transformed or dequantised, and copies are made of whole "
                "requests, not of a selection. Transform keys when they are appended, or make the plan for decode: max_q_len=1."
            )
        if not staged or self.device.type == "cpu":
            return
        if self.plan.max_kv_tokens is None:
            raise VariantError(
                "the variant transforms keys or values, and a kernel of the plan reads transformed copies of them. Make the "
                "plan with max_kv_tokens=, the most keys of all requests in a step, or with max_q_len= for decode alone."
            )
        self.capacity = self.plan.max_kv_tokens
        self._reserve(self.capacity)

    def specify(self, spec: KernelSpec, placed: Program, staged: bool) -> KernelSpec:
        """The spec of an attention kernel, for a program whose places are those of the plan's entries."""
        rows = None
        if spec.family == "decode" and self.changes_keys and not staged:
            placed = with_value_factor(placed)
            if placed.rows.changes_keys:  # type: ignore[union-attr]
                rows = rows_in_decode(placed, spec.dtype, spec.head_dim, spec.head_dim_v)
        return replace(spec, program=without_rows(placed), rows=rows)

    def words(self, c: KernelClass, program: Program, scales: list[object]) -> list[object]:
        """The fields of a class in front of the captures."""
        if c.staged:
            return []
        if c.kernel.spec.rows is None:
            return scales
        return [*scales, *turn_words(turns_in_decode(program, self.plan.head_dim, self.plan.head_dim_v))]

    def check(self, program: Program) -> None:
        """A call's own variant transforms what the plan's does."""
        if _kinds(program) != self.kinds:
            raise PlanMismatch(
                f"the variant transforms rows of {_named(_kinds(program))}, the plan was made for one that transforms rows of "
                f"{_named(self.kinds)}. Make a plan with variant= for each."
            )

    # ---- lengths ----

    def update(self, check: bool) -> None:
        """Places of the keys of each entry, on the device; a request whose keys the decode kernel reads has none."""
        plan, count = self.plan, self.plan.batch
        if not any(c.staged for c in plan.classes) or count == 0:
            return
        rows = plan.q_indptr.diff() * (plan.num_q_heads // plan.num_kv_heads)  # type: ignore[union-attr]
        needed = torch.where(rows > self.direct_rows, plan.kv_len, 0)  # type: ignore[call-overload]
        ends = needed.cumsum(0)
        if self.device.type == "cpu":
            self.capacity = int(ends[-1])
            self._reserve(self.capacity)
        elif check and int(ends[-1]) > self.capacity:
            raise PlanMismatch(
                f"the keys to be transformed are {int(ends[-1])}, the plan was made for max_kv_tokens={self.capacity}."
            )
        self.start[1 : count + 1] = ends.clamp(max=self.capacity)

    # ---- launches ----

    def check_captures(self, program: Program, values: list[object]) -> None:
        """Captured tensors reach as far as transforms index them; looked at again only where their shapes have changed."""
        rows = program.rows
        key = (id(program), *[value.shape for value in values if isinstance(value, Tensor)])
        if rows is None or key in self._checked:
            return
        plan = self.plan
        shapes = [(plan.num_q_heads, plan.head_dim), (plan.num_kv_heads, plan.head_dim), (plan.num_kv_heads, plan.head_dim_v)]
        like = [torch.empty(0, *shape, dtype=plan.dtype, device=self.device) for shape in shapes]
        check_row_captures(program.slots, values, list(zip((rows.q, rows.k, rows.v), like, strict=True)))
        if len(self._checked) >= MAX_PREPARED:
            self._checked.clear()
        self._checked[key] = program  # which keeps its id its own

    def transform_q(self, program: Program, values: list[object], q: Tensor) -> Tensor:
        """A copy of q after q_transform; rows of padding are not written."""
        assert program.rows is not None
        plan = self.plan
        q_indptr, kv_len = plan.request_lengths
        is_local = plan.q_index == "local"
        lengths = self.no_lengths if is_local else kv_len
        written = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        key = ("q", id(program), q.shape[0], q.stride(), q.data_ptr() & 63)
        call = self._prepared.get(key)
        if call is None:
            p = program.rows.q
            stream = Stream("q", q, written, written.data_ptr(), (0, *written.stride()[:2]), p.rope, p)
            tokens = Tokens(q.shape[0], q_indptr=q_indptr, lengths=lengths, from_end=not is_local)
            call = self._keep(key, prepare_rows([stream], "rows", tokens, q.device, program))
        call = replace(call, numbers=(0, not is_local, q.shape[0], plan.num_requests, 1, 0, 0, 0))
        addresses = (0, 0, 0, q_indptr.data_ptr(), lengths.data_ptr(), 0, 0)
        call.run(addresses, [(q.data_ptr(), written.data_ptr(), 0, 1.0)], values)
        return written

    def gather(
        self,
        program: Program,
        values: list[object],
        numbers: tuple[int, int, int, int],
        strides: tuple[int, ...],
        keys: tuple[int, int, int, int],
        list_stride: int,
        scales: list[object],
    ) -> None:
        """Copy keys and values into the stage. ``numbers``, ``strides`` and ``keys``: those of the call's launches."""
        plan = self.plan
        k, v, kv_start, pages = keys
        if self.device.type == "cuda" and (k | v) & 15:
            raise UnsupportedDevice(
                "the memory of k or v does not start at a multiple of 16 bytes, which the cuda kernels need. Allocate the "
                "cache as a tensor of its own, or slice it at such a place."
            )
        if self.capacity == 0:
            return
        placed, tables = program, []
        if plan.segments is not None:
            placed, tables = plan.segments.place(program), plan.segments.tables(program)
        rows = placed.rows or _AS_THEY_ARE
        _, _, page_size, num_pages = numbers
        where = (num_pages, page_size) if pages else (1, num_pages)
        key = ("kv", id(placed), strides, where, self.capacity)
        call = self._prepared.get(key)
        if call is None:
            streams = [
                self._stream(name, where, strides[3 * i : 3 * i + 3], target, p)
                for i, (name, target, p) in enumerate((("k", self.k, rows.k), ("v", self.v, rows.v)))
            ]
            places = "from_pages" if pages else "from_rows"
            tokens = Tokens(self.capacity, page_size=where[1])
            call = self._keep(key, prepare_rows(streams, places, tokens, self.device, placed))
        of_scales = [(0, 0), (0, 0)] if not scales else [tuple(scales[2:4]), tuple(scales[4:6])]
        call = replace(
            call,
            numbers=(0, False, self.capacity, plan.batch, where[1], where[0], list_stride, 0),
            rows=tuple((*row[:-2], *s) for row, s in zip(call.rows, of_scales, strict=True)),
        )
        addresses = [(0, 1.0), (0, 1.0)] if not scales else [(scales[0], scales[6]), (scales[1], scales[7])]
        streams_words = [(x, t.data_ptr(), *s) for x, t, s in zip((k, v), (self.k, self.v), addresses, strict=True)]
        call.run((0, 0, 0, self.start.data_ptr(), 0, kv_start, pages), streams_words, [*values, *tables])

    def _stream(self, name: str, where: tuple[int, int], strides: tuple[int, ...], target: Tensor, p: RowProgram) -> Stream:
        """A stream from a cache of which all but the address is known."""
        dtype = self.plan.kv_dtype or self.plan.dtype
        cache = torch.empty_strided((*where, *target.shape[1:]), (*strides, 1), dtype=dtype, device="meta")
        stream = Stream.gathered(name, cache, target, p)
        stream.scale = "read" if stored_dtype(self.plan) else ""
        return stream

    def _keep(self, key: tuple[object, ...], call: RowsCall | None) -> RowsCall:
        assert call is not None
        if len(self._prepared) >= MAX_PREPARED:
            self._prepared.clear()
        self._prepared[key] = call
        return call


def make_stage(plan: Plan, program: Program) -> Stage | None:
    """The stage of a plan, None for one whose kernels read rows as they are stored.

    Errors:  VariantError.
    """
    if program.rows is not None and (plan.head_dim, plan.head_dim_v) == MLA_DIMS:
        raise VariantError(
            f"the variant transforms rows, and with head dims {MLA_DIMS} a row is key and value at once. Transform it in "
            "jitgen.append."
        )
    return Stage(plan, program) if program.rows is not None or _gathers_bytes(plan) else None


def _gathers_bytes(plan: Plan) -> bool:
    """Whether prefill reads dequantised copies of keys of 8 bits; without room for them the decode kernel serves all."""
    return bool(stored_dtype(plan)) and plan.device.type == "cuda" and plan.max_kv_tokens is not None


def _kinds(program: Program) -> tuple[bool, ...]:
    """Whether rows of q, k and v are transformed."""
    rows = program.rows or _AS_THEY_ARE
    return tuple(not p.is_empty for p in (rows.q, rows.k, rows.v))


def _named(kinds: tuple[bool, ...]) -> str:
    return " and ".join(name for name, is_changed in zip("qkv", kinds, strict=True) if is_changed) or "none"
