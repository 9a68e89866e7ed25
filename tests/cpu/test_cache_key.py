"""The key: equal for equal kernels, different for different ones, on every machine and in every process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jitgen.cache.key import digest, encode, explain, module_key

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def shape(value: object) -> object:
    """A value with its types made visible, so that 1, 1.0 and True differ."""
    if isinstance(value, (list, tuple)):
        return ("list", tuple(map(shape, value)))
    if isinstance(value, dict):
        return ("dict", frozenset((key, shape(item)) for key, item in value.items()))
    return (type(value).__name__, value.hex() if isinstance(value, float) else value)


@settings(deadline=None)
@given(plain, plain)
def test_encoding_is_equal_only_for_equal_values(a: object, b: object) -> None:
    assert (encode(a) == encode(b)) == (shape(a) == shape(b))


def test_dictionary_order_does_not_change_the_digest() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_neighbouring_texts_do_not_run_together() -> None:
    assert digest(["ab", "c"]) != digest(["a", "bc"])


@pytest.mark.parametrize("value", [object(), {1, 2}, print, range(3)], ids=["object", "set", "function", "range"])
def test_value_without_stable_encoding_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="has no stable encoding"):
        encode(value)


@pytest.mark.parametrize("seed", ["0", "1", "12345"])
def test_digest_does_not_depend_on_the_hash_seed(seed: str) -> None:
    program = "from jitgen.cache.key import digest; print(digest({'a': 1, 'b': [2, 'x'], 'c': {'d': None}}))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": seed},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == digest({"a": 1, "b": [2, "x"], "c": {"d": None}})


def test_every_component_changes_the_module_key() -> None:
    base = digest(module_key("text", {"a.h": "1"}, {"arch": "8.0", "flags": ("-O3",)}))
    others = [
        module_key("texts", {"a.h": "1"}, {"arch": "8.0", "flags": ("-O3",)}),
        module_key("text", {"a.h": "2"}, {"arch": "8.0", "flags": ("-O3",)}),
        module_key("text", {"b.h": "1"}, {"arch": "8.0", "flags": ("-O3",)}),
        module_key("text", {"a.h": "1"}, {"arch": "9.0", "flags": ("-O3",)}),
        module_key("text", {"a.h": "1"}, {"arch": "8.0", "flags": ("-O2",)}),
    ]
    assert base not in {digest(key) for key in others}


def test_explain_names_what_differs_and_nothing_else() -> None:
    old = module_key("text", {"a.h": "1"}, {"arch": "8.0", "flags": ("-O3",)})
    new = module_key("text", {"a.h": "1"}, {"arch": "9.0", "flags": ("-O3", "-g")})
    assert explain(old, new) == ["target.arch: 8.0 -> 9.0", "target.flags: -O3 -> -O3 -g"]
    assert explain(old, old) == []
