"""Copies and pickles: of models that hold variants, of plans, and of errors on their way between processes."""

from __future__ import annotations

import copy
import inspect
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

import jitgen
from jitgen import errors

Q, K, V = (torch.randn(1, 2, 20, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = 0.1
        self.register_buffer("documents", jitgen.sorted(torch.arange(20) // 7))
        self.variant = jitgen.Variant(score_mod=self.score_mod, mask_mod=self.mask_mod, q_index="local")

    def score_mod(self, score, b, h, q_idx, kv_idx):
        return score - self.slope * (q_idx - kv_idx)

    def mask_mod(self, b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (self.documents[q_idx] == self.documents[kv_idx])

    def forward(self) -> torch.Tensor:
        return jitgen.attention(Q, K, V, self.variant)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copied_model_has_a_variant_of_its_own(copied):
    layer = Layer()
    want = layer()
    other = copied(layer)
    assert torch.equal(other(), want) and other.variant.q_index == "local"
    assert other.variant.trace().program.slots[-1].is_sorted == layer.variant.trace().program.slots[-1].is_sorted
    other.slope = 3.0
    assert torch.equal(layer(), want) and not torch.equal(other(), want)


def test_a_variant_is_its_own_copy():
    variant = jitgen.Variant(mask_mod=causal)
    assert copy.copy(variant) is variant


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "deepcopy", "pickle"]
)
def test_a_copied_plan_is_another_for_the_same(copied):
    plan = jitgen.Plan(2, 8, 2, 1, 64, dtype=torch.float32, device="cpu", page_size=4, variant=causal, max_q_len=2)
    q, cache, table = torch.randn(3, 2, 64), torch.randn(4, 2, 4, 1, 64), torch.arange(4, dtype=torch.int32).view(2, 2)
    q_indptr, kv_len = torch.tensor([0, 1, 3]), torch.tensor([5, 7])
    want = jitgen.paged_attention(q, cache, table, plan.update(q_indptr, kv_len))
    other = copied(plan)
    assert repr(other) == repr(plan) and (other.page_size, other.max_q_len) == (4, 2)
    with pytest.raises(errors.PlanMismatch, match="has no lengths yet"):
        jitgen.paged_attention(q, cache, table, other)
    assert torch.equal(jitgen.paged_attention(q, cache, table, other.update(q_indptr, kv_len)), want)


def test_every_option_of_a_plan_is_copied():
    from jitgen.serving_plan import OPTIONS

    parameters = inspect.signature(jitgen.Plan).parameters.values()
    assert set(OPTIONS) == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


RAISED = {
    "plain": errors.ShapeMismatch("q has 3"),
    "located": errors.UnsupportedVariant("no", file="a.py", line=3),
    "frozen": errors.KernelNotPrebuilt("none.", manifest="[[request]]"),
    "toolchain": errors.ToolchainMissing("no compiler", "Install one."),
    "compile": errors.CompileError("k", log=Path("/d/build.log"), source=Path("/d/k.cu"), lines=("error: x",)),
    "templates": errors.TemplatesMissing(searched=(Path("/a"),)),
    "cache": errors.CacheError("cannot be kept"),
}


@pytest.mark.parametrize("error", RAISED.values(), ids=RAISED)
def test_errors_survive_pickling(error):
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error) and str(back) == str(error) and vars(back) == vars(error)


def fail() -> None:
    raise errors.ToolchainMissing("no compiler", "Install one.")


def test_an_error_of_a_worker_process_reaches_its_parent():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.raises(errors.ToolchainMissing, match="Install one"):
            pool.submit(fail).result(timeout=120)
