"""Masks, biases and sinks of models and of serving engines."""

from __future__ import annotations

import torch

import jitgen
from gallery.case import Sizes, case
from gallery.masks import causal_mask


@case("Gemma-2: window and soft cap")
def gemma2(z: Sizes) -> jitgen.Variant:
    cap, window = 3.0, 47

    def score(s, b, h, q_idx, kv_idx):
        return cap * torch.tanh(s / cap)

    def mask(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < window)

    return jitgen.Variant(score_mod=score, mask_mod=mask)


@case("Gemma-3, PaliGemma: image blocks")
def image_blocks(z: Sizes) -> jitgen.Variant:
    runs = z.ints(-3, 6, z.batch, -(-z.num_positions // 12))
    group = runs.repeat_interleave(12, 1)[:, : z.num_positions].contiguous()

    def mask(b, h, q_idx, kv_idx):
        same_image = (group[b, q_idx] == group[b, kv_idx]) & (group[b, q_idx] >= 0)
        return (kv_idx <= q_idx) | same_image

    return jitgen.Variant(mask_mod=mask)


@case("vLLM: multimodal prefix ranges")
def prefix_ranges(z: Sizes) -> jitgen.Variant:
    num_ranges = 3
    low = z.ints(0, z.num_positions, z.batch, num_ranges)
    high = low + z.ints(5, 40, z.batch, num_ranges)

    def mask(b, h, q_idx, kv_idx):
        keep = kv_idx <= q_idx
        for i in range(num_ranges):
            q_inside = (low[b, i] <= q_idx) & (q_idx <= high[b, i])
            keep = keep | (q_inside & (low[b, i] <= kv_idx) & (kv_idx <= high[b, i]))
        return keep

    return jitgen.Variant(mask_mod=mask)


@case("gpt-oss: sink logit and window")
def gpt_oss(z: Sizes) -> jitgen.Variant:
    window = 64

    def mask(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (kv_idx > q_idx - window)

    return jitgen.Variant(mask_mod=mask, sink=z.floats(z.num_q_heads) + 2)


@case("softmax plus one")
def softmax_one(z: Sizes) -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal_mask, sink=0.0)


@case("a sink that is a function of request and head")
def computed_sink(z: Sizes) -> jitgen.Variant:
    base, slope = z.floats(z.batch), 0.25
    return jitgen.Variant(sink=lambda b, h: base[b] + slope * h)


@case("StreamingLLM: first keys and a window")
def streaming(z: Sizes) -> jitgen.Variant:
    first, window = 4, 39

    def mask(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & ((kv_idx < first) | (q_idx - kv_idx < window))

    return jitgen.Variant(mask_mod=mask)


@case("Llama-4: chunks behind left padding")
def chunked(z: Sizes) -> jitgen.Variant:
    chunk = 50
    padding = z.ints(0, 20, z.batch)

    def mask(b, h, q_idx, kv_idx):
        same_chunk = (q_idx - padding[b]) // chunk == (kv_idx - padding[b]) // chunk
        return (kv_idx <= q_idx) & same_chunk

    return jitgen.Variant(mask_mod=mask)


@case("vLLM: chunks with lookback")
def chunk_lookback(z: Sizes) -> jitgen.Variant:
    chunk, lookback = 24, 2

    def mask(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (kv_idx >= (q_idx // chunk - lookback) * chunk)

    return jitgen.Variant(mask_mod=mask)


@case("Unlimited-OCR: window after a reference of each request")
def reference_window(z: Sizes) -> jitgen.Variant:
    window, reference = 30, z.ints(10, 50, z.batch)

    def mask(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & ((kv_idx < reference[b]) | (q_idx - kv_idx < window))

    return jitgen.Variant(mask_mod=mask)


@case("encoder requests in a decoder batch")
def causal_per_request(z: Sizes) -> jitgen.Variant:
    is_causal = z.tensor([i % 2 for i in range(z.batch)], torch.bool)

    def mask(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) | ~is_causal[b]

    return jitgen.Variant(mask_mod=mask)


@case("transformers: padding mask, written as chained indexing")
def padding(z: Sizes) -> jitgen.Variant:
    attention_mask = z.bools(0.8, z.batch, 1, 1, z.num_positions)

    def padding_mask(b, h, q_idx, kv_idx):
        return attention_mask[b][0][0][kv_idx]

    return jitgen.Variant(mask_mod=jitgen.and_masks(causal_mask, padding_mask))


@case("transformers: packed sequences")
def packed_sequences(z: Sizes) -> jitgen.Variant:
    document, _ = z.documents(37)
    sequence = torch.stack([document, document.flip(0)]).repeat(-(-z.batch // 2), 1)

    def same_sequence(b, h, q_idx, kv_idx):
        return sequence[b, q_idx] == sequence[b, kv_idx]

    return jitgen.Variant(mask_mod=jitgen.and_masks(causal_mask, same_sequence))


@case("Medusa, EAGLE: tree verification after the context")
def tree_verify(z: Sizes) -> jitgen.Variant:
    tree = z.bools(0.5, z.batch, z.q_len, z.q_len)

    def mask(b, h, q_idx, kv_idx, *, ctx_len):
        in_tree = tree[b, (q_idx - ctx_len).clamp(min=0), (kv_idx - ctx_len).clamp(min=0)]
        return (kv_idx < ctx_len) | in_tree

    return jitgen.Variant(mask_mod=mask)


@case("tree verification from bits")
def tree_bits(z: Sizes) -> jitgen.Variant:
    words = z.ints(0, 256, z.num_positions, -(-z.num_positions // 8), dtype=torch.uint8)

    def mask(b, h, q_idx, kv_idx):
        return ((words[q_idx, kv_idx >> 3] >> (kv_idx & 7)) & 1) == 1

    return jitgen.Variant(mask_mod=mask)


@case("vLLM: query-query bias of a speculated tree")
def query_bias(z: Sizes) -> jitgen.Variant:
    bias = z.floats(z.q_len, z.q_len)

    def score(s, b, h, q_idx, kv_idx, *, ctx_len):
        added = bias[(q_idx - ctx_len).clamp(min=0), (kv_idx - ctx_len).clamp(min=0)]
        return torch.where(kv_idx >= ctx_len, s + added, s)

    return jitgen.Variant(score_mod=score, mask_mod=causal_mask)


@case("windows of a different width for every head")
def window_per_head(z: Sizes) -> jitgen.Variant:
    widths = [z.tensor([9 + 20 * h], torch.int32) for h in range(3)]

    def mask(b, h, q_idx, kv_idx):
        width = torch.where(h == 0, widths[0][0], torch.where(h == 1, widths[1][0], widths[-1][-1]))
        return (kv_idx <= q_idx) & (q_idx - kv_idx < width)

    return jitgen.Variant(mask_mod=mask)
