"""Tensors on two devices in one call: the error names both. What needs two GPUs is in tests/gpu/test_gpu_devices.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from device_cases import APART, CASES, Apart

import jitgen
from jitgen import families, runtime, sampling_launch, streams
from jitgen.errors import JitgenError, LaunchError, UnsupportedDevice
from jitgen.target import cuda_target


@pytest.mark.parametrize("name", [name for name in APART if name != "blocks"])  # lists on meta cannot be checked
def test_tensors_that_lie_apart_are_refused(name):
    with pytest.raises(JitgenError) as raised:
        APART[name](Apart("cpu", "meta"))
    assert "meta" in str(raised.value) and "cpu" in str(raised.value)


@pytest.mark.parametrize("name", CASES)
def test_cases_of_devices_are_right_on_the_cpu(name):
    CASES[name]("cpu", 0)()


def test_each_gpu_gets_the_kernels_of_its_own_architecture(monkeypatch):
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {0: (9, 0), 1: (8, 9)}[device])
    monkeypatch.delenv("JITGEN_CUDA_ARCH", raising=False)
    monkeypatch.setattr(sampling_launch, "_targets", {})
    program = jitgen.Variant().trace().program

    def found(device):
        dense = families.choose_spec(program, "bfloat16", (64, 64), device)
        prefill, decode = (
            families.serving_spec(program, "bfloat16", (64, 64), device, "paged", family=family) for family in (None, "decode")
        )
        latent = families.serving_spec(program, "bfloat16", (576, 512), device, "paged")
        merge = families.merge_spec(program, "bfloat16", 64, device)
        specs = [(s.family, s.target.arch) for s in (dense, prefill, decode, latent, merge)]
        return specs, sampling_launch.target_of(device).arch

    for _ in range(2):
        assert found(first) == (
            [("sm90", "9.0a"), ("sm90", "9.0a"), ("decode", "9.0a"), ("mla_decode", "9.0a"), ("merge", "9.0")], "9.0"
        )  # fmt: skip
        assert found(second) == (
            [("sm80", "8.9"), ("sm80", "8.9"), ("decode", "8.9"), ("sm80_mla", "8.9"), ("merge", "8.9")], "8.9"
        )  # fmt: skip


def test_a_launch_of_code_for_another_gpu_says_what_it_was_compiled_for():
    program = jitgen.Variant().trace().program
    kernel = object.__new__(runtime.CompiledKernel)
    kernel._library = SimpleNamespace(jitgen_error_string=ErrorString(b"no kernel image is available"))
    kernel.spec = families.cuda_spec(program, "bfloat16", (64, 64), "sm80", cuda_target("8.9"))
    kernel.path = Path("module.so")
    with pytest.raises(LaunchError, match=r"no kernel image is available; it was compiled for 8\.9\. Unset JITGEN_CUDA_ARCH"):
        kernel.raise_error(209)
    with pytest.raises(LaunchError, match=r"code 700: no kernel image is available \(module.so\)"):
        kernel.raise_error(700)


class ErrorString:
    """A module's jitgen_error_string."""

    def __init__(self, text: bytes) -> None:
        self.text = text

    def __call__(self, code: int) -> bytes:
        return self.text


def test_a_plan_on_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UnsupportedDevice, match=r"device is cuda:5, and torch finds 2 GPUs here.*CUDA_VISIBLE_DEVICES"):
        jitgen.Plan(1, 1, 2, 1, 64, dtype=torch.bfloat16, device="cuda:5")


def test_public_functions_of_torch_stand_in_for_its_private_ones(monkeypatch):
    current = [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: current.__setitem__(0, index))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=70 + index))
    stand_ins = {"make_current": "_exchange", "make_current_again": "_exchange", "current_stream": "_raw_stream"}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(streams, name, getattr(streams, stand_in))
    assert streams.call_on(1, lambda: current[0]) == 1
    assert current == [0]
    assert streams.stream_of(1) == 71
