"""Variants that transform rows of q, k and v, for tests on every device."""

from __future__ import annotations

import torch

import jitgen


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def rows_variant(name: str, head_dim: int, head_dim_v: int, device: str = "cpu", **hooks: object) -> jitgen.Variant:
    """A causal variant with the transforms of that name."""
    generator = torch.Generator().manual_seed(11)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    weight, value_weight, by_head, by_request = random(head_dim), random(head_dim_v), random(64) + 1.0, random(64)
    rope, partial = jitgen.Rope(theta=5e5), jitgen.Rope(rotary_dim=16, scale=4.0, llama31=(1.0, 4.0, 64))
    pairs = jitgen.Rope(interleave=True)
    table = jitgen.Rope(cos_sin=random(300, 32).clamp(-1, 1))
    gap = 7

    def norm(x):
        return x * torch.rsqrt((x * x).mean() + 1e-5)

    known = {
        "rope": {"q_transform": lambda q, b, h, pos: rope(q, pos), "k_transform": lambda k, b, h, pos: rope(k, pos)},
        "pairs": {"q_transform": lambda q, b, h, pos: pairs(q, pos), "k_transform": lambda k, b, h, pos: pairs(k, pos)},
        "table": {"q_transform": lambda q, b, h, pos: table(q, pos), "k_transform": lambda k, b, h, pos: table(k, pos)},
        "q only": {"q_transform": lambda q, b, h, pos: norm(q) * by_head[h] + by_request[b]},
        "v only": {"v_transform": lambda v, b, h, pos: v * value_weight + by_head[h] * (pos % 5)},
        "all": {
            "q_transform": lambda q, b, h, pos: partial(norm(q) * weight, pos + gap),
            "k_transform": lambda k, b, h, pos: partial(norm(k) * weight, pos + gap) * by_head[h] + 0.1 * by_request[b],
            "v_transform": lambda v, b, h, pos: v * value_weight + 0.01 * pos,
        },
    }
    return jitgen.Variant(mask_mod=causal, **known[name], **hooks)


NAMES = ("rope", "pairs", "table", "q only", "v only", "all")
