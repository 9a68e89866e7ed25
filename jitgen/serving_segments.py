"""Requests in parts: the tables of a plan whose kernels leave the state of each part, for the merge kernel to join.

A part, here a segment, is a run of query rows and a list of keys that all of them see. Kernels take segments as the requests of
a batch: the entries of a plan. What makes segments:

- a cascade: its groups at every level;
- ``split="fixed"`` on a GPU: ``kv_split`` keys of a request at every level.

Entries of all levels stand one after the other. As q_indptr has one number more than there are entries, each level but the
last is followed by an entry without rows: from the last row back to the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jitgen.checks import first_of
from jitgen.errors import PlanMismatch, ShapeMismatch, VariantError
from jitgen.program import Program
from jitgen.serving_checks import MAX_CUDA_BATCH
from jitgen.serving_entries import Entries
from jitgen.serving_lists import PageTable

if TYPE_CHECKING:
    from jitgen.serving_cascade import Cascade
    from jitgen.serving_plan import Plan

Tensor = torch.Tensor


class Beside:
    """A stream for the prefill kernel of a cascade, which leaves some multiprocessors to the decode kernel beside it.

    The prefill of a shared prefix is bound by arithmetic, the decode of suffixes by memory. Its priority is high, so that the
    CTAs of the prefill, which run from the first to the last moment, start first.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device, priority=-1)
        self._fork, self._join = torch.cuda.Event(), torch.cuda.Event()

    def fork(self) -> int:
        """The stream, after what the current one has been given so far."""
        self._fork.record()
        self.stream.wait_event(self._fork)
        return self.stream.cuda_stream

    def join(self) -> None:
        """Let the current stream wait for the other."""
        self._join.record(self.stream)
        self._join.wait()


class Segments(Entries):
    """The tables of a plan with ``levels`` segments for a row at most, and the memory of their states.

    ``cut_rows``: rows that have segments at levels other than the first, if not all may. ``values``: numbers of a state
    besides its output.
    """

    def __init__(self, plan: Plan, levels: int, cut_rows: int | None = None, values: int = 1) -> None:
        super().__init__(plan, levels * (plan.max_batch + 1))
        rows, device = plan.max_tokens, plan.device
        self.levels = levels
        if device.type == "cuda" and self.max_entries > MAX_CUDA_BATCH:
            raise ShapeMismatch(
                f"{levels} levels of max_batch={plan.max_batch} requests are {self.max_entries} parts, expected at most "
                f"{MAX_CUDA_BATCH}. Split the batch, or give a larger kv_split."
            )
        self.state_rows = rows + (levels - 1) * (rows if cut_rows is None else cut_rows)
        self.cut_rows = rows if cut_rows is None else cut_rows
        # by entry
        self.q_indptr, self.kv_len = self.ints(self.max_entries), self.ints(self.max_entries)
        self.kv_start, self.kv_base, self.state_row = (self.ints(self.max_entries) for _ in range(3))
        # by row of q
        self.row_state = self.ints(levels, rows)
        # by request
        self.request_q_indptr, self.request_kv_len = self.ints(plan.max_batch + 1), self.ints(plan.max_batch)
        self.states = torch.empty(self.state_rows, plan.num_q_heads, plan.head_dim_v, dtype=torch.float32, device=device)
        self.state_lse = torch.empty(self.state_rows, plan.num_q_heads, values, dtype=torch.float32, device=device)
        self.named |= {"entry_row": self.q_indptr, "kv_base": self.kv_base}
        self.beside = Beside(device) if plan.levels > 1 and device.type == "cuda" else None

    @property
    def room(self) -> tuple[int, int]:
        """Most entries, and most rows of all of them."""
        return self.max_entries, self.levels * self.max_tokens

    @property
    def addresses(self) -> tuple[int, int]:
        """The fields o and lse of the kernels, states and state_lse of the merge."""
        return self.states.data_ptr(), self.state_lse.data_ptr()

    @property
    def row_addresses(self) -> tuple[int, ...]:
        """The fields row_state to kv_len of the merge."""
        return tuple(t.data_ptr() for t in (self.row_state, self.row_request, self.request_q_indptr, self.request_kv_len))

    def words(self, program: Program, values: list[object], scales: list[object]) -> list[object]:
        """Fields of a kernel behind the strides, state_row first."""
        return [self.state_row.data_ptr(), *super().words(program, values, scales)]

    # ---- filling the tables ----

    def divide_cascade(self, cascade: Cascade) -> None:
        """Tables for the groups of a cascade; rows past the last are left without a state."""
        if len(cascade.levels) > self.levels:
            raise PlanMismatch(f"the cascade has {len(cascade.levels)} levels, the plan was made for levels={self.levels}.")
        self.row_state.fill_(-1)
        base = torch.zeros_like(self._row)  # keys at the levels above, by row
        at = 0
        for number, level in enumerate(cascade.levels):
            end, shift = at + level.size, number * self.max_tokens
            self.q_indptr[at : end + 1] = level.q_indptr
            self.kv_len[at:end] = level.kv_len
            self.kv_len[end : end + 1] = 0
            self.state_row[at:end] = level.q_indptr[:-1] + shift
            self.kv_base[at:end] = base[level.q_indptr[:-1].clamp(0, self.max_tokens - 1)]
            group = self.request_of_row(level.q_indptr)
            keys = level.kv_len[group]
            self.row_state[number] = torch.where((keys > 0) & (self._row < level.q_indptr[-1]), self._row + shift, -1)
            base = base + keys
            at = end + 1
        self._set_requests(cascade.levels[-1].q_indptr, base, group)

    def divide_lengths(self, q_indptr: Tensor, kv_len: Tensor, piece: int, most_rows: int, kv_start: Tensor | None) -> None:
        """Tables for requests cut at every ``piece`` keys; those of more than ``most_rows`` rows stay whole.

        ``kv_start``: first row of each request in k where keys are ragged.
        """
        batch = kv_len.shape[0]
        count = self.levels * (batch + 1)
        q_len = q_indptr.diff()
        is_cut = q_len <= most_rows
        level = torch.arange(self.levels, dtype=torch.int32, device=self.device)[:, None]
        of_piece = torch.where(is_cut, (kv_len - level * piece).clamp(0, piece), torch.where(level == 0, kv_len, 0))
        cut_len = torch.where(is_cut, q_len, 0)
        compact = (cut_len.cumsum(0) - cut_len).to(torch.int32)  # rows of cut requests before each
        first = torch.where(level == 0, q_indptr[:-1], self.max_tokens + (level - 1) * self.cut_rows + compact)
        self.q_indptr[:count].view(self.levels, -1).copy_(q_indptr.expand(self.levels, -1))
        for table, values in ((self.kv_len, of_piece), (self.state_row, first), (self.kv_base, level * piece)):
            table[:count].zero_().view(self.levels, -1)[:, :-1] = values
        if kv_start is not None:
            start = torch.where(of_piece > 0, kv_start[:batch] + level * piece, 0)  # one without keys is nowhere
            self.kv_start[:count].view(self.levels, -1)[:, :-1] = start
        request = self.request_of_row(q_indptr)
        live = (of_piece[:, request] > 0) & (self._row < q_indptr[-1])
        self.row_state.copy_(torch.where(live, first[:, request] + (self._row - q_indptr[request]), -1))
        self._set_requests(q_indptr, kv_len[request], request)

    def list_starts(self, table: PageTable, batch: int, pages: int) -> None:
        """First entry in the page lists of pieces of ``pages`` pages."""
        level = torch.arange(self.levels, dtype=torch.int32, device=self.device)[:, None]
        self.kv_start[: self.levels * (batch + 1)].view(self.levels, -1)[:, :-1] = table.starts(batch) + level * pages

    def _set_requests(self, q_indptr: Tensor, row_kv_len: Tensor, request: Tensor) -> None:
        self.set_rows(q_indptr, row_kv_len, request)
        batch = q_indptr.shape[0] - 1
        self.request_q_indptr[: batch + 1] = q_indptr
        self.request_kv_len[:batch] = row_kv_len[q_indptr[:-1].clamp(0, self.max_tokens - 1)]


def cuts_itself(device: torch.device) -> bool:
    """Whether kernels of the device cut requests at fixed keys without segments."""
    return device.type == "cpu"


def make_segments(plan: Plan, program: Program) -> Segments | None:
    """The segments of a plan, None for one that takes requests whole."""
    if plan.levels > 1:
        if not program.can_split:
            raise VariantError(
                "the variant replaces softmax by an OnlineNorm without merge(a, b), which levels= needs to join the parts of a "
                "row. Give it one, or make the plan without levels, with page lists that begin with shared pages."
            )
        return Segments(plan, plan.levels, values=_state_values(program))
    if plan.split != "fixed" or plan.max_kv_len is None or not program.can_split or cuts_itself(plan.device):
        return None
    levels = -(-plan.max_kv_len // int(plan.kv_split or 1))
    if levels < 2:
        return None
    return Segments(plan, levels, min(plan.max_tokens, plan.max_batch * plan.cut_len), _state_values(program))


def _state_values(program: Program) -> int:
    """Numbers of a state besides its output: the logsumexp, or those of a norm."""
    return 1 if program.norm is None else len(program.norm.state_names)


def check_cascade(cascade: Cascade) -> None:
    """What the levels say fits together; waits for their device."""
    borders = set(cascade.levels[-1].q_indptr.tolist())
    for number, level in enumerate(cascade.levels):
        q_indptr = level.q_indptr.cpu()
        if int(q_indptr[0]) != 0 or bool((q_indptr.diff() < 0).any()):
            raise ShapeMismatch(
                f"q_indptr of level {number} is {q_indptr.tolist()}, expected numbers that start with 0 and never fall."
            )
        last = int(cascade.levels[-1].q_indptr[-1])
        if int(q_indptr[-1]) != last:
            raise ShapeMismatch(
                f"q_indptr of level {number} ends with {int(q_indptr[-1])} rows, that of the last level with {last}. All "
                "levels divide the same rows; give those that share nothing a group with kv_len 0."
            )
        if bool((level.kv_len < 0).any()):
            raise ShapeMismatch(f"kv_len of level {number} is {first_of(level.kv_len)}, expected no negative length.")
        wrong = [n for n in q_indptr.tolist() if n not in borders]
        if wrong:
            raise ShapeMismatch(f"a group of level {number} begins or ends at row {wrong[0]}, inside of a request.")
