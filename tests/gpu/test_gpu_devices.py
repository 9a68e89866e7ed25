"""Several GPUs in one process: calls run where their tensors are, whatever device is current, and leave it current."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from device_cases import APART, CASES, Apart, dense
from serving_batch import Batch

import jitgen
from jitgen.errors import JitgenError
from jitgen.streams import call_on

COUNT = torch.cuda.device_count()
two = pytest.mark.skipif(COUNT < 2, reason=f"needs two CUDA devices, this machine has {COUNT}")
CAPTURED = ["dense", "plain dense", "decode", "plain decode", "mixed", "cascade", "merge", "sampling"]
ROUNDS = 3


@pytest.fixture(autouse=True)
def current() -> Iterator[None]:
    """Device 0 is current before a test, and after it."""
    torch.cuda.set_device(0)
    yield
    assert torch.cuda.current_device() == 0


def run_alone(script: str) -> None:
    """Run a script in a process of its own, which has touched no device."""
    text = "import torch\nimport jitgen\nfrom device_cases import CASES\n" + textwrap.dedent(script)
    command, tests = [sys.executable, "-c", text], Path(__file__).parents[1]
    done = subprocess.run(command, cwd=tests, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


@two
@pytest.mark.parametrize("name", CASES)
def test_a_call_runs_on_a_device_that_is_not_current(name):
    case = CASES[name]("cuda:1", 0)
    for _ in range(ROUNDS):  # the later ones are prepared by the earlier
        case()
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        case()
        assert torch.cuda.current_device() == 1


@two
@pytest.mark.parametrize("name", CASES)
def test_devices_take_turns(name):
    cases = [CASES[name](f"cuda:{i}", i) for i in (0, 1)]
    for i in range(2 * ROUNDS):
        with torch.cuda.device(i // 2 % 2):
            cases[i % 2]()
            cases[1 - i % 2]()


@two
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sets_device", [False, True], ids=["device 0 current", "own device current"])
def test_two_threads_use_two_devices_at_once(name, sets_device):
    together = threading.Barrier(2)

    def serve(index: int) -> int:
        if sets_device:
            torch.cuda.set_device(index)
        case = CASES[name](f"cuda:{index}", index)
        together.wait()
        for _ in range(ROUNDS):
            case()
        return torch.cuda.current_device()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(serve, (0, 1))) == [0, int(sets_device)]


@two
@pytest.mark.parametrize("name", CAPTURED)
def test_a_graph_is_captured_on_a_device_that_is_not_current(name):
    case, graph = CASES[name]("cuda:1", 0), torch.cuda.CUDAGraph()
    case()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(1)), torch.cuda.device(0):
        results = case.run()
    for _ in range(2):
        for t in results:
            t.fill_(torch.nan if t.is_floating_point() else -7)
        with torch.cuda.device(1):
            graph.replay()
            torch.cuda.synchronize()
        case.check(results)


@two
def test_a_graph_that_would_repeat_its_draws_is_refused_whatever_device_is_current():
    x, graph = torch.zeros(4, 1000, device="cuda:1"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(1)), torch.cuda.device(0):
        x.add_(1)  # an empty graph is warned about
        with pytest.raises(ValueError, match="every replay would repeat"):
            jitgen.sample(x)


@two
def test_blocks_on_a_busy_device_are_checked_once_they_are_known():
    """The host must not look at what the other device has not written yet."""
    indptr = torch.tensor([[0, 2, 3]], dtype=torch.int32, device="cuda:1")  # of a head: other lists are copied from the host
    indices = torch.tensor([0, 1, 1], dtype=torch.int32, device="cuda:1")
    jitgen.BlockSparse.bsr(indptr, indices, (256, 256), (128, 128))  # what the first use of an operation waits for
    torch.cuda.synchronize(1)
    with torch.cuda.device(1):
        torch.cuda._sleep(1 << 29)
    good = jitgen.BlockSparse.bsr(indptr, indices, (256, 256), (128, 128))
    wrong = jitgen.BlockSparse.bsr(indptr, indices + 7, (256, 256), (128, 128))
    assert good._check is not None and good._check._failed is not None  # not known yet
    torch.cuda.synchronize(1)
    good.check()
    with pytest.raises(JitgenError, match="block column outside"):
        wrong.check()


# ---- processes of their own -----------------------------------------------------------------------------------------------


@two
def test_no_context_is_made_on_a_device_that_has_no_tensors():
    """A context takes half a gigabyte of each GPU: a rank must not make one on every other rank's."""
    run_alone("""\
        for name, make in CASES.items():
            case = make("cuda:1", 0)
            case()
            case()
            assert not torch._C._cuda_hasPrimaryContext(0), name
        assert torch.cuda.current_device() == 0
    """)


@two
def test_a_thread_whose_context_is_not_that_of_its_device():
    """torch says that device 0 is current again, but has put off to tell the driver, as there is no context on it."""
    run_alone("""\
        import threading

        with torch.cuda.device(1):
            torch.zeros(1, device="cuda")
        assert torch.cuda.current_device() == 0 and not torch._C._cuda_hasPrimaryContext(0)
        given = []

        def make():
            given.append(torch.zeros(4, 2, 16, 2, 64, device="cuda:0"))
            given.extend(torch.ones(3, 2, 64, device="cuda:0") for _ in range(2))
            given.append(torch.arange(3, device="cuda:0"))
            torch.cuda.synchronize(0)

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        cache, k, v, slots = given
        jitgen.append(cache, k, v, slot_mapping=slots)
        torch.cuda.synchronize(0)
        assert float(cache.sum()) == 2 * 3 * 2 * 64 and torch.cuda.current_device() == 0
    """)


@two
@pytest.mark.parametrize("name", ["dense", "plain decode", "merge"])
def test_the_first_call_on_a_device_may_be_captured(name):
    """The modules are loaded for another device already, and for this one inside of the capture."""
    run_alone(f"""\
        CASES[{name!r}]("cuda:0", 0)()
        case, graph = CASES[{name!r}]("cuda:1", 1), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(1)):
            results = case.run()
        with torch.cuda.device(1):
            graph.replay()
            torch.cuda.synchronize()
        case.check(results)
    """)


def test_a_forked_process_is_told_that_it_cannot_use_the_device():
    """By torch, also where a call allocates nothing."""
    run_alone("""\
        import os
        import sys

        cache, k = torch.zeros(4, 2, 16, 2, 64, device="cuda"), torch.ones(3, 2, 64, device="cuda")
        slots = torch.arange(3, device="cuda")
        jitgen.append(cache, k, k, slot_mapping=slots)
        torch.cuda.synchronize()
        child = os.fork()
        if child == 0:
            try:
                jitgen.append(cache, k, k, slot_mapping=slots)
            except RuntimeError as error:
                os._exit(0 if "forked" in str(error) else 1)
            os._exit(2)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)


def test_code_for_another_architecture_is_named():
    """As where JITGEN_CUDA_ARCH is set, and GPUs differ."""
    run_alone("""\
        import os

        arch = "8.0" if torch.cuda.get_device_capability()[0] == 12 else "12.0"
        os.environ["JITGEN_CUDA_ARCH"] = arch
        q = torch.zeros(1, 2, 16, 64, dtype=torch.float16, device="cuda")
        try:
            jitgen.attention(q, q, q)
        except jitgen.errors.LaunchError as error:
            assert f"compiled for {arch}" in str(error) and "JITGEN_CUDA_ARCH" in str(error), error
        else:
            raise SystemExit("it ran")
    """)


# ---- torch.compile, errors ------------------------------------------------------------------------------------------------


@two
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own, where it imports inductor
def test_compiled_calls_run_on_a_device_that_is_not_current():
    torch._dynamo.reset()
    slopes = torch.rand(8, device="cuda:1")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(q, k, v):
        return jitgen.attention(q * 2, k, v, score_mod=lambda score, b, h, q_idx, kv_idx: score + slopes[h] * kv_idx)

    q, k, v = (torch.randn(1, 8, 100, 64, device="cuda:1").bfloat16() for _ in range(3))
    want = jitgen.reference.attention(q * 2, k, v, score_mod=lambda score, b, h, q_idx, kv_idx: score + slopes[h] * kv_idx)
    for _ in range(2):
        assert ((attend(q, k, v).double() - want).norm() / want.norm()).item() <= 0.5 * torch.finfo(q.dtype).eps
        assert torch.cuda.current_device() == 0
    torch._dynamo.reset()


@two
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_a_compiled_layer_of_a_plan_runs_on_a_device_that_is_not_current():
    torch._dynamo.reset()
    batch = Batch([(1, 40), (2, 33)], 8, 2, 64, dtype=torch.bfloat16, device="cuda:1")
    plan = batch.plan(max_q_len=2, page_size=16)
    k, v, lists = batch.pages(16)
    new_k, new_v = (torch.cat([rows[b][n - m :] for b, (m, n) in enumerate(batch.lengths)]) for rows in (batch.k, batch.v))
    table, q_indptr, kv_len = batch.block_table(lists), batch.q_indptr(), batch.kv_len()
    for b, (m, n) in enumerate(batch.lengths):  # the new keys are not in the cache yet
        for i in range(n - m, n):
            k[lists[b][i // 16], i % 16] = v[lists[b][i // 16], i % 16] = torch.nan

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(q):
        jitgen.append((k, v), new_k, new_v, table, q_indptr=q_indptr, kv_len=kv_len)
        return jitgen.paged_attention(q, (k, v), table, plan)

    want = batch.expected()[0]
    with torch.no_grad():
        out = layer(batch.q)
    assert ((out.double() - want).norm() / want.norm()).item() <= 0.5 * torch.finfo(out.dtype).eps
    assert torch.cuda.current_device() == 0
    torch._dynamo.reset()


@two
def test_an_error_leaves_the_current_device_as_it_was():
    def fail():
        assert torch.cuda.current_device() == 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        call_on(1, fail)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("there", ["cpu", pytest.param("cuda:0", marks=two)])
@pytest.mark.parametrize("name", APART)
def test_tensors_that_lie_apart_are_refused(name, there):
    here = "cuda:0" if there == "cpu" else "cuda:1"
    with pytest.raises(JitgenError) as raised:
        APART[name](Apart(here, there))
    assert here in str(raised.value) and there in str(raised.value)
    assert torch.cuda.current_device() == 0


@two
def test_a_plan_is_made_on_the_current_device_or_the_one_named():
    def make(**options):
        return jitgen.Plan(2, 2, 8, 2, 64, dtype=torch.bfloat16, max_q_len=1, **options).device

    with torch.cuda.device(1):
        assert make() == make(device="cuda") == torch.device("cuda:1")
    assert make() == torch.device("cuda:0")
    with pytest.raises(JitgenError, match=f"torch finds {COUNT} GPUs here"):
        make(device=f"cuda:{COUNT}")


def test_a_call_in_a_new_thread_finds_a_context():
    case = dense("cuda:0", 0)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(case).result()
