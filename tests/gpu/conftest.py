"""Tests in this directory need a CUDA device of compute capability 8.0 or later; without one they are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    usable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    skip = pytest.mark.skip(reason="needs a CUDA device of compute capability 8.0 or later")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not usable:
                item.add_marker(skip)


@pytest.fixture(params=["sm80", "sm90"])
def family(request):
    """Each kernel family that this device can run."""
    if request.param == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the sm90 family needs compute capability 9.0")
    return request.param
