"""Fixtures that every test may use: a store of its own, so that no test sees what another one built."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jitgen import env


@pytest.fixture
def private_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user store for one test, with every jitgen variable back at its default."""
    for variable in env.VARIABLES:
        if variable.name.startswith("JITGEN_"):
            monkeypatch.delenv(variable.name, raising=False)
    root = tmp_path / "store"
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(root))
    return root


@pytest.fixture(scope="session", autouse=True)
def session_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The store of tests that do not ask for their own: fresh in each run, unless JITGEN_CACHE_DIR names one. The processes of
    pytest-xdist share it, so that a kernel which several tests use is compiled once, wherever they run."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        if "JITGEN_CACHE_DIR" not in os.environ:
            patch.setenv("JITGEN_CACHE_DIR", str(shared / "store"))
        yield
