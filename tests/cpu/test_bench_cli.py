"""The command: what its arguments choose, what it says of wrong ones, and one small cell measured for real."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest
from bench_fakes import CELL, config

from jitgen.bench import SUITES, cli, cpu, dense, jit, variants
from jitgen.bench.check import Checker
from jitgen.bench.config import BenchConfig
from jitgen.bench.peers import RAGGED, Unsupported, contenders
from jitgen.bench.workloads import ProblemSet, same_area

CUDA_PEERS = ("sdpa-flash", "sdpa-cudnn", "fa3", "fa4", "flashinfer", "flex")

SUITE_NAMES = "jit, cpu, dense, short, fp8, decode, prefill, mla, cascade, sparse, cache, sampling, deploy, variants"


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ((), True),
        (("hd64",), True),
        (("hd64", "causal"), True),
        (("causal", "fp32"), True),
        (("hd128",), False),
        (("hd64", "full"), False),
        (("4x1024 causal",), True),
    ],
    ids=str,
)
def test_filter_keeps_a_cell_that_holds_every_text(filters, kept):
    assert config(filters=filters).keeps("fp32 hd64 8/8 4x1024 causal") is kept


def test_words_of_one_filter_and_of_several_count_alike(capsys):
    assert cli.main(["cpu", "--list", "--filter", "hd64 bf16 softcap"]) == 0
    together = capsys.readouterr().out
    assert cli.main(["cpu", "--list", "--filter", "hd64", "--filter", "bf16", "--filter", "softcap"]) == 0
    assert capsys.readouterr().out == together
    assert together.splitlines()[1:] == ["  bf16 hd64 8/8 1x4096 softcap"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], f"no suite given. Name one or more of {SUITE_NAMES}."),
        (["speed"], f"'speed' is not a suite. Use {SUITE_NAMES}."),
        (["cpu", "--filter", "hd99"], r"--filter 'hd99' keeps no cell of cpu. Labels look like 'fp32 hd64 "),
        (["cpu", "--peers", "fa9"], "--peers: 'fa9' is not a peer. Use sdpa-flash, "),
        (["dense", "--device", "cpu", "--families", "sm90"], "--families: 'sm90' is not one for cpu. Use auto, cpu."),
        (["dense", "--device", "cpu", "--graph"], "--graph times CUDA graphs, and the device is cpu."),
        (["cpu", "--json", "/no/such/place/x.json"], "there is no directory /no/such/place. Create it first."),
        (["cpu", "--rounds", "0"], "argument --rounds: '0' is not a count of at least 1"),
        (["cpu", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_wrong_arguments_get_one_message_and_exit_code_2(arguments, message, capsys):
    assert cli.main(arguments) == 2
    written = capsys.readouterr()
    assert message in written.err
    assert written.out == ""


@pytest.mark.parametrize(
    "suite, name",
    [
        ("decode", "flashinfer-persistent"), ("sampling", "torch"), ("cache", "copy"), ("sparse", "flashinfer-fa3"),
        ("short", "sdpa"), ("mla", "flashinfer-fa2"), ("prefill", "fa3"),
    ],
)  # fmt: skip
def test_peers_of_a_suite_of_its_own_may_be_named(suite, name, capsys):
    assert cli.main([suite, "--device", "cpu", "--list", "--peers", name]) == 0
    assert cli.main(["cpu", "--list", "--peers", "flashinfer-persistent"]) == 2
    capsys.readouterr()


def test_absent_device_gets_a_message_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["dense", "--device", "cuda"]) == 2
    assert "device cuda is not usable: " in capsys.readouterr().err


def test_help_lists_the_suites_and_does_not_import_torch():
    program = "import sys; from jitgen.bench.cli import main; sys.exit(main(['--help']) or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"^  {name} ", done.stdout, re.MULTILINE) for name in SUITES)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", [cpu, dense, variants, jit], ids=lambda module: module.__name__.rpartition(".")[2])
def test_quick_labels_are_few_and_unique(suite, device):
    full, quick = (suite.labels(BenchConfig(device, quick=quick)) for quick in (False, True))
    assert 0 < len(quick) < len(full)
    assert len(set(full)) == len(full)


def test_dense_on_cuda_has_the_cells_of_the_published_charts():
    cells = dense.cells(BenchConfig("cuda"))
    assert len(cells) == 24
    assert all(cell.batch * cell.length == 16384 for cell in cells)
    assert {(cell.head_dim * cell.num_q_heads) for cell in cells if cell.num_q_heads == cell.num_kv_heads} == {2048}


def test_plain_cells_come_with_the_variants_of_each_shape():
    chosen = [cell for cell in variants.cells(BenchConfig("cuda")) if cell.variant == "alibi"]
    found = variants.with_plain(chosen, "cpu")
    assert [cell.variant_label for cell in found[:4]] == ["causal", "full", "full 2048", "alibi"]
    assert [cell.variant_label for cell in found[4:]] == ["causal", "full", "full 8192", "alibi"]


@pytest.mark.parametrize(("variant", "keys"), [("full", 1024), ("causal", 512), ("document", 256)])
def test_plain_kernel_of_the_same_area_has_as_many_keys_as_the_variant_visits(variant, keys):
    cell = dataclasses.replace(CELL, length=1024, variant=variant)
    problems = ProblemSet("cpu")
    plain, own = problems.problem(same_area(cell, "cpu")), problems.problem(cell)
    assert plain.k.shape[2] == plain.v.shape[2] == keys
    assert plain.cell.shape == own.cell.shape
    assert plain.block_pairs == 1024 * keys
    assert abs(plain.block_pairs - own.block_pairs) <= 1024 * 64


def test_documents_as_requests_of_their_own_give_what_the_mask_over_them_gives():
    cell = dataclasses.replace(CELL, batch=2, length=200, variant="document")
    problem = ProblemSet("cpu").problem(cell)
    _, reason = Checker(problem).check("ragged", RAGGED.prepare(problem)())
    assert reason == ""
    with pytest.raises(Unsupported, match="documents only"):
        RAGGED.prepare(ProblemSet("cpu").problem(CELL))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["jitgen", "sdpa-flash", "sdpa-cudnn", "fa3", "fa4", "flashinfer", "flex"]),
        (
            {"families": ("auto", "sm80")},
            ["jitgen", "jitgen-sm80", "sdpa-flash", "sdpa-cudnn", "fa3", "fa4", "flashinfer", "flex"],
        ),
        ({"peers": ("flex",), "families": ("sm90",)}, ["jitgen-sm90", "flex"]),
        ({"peers": ("none",)}, ["jitgen"]),
        ({"quick": True}, ["jitgen", *(name for name in CUDA_PEERS if name != "flashinfer")]),
    ],
    ids=str,
)
def test_contenders_are_those_asked_for(options, expected):
    chosen, notes = contenders(BenchConfig("cuda", **options))
    assert [peer.name for peer in chosen] == expected
    assert (len(notes) == 1) == bool(options.get("quick"))


def test_one_cell_on_the_cpu_end_to_end(tmp_path, capsys):
    path = tmp_path / "bench.json"
    arguments = ["cpu", "--quick", "--peers", "sdpa", "--rounds", "2", "--filter", "fp32 causal", "--json", str(path)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    suite = json.loads(path.read_text())["suites"][0]
    assert [found["contender"] for found in suite["results"]] == ["jitgen", "sdpa"]
    assert all(found["status"] == "timed" and found["ms"]["samples"] == 2 for found in suite["results"])
    assert all(found["error"]["relative"] < 1e-3 and found["tflops"] > 0 for found in suite["results"])
    assert suite["summary"]["jitgen"]["speed_up_over"]["sdpa"]["cells"].keys() == {"fp32 hd64 8/8 1x1024 causal"}
    assert re.search(r"^cpu: GFLOP/s$", printed, re.MULTILINE)
    assert printed.rstrip().splitlines()[-1].startswith("best of the cell")
