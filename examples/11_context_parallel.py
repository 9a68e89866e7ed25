"""Context parallel: the pages of each request lie on several ranks, and every rank attends the keys that it has.

A step: append the new keys that are this rank's, attend, exchange outputs and logsumexps, merge. Hooks are given the number of
a key among those of its rank, and compute from it where in the request the key is. The numbers that they capture for it may
change from call to call, so all ranks share one kernel. Every row is compared with the oracle on whole requests.

Run it: python examples/11_context_parallel.py, or torchrun --nproc-per-node 4 examples/11_context_parallel.py
"""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist

import jitgen
from jitgen import reference

RANKS = max(2, torch.cuda.device_count())
on_gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", RANKS))
dtype, allowed = (torch.bfloat16, 2e-2) if on_gpus else (torch.float32, 1e-4)
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
PAGE = jitgen.static(16)  # in the kernel a constant, so that dividing by it is quick
PROMPTS, STEPS = [700, 45, 301], 20  # tokens of each request, then one in each step


def serve(rank: int, ranks: int, start: str) -> None:
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank))) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo", init_method=start, rank=rank, world_size=ranks)
    batch, most = len(PROMPTS), max(PROMPTS) + STEPS
    generator = torch.Generator().manual_seed(0)  # all ranks have the same q, k and v, and keep the keys of their pages
    shapes = ((batch, most, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)

    slopes = torch.tensor([2.0 ** -(h + 1) for h in range(HEADS)], device=device)
    first_row = torch.zeros(batch, dtype=torch.int32, device=device)  # position of the first row of each request in this step

    def position(kv_idx):
        return (kv_idx // PAGE * ranks + rank) * PAGE + kv_idx % PAGE  # pages go round the ranks

    def alibi(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (position(kv_idx) - first_row[b] - q_idx)

    def causal(b, h, q_idx, kv_idx):
        return position(kv_idx) <= first_row[b] + q_idx

    variant = jitgen.Variant(score_mod=alibi, mask_mod=causal, q_index="local")  # q_idx counts the rows of this step
    pages = -(-most // (PAGE * ranks))  # of a request on this rank
    table = torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)
    cache = torch.zeros(batch * pages, 2, PAGE, KV_HEADS, HEAD_DIM, dtype=dtype, device=device)
    plan = jitgen.Plan(
        batch, sum(PROMPTS), HEADS, KV_HEADS, HEAD_DIM, dtype=dtype, variant=variant, page_size=PAGE, device=device
    )

    def step(begin: list[int], end: list[int]) -> torch.Tensor:
        """Attention of the rows ``begin`` to ``end`` of each request over all keys before ``end``."""
        request = torch.cat([torch.full((e - s,), b) for b, (s, e) in enumerate(zip(begin, end, strict=True))]).to(device)
        where = torch.cat([torch.arange(s, e) for s, e in zip(begin, end, strict=True)]).to(device)
        page = where // PAGE
        slot = torch.where(page % ranks == rank, (request * pages + page // ranks) * PAGE + where % PAGE, -1)
        jitgen.append(cache, k[request, where], v[request, where], slot_mapping=slot)  # skips what is another rank's

        first_row.copy_(torch.tensor(begin))
        rows = torch.tensor([0, *(e - s for s, e in zip(begin, end, strict=True))])
        keys = torch.tensor([sum(p // PAGE % ranks == rank for p in range(e)) for e in end])
        plan.update(rows.cumsum(0).to(device), keys.to(device))
        own = jitgen.paged_attention(q[request, where], cache, table, plan, return_lse=True)
        outs, lses = (t.new_empty(ranks, *t.shape) for t in own)
        for parts, t in zip((outs, lses), own, strict=True):
            dist.all_gather(list(parts), t)
        return jitgen.merge_states(outs.transpose(0, 1), lses.transpose(0, 1))[0]

    results = [step([0] * batch, PROMPTS).split(PROMPTS)]
    for done in range(STEPS):
        begin = [n + done for n in PROMPTS]
        results.append(step(begin, [n + 1 for n in begin]).split(1))
    error = 0.0
    for b, n in enumerate(PROMPTS):
        whole = (t[b, : n + STEPS].transpose(0, 1)[None] for t in (q, k, v))
        want = reference.attention(
            *whole,
            score_mod=lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx),
            mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx,
        )
        got = torch.cat([rows[b] for rows in results])
        error = max(error, (got - want[0].transpose(0, 1)).abs().max().item())
    print(f"rank {rank} of {ranks} on {device}, {cache.shape[0]} pages: maximum error {error:.1e}", flush=True)
    assert error < allowed, error
    dist.destroy_process_group()


def main() -> None:
    if "RANK" in os.environ:  # torchrun has started a process for each rank
        serve(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://")
        return
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(serve, (RANKS, f"file://{directory}/ranks"), nprocs=RANKS)


if __name__ == "__main__":
    main()
