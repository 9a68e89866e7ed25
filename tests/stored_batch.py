"""A batch whose keys and values are stored in 8 bits, with scales of every kind, and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from serving_batch import Batch

import jitgen

Tensor = torch.Tensor
STORED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
POISON = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7D, torch.int8: 0x80}  # NaN, but for the last
KINDS = ("none", "number", "tensor", "head", "slot", "paged slot")


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest elements of ``dtype``."""
    top = LARGEST[dtype]
    x = x.clamp(-top, top)
    return (x.round() if dtype == torch.int8 else x).to(dtype)


@dataclass
class StoredBatch(Batch):
    """Requests as in Batch; k and v are what the stored elements stand for, ``codes`` the elements."""

    kv_dtype: torch.dtype = torch.float8_e4m3fn
    kinds: tuple[str, str] = ("tensor", "tensor")  # of the scales of k and of v
    codes: tuple[list[Tensor], list[Tensor]] = field(init=False)
    scales: tuple[list[Tensor], list[Tensor]] = field(init=False)  # by request, [keys, heads]

    def __post_init__(self) -> None:
        super().__post_init__()
        made = [self._store(rows, kind, n) for n, (rows, kind) in enumerate(zip((self.k, self.v), self.kinds, strict=True))]
        self.codes, self.scales = (made[0][0], made[1][0]), (made[0][1], made[1][1])
        self.k, self.v = ([c.double() * s.double()[..., None] for c, s in zip(*m, strict=True)] for m in made)

    def _store(self, rows: list[Tensor], kind: str, seed: int) -> tuple[list[Tensor], list[Tensor]]:
        heads, generator = self.num_kv_heads, torch.Generator().manual_seed(seed + 7)
        by_head = (torch.rand(heads, generator=generator) + 0.5).to(self.device) * (
            0.02 if self.kv_dtype == torch.int8 else 0.4
        )
        codes, scales = [], []
        for t in rows:
            if kind in ("slot", "paged slot"):
                scale = t.float().abs().amax(-1) / LARGEST[self.kv_dtype]
            elif kind == "head":
                scale = by_head.expand(t.shape[0], -1)
            else:
                scale = torch.full(t.shape[:2], 1.0 if kind == "none" else float(by_head[0]), device=self.device)
            codes.append(stored(t.float() / scale[..., None], self.kv_dtype))
            scales.append(scale.float())
        return codes, scales

    def _poisoned(self, *shape: int) -> Tensor:
        return torch.full(shape, POISON[self.kv_dtype], dtype=torch.uint8, device=self.device).view(self.kv_dtype)

    def stored_pages(self, page_size: int, lists: list[list[int]], num_pages: int) -> tuple[Tensor, Tensor]:
        """Caches [pages, page_size, heads, dim], poison wherever no key lies."""
        caches = []
        for codes in self.codes:
            cache = self._poisoned(num_pages * page_size, *codes[0].shape[1:])
            for rows, slots in zip(codes, self._slots(page_size, lists), strict=True):
                cache.view(torch.uint8)[slots] = rows.view(torch.uint8)
            caches.append(cache.view(num_pages, page_size, *codes[0].shape[1:]))
        return caches[0], caches[1]

    def _slots(self, page_size: int, lists: list[list[int]]) -> list[Tensor]:
        found = []
        for pages, (_, keys) in zip(lists, self.lengths, strict=True):
            first = torch.tensor(pages, dtype=torch.int64, device=self.device)[:, None] * page_size
            found.append((first + torch.arange(page_size, device=self.device)).flatten()[:keys])
        return found

    def call_scales(self, page_size: int, lists: list[list[int]], num_pages: int) -> dict[str, object]:
        """Keyword arguments of a call. Slots without a key have NaN."""
        given: dict[str, object] = {}
        for name, scales, kind in zip(("k_scale", "v_scale"), self.scales, self.kinds, strict=True):
            longest = max(scales, key=len)
            if kind == "number":
                given[name] = float(longest[0, 0])
            elif kind == "tensor":
                given[name] = longest[0, :1].clone()
            elif kind == "head":
                given[name] = longest[0].clone()
            elif kind != "none":
                by_slot = torch.full((num_pages * max(page_size, 1), self.num_kv_heads), torch.nan, device=self.device)
                slots = self._slots(page_size, lists) if page_size else [torch.arange(by_slot.shape[0], device=self.device)]
                by_slot[torch.cat(slots)] = torch.cat(scales)
                given[name] = by_slot if kind == "slot" else by_slot.view(num_pages, page_size, -1)
        return given

    def attend(self, plan: jitgen.Plan, page_size: int = 16, **options: object) -> tuple[Tensor, Tensor]:
        """The paged or ragged call of a plan."""
        if plan.layout == "ragged":
            k, v = (torch.cat([c.view(torch.uint8) for c in codes]).view(self.kv_dtype) for codes in self.codes)
            scales = self.call_scales(0, [], k.shape[0])
            return jitgen.ragged_attention(self.q, k, v, plan, return_lse=True, **scales, **options)
        exact = Batch(self.lengths, self.num_q_heads, self.num_kv_heads, 8, device=self.device)
        place_holder, _, lists = exact.pages(page_size)
        caches = self.stored_pages(page_size, lists, place_holder.shape[0])
        scales = self.call_scales(page_size, lists, place_holder.shape[0])
        return jitgen.paged_attention(self.q, caches, self.csr(lists), plan, return_lse=True, **scales, **options)
