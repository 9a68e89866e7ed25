"""Selections: the keys that are attended are chosen in blocks, by list of query rows and by KV head."""

from __future__ import annotations

import torch

from jitgen.checks import INT32, as_int32, plain_int
from jitgen.errors import InvalidType, ShapeMismatch
from jitgen.serving_lists import KVLists, PageTable, check_indices
from jitgen.serving_place import NO_POSITION

Tensor = torch.Tensor


class ChosenKeys(KVLists):
    """Lists of chosen pages as a plan takes them: of requests, and of entries, each some rows of one request.

    q_indptr, kv_len   rows and keys of the requests
    list_indptr        rows of each entry: list_indptr[i] to list_indptr[i + 1]
    list_len           keys of each entry, where KV heads differ the most of them
    end                keys of the request of each entry
    positions          place in its request of the first key of each page, in the order of ``pages``
    """

    __slots__ = ("end", "kv_len", "list_indptr", "list_len", "page_size", "positions", "q_indptr", "version")

    def __init__(
        self,
        lists: KVLists,
        page_size: int,
        positions: Tensor,
        *,
        requests: tuple[Tensor, Tensor],
        entries: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        super().__init__(lists.pages, lists.kv_start, head_stride=lists.head_stride)
        self.page_size, self.positions = page_size, positions
        self.q_indptr, self.kv_len = requests
        self.list_indptr, self.list_len, self.end = entries
        self.version = 0  # counts changes of what is chosen

    @property
    def batch(self) -> int:
        """Number of entries."""
        return self.list_len.shape[0]

    def refresh(self) -> None:
        """Find the lists anew from the tensors that describe them. ``Plan.update`` does it."""

    def check(self, is_even: bool) -> None:
        """What the lists say fits together; waits for their device."""


class Selection(ChosenKeys):
    """Blocks of keys that query rows attend to, chosen for each KV head: what Quest, NSA, MInference and DeepSeek's sparse
    attention compute.

    Give it to ``Plan.update`` of a plan made with ``selection=`` in the place of lengths, and to ``paged_attention`` in the
    place of the page table. Masks, biases and all other hooks see the positions that keys have in their request. The tensors
    may change in place between updates, also those captured in a CUDA graph; their shapes may not. ``choose`` takes other
    blocks, as each layer of a model does.

    q_indptr, page_table, kv_len   the requests, as ``Plan.update`` and ``paged_attention`` take them
    chosen        numbers of blocks in their request, from 0 on, in any order and none twice. Negative ones stand for none, as
                  do blocks behind the last key where nothing is checked, on a GPU
    list_indptr   rows that each list is for, all of one request: list i is that of the rows list_indptr[i] to
                  list_indptr[i + 1] of q. Default q_indptr: a list for each request. With every row alone, DeepSeek's form
    block_size    keys of a block, a multiple of page_size, which it is by default. A cache seen as pages of one key
                  (``cache.flatten(0, 1).unsqueeze(1)``, with a page table of slots) lets single keys be chosen

    Where KV heads share their lists, or all lists of the same rows have as many blocks and end with the same one (as where the
    newest block is always chosen), the plan may be made with selection='even'. Otherwise selection='uneven' tells by a mask
    where each list ends; what the cache holds behind the last key of a request is then read, and must be finite.

    Shapes:  q_indptr [batch + 1]; kv_len [batch]; chosen [lists, num_kv_heads or 1, blocks]; list_indptr [lists + 1]; int32, or
             int64, which is copied here and now; on one device.
    Errors:  ShapeMismatch, UnsupportedDtype; InvalidType. On the CPU also for numbers that make no sense, when the plan is
             updated.
    Cost:    some 25 torch operations over ``chosen``, and memory for it as pages twice; no wait for the device. Attention costs
             what as many keys cost in page lists (decode on an H100: 1.03 times with lists for each KV head). Hooks that
             read positions look up the place of each key: 1.07 times in decode, and with a causal mask 1.16 to 1.23 times in
             prefill (16 blocks of 64 keys for each 64 or 128 rows), as tiles on the diagonal are masked.
    """

    __slots__ = ("_chosen", "_first", "_num_pages", "_ratio", "_table")

    def __init__(
        self,
        q_indptr: Tensor,
        page_table: object,
        kv_len: Tensor,
        chosen: Tensor,
        page_size: int,
        *,
        list_indptr: Tensor | None = None,
        block_size: int | None = None,
    ) -> None:
        list_indptr = q_indptr if list_indptr is None else list_indptr
        for name, t in (("q_indptr", q_indptr), ("kv_len", kv_len), ("list_indptr", list_indptr), ("chosen", chosen)):
            check_indices(name, t, 3 if name == "chosen" else 1)
        block_size = page_size if block_size is None else block_size
        page_size, block_size = plain_int(page_size), plain_int(block_size)
        for name, value in (("page_size", page_size), ("block_size", block_size)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise InvalidType(f"{name} is {value!r} of type {type(value).__name__}, expected an int.")
        if page_size < 1 or not 1 <= block_size <= INT32.max or block_size % page_size:
            raise ShapeMismatch(
                f"block_size is {block_size}, page_size {page_size}: blocks are whole pages. Choose a multiple of the page "
                "size, or see the cache as smaller pages."
            )
        self._table, self._ratio = PageTable.of(page_table), block_size // page_size
        batch, lists, heads, width = kv_len.shape[0], *chosen.shape
        sizes, table_size = (q_indptr.shape[0], self._table.batch, list_indptr.shape[0]), self._table.pages.numel()
        if sizes[0] != batch + 1 or sizes[1] < batch or sizes[2] != lists + 1 or not batch * lists * heads * width * table_size:
            raise ShapeMismatch(
                f"q_indptr has {sizes[0]} entries, kv_len {batch}, the page table {sizes[1]} lists, list_indptr {sizes[2]} "
                f"entries, chosen shape {tuple(chosen.shape)}. Expected batch + 1, batch, batch, lists + 1 and [lists, "
                "num_kv_heads or 1, blocks], none of them empty."
            )
        devices = {t.device for t in (q_indptr, kv_len, list_indptr, chosen, self._table.pages)}
        if len(devices) > 1:
            raise ShapeMismatch(f"the tensors of a selection are on {', '.join(sorted(map(str, devices)))}. Use one device.")

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=chosen.device)

        width *= self._ratio
        starts = torch.arange(lists, dtype=torch.int32, device=chosen.device) * (heads * width)
        super().__init__(
            KVLists(ints(lists, heads, width), starts, head_stride=width if heads > 1 else 0),
            page_size,
            ints(lists * heads * width),
            requests=(as_int32(q_indptr), as_int32(kv_len)),
            entries=(as_int32(list_indptr), ints(lists), ints(lists)),
        )
        self._chosen = as_int32(chosen)
        self._first, self._num_pages = ints(lists), ints(lists)  # of the request of each list: entry of its page list, pages
        self.refresh()

    def choose(self, chosen: Tensor) -> Selection:
        """Take other blocks for the same rows; returns the selection itself.

        A plan must be updated again unless each list keeps its number of keys, as lists of equally many blocks do that end
        with the newest one; with selection='uneven' it must be in any case.

        Shapes:  chosen as it was.
        Errors:  ShapeMismatch, UnsupportedDtype.
        Cost:    some 12 torch operations over ``chosen``, a sort among them; no wait for the device.
        """
        check_indices("chosen", chosen, 3)
        if chosen.shape != self._chosen.shape or chosen.device != self.device:
            raise ShapeMismatch(
                f"chosen has shape {tuple(chosen.shape)} on {chosen.device}, the selection was made for "
                f"{tuple(self._chosen.shape)} on {self.device}. Make a selection for each."
            )
        self._chosen = as_int32(chosen)
        self.version += 1
        self._find_pages()
        return self

    def refresh(self) -> None:
        """Find pages, positions and numbers of keys from the tensors that describe them."""
        table, size = self._table, self.page_size
        request = torch.searchsorted(self.q_indptr[1:], self.list_indptr[:-1], right=True).clamp_(max=self.kv_len.shape[0] - 1)
        self.end.copy_(self.kv_len[request])
        self._num_pages.copy_((self.end + (size - 1)) // size)
        self._first.copy_(table.starts(self.kv_len.shape[0], table.pages.shape[-1])[request])
        self._find_pages()
        self.list_len.copy_(self._keys_by_head().amax(1))

    def _keys_by_head(self) -> Tensor:
        """Keys of each list for each KV head."""
        left = self.end[:, None, None] - self.positions.view(self.pages.shape)
        return left.clamp_(0, self.page_size).sum(-1, dtype=torch.int32)

    def _blocks_in_order(self) -> Tensor:
        """The chosen blocks, ascending; in the place of negative numbers one that no block has."""
        none = NO_POSITION // self._ratio - 1  # whose pages have numbers too
        return torch.where(self._chosen < 0, none, self._chosen).clamp_(max=none).sort(-1).values

    def _pages_in_order(self) -> Tensor:
        """Numbers of the chosen pages in their requests, ascending; behind them numbers that no page has."""
        block = self._blocks_in_order()
        if self._ratio == 1:
            return block
        part = torch.arange(self._ratio, dtype=torch.int32, device=self.device)
        return (block[..., None] * self._ratio + part).flatten(2)

    def _find_pages(self) -> None:
        """Pages and positions of the chosen blocks."""
        page, table = self._pages_in_order(), self._table.pages.flatten()
        is_page = page < self._num_pages[:, None, None]
        self.positions.copy_(torch.where(is_page, page * self.page_size, NO_POSITION).flatten())
        # a list goes on with its first page, whose keys no row sees then
        listed = torch.where(is_page, page, torch.where(is_page[..., :1], page[..., :1], 0))
        entry = (listed + self._first[:, None, None]).clamp_(0, table.shape[0] - 1)  # check() says what is wrong, on the CPU
        torch.index_select(table, 0, entry.flatten(), out=self.pages.view(-1))

    def check(self, is_even: bool) -> None:
        """What the tensors say fits together; waits for their device."""
        q_indptr, list_indptr = self.q_indptr.tolist(), self.list_indptr.tolist()
        if list_indptr[0] != 0 or list_indptr != sorted(list_indptr) or not set(q_indptr) <= set(list_indptr):
            raise ShapeMismatch(
                f"list_indptr is {list_indptr}, expected numbers that start with 0, never fall, and begin a list at each of "
                f"the requests' first rows, {q_indptr}."
            )
        block, size = self._chosen, self.page_size * self._ratio
        ordered, num_blocks = self._blocks_in_order(), ((self.end + (size - 1)) // size)[:, None, None]
        twice = (ordered.diff(dim=-1) == 0) & (ordered[..., 1:] < num_blocks)
        if bool(twice.any()):
            raise ShapeMismatch(f"list {int(twice.nonzero()[0, 0])} of chosen names a block twice. Name each block once.")
        wrong = (block >= num_blocks).nonzero()
        if len(wrong):
            i = int(wrong[0, 0])
            raise ShapeMismatch(
                f"list {i} of chosen names block {int(block[i].max())}, and its request has {int(self.end[i])} keys in blocks "
                f"of {size}. Number blocks from 0 on; negative numbers are none."
            )
        self._table.check_extent(self.kv_len, self.page_size)
        count = self._keys_by_head()
        uneven = (count != count[:, :1]).any(1).nonzero()
        if is_even and len(uneven):
            i = int(uneven[0])
            raise ShapeMismatch(
                f"list {i} has {count[i].tolist()} keys for its KV heads, and the plan was made with selection='even', for as "
                "many in each. Make it with selection='uneven'."
            )
