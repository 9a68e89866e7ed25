"""The shim under FlashInfer's name, and what code that builds or asks for FlashInfer finds."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest
import torch

from jitgen.compat import flashinfer
from jitgen.errors import UnsupportedOption


def run_python(code):
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("name", "module"), flashinfer._HOME.items())
def test_every_name_stands_at_the_top_and_in_its_module(name, module):
    found = importlib.import_module(f"jitgen.compat.flashinfer.{module}")
    assert getattr(flashinfer, name) is getattr(found, name)
    assert getattr(found, name).__doc__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'trtllm_batch_decode_with_kv_cache'"):
        _ = flashinfer.trtllm_batch_decode_with_kv_cache


def test_code_written_for_flashinfer_runs_after_an_assignment():
    run_python("""
import sys, torch
import jitgen.compat.flashinfer
sys.modules["flashinfer"] = jitgen.compat.flashinfer
import flashinfer
from flashinfer import BatchDecodeWithPagedKVCacheWrapper
from flashinfer.prefill import single_prefill_with_kv_cache
from flashinfer.cascade import merge_state
import flashinfer.page
q, k = torch.randn(3, 2, 16), torch.randn(5, 2, 16)
a, s = flashinfer.single_prefill_with_kv_cache(q, k, k, causal=True, return_lse=True)
assert torch.allclose(merge_state(a, s, a, s)[1], s + 1)
assert flashinfer.page.get_seq_lens(torch.tensor([0, 2]), torch.tensor([1]), 4).tolist() == [5]
""")


def test_install_makes_one_module_of_each():
    run_python("""
import sys
from jitgen.compat import flashinfer as shim
shim.install()
shim.install()
import flashinfer, flashinfer.decode
from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper as W
assert flashinfer.decode is shim.decode and flashinfer.BatchDecodeWithPagedKVCacheWrapper is W
""")


def test_install_beside_flashinfer_is_refused():
    run_python("""
import sys, types
sys.modules["flashinfer"] = types.ModuleType("flashinfer")
from jitgen.compat import flashinfer as shim
try:
    shim.install()
except ImportError as e:
    assert "already been imported" in str(e)
else:
    raise SystemExit(1)
""")


def test_import_needs_no_torch():
    assert (
        run_python("""
import sys
import jitgen.compat.flashinfer
print("torch" in sys.modules)
""")
        == "False\n"
    )


# ---- FlashInfer's own tests -----------------------------------------------------------------------------------------------


def test_prebuilding_does_nothing_and_nothing_can_be_loaded():
    from jitgen.compat.flashinfer import attention, decode, jit, mla, pod, prefill

    specs = [
        decode.gen_single_decode_module(torch.float16, head_dim=128),
        decode.gen_batch_decode_module(),
        prefill.gen_single_prefill_module(),
        prefill.gen_batch_prefill_module(),
        attention.gen_batch_attention_module(),
        mla.gen_batch_mla_module(),
        pod.gen_pod_module(),
        jit.gen_page_module(),
        jit.gen_quantization_module(),
    ]
    assert all(isinstance(s, jit.JitSpec) for s in specs)
    assert specs[0].name == "gen_single_decode_module"
    assert jit.build_jit_specs(specs, verbose=False) is None
    with pytest.raises(UnsupportedOption, match="compiled when an entry point first needs it"):
        specs[0].build_and_load()
    assert issubclass(jit.MissingJITCacheError, RuntimeError)


def test_questions_about_the_device():
    from jitgen.compat.flashinfer import utils

    assert utils.has_flashinfer_jit_cache() is True
    assert utils.is_fa3_backend_supported(0, 1, 2) is True
    assert utils.is_sm90a_supported(torch.device("cpu")) is False
    assert [m.value for m in utils.MaskMode] == [0, 1, 2, 3]
    assert {m.name: m.value for m in utils.PosEncodingMode} == {"NONE": 0, "ROPE_LLAMA": 1, "ALIBI": 2}
    with pytest.raises(ValueError, match="device is cpu, expected a CUDA device"):
        utils.get_compute_capability(torch.device("cpu"))


def test_gemm_is_refused_with_its_replacement():
    with pytest.raises(UnsupportedOption, match="_grouped_mm"):
        flashinfer.SegmentGEMMWrapper()


PLAN_ORDER = (
    "pos_encoding_mode window_left logits_soft_cap q_data_type kv_data_type o_data_type data_type sm_scale rope_scale "
    "rope_theta non_blocking block_tables seq_lens fixed_split_size disable_split_kv q_len_per_req"
).split()


def test_decode_options_by_position_are_in_flashinfers_order():
    from jitgen.compat.flashinfer.decode import PLAN_OPTIONS, BatchDecodeWithPagedKVCacheWrapper

    assert list(PLAN_OPTIONS) == PLAN_ORDER
    keywords = inspect.signature(BatchDecodeWithPagedKVCacheWrapper._plan).parameters.values()
    assert {p.name for p in keywords if p.kind is p.KEYWORD_ONLY} == {*PLAN_ORDER, "window_right"}
