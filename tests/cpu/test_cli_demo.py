"""jitgen demo: it compiles, agrees with the oracle, says where the kernel is, and notices what it promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from jitgen import demo, dense, runtime, toolchain
from jitgen.__main__ import main

needs_compiler = pytest.mark.skipif(toolchain.find_cxx() is None, reason="no C++ compiler on this machine")


@pytest.fixture
def forget(monkeypatch):
    """Empties the tables of this process, as if it were a new one; once at the start, then when called."""

    def empty() -> None:
        monkeypatch.setattr(runtime, "_kernels", {})
        monkeypatch.setattr(dense, "_prepared", {})
        monkeypatch.setattr(dense, "_recent", {})

    empty()
    return empty


@needs_compiler
def test_demo_compiles_once_and_agrees_with_the_oracle(private_store, forget, capsys):
    assert main(["demo", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "return cap * torch.tanh(score / cap)" in text
    assert re.search(r"first call .* traced, generated, compiled for", text)
    moved = re.search(r"window = 100 .* the same kernel, nothing compiled; the result moved by up to (.+)", text)
    assert float(moved.group(1)) > 0.1
    assert text.count("✓ against the oracle") == 2
    entry = Path(re.search(r"kernel +(/.+)", text).group(1))
    assert entry.parent == private_store and (entry / "kernel.cpp").is_file()


@needs_compiler
def test_demo_loads_a_stored_kernel_unless_asked_for_a_fresh_one(private_store, forget, capsys):
    for arguments, how in (([], "compiled for"), ([], "loaded from the store"), (["--fresh"], "compiled for")):
        forget()
        assert main(["demo", "--device", "cpu", *arguments]) == 0
        assert re.search(f"first call .*{how}", capsys.readouterr().out)


def test_numbers_of_the_demo_are_launch_arguments():
    assert {slot.name for slot in demo.VARIANT.trace().program.slots} == {"cap", "window"}


@needs_compiler
def test_changed_number_without_effect_is_code_1(monkeypatch):
    monkeypatch.setattr(demo, "OTHER_WINDOW", demo.window)
    assert demo.main("cpu") == 1


@needs_compiler
def test_wrong_result_is_code_1(monkeypatch, capsys):
    real = demo.reference.attention
    monkeypatch.setattr(demo.reference, "attention", lambda *args: real(*args) + 1e-3)
    assert demo.main("cpu") == 1
    assert "✗ TOO LARGE" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_demo_on_an_absent_gpu_says_what_to_run(capsys):
    assert main(["demo", "--device", "cuda"]) == 1
    assert "Run: jitgen doctor" in capsys.readouterr().err
