"""The tables of a plan: on the device as int32, under CUDA graphs at addresses that stay."""

from __future__ import annotations

import torch

from jitgen.compat.flashinfer._inputs import fill, mask_bits
from jitgen.errors import ShapeMismatch


class Buffers:
    """The tables of a wrapper's plans, kept under FlashInfer's attribute names, which serving engines read."""

    def __init__(self, device: torch.device, use_cuda_graph: bool) -> None:
        self.device = device
        self._use_cuda_graph = use_cuda_graph
        self._own: dict[str, torch.Tensor] = {}  # buffers of a CUDA graph that the user did not give
        self._paged_kv_indptr_buf: torch.Tensor | None = None
        self._paged_kv_indices_buf: torch.Tensor | None = None
        self._paged_kv_last_page_len_buf: torch.Tensor | None = None
        self._qo_indptr_buf: torch.Tensor | None = None
        self._custom_mask_buf: torch.Tensor | None = None
        self._mask_indptr_buf: torch.Tensor | None = None

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether plan() keeps the addresses of its buffers, for CUDA graphs that hold a run()."""
        return self._use_cuda_graph

    def _held(self, name: str, value: torch.Tensor, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """``value`` on the device as int32; under CUDA graphs at an address that stays, in ``buffer`` if the user gave one."""
        if not self._use_cuda_graph:
            return value.to(self.device, torch.int32, non_blocking=True)
        if buffer is not None:
            fill(name, buffer, value)
            if buffer.dtype == torch.int32:
                return buffer
            value = buffer
        own = self._own.get(name)
        if own is None:
            own = self._own[name] = torch.zeros(value.shape[0], dtype=torch.int32, device=self.device)
        fill(name, own, value)
        return own

    def _check_buffers(self, *names: str) -> None:
        """A wrapper for CUDA graphs was given the buffers that its plans are kept in."""
        for name in names:
            buffer = getattr(self, f"_{name}")
            if not isinstance(buffer, torch.Tensor) or buffer.device != self.device:
                raise ShapeMismatch(
                    f"use_cuda_graph=True needs {name} on {self.device}, got "
                    f"{buffer.device if isinstance(buffer, torch.Tensor) else buffer!r}."
                )

    def _paged_tables(
        self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Page list bounds and page numbers, and the lengths of last pages, kept under FlashInfer's attribute names."""
        if indptr.dim() != 1 or indptr.shape[0] != last_page_len.shape[0] + 1:
            raise ShapeMismatch(
                f"the page indptr has shape {tuple(indptr.shape)}, last_page_len {tuple(last_page_len.shape)}. Expected "
                "[batch + 1] and [batch]."
            )
        bounds = self._held("paged_kv_indptr", indptr, self._paged_kv_indptr_buf)
        pages = self._held("paged_kv_indices", indices, self._paged_kv_indices_buf)
        last = self._held("paged_kv_last_page_len", last_page_len, self._paged_kv_last_page_len_buf)
        if not self._use_cuda_graph:
            self._paged_kv_indptr_buf, self._paged_kv_indices_buf, self._paged_kv_last_page_len_buf = bounds, pages, last
        return bounds, pages

    def _q_indptr(self, qo_indptr: torch.Tensor) -> torch.Tensor:
        """First row of each request, kept under FlashInfer's attribute name."""
        held = self._held("qo_indptr", qo_indptr, self._qo_indptr_buf)
        if not self._use_cuda_graph:
            self._qo_indptr_buf = held
        return held

    def _mask(
        self,
        custom_mask: torch.Tensor | None,
        packed_custom_mask: torch.Tensor | None,
        qo_indptr: torch.Tensor,
        kv_len: torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Bits of a custom mask and the first byte of each request; each plan has its own mask, or none."""
        found = mask_bits(custom_mask, packed_custom_mask, qo_indptr.diff(), kv_len, self.device)
        if found is None or not self._use_cuda_graph:
            return found or (None, None)
        if self._custom_mask_buf is None or self._mask_indptr_buf is None:
            raise ShapeMismatch(
                "a custom mask under CUDA graphs needs custom_mask_buf and mask_indptr_buf. Give both to the wrapper."
            )
        for name, buffer, value in zip(
            ("custom_mask", "mask_indptr"), (self._custom_mask_buf, self._mask_indptr_buf), found, strict=True
        ):
            fill(name, buffer, value)
        return self._custom_mask_buf, self._mask_indptr_buf

    def _check_batch(self, batch: int, fixed: torch.Tensor | None) -> None:
        """Under CUDA graphs the number of requests is that of the buffers."""
        if self._use_cuda_graph and fixed is not None and batch != fixed.shape[0] - 1:
            raise ShapeMismatch(
                f"the plan has {batch} requests, the buffers of this CUDA graph wrapper are for {fixed.shape[0] - 1}. "
                "Pad the batch with requests of no key, or make a wrapper for this size."
            )
