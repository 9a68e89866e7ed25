"""Dense calls of few rows, whose keys the decode kernel cuts among the CTAs, against the oracle in float64."""

from __future__ import annotations

import math
import random
import threading
import time

import pytest
import torch
from gallery import CASES, Sizes
from gallery.rounding import inputs, largest_error, rounding_error
from random_variants import Draw

import jitgen
from jitgen import dense, dense_split, reference
from jitgen.graph_capture import GraphTable
from jitgen.ir import walk

TIMES_ROUNDING = 1.5  # as in test_gpu_variants.py
CALLS = [(1, 301, "absolute"), (1, 2049, "local"), (3, 1500, "absolute"), (8, 77, "absolute")]
LAYOUTS = {
    "heads outside": lambda t: t,
    "heads inside": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "part of a longer cache": lambda t: torch.cat([t, torch.full_like(t, math.nan)], 2)[:, :, : t.shape[2]],
}


@pytest.fixture(autouse=True)
def cuts_everything(monkeypatch):
    """Keys are cut however few there are."""
    monkeypatch.setattr(dense_split, "LEAST_KEYS", 1)
    for table in ("_prepared", "_recent"):
        monkeypatch.setattr(dense, table, {})


def is_cut() -> bool:
    """Whether the last call that was prepared is one of the decode kernel."""
    return list(dense._prepared.values())[-1].split is not None


def random_inputs(batch, heads, kv_heads, q_len, kv_len, head_dim, dtype=torch.bfloat16):
    shapes = ((batch, heads, q_len, head_dim), (batch, kv_heads, kv_len, head_dim), (batch, kv_heads, kv_len, head_dim))
    return [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]


def assert_right(got, q, k, v, variant, **options):
    (out, lse), (want, want_lse) = got, reference.attention(q, k, v, variant, return_lse=True, **options)
    assert not out.isnan().any()
    assert ((out.double() - want).norm() / want.norm()).item() < torch.finfo(q.dtype).eps
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=2e-4)


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_variants(case):
    head_dim = (64, 128, 96)[list(CASES).index(case.name) % 3]
    for q_len, kv_len, q_index in CALLS:
        z = Sizes(q_len, kv_len, head_dim=head_dim, device="cuda")
        variant, (q, k, v) = case.make(z), inputs(z, torch.bfloat16)
        program = variant.trace().program
        want_lse = program.norm is None or program.norm.lse is not None
        want = reference.attention(q, k, v, variant, q_index=q_index, return_lse=want_lse)
        out = torch.full_like(q, math.nan)
        got = jitgen.attention(q, k, v, variant, q_index=q_index, return_lse=want_lse, out=out)
        where = f"q_len {q_len}, kv_len {kv_len}, {q_index}, head_dim {head_dim}"
        if want_lse:
            (got, got_lse), (want, exact_lse) = got, want
            bends = any(n.op in ("tanh", "tanh_approx", "gelu_tanh") for n in walk(*program.roots()))
            atol = 5e-3 if bends else 1e-4
            torch.testing.assert_close(got_lse.double(), exact_lse, rtol=1e-5, atol=atol, msg=lambda m: f"{where}: {m}")  # noqa: B023
        allowed = TIMES_ROUNDING * rounding_error(q, k, v, variant, want, q_index) + torch.finfo(torch.bfloat16).eps * 1e-2
        error = largest_error(got, want)
        assert error <= allowed, f"{where}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("name", ["causal", "gpt_oss", "alibi_slopes", "packed_documents"])
def test_these_variants_are_cut(name):
    z = Sizes(1, 2049, head_dim=64, device="cuda")
    jitgen.attention(*inputs(z, torch.bfloat16), CASES[name].make(z))
    assert is_cut()


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (8, 1), (9, 3), (32, 1)])
@pytest.mark.parametrize("batch, q_len", [(1, 1), (3, 1), (1, 3)])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_heads_and_rows(heads, kv_heads, batch, q_len, head_dim):
    for kv_len in (1, 17, 1000, 4099):
        q, k, v = random_inputs(batch, heads, kv_heads, q_len, kv_len, head_dim)
        if q_len > kv_len:
            continue
        out = torch.full_like(q, math.nan)
        got = jitgen.attention(q, k, v, mask_mod=causal, return_lse=True, out=out)
        assert is_cut() == (heads // kv_heads * q_len <= dense_split.DECODE_ROWS)
        assert_right(got, q, k, v, jitgen.Variant(mask_mod=causal))


@pytest.mark.parametrize("keys", LAYOUTS)
@pytest.mark.parametrize("queries", ["heads outside", "heads inside"])
@pytest.mark.parametrize("q_len", [1, 4])
def test_layouts(keys, queries, q_len):
    q, k, v = random_inputs(2, 8, 2, q_len, 1003, 128)
    laid = LAYOUTS[queries](q), LAYOUTS[keys](k), LAYOUTS[keys](v)
    got = jitgen.attention(*laid, mask_mod=causal, return_lse=True)
    assert is_cut() == (q_len == 1 or queries == "heads inside")
    assert got[0].stride() == torch.empty_like(laid[0]).stride() or q_len == 1
    assert_right(got, q, k, v, jitgen.Variant(mask_mod=causal))
    for out in (torch.empty(2, q_len, 8, 128, device="cuda", dtype=q.dtype).transpose(1, 2), torch.empty_like(q)):
        out.fill_(math.nan)
        again = jitgen.attention(*laid, mask_mod=causal, return_lse=True, out=out)
        assert again[0] is out and torch.equal(out, got[0]) and torch.equal(again[1], got[1])


def test_results_that_begin_anywhere():
    q, k, v = random_inputs(2, 8, 2, 1, 1003, 64)
    want = jitgen.attention(q, k, v)
    memory = torch.full((q.numel() + 3,), math.nan, device="cuda", dtype=q.dtype)
    out = memory[3:].view(q.shape)
    assert torch.equal(jitgen.attention(q, k, v, out=out), want) and memory[:3].isnan().all()


@pytest.mark.parametrize("expands", [True, False])
def test_keys_of_one_request_serve_all(expands):
    q, k, v = random_inputs(5, 4, 2, 1, 900, 64)
    k, v = k[:1], v[:1]
    got = jitgen.attention(q, *(t.expand(5, -1, -1, -1) if expands else t for t in (k, v)), return_lse=True)
    assert is_cut()
    assert_right(got, q, k.expand(5, -1, -1, -1), v.expand(5, -1, -1, -1), jitgen.Variant())


def test_lengths_that_grow_and_masks_that_change():
    """What the planner has written is for other keys, and must not be used again."""
    valid = torch.ones(2, 3000, dtype=torch.bool, device="cuda")
    window = 3000
    variant = jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: valid[b, kv_idx] & (q_idx - kv_idx < window))
    cache = random_inputs(2, 8, 2, 1, 3000, 128)
    for kv_len in (2000, 2001, 2001, 2999, 1500, 2001):
        q, k, v = torch.randn_like(cache[0]), cache[1][:, :, :kv_len], cache[2][:, :, :kv_len]
        assert_right(jitgen.attention(q, k, v, variant, return_lse=True), q, k, v, variant)
        valid[0, 200:1400] = False  # whole tiles that the planner has seen visible, in the same memory
        assert_right(jitgen.attention(q, k, v, variant, return_lse=True), q, k, v, variant)
        valid.fill_(True)
        window = 100
        assert_right(jitgen.attention(q, k, v, variant, return_lse=True), q, k, v, variant)
        window = 3000
        assert_right(jitgen.attention(q, k, v, variant, return_lse=True), q, k, v, variant)


def test_graphs_plan_for_what_masks_read_when_they_run():
    """Layers of one graph share a plan, and no graph shares memory with another or with calls outside."""
    valid = torch.ones(2500, dtype=torch.bool, device="cuda")
    variant = jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: valid[kv_idx])
    graphs = []
    for kv_len in (2500, 1300):
        q, k, v = random_inputs(2, 8, 2, 1, kv_len, 128)
        graph = torch.cuda.CUDAGraph()
        jitgen.attention(q, k, v, variant)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            middle, lse = jitgen.attention(q, k, v, variant, return_lse=True)
            last = jitgen.attention(middle, k, v, variant, return_lse=True)
            plain = jitgen.attention(q, k, v, return_lse=True)
        graphs.append((graph, (q, k, v), (middle, lse), last, plain))
    for first, last in ((0, 2500), (700, 900), (40, 41)):
        valid.fill_(False)[first:last] = True
        jitgen.attention(*random_inputs(2, 8, 2, 1, 1700, 128), variant)
        for graph, (q, k, v), got, then, plain in graphs:
            for t in (*got, *then, *plain):
                t.fill_(math.nan)
            graph.replay()
            assert_right(got, q, k, v, variant)
            assert_right(then, got[0], k, v, variant)
            assert_right(plain, q, k, v, jitgen.Variant())


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_the_first_call_of_a_shape_may_be_captured(mode):
    q, k, v = random_inputs(2, 8, 2, 1, 1111 + len(mode), 128)
    kernel = jitgen.attention(q[:1], k[:1], v[:1])
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # so that memory has to come from the driver
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        got = jitgen.attention(q, k, v, return_lse=True)
    for _ in range(2):
        q.normal_()
        got[0].fill_(math.nan)
        graph.replay()
        assert_right(got, q, k, v, jitgen.Variant())
    assert not kernel.isnan().any()


def captured(q, k, v):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = jitgen.attention(q, k, v)
    return graph, out


def tables_left(wanted: int) -> int:
    """Graphs whose memory is kept: the driver says in its own time that one is gone."""
    for _ in range(200):
        dense_split._captured.drop()
        if len(dense_split._captured) == wanted:
            break
        time.sleep(0.01)
    return len(dense_split._captured)


def test_memory_of_graphs_goes_with_them(monkeypatch):
    monkeypatch.setattr(dense_split, "_captured", GraphTable())
    q, k, v = random_inputs(2, 8, 2, 1, 1300, 128)
    want = jitgen.attention(q, k, v)
    kept, out = captured(q, k, v)
    reserved = []
    for _ in range(12):
        graph, _ = captured(q, k, v)
        del graph
        assert tables_left(1) == 1
        reserved.append(torch.cuda.memory_allocated())
    assert reserved[-1] == reserved[1]
    out.fill_(math.nan)
    kept.replay()
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
    del kept
    assert tables_left(0) == 0


def test_memory_of_a_graph_stays_while_a_replay_runs(monkeypatch):
    monkeypatch.setattr(dense_split, "_captured", GraphTable())
    q, k, v = random_inputs(2, 8, 2, 1, 1300, 128)
    jitgen.attention(q, k, v)
    graph, out = captured(q, k, v)
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 30)  # half a second
    graph.replay()
    done = torch.cuda.Event()
    done.record()
    del graph
    time.sleep(0.1)
    dense_split._captured.drop()
    left, is_running = len(dense_split._captured), not done.query()
    torch.cuda.synchronize()
    assert is_running and left == 1
    assert tables_left(0) == 0
    torch.testing.assert_close(out, jitgen.attention(q, k, v), rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The CUDA Graph is empty")  # both of torch's own
def test_graphs_of_torch_compile():
    """Which complain of memory of their pool that lives and that they have not given out."""
    valid = torch.ones(1800, dtype=torch.bool, device="cuda")

    def layers(q, k, v, valid):
        for _ in range(2):
            q = jitgen.attention(q, k, v, mask_mod=lambda b, h, q_idx, kv_idx: valid[kv_idx]) + 1
        return q

    with torch.no_grad():
        compiled = torch.compile(layers, mode="reduce-overhead", fullgraph=True)
        for kv_len in (1800, 1800, 1800, 900, 900, 900):
            q, k, v = random_inputs(2, 8, 2, 1, kv_len, 128)
            valid[300:400] = not valid[300]
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(q, k, v, valid), layers(q, k, v, valid), rtol=2e-2, atol=2e-2)


def test_memory_may_be_made_in_inference_mode_and_given_up(monkeypatch):
    monkeypatch.setattr(dense_split, "MAX_ROOMS", 2)
    monkeypatch.setattr(dense_split, "_rooms", {})
    for _ in range(2):
        for batch in (1, 2, 3, 4):
            q, k, v = random_inputs(batch, 8, 2, 1, 1000 + batch, 64)
            with torch.inference_mode(batch % 2 == 1):
                got = jitgen.attention(q, k, v, return_lse=True)
            assert_right(got, q, k, v, jitgen.Variant())
            shorter = k[:, :, :700], v[:, :, :700]
            assert_right(jitgen.attention(q, *shorter, return_lse=True), q, *shorter, jitgen.Variant())
    assert len(dense_split._rooms) <= 2


def test_positions_that_count_from_the_first_row():
    """The same mask and lengths, and other visible keys."""
    variant = jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + 700)
    q, k, v = random_inputs(1, 8, 2, 2, 2000, 64)
    for q_index in ("absolute", "local", "absolute"):
        got = jitgen.attention(q, k, v, variant, q_index=q_index, return_lse=True)
        assert_right(got, q, k, v, variant, q_index=q_index)


def test_streams_and_threads_do_not_share_memory():
    variant = jitgen.Variant(mask_mod=causal)
    given = [random_inputs(1, 8, 2, 1, 1000 + 700 * i, 128) for i in range(4)]
    wanted = [jitgen.attention(*t, variant) for t in given]
    torch.cuda.synchronize()
    wrong = []

    def work(i: int, stream: torch.cuda.Stream | None) -> None:
        with torch.cuda.stream(stream):
            for _ in range(30):
                if not torch.equal(jitgen.attention(*given[i], variant), wanted[i]):
                    wrong.append(i)

    streams = [torch.cuda.Stream(), torch.cuda.Stream(), None, None]  # and two threads on one stream
    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled_calls_are_the_same():
    q, k, v = random_inputs(2, 8, 2, 1, 1100, 64)
    slopes = torch.rand(8, device="cuda")

    def layer(q, k, v):
        return jitgen.attention(q, k, v, score_mod=lambda s, b, h, q_idx, kv_idx: s + slopes[h] * (kv_idx - q_idx))

    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(compiled, layer(q, k, v)) and is_cut()


@pytest.mark.parametrize("seed", range(300, 330))
def test_variants_drawn_at_random(seed):
    choose = random.Random(seed)
    (heads, kv_heads), head_dim = choose.choice([(2, 2), (8, 2), (9, 3), (8, 1)]), choose.choice([64, 96, 128, 128, 192, 256])
    batch, q_len = choose.choice([(1, 1), (3, 1), (1, 2), (1, 4)])
    kv_len, dtype = choose.randrange(q_len, 5000), choose.choice([torch.bfloat16, torch.float16])
    draw = Draw(seed, heads, kv_len, q_len, batch, "cuda")
    variant = draw.variant()
    torch.manual_seed(seed)
    q, k, v = random_inputs(batch, heads, kv_heads, q_len, kv_len, head_dim, dtype)
    out, lse = jitgen.attention(q, k, v, variant, out=torch.full_like(q, math.nan), return_lse=True)
    want, want_lse = reference.attention(q, k, v, variant, return_lse=True)
    eps = torch.finfo(dtype).eps
    assert not out.isnan().any(), draw.names
    assert (out.double() - want).norm() <= 1.6 * eps * want.norm(), draw.names
    torch.testing.assert_close(lse.double(), want_lse, rtol=3e-3, atol=5e-3, msg=lambda text: f"{draw.names}: {text}")
