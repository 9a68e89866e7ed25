"""Cascades: keys that several requests share, listed once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from jitgen.checks import as_int32
from jitgen.errors import InvalidType, ShapeMismatch
from jitgen.serving_lists import KVLists, PageTable, check_indices
from jitgen.serving_tree import Path, SharedRun, shared_runs_of
from jitgen.streams import is_capturing

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class CascadeLevel:
    """Keys of one level of a cascade: those of each group of requests, in pages.

    q_indptr      rows of the groups: group g has the rows q_indptr[g] to q_indptr[g + 1] of q, those of all its requests
    page_table    pages of each group, in any form of jitgen.PageTable
    kv_len        keys of each group at this level; 0 where its requests share none

    Shapes:  q_indptr [groups + 1], kv_len [groups]; int32 or int64, on one device.
    """

    q_indptr: Tensor
    page_table: PageTable
    kv_len: Tensor

    @classmethod
    def of(cls, value: object) -> CascadeLevel:
        """The level that ``value`` is, or that a triple (q_indptr, page_table, kv_len) stands for.

        Errors:  ShapeMismatch, UnsupportedDtype; InvalidType for anything else.
        """
        level = (value.q_indptr, value.page_table, value.kv_len) if isinstance(value, cls) else value
        if not isinstance(level, tuple | list) or len(level) != 3:
            raise InvalidType(f"a level is a {type(value).__name__}, expected (q_indptr, page_table, kv_len).")
        q_indptr, page_table, kv_len = level
        check_indices("q_indptr", q_indptr, 1)
        check_indices("kv_len", kv_len, 1)
        table = PageTable.of(page_table)
        groups = kv_len.shape[0]
        if groups == 0 or q_indptr.shape[0] != groups + 1 or table.batch < groups:
            raise ShapeMismatch(
                f"a level has kv_len of {groups} groups, q_indptr of {q_indptr.shape[0]} entries and page lists of "
                f"{table.batch} groups. Expected groups, groups + 1 and groups, and one group at least."
            )
        if isinstance(value, cls) and table is page_table:
            return value
        return cls(as_int32(q_indptr), table, as_int32(kv_len))

    @property
    def size(self) -> int:
        """Number of groups."""
        return self.kv_len.shape[0]


class Cascade(KVLists):
    """The keys of a batch in levels: level 0 is shared by the largest groups of requests, the last has each request's own.

    A group is a run of neighbouring requests, so their rows of q are neighbours too. Every level divides the same rows: its
    q_indptr starts with 0 and ends with the number of rows. The keys of a request are those of its groups, level after level,
    and count on from one level to the next, so masks and biases see the same positions as without sharing. Pages of a group
    need not be full at the end of a level.

    Give it to ``Plan.update`` of a plan made with ``levels=``, and to ``paged_attention`` in the place of the page table. The
    tensors of the levels may change in place between updates, also those captured in a CUDA graph; their shapes may not.

    ``saved_keys``, known of what ``detect`` and ``of_tree`` make: shared keys, times the requests but one that share them.
    States and their merge cost 3 us on an H100 where groups have up to 16 rows (query rows times query heads of a KV head), and
    12 us with larger ones. So below some 10,000 and 50,000 saved keys (of 8 KV heads of 128, in 16 bits) a plan without levels
    is faster, given page lists with the shared pages in front.

    Errors:  ShapeMismatch, UnsupportedDtype; InvalidType.
    Cost:    a copy of the page lists, made again by every update; no wait for the device.
    """

    saved_keys: int | None = None

    def __init__(self, levels: Sequence[object]) -> None:
        if not isinstance(levels, tuple | list):
            raise InvalidType(f"levels is a {type(levels).__name__}, expected a list of jitgen.CascadeLevel.")
        self.levels = tuple(CascadeLevel.of(level) for level in levels)
        if not self.levels:
            raise ShapeMismatch("a cascade has no levels, expected one at least.")
        devices = {t.device for level in self.levels for t in (level.q_indptr, level.kv_len, level.page_table.pages)}
        if len(devices) > 1:
            raise ShapeMismatch(f"the levels of a cascade are on {', '.join(sorted(map(str, devices)))}. Use one device.")
        device = self.levels[0].kv_len.device
        self.batch = self.levels[-1].size
        sizes = [level.page_table.pages.numel() for level in self.levels]
        self._first_page = [sum(sizes[:i]) for i in range(len(sizes))]
        pages = torch.empty(max(sum(sizes), 1), dtype=torch.int32, device=device)
        super().__init__(pages, torch.zeros(self.num_entries, dtype=torch.int32, device=device))
        self.refresh()

    @property
    def num_entries(self) -> int:
        """Groups of all levels, and one between any two levels that has no rows: see Segments."""
        return sum(level.size + 1 for level in self.levels) - 1

    def refresh(self) -> None:
        """Copy the page lists as they are now. ``Plan.update`` does it."""
        at = 0
        for level, first_page in zip(self.levels, self._first_page, strict=True):
            table, size = level.page_table, level.size
            self.pages[first_page : first_page + table.pages.numel()].view(table.pages.shape).copy_(table.pages)
            self.kv_start[at : at + size] = table.starts(size, table.pages.shape[-1]) + first_page
            at += size + 1

    @classmethod
    def detect(cls, q_indptr: Tensor, page_table: object, kv_len: Tensor, page_size: int, *, min_pages: int = 8) -> Cascade:
        """The cascade of two levels in which neighbouring requests share the pages that their lists begin with.

        A group is a longest run of requests of which any two neighbours share ``min_pages`` full pages at least; it shares the
        pages that all of them begin with. Requests in no such group share nothing. Last pages that are not full are not shared.

        Shapes:  q_indptr [batch + 1]; page_table in any form; kv_len [batch].
        Cost:    copies the page lists to the host, and waits for the device: for the host side of an engine, once a step.
        """
        table = PageTable.of(page_table)
        lengths, rows = kv_len.tolist(), q_indptr.tolist()
        lists = page_lists(table, [-(-n // page_size) for n in lengths])
        full = [pages[: n // page_size] for pages, n in zip(lists, lengths, strict=True)]
        groups = shared_runs(full, min_pages)
        shared_rows = [rows[begin] for begin, _, _ in groups] + [rows[-1]]
        prefix = {b: count for begin, end, count in groups for b in range(begin, end)}
        own = [pages[prefix[b] :] for b, pages in enumerate(lists)]
        own_len = [n - prefix[b] * page_size for b, n in enumerate(lengths)]
        ints = _IntsOn(q_indptr.device)
        shared = (
            ints(shared_rows),
            ints.csr([lists[begin][:count] for begin, _, count in groups]),
            ints([count * page_size for _, _, count in groups]),
        )
        cascade = cls([shared, (q_indptr, ints.csr(own), ints(own_len))])
        cascade.saved_keys = sum((end - begin - 1) * count * page_size for begin, end, count in groups)
        return cascade

    @classmethod
    def of_tree(
        cls,
        q_indptr: Tensor,
        paths: Sequence[Path],
        kv_len: Sequence[int],
        page_size: int,
        *,
        min_pages: int = 8,
        max_levels: int = 2,
    ) -> Cascade:
        """The cascade of requests whose prefixes an engine keeps in a tree, as the radix cache of SGLang does.

        A request is a path: its nodes from the root on, each a pair of what tells it from others (the node itself, its id)
        and its pages, the last of which are the request's own. Neighbouring requests with the same nodes in front share
        their pages at level 0, those that go on together at level 1, and so on for ``max_levels`` in all, the last of which
        has what each request has alone; a level takes ``min_pages`` full pages at least, and what is less is left to the
        levels below. Order the requests as a depth-first walk finds them, so that those that share are neighbours. ::

            def path(node, own_pages):  # SGLang: req.last_node, and the pages of the tokens that are in no node yet
                nodes = []
                while node.parent is not None:
                    nodes.append((node.id, node.value[::page_size] // page_size))
                    node = node.parent
                return [*reversed(nodes), (object(), own_pages)]

        Shapes:  q_indptr [batch + 1] on the plan's device; paths and kv_len of each request, on the host.
        Errors:  ShapeMismatch.
        Cost:    in nodes, besides copying page lists; no copy from the device, and no wait for it.
        """
        batch = len(paths)
        if q_indptr.shape[0] != batch + 1 or len(kv_len) != batch or batch == 0 or max_levels < 1:
            raise ShapeMismatch(
                f"q_indptr has {q_indptr.shape[0]} entries, kv_len {len(kv_len)}, paths {batch}, and max_levels is "
                f"{max_levels}. Expected batch + 1, batch, batch, and a positive number."
            )
        lists = [[int(page) for _, pages in path for page in pages] for path in paths]
        for b, (pages, keys) in enumerate(zip(lists, kv_len, strict=True)):
            if len(pages) * page_size < keys:
                raise ShapeMismatch(
                    f"request {b} has kv_len {keys}, and its path {len(pages)} pages of {page_size}. Append its new pages."
                )
        runs = shared_runs_of(paths, [keys // page_size for keys in kv_len], max_levels - 1, min_pages)
        ints, levels, done = _IntsOn(q_indptr.device), [], [0] * batch
        for level in range(max((run.level + 1 for run in runs), default=0)):
            of_begin = {run.begin: run for run in runs if run.level == level}
            begins, pages, begin = [], [], 0
            while begin < batch:
                run = of_begin.get(begin, SharedRun(level, begin, begin + 1, 0, 0))
                begins.append(begin)
                pages.append(lists[begin][run.first : run.last])
                done[begin : run.end] = [run.last or done[begin]] * (run.end - begin)
                begin = run.end
            levels.append((q_indptr[ints([*begins, batch])], ints.csr(pages), ints([len(p) * page_size for p in pages])))
        own = [pages[n:] for pages, n in zip(lists, done, strict=True)]
        own_len = [keys - n * page_size for keys, n in zip(kv_len, done, strict=True)]
        cascade = cls([*levels, (q_indptr, ints.csr(own), ints(own_len))])
        cascade.saved_keys = sum((run.end - run.begin - 1) * (run.last - run.first) * page_size for run in runs)
        return cascade


class _IntsOn:
    """int32 tensors on a device, copied there without a wait for it.

    Only where a CUDA graph is captured the copy would wait, which torch refuses: a replay would read memory that is gone.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._waits = device, is_capturing(device)

    def __call__(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cpu").to(self.device, non_blocking=not self._waits)

    def csr(self, lists: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        indptr = [0]
        for pages in lists:
            indptr.append(indptr[-1] + len(pages))
        return self(indptr), self([page for pages in lists for page in pages])


def page_lists(table: PageTable, counts: Sequence[int]) -> list[list[int]]:
    """The first ``counts[b]`` pages of every request, on the host."""
    pages = table.pages.flatten().tolist()
    starts = table.starts(len(counts), table.pages.shape[-1]).tolist()
    return [pages[start : start + count] for start, count in zip(starts, counts, strict=True)]


def shared_runs(lists: Sequence[Sequence[int]], least: int) -> list[tuple[int, int, int]]:
    """Runs (begin, end, shared) of neighbouring lists that begin alike: all of a run share their first ``shared`` entries.

    ``shared`` is 0 for a list that shares less than ``least`` with its neighbours, alone in its run.
    """
    runs: list[tuple[int, int, int]] = []
    begin = 0
    while begin < len(lists):
        end, shared = begin + 1, len(lists[begin])
        while end < len(lists):
            common = common_length(lists[begin], lists[end], shared)
            if common < least:
                break
            end, shared = end + 1, common
        runs.append((begin, end, shared if end - begin > 1 else 0))
        begin = end
    return runs


def common_length(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """Entries, at most ``limit``, that two lists have in common at their beginning."""
    count = 0
    for x, y in zip(a[:limit], b, strict=False):
        if x != y:
            break
        count += 1
    return count
