"""Quest: a decode step reads, for every request and KV head, only the pages that may matter to its queries.

Each page of the cache keeps the smallest and the largest value of its keys in every dimension: no key of the page can have a
larger q . k than these allow. The pages with the largest bounds are attended, and the last one always: a selection, which has
a list for every request and KV head. ALiBi shows that positions stay those of the whole context.

Run it: python examples/08_quest.py
Source: Quest (Tang et al. 2024).
"""

from __future__ import annotations

import time

import torch

import jitgen
from jitgen import reference

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype, allowed = (torch.bfloat16, 2e-2) if device == "cuda" else (torch.float32, 1e-4)
BATCH, HEADS, KV_HEADS, HEAD_DIM, PAGE, CHOSEN = 4, 8, 2, 64, 16, 12
GROUP = HEADS // KV_HEADS
LENGTHS = [1500, 900, 2000, 701]


def bounds(k_cache: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and largest key of every page in the lists, [BATCH, pages, KV_HEADS, HEAD_DIM]: kept up to date as keys arrive."""
    keys = k_cache[table.long()].float()  # [BATCH, pages, PAGE, KV_HEADS, HEAD_DIM]
    position = torch.arange(table.shape[1] * PAGE, device=device).view(1, -1, PAGE, 1, 1)
    missing = position >= lengths.view(-1, 1, 1, 1, 1)
    return keys.masked_fill(missing, torch.inf).amin(2), keys.masked_fill(missing, -torch.inf).amax(2)


def choose(q: torch.Tensor, least: torch.Tensor, largest: torch.Tensor, num_pages: torch.Tensor) -> torch.Tensor:
    """Logical pages of every request and KV head, ascending, the last page of the request among them."""
    queries = q.float().view(BATCH, 1, KV_HEADS, GROUP, HEAD_DIM)
    bound = torch.maximum(queries * least.unsqueeze(3), queries * largest.unsqueeze(3)).sum(-1).amax(3)  # of any query head
    page, last = torch.arange(bound.shape[1], device=device).view(1, -1, 1), num_pages.view(-1, 1, 1) - 1
    bound = bound.masked_fill(page > last, -torch.inf).masked_fill(page == last, torch.inf)
    return bound.topk(CHOSEN, dim=1).indices.transpose(1, 2).sort(-1).values  # [BATCH, KV_HEADS, CHOSEN]


def main() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    num_pages = (lengths + PAGE - 1) // PAGE
    most = int(num_pages.max())
    cache = torch.randn(BATCH * most, 2, PAGE, KV_HEADS, HEAD_DIM, device=device, dtype=dtype)
    table = torch.randperm(BATCH * most, device=device).view(BATCH, most)
    q = torch.randn(BATCH, HEADS, HEAD_DIM, device=device, dtype=dtype)
    least, largest = bounds(cache[:, 0], lengths, table)

    slopes = torch.tensor([2.0 ** -(h + 1) for h in range(HEADS)], device=device)

    def alibi(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (kv_idx - q_idx)

    plan = jitgen.Plan(  # 'even': the last page is in every list, so those of all KV heads end alike
        BATCH, BATCH, HEADS, KV_HEADS, HEAD_DIM, dtype=dtype, page_size=PAGE, max_q_len=1, selection="even",
        variant=jitgen.Variant(score_mod=alibi), device=device,
    )  # fmt: skip
    pages = choose(q, least, largest, num_pages)
    selection = jitgen.Selection(torch.arange(BATCH + 1, device=device), table, lengths, pages, PAGE)
    plan.update(selection)  # once a step: each layer of a model chooses for itself, and lists keep their lengths
    for call in ("first", "second"):
        begun = time.perf_counter()
        selection.choose(choose(q, least, largest, num_pages))
        out = jitgen.paged_attention(q, cache, selection, plan).cpu()
        print(f"{call:6} call: {1e3 * (time.perf_counter() - begun):8.2f} ms")

    error, kept = 0.0, 0.0
    for b, length in enumerate(LENGTHS):
        k, v = (cache[table[b], i].flatten(0, 1)[:length].transpose(0, 1)[None] for i in (0, 1))
        query = q[b].view(1, HEADS, 1, HEAD_DIM)
        is_read = torch.zeros(KV_HEADS, most, dtype=torch.bool, device=device).scatter_(1, pages[b], True)
        bias = slopes.view(-1, 1) * (torch.arange(length, device=device) - length + 1)
        logits = (query.double() @ k.double().repeat_interleave(GROUP, 1).mT).view(HEADS, -1) / HEAD_DIM**0.5 + bias
        seen = is_read.repeat_interleave(PAGE, 1)[:, :length].repeat_interleave(GROUP, 0)
        kept += float((logits.softmax(-1) * seen).sum() / (HEADS * BATCH))

        def wanted(b, h, q_idx, kv_idx, *, kv_h, is_read=is_read):
            return is_read[kv_h, kv_idx // PAGE]

        def biased(score, b, h, q_idx, kv_idx):
            return score + slopes[h] * (kv_idx - q_idx)

        want = reference.attention(query, k, v, jitgen.Variant(score_mod=biased, mask_mod=wanted))
        error = max(error, (out[b] - want[0, :, 0].cpu()).abs().max().item())
    share = CHOSEN * BATCH / int(num_pages.sum())
    print(f"{share:.0%} of the pages hold {kept:.0%} of the weight; maximum error {error:.1e}")
    assert error < allowed, error


if __name__ == "__main__":
    main()
