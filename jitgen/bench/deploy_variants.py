"""Variants of suite deploy: what a manifest names by import path, and what the processes that run frozen call."""

from __future__ import annotations

from typing import Any

import torch

window, cap, slopes = 256, 50.0, torch.zeros(2)


def causal(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
    return kv_idx <= q_idx


def causal_window(b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
    return (kv_idx <= q_idx) & (q_idx - kv_idx < window)


def softcap(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
    return cap * torch.tanh(score / cap)


def alibi(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
    return score + slopes[h] * (kv_idx - q_idx)


class Capped:
    """Both hooks of the capped causal variant under one name."""

    score_mod = staticmethod(softcap)
    mask_mod = staticmethod(causal)


# name in this module -> arguments of jitgen.attention
CALLS: dict[str, dict[str, Any]] = {
    "causal": {"mask_mod": causal},
    "causal_window": {"mask_mod": causal_window},
    "softcap": {"score_mod": softcap},
    "alibi": {"score_mod": alibi},
    "Capped": {"score_mod": softcap, "mask_mod": causal},
}
