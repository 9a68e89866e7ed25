"""What a gallery case is: a variant built for given sizes, with the tensors it captures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import jitgen


@dataclass(frozen=True)
class Sizes:
    """Sizes of one call, and random captures that fit them."""

    q_len: int
    kv_len: int
    batch: int = 2
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    device: str = "cpu"

    @property
    def num_positions(self) -> int:
        """More than any q_idx or kv_idx, whichever way queries are counted."""
        return max(self.q_len, self.kv_len)

    def _generator(self, shape: tuple[int, ...]) -> torch.Generator:
        return torch.Generator().manual_seed(sum(n * 31**i for i, n in enumerate(shape)))

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator(shape)).to(self.device)

    def ints(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self._generator(shape)).to(dtype).to(self.device)

    def bools(self, share: float, *shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=self._generator(shape)) < share).to(self.device)

    def tensor(self, values: list[int] | list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def documents(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Document of every position and first position of every document, for documents of about ``length``."""
        starts = [0]
        while starts[-1] < self.num_positions:
            starts.append(starts[-1] + length + 7 * (len(starts) % 3))
        ends = self.tensor(starts[1:], torch.int32)
        positions = torch.arange(self.num_positions, dtype=torch.int32, device=self.device)
        document = torch.searchsorted(ends, positions, right=True).to(torch.int32)
        return document, self.tensor(starts, torch.int32)


@dataclass(frozen=True)
class Case:
    """One variant of the gallery. ``row`` says where it stands in the tables of variants it was taken from."""

    name: str
    row: str
    make: Callable[[Sizes], jitgen.Variant]
    forks: bool  # uses Python control flow on indices, which torch.vmap refuses


@dataclass(frozen=True)
class Cache:
    """Sizes of a paged cache, and random captures with an entry for each slot or page of it."""

    num_pages: int
    page_size: int
    num_kv_heads: int = 2
    device: str = "cpu"

    @property
    def num_slots(self) -> int:
        return self.num_pages * self.page_size

    def floats(self, *shape: int) -> torch.Tensor:
        """Between 0.5 and 1.5."""
        return Sizes(1, 1, device=self.device).floats(*shape).sigmoid() + 0.5

    def bools(self, share: float, *shape: int) -> torch.Tensor:
        return Sizes(1, 1, device=self.device).bools(share, *shape)


@dataclass(frozen=True)
class PagedCase:
    """One variant that reads where keys lie in a paged cache."""

    name: str
    row: str
    make: Callable[[Cache], jitgen.Variant]


CASES: dict[str, Case] = {}
PAGED_CASES: dict[str, PagedCase] = {}


def paged_case(row: str) -> Callable[[Callable[[Cache], jitgen.Variant]], Callable[[Cache], jitgen.Variant]]:
    """Register a function that makes a variant for a paged cache under its own name."""

    def register(make: Callable[[Cache], jitgen.Variant]) -> Callable[[Cache], jitgen.Variant]:
        name = make.__name__
        assert name not in PAGED_CASES, name
        PAGED_CASES[name] = PagedCase(name, row, make)
        return make

    return register


def case(row: str, *, forks: bool = False) -> Callable[[Callable[[Sizes], jitgen.Variant]], Callable[[Sizes], jitgen.Variant]]:
    """Register a function that makes a variant under its own name."""

    def register(make: Callable[[Sizes], jitgen.Variant]) -> Callable[[Sizes], jitgen.Variant]:
        name = make.__name__
        assert name not in CASES, name
        CASES[name] = Case(name, row, make, forks)
        return make

    return register
