"""Absorbed latent attention against float64, on every device."""

from __future__ import annotations

import math

import torch

import jitgen

SCALE = 192**-0.5
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


CAP, WINDOW = 30.0, 500


def hooked(device: str, heads: int) -> tuple[jitgen.Variant, torch.Tensor]:
    """A soft cap, ALiBi, a window and a sink, and the slopes, which are the sinks too."""
    slopes = torch.linspace(0.01, 0.5, heads, device=device)

    def bend(score, b, h, q_idx, kv_idx):
        return CAP * torch.tanh(score / CAP) + slopes[h] * (kv_idx - q_idx)

    def near(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < WINDOW)

    return jitgen.Variant(score_mod=bend, mask_mod=near, sink=slopes), slopes.double()


def reference(q, rows, scale, mask=None, slopes=None):
    """Output and logsumexp of one request in float64, on the device of its tensors: q [q_len, heads, 576], rows [kv_len, 576],
    mask [q_len, kv_len]. With ``slopes`` the variant is ``hooked``."""
    logits = torch.einsum("qhd,kd->hqk", q.double(), rows.double()) * scale
    if slopes is not None:
        columns, own = (torch.arange(len(x), device=q.device) for x in (rows, q))
        ahead = columns[None] - (own[:, None] + len(rows) - len(q))
        logits = CAP * torch.tanh(logits / CAP) + slopes[:, None, None] * ahead
        mask = mask & (ahead > -WINDOW)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    lse = logits.logsumexp(-1)
    if slopes is not None:
        lse = torch.logaddexp(lse, slopes[:, None].expand_as(lse))
    weights = torch.where(lse[..., None].isinf(), 0.0, (logits - lse[..., None]).exp())
    return torch.einsum("hqk,kd->qhd", weights, rows[:, :512].double()), lse.T


def check_mla(
    device: str,
    dtype: torch.dtype,
    lengths: list[int],
    q_lens: list[int],
    *,
    heads: int = 128,
    page_size: int = 64,
    mask: bool = True,
    form: str = "joined",
    split: str = "balanced",
    spread: float = 1.0,
    family: str | None = None,
    hooks: bool = False,
) -> None:
    """A batch of requests in pages whose unused rows are NaN; rows of no request are not written."""
    generator = torch.Generator().manual_seed(len(lengths))
    counts = [-(-n // page_size) for n in lengths]
    total = sum(counts) + 2
    cache = torch.full((total, page_size, 576), math.nan)
    order = torch.randperm(total, generator=generator)
    table = torch.full((len(lengths), max(counts) + 1), -1, dtype=torch.int32)
    rows = []
    for b, (n, start) in enumerate(zip(lengths, [sum(counts[:b]) for b in range(len(counts))], strict=True)):
        pages = order[start : start + counts[b]]
        table[b, : counts[b]] = pages
        rows.append((torch.randn(n, 576, generator=generator) * spread).to(dtype))
        whole = torch.full((counts[b] * page_size, 576), math.nan)
        whole[:n] = rows[b].float()
        cache[pages] = whole.view(-1, page_size, 576)
    cache, padding = cache.to(device=device, dtype=dtype), 3
    q = torch.randn(sum(q_lens) + padding, heads, 576, generator=generator).to(dtype)
    indptr = torch.tensor([0, *torch.tensor(q_lens).cumsum(0).tolist()], dtype=torch.int32)
    variant, slopes = hooked(device, heads) if hooks else (causal if mask else None, None)
    plan = jitgen.Plan(
        len(lengths), q.shape[0], heads, 1, 576, head_dim_v=512, dtype=dtype, device=device, page_size=page_size, split=split,
        variant=variant, family=family, max_q_len=max(q_lens),
    )  # fmt: skip
    plan.update(indptr.to(device), torch.tensor(lengths, dtype=torch.int32, device=device))
    given = cache if form == "joined" else (cache[..., :512].contiguous(), cache[..., 512:].contiguous())
    out = torch.full((q.shape[0], heads, 512), math.nan, device=device).to(dtype)
    lse = torch.full((q.shape[0], heads), math.nan, device=device)
    jitgen.paged_attention(q.to(device), given, table.to(device), plan, scale=SCALE, out=out, lse=lse)
    out, lse = out.cpu(), lse.cpu()
    assert out[sum(q_lens) :].isnan().all() and lse[sum(q_lens) :].isnan().all(), "a row of padding was written"
    for b, n in enumerate(lengths):
        mine = slice(int(indptr[b]), int(indptr[b + 1]))
        seen = torch.arange(n)[None] <= torch.arange(q_lens[b])[:, None] + n - q_lens[b] if mask else None
        # a CPU's threads would be shared by all processes that test: on the device
        inputs = [None if t is None else t.to(device) for t in (q[mine], rows[b], seen)]
        want, want_lse = (t.cpu() for t in reference(*inputs[:2], SCALE, inputs[2], slopes))
        assert_near(out[mine], want, rows[b].double().abs().max() if n else 1.0)
        found = lse[mine].double()
        assert torch.equal(found.isinf(), want_lse.isinf())
        assert ((found - want_lse).abs()[~want_lse.isinf()] <= 2e-5 * (1 + want_lse.abs()[~want_lse.isinf()])).all()


def assert_near(got: torch.Tensor, want: torch.Tensor, largest: float) -> None:
    """Weights are rounded to the dtype before they meet the values, and the result once more."""
    assert not got.isnan().any(), "a result was not written"
    u = HALF_ULP[got.dtype]
    error = (got.double() - want).abs()
    allowed = 2 * u * want.abs() + (2 * u if got.dtype != torch.float32 else 2e-6) * float(largest) * 0.5
    assert (error <= allowed).all(), f"an element is off by {float((error / allowed).max()):.3g} of what is allowed"
