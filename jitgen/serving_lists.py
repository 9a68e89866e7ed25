"""Lists of keys: which pages of a cache some query rows see, in which order, and which keys of their requests these are.

Kernels work on entries: a run of query rows, and a list of pages that all of these rows see. All forms in which a caller says
what is seen are such lists, and give kernels the same few addresses and strides (``KVLists``):

- a ``PageTable``: an entry is a request, its list is all of its keys. A window narrows it by the mask, tile by tile;
- a ``Cascade``: an entry is a group of requests at a level, and a row is in an entry of every level;
- a ``Selection``: an entry is some rows of a request, and has a list for each KV head; blocks of keys that a caller has chosen;
- block rows of a ``BlockSparse``: entries of one request, whose pages are the block columns that are listed.

Hooks count keys by their places in the whole request. Where a list is not all of a request from its beginning, ``place`` looks
these up: see serving_place.py.
"""

from __future__ import annotations

import torch

from jitgen.checks import as_int32, check_memory, first_of, narrowed
from jitgen.errors import InvalidType, ShapeMismatch, UnsupportedDtype

Tensor = torch.Tensor


class KVLists:
    """Where kernels find the pages of each entry: entry b and KV head h have those from
    ``pages[start(b) + h * head_stride]`` on, where start(b) is ``kv_start[b]``, or ``b * list_stride`` without kv_start.

    pages       int32 page numbers
    kv_start    int32 [entries] or more, or None
    """

    __slots__ = ("device", "head_stride", "kv_start", "list_stride", "pages")

    def __init__(self, pages: Tensor, kv_start: Tensor | None, list_stride: int = 0, head_stride: int = 0) -> None:
        self.pages, self.kv_start, self.list_stride, self.head_stride = pages, kv_start, list_stride, head_stride
        self.device = pages.device

    @property
    def addresses(self) -> tuple[int, int]:
        """The fields kv_start and pages of the kernels."""
        return 0 if self.kv_start is None else self.kv_start.data_ptr(), self.pages.data_ptr()


class PageTable(KVLists):
    """Which pages of the cache hold the keys of each request, in order.

    ``PageTable.csr(indptr, indices)`` lists the pages of all requests one after the other, as FlashInfer and SGLang do;
    ``PageTable.dense(block_table)`` has a row of page numbers per request, as vLLM does. Wherever a page table is expected,
    a tensor of rank 2 stands for the second form and a pair of tensors (indptr, indices) for the first.

    A request with ``kv_len`` keys uses its first ceil(kv_len / page_size) pages; the entries behind them are never read and
    may be anything. int32 tensors are used where they are, so changes made to them in place, between replays of a CUDA
    graph for instance, are seen. int64 tensors are copied to int32 here and now.
    """

    __slots__ = ("batch",)

    def __init__(self, batch: int, pages: Tensor, indptr: Tensor | None, list_stride: int) -> None:
        super().__init__(pages, indptr, list_stride)
        self.batch = batch

    def __repr__(self) -> str:
        form = "block table" if self.indptr is None else "CSR"
        return f"PageTable({form}, batch={self.batch}, pages {tuple(self.pages.shape)}, {self.device})"

    @property
    def indptr(self) -> Tensor | None:
        """First entry of each list in ``pages``; None in the dense form."""
        return self.kv_start

    @classmethod
    def csr(cls, indptr: Tensor, indices: Tensor) -> PageTable:
        """Pages of request b: ``indices[indptr[b] : indptr[b + 1]]``.

        Shapes:  indptr [batch + 1] or more; indices [at least indptr[-1]]; int32 or int64, on one device.
        Errors:  ShapeMismatch, UnsupportedDtype.
        """
        check_indices("indptr", indptr, 1)
        check_indices("indices", indices, 1)
        if indptr.shape[0] == 0:
            raise ShapeMismatch("indptr is empty, expected batch + 1 entries that start with 0.")
        if indptr.device != indices.device:
            raise ShapeMismatch(f"indptr is on {indptr.device}, indices is on {indices.device}. Both must be on one device.")
        return cls(indptr.shape[0] - 1, as_int32(indices), as_int32(indptr), 0)

    @classmethod
    def dense(cls, block_table: Tensor) -> PageTable:
        """Pages of request b: the first entries of ``block_table[b]``.

        Shapes:  block_table [batch, max_pages], int32 or int64, rows contiguous (a slice of columns will do).
        Errors:  ShapeMismatch, UnsupportedDtype.
        """
        check_indices("block_table", block_table, 2)
        table = narrowed(block_table)
        if table.shape[1] > 1 and table.stride(1) != 1:
            table = table.contiguous()
        return cls(table.shape[0], table, None, table.stride(0))

    @classmethod
    def of(cls, value: object) -> PageTable:
        """The page table that ``value`` is or stands for."""
        if isinstance(value, cls):
            return value
        if isinstance(value, Tensor):
            return cls.dense(value)
        if isinstance(value, tuple | list) and len(value) == 2:
            return cls.csr(*value)
        raise InvalidType(
            f"page_table is a {type(value).__name__}, expected a jitgen.PageTable, a block table of shape [batch, max_pages], "
            "or a pair (indptr, indices)."
        )

    def starts(self, count: int, stride: int | None = None) -> Tensor:
        """First entry of each of the first ``count`` lists in the page numbers of all, int32 [count].

        ``stride`` is that of the lists of the dense form, if they are not where they were.
        """
        if self.indptr is not None:
            return self.indptr[:count]
        return torch.arange(count, dtype=torch.int32, device=self.device) * (self.list_stride if stride is None else stride)

    def kv_len(self, last_page_len: Tensor, page_size: int) -> Tensor:
        """Keys of each request from the number of keys in its last page, as FlashInfer gives them; for ``Plan.update``.

        Shapes:  last_page_len [batch], each from 1 to page_size; returns int32 [batch]. A request without pages has 0 keys.
        Errors:  ShapeMismatch if the table is not in CSR form.
        """
        if self.indptr is None:
            raise ShapeMismatch("kv_len needs the CSR form, this table is dense: it does not say how many pages are in use.")
        pages = self.indptr[: last_page_len.shape[0] + 1].diff()
        return torch.where(pages > 0, (pages - 1) * page_size + narrowed(last_page_len), 0)

    def check_extent(self, kv_len: Tensor, page_size: int) -> None:
        """On the CPU: the lists are long enough for ``kv_len`` keys."""
        needed = (kv_len + page_size - 1) // page_size
        if self.indptr is None:
            has = torch.full_like(needed, self.pages.shape[1])
        else:
            starts = self.indptr[: kv_len.shape[0] + 1]
            has = starts.clamp(max=self.pages.shape[0]).diff()
            if bool((starts < 0).any()) or bool((starts.diff() < 0).any()):
                raise ShapeMismatch(
                    f"indptr of the page table is {first_of(starts)}, expected numbers from 0 on that never fall."
                )
        short = (needed > has).nonzero()
        if len(short):
            b = int(short[0])
            raise ShapeMismatch(
                f"request {b} has kv_len {int(kv_len[b])}, which takes {int(needed[b])} pages of {page_size}, but its page "
                f"list has {int(has[b])}. Append its new pages to the table before the call."
            )

    def missing_page(self, kv_len: Tensor, page_size: int, num_pages: int) -> str | None:
        """On the CPU: which request needs a page that a cache of ``num_pages`` does not have."""
        for b, length in enumerate(kv_len.tolist()):
            listed = self.pages[b] if self.indptr is None else self.pages[int(self.indptr[b]) :]
            needed = listed[: -(-length // page_size)]
            wrong = ((needed < 0) | (needed >= num_pages)).nonzero()
            if len(wrong):
                at = int(wrong[0])
                return (
                    f"the page list of request {b} names a page that the cache does not have: entry {at} is {int(needed[at])}, "
                    f"expected 0 to {num_pages - 1} in the first {len(needed)}, which hold its {length} keys."
                )
        return None


def check_indices(name: str, t: object, rank: int) -> None:
    """``t`` is a tensor of page numbers, row numbers or lengths."""
    if not isinstance(t, Tensor):
        raise InvalidType(f"{name} is a {type(t).__name__}, expected a torch.Tensor of int32 or int64.")
    if t.dtype not in (torch.int32, torch.int64):
        raise UnsupportedDtype(f"{name} has dtype {str(t.dtype).removeprefix('torch.')}, expected int32 or int64.")
    if t.dim() != rank:
        raise ShapeMismatch(f"{name} has shape {tuple(t.shape)}, expected {rank} dimension{'s' if rank > 1 else ''}.")
    if t.layout is not torch.strided:
        raise InvalidType(f"{name} has layout {t.layout}, expected a dense tensor. Convert with .to_dense().")
    check_memory(**{name: t})
