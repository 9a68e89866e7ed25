"""What sampling must do on every device: exact supports, distributions, independence of the batch, bad rows.

A statistical check fails a right kernel with a probability below FALSE_ALARM; seeds are fixed, so a run repeats itself.
"""

from __future__ import annotations

import torch

import jitgen
from jitgen import sampling

FALSE_ALARM = 1e-6
MARGIN = 1e-5  # of cumulative mass: closer than this to top_p, float32 sums may decide either way
LEAST_EXPECTED = 8.0  # draws a cell of the chi-square test must expect


def logits_of(rows: int, vocab: int, dtype: torch.dtype, device: str, *, spread: float = 2.0, seed: int = 0) -> torch.Tensor:
    """Fresh random logits."""
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread
    return x.to(device=device, dtype=dtype)


def probabilities(x: torch.Tensor, *, from_logits: bool = True, temperature: float = 1.0) -> torch.Tensor:
    """float64 probabilities of rows."""
    return (x.double() / temperature).softmax(-1) if from_logits else x.double() / x.double().sum(-1, keepdim=True)


def top_k_support(values: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of each row and whatever equals the last of them."""
    return values >= values.topk(min(k, values.shape[-1]), dim=-1).values[..., -1:]


def mass_above(probs: torch.Tensor) -> torch.Tensor:
    """For each entry the mass of the strictly larger ones."""
    ordered, order = probs.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    first = torch.searchsorted(-ordered, -ordered, side="left")  # the first of equals
    return torch.empty_like(probs).scatter_(-1, order, before.gather(-1, first))


def filtered(
    x: torch.Tensor,
    *,
    from_logits: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    order: str = "top_k_first",
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 probabilities after the filters, and where they are too close to top_p to call."""
    probs = probabilities(x, from_logits=from_logits, temperature=temperature)
    keep, unsure = torch.ones_like(probs, dtype=torch.bool), torch.zeros_like(probs, dtype=torch.bool)
    if top_k is not None:
        keep &= top_k_support(x.double(), top_k)
    if top_p is not None:
        base = probs
        if order == "top_k_first" and top_k is not None:
            base = torch.where(keep, probs, 0.0)
            base = base / base.sum(-1, keepdim=True)
        above = mass_above(base)
        keep &= above < top_p
        unsure |= (above - top_p).abs() < MARGIN
    if min_p is not None:
        limit = min_p * probs.amax(-1, keepdim=True)
        keep &= probs >= limit
        unsure |= (probs / limit - 1).abs() < MARGIN
    kept = torch.where(keep, probs, 0.0)
    return kept / kept.sum(-1, keepdim=True), unsure


def chi_square_tail(tokens: torch.Tensor, probs: torch.Tensor) -> float:
    """Probability that draws from ``probs`` fit worse than these; rare tokens are pooled. Zero if one was impossible."""
    draws = tokens.numel()
    counts = torch.bincount(tokens.long().flatten().cpu(), minlength=probs.numel()).double()
    expected, order = (probs.double().cpu() * draws).sort(descending=True)
    counts = counts[order]
    if counts[expected == 0].sum() > 0:
        return 0.0
    cells: list[tuple[float, float]] = []
    large = int((expected >= LEAST_EXPECTED).sum())
    seen, wanted = counts[:large].tolist(), expected[:large].tolist()
    cells += zip(seen, wanted, strict=True)
    rest_seen, rest_wanted = counts[large:].cumsum(0), expected[large:].cumsum(0)
    start_seen = start_wanted = 0.0
    while rest_wanted.numel() and float(rest_wanted[-1]) - start_wanted >= 2 * LEAST_EXPECTED:
        end = int(torch.searchsorted(rest_wanted, start_wanted + LEAST_EXPECTED))
        cells.append((float(rest_seen[end]) - start_seen, float(rest_wanted[end]) - start_wanted))
        start_seen, start_wanted = float(rest_seen[end]), float(rest_wanted[end])
    if rest_wanted.numel() and float(rest_wanted[-1]) - start_wanted > 0:
        cells.append((float(rest_seen[-1]) - start_seen, float(rest_wanted[-1]) - start_wanted))
    if len(cells) <= 1:
        return 1.0  # too few draws to tell
    statistic = sum((s - w) ** 2 / w for s, w in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def draw_many(x: torch.Tensor, draws: int, **options: object) -> torch.Tensor:
    """Tokens of one row, each with a seed of its own."""
    seeds = torch.arange(draws, device=x.device) * 7919 + 11
    indices = torch.zeros(draws, dtype=torch.int32, device=x.device)
    return jitgen.sample(x, seed=seeds, indices=indices, **options)  # type: ignore[arg-type, return-value]


def check_distribution(x: torch.Tensor, draws: int, **filters: object) -> None:
    """Draws follow the exact filtered distribution: chi-square, and total variation within what so many draws allow."""
    want, unsure = filtered(x, **filters)  # type: ignore[arg-type]
    near = unsure & (want == 0)  # may be kept as well, with less mass than any test could notice
    want = want + torch.where(near, probabilities(x, temperature=filters.get("temperature", 1.0)), 0.0)  # type: ignore[arg-type]
    assert float(want.sum()) - 1 < 4 * MARGIN
    tokens = draw_many(x, draws, **filters)
    tail = chi_square_tail(tokens, want[0])
    assert tail > FALSE_ALARM, f"chi-square tail {tail:.2g}"
    seen = torch.bincount(tokens.long().cpu(), minlength=x.shape[1]).double() / draws
    variation = 0.5 * float((seen - want[0].cpu()).abs().sum())
    # E[TV] <= sum sqrt(p (1 - p) / n) / 2; each draw moves TV by at most 1 / n (McDiarmid)
    expected = 0.5 * float((want[0] * (1 - want[0]) / draws).sqrt().sum())
    allowed = expected + (-torch.log(torch.tensor(FALSE_ALARM)) / (2 * draws)).sqrt().item()
    assert variation < allowed, f"total variation {variation:.4f}, allowed {allowed:.4f}"


def check_support(x: torch.Tensor, **filters: object) -> None:
    """renorm keeps exactly the reference's support, with its probabilities; draws stay inside."""
    options = dict(filters)
    from_logits = options.pop("from_logits", True)
    probs = sampling.softmax(x, dtype=torch.float32) if from_logits else x
    got = sampling.renorm(probs, **options)  # type: ignore[arg-type]
    want, unsure = filtered(probs, from_logits=False, **options)  # type: ignore[arg-type]
    wrong = ((got > 0) != (want > 0)) & ~unsure & (probs > 0)
    assert not bool(wrong.any()), f"{int(wrong.sum())} entries of the support differ"
    got, want = (torch.where(unsure, 0.0, t.double()) for t in (got, want))
    torch.testing.assert_close(got, want, rtol=2e-4 if probs.dtype == torch.float32 else 1e-2, atol=1e-7)
    reach, unsure = filtered(x, **filters)  # type: ignore[arg-type]
    for offset in range(8):
        tokens = jitgen.sample(x, seed=torch.arange(x.shape[0], device=x.device), offset=64 * offset, **filters)  # type: ignore[arg-type]
        at = tokens.long()[:, None]
        inside = (reach.gather(1, at) > 0) | unsure.gather(1, at)
        assert bool(inside.all()), f"offset {offset}: rows {(~inside).nonzero().flatten().tolist()} drew outside of the support"


def check_batch_invariance(x: torch.Tensor, **filters: object) -> None:
    """A row's token is the same alone, in another order, and through indices; repeats are equal."""
    rows = x.shape[0]
    seeds = torch.arange(rows, device=x.device) * 31 + 5
    offsets = torch.arange(rows, device=x.device) * 64
    options: dict = dict(filters)
    whole = jitgen.sample(x, seed=seeds, offset=offsets, **options)
    assert torch.equal(whole, jitgen.sample(x, seed=seeds, offset=offsets, **options))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).to(x.device)
    assert torch.equal(whole[order], jitgen.sample(x[order].contiguous(), seed=seeds[order], offset=offsets[order], **options))
    assert torch.equal(whole[order], jitgen.sample(x, indices=order, seed=seeds[order], offset=offsets[order], **options))
    for row in (0, rows - 1):
        alone = jitgen.sample(x[row : row + 1], seed=seeds[row : row + 1], offset=offsets[row : row + 1], **options)
        assert int(alone[0]) == int(whole[row])


def check_bad_rows(device: str, dtype: torch.dtype, vocab: int) -> None:
    """Each kind of bad row is reported by itself and leaves its neighbours alone."""
    x = logits_of(6, vocab, dtype, device)
    good = jitgen.sample(x, seed=torch.arange(6, device=device), top_p=0.9)
    x[1, vocab // 2] = float("nan")
    x[2, vocab - 1] = float("inf")
    x[3] = -torch.inf
    x[4, :-1] = -torch.inf  # one token left: a good row
    status = torch.full((6,), 77, dtype=torch.uint8, device=device)
    for filters in ({}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1, "top_k": 3, "top_p": 0.5}):
        out = torch.full((6,), -5, dtype=torch.int64, device=device)
        tokens, valid = jitgen.sample(
            x, seed=torch.arange(6, device=device), out=out, status=status, return_valid=True, **filters
        )
        assert [sampling.STATUS[code] for code in status.tolist()] == ["ok", "nan", "infinite", "empty", "ok", "ok"]
        assert valid.tolist() == [True, False, False, False, True, True]
        assert tokens[1:4].tolist() == [-1, -1, -1]
        assert int(tokens[4]) == vocab - 1
        if filters == {"top_p": 0.9}:
            assert tokens[[0, 5]].tolist() == good[[0, 5]].tolist()
    probs = logits_of(4, vocab, dtype, device).softmax(-1)
    probs[1] = 0
    probs[2, 0] = -0.5
    probs[3, vocab // 3] = float("nan")
    jitgen.sample(probs, from_logits=False, seed=1, status=status[:4], top_k=4)
    assert [sampling.STATUS[code] for code in status[:4].tolist()] == ["ok", "empty", "negative", "nan"]


def check_speculation(device: str, dtype: torch.dtype, vocab: int, draws: int) -> None:
    """First tokens, and those after an accepted one, follow the target whatever the draft was."""
    generator = torch.Generator().manual_seed(4)
    q = (torch.randn(3, vocab, generator=generator) * 1.5).softmax(-1)
    t = (torch.randn(4, vocab, generator=generator) * 1.5).softmax(-1)
    q, t = q.to(dtype), t.to(dtype)
    exact = t.double() / t.double().sum(-1, keepdim=True)
    drawn = torch.stack([torch.multinomial(q[i].float(), draws, replacement=True, generator=generator) for i in range(3)], 1)
    seeds = torch.arange(draws, device=device) * 13 + 1
    q_rows, t_rows = q.to(device).expand(draws, -1, -1), t.to(device).expand(draws, -1, -1)
    for parents in (None, torch.tensor([-1, 0, 1]), torch.tensor([-1, -1, 0]), torch.tensor([-1, -1, -1])):
        shown = q_rows if parents is None or parents.tolist() == [-1, 0, 1] else q_rows[:, [0, 0, 0]]
        ids = drawn if shown is q_rows else torch.stack(
            [torch.multinomial(q[0].float(), draws, replacement=True, generator=generator) for _ in range(3)], 1
        )  # fmt: skip
        tree = None if parents is None else parents.expand(draws, 3).contiguous().to(device)
        for draft in (shown, None):
            found = jitgen.speculative_verify(draft, ids.to(device), t_rows, parents=tree, seed=seeds)
            assert chi_square_tail(found.ids[:, 0], exact[0]) > FALSE_ALARM
            first = (found.emitted >= 1) & (found.path[:, 0] == 0)
            assert chi_square_tail(found.ids[first, 1], exact[1]) > FALSE_ALARM
            used = torch.arange(4, device=device) <= found.emitted[:, None]
            assert bool((found.ids[used] >= 0).all()) and bool((found.ids[~used] == -1).all())
