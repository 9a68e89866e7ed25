"""Serving calls inside torch.compile: one operator in the graph, whatever the lengths of the step."""

from __future__ import annotations

import pytest
import torch
from cascade_batch import SharedBatch
from serving_batch import Batch

import jitgen

# torch's own machinery warns of its future
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
# no two sizes of the first step are equal: torch would take them to be equal for ever
STEPS = [[(5, 100), (6, 20), (2, 7), (1, 33), (1, 50)], [(3, 70), (1, 5), (4, 4)], [(9, 300), (1, 17)]]


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def new_plan(layout):
    return jitgen.Plan(5, 16, 4, 2, 16, dtype=torch.float32, variant=causal, layout=layout, device="cpu")


def assert_is_the_oracle(batch, got):
    want, want_lse = batch.expected(causal)
    assert (got[0].double() - want).abs().max().item() <= 5e-6
    torch.testing.assert_close(got[1].double(), want_lse, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("form", ["csr", "table", "one"])
def test_one_compiled_graph_serves_steps_of_all_lengths(form):
    plan, graphs = new_plan("paged"), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def layer(q, cache, table):
        out, lse = jitgen.paged_attention(2 * q, cache, table, plan, return_lse=True)
        return out + 1, lse

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for lengths in STEPS:
        batch = Batch(lengths)
        k, v, lists = batch.pages(16)
        cache = torch.stack([k, v], 1) if form == "one" else (k, v)
        table = batch.block_table(lists) if form == "table" else batch.csr(lists)
        batch.update(plan)
        out, lse = compiled(batch.q / 2, cache, table)
        assert_is_the_oracle(batch, (out - 1, lse))
    calls = [n for n in graphs[0].graph.nodes if "paged_attention" in str(n.target)]
    assert len(calls) == 1 and len(graphs) == 1


def test_ragged_calls_compile_too():
    plan = new_plan("ragged")
    compiled = torch.compile(lambda q, k, v: jitgen.ragged_attention(q, k, v, plan, return_lse=True), fullgraph=True,
                             backend="aot_eager", dynamic=True)  # fmt: skip
    for lengths in STEPS:
        batch = Batch(lengths)
        batch.update(plan)
        assert_is_the_oracle(batch, compiled(batch.q, *batch.ragged()))


def test_operators_pass_the_checks_of_torch():
    batch = Batch(STEPS[0])
    plan = batch.plan(causal)
    k, v, lists = batch.pages(16)
    indptr, indices = batch.csr(lists)
    arguments = (batch.q, k.nan_to_num(), v.nan_to_num(), indices, indptr, plan.handle, 16, None, "NHD", True, None, None, [])
    torch.library.opcheck(torch.ops.jitgen.paged_attention, arguments)
    ragged = batch.plan(causal, layout="ragged")
    arguments = (batch.q, *batch.ragged(), ragged.handle, 16, None, True, None, None, [])
    torch.library.opcheck(torch.ops.jitgen.ragged_attention, arguments)


def test_what_a_graph_cannot_carry_stays_outside_of_it():
    capped = jitgen.Variant(mask_mod=causal, score_mod=lambda s, b, h, q_idx, kv_idx: torch.tanh(s))
    batch = Batch(STEPS[0])
    plan = batch.plan(causal)
    k, v, lists = batch.pages(16)
    table = batch.csr(lists)

    def call(q):
        return jitgen.paged_attention(q, (k, v), table, plan, variant=capped)

    got = torch.compile(call, backend="eager")(batch.q)
    assert (got.double() - batch.expected(capped)[0]).abs().max().item() <= 5e-6
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"inside torch\.compile a serving call uses the variant of its plan"):
        torch.compile(call, backend="eager", fullgraph=True)(batch.q)


def test_a_compiled_call_takes_the_cascade_of_its_plan():
    shared = SharedBatch([3, 1, 5, 2], [[(2, 33), (2, 21)], [(1, 9), (1, 2), (1, 6), (1, 130)]])
    caches, cascade = shared.build()
    plan = shared.plan(causal).update(cascade)

    def layer(q, k, v):
        return jitgen.paged_attention(2 * q, (k, v), cascade, plan) + 1

    out = torch.compile(layer, fullgraph=True, backend="eager")(shared.whole.q / 2, *caches)
    assert (out.double() - 1 - shared.whole.expected(causal)[0]).abs().max().item() <= 5e-6
