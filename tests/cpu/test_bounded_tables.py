"""What a process remembers for quicker calls stays of a bounded size, however long it serves."""

from __future__ import annotations

import gc
import weakref

import torch

import jitgen
from jitgen import ir, ir_nodes, kv_launch, lifted, sampling_launch, signatures, trace, variant


def made_anew(i: int):
    """A hook of code of its own, as a notebook or a generator of code makes it."""
    scope: dict = {}
    exec(f"def mask(b, h, q_idx, kv_idx):\n    return kv_idx * {i} <= q_idx", scope)
    return scope["mask"]


def test_code_made_anew_does_not_add_up(monkeypatch):
    for module in (trace, variant):
        monkeypatch.setattr(module, "MAX_FUNCTIONS", 8)
    monkeypatch.setattr(signatures, "MAX_SIGNATURES", 8)
    signatures._signatures.clear()
    for i in range(30):
        variant.resolve(mask_mod=made_anew(i))
        jitgen.Variant(made_anew(100 + i))
    assert max(map(len, (variant._traces, variant._latest, signatures._signatures))) <= 8


def test_expressions_go_with_their_last_user():
    gc.collect()
    before = len(ir_nodes._table)
    for i in range(20):
        node = ir.make("add", ir.index("kv_idx"), ir.const(7000 + i))
        assert node is ir.make("add", ir.index("kv_idx"), ir.const(7000 + i))
    assert before < len(ir_nodes._table) <= before + 4
    del node
    gc.collect()
    assert len(ir_nodes._table) <= before + 1  # a leaf that others have, perhaps


def test_rotations_made_anew_do_not_add_up(monkeypatch):
    monkeypatch.setattr(kv_launch, "MAX_FOUND", 4)
    cache, x = torch.zeros(2, 2, 4, 2, 64), torch.randn(3, 2, 64)
    for _ in range(10):
        rope = jitgen.Rope()
        jitgen.append(cache, x, x, slot_mapping=torch.arange(3), positions=torch.arange(3),
                      transform=lambda k, v, b, kv_h, pos, rope=rope: (rope(k, pos), v))  # fmt: skip
    assert len(kv_launch._table.found) <= 4


def test_a_table_of_angles_lives_as_long_as_its_owner_keeps_it():
    q, positions = torch.randn(3, 2, 64), torch.tensor([0, 2, 1])
    results = []
    for i in range(3):  # as models do that compute their table in every step
        table = torch.cat([torch.cos(torch.arange(8.0)[:, None] * torch.ones(32) * i), torch.zeros(8, 32)], -1)
        results.append(jitgen.rope(q, None, positions, cos_sin=table)[0])
        want = torch.cat([q[..., :32] * table[positions, None, :32], q[..., 32:] * table[positions, None, :32]], -1)
        torch.testing.assert_close(results[-1], want)
        kept = weakref.ref(table)
        del table
        gc.collect()
        assert kept() is None


def test_processors_traced_anew_do_not_add_up(monkeypatch):
    monkeypatch.setattr(sampling_launch, "MAX_SPECS", 4)
    for i in range(10):
        scope: dict = {}
        exec(f"def keep(logit, token, row):\n    x{i} = logit\n    return x{i} + 0.0 * token", scope)
        assert jitgen.sample(torch.randn(2, 20), processor=scope["keep"], seed=i).shape == (2,)
    assert len(sampling_launch._specs) <= 4


def test_rows_of_ever_other_lengths_do_not_add_up(monkeypatch):
    monkeypatch.setattr(sampling_launch, "MAX_SPECS", 4)
    monkeypatch.setattr(sampling_launch, "_teams", {})
    for n in range(10, 30):
        jitgen.softmax(torch.zeros(1, n))
    assert len(sampling_launch._teams) <= 4


def test_calls_of_a_compiled_graph_add_nothing_to_what_graphs_hold():
    q, k, v = (torch.randn(1, 2, 20, 32) for _ in range(3))

    def layer(q, k, v, slopes):
        x = jitgen.attention(q, k, v, score_mod=lambda s, b, h, q_idx, kv_idx: s + slopes[h] * (kv_idx - q_idx))
        return jitgen.sample(x.flatten(0, 2), seed=1, processor=lambda logit, token, row: logit * slopes[0])

    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    compiled(q, k, v, torch.rand(2))
    held = len(lifted._arguments)
    for _ in range(5):
        compiled(q * 2, k, v, torch.rand(2))
    assert len(lifted._arguments) == held
