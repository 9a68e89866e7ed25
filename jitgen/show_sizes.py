"""Lengths and heads that a variant is looked at with: as asked for, else what its captured tensors are made for."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Any

from jitgen.errors import ShapeMismatch
from jitgen.program import Program, direct_indices, uses_index

DEFAULT_LEN = 2048


@dataclass(frozen=True)
class Sizes:
    """One request: lengths, heads, the q_idx of its first row, and what of it is looked at."""

    q_len: int
    kv_len: int
    num_q_heads: int
    num_kv_heads: int
    q_offset: int
    request: int
    head: int  # drawn by --mask

    def as_data(self) -> dict[str, int]:
        return asdict(self)


def sizes_of(program: Program, values: list[Any], args: argparse.Namespace, own_q_index: str | None) -> Sizes:
    """Sizes from the arguments; what they leave open comes from the captured tensors, else from a default.

    Errors:  ShapeMismatch when heads or lengths do not fit together.
    """
    limits = captured_limits(program, values)
    length = min(limits.get("q_idx", DEFAULT_LEN), limits.get("kv_idx", DEFAULT_LEN))
    q_len = args.q_len or args.kv_len or length
    kv_len = args.kv_len or q_len
    heads = args.heads or limits.get("h") or args.kv_heads or limits.get("kv_h", 1)
    kv_heads = args.kv_heads or limits.get("kv_h", heads)
    if heads % kv_heads:
        raise ShapeMismatch(
            f"{heads} query heads do not divide among {kv_heads} KV heads. Give --heads a multiple of --kv-heads."
        )
    if not 0 <= args.head < heads:
        raise ShapeMismatch(f"--head {args.head} is not one of {heads} heads, numbered from 0. Give --heads too.")
    is_local = (args.q_index or own_q_index or "absolute") == "local"
    offset = 0 if is_local else kv_len - q_len
    if offset < 0 and uses_index(program, "q_idx"):
        raise ShapeMismatch(
            f"q_len {q_len} is larger than kv_len {kv_len}, and the variant reads q_idx, which counts from "
            "kv_len - q_len. Give --q-index local to count query rows from 0."
        )
    return Sizes(q_len, kv_len, heads, kv_heads, offset, args.request, args.head)


def captured_limits(program: Program, values: list[Any]) -> dict[str, int]:
    """For each index into lengths and heads, the least size of the tensor dimensions that it is used on as it is."""
    found: dict[str, int] = {}
    for slot, dim, index in direct_indices(program):
        if index in ("any", "d"):
            continue
        size = values[slot].shape[dim]
        found[index] = min(size, found.get(index, size))
    return found
