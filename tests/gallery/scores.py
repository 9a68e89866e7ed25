"""Biases and caps of logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import jitgen
from gallery.case import Sizes, case


def causal_mask(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


@case("ALiBi by head number")
def alibi(z: Sizes) -> jitgen.Variant:
    num_heads = z.num_q_heads

    def score(s, b, h, q_idx, kv_idx):
        slope = torch.exp2(-((h + 1) * 8.0 / num_heads))
        return s + (kv_idx - q_idx) * slope

    return jitgen.Variant(score_mod=score)


@case("soft cap")
def soft_cap(z: Sizes) -> jitgen.Variant:
    cap = 2.5

    def score(s, b, h, q_idx, kv_idx):
        return cap * torch.tanh(s / cap)

    return jitgen.Variant(score_mod=score)


@case("Sandwich")
def sandwich(z: Sizes) -> jitgen.Variant:
    offset = z.num_positions - 1
    relative = z.floats(2 * z.num_positions - 1)
    head_scale = z.floats(z.num_q_heads)

    def score(s, b, h, q_idx, kv_idx):
        return s + relative[q_idx - kv_idx + offset] * head_scale[h]

    return jitgen.Variant(score_mod=score)


@case("Graphormer spatial")
def graph_distance(z: Sizes) -> jitgen.Variant:
    n = z.num_positions
    embedding = z.floats(z.num_q_heads, 9)
    distance = z.ints(0, 9, z.batch, n, n, dtype=torch.int64)

    def score(s, b, h, q_idx, kv_idx):
        return s + embedding[h, distance[b, q_idx, kv_idx]]

    return jitgen.Variant(score_mod=score)


@case("Graphormer edge")
def graph_edges(z: Sizes) -> jitgen.Variant:
    n, longest, kinds = z.num_positions, 3, 7
    edge = z.ints(0, kinds, z.batch, n, n, longest)
    weight = z.floats(z.num_q_heads, longest, kinds)
    length = z.ints(0, longest + 1, z.batch, n, n)

    def score(s, b, h, q_idx, kv_idx):
        steps = length[b, q_idx, kv_idx]
        bias = torch.zeros_like(s)
        for i in range(longest):
            bias = bias + torch.where(steps > i, weight[h, i, edge[b, q_idx, kv_idx, i]], 0.0)
        return s + bias / steps.clamp(min=1)

    return jitgen.Variant(score_mod=score)


@case("activation attention by logarithms")
def log_activation(z: Sizes) -> jitgen.Variant:
    floor = 1e-3

    def score(s, b, h, q_idx, kv_idx):
        return torch.log(F.relu(s) + floor)

    return jitgen.Variant(score_mod=score)


@case("MLA rotary term")
def rotary_term(z: Sizes) -> jitgen.Variant:
    width = 4
    q_part = z.floats(z.batch, z.num_q_heads, z.num_positions, width)
    k_part = z.floats(z.batch, 1, z.num_positions, width)
    factor = 1 / math.sqrt(width)

    def score(s, b, h, q_idx, kv_idx):
        return s + factor * torch.dot(q_part[b, h, q_idx], k_part[b, 0, kv_idx])

    return jitgen.Variant(score_mod=score)


@case("ALiBi, captured slopes")
def alibi_slopes(z: Sizes) -> jitgen.Variant:
    slopes = z.floats(z.num_q_heads).abs() * 0.1

    def score(s, b, h, q_idx, kv_idx):
        return s + slopes[h] * (kv_idx - q_idx)

    return jitgen.Variant(score_mod=score, mask_mod=causal_mask)


@case("ALiBi by key position")
def alibi_keys(z: Sizes) -> jitgen.Variant:
    slopes = z.floats(z.num_q_heads).abs() * 0.01

    def score(s, b, h, q_idx, kv_idx):
        return s + slopes[h] * kv_idx

    return jitgen.Variant(score_mod=score, mask_mod=causal_mask)


@case("ALiBi-sqrt")
def alibi_sqrt(z: Sizes) -> jitgen.Variant:
    slopes = z.floats(z.num_q_heads).abs()

    def score(s, b, h, q_idx, kv_idx):
        return s - slopes[h] * torch.sqrt((q_idx - kv_idx).clamp(min=0).float())

    return jitgen.Variant(score_mod=score, mask_mod=causal_mask)


def distance_bucket(relative, bidirectional, num_buckets, max_distance):
    """Half of the buckets for exact distances, the rest spaced logarithmically up to the largest distance."""
    bucket = 0
    if bidirectional:
        num_buckets = num_buckets // 2
        bucket = bucket + (relative > 0).to(torch.long) * num_buckets
        relative = torch.abs(relative)
    else:
        relative = -torch.min(relative, torch.zeros_like(relative))
    num_exact = num_buckets // 2
    octaves = torch.log(relative.float() / num_exact) / math.log(max_distance / num_exact)
    far = num_exact + (octaves * (num_buckets - num_exact)).to(torch.long)
    far = torch.min(far, torch.full_like(far, num_buckets - 1))
    return bucket + torch.where(relative < num_exact, relative, far)


@case("T5 encoder bias")
def t5_encoder(z: Sizes) -> jitgen.Variant:
    embedding = z.floats(32, z.num_q_heads)

    def score(s, b, h, q_idx, kv_idx):
        return s + embedding[distance_bucket(kv_idx - q_idx, True, 32, 128), h]

    return jitgen.Variant(score_mod=score)


@case("T5 decoder bias")
def t5_decoder(z: Sizes) -> jitgen.Variant:
    embedding = z.floats(32, z.num_q_heads)

    def score(s, b, h, q_idx, kv_idx):
        return s + embedding[distance_bucket(kv_idx - q_idx, False, 32, 128), h]

    return jitgen.Variant(score_mod=score, mask_mod=causal_mask)


@case("forgetting transformer")
def forgetting(z: Sizes) -> jitgen.Variant:
    gates = F.logsigmoid(z.floats(z.batch, z.num_q_heads, z.num_positions) + 2).cumsum(-1)

    def score(s, b, h, q_idx, kv_idx):
        return s + gates[b, h, q_idx] - gates[b, h, kv_idx]

    return jitgen.Variant(score_mod=score, mask_mod=causal_mask)


@case("length temperature")
def length_temperature(z: Sizes) -> jitgen.Variant:
    temperature = z.floats(z.batch).abs() + 0.5

    def score(s, b, h, q_idx, kv_idx):
        return s * temperature[b]

    return jitgen.Variant(score_mod=score)


@case("temperature from the length, by name")
def named_temperature(z: Sizes) -> jitgen.Variant:
    def score(s, b, h, q_idx, kv_idx, *, kv_len):
        return s * torch.log2(kv_len + 1) * 0.25

    return jitgen.Variant(score_mod=score)


@case("selective attention")
def selective(z: Sizes) -> jitgen.Variant:
    n = z.num_positions
    forgotten = z.floats(z.batch, n, n).clamp(min=0)

    def score(s, b, h, q_idx, kv_idx):
        return s - forgotten[b, q_idx, kv_idx]

    return jitgen.Variant(score_mod=score, mask_mod=causal_mask)


@case("scales of quantised keys, one per token and head")
def key_scales(z: Sizes) -> jitgen.Variant:
    scales = z.floats(z.batch, z.num_positions, z.num_kv_heads).abs()

    def score(s, b, h, q_idx, kv_idx, *, kv_h):
        return s * scales[b, kv_idx, kv_h]

    return jitgen.Variant(score_mod=score)


@case("causal inside the score")
def causal_in_score(z: Sizes) -> jitgen.Variant:
    def score(s, b, h, q_idx, kv_idx):
        return torch.where(q_idx >= kv_idx, s, -float("inf"))

    return jitgen.Variant(score_mod=score)


@case("bias by branches", forks=True)
def branched_bias(z: Sizes) -> jitgen.Variant:
    near, far = 5, 60

    def score(s, b, h, q_idx, kv_idx):
        distance = abs(q_idx - kv_idx)
        if distance < near:
            return s
        elif distance < far and h != 1:
            return s - 0.125 * min(distance, 2 * near)
        return s * 0.5 if kv_idx % 2 == 0 else s - 2

    return jitgen.Variant(score_mod=score)


@case("quadratic penalty")
def quadratic(z: Sizes) -> jitgen.Variant:
    width = 40.0

    def score(s, b, h, q_idx, kv_idx):
        return s - ((q_idx - kv_idx) / width) ** 2

    return jitgen.Variant(score_mod=score)


@case("ALiBi behind a gate of each head, one of the layers of a tensor")
def gated_alibi(z: Sizes) -> jitgen.Variant:
    gates, slopes, layer = z.floats(3, z.num_q_heads), z.floats(3, z.num_q_heads).abs() / 16, 2

    def score(s, b, h, q_idx, kv_idx):
        return s + torch.tanh(gates[layer, h]) * slopes[layer, h] * (kv_idx - q_idx)

    return jitgen.Variant(score_mod=score)


@case("windows dilated by head, with first keys and sinks of each head", forks=True)
def dilated_heads(z: Sizes) -> jitgen.Variant:
    step, first, window = z.ints(1, 8, z.num_q_heads), z.ints(0, 6, z.num_q_heads), 21

    def mask(b, h, q_idx, kv_idx):
        distance = q_idx - kv_idx
        inside = 0 <= distance < window * step[h] and distance % step[h] == 0
        return inside or (kv_idx < first[h] and kv_idx <= q_idx)

    return jitgen.Variant(mask_mod=mask, sink=z.floats(z.num_q_heads))


@case("documents with global tokens, which see and are seen by all")
def global_tokens(z: Sizes) -> jitgen.Variant:
    document, is_global = z.documents(29)[0], z.bools(0.06, z.num_positions)

    def mask(b, h, q_idx, kv_idx):
        own = (document[q_idx] == document[kv_idx]) & (kv_idx <= q_idx)
        return own | is_global[q_idx] | is_global[kv_idx]

    return jitgen.Variant(mask_mod=mask)
