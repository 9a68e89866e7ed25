"""Hooks that read where rows and keys of a request lie among those of all, for tests of q_off, q_tok and kv_off."""

from __future__ import annotations

import torch

import jitgen

LENGTHS = [(3, 40), (1, 17), (0, 9), (37, 37), (2, 130)]
_generator = torch.Generator().manual_seed(3)
_BIAS, _GATE = torch.randn(64, 8, generator=_generator), torch.rand(64, 8, generator=_generator)
_HIDES, _FIRSTS = torch.rand(64, generator=_generator) < 0.5, torch.randn(64, generator=_generator)


def by_name(q_index: str, device: str = "cpu") -> jitgen.Variant:
    """Hooks that ask where their row is."""
    bias, gate, hides, firsts = (t.to(device) for t in (_BIAS, _GATE, _HIDES, _FIRSTS))
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx, *, q_tok: s + bias[q_tok, h],
        mask_mod=lambda b, h, q_idx, kv_idx, *, q_tok, q_off: ~hides[q_tok] | (kv_idx % (q_off + 2) == 0),
        sink=lambda b, h, *, q_off: firsts[q_off],
        output_transform=lambda o, lse, b, h, q_idx, *, q_tok: o * gate[q_tok, h],
        lse_transform=lambda lse, b, h, q_idx, *, q_tok, q_off: lse * gate[q_tok, h] + q_off,
        q_index=q_index,
    )


def by_capture(q_index: str, starts: torch.Tensor) -> jitgen.Variant:
    """The same from the bounds of requests, which the oracle can tell for one request alone."""
    bias, gate, hides, firsts = (t.to(starts.device) for t in (_BIAS, _GATE, _HIDES, _FIRSTS))

    def row(b, q_idx, ctx_len):
        return starts[b] + q_idx - (0 if q_index == "local" else ctx_len)

    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx, *, ctx_len: s + bias[row(b, q_idx, ctx_len), h],
        mask_mod=lambda b, h, q_idx, kv_idx, *, ctx_len: ~hides[row(b, q_idx, ctx_len)] | (kv_idx % (starts[b] + 2) == 0),
        sink=lambda b, h: firsts[starts[b]],
        output_transform=lambda o, lse, b, h, q_idx, *, ctx_len: o * gate[row(b, q_idx, ctx_len), h],
        lse_transform=lambda lse, b, h, q_idx, *, ctx_len: lse * gate[row(b, q_idx, ctx_len), h] + starts[b],
        q_index=q_index,
    )
