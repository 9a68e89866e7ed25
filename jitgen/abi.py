"""The launch ABI: what Python packs and generated code reads, said once.

A launch passes one pointer to a struct of 8-byte fields. Python packs it with :mod:`struct`, the template prints the same
list as ``struct Args``, so the two cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ArgField:
    """One field of ``struct Args``. ``format`` is its letter for the struct module: P pointer, q int64, d double."""

    ctype: str
    name: str
    comment: str = ""
    format: str = "q"


def _pointer(ctype: str, name: str, comment: str = "") -> ArgField:
    return ArgField(f"{ctype}*", name, comment, "P")


def _int(name: str, comment: str = "") -> ArgField:
    return ArgField("int64_t", name, comment, "q")


DENSE_ARGS: tuple[ArgField, ...] = (
    _pointer("const void", "q", "[batch, num_q_heads, q_len, head_dim]"),
    _pointer("const void", "k", "[batch, num_kv_heads, kv_len, head_dim]"),
    _pointer("const void", "v", "[batch, num_kv_heads, kv_len, head_dim_v]"),
    _pointer("void", "o", "[batch, num_q_heads, q_len, head_dim_v]"),
    _pointer("float", "lse", "[batch, num_q_heads, q_len], contiguous; null when not wanted"),
    _pointer("void", "workspace", "device scratch a family asks for; null otherwise"),
    _int("stream", "CUDA stream"),
    _int("num_threads", "CPU threads; 0: the OpenMP default"),
    _int("batch"),
    _int("num_q_heads"),
    _int("num_kv_heads"),
    _int("q_len"),
    _int("kv_len"),
    _int("q_offset", "q_idx of row 0"),
    ArgField("double", "scale", "multiplies q . k", "d"),
    *(_int(f"{t}_stride_{axis}", "elements" if axis == "b" else "") for t in "qkvo" for axis in "bhsd"),
)


def pack_format(fields: tuple[ArgField, ...]) -> str:
    """Format string for struct.pack: native 8-byte fields in order."""
    return "@" + "".join(f.format for f in fields)
