"""Hooks inside of torch.compile, made there or given to it: one operator in one graph, which does what eager calls do."""

from __future__ import annotations

import enum
import functools
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask

import jitgen
from jitgen import captures, errors

BATCH, HEADS, LENGTH, DIM = 2, 4, 37, 16


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def inputs(length: int = LENGTH) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(BATCH, HEADS, length, DIM) for _ in range(3))


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


class Relu2(jitgen.OnlineNorm):
    state = {"keys": 0.0}  # noqa: RUF012

    def __init__(self, weight):
        self.weight = weight

    def update(self, score, state):
        keys = state["keys"] + jitgen.row_sum(torch.ones_like(score))
        return self.weight * torch.relu(score) ** 2, 1.0, {"keys": keys}

    def finalize(self, o, state):
        return o / state["keys"].clamp(min=1)


class Layer(torch.nn.Module):
    """What hooks may capture; ``call`` makes them where Dynamo sees it."""

    def __init__(self, call, seed: int = 0) -> None:
        super().__init__()
        self.call = call
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("doc", torch.arange(LENGTH) // (5 + seed))
        self.slopes = torch.nn.Parameter(torch.rand(HEADS, generator=generator))
        self.config = SimpleNamespace(window=9, cap=3.0, causal=True)
        self.gate = torch.rand(BATCH, HEADS, LENGTH, DIM, generator=generator)
        self.tables = {"bias": torch.rand(HEADS, generator=generator), "shift": 0.5}
        self.stored = self.alibi
        self.rope = jitgen.Rope(theta=1e4)
        self.steps = 0
        self.mode = Mode.DOUBLE

    def alibi(self, score, b, h, q_idx, kv_idx):
        return score + self.slopes[h] * (kv_idx - q_idx)

    def window(self, b, h, q_idx, kv_idx):
        inside = q_idx - kv_idx < self.config.window
        return inside & (kv_idx <= q_idx) if self.config.causal else inside

    def forward(self, q, k, v, x):
        return self.call(self, q * 1.5, k, v, x) + 1


def a_closure(self, q, k, v, x):
    def mask_mod(b, h, q_idx, kv_idx):
        return x[q_idx] == x[kv_idx]

    return jitgen.attention(q, k, v, mask_mod=mask_mod)


def a_closure_of_self(self, q, k, v, x):
    return jitgen.flex_attention(q, k, v, mask_mod=lambda b, h, q_idx, kv_idx: self.doc[q_idx] == self.doc[kv_idx])


def numbers(self, q, k, v, x):
    cap, window, half = self.config.cap, self.config.window, q.shape[2] // 2
    return jitgen.attention(
        q, k, v, score_mod=lambda score, b, h, q_idx, kv_idx: cap * torch.tanh(score / cap),
        mask_mod=lambda b, h, q_idx, kv_idx: (q_idx - kv_idx < window) & (kv_idx >= q_idx - half),
    )  # fmt: skip


def partials_and_nested_functions(self, q, k, v, x):
    def same(a, b):
        return x[a] == x[b]

    def score_mod(score, b, h, q_idx, kv_idx, table):
        return score * table[h]

    return jitgen.attention(
        q, k, v, score_mod=functools.partial(score_mod, table=self.slopes),
        mask_mod=lambda b, h, q_idx, kv_idx: same(q_idx, kv_idx) & (kv_idx <= q_idx),
    )  # fmt: skip


def methods(self, q, k, v, x):
    out = jitgen.attention(q, k, v, score_mod=self.alibi, mask_mod=self.window)
    return jitgen.flex_attention(out, k, v, score_mod=self.stored, mask_mod=self.window)


def combined_masks(self, q, k, v, x):
    def same(b, h, q_idx, kv_idx):
        return x[q_idx] == x[kv_idx]

    out = jitgen.attention(q, k, v, mask_mod=jitgen.and_masks(same, causal))
    return jitgen.attention(out, k, v, mask_mod=jitgen.or_masks(same, self.window))


def near(b, h, q_idx, kv_idx, *, kv_len):
    return (q_idx - kv_idx < 9) | (kv_len < 5)


def counted(hook):
    """A decorator as people write them: what it returns has the signature of ``hook`` by an attribute."""

    @functools.wraps(hook)
    def with_note(*args, **kwargs):
        return hook(*args, **kwargs)

    return with_note


@counted
def halved(score, b, h, q_idx, kv_idx):
    return score * 0.5


COMBINED = jitgen.and_masks(causal, near)
COMBINED_VARIANT = jitgen.Variant(score_mod=halved, mask_mod=jitgen.or_masks(COMBINED, near))


def hooks_combined_outside(self, q, k, v, x):
    out = jitgen.attention(q, k, v, mask_mod=COMBINED, score_mod=halved)
    return jitgen.attention(out, k, v, COMBINED_VARIANT)


def containers_and_defaults(self, q, k, v, x):
    pair = [self.slopes * 2, 0.25]

    def score_mod(score, b, h, q_idx, kv_idx, *, shift=x):
        return score * pair[0][h] + pair[1] + self.tables["bias"][h] * self.tables["shift"] + 0.01 * shift[kv_idx]

    return jitgen.attention(q, k, v, score_mod=score_mod)


def a_variant(self, q, k, v, x):
    gate = torch.sigmoid(self.gate * x.sum())
    variant = jitgen.Variant(
        mask_mod=causal, sink=self.slopes, output_transform=lambda o, lse, b, h, q_idx: o * gate[b, h, q_idx],
        q_transform=lambda q, b, h, pos: self.rope(q, pos), k_transform=lambda k, b, kv_h, pos: self.rope(k, pos),
    )  # fmt: skip
    return jitgen.attention(q, k, v, variant)


def a_norm(self, q, k, v, x):
    return jitgen.attention(q, k, v, jitgen.Variant(mask_mod=causal, softmax=Relu2(self.slopes.sum())))


def a_definition(self, q, k, v, x):
    return jitgen.attention(q, k, v, lambda b, h, q_idx, kv_idx: self.doc[q_idx] == self.doc[kv_idx])


def state_that_the_graph_writes(self, q, k, v, x):
    self.slopes.mul_(0.5)
    self.steps += 1

    def score_mod(score, b, h, q_idx, kv_idx):
        return self.alibi(score, b, h, q_idx, kv_idx) * self.steps

    out = jitgen.attention(q, k, v, score_mod=score_mod)
    self.slopes.add_(1)
    return out


def logsumexp_and_scales(self, q, k, v, x):
    out, lse = jitgen.attention(
        q, k, v, mask_mod=self.window, scale_q=0.5, scale_k=self.slopes, q_index="local", return_lse=True
    )
    return out + lse[..., None]


class Mode(enum.Enum):
    DOUBLE = 2
    TRIPLE = 3


class Pair(NamedTuple):
    table: torch.Tensor
    shift: float


def objects_of_other_kinds(self, q, k, v, x):
    pair = Pair(self.slopes * 2, 0.5)

    def score_mod(score, b, h, q_idx, kv_idx):
        factor = 2.0 if self.mode is Mode.DOUBLE else 3.0
        return score * factor + pair.table[h] + pair.shift

    return jitgen.attention(q, k, v, score_mod=score_mod)


def a_block_mask(self, q, k, v, x):
    def same(b, h, q_idx, kv_idx):
        return x[q_idx] == x[kv_idx]

    block_mask = create_block_mask(same, None, None, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=16)
    return jitgen.flex_attention(q, k, v, block_mask=block_mask)


CALLS = [
    a_closure, a_closure_of_self, numbers, partials_and_nested_functions, methods, combined_masks, hooks_combined_outside,
    containers_and_defaults, a_variant, a_norm, a_definition, state_that_the_graph_writes, logsumexp_and_scales,
    objects_of_other_kinds, a_block_mask,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own create_block_mask
@pytest.mark.parametrize("call", CALLS, ids=lambda c: c.__name__)
def test_compiled_call_needs_one_graph_and_does_what_the_eager_one_does(call):
    eager, layer = Layer(call), Layer(call)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for step in range(4):
        x = torch.arange(LENGTH) // (3 + step)
        if step == 2:  # what a layer holds may change
            for one in (eager, layer):
                one.config.window, one.config.cap, one.config.causal, one.tables["shift"] = 4, 2.0, False, 1.5
                one.mode = Mode.TRIPLE
                one.doc.copy_(torch.arange(LENGTH) // 11)
        q, k, v = inputs()
        torch.testing.assert_close(compiled(q, k, v, x), eager(q, k, v, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_numbers_and_lengths_may_vary_in_one_graph(mode):
    def call(q, k, v, window, doc):
        rows = q.shape[2]
        return jitgen.attention(
            q, k, v, mask_mod=lambda b, h, q_idx, kv_idx: (q_idx - kv_idx < window) & (doc[q_idx] == doc[kv_idx]),
            score_mod=lambda score, b, h, q_idx, kv_idx: score * (q_idx / rows),
        )  # fmt: skip

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    with mode():
        for length, window in ((20, 3), (37, 5), (64, 9), (131, 60)):
            given = (*inputs(length), window, torch.arange(length) // 7)
            torch.testing.assert_close(compiled(*given), call(*given), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_float_may_vary():
    def call(q, k, v, cap):
        return jitgen.attention(q, k, v, score_mod=lambda score, b, h, q_idx, kv_idx: cap * torch.tanh(score / cap))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for cap in (2.0, 3.5, 0.5):
        given = (*inputs(), cap)
        torch.testing.assert_close(compiled(*given), call(*given), rtol=1e-4, atol=1e-5)


def test_function_given_to_the_compiled_one_is_the_one_that_is_used():
    """Functions of one code are the same to Dynamo, whatever they capture."""

    def mask_over(doc):
        return lambda b, h, q_idx, kv_idx: doc[q_idx] == doc[kv_idx]

    def call(q, k, v, mask_mod):
        return jitgen.flex_attention(q, k, v, mask_mod=mask_mod)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for size in (3, 5, 7):
        given = (*inputs(), mask_over(torch.arange(LENGTH) // size))
        torch.testing.assert_close(compiled(*given), call(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("call", [a_closure_of_self, methods])
def test_layers_of_one_class_share_a_graph(call):
    counter = CompileCounterWithBackend("aot_eager")
    layers, x, (q, k, v) = [Layer(call, seed) for seed in range(12)], torch.arange(LENGTH), inputs()
    for layer in layers:
        got = torch.compile(layer.forward, fullgraph=True, backend=counter)(q, k, v, x)
        torch.testing.assert_close(got, layer(q, k, v, x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 3


def test_block_masks_may_differ_from_call_to_call():
    compiled = torch.compile(
        lambda q, k, v, mask: jitgen.flex_attention(q, k, v, block_mask=mask), fullgraph=True, backend="aot_eager"
    )
    for size in (3, 5, 7):
        doc = torch.arange(LENGTH) // size
        mask = create_block_mask(
            lambda b, h, q_idx, kv_idx, doc=doc: doc[q_idx] == doc[kv_idx], None, None, LENGTH, LENGTH, "cpu", 16
        )
        q, k, v = inputs()
        torch.testing.assert_close(compiled(q, k, v, mask), jitgen.flex_attention(q, k, v, block_mask=mask))


class Documents(torch.nn.Module):
    def __init__(self, doc):
        super().__init__()
        self.register_buffer("doc", doc)

    def forward(self, q, k, v):
        return jitgen.attention(q * 2, k, v, mask_mod=self.mask_mod)

    def mask_mod(self, b, h, q_idx, kv_idx):
        return (self.doc[q_idx] == self.doc[kv_idx]) & (kv_idx <= q_idx)


def over_an_argument(doc):
    def call(q, k, v):
        return over(q, k, v, doc)

    def over(q, k, v, x):
        mask = lambda b, h, q_idx, kv_idx: (x[q_idx] == x[kv_idx]) & (kv_idx <= q_idx)  # noqa: E731
        return jitgen.attention(q * 2, k, v, mask_mod=mask)

    return call


@pytest.mark.parametrize("make", [Documents, over_an_argument])
def test_declared_tensors_are_inputs_and_stay_declared(make, monkeypatch):
    seen = []
    trace = captures.Captures._tensor
    monkeypatch.setattr(captures.Captures, "_tensor", lambda self, t, *rest: seen.append(type(t)) or trace(self, t, *rest))
    counter = CompileCounterWithBackend("aot_eager")
    for size in (3, 7):
        doc = jitgen.sorted(torch.arange(LENGTH) // size)
        call, (q, k, v) = make(doc), inputs()
        got = torch.compile(call, fullgraph=True, backend=counter)(q, k, v)
        torch.testing.assert_close(got, over_an_argument(torch.arange(LENGTH) // size)(q, k, v), rtol=1e-4, atol=1e-5)
    assert captures.SortedTensor in seen


def test_declared_tensors_that_change_are_read_anew():
    doc = jitgen.sorted(torch.arange(LENGTH) // 5)
    compiled = torch.compile(over_an_argument(doc), fullgraph=True, backend="aot_eager")
    q, k, v = inputs()
    first = compiled(q, k, v)
    doc.copy_(torch.arange(LENGTH) // 9)
    second = compiled(q, k, v)
    assert not torch.equal(first, second)
    torch.testing.assert_close(second, over_an_argument(doc)(q, k, v))


# ---- what cannot be in a graph ----------------------------------------------------------------------------------------------


def a_given_result(q, k, v, x):
    out = torch.empty_like(q)
    return jitgen.attention(q, k, v, mask_mod=causal, out=out) + 1


class Own(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl


def a_tensor_of_another_kind(q, k, v, x):
    return jitgen.attention(q, k, v, mask_mod=lambda b, h, q_idx, kv_idx: x[q_idx] == x[kv_idx])


@pytest.mark.parametrize("call", [a_tensor_of_another_kind, a_given_result])
def test_other_calls_break_the_graph_or_name_the_remedy(call):
    given = (*inputs(), (torch.arange(LENGTH) // 5).as_subclass(Own))
    torch.testing.assert_close(torch.compile(call, backend="aot_eager")(*given), call(*given))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"cannot take the hooks of this call apart.*make hooks plain"):
        torch.compile(call, backend="aot_eager", fullgraph=True)(*given)


def test_block_lists_are_attended_between_graphs_and_their_mask_inside_of_one():
    starts, numbers = torch.tensor([0, 1, 3, 4, 6]), torch.tensor([0, 0, 1, 2, 0, 3])
    blocks = jitgen.BlockSparse.bsr(starts.int(), numbers.int(), (64, 64), (16, 16))
    q, k, v = inputs(64)

    def listed(q, k, v):
        return jitgen.block_sparse_attention(q * 2, k, v, blocks) + 1

    def masked(q, k, v):
        return jitgen.attention(q * 2, k, v, mask_mod=blocks.mask_mod) + 1

    want = listed(q, k, v)
    counter = CompileCounterWithBackend("aot_eager")
    torch.testing.assert_close(torch.compile(listed, backend=counter)(q, k, v), want)
    assert counter.frame_count == 2  # before and after the call
    torch.testing.assert_close(torch.compile(masked, fullgraph=True, backend="aot_eager")(q, k, v), want)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="block_sparse_attention is no operator of a graph"):
        torch.compile(lambda *qkv: listed(*qkv), backend="aot_eager", fullgraph=True)(q, k, v)


def test_hooks_that_eager_calls_refuse_are_refused_with_their_line():
    def call(q, k, v, x):
        return jitgen.attention(q, k, v, mask_mod=lambda b, h, q_idx, kv_idx: x[q_idx].item() > 3)

    with pytest.raises(errors.UnsupportedVariant, match=r"test_compiled_hooks\.py:\d+: \.item\(\) of a traced value"):
        torch.compile(call, backend="aot_eager")(*inputs(), torch.arange(LENGTH))


def test_a_torch_with_other_trackers_breaks_the_graph(monkeypatch):
    import jitgen.lifting

    monkeypatch.setattr(jitgen.lifting.Lift, "recipe", lambda *_: jitgen.lifting.no_such_name)
    layer = Layer(a_closure)
    given = (*inputs(), torch.arange(LENGTH) // 3)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(*given), layer(*given))


def test_a_torch_whose_names_are_others_breaks_the_graph(monkeypatch):
    from jitgen import op

    monkeypatch.setattr(op, "CAN_LIFT", False)
    q, k, v = inputs()
    doc = torch.arange(LENGTH) // 7

    def run(q, doc):
        return jitgen.attention(q * 2, k, v, mask_mod=lambda b, h, q_idx, kv_idx: doc[q_idx] == doc[kv_idx]) + 1

    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(q, doc), run(q, doc))


OTHER_TORCH = """
import sys, torch
sys.modules["jitgen.lifting"] = None  # its import fails
import jitgen
from jitgen import kv_op, op

assert not op.CAN_LIFT and not kv_op.CAN_LIFT
q, doc = torch.randn(1, 2, 9, 16), torch.arange(9) // 4
def run(q):
    return jitgen.attention(q * 2, q, q, mask_mod=lambda b, h, q_idx, kv_idx: doc[q_idx] == doc[kv_idx]) + 1
with torch.no_grad():
    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(q), run(q))
    torch._dynamo.reset()
    try:
        torch.compile(run, backend="aot_eager", fullgraph=True)(q)
    except torch._dynamo.exc.Unsupported as e:
        print(e)
"""


def test_a_torch_without_the_names_imports_and_breaks_the_graph():
    done = subprocess.run([sys.executable, "-c", OTHER_TORCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot take the hooks of this call apart" in done.stdout


def test_captured_parameters_are_taken_as_values():
    layer = Layer(a_norm)
    given = (*inputs(), torch.arange(LENGTH))
    with torch.enable_grad():
        got = torch.compile(layer, backend="aot_eager", fullgraph=True)(*given)
        assert layer.slopes.requires_grad and not got.requires_grad
        torch.testing.assert_close(got, layer(*given), rtol=1e-4, atol=1e-5)


class Items(dict):
    """No object that can be made of some attributes."""

    __getattr__ = dict.__getitem__


def test_object_that_cannot_be_made_anew_breaks_the_graph():
    items = Items(table=torch.rand(HEADS))

    def call(q, k, v):
        return jitgen.attention(q, k, v, score_mod=lambda score, b, h, q_idx, kv_idx: score * items.table[h])

    given = inputs()
    torch.testing.assert_close(torch.compile(call, backend="aot_eager")(*given), call(*given))
    items["table"] = torch.rand(HEADS)
    torch.testing.assert_close(torch.compile(call, backend="aot_eager")(*given), call(*given))


def test_calls_of_other_threads_are_not_those_that_are_compiled():
    """is_compiling() is true in all threads while one of them compiles."""
    ended, failed = threading.Event(), []

    def serve():
        q, k, v = inputs()
        while not ended.is_set():
            try:
                jitgen.attention(q, k, v, mask_mod=causal)
                jitgen.flex_attention(q, k, v)
                jitgen.rope(q[0], None, torch.arange(HEADS))
            except BaseException as e:
                failed.append(repr(e))
                return

    server = threading.Thread(target=serve)
    server.start()
    try:
        for length in (20, 21, 22):
            torch._dynamo.reset()
            compiled = torch.compile(lambda q, k, v: jitgen.attention(q * 2, k, v), fullgraph=True, backend="aot_eager")
            compiled(*inputs(length))
    finally:
        ended.set()
        server.join()
    assert not failed


@pytest.mark.parametrize("strict", [True, False])
def test_exported_program_holds_the_operator(strict):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return jitgen.attention(q * 2, k, v, mask_mod=causal)

    given = inputs()
    exported = torch.export.export(Model(), given, strict=strict)
    assert torch.ops.jitgen.attention.default in [node.target for node in exported.graph.nodes]
    torch.testing.assert_close(exported.module()(*given), Model()(*given))


def test_gradients_are_refused():
    def call(q, k, v):
        return jitgen.attention(q, k, v, mask_mod=causal)

    q, k, v = inputs()
    q.requires_grad_()
    with torch.enable_grad():
        with pytest.raises(errors.GradNotSupported):
            torch.compile(call, backend="aot_eager")(q, k, v)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="jitgen computes no gradients"):
            torch.compile(call, backend="aot_eager", fullgraph=True)(q, k, v)


@pytest.mark.parametrize("inside", [False, True], ids=["heads outside", "heads inside"])
def test_the_operator_lays_results_out_as_graphs_are_told(monkeypatch, inside):
    """A kernel for larger head dims returns the first columns of its rows, which a graph must not see."""
    from jitgen import op
    from jitgen.recipes import constant

    padded = torch.randn(BATCH, HEADS, LENGTH, 2 * DIM)
    monkeypatch.setattr(op, "api", SimpleNamespace(attention=lambda *given, **options: padded[..., :DIM]))
    handle = op.register({name: constant(None) for name in op.ARGUMENTS})
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) if inside else t for t in inputs())
    out, _ = op.attention_op(q, k, v, [], [], handle, "", None, False, None, None)
    assert out.stride() == q.stride() and torch.equal(out, padded[..., :DIM])
