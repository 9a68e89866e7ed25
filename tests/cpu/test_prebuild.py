"""Prebuilding: which kernels a manifest stands for, building them in processes, and running frozen from them."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import jitgen
from jitgen import prebuild, prebuild_units, runtime, toolchain
from jitgen.__main__ import main
from jitgen.cache.layer import STAMP
from jitgen.cache.store import Store
from jitgen.errors import CacheError, JitgenError, KernelNotPrebuilt, ManifestError
from jitgen.families import serving_spec
from jitgen.manifest import parse_manifest
from jitgen.portable import unpack
from jitgen.target import target_of
from jitgen.tiles_sm90 import sm90_tiles

needs_compiler = pytest.mark.skipif(toolchain.find_cxx() is None, reason="no C++ compiler on this machine")

USER_CODE = """
import torch, jitgen
slopes, cap = torch.zeros(4), 30.0
def bias(score, b, h, q_idx, kv_idx):
    return score + slopes[h] * (kv_idx - q_idx)
def refused(score, b, h, q_idx, kv_idx):
    return score.item()
class Capped:
    def score_mod(self, score, b, h, q_idx, kv_idx):
        return cap * torch.tanh(score / cap)
class Ordered(jitgen.OnlineNorm):
    state = {"total": 0.0}
    def update(self, score, state):
        return score, 1.0, {"total": state["total"] + jitgen.row_sum(score)}
"""


@pytest.fixture(autouse=True)
def store(private_store: Path) -> Path:
    return private_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "user_variants.py").write_text(USER_CODE)
    return tmp_path


def specs(folder: Path, text: str, archs: list[str] | None = None) -> list:
    """Specs of all units of a manifest in ``folder``."""
    units = prebuild.plan([parse_manifest(text, folder / "m.toml")], archs=archs)
    return [unpack(unit.request)[1][0] for unit in units]


def kernel(variant: str = "causal", **options: object) -> str:
    given = {"variant": variant, "dtype": "bfloat16", "head_dim": 64, **options}
    return "[[kernel]]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in given.items())


# ---- what a manifest stands for -------------------------------------------------------------------------------------------


def test_lists_are_multiplied_out(folder: Path) -> None:
    found = specs(folder, kernel(dtype=["bfloat16", "float16"], head_dim=[64, 128], arch=["8.0", "portable"]))
    assert len(found) == 3 * 2 * 2
    assert {(s.family, s.dtype, s.head_dim) for s in found} == {
        (family, dtype, dim) for family in ("sm80", "decode", "cpu") for dtype in ("bfloat16", "float16") for dim in (64, 128)
    }


def test_calls_of_few_rows_get_the_kernel_that_cuts_their_keys(folder: Path) -> None:
    def families(variant: str = "causal", **options) -> set[str]:
        return {f"{s.family} {s.layout}" for s in specs(folder, kernel(variant, arch="9.0", **options))}

    both = {"sm90 dense", "decode paged"}
    assert families() == families(q_len=[1, 4096]) == both
    assert families(q_len=4096) == families(family="sm90") == {"sm90 dense"}
    assert families("user_variants.py:Ordered") == {"sm90 dense"}  # whose parts cannot be joined
    assert [s.tiles.tile_q for s in specs(folder, kernel(arch="9.0", q_len=1, rows=16)) if s.family == "decode"] == [16]


def test_hopper_gets_the_tiles_of_all_lengths_and_its_own_instructions(folder: Path) -> None:
    for arch in ("9.0", "9.0a"):
        found = [s for s in specs(folder, kernel("plain", head_dim=64, arch=arch)) if s.family != "decode"]
        assert {(s.family, s.target.arch) for s in found} == {("sm90", "9.0a")}
        lengths = {sm90_tiles(64, 64, found[0].program, q_len=q_len) for q_len in (1, 100, 1500, 3000, 5000, 1 << 20)}
        assert {s.tiles for s in found} == lengths and len(found) == len(lengths) >= 2
    assert [s.target.arch for s in specs(folder, kernel(arch="9.0a", family="sm80"))] == ["9.0"]


def test_serving_layout_gets_the_kernels_of_a_plan(folder: Path) -> None:
    found = specs(folder, kernel(layout="paged", head_dim=128, arch="9.0"))
    assert {(s.family, s.layout) for s in found} == {("decode", "paged"), ("sm90", "paged")}


def test_pages_without_boxes_have_a_prefill_kernel_of_their_own(folder):
    found = specs(folder, kernel(layout="paged", head_dim=128, arch="9.0", page_size=[1, 16]))
    assert {(s.family, s.copies) for s in found} == {("decode", True), ("sm90", True), ("sm90", False)}
    assert {s.copies for s in specs(folder, kernel(layout="paged", head_dim=128, arch="9.0"))} == {True}
    assert [s.family for s in specs(folder, kernel(layout="ragged", arch="portable"))] == ["cpu"]


def test_latent_attention_gets_the_kernel_of_each_architecture(folder: Path) -> None:
    latent = {"layout": "paged", "head_dim": 576, "head_dim_v": 512}
    found = specs(folder, kernel(**latent, arch=["8.0", "8.9", "9.0"]))
    tiles = {(s.family, s.target.arch, s.tiles.tile_q, s.tiles.tile_kv) for s in found}
    hopper = {("mla", "9.0a", 64, 64), ("mla_decode", "9.0a", 16, 64)}
    assert tiles == {("sm80_mla", "8.0", 64, 32), ("sm80_mla", "8.9", 64, 16), *hopper}
    assert {s.tiles.tile_q for s in specs(folder, kernel(**latent, arch="9.0", rows=[8, 12, 32, 33]))} == {8, 16, 32, 64}
    text = "\n".join(map(recorded, (s for s in found if s.target.arch == "9.0a")))
    assert {(s.family, s.target.arch) for s in specs(folder, text, ["8.0"])} == {("sm80_mla", "8.0")}
    assert {(s.family, s.target.arch, s.tiles.tile_q, s.tiles.tile_kv) for s in specs(folder, text, ["9.0"])} == hopper
    with pytest.raises(ManifestError, match="up to 512, or"):
        specs(folder, kernel(head_dim=576, head_dim_v=512, arch="8.0"))


def test_odd_head_dim_is_padded_as_a_call_pads_it(folder: Path) -> None:
    assert {(s.head_dim, s.head_dim_v) for s in specs(folder, kernel(head_dim=80, arch="8.0"))} == {(96, 96)}
    assert [s.head_dim for s in specs(folder, kernel(head_dim=80, arch="avx2"))] == [80]


def test_kernel_without_target_takes_those_of_the_command(folder: Path) -> None:
    assert {s.target.arch for s in specs(folder, kernel(), ["8.0", "8.9"])} == {"8.0", "8.9"}
    with pytest.raises(ManifestError, match="no target: write arch"):
        specs(folder, kernel())


def test_gpus_without_kernels_are_refused_before_anything_is_compiled(folder: Path) -> None:
    with pytest.raises(JitgenError, match=r"no kernels for compute capability 7\.5: they need at least 8\.0"):
        specs(folder, kernel(arch="7.5"))


@pytest.mark.parametrize("variant", ["user_variants:bias", "user_variants.py:bias", "user_variants:Capped"])
def test_variant_of_a_user_is_found_beside_the_manifest(variant: str, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "user_variants", raising=False)
    (spec,) = specs(folder, kernel(variant, arch="portable"))
    (slot,) = spec.program.slots
    assert slot.name == ("cap" if "Capped" in variant else "slopes")


def test_declared_captures_replace_what_the_module_holds(folder: Path) -> None:
    text = kernel("user_variants.py:bias", arch="portable")
    (held,) = specs(folder, text)
    (half,) = specs(folder, text + 'captures = { slopes = { dtype = "float16", rank = 1 } }\n')
    assert (held.program.slots[0].dtype, half.program.slots[0].dtype) == ("float32", "float16")
    with pytest.raises(ManifestError, match="bind got 'nothing', which no hook captures"):
        specs(folder, text + "captures = { nothing = 1 }\n")


def test_built_in_variant_is_the_one_a_user_writes(folder: Path) -> None:
    window = 7
    mine = jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < window))
    (spec,) = specs(folder, kernel("causal_window", arch="portable"))
    assert spec.program.id == mine.trace().program.id


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "nothing"}, "neither module:name nor one of plain, causal"),
        ({"variant": "user_variants.py:none"}, "has no 'none'"),
        ({"variant": "user_variants.py:refused"}, "user_variants.py:7"),
        ({"variant": "no_such_module:x"}, "there is no module 'no_such_module'"),
        ({"dtype": "float8"}, "kernels for portable take float32"),
        ({"head_dim": 100}, "multiples of 8 up to 512"),
        ({"head_dim": "64"}, "expected a positive number or a list"),
        ({"head_dim": []}, "expected a positive number or a list"),
        ({"page_size": 0}, "page_size = 0: expected a positive number or a list"),
        ({"family": "sm70"}, "expected one of cpu, sm80"),
        ({"family": "sm80"}, "needs a CUDA architecture"),
        ({"layout": "blocked"}, "expected one of dense"),
        ({"arch": "z80"}, "'z80' is no architecture"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_value_is_refused_with_its_place(options: dict, message: str, folder: Path) -> None:
    text = kernel() + kernel(**{"arch": "portable", **options})
    with pytest.raises(ManifestError, match=rf"m.toml: \[\[kernel\]\] 2: (.|\n)*{message}"):
        specs(folder, text, ["portable"])


def test_shards_are_all_units_once(folder: Path) -> None:
    manifest = parse_manifest(kernel(dtype=["bfloat16", "float16"], head_dim=[64, 96, 128], arch=["8.0", "9.0"]), folder / "m")
    whole = [unit.key for unit in prebuild.plan([manifest])]
    for count in (1, 3, 4, 50):
        parts = [[unit.key for unit in prebuild.plan([manifest], shard=(i, count))] for i in range(1, count + 1)]
        assert sorted(key for part in parts for key in part) == sorted(whole) and len(set(whole)) == len(whole)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ManifestError, match="shard 3/2"):
        prebuild.plan([manifest], shard=(3, 2))


# ---- recordings -----------------------------------------------------------------------------------------------------------


def recorded(spec) -> str:
    from jitgen.recording import manifest_text

    return manifest_text((runtime.module_path, spec), spec.label, spec.target.arch)


def test_recording_is_built_for_where_it_was_made_or_for_other_targets_of_its_kind(folder: Path) -> None:
    hopper = specs(folder, kernel("plain", head_dim=64, arch="9.0"))
    (cpu,) = specs(folder, kernel(arch="avx2"))
    text = "\n".join(map(recorded, (*hopper, cpu)))
    assert {s.digest for s in specs(folder, text)} == {cpu.digest, *(spec.digest for spec in hopper)}
    assert sorted((s.family, s.target.arch) for s in specs(folder, text, ["8.0"])) == [("decode", "8.0"), ("sm80", "8.0")]
    moved = specs(folder, text, ["9.0", "portable"])
    assert {(s.family, s.target.arch) for s in moved} == {
        ("sm90", "9.0a"), ("decode", "9.0a"), ("cpu", os.uname().machine)
    }  # fmt: skip
    assert {s.digest for s in moved if s.family != "cpu"} == {spec.digest for spec in hopper}
    (ampere,) = specs(folder, kernel("plain", arch="8.0", family="sm80"))
    assert {s.digest for s in specs(folder, recorded(ampere), ["9.0"])} < {spec.digest for spec in hopper}


@pytest.mark.parametrize("head_dim", [128, 512])
@pytest.mark.parametrize("arch", ["8.0", "8.6"])
def test_kernels_of_a_plan_follow_their_target(arch: str, head_dim: int, monkeypatch) -> None:
    def specs(arch: str) -> list[object]:
        monkeypatch.setenv("JITGEN_CUDA_ARCH", arch)
        program, device = jitgen.Variant().trace().program, torch.device("cuda", 0)
        dims = (head_dim, head_dim)
        return [serving_spec(program, "bfloat16", dims, device, "paged", family=family) for family in ("decode", None)]

    recorded = specs("9.0")
    assert [prebuild_units._retargeted(spec, target_of(arch)) for spec in recorded] == specs(arch)
    assert all(prebuild_units._retargeted(spec, target_of("9.0")) is spec for spec in recorded)


def test_serving_and_sampling_kernels_are_recorded_like_any(folder: Path) -> None:
    from jitgen import sampling_launch
    from jitgen.recording import manifest_text
    from jitgen.sampling_spec import SamplingSpec
    from jitgen.target import cuda_target

    (paged,) = [s for s in specs(folder, kernel(layout="paged", head_dim=128, arch="9.0")) if s.family == "decode"]
    sampling = SamplingSpec(op="sample", dtype="float32", target=cuda_target("9.0"), has_top_k=True)
    text = recorded(paged) + manifest_text((sampling_launch.module_path, sampling), sampling.label, "9.0")
    found = {type(s): s for s in specs(folder, text)}
    assert {s.digest for s in found.values()} == {paged.digest, sampling.digest}
    moved = {type(s): s.target.arch for s in specs(folder, text, ["10.0"])}
    assert moved == {type(paged): "10.0a", type(sampling): "10.0"}


CALLS = """
import sys, torch, jitgen
cap, window = 5.0, 9
def score_mod(score, b, h, q_idx, kv_idx):
    return cap * torch.tanh(score / cap)
def mask_mod(b, h, q_idx, kv_idx):
    return (kv_idx <= q_idx) & (q_idx - kv_idx < window)
torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 33, 16) for _ in range(3))
for variant in ({"score_mod": score_mod}, {"mask_mod": mask_mod})[: int(sys.argv[1])]:
    print(jitgen.attention(q, k, v, **variant).double().sum().item())
"""


def call(count: int, **variables: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    return subprocess.run([sys.executable, "-c", CALLS, str(count)], env=environment, capture_output=True, text=True)


@needs_compiler
def test_recorded_run_is_prebuilt_and_runs_frozen(tmp_path: Path, store: Path, monkeypatch, capsys) -> None:
    """The whole way: record, prebuild without the user's code, ship, run without a compiler and without a user store."""
    recording = tmp_path / "recorded.toml"
    first = call(1, JITGEN_RECORD=recording, JITGEN_CPU_ISA="portable")
    assert first.returncode == 0, first.stderr
    before = recording.read_text()
    assert call(1, JITGEN_RECORD=recording, JITGEN_CPU_ISA="portable").returncode == 0
    assert recording.read_text() == before and before.count("[[request]]") == 1  # what is there is not added again

    layer = tmp_path / "layer"
    assert main(["prebuild", str(recording), "--out", str(layer), "--json"]) == 0
    (built,) = json.loads(capsys.readouterr().out)["kernels"]
    assert built["outcome"] == "built" and built["size"] > 1000
    frozen = {"JITGEN_MODE": "frozen", "JITGEN_PREBUILT": layer, "JITGEN_CACHE_DIR": tmp_path / "none", "PATH": "/nowhere"}
    again = call(1, **frozen)  # this machine has more instructions than 'portable', for which it was built
    assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr
    assert Store(tmp_path / "none").names() == []

    missing = call(2, **frozen)
    assert missing.returncode == 1 and "KernelNotPrebuilt" in missing.stderr
    pasted = missing.stderr[missing.stderr.index("[[request]]") :]
    recording.write_text(before + "\n" + pasted)
    assert main(["prebuild", str(recording), "--out", str(layer), "--arch", "portable"]) == 0
    assert "2 kernels" in (table := capsys.readouterr().out) and "1 built, 1 hit" in table
    assert call(2, **frozen).returncode == 0


def test_frozen_error_carries_the_line_to_add(monkeypatch) -> None:
    monkeypatch.setenv("JITGEN_MODE", "frozen")
    q = torch.zeros(1, 1, 4, 16)
    with pytest.raises(KernelNotPrebuilt) as caught:
        jitgen.attention(q, q, q, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx)
    assert str(caught.value).endswith(caught.value.manifest)
    (request,) = parse_manifest(caught.value.manifest, Path("m.toml")).requests
    assert unpack(request)[1][0].head_dim == 16
    assert "# mask = (kv_idx <= q_idx)" in caught.value.manifest


def test_layer_of_another_jitgen_is_named_as_such(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "layer").mkdir()
    (tmp_path / "layer" / STAMP).write_text(json.dumps({"format": 1, "jitgen": "0.0.9", "generator": "x"}))
    monkeypatch.setenv("JITGEN_MODE", "frozen")
    monkeypatch.setenv("JITGEN_PREBUILT", f"{tmp_path / 'layer'}{os.pathsep}{tmp_path / 'gone'}")
    q = torch.zeros(1, 1, 4, 16)
    with pytest.raises(KernelNotPrebuilt, match=r"by another jitgen \(version 0.0.9\).*gone does not exist"):
        jitgen.attention(q, q, q)
    with pytest.raises(CacheError, match="holds kernels of another jitgen"):
        prebuild.build([parse_manifest(kernel(arch="portable"), tmp_path / "m")], tmp_path / "layer")


# ---- building ---------------------------------------------------------------------------------------------------------------


@needs_compiler
def test_kernel_that_fails_stops_no_other_and_is_reported(folder: Path, monkeypatch, capsys) -> None:
    """A compiler that refuses one head dim: the other is built, the exit status says that something failed."""
    compiler = folder / "cxx"
    real = toolchain.require_cxx().path
    refuse = 'if grep -qs "kHeadDim = 24" ../kernel.cpp; then echo "kernel.cpp:1: error: no" >&2; exit 1; fi'
    compiler.write_text(f'#!/bin/sh\n{refuse}\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("JITGEN_CXX", str(compiler))
    (folder / "m.toml").write_text(kernel("plain", head_dim=[16, 24], dtype="float32", arch="portable"))
    assert main(["prebuild", str(folder / "m.toml"), "--out", str(folder / "layer"), "--jobs", "2"]) == 1
    output = capsys.readouterr()
    assert "1 built, 1 failed" in output.out
    assert "hd24 for x86_64: compiling" in output.err and "error: no" in output.err
    modes = {path: stat.S_IMODE(os.stat(folder / "layer" / path).st_mode) for path in (".", "index", STAMP)}
    assert modes == {".": 0o755, "index": 0o755, STAMP: 0o644}  # for other users to read


def test_worker_that_dies_takes_one_kernel_with_it(folder: Path, monkeypatch) -> None:
    """A worker is killed at its first request; a new one takes the rest."""
    program = folder / "python"
    (folder / "worker.py").write_text(
        "import json, sys\nfor line in sys.stdin:\n    print(json.dumps({'outcome': 'hit', 'seconds': 0}), flush=True)\n"
    )
    die = f"if mkdir {folder}/first 2>/dev/null; then kill -9 $$; fi"
    program.write_text(f"#!/bin/sh\n{die}\nexec {sys.executable} {folder}/worker.py\n")
    program.chmod(0o755)
    monkeypatch.setattr(prebuild.sys, "executable", str(program))
    manifest = parse_manifest(kernel(head_dim=[64, 96, 128], arch="portable"), folder / "m")
    seen: list[tuple[int, int]] = []
    report = prebuild.build([manifest], folder / "layer", jobs=1, on_done=lambda built, done, total: seen.append((done, total)))
    assert sorted(result.outcome for result in report.results) == ["failed", "hit", "hit"]
    assert report.failed[0].error == "the building process was killed by signal 9. Memory may be short: try fewer --jobs."
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_interrupt_ends_all_processes_quietly(folder: Path, monkeypatch) -> None:
    """Ctrl-C, which a terminal sends to the command, its workers and their compilers."""
    compiler, begun = folder / "g++", folder / "begun"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *version*) echo "g++ (GCC) 12.1.0";; *) touch {begun}; sleep 60;; esac\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("JITGEN_CXX", str(compiler))
    (folder / "m.toml").write_text(kernel("plain", head_dim=[16, 24, 32], dtype="float32", arch="portable"))
    options = (str(folder / "m.toml"), "--out", str(folder / "layer"), "--jobs", "2")
    command = [sys.executable, "-m", "jitgen", "prebuild", *options]
    pipe = subprocess.PIPE
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    try:
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        wait_for(begun.exists, process)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")
    assert not list((folder / "layer" / "tmp").iterdir())


def wait_for(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not is_so() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)


def test_list_builds_nothing(folder: Path, capsys) -> None:
    (folder / "m.toml").write_text(kernel(head_dim=[64, 128], arch="8.0"))
    assert main(["prebuild", str(folder / "m.toml"), "--list"]) == 0
    assert "causal: attention sm80 bfloat16 hd64" in (text := capsys.readouterr().out) and "4 kernels" in text
    assert main(["prebuild", str(folder / "m.toml"), "--list", "--json", "--shard", "1/2"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_progress_bar_is_one_line_that_vanishes(monkeypatch, capsys) -> None:
    from jitgen.progress import Bar

    monkeypatch.setenv("JITGEN_PROGRESS", "on")
    monkeypatch.setenv("COLUMNS", "60")
    with Bar("prebuilding") as bar:
        for done in range(1, 5):
            bar.show(done, 4, "a kernel with a name that is longer than the terminal is wide")
    shown = capsys.readouterr().err
    assert "\n" not in shown and shown.endswith("\r\x1b[2K")
    lines = shown.split("\r\x1b[2K")
    assert max(map(len, lines)) < 60 and "[############............] 2/4" in lines[3]
