"""Keys: a canonical encoding of plain values, and the digest over it that names an entry."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

# Raised when the layout of an entry or the meaning of a key component changes, or what jitgen.host_part and jitgen.loader make
# of the same source, of which a key holds nothing else; part of every key.
FORMAT = 1

DIGEST_LENGTH = 32  # hex digits: 128 bits, far beyond accidental collision, and still readable in a path


def encode(value: object) -> bytes:
    """Encode a plain value so that different values never share an encoding.

    Takes None, bool, int, float, str, bytes and lists, tuples and mappings of them; lists and tuples are the same.
    Each value carries its type and its length, and mappings are ordered by their encoded keys, so that neither the
    order of insertion nor the hash seed matters.
    Errors:  TypeError for anything else: its identity would depend on a repr.
    """
    if value is None:
        return b"n0:"
    if isinstance(value, bool):
        return _tagged(b"b", b"1" if value else b"0")
    if isinstance(value, int):
        return _tagged(b"i", str(value).encode())
    if isinstance(value, float):
        return _tagged(b"f", value.hex().encode())
    if isinstance(value, str):
        return _tagged(b"s", value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return _tagged(b"y", value)
    if isinstance(value, (list, tuple)):
        return _tagged(b"l", b"".join(map(encode, value)))
    if isinstance(value, Mapping):
        return _tagged(b"m", b"".join(key + item for key, item in sorted((encode(k), encode(v)) for k, v in value.items())))
    raise TypeError(f"a {type(value).__name__} has no stable encoding. Pass plain values: str, int, list, dict.")


def _tagged(tag: bytes, body: bytes) -> bytes:
    return b"%s%d:%s" % (tag, len(body), body)


def digest(value: object) -> str:
    """Name of a plain value: the first 32 hex digits of the SHA-256 of its encoding."""
    return hashlib.sha256(encode(value)).hexdigest()[:DIGEST_LENGTH]


def text_digest(text: str) -> str:
    """Complete SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def module_key(text: str, includes: Mapping[str, str], target: Mapping[str, object]) -> dict[str, object]:
    """Every component of a module's key in clear; its digest names the entry, and it is stored as key.json."""
    return {
        "format": FORMAT,
        "source": text_digest(text),
        "includes": {path: text_digest(includes[path]) for path in sorted(includes)},
        "target": {name: list(part) if isinstance(part, tuple) else part for name, part in sorted(target.items())},
    }


def explain(old: Mapping[str, object], new: Mapping[str, object], prefix: str = "") -> list[str]:
    """Lines that say in which components two keys differ; none when they are equal."""
    lines = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += explain(before, after, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name}: {_shown(before)} -> {_shown(after)}")
    return lines


def _shown(part: object) -> str:
    if part is None:
        return "absent"
    return " ".join(map(str, part)) if isinstance(part, list) else str(part)
