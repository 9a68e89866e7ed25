"""The kernels behind a plan: one on the CPU; on CUDA one for requests with few query rows and one for all others."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch

from jitgen import runtime
from jitgen.abi import SERVING_ARGS, pack_format
from jitgen.checks import dtype_name
from jitgen.errors import VariantError
from jitgen.families import merge_spec, mla_family, prefill_family, serving_spec
from jitgen.program import Program, without_rows
from jitgen.serving_place import finishing
from jitgen.serving_scales import no_scales, stored_dtype
from jitgen.serving_slots import NO_PAGES
from jitgen.spec import MLA_DIMS, MLA_FAMILIES, KernelSpec
from jitgen.streams import call_on, stream_of
from jitgen.toolchain import driver_version

if TYPE_CHECKING:
    from jitgen.serving_plan import Plan

Tensor = torch.Tensor
DECODE_ROWS = 32  # most rows (query rows * query heads of a KV head) of a request that the decode kernel takes
SHARED_ROWS = 16  # the same of a plan for cascades, or those of a request: the kernel reads keys again for every 8 of them
ALL_ROWS = 1 << 30
OVERLAP_DRIVER = (12, 3)  # least CUDA version of a driver whose graphs hold programmatic launches
NUM_STRIDES = 10  # at the end of SERVING_ARGS
FILLS = (0, -1)  # of the plan and the workspace, where all ones mean that a partial result has not arrived


def _fields_to(*names: str) -> list[str]:
    """Formats of the runs of SERVING_ARGS that begin at these fields, the first at the first."""
    starts = [[f.name for f in SERVING_ARGS].index(name) for name in names]
    ends = [*starts[1:], len(SERVING_ARGS)]
    return [pack_format(SERVING_ARGS[start:end]) for start, end in zip(starts, ends, strict=True)]


# The fields of a launch in runs. A call knows the first and the third. ``memory`` is that of the plan and its lengths;
# ``batch``, numbers of the batch and the cache; ``fixed``, what a plan and shapes fix. Behind them comes the tail.
_RESULTS, _MEMORY, _PLACE, _BATCH, _FIXED = _fields_to("q", "workspace", "kv_start", "batch", "local_rows")
pack_memory = struct.Struct(_MEMORY).pack
pack_batch = struct.Struct(_BATCH).pack
pack_fixed = struct.Struct(_FIXED).pack
# q, k, v, o, lse; memory as bytes; kv_start, pages, stream, num_threads; batch and fixed as bytes
pack_launch = struct.Struct(
    f"{_RESULTS}{struct.calcsize(_MEMORY)}s{_PLACE[1:]}{struct.calcsize(_BATCH) + struct.calcsize(_FIXED)}s"
).pack


def pack_planner(
    sizes: tuple[int, int, int, int], memory: bytes, fixed: bytes, stream: int, *, kv_start: int = 0, num_pages: int = 0,
    threads: int = 0,
) -> bytes:  # fmt: skip
    """The fields up to the tail as planners read them: without q, k, v and the rest of what only a launch reads.

    ``sizes``: requests, query heads, key heads, rows; ``memory`` and ``fixed`` as pack_memory and pack_fixed make them.
    """
    return pack_launch(
        0, 0, 0, 0, 0, memory, kv_start, 0, stream, threads, pack_batch(*sizes, 0, num_pages, 0, 0) + fixed
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class KernelClass:
    """One kernel of a plan, what its planner writes, and its scratch memory."""

    kernel: runtime.CompiledKernel
    class_rows: int
    num_ctas: int
    plan: Tensor | None  # None on the CPU, which divides the work when it is called
    workspace: Tensor | None
    addresses: tuple[int, int] = (0, 0)  # the fields workspace and plan
    start_planner: Callable[[bytes], int] | None = None
    overlaps: bool = False  # the decode and the prefill kernel of a plan run at the same time
    staged: bool = False  # it reads keys and values that the plan's stage holds

    @property
    def name(self) -> str:
        return self.kernel.spec.family

    def launch_planner(self, plan: Plan, program: Program, values: list[object]) -> None:
        """Start the planner for the lengths that ``plan`` holds, on the current stream."""
        if self.start_planner is None or plan.batch == 0:
            return
        packed = self.pack(plan, program, values, plan.batch, plan.room[1])
        code = call_on(plan.device_index, self.start_planner, packed)
        if code:
            self.kernel.raise_error(code)

    def fixed(self, plan: Plan, programmatic: bool, scale: float = 1.0, strides: tuple[int, ...] = (0,) * NUM_STRIDES) -> bytes:
        """The fields from local_rows to the strides."""
        is_local = plan.q_index == "local" or plan.entries is not None
        return pack_fixed(is_local, self.num_ctas, self.class_rows, split_number(plan), programmatic, scale, *strides)

    @property
    def programmatic(self) -> bool:
        """Whether a launch may begin before the kernel in front of it ends: both kinds wait for it themselves."""
        return self.overlaps or (self.name == "decode" and can_overlap())

    def memory(self, plan: Plan) -> bytes:
        """The fields from workspace to kv_len."""
        return pack_memory(*self.addresses, *plan.lengths)

    def pack(
        self, plan: Plan, program: Program, values: list[object], batch: int, total_q: int, *, room: Tensor | None = None
    ) -> bytes:
        """Arguments without q, k, v and the rest of what only a launch reads.

        ``room`` stands for the workspace and its rows for the CTAs, as jitgen_pieces of the CPU kernel wants them.
        """
        c = self
        if room is not None:
            c = replace(self, addresses=(room.data_ptr(), 0), num_ctas=room.shape[0])
        threads, no_bound = (torch.get_num_threads(), 1 << 62) if plan.device_index is None else (0, 0)  # of rows of k
        starts = plan.stage.start if c.staged else plan.kv_start  # type: ignore[union-attr]
        own = pack_planner(
            (batch, plan.num_q_heads, plan.num_kv_heads, total_q), c.memory(plan), c.fixed(plan, c.overlaps),
            stream_of(plan.device_index), kv_start=0 if starts is None else starts.data_ptr(), num_pages=no_bound,
            threads=threads,
        )  # fmt: skip
        words = c.words(plan, program, no_scales(plan)) + (NO_PAGES if c.kernel.spec.reads_pages else [])
        return own + c.kernel.pack_tail(tail_words(plan, program, values, words))

    def words(self, plan: Plan, program: Program, scales: list[object]) -> list[object]:
        """The fields in front of the captures, from scales on."""
        return scales if plan.stage is None else plan.stage.words(self, program, scales)


def tail_words(plan: Plan, program: Program, values: list[object], own: list[object]) -> list[object]:
    """The fields behind the strides: those of the entries; ``own``, of scales, rotations and pages; and captures."""
    if plan.entries is None:
        return own + runtime.capture_words(program, values) if values else own
    return plan.entries.words(program, values, own)


@cache
def can_overlap() -> bool:
    """Whether CUDA graphs hold launches that begin before the kernel in front of them ends."""
    return (driver_version() or (0, 0)) >= OVERLAP_DRIVER


def split_number(plan: Plan) -> int:
    """The field ``split``: CUDA kernels do not cut at fixed keys, and a request that is never cut depends on no other."""
    if plan.split == "fixed":
        return max(int(plan.kv_split or 0), 2) if plan.device.type == "cpu" else 0
    return int(plan.split == "balanced" and not plan.is_whole)


def ask(kernel: runtime.CompiledKernel, name: str, packed: bytes, plan: Plan, result: type = ctypes.c_int) -> int:
    """What an entry point says about a launch on the plan's device."""
    return int(call_on(plan.device_index, kernel.function(name, result), packed))


def make_classes(plan: Plan, program: Program, values: list[object]) -> tuple[KernelClass, ...]:
    """The kernels that serve a plan, with their memory."""
    if plan.device.type == "cpu":
        if plan.family not in (None, "cpu"):
            raise VariantError(f"family={plan.family!r} needs a plan on cuda, this one is on cpu. Leave family out.")
        staged = plan.stage is not None and plan.stage.changes_keys
        kernel, *_ = runtime.get_kernels([_spec(plan, program, "cpu", 0, staged), *_merge_specs(plan, program)])
        return (KernelClass(kernel, ALL_ROWS, 0, None, None, staged=staged),)
    if (plan.head_dim, plan.head_dim_v) == MLA_DIMS:
        if plan.family not in (None, *MLA_FAMILIES):
            raise VariantError(f"family={plan.family!r} has no kernel for head dims {MLA_DIMS}. Leave family out.")
        q_len = plan.max_q_len or -(-plan.max_tokens // plan.max_batch)  # not known: as if all were alike
        rows = plan.num_q_heads * q_len
        return (_cuda_class(plan, program, values, plan.family or mla_family(plan.device, rows), rows, 0),)
    group = plan.num_q_heads // plan.num_kv_heads
    most_rows = group * plan.max_q_len if plan.max_q_len else None
    rows = min(most_rows or group, DECODE_ROWS)
    # what reads keys where they are stored; all others read the plan's stage
    in_place = plan.stage is None or plan.stage.fits_decode
    staged = plan.stage is not None and (plan.stage.changes_keys or plan.stage.gathers_bytes)
    if stored_dtype(plan) and not staged:
        return (_cuda_class(plan, program, values, "decode", rows, ALL_ROWS),)
    class_rows = DECODE_ROWS
    if plan.levels > 1:  # a group has the rows of many requests
        class_rows, most_rows = min(max(SHARED_ROWS, most_rows or 0), DECODE_ROWS), group * plan.max_tokens
    if plan.family == "decode" or (plan.family is None and most_rows is not None and most_rows <= class_rows):
        return (_cuda_class(plan, program, values, "decode", rows, ALL_ROWS, not in_place),)
    if plan.family is None:
        family = prefill_family(plan.device, plan.max_kv_len, plan.head_dim)
        overlaps = family == "sm90" and can_overlap() and plan.segments is None
        kinds = (("decode", not in_place), (family, staged))
        specs = [_spec(plan, program, name, rows, is_staged) for name, is_staged in kinds]
        runtime.get_kernels([*specs, *_merge_specs(plan, program)])  # all at once: they may have to be compiled
        return tuple(
            replace(_cuda_class(plan, program, values, name, rows, class_rows, is_staged), overlaps=overlaps)
            for name, is_staged in kinds
        )
    return (_cuda_class(plan, program, values, plan.family, rows, 0, staged),)


def kernels_of(plan: Plan, program: Program) -> tuple[runtime.CompiledKernel, ...]:
    """The kernels of the plan's classes for another program, whose mask is the plan's."""
    return runtime.get_kernels([_specified(plan, c.kernel.spec, program, c.staged) for c in plan.classes])


def _specified(plan: Plan, spec: KernelSpec, program: Program, staged: bool) -> KernelSpec:
    """The spec for another program."""
    placed = program if plan.entries is None else plan.entries.place(program)
    return runtime.respecify(spec, placed) if plan.stage is None else plan.stage.specify(spec, placed, staged)


def _spec(plan: Plan, program: Program, family: str, rows: int, staged: bool = False) -> KernelSpec:
    dims = (plan.head_dim, plan.head_dim_v)
    layout = "ragged" if staged else plan.layout
    if plan.segments is not None:
        layout = f"{layout}_states"
    dtype, stored = dtype_name(plan.dtype), "" if staged else stored_dtype(plan)
    bare = without_rows(program)
    options = {"family": family, "rows": rows, "kv_dtype": stored, "page_size": plan.page_size}
    spec = serving_spec(bare, dtype, dims, plan.device, layout, **options)
    return _specified(plan, spec, program, staged)


def merge_kernel(plan: Plan, program: Program) -> runtime.CompiledKernel | None:
    """The kernel that joins the segments of each row; None where requests are taken whole."""
    return next(iter(runtime.get_kernels(_merge_specs(plan, program))), None)


def _merge_specs(plan: Plan, program: Program) -> list[KernelSpec]:
    if plan.segments is None:
        return []
    return [merge_spec(finishing(without_rows(program)), dtype_name(plan.dtype), plan.head_dim_v, plan.device)]


def _cuda_class(
    plan: Plan, program: Program, values: list[object], family: str, rows: int, class_rows: int, staged: bool = False
) -> KernelClass:
    kernel = runtime.get_kernel(_spec(plan, program, family, rows, staged))
    bare = KernelClass(kernel, class_rows, 0, None, None, staged=staged)
    room = plan.room
    num_ctas, sizes = measure(
        kernel, plan.device_index, lambda num_ctas: replace(bare, num_ctas=num_ctas).pack(plan, program, values, *room)
    )
    memory = [
        torch.full((-(-size // 16) * 4,), fill, dtype=torch.int32, device=plan.device)
        for size, fill in zip(sizes, FILLS, strict=True)
    ]
    addresses = memory[1].data_ptr(), memory[0].data_ptr()
    planner = kernel.function("jitgen_plan")
    return KernelClass(kernel, class_rows, num_ctas, *memory, addresses, planner, staged=staged)


def measure(kernel: runtime.CompiledKernel, index: int | None, pack: Callable[[int], bytes]) -> tuple[int, tuple[int, int]]:
    """CTAs of a launch of a CUDA kernel, and bytes of the plan and the workspace for them.

    ``pack``: the arguments of the planner for a number of CTAs.
    Errors:  LaunchError.
    """
    num_ctas = call_on(index, kernel.function("jitgen_num_ctas"), pack(0))
    if num_ctas < 0:
        kernel.raise_error(-num_ctas)
    packed = pack(num_ctas)
    plan, workspace = (
        int(call_on(index, kernel.function(f"jitgen_{name}_bytes", ctypes.c_longlong), packed))
        for name in ("plan", "workspace")
    )
    return num_ctas, (plan, workspace)
