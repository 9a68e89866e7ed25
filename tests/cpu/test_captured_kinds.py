"""What objects of the standard library hold for the user is captured; what no call could read again is refused."""

from __future__ import annotations

import argparse
import array
import collections
import contextvars
import ctypes
import random
import sys
import threading
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import jitgen
from jitgen.errors import UnsupportedVariant

Q, K, V = (torch.randn(1, 2, 20, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
SPACE, LOCAL, TABLE = argparse.Namespace(window=3), threading.local(), {"window": 3}
LOCAL.window = 3
READ_ONLY, OWN, CHAIN = types.MappingProxyType(TABLE), collections.UserDict(window=3), collections.ChainMap({}, {"window": 3})
QUEUE, ARRAY, BYTES, LIST = collections.deque([3]), array.array("i", [3]), bytearray([3]), collections.UserList([3])

# how a hook reads the window, and how it is set
HOLDERS = {
    "argparse.Namespace": (lambda: SPACE.window, lambda n: setattr(SPACE, "window", n)),
    "threading.local": (lambda: LOCAL.window, lambda n: setattr(LOCAL, "window", n)),
    "MappingProxyType": (lambda: READ_ONLY["window"], lambda n: TABLE.update(window=n)),
    "UserDict": (lambda: OWN["window"], lambda n: OWN.update(window=n)),
    "ChainMap": (lambda: CHAIN.maps[1]["window"], lambda n: CHAIN.maps[1].update(window=n)),
    "deque": (lambda: QUEUE[0], lambda n: QUEUE.__setitem__(0, n)),
    "array": (lambda: ARRAY[0], lambda n: ARRAY.__setitem__(0, n)),
    "bytearray": (lambda: BYTES[0], lambda n: BYTES.__setitem__(0, n)),
    "UserList": (lambda: LIST[0], lambda n: LIST.__setitem__(0, n)),
}


@pytest.mark.parametrize(("read", "write"), HOLDERS.values(), ids=HOLDERS)
def test_a_value_in_a_standard_object_is_a_launch_argument(read, write):
    def mask_mod(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < read())

    programs = []
    for window in (3, 9):
        write(window)
        got = jitgen.attention(Q, K, V, mask_mod=mask_mod)
        want = jitgen.attention(Q, K, V, mask_mod=lambda b, h, q, k, w=window: (k <= q) & (q - k < w))
        assert torch.equal(got, want)
        programs.append(jitgen.Variant(mask_mod=mask_mod).trace().program)
    assert programs[0] is programs[1]


def test_a_longer_queue_is_noticed():
    seen = collections.deque([1, 2])
    variant = jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: q_idx - kv_idx < len(seen))
    first = jitgen.attention(Q, K, V, variant)
    seen.append(3)
    assert not torch.equal(first, jitgen.attention(Q, K, V, variant))


class Owner:
    window = 3


OWNER, DICE = Owner(), random.Random(0)
REFERENCE, PROXY, VARIABLE, NUMBER = weakref.ref(OWNER), weakref.proxy(OWNER), contextvars.ContextVar("w"), ctypes.c_int(3)
draw, of_numpy, draw_of_numpy, DICE_OF_NUMPY = random.random, np.random, np.random.rand, np.random.default_rng(0)
FLEETING = {
    "weakref": (lambda: REFERENCE().window, "'REFERENCE' is a weak reference"),
    "proxy": (lambda: PROXY.window, "'PROXY' is a weak reference"),
    "ContextVar": (lambda: VARIABLE.get(3), r"'VARIABLE' is a context variable.*VARIABLE\.get\(\)"),
    "ctypes": (lambda: NUMBER.value, r"'NUMBER' is a c_int of ctypes.*NUMBER\.value"),
    "random": (lambda: random.randint(1, 9), "'random' draws random numbers"),
    "function": (lambda: 9 * draw(), "'draw' draws random numbers"),
    "generator": (lambda: DICE.randint(1, 9), "'DICE' draws random numbers"),
    "NumPy": (lambda: 9 * np.random.rand(), "mask_mod '<lambda>' draws random numbers of NumPy"),
    "NumPy's module": (lambda: 9 * of_numpy.rand(), "'of_numpy' draws random numbers"),
    "NumPy's function": (lambda: 9 * draw_of_numpy(), "'draw_of_numpy' draws random numbers"),
    "NumPy's generator": (lambda: 9 * DICE_OF_NUMPY.random(), "'DICE_OF_NUMPY' draws random numbers"),
}


@pytest.mark.parametrize(("read", "message"), FLEETING.values(), ids=FLEETING)
def test_what_would_be_read_once_is_refused(read, message):
    with pytest.raises(UnsupportedVariant, match=message):
        jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: q_idx - kv_idx < read())


def test_numbers_that_another_thread_draws_meanwhile_are_not_the_hooks():
    """NumPy's generator is one for all threads."""
    kept = 3

    def near(b, h, q_idx, kv_idx):
        thread = threading.Thread(target=np.random.rand)
        thread.start()
        thread.join()
        return q_idx - kv_idx < kept

    jitgen.Variant(mask_mod=near)


def test_a_module_of_the_users_may_be_called_like_one_of_pythons(tmp_path, monkeypatch):
    source = "window = 3\n\ndef mask(b, h, q_idx, kv_idx):\n    return q_idx - kv_idx < window\n"
    Path(tmp_path, "graphlib.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "graphlib", raising=False)
    from jitgen.captured_kinds import is_library

    is_library.cache_clear()
    import graphlib

    assert graphlib.__file__ == str(tmp_path / "graphlib.py")
    first = jitgen.attention(Q, K, V, mask_mod=graphlib.mask)
    graphlib.window = 9
    assert not torch.equal(first, jitgen.attention(Q, K, V, mask_mod=graphlib.mask))
    monkeypatch.delitem(sys.modules, "graphlib")
    is_library.cache_clear()


def test_the_line_of_a_hook_beside_the_package_is_named(tmp_path, monkeypatch):
    from jitgen import location

    monkeypatch.setattr(location, "_PACKAGE", str(tmp_path / "jitgen") + "/")
    path = tmp_path / "jitgen_models.py"
    path.write_text("def mask(b, h, q_idx, kv_idx):\n    return q_idx @ kv_idx\n")
    assert location._is_user_file(str(path)) and not location._is_user_file(str(tmp_path / "jitgen" / "trace.py"))
