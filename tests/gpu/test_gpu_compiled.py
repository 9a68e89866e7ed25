"""Hooks inside of torch.compile on a GPU: inputs of one operator, in CUDA graphs too."""

from __future__ import annotations

import pytest
import torch

import jitgen

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),  # torch's own, where it imports inductor
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),  # and where it makes the pool of its CUDA graphs
]


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", torch.rand(8, device="cuda"))
        self.window = 90

    def score_mod(self, score, b, h, q_idx, kv_idx):
        return score + self.slopes[h] * (kv_idx - q_idx)

    def forward(self, q, k, v, doc, cap):
        def mask_mod(b, h, q_idx, kv_idx):
            return (doc[q_idx] == doc[kv_idx]) & (q_idx - kv_idx < self.window) & (kv_idx <= q_idx)

        def capped(score, b, h, q_idx, kv_idx):
            return cap * torch.tanh(self.score_mod(score, b, h, q_idx, kv_idx) / cap)

        self.slopes.mul_(0.5)
        out = jitgen.attention(q * 2, k, v, score_mod=capped, mask_mod=mask_mod)
        return jitgen.flex_attention(out, k, v, score_mod=self.score_mod) + 1


@pytest.mark.parametrize("options", [{"backend": "aot_eager"}, {}, {"mode": "reduce-overhead"}], ids=str)
def test_compiled_layer_does_what_the_eager_one_does(options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager, layer = Layer(), Layer()
    layer.slopes.copy_(eager.slopes)
    compiled = torch.compile(layer, fullgraph=True, **options)
    with torch.no_grad():
        for size in (50, 70, 110, 130):
            q, k, v = (torch.randn(2, 8, 300, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
            doc, cap = torch.arange(300, device="cuda") // size, torch.tensor(size / 10, device="cuda")
            got, want = compiled(q, k, v, doc, cap), eager(q, k, v, doc, cap)
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [{"backend": "aot_eager"}, {}, {"mode": "reduce-overhead"}], ids=str)
def test_compiled_steps_draw_what_eager_ones_do(options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    seed, shift = torch.arange(5, device="cuda"), torch.randn(999, device="cuda")

    def step(logits, offset, temperature):
        return jitgen.sample(
            logits * 2, temperature=temperature, top_p=0.9, seed=seed, offset=offset, advance=True,
            processor=lambda logit, token, row: logit + shift[token],
        ) + 1  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, **options)
    offsets = [torch.zeros(5, dtype=torch.int64, device="cuda") for _ in range(2)]
    for _ in range(5):
        logits, temperature = torch.randn(5, 999, device="cuda"), torch.rand(5, device="cuda") + 0.5
        got = compiled(logits, offsets[0], temperature)
        assert torch.equal(got, step(logits, offsets[1], temperature)) and torch.equal(*offsets)
    assert offsets[0].tolist() == [5 * 64] * 5
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [{"backend": "aot_eager"}, {}, {"mode": "reduce-overhead"}], ids=str)
def test_declared_tensors_are_inputs_of_a_graph(options):
    torch._dynamo.reset()
    torch.manual_seed(0)

    def layer(q, k, v, doc):
        return jitgen.attention(q * 2, k, v, mask_mod=lambda b, h, q_idx, kv_idx: doc[q_idx] == doc[kv_idx]) + 1

    compiled = torch.compile(layer, fullgraph=True, **options)
    with torch.no_grad():
        for size in (50, 70, 110, 130):
            q, k, v = (torch.randn(2, 8, 300, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
            doc = torch.arange(300, device="cuda") // size
            got = compiled(q, k, v, jitgen.sorted(doc))
            torch.testing.assert_close(got, layer(q, k, v, doc), rtol=2e-2, atol=2e-2)
    torch._dynamo.reset()
