"""What can be observed: one event and one log line per build, load and wait; counts that survive the process."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from fake_builder import FakeBuilder, FakeSource, request

import jitgen
from jitgen import cache
from jitgen.__main__ import main
from jitgen.cache import admin, lookup, usage
from jitgen.errors import CompileError
from jitgen.events import Event, on_event


@pytest.fixture
def events(private_store: Path):
    """Events of the test, as they come."""
    found: list[Event] = []
    remove = on_event(found.append)
    yield found
    remove()


def test_build_and_load_are_one_event_each(events: list[Event]) -> None:
    module = cache.get_module(request(), FakeBuilder())
    lookup.forget()
    cache.get_module(request(), FakeBuilder())
    assert [(event.kind, event.source) for event in events] == [("build", ""), ("load", "built"), ("load", "store")]
    assert {(event.entry, event.label, event.arch, event.size) for event in events} == {
        (module.parent.name, "fake kernel", "x86_64", module.stat().st_size)
    }
    assert all(event.seconds >= 0 for event in events)


def test_failed_build_is_an_event(events: list[Event]) -> None:
    def fail(directory: Path) -> None:
        raise CompileError("fake kernel")

    with pytest.raises(CompileError):
        cache.get_module(request(), FakeBuilder(fail))
    assert [event.kind for event in events] == ["fail"]


def test_kernel_of_a_layer_says_so(events: list[Event], private_store: Path, tmp_path: Path, monkeypatch) -> None:
    cache.get_module(request(), FakeBuilder())
    monkeypatch.setenv("JITGEN_PREBUILT", str(private_store))
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path / "none"))
    cache.get_module(request(), FakeBuilder())
    assert events[-1].source == "layer"


def test_listener_that_fails_breaks_nothing(events: list[Event], caplog) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("no connection")

    remove = jitgen.on_event(broken)
    with caplog.at_level(logging.WARNING, "jitgen"):
        assert cache.get_module(request(), FakeBuilder()).is_file()
    remove()
    assert "RuntimeError: no connection" in caplog.text
    assert len(events) == 2


def test_removed_listener_hears_nothing(events: list[Event]) -> None:
    heard: list[Event] = []
    jitgen.on_event(heard.append)()
    cache.get_module(request(), FakeBuilder())
    assert heard == []


def test_log_has_one_line_of_pairs_for_each_event(events: list[Event], caplog) -> None:
    with caplog.at_level(logging.INFO, "jitgen"):
        module = cache.get_module(request(), FakeBuilder())
    assert [record.getMessage() for record in caplog.records] == [str(event) for event in events]
    name, size = module.parent.name, module.stat().st_size
    assert str(events[1]).startswith(f"load entry={name} kernel='fake kernel' arch=x86_64 source=built seconds=0.")
    assert str(events[1]).endswith(f" bytes={size}")


# ---- counts -------------------------------------------------------------------------------------------------------------


def test_stats_count_builds_and_loads_and_what_they_saved(private_store: Path, capsys) -> None:
    module = cache.get_module(request(), FakeBuilder())
    for _ in range(3):
        lookup.forget()
        cache.get_module(request(), FakeBuilder())
    (kernel,) = admin.stats(private_store)
    assert (kernel.name, kernel.builds, kernel.loads) == (module.parent.name, 1, 3)
    assert main(["cache", "stats", "--json"]) == 0
    total = json.loads(capsys.readouterr().out)
    assert (total["hits"], total["misses"], total["kernels"]) == (3, 1, 1)
    assert main(["cache", "stats"]) == 0
    assert "3 loads by processes saved" in capsys.readouterr().out


def test_saved_seconds_are_those_of_the_builds(private_store: Path) -> None:
    entry = cache.get_module(request(), FakeBuilder()).parent
    manifest = json.loads((entry / "manifest.json").read_text())
    del manifest["self"]
    manifest["seconds"] = 2.5
    manifest["self"] = cache.digest(manifest)
    (entry / "manifest.json").write_text(json.dumps(manifest))
    for _ in range(2):
        usage.note("load", entry)
    assert admin.stats(private_store)[0].saved_seconds == 5.0


def test_loads_from_a_layer_count_in_the_user_store(private_store: Path, tmp_path: Path, monkeypatch) -> None:
    cache.get_module(request(), FakeBuilder())
    layer = shutil.copytree(private_store, tmp_path / "layer")
    admin.clear(private_store)
    monkeypatch.setenv("JITGEN_PREBUILT", str(layer))
    cache.get_module(request(), FakeBuilder())
    (kernel,) = admin.stats(private_store, [layer])
    assert (kernel.builds, kernel.loads, kernel.label) == (0, 1, "fake kernel")
    assert not (private_store / "tmp").exists()


def test_cut_and_foreign_lines_are_passed_over(private_store: Path) -> None:
    entry = cache.get_module(request(), FakeBuilder()).parent
    with open(private_store / usage.LOG, "ab") as log:
        log.write(b"cpu-1 1 x 2\n\xff\xfe\n\n" + f"{entry.name} 0 0.0".encode())
    assert usage.read(private_store) == {entry.name: usage.Usage(1, usage.read(private_store)[entry.name].build_seconds, 0)}


def test_log_is_summed_up_when_it_is_long(private_store: Path, monkeypatch) -> None:
    entry = cache.get_module(request(), FakeBuilder()).parent
    for _ in range(50):
        usage.note("load", entry)
    monkeypatch.setattr(usage, "COMPACT_ABOVE", 1000)
    cache.get_module(request(FakeSource("int b;\n"), spec="b"), FakeBuilder())
    assert len((private_store / usage.LOG).read_bytes().splitlines()) == 2
    assert usage.read(private_store)[entry.name].loads == 50


def test_log_of_a_service_that_builds_nothing_is_summed_up_too(private_store: Path, monkeypatch) -> None:
    entry = cache.get_module(request(), FakeBuilder()).parent
    monkeypatch.setattr(usage, "COMPACT_ABOVE", 1000)
    for _ in range(500):
        usage.note("load", entry)
    assert (private_store / usage.LOG).stat().st_size < 5000 and usage.read(private_store)[entry.name].loads == 500


def test_a_listener_is_a_function() -> None:
    with pytest.raises(TypeError, match="listener is 'log' of type str, expected a function"):
        on_event("log")
