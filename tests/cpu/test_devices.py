"""Tensors on two devices in one call: the error names both. What needs two GPUs is in tests/gpu/test_gpu_devices.py."""

from __future__ import annotations

import pytest
import torch
from device_cases import APART, CASES, Apart

import jitgen
from jitgen.errors import JitgenError, UnsupportedDevice


@pytest.mark.parametrize("name", APART.keys() - {"blocks"})  # lists on meta cannot be checked
def test_tensors_that_lie_apart_are_refused(name):
    with pytest.raises(JitgenError) as raised:
        APART[name](Apart("cpu", "meta"))
    assert "meta" in str(raised.value) and "cpu" in str(raised.value)


@pytest.mark.parametrize("name", CASES)
def test_cases_of_devices_are_right_on_the_cpu(name):
    CASES[name]("cpu", 0)()


def test_a_plan_on_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UnsupportedDevice, match=r"device is cuda:5, and torch finds 2 GPUs here.*CUDA_VISIBLE_DEVICES"):
        jitgen.Plan(1, 1, 2, 1, 64, dtype=torch.bfloat16, device="cuda:5")
