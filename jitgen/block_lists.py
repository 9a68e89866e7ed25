"""Attention over listed blocks by the serving kernels: each block row is an entry, whose pages are its block columns.

The kernels then walk the lists themselves and see nothing else; tiles hold the query heads of a KV head together, so a block
row fills them, and the planner divides long lists among the CTAs. Hooks would see the positions of the whole sequence, but
look each of them up: on an H100 that gains 2 to 3 % with a causal mask over the blocks as a mask too, and ALiBi takes 1.7 to
1.8 times as long. So hooks that read positions keep to masks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.compiler import is_dynamo_compiling

from jitgen.errors import PlanMismatch
from jitgen.families import CUDA_HEAD_DIMS, MAX_SM90_HEAD_DIM, prefill_family
from jitgen.ir import PACKED
from jitgen.program import Program
from jitgen.serving import paged_attention
from jitgen.serving_balance import SHARES_AT, cuts_nothing
from jitgen.serving_checks import MAX_CUDA_BATCH
from jitgen.serving_lists import KVLists
from jitgen.serving_plan import Plan
from jitgen.serving_selection import ChosenKeys
from jitgen.streams import is_capturing, record_event
from jitgen.variant import Variant

Tensor = torch.Tensor
POSITIONS = frozenset(("b", "q_idx", "kv_idx", "q_len", "kv_len", "ctx_len", *PACKED))
PAGE_STEP = 16  # keys: the kernels copy whole boxes of pages of a multiple of it
MAX_PLANS = 16


class BlockRows(ChosenKeys):
    """The block rows of one sequence as entries: row i has the block columns ``indices[indptr[i] : indptr[i + 1]]``."""

    def __init__(self, indptr: Tensor, indices: Tensor, lengths: tuple[int, int], block: tuple[int, int]) -> None:
        (q_len, kv_len), (rows, columns) = lengths, block
        count = indptr.shape[0] - 1
        numbers = torch.arange(count + 1, dtype=torch.int32, device=indptr.device)  # made there: to copy any would wait for it
        keys = torch.full_like(numbers[:1], kv_len)
        entries = ((numbers * rows).clamp_(max=q_len), indptr.diff() * columns, keys.expand(count))
        requests = (numbers[:2] * q_len, keys)
        super().__init__(KVLists(indices, indptr), columns, indices * columns, requests=requests, entries=entries)


@dataclass
class BlockLists:
    """Block columns of each block row, the same for all heads, with the plans that were made for them."""

    indptr: Tensor
    indices: Tensor
    lengths: tuple[int, int]
    block: tuple[int, int]
    rows: BlockRows = field(init=False)
    plans: dict[tuple[object, ...], tuple[Plan, CutWatch]] = field(default_factory=dict)
    captured: list[Plan] = field(default_factory=list)  # that CUDA graphs use: kept

    def __post_init__(self) -> None:
        self.rows = BlockRows(self.indptr, self.indices, self.lengths, self.block)

    def serve(self, q: Tensor, k: Tensor, v: Tensor, program: Program) -> bool:
        """Whether these kernels take a call, and are the faster way.

        Shapes:  as jitgen.attention.
        """
        if is_dynamo_compiling() or q.shape[0] != 1 or self.block[1] % PAGE_STEP or self.rows.batch > MAX_CUDA_BATCH:
            return False
        if not fit_together(q, k, v):
            return False
        is_plain = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] == v.shape[-1]
        has_kernel = q.shape[-1] in CUDA_HEAD_DIMS and q.shape[-1] <= MAX_SM90_HEAD_DIM
        strides = [s for t in (q, k, v) for s in t.stride()[1:3]]
        has_rows = all(t.stride(3) == 1 for t in (q, k, v)) and all(s % 8 == 0 for s in strides)
        is_aligned = not (k.data_ptr() | v.data_ptr()) & 15
        return is_plain and has_kernel and has_rows and is_aligned and is_hopper(q.device) and reads_no_position(program)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, variant: Variant, scale: float | None, out: Tensor | None, want_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Output [1, num_q_heads, q_len, head_dim_v] and logsumexp [1, num_q_heads, q_len] of a call that ``serve`` allows."""
        plan = self._plan(q, v, variant)
        out = q.new_empty(*q.shape[:3], v.shape[3]) if out is None else out
        caches = tuple(self._pages(t) for t in (k, v))
        rows = q[0].transpose(0, 1), out[0].transpose(0, 1)
        lse = q.new_empty(rows[0].shape[:2], dtype=torch.float32) if want_lse else None
        own = None if variant is plan.variant else variant
        paged_attention(rows[0], caches, self.rows, plan, variant=own, scale=scale, out=rows[1], lse=lse)  # type: ignore[arg-type]
        return out, None if lse is None else lse.T.contiguous()[None]

    def _pages(self, t: Tensor) -> Tensor:
        """Keys or values as pages of one block column each."""
        _, heads, length, dim = t.shape
        columns, row, head = self.block[1], t.stride(2), t.stride(1)
        return t.as_strided((length // columns, columns, heads, dim), (columns * row, row, head, 1))

    def _plan(self, q: Tensor, v: Tensor, variant: Variant) -> Plan:
        """The plan for a call, whatever its hooks capture. It counts work that is given out, so calls on different streams have
        their own; a call in a CUDA graph that is being captured takes that of the calls before it."""
        key = (variant.trace().program, q.shape[1], v.shape[1], q.shape[3], v.shape[3], q.dtype, q.device)
        stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0
        is_captured = is_capturing(q.device)
        if is_captured:
            stream = next((known for known, *rest in self.plans if tuple(rest) == key), None)
            if stream is None:
                raise PlanMismatch(
                    "a call over these blocks is captured in a CUDA graph before any was made outside of one, and would plan "
                    "inside of the graph. Make the call once, with the same hooks and shapes, and capture it then."
                )
        if (stream, *key) not in self.plans:
            plan = Plan(
                self.rows.batch, self.lengths[0], q.shape[1], v.shape[1], q.shape[3], head_dim_v=v.shape[3], dtype=q.dtype,
                variant=variant, max_q_len=min(self.block[0], self.lengths[0]), max_kv_len=self.lengths[1],
                page_size=self.block[1], selection="even", device=q.device, family="sm90" if q.is_cuda else None,
            )  # fmt: skip
            if len(self.plans) >= MAX_PLANS:
                self.plans.clear()
            self.plans[(stream, *key)] = plan.update(self.rows), CutWatch(plan)
        plan, watch = self.plans[(stream, *key)]
        watch.look(is_captured)
        if is_captured:
            self.captured.append(plan)
        return plan


class CutWatch:
    """Tells a plan that nothing was cut, and so nothing is to be merged, once the host knows that without a wait."""

    def __init__(self, plan: Plan) -> None:
        self._plan: Plan | None = None
        buffer = plan.classes[0].plan
        if buffer is None or not buffer.is_cuda:
            return
        self._plan = plan
        self._header = torch.empty(SHARES_AT, dtype=torch.uint8, device="cpu", pin_memory=True)
        self._header.copy_(buffer.view(torch.uint8)[:SHARES_AT], non_blocking=True)
        self._event = record_event(buffer.device)

    def look(self, is_captured: bool) -> None:
        """See whether it is known by now; a call that is captured in a CUDA graph asks nothing."""
        if self._plan is None or is_captured or not self._event.query():
            return
        if cuts_nothing(self._header.numpy().tobytes()):
            self._plan.forget_calls(is_whole=True)
        self._plan = None


def fit_together(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the pages that these kernels see of k and v are all there; jitgen.attention says what is wrong otherwise."""
    are_alike = all(t.dtype == q.dtype and t.device == q.device and t.layout == torch.strided for t in (k, v))
    return are_alike and k.shape[0] == q.shape[0] and k.shape[:3] == v.shape[:3]


def is_hopper(device: torch.device) -> bool:
    """Whether the prefill kernel of compute capability 9.0 runs there, which these lists are faster with."""
    return device.type == "cuda" and prefill_family(device, None, MAX_SM90_HEAD_DIM) == "sm90"


def reads_no_position(program: Program) -> bool:
    """Whether the hooks need no place of a row or a key, and no mask."""
    roots = (program.score, program.sink, program.output, program.lse)
    is_softmax = program.norm is None and program.rows is None
    return is_softmax and program.mask is None and all(r is None or POSITIONS.isdisjoint(r.deps) for r in roots)
