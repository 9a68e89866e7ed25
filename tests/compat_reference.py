"""FlashInfer's attention by definition, in float64, and ragged and paged batches to compare on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

LOG2_E = math.log2(math.e)
WORKSPACE = torch.empty(1024, dtype=torch.uint8)


def slopes_by_hand(num_heads):
    """ALiBi's table: powers of 2^(-8/n) for the largest power of two n, then every second power of 2^(-4/n)."""
    n = 2 ** math.floor(math.log2(num_heads))
    return [(2 ** (-8 / n)) ** i if i <= n else (2 ** (-4 / n)) ** (2 * (i - n) - 1) for i in range(1, num_heads + 1)]


def rope_by_hand(x, positions, theta=1e4, scale=1.0):
    """Rotate the pairs (i, i + d/2) of x [rows, heads, d]."""
    d = x.shape[-1]
    frequency = theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = (positions.double() / scale)[:, None, None] * frequency
    a, b = x.double().chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def exact(
    q, k, v, *, causal=False, window_left=-1, cap=0.0, pos="NONE", scale=None, mask=None, sinks=None, theta=1e4, rope_scale=1.0,
):  # fmt: skip
    """Output and logsumexp of base 2 of one request: q [n, Hq, D], k and v [m, Hkv, D(v)]."""
    n, m = q.shape[0], k.shape[0]
    q_pos, k_pos = torch.arange(n) + m - n, torch.arange(m)
    if pos == "ROPE_LLAMA":
        q, k = rope_by_hand(q, q_pos, theta, rope_scale), rope_by_hand(k, k_pos, theta, rope_scale)
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    logits = torch.einsum("nhd,mhd->hnm", q.double(), k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if pos == "ALIBI":
        slopes = torch.tensor(slopes_by_hand(q.shape[1]), dtype=torch.float64)
        logits = logits + slopes[:, None, None] * (k_pos - torch.arange(n)[:, None])  # rows count from 0
    if cap:
        logits = cap * torch.tanh(logits / cap)
    keep = torch.ones(n, m, dtype=torch.bool)
    if mask is not None:
        keep = keep & mask
    elif causal:
        keep = keep & (k_pos <= q_pos[:, None])
    if window_left >= 0:
        keep = keep & (q_pos[:, None] - k_pos <= window_left)
    logits = logits.masked_fill(~keep, -math.inf)
    lse = logits.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double()[:, None])
    weights = torch.nan_to_num((logits - lse[..., None]).exp())
    return torch.einsum("hnm,mhd->nhd", weights, v), (lse * LOG2_E).T


@dataclass
class Paged:
    """A batch over a paged cache, with the keys of each request also at hand."""

    q: torch.Tensor
    qo_indptr: torch.Tensor
    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor
    cache: object
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    page_size: int

    @property
    def tables(self):
        return self.indptr, self.indices, self.last_page_len

    def on_gpu(self):
        """The same batch with its tensors on the GPU; the keys by request stay where they are."""
        moved = {"q": self.q, "qo_indptr": self.qo_indptr, "indptr": self.indptr, "indices": self.indices}
        cache = self.cache.cuda() if isinstance(self.cache, torch.Tensor) else tuple(t.cuda() for t in self.cache)
        return replace(
            self, cache=cache, last_page_len=self.last_page_len.cuda(), **{name: t.cuda() for name, t in moved.items()}
        )

    def rows(self, b):
        return slice(int(self.qo_indptr[b]), int(self.qo_indptr[b + 1]))

    def expected(self, **options):
        """Results of all requests, joined; options that are lists hold one entry for each request."""
        results = []
        for b, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            own = {name: value[b] if isinstance(value, list) else value for name, value in options.items()}
            results.append(exact(self.q[self.rows(b)], k, v, **own))
        return tuple(torch.cat(part) for part in zip(*results, strict=True))


def paged_batch(
    q_lens, kv_lens, *, heads=(4, 2), dim=16, dim_v=None, page_size=4, layout="NHD", form="pair", dtype=torch.float32, seed=0
):  # fmt: skip
    """Requests of given lengths, their pages in random order; unused places of the cache are NaN."""
    g = torch.Generator().manual_seed(seed)
    pages_of = [-(-n // page_size) for n in kv_lens]
    total = sum(pages_of) + 2
    order = torch.randperm(total, generator=g)[: sum(pages_of)]
    indptr = torch.tensor([0, *pages_of]).cumsum(0)
    dims = (dim, dim_v or dim)
    caches = [torch.full((total, page_size, heads[1], d), math.nan, dtype=dtype) for d in dims]
    rows = [[torch.randn(n, heads[1], d, generator=g).to(dtype) for n in kv_lens] for d in dims]
    for cache, parts in zip(caches, rows, strict=True):
        for b, part in enumerate(parts):
            for i, row in enumerate(part):
                cache[order[indptr[b] + i // page_size], i % page_size] = row
    if layout == "HND":
        caches = [c.transpose(1, 2).contiguous() for c in caches]
    cache = torch.stack(caches, 1) if form == "joined" else tuple(caches)
    last = torch.tensor([(n - 1) % page_size + 1 if n else 0 for n in kv_lens])
    q = torch.randn(sum(q_lens), heads[0], dim, generator=g).to(dtype)
    qo_indptr = torch.tensor([0, *q_lens]).cumsum(0)
    return Paged(q, qo_indptr.int(), indptr.int(), order.int(), last.int(), cache, *rows, page_size)


def assert_near(got, want, tolerance=2e-5):
    """Equal within a tolerance, infinities too, and without NaN."""
    assert got.shape == want.shape
    assert not got.isnan().any()
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite)
    assert torch.equal(got[~finite].double(), want[~finite].double())
    error = (got[finite].double() - want[finite].double()).abs().max().item() if finite.any() else 0.0
    assert error <= tolerance, f"error {error}"
