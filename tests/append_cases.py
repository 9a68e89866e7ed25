"""What jitgen.rope and jitgen.append must do on every device, against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

import jitgen

# Half the distance between neighbours at 1, of the types rows are written in
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float8_e4m3fn: 2.0**-4,
            torch.float8_e5m2: 2.0**-3}  # fmt: skip
LEAST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25, torch.float8_e4m3fn: 2.0**-10,
         torch.float8_e5m2: 2.0**-17}  # fmt: skip
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
ARITHMETIC = 4e-6  # of the largest element of a row: float32, and its sines and reciprocal roots


def random_rows(seed: int, *shape: int, dtype: torch.dtype, device: str, spread: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread).to(device=device, dtype=dtype)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """A tensor that nobody has written to: NaN, or a pattern where there is none."""
    if dtype == torch.int8:
        return torch.full(shape, -128, dtype=dtype, device=device)
    return torch.full(shape, math.nan, dtype=torch.float32, device=device).to(dtype)


def rotated(
    x: torch.Tensor,
    positions: torch.Tensor,
    *,
    theta: float = 1e4,
    scale: float = 1.0,
    rotary_dim: int | None = None,
    interleave: bool = False,
    llama31: tuple[float, float, int] | None = None,
    cos_sin: torch.Tensor | None = None,
) -> torch.Tensor:
    """jitgen.rope of one tensor [n, heads, head_dim], in float64."""
    x, dim = x.double(), x.shape[-1] if rotary_dim is None else rotary_dim
    if cos_sin is not None:
        dim = cos_sin.shape[1]
        cos, sin = cos_sin.double()[positions.long().clamp(0, cos_sin.shape[0] - 1)][:, None].chunk(2, -1)
    else:
        plain = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=x.device) / dim)
        speed = plain / scale
        if llama31 is not None:
            low, high, length = llama31
            s = ((plain * length / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
            speed = (1 - s) * plain / scale + s * plain
        angle = positions.double()[:, None, None] * speed
        cos, sin = angle.cos(), angle.sin()
    pairs = (slice(0, dim, 2), slice(1, dim, 2)) if interleave else (slice(0, dim // 2), slice(dim // 2, dim))
    first, second = (x[..., p] for p in pairs)
    out = x.clone()
    out[..., pairs[0]] = first * cos - second * sin
    out[..., pairs[1]] = second * cos + first * sin
    return out


def assert_rows_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Elements are the float64 ones but for one rounding to their type and float32 arithmetic."""
    dtype, got = got.dtype, got.double()
    assert not got.isnan().any(), "an element was not written"
    allowed = want.abs() * HALF_ULP[dtype] * 1.001 + LEAST[dtype] + ARITHMETIC * want.abs().amax(-1, keepdim=True)
    worst = ((got - want).abs() / allowed.clamp(min=1e-30)).max()
    assert worst <= 1, f"an element is off by {float(worst):.3g} of what is allowed"


@dataclass(frozen=True)
class Cache:
    """A paged cache with room for ``lengths`` tokens of each request, and its pages in a random order."""

    k: torch.Tensor
    v: torch.Tensor
    kv: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    layout: str
    page_size: int
    table: torch.Tensor  # [batch, max_pages]
    indptr: torch.Tensor
    indices: torch.Tensor

    def slots(self, requests: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        pages = self.table[requests.long(), positions.long() // self.page_size].long()
        return pages * self.page_size + positions.long() % self.page_size

    def rows(self, which: str) -> torch.Tensor:
        """[slots, heads, head_dim] of k or v."""
        t = getattr(self, which)
        t = t.transpose(1, 2) if self.layout == "HND" else t
        return t.reshape(-1, *t.shape[2:])


def make_cache(
    lengths: list[int],
    page_size: int,
    heads: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    layout: str = "NHD",
    joined: bool = False,
    seed: int = 0,
) -> Cache:
    """``joined``: one tensor for K and V, which then have the same head dim."""
    counts = [-(-n // page_size) for n in lengths]
    total = sum(counts) + 3  # some pages belong to nobody
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    table = torch.full((len(lengths), max(counts, default=0) + 1), -1, dtype=torch.int32)
    start = 0
    for b, n in enumerate(counts):
        table[b, :n] = order[start : start + n]
        start += n
    indptr = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    inner = (page_size, heads) if layout == "NHD" else (heads, page_size)
    if joined:
        kv = poisoned((total, 2, *inner, dims[0]), dtype, device)
        k, v = kv.unbind(1)
    else:
        k, v = (poisoned((total, *inner, d), dtype, device) for d in dims)
        kv = (k, v)
    return Cache(k, v, kv, layout, page_size, table.to(device), indptr.to(device), order[:start].to(device))


def check_rope(
    device: str, dtype: torch.dtype, heads: tuple[int, int], head_dim: int, index_dtype: torch.dtype, **given
) -> None:
    """Out of place and in place, at odd numbers of rows, near and far positions."""
    n = 37
    q, k = (random_rows(i, n, h, head_dim, dtype=dtype, device=device) for i, h in enumerate(heads))
    positions = torch.randint(0, 131072, (n,), generator=torch.Generator().manual_seed(2)).to(device, index_dtype)
    wants = [rotated(x, positions, **given) for x in (q, k)]
    out = tuple(poisoned(tuple(x.shape), dtype, device) for x in (q, k))
    assert jitgen.rope(q, k, positions, out=out, **given)[0] is out[0]
    for got, want in zip(out, wants, strict=True):
        assert_rows_close(got, want)
    jitgen.rope(q, k, positions, out=(q, k), **given)
    assert torch.equal(q, out[0]) and torch.equal(k, out[1])


def check_append(
    device: str,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    *,
    heads: int = 2,
    dims: tuple[int, int] = (64, 64),
    page_size: int = 16,
    layout: str = "NHD",
    joined: bool = False,
    form: str = "csr",
    index_dtype: torch.dtype = torch.int32,
    scale: str = "none",
    transform: bool = False,
) -> None:
    """New tokens of several requests land where the page table says, as the transform makes them; nothing else changes."""
    lengths, new = [37, 1, 80, 16, 5], [5, 1, 33, 0, 5]
    cache = make_cache(lengths, page_size, heads, dims, cache_dtype, device, layout, joined)
    requests = torch.repeat_interleave(torch.arange(len(new)), torch.tensor(new))
    positions = torch.cat([torch.arange(total - n, total) for total, n in zip(lengths, new, strict=True)])
    n, generator = len(requests), torch.Generator().manual_seed(7)
    k, v = (random_rows(3 + i, n, heads, d, dtype=dtype, device=device, spread=3.0) for i, d in enumerate(dims))
    requests, positions = requests.to(device), positions.to(device)
    slots, kept = cache.slots(requests, positions), torch.ones(n, dtype=torch.bool, device=device)
    places: dict[str, object]
    if form == "slots":
        kept = (torch.rand(n, generator=generator) > 0.2).to(device)
        mapping = torch.where(kept, slots, -1).to(index_dtype)
        places = {"slot_mapping": mapping, "positions": positions.to(index_dtype), "batch_indices": requests.to(index_dtype)}
    elif form == "requests":
        indptr = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=index_dtype, device=device)
        places = {"page_table": (cache.indptr, cache.indices), "q_indptr": indptr,
                  "kv_len": torch.tensor(lengths, dtype=index_dtype, device=device)}  # fmt: skip
    else:
        kept = (torch.rand(n, generator=generator) > 0.2).to(device)
        table = (cache.indptr, cache.indices) if form == "csr" else cache.table
        places = {"page_table": table, "positions": positions.to(index_dtype),
                  "batch_indices": torch.where(kept, requests, -1).to(index_dtype)}  # fmt: skip
    hook, wants = (None, [k.double(), v.double()]) if not transform else make_transform(k, v, requests, positions)
    scales = make_scales(scale, cache, heads, device)
    jitgen.append(cache.kv, k, v, transform=hook, scales=scales, kv_layout=layout, **places)
    untouched = torch.ones(cache.rows("k").shape[0], dtype=torch.bool, device=device)
    untouched[slots[kept]] = False
    for i, which in enumerate("kv"):
        rows = cache.rows(which)
        check_written(rows[slots[kept]], wants[i][kept], scale, None if scales is None else scales[i], slots[kept])
        rest = rows[untouched]
        assert (rest == -128).all() if cache_dtype == torch.int8 else rest.float().isnan().all(), "another row was written"


def make_transform(k, v, requests, positions):
    """Bias, norm and rotation of k, a factor for each request of v; and the rows they lead to."""
    heads, dim, device = k.shape[1], k.shape[2], k.device
    bias, weight = (torch.randn(s, generator=torch.Generator().manual_seed(5)).to(device) for s in ((heads, dim), (dim,)))
    gain = (torch.rand(9, generator=torch.Generator().manual_seed(6)) + 0.5).to(device)
    rope, eps = jitgen.Rope(theta=5e5, rotary_dim=dim // 4 * 2), 1e-6

    def transform(k, v, b, kv_h, pos):
        k = k + bias[kv_h]
        k = k * torch.rsqrt((k * k).mean() + eps) * weight
        return rope(k, pos), torch.where(pos > 20, v * gain[b], v)

    want = k.double() + bias.double()
    want = want * torch.rsqrt((want * want).mean(-1, keepdim=True) + eps) * weight.double()
    factor = torch.where(positions > 20, gain.double()[requests], 1.0)
    return transform, [rotated(want, positions, theta=5e5, rotary_dim=dim // 4 * 2), v.double() * factor[:, None, None]]


def make_scales(scale: str, cache: Cache, heads: int, device: str):
    """Scales of k and v of each kind."""
    if scale == "none":
        return None
    if scale == "number":
        return 0.03, 0.02
    if scale == "tensor":
        return torch.tensor(0.03, device=device), torch.tensor([0.02], device=device)
    if scale == "head":
        return tuple(torch.linspace(0.01, 0.05, heads, device=device) * (i + 1) for i in range(2))
    slots, pages = cache.rows("k").shape[0], cache.k.shape[0]
    shapes = ((slots, heads), (pages, cache.page_size, heads))
    return tuple(torch.full(s, math.nan, dtype=torch.float32, device=device) for s in shapes)


def check_written(got: torch.Tensor, want: torch.Tensor, kind: str, scale, slots: torch.Tensor) -> None:
    """Rows [n, heads, head_dim] of a cache are ``want``, divided by their scale where there is one."""
    if kind != "none":
        if kind == "stored":
            found = scale.reshape(-1, scale.shape[-1])[slots].double()
            most = want.abs().amax(-1) / LARGEST[got.dtype]
            assert torch.allclose(found, most, rtol=1e-5), "a stored scale is not that of its row"
            others = torch.ones(scale.numel() // scale.shape[-1], dtype=torch.bool, device=slots.device)
            others[slots] = False
            assert scale.reshape(-1, scale.shape[-1])[others].isnan().all(), "the scale of another slot was written"
            scale = found[..., None]
        elif kind == "head":
            scale = scale.double()[:, None]
        want = want / (scale.double() if isinstance(scale, torch.Tensor) else scale)
    if got.dtype in LARGEST:
        want = want.clamp(-LARGEST[got.dtype], LARGEST[got.dtype])
    if got.dtype == torch.int8:
        assert ((got.double() - want).abs() <= 0.5 + 1e-4).all()
    else:
        assert_rows_close(got, want)
