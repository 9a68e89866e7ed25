"""A kernel that copies a captured tensor leaves tensors that the copy engine cannot take to one that loads."""

from __future__ import annotations

import re

import pytest
import torch

import jitgen
from jitgen import dense, paths, prebuild_units, runtime
from jitgen.families import cuda_spec, loading_spec
from jitgen.target import cuda_target

BIAS = torch.zeros(2, 64, 64, dtype=torch.bfloat16)


def biased(s, b, h, q_idx, kv_idx):
    return s + BIAS[h, q_idx, kv_idx]


class Kernel:
    """Stands for a loaded module: counts its launches, and returns a code."""

    def __init__(self, code, other=None):
        self.code, self.other, self.packed = code, other, []

    def launch(self, packed):
        self.packed.append(packed)
        return self.code

    def that_loads(self):
        return self.other

    def raise_error(self, code):
        raise RuntimeError(f"code {code}")


def test_refused_tensor_is_launched_again_where_it_is_loaded():
    loading = Kernel(0)
    copying = Kernel(runtime.CANNOT_COPY, loading)
    dense.launch(copying, None, (1, 2, 3, 4, 5, 6), b"rest")
    assert copying.packed == loading.packed and len(loading.packed) == 1


@pytest.mark.parametrize("code", [1, 20002])
def test_other_codes_are_errors_at_once(code):
    loading = Kernel(0)
    with pytest.raises(RuntimeError, match=f"code {code}"):
        dense.launch(Kernel(code, loading), None, (1, 2, 3, 4, 5, 6), b"rest")
    assert not loading.packed


def test_the_code_is_that_of_the_header():
    text = (paths.template_dir() / "include" / "jitgen" / "sm90_host.cuh").read_text()
    assert re.findall(r"kErrorCannotCopy = (\d+);", text) == [str(runtime.CANNOT_COPY)]


@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256)])
def test_kernel_that_loads_is_another_module_of_the_same_program(dims):
    program = jitgen.Variant(score_mod=biased).trace().program
    copying = cuda_spec(program, "bfloat16", dims, "sm90", cuda_target("9.0a"))
    loading = loading_spec(copying)
    assert copying.copies and not loading.copies and copying.digest != loading.digest
    assert (copying.program, copying.target) == (loading.program, loading.target)
    assert runtime.fields_of(copying) == runtime.fields_of(loading)  # the packed arguments serve both


def test_kernel_that_loads_is_recorded_as_such_and_left_out_for_other_targets():
    program = jitgen.Variant(score_mod=biased).trace().program
    loading = loading_spec(cuda_spec(program, "bfloat16", (128, 128), "sm90", cuda_target("9.0a")))
    assert prebuild_units._retargeted(loading, loading.target) is loading
    assert prebuild_units._retargeted(loading, cuda_target("8.0")).copies
