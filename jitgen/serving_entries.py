"""Entries: what the kernels of a plan see as requests, where that is not one entry for each request.

An entry is a run of query rows and a list of keys that all of them see (serving_lists.py). Here are the tables by which hooks
find out where in their requests these rows and keys are: by entry, and by row of q. See serving_segments.py for entries that
are parts of requests, of which a row may have several.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jitgen import runtime
from jitgen.errors import VariantError
from jitgen.program import Program
from jitgen.serving_place import ChosenLists, place
from jitgen.streams import is_capturing

if TYPE_CHECKING:
    from jitgen.serving_plan import Plan
    from jitgen.serving_selection import ChosenKeys

Tensor = torch.Tensor


class Entries:
    """Tables of a plan at fixed addresses, filled by torch operations, which a CUDA graph may hold."""

    chosen: ChosenLists | None = None

    def __init__(self, plan: Plan, max_entries: int) -> None:
        self.max_entries, self.max_tokens, self.device = max_entries, plan.max_tokens, plan.device
        self.is_local = plan.q_index == "local"
        rows = plan.max_tokens
        self.row_position, self.row_request, self.row_q_len, self.row_kv_len = (self.ints(rows) for _ in range(4))
        self._row = torch.arange(rows, dtype=torch.int32, device=self.device)
        self.named = {name: getattr(self, name) for name in ("row_position", "row_request", "row_q_len", "row_kv_len")}

    def ints(self, *shape: int) -> Tensor:
        """Zeros of int32 on the plan's device."""
        return torch.zeros(shape, dtype=torch.int32, device=self.device)

    @property
    def nbytes(self) -> int:
        """Memory of the device."""
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, Tensor))

    @property
    def room(self) -> tuple[int, int]:
        """Most entries, and most rows of all of them."""
        return self.max_entries, self.max_tokens

    def place(self, program: Program) -> Program:
        """``program`` as kernels of entries run it."""
        return self._placed(program)[0]

    def tables(self, program: Program) -> list[object]:
        """What ``program`` captures once it is placed, besides its own captures."""
        return [self.named[name] for name in self._placed(program)[1]]

    def _placed(self, program: Program) -> tuple[Program, tuple[str, ...]]:
        return place(program, self.chosen, self.is_local)

    def words(self, program: Program, values: list[object], scales: list[object]) -> list[object]:
        """Fields of a kernel behind the strides."""
        tables = self.tables(program)
        return scales + runtime.capture_words(self.place(program), [*values, *tables]) if values or tables else scales

    def request_of_row(self, q_indptr: Tensor) -> Tensor:
        """Request, or group of requests, of each of max_tokens rows; the last one's for rows of none."""
        found = torch.searchsorted(q_indptr[1:], self._row, right=True, out_int32=True)
        return found.clamp_(max=q_indptr.shape[0] - 2)

    def set_rows(self, q_indptr: Tensor, row_kv_len: Tensor, request: Tensor) -> None:
        """Fill the tables by row, from the rows of requests, and the keys and the request of each row."""
        begin, end = q_indptr[request], q_indptr[request + 1]
        self.row_request.copy_(request)
        self.row_q_len.copy_(end - begin)
        self.row_kv_len.copy_(row_kv_len)
        self.row_position.copy_(self._row - begin if self.is_local else row_kv_len - end + self._row)


class ChosenEntries(Entries):
    """Entries of chosen keys: every row is in one at most, so that kernels write results and no states."""

    def __init__(self, plan: Plan, page_size: int, is_even: bool) -> None:
        super().__init__(plan, plan.max_batch)
        self.chosen = ChosenLists(page_size, is_even)
        self.num_kv_heads = plan.num_kv_heads
        self.entry_row, self.entry_end = self.ints(plan.max_batch), self.ints(plan.max_batch)
        self.list_start = self.ints(plan.max_batch, plan.num_kv_heads)
        self._head = torch.arange(plan.num_kv_heads, dtype=torch.int32, device=plan.device)
        self.named |= {name: getattr(self, name) for name in ("entry_row", "entry_end", "list_start")}
        self.named["list_position"] = self.ints(1)  # until there are lists
        self._keys: ChosenKeys | None = None
        self._fills_rows = False  # not before a program reads the tables by row, which take as long as all others

    def tables(self, program: Program) -> list[object]:
        """What ``program`` captures once it is placed, besides its own captures."""
        if not self._fills_rows and any(name.startswith("row_") for name in self._placed(program)[1]):
            # what a CUDA graph that is being captured fills, nothing else may rely on
            self._fills_rows = not is_capturing(self.device)
            self._fill_rows()
        return super().tables(program)

    def take(self, keys: ChosenKeys) -> None:
        """Fill the tables for these lists; their positions are read where they are."""
        count, self._keys = keys.batch, keys
        self.entry_row[:count] = keys.list_indptr[:-1]
        self.entry_end[:count] = keys.end
        starts = keys.kv_start[:count, None]  # type: ignore[index]
        self.list_start[:count] = starts + self._head * keys.head_stride
        self.named["list_position"] = keys.positions
        if self._fills_rows:
            self._fill_rows()

    def _fill_rows(self) -> None:
        keys = self._keys
        if keys is not None:
            request = self.request_of_row(keys.q_indptr)
            self.set_rows(keys.q_indptr, keys.kv_len[request], request)


def make_chosen(plan: Plan, program: Program) -> ChosenEntries | None:
    """The entries of a plan for selections, None for any other."""
    if plan.selection is None:
        return None
    if program.norm is not None:
        raise VariantError(
            "the variant replaces softmax, and a norm may count the keys that it sees, which selection= leaves out. Write the "
            "selection as a mask."
        )
    return ChosenEntries(plan, plan.page_size, plan.selection == "even")  # type: ignore[arg-type]
