"""Manifests: what they may say, and that what is written is read as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jitgen.errors import ManifestError
from jitgen.manifest import parse_manifest, read_manifest, toml_value

HERE = Path("m.toml")
texts = st.text(st.characters(exclude_categories=["Cs"]))
plain = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(texts, inner, max_size=5),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.lists(plain))
def test_what_is_written_is_read_as_it_was(values: list) -> None:
    (request,) = parse_manifest(f"[[request]]\nvalue = {toml_value(values)}\n", HERE).requests
    assert request["value"] == values
    assert list(map(type, request["value"])) == list(map(type, values))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[kernel]\n", "is not TOML"),
        ("[kernel]\nvariant = 'causal'\n", r"write \[\[kernel\]\]"),
        ("[[kernels]]\n", "has 'kernels'"),
        ("[[kernel]]\ndtype = 'float32'\n", "1 has no variant"),
        ("[[kernel]]\nvariant = ['causal', 3]\n", r"1 has the variant \['causal', 3\]\. Write variant = .*, or a list"),
        ("[[kernel]]\nvariant = []\n", "1 has the variant \\[\\]"),
        ("[[kernel]]\nvariant = 'causal'\nhead_dim = 64\n", "1 has no dtype"),
        ("[[kernel]]\nvariant = 'causal'\nheaddim = 64\n", "1 has 'headdim'. Options are variant, dtype"),
    ],
    ids=["syntax", "brackets", "table", "variant", "list", "empty", "dtype", "option"],
)
def test_wrong_manifest_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ManifestError, match=f"m.toml.*{message}"):
        parse_manifest(text, HERE)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"none.toml cannot be read: No such file"):
        read_manifest(tmp_path / "none.toml")
