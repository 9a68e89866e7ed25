"""Continuous batching: requests of any length come and go, prefill and decode share every step, keys live in pages.

A small random model with ALiBi stands in for a real one. Every token's logits are compared with a dense forward of the
finished sequence, one request at a time, whose attention is the oracle's.

Run it: python examples/07_serving_loop.py
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

import jitgen
from jitgen import reference

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype, allowed = (torch.bfloat16, 2e-2) if device == "cuda" else (torch.float32, 1e-4)
LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 2, 256, 8, 2, 64, 100
PAGE, NUM_PAGES, MAX_BATCH, MAX_TOKENS = 16, 60, 8, 512

slopes = torch.tensor([2.0 ** -(h + 1) for h in range(HEADS)], device=device)


def alibi(score, b, h, q_idx, kv_idx):
    return score + slopes[h] * (kv_idx - q_idx)


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


variant = jitgen.Variant(score_mod=alibi, mask_mod=causal)


class Model:
    """Attention and one projection per layer; activations in float32, attention in ``dtype``."""

    def __init__(self) -> None:
        def random(*shape: int) -> torch.Tensor:
            return (torch.randn(shape) * shape[0] ** -0.5).to(device)

        self.embedding = random(WIDTH, VOCABULARY).T
        self.qkv = [random(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM) for _ in range(LAYERS)]
        self.out = [random(HEADS * HEAD_DIM, WIDTH) for _ in range(LAYERS)]

    def forward(self, tokens: torch.Tensor, attend) -> torch.Tensor:
        """Logits of every token; ``attend(layer, q, k, v)`` is given [tokens, heads, head_dim]."""
        x = self.embedding[tokens]
        for layer in range(LAYERS):
            normed = torch.nn.functional.rms_norm(x, (WIDTH,))
            q, k, v = (normed @ self.qkv[layer]).to(dtype).view(-1, HEADS + 2 * KV_HEADS, HEAD_DIM).split(
                [HEADS, KV_HEADS, KV_HEADS], 1
            )  # fmt: skip
            x = x + attend(layer, q, k, v).float().flatten(1) @ self.out[layer]
        return torch.nn.functional.rms_norm(x, (WIDTH,)) @ self.embedding.T


@dataclass
class Request:
    tokens: list[int]
    wanted: int  # tokens to generate
    done: int = 0  # tokens whose keys are in the cache
    pages: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


class Server:
    """The loop of a serving engine, with the least policy that works: first come, first served, pages taken up front."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.cache = torch.zeros(LAYERS, NUM_PAGES, 2, PAGE, KV_HEADS, HEAD_DIM, dtype=dtype, device=device)
        self.free = list(range(NUM_PAGES))
        self.running: list[Request] = []
        # one plan for all layers and all steps: they share heads and mask
        self.plan = jitgen.Plan(
            MAX_BATCH, MAX_TOKENS, HEADS, KV_HEADS, HEAD_DIM, dtype=dtype, variant=variant, page_size=PAGE, device=device
        )

    def admit(self, waiting: list[Request]) -> None:
        """Take requests in while there are pages for all they will ever need, and rows for their prompts."""
        rows = len(self.running)
        while waiting and len(self.running) < MAX_BATCH:
            request = waiting[0]
            pages = -(-(len(request.tokens) + request.wanted) // PAGE)
            rows += len(request.tokens)
            if pages > len(self.free) or rows > MAX_TOKENS:
                return
            request.pages = [self.free.pop() for _ in range(pages)]
            self.running.append(waiting.pop(0))

    def step(self) -> list[Request]:
        """Run every request once: new ones with their prompt, others with one token. Returns those that are finished."""
        new = [r.tokens[r.done :] for r in self.running]
        q_len = torch.tensor([len(tokens) for tokens in new])
        kv_len = torch.tensor([len(r.tokens) for r in self.running])
        q_indptr = torch.cat([torch.zeros(1, dtype=torch.int64), q_len.cumsum(0)])
        self.plan.update(q_indptr.to(device), kv_len.to(device))
        page_indptr = torch.tensor([0, *(len(r.pages) for r in self.running)]).cumsum(0)
        table = jitgen.PageTable.csr(
            page_indptr.to(device), torch.tensor([p for r in self.running for p in r.pages]).to(device)
        )

        def attend(layer, q, k, v):
            cache = self.cache[layer]
            jitgen.append(cache, k, v, table, q_indptr=self.plan.q_indptr, kv_len=self.plan.kv_len)
            return jitgen.paged_attention(q, cache, table, self.plan)

        logits = self.model.forward(torch.tensor(sum(new, []), device=device), attend)  # noqa: RUF017
        for request, rows in zip(self.running, logits.split(q_len.tolist()), strict=True):
            request.logits.append(rows)
            request.done = len(request.tokens)
            request.tokens.append(int(rows[-1].argmax()))
            request.wanted -= 1
        finished = [r for r in self.running if r.wanted == 0]
        self.running = [r for r in self.running if r.wanted > 0]
        for request in finished:
            self.free += request.pages
        return finished


def dense_attend(layer, q, k, v):
    """The oracle on one whole sequence."""
    return reference.attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), variant)[0].transpose(0, 1).to(dtype)


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    server = Server(model)
    lengths = torch.randint(1, 120, (24,)).tolist()
    waiting = [Request(torch.randint(VOCABULARY, (n,)).tolist(), wanted=5 + n % 23) for n in lengths]
    finished: list[Request] = []
    steps, most, begun = 0, 0, time.perf_counter()
    while waiting or server.running:
        server.admit(waiting)
        most = max(most, len(server.running))
        finished += server.step()
        steps += 1
        if steps == 3:
            print(server.plan.explain(rows=4))
    elapsed = time.perf_counter() - begun
    tokens = sum(r.done for r in finished)
    print(f"{len(finished)} requests, {tokens} tokens in {steps} steps, up to {most} requests in one: {elapsed:.2f} s")
    assert len(server.free) == NUM_PAGES

    error = 0.0
    for request in finished:
        want = model.forward(torch.tensor(request.tokens[: request.done], device=device), dense_attend)
        error = max(error, (torch.cat(request.logits) - want).abs().max().item())
    print(f"logits against a dense forward: maximum error {error:.1e}")
    assert error < allowed, error


if __name__ == "__main__":
    main()
