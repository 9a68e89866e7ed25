"""attn_implementation="jitgen" on the device: logits of prefill and of each generated token, beside eager attention's.

Both compute in 16 bits and are compared with eager attention in float32 over the same weights: jitgen's error may not exceed
that of eager attention by more than what chance does.
"""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip(
    "transformers", minversion="5.17", reason="transformers 5.17 or later is not installed: pip install '.[transformers]'"
)

from transformers_cases import DECODERS, batch, counted, decoder, generate

from jitgen.compat.transformers import register
from jitgen.errors import GradNotSupported, UnsupportedDtype

ROUTED = ("llama4", "doge", "deepseek-v3.2")  # choose experts or keys by numbers that rounding changes


def prepared(name: str, dtype: torch.dtype):
    """A model on the device, the same in float32, and a padded batch."""
    model, (ids, left) = decoder(name).to("cuda", dtype), batch()
    exact = copy.deepcopy(model).float()
    exact.set_attn_implementation("eager")
    return model, exact, ids.cuda(), left.cuda()


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return (got.float() - exact).square().mean().sqrt().item()


SETS = [(name, torch.bfloat16) for name in DECODERS if name not in ROUTED] + [("gemma2", torch.float16)]


@pytest.mark.parametrize(("name", "dtype"), SETS, ids=str)
@torch.no_grad()
def test_prefill_is_as_close_to_float32_as_eager_attention(name, dtype):
    model, exact, ids, left = prepared(name, dtype)
    for mask in (left, left.flip(1), None):
        real = torch.ones_like(ids).bool() if mask is None else mask.bool()
        want = exact(ids, attention_mask=mask).logits[real]
        with counted() as layers:
            model.set_attn_implementation("eager")
            eager = model(ids, attention_mask=mask).logits[real]
            assert not layers
            model.set_attn_implementation("jitgen")
            ours = model(ids, attention_mask=mask).logits[real]
            assert len(layers) == model.config.num_hidden_layers
        assert error(ours, want) <= 1.5 * error(eager, want)


def check_generation(name: str, **options: object) -> None:
    """The logits that tokens were chosen by, and those of one pass over all tokens."""
    model, exact, ids, left = prepared(name, torch.bfloat16)
    register()
    model.set_attn_implementation("jitgen")
    found = generate(model, ids, left, output_logits=True, return_dict_in_generate=True, **options)
    ours = torch.stack(found.logits, 1)
    steps = ours.shape[1]
    mask = torch.nn.functional.pad(left, (0, steps), value=1)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want, eager = (m(found.sequences, attention_mask=mask).logits[:, -steps - 1 : -1] for m in (exact, model))
    assert torch.equal(ours.argmax(-1), found.sequences[:, -steps:])
    assert error(ours, want) <= 1.5 * error(eager, want)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-oss"])
def test_generation_is_as_close_to_float32_as_eager_attention(name, cache):
    check_generation(name, cache_implementation=cache, disable_compile=True)


@pytest.mark.filterwarnings("ignore")  # of Inductor and of transformers about compiling
def test_generation_may_be_compiled_and_replayed_as_cuda_graphs():
    """transformers compiles the steps of generation with a static cache by itself, in mode reduce-overhead."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    check_generation("gemma3", cache_implementation="static")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


@torch.no_grad()
def test_float32_is_refused_with_the_remedy():
    model, ids = decoder("llama").cuda(), batch()[0].cuda()
    register()
    model.set_attn_implementation("jitgen")
    with pytest.raises(UnsupportedDtype, match=r"float32.*Convert"):
        model(ids)


def test_gradients_are_refused():
    model, ids = decoder("llama").to("cuda", torch.bfloat16), batch()[0].cuda()
    register()
    model.set_attn_implementation("jitgen")
    with pytest.raises(GradNotSupported):
        model(ids)
