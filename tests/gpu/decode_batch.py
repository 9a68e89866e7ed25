"""A batch of requests for a decode module, driven through its C interface, and what it should compute in float64."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch

from jitgen.reference import run_program
from jitgen.runtime import capture_words, fields_of

Tensor = torch.Tensor
NAN = math.nan


def _starts(counts: list[int]) -> list[int]:
    return [0, *torch.tensor(counts).cumsum(0).tolist()]


@dataclass(frozen=True)
class Shape:
    """What all requests of a batch share."""

    num_q_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 128
    head_dim_v: int = 128
    page_size: int = 16  # 0: ragged
    order: str = "NHD"  # of a page: NHD or HND
    joined: bool = False  # K and V in one 5-D tensor
    block_table: bool = False  # instead of CSR
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"


class Module:
    """Entry points of a built decode module."""

    def __init__(self, path: str, spec: object) -> None:
        self.spec, self.fields = spec, fields_of(spec)
        library = ctypes.CDLL(str(path))
        for name, result in (
            ("jitgen_launch", ctypes.c_int),
            ("jitgen_plan", ctypes.c_int),
            ("jitgen_num_ctas", ctypes.c_int),
            ("jitgen_plan_bytes", ctypes.c_longlong),
            ("jitgen_workspace_bytes", ctypes.c_longlong),
        ):
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.c_char_p], result
            setattr(self, name.removeprefix("jitgen_"), function)
        self.library = library

    def pack(self, values: dict[str, object]) -> bytes:
        import struct

        from jitgen.abi import pack_format

        return struct.pack(pack_format(self.fields), *(values[f.name] for f in self.fields))


class Batch:
    """Random requests on a module. Everything that must not be read or kept is filled with NaN."""

    def __init__(
        self,
        module: Module,
        q_lens: list[int],
        kv_lens: list[int],
        shape: Shape,
        values: list[object] = (),
        *,
        num_ctas: int | None = None,
        seed: int = 0,
        split: bool = True,
        class_rows: int = 1 << 20,
        hole: int = 0,
    ) -> None:
        """``hole``: that many first keys of each request lie in pages that were given back: their numbers are out of range."""
        self.module, self.q_lens, self.kv_lens, self.shape, self.values = module, q_lens, kv_lens, shape, list(values)
        self.hole = hole
        generator = torch.Generator(shape.device).manual_seed(seed)

        def normal(rows: int, heads: int, d: int) -> Tensor:
            return torch.randn(rows, heads, d, generator=generator, device=shape.device).to(shape.dtype)

        self.q = normal(sum(q_lens), shape.num_q_heads, shape.head_dim)
        self.k = normal(sum(kv_lens), shape.num_kv_heads, shape.head_dim)
        self.v = normal(sum(kv_lens), shape.num_kv_heads, shape.head_dim_v)
        self._store(generator)
        self._allocate(num_ctas, split, class_rows)

    # ---- storing ----
    def _ints(self, x: object) -> Tensor:
        return torch.as_tensor(x, dtype=torch.int32).to(self.shape.device)

    def _store(self, generator: torch.Generator) -> None:
        s = self.shape
        self.q_indptr = self._ints(_starts(self.q_lens))
        self.kv_len = self._ints(self.kv_lens)
        if s.page_size == 0:
            starts = _starts(self.kv_lens)
            nothing = torch.full((1, 1, 1), NAN, dtype=s.dtype, device=s.device)
            self.cache_k, self.cache_v = (torch.cat([t, nothing.expand(1, *t.shape[1:])]) for t in (self.k, self.v))
            self.kv_start, self.pages, self.num_pages, self.stride = self._ints(starts[:-1]), None, self.cache_k.shape[0], 0
            return
        counts = [-(-n // s.page_size) for n in self.kv_lens]
        self.num_pages = sum(counts) + 3
        numbers = torch.randperm(self.num_pages, generator=generator, device=s.device)[: sum(counts)].cpu()
        slots = numbers.repeat_interleave(s.page_size) * s.page_size + torch.arange(s.page_size).repeat(sum(counts))
        used = [torch.arange(n) + start * s.page_size for n, start in zip(self.kv_lens, _starts(counts), strict=False)]
        slots = slots[torch.cat(used)].to(s.device)  # of every key, in pages as if they were one after the other
        caches = [self._cache(slots, rows) for rows in (self.k, self.v)]
        if s.joined:
            both = torch.stack(caches, 1)
            caches = [both[:, 0], both[:, 1]]
        self.cache_k, self.cache_v = caches
        self._store_table(numbers, counts)

    def _cache(self, slots: Tensor, rows: Tensor) -> Tensor:
        """Pages in the order of the shape that hold ``rows`` in ``slots``, and NaN elsewhere."""
        s = self.shape
        flat = torch.full((self.num_pages * s.page_size, *rows.shape[1:]), NAN, dtype=s.dtype, device=s.device)
        flat[slots] = rows
        pages = flat.view(self.num_pages, s.page_size, *rows.shape[1:])
        return pages if s.order == "NHD" else pages.transpose(1, 2).contiguous()

    def _store_table(self, numbers: Tensor, counts: list[int]) -> None:
        s, starts = self.shape, _starts(counts)
        numbers = numbers.clone()
        for start, count in zip(starts, counts, strict=False):
            numbers[start : start + min(count, self.hole // s.page_size)] = -7
        if s.block_table:
            self.stride = max([1, *counts]) + 2
            table = torch.full((len(counts), self.stride), 1 << 30)
            for b, (start, count) in enumerate(zip(starts, counts, strict=False)):
                table[b, :count] = numbers[start : start + count]
            self.pages, self.kv_start = self._ints(table), None
        else:
            self.pages, self.kv_start, self.stride = self._ints([*numbers.tolist(), 1 << 30]), self._ints(starts[:-1]), 0

    # ---- launching ----
    def _allocate(self, num_ctas: int | None, split: bool, class_rows: int) -> None:
        s = self.shape
        self.out = torch.empty(sum(self.q_lens), s.num_q_heads, s.head_dim_v, dtype=s.dtype, device=s.device)
        self.lse = torch.empty(sum(self.q_lens), s.num_q_heads, device=s.device)
        words = dict(
            zip((f.name for f in self.module.fields), [0] * len(self.module.fields), strict=True),
            q=self.q.data_ptr(), k=self.cache_k.data_ptr(), v=self.cache_v.data_ptr(), o=self.out.data_ptr(),
            lse=self.lse.data_ptr(), q_indptr=self.q_indptr.data_ptr(), kv_len=self.kv_len.data_ptr(),
            kv_start=self.kv_start.data_ptr() if self.kv_start is not None else 0,
            pages=self.pages.data_ptr() if self.pages is not None else 0,
            batch=len(self.q_lens), num_q_heads=s.num_q_heads, num_kv_heads=s.num_kv_heads, total_q=sum(self.q_lens),
            page_size=s.page_size, num_pages=self.num_pages, page_list_stride=self.stride, class_rows=class_rows,
            split=int(split), scale=s.head_dim**-0.5,
        )  # fmt: skip
        for t, tensor in (("q", self.q), ("o", self.out)):
            words |= {f"{t}_stride_s": tensor.stride(0), f"{t}_stride_h": tensor.stride(1)}
        head, row = (1, 2) if s.order == "HND" else (2, 1)
        for t, cache in (("k", self.cache_k), ("v", self.cache_v)):
            strides = (0, *cache.stride()) if s.page_size == 0 else cache.stride()
            words |= {f"{t}_stride_p": strides[0], f"{t}_stride_s": strides[row], f"{t}_stride_h": strides[head]}
        if self.values:
            given = capture_words(self.module.spec.program, self.values)
            captures = [f.name for f in self.module.fields][len(self.module.fields) - len(given) :]
            words |= dict(zip(captures, given, strict=True))
        self.words = words
        words["num_ctas"] = num_ctas or self.module.num_ctas(self.module.pack(words))
        packed = self.module.pack(words)
        self.plan_buffer = torch.full((self.module.plan_bytes(packed) // 4,), -1, dtype=torch.int32, device=s.device)
        self.workspace = torch.full((self.module.workspace_bytes(packed) // 4,), -1, dtype=torch.int32, device=s.device)
        words |= {"plan": self.plan_buffer.data_ptr(), "workspace": self.workspace.data_ptr()}

    def packed(self, **changes: object) -> bytes:
        if self.shape.device != "cpu":
            changes = {"stream": torch.cuda.current_stream().cuda_stream, **changes}
        return self.module.pack(self.words | changes)

    def plan(self) -> None:
        assert self.module.plan(self.packed()) == 0

    def launch(self, **changes: object) -> None:
        assert self.module.launch(self.packed(**changes)) == 0

    def run(self) -> tuple[Tensor, Tensor]:
        """Output and logsumexp of a plan and a run, on the CPU."""
        self.out.fill_(NAN)
        self.lse.fill_(NAN)
        self.plan()
        self.launch()
        assert bool((self.workspace == -1).all()), "the launch left words in the workspace"
        return self.out.cpu(), self.lse.cpu()

    # ---- checking ----
    def expected(self) -> tuple[Tensor, Tensor | None]:
        outs, lses = [], []
        first = first_key = 0
        for q_len, kv_len in zip(self.q_lens, self.kv_lens, strict=True):
            rows, keys = slice(first, first + q_len), slice(first_key, first_key + kv_len)
            first, first_key = first + q_len, first_key + kv_len
            if q_len == 0:
                continue
            q, k, v = (t.transpose(0, 1)[None] for t in (self.q[rows], self.k[keys], self.v[keys]))
            out, lse = run_program(self.module.spec.program, self.values, q, k, v, q_offset=kv_len - q_len)
            outs.append(out[0].transpose(0, 1).cpu())
            lses.append(None if lse is None else lse[0].transpose(0, 1).cpu())
        return torch.cat(outs), None if any(x is None for x in lses) else torch.cat(lses)

    def error(self) -> tuple[float, float]:
        """Largest relative error of a row of the output, and largest error of a logsumexp."""
        out, lse = self.run()
        want, want_lse = self.expected()
        assert not out.isnan().any(), "NaN in the output"
        norm = want.norm(dim=-1)
        wrong = (out.double() - want).norm(dim=-1)
        relative = torch.where(norm > 0, wrong / norm.clamp_min(1e-30), wrong)
        off = 0.0
        if want_lse is not None:
            assert torch.equal(lse == -math.inf, want_lse == -math.inf), "logsumexp of empty rows"
            off = (lse.double() - want_lse)[want_lse > -math.inf].abs().max().item() if (want_lse > -math.inf).any() else 0.0
        return relative.max().item(), off
