"""Suite deploy: what it asks of other processes, and how it reports what they found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jitgen.bench import deploy, deploy_variants
from jitgen.bench.config import BenchConfig
from jitgen.bench.deploy import DeploySuite
from jitgen.bench.fresh import ProbeFailed
from jitgen.manifest import read_manifest
from jitgen.prebuild import plan


@pytest.fixture
def suite(tmp_path: Path, monkeypatch) -> DeploySuite:
    """A suite whose processes are played; what they were asked is in ``calls``."""
    calls: list[tuple[str, list[str], dict[str, str]]] = []

    def play(module: str, arguments: list[str], **variables: str) -> str:
        calls.append((module, arguments, variables))
        if module == "jitgen.bench.deploy_probe":
            answer = {"ms": 90.0, "later_ms": 2.0, "kernels": 20} if arguments[0] == "frozen_start" else None
            many = json.loads(arguments[1]).get("num_processes", 1) > 1
            return json.dumps(answer or {"processes": 32, "builds": 1, "last_s": 2.2 if many else 2.0})
        if arguments[0] == "bundle":
            if arguments[4].endswith("zst"):
                raise ProbeFailed("no zstd")
            return json.dumps({"kernels": ["k"] * 100, "size": 5_000_000})
        Path(arguments[3]).mkdir(exist_ok=True)
        return json.dumps({"kernels": [{"size": 40_000}] * len(plan([arguments[1]]))})

    monkeypatch.setattr(deploy, "call_process", play)
    made = DeploySuite(BenchConfig("cpu", say=lambda text: None), tmp_path)
    made.calls = calls  # type: ignore[attr-defined]
    return made


def test_figures_stand_beside_their_bars(suite: DeploySuite) -> None:
    for label in deploy.LABELS:
        suite.measure(label)
    text = suite.report().to_text()
    assert "20 kernels" in text and "90 ms" in text and "<= 150 ms for 20" in text
    assert "bundle of 100 kernels, .tar.xz" in text and "5.0 MB" in text and "zst" not in text
    assert "last one has it / one process alone" in text and "1.10" in text
    assert not suite.faults


def test_manifests_hold_twenty_and_a_hundred_kernels(suite: DeploySuite) -> None:
    suite.measure("prebuild")
    suite.measure("bundle")
    sizes = [len(plan([path])) for path in sorted(suite.scratch.glob("*.toml"))]
    assert sorted(sizes) == [20, 20, 100]
    names = {kernel["variant"].partition(":")[2] for kernel in read_manifest(suite.scratch / "jobs1.toml").kernels}
    assert names == set(deploy_variants.CALLS)


def test_frozen_processes_see_the_layer_and_an_empty_store(suite: DeploySuite) -> None:
    suite.measure("frozen start")
    probes = [variables for module, _, variables in suite.calls if module == "jitgen.bench.deploy_probe"]  # type: ignore[attr-defined]
    assert len(probes) == deploy.REPEATS + 1
    assert probes[0]["JITGEN_MODE"] == "frozen" and probes[0]["JITGEN_PREBUILT"].endswith("jobs2")


def test_failure_is_a_fault_and_stops_nothing(suite: DeploySuite, monkeypatch) -> None:
    def fail(module: str, arguments: list[str], **variables: str) -> str:
        raise ProbeFailed("boom")

    monkeypatch.setattr(deploy, "call_process", fail)
    for label in deploy.LABELS:
        suite.measure(label)
    assert len(suite.faults) >= 3 and suite.report().faults
