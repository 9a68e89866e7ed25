"""Look-up order, sharing of builds, and what happens where the store cannot be used as it is."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from fake_builder import TARGET, FakeBuilder, FakeSource, request

from jitgen.cache import find_module, get_module, lookup
from jitgen.errors import CacheError, CacheWarning, CompileError, KernelNotPrebuilt

pytestmark = pytest.mark.usefixtures("private_store")


def test_second_request_finds_the_first_ones_module() -> None:
    builder = FakeBuilder()
    assert get_module(request(), builder) == get_module(request(), builder)
    assert builder.num_builds == 1


def test_hit_renders_nothing() -> None:
    path = get_module(request(), FakeBuilder())

    def fail() -> FakeSource:
        raise AssertionError("rendered on a hit")

    assert get_module(replace(request(), make_source=fail), FakeBuilder()) == path


def test_other_spec_with_the_same_source_shares_the_entry() -> None:
    builder = FakeBuilder()
    assert get_module(request(spec="a"), builder) == get_module(request(spec="b"), builder)
    assert builder.num_builds == 1


@pytest.mark.parametrize("part", ["flags", "arch", "compiler"])
def test_changed_target_builds_again(part: str) -> None:
    builder = FakeBuilder()
    get_module(request(), builder)
    get_module(request(target={**TARGET, part: "other"}), builder)
    assert builder.num_builds == 2


def test_edited_header_builds_again() -> None:
    builder = FakeBuilder()
    get_module(request(FakeSource(includes={"a.h": "1"}), spec="a"), builder)
    get_module(request(FakeSource(includes={"a.h": "2"}), spec="b"), builder)
    assert builder.num_builds == 2


def test_line_map_does_not_change_the_entry() -> None:
    builder = FakeBuilder()
    get_module(request(FakeSource(mapped_text='#line 1 "a"\nint kernel;\n'), spec="a"), builder)
    get_module(request(spec="b"), builder)
    assert builder.num_builds == 1


def test_entry_holds_source_key_log_and_manifest() -> None:
    entry = get_module(request(), FakeBuilder()).parent
    assert {path.name for path in entry.iterdir()} == {*("kernel.cpp", "module.so", "build.log", "key.json", "manifest.json")}


def test_store_is_private_to_the_user(private_store: Path) -> None:
    get_module(request(), FakeBuilder())
    assert private_store.stat().st_mode & 0o077 == 0


def test_store_without_compiler_is_used_as_it_is() -> None:
    path = get_module(request(), FakeBuilder())
    assert find_module(request(target={**TARGET, "compiler": ""})) == path


def test_prebuilt_layer_serves_a_machine_with_another_compiler(
    private_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = get_module(request(), FakeBuilder())
    monkeypatch.setenv("JITGEN_PREBUILT", str(private_store))
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path / "empty"))
    assert find_module(request(target={**TARGET, "compiler": "clang 99"})) == path


def test_frozen_mode_refuses_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITGEN_MODE", "frozen")
    builder = FakeBuilder()
    with pytest.raises(KernelNotPrebuilt, match="JITGEN_MODE=frozen and no prebuilt layer holds cpu kernel 'fake kernel'"):
        get_module(request(), builder)
    assert builder.num_builds == 0


def test_frozen_mode_uses_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    path = get_module(request(), FakeBuilder())
    monkeypatch.setenv("JITGEN_MODE", "frozen")
    assert get_module(request(), FakeBuilder()) == path


def test_threads_that_ask_at_once_share_one_build() -> None:
    gate = threading.Barrier(4)
    builder = FakeBuilder()
    found: list[Path] = []

    def ask() -> None:
        gate.wait()
        found.append(get_module(request(), builder))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert builder.num_builds == 1 and len(found) == 4 and len(set(found)) == 1


def test_failed_build_publishes_nothing_and_keeps_its_log(private_store: Path) -> None:
    def fail(directory: Path) -> None:
        log = directory / "build.log"
        log.write_text("kernel.cpp:1: error: broken\n")
        raise CompileError("fake kernel", log=log, source=directory / "kernel.cpp", lines=(f"{directory}: error",))

    with pytest.raises(CompileError) as caught:
        get_module(request(), FakeBuilder(fail))
    assert caught.value.log.read_text() == "kernel.cpp:1: error: broken\n"
    assert caught.value.log.parent.parent == private_store / "failed"
    assert str(private_store / "tmp") not in str(caught.value)
    assert find_module(request()) is None
    assert list((private_store / "tmp").iterdir()) == []


def test_failed_build_can_be_tried_again() -> None:
    def fail(directory: Path) -> None:
        raise CompileError("fake kernel")

    with pytest.raises(CompileError):
        get_module(request(), FakeBuilder(fail))
    assert get_module(request(), FakeBuilder()).is_file()


@pytest.fixture
def no_temporary_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the temporary store of an earlier test: a process warns about it only once."""
    monkeypatch.setattr(lookup, "_temporary", [])


def test_a_layer_that_is_not_there_is_said_once(private_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = private_store.parent / "nothing"
    monkeypatch.setenv("JITGEN_PREBUILT", str(nothing))
    builder = FakeBuilder()
    with pytest.warns(CacheWarning, match=f"JITGEN_PREBUILT names {nothing}, which is no directory"):
        get_module(request(), builder)
    get_module(request(FakeSource("int other;\n"), spec="other"), builder)  # a second warning would be an error
    assert builder.num_builds == 2


@pytest.mark.usefixtures("no_temporary_store")
def test_unusable_store_is_replaced_by_a_temporary_one_with_one_warning(
    private_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private_store.write_text("a file where the directory should be")
    builder = FakeBuilder()
    with pytest.warns(CacheWarning, match="cannot be used: .*Set JITGEN_CACHE_DIR") as caught:
        path = get_module(request(), builder)
    assert path.is_file()
    assert caught[0].filename == __file__  # the line of who called, not one inside of jitgen
    assert get_module(request(), builder) == path
    get_module(request(FakeSource("int other;\n"), spec="other"), builder)  # a second warning would be an error
    assert builder.num_builds == 2


@pytest.mark.usefixtures("no_temporary_store")
def test_a_name_that_no_file_system_has_is_an_unusable_store(private_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(private_store / ("x" * 300)))
    with pytest.warns(CacheWarning, match="cannot be used: File name too long"):
        assert get_module(request(), FakeBuilder()).is_file()


@pytest.mark.usefixtures("no_temporary_store")
def test_full_disk_is_survived(private_store: Path) -> None:
    def fail_once(directory: Path) -> None:
        if private_store in directory.parents:
            raise OSError(28, "No space left on device", str(directory))

    with pytest.warns(CacheWarning, match="No space left on device"):
        assert get_module(request(), FakeBuilder(fail_once)).is_file()


@pytest.mark.usefixtures("no_temporary_store")
def test_compiler_that_meets_a_full_disk_is_survived(private_store: Path) -> None:
    def fail_once(directory: Path) -> None:
        if private_store in directory.parents:
            (directory / "build.log").write_text("as: No space left on device\n")
            raise CompileError("fake kernel", log=directory / "build.log")

    with pytest.warns(CacheWarning, match="is full"):
        assert get_module(request(), FakeBuilder(fail_once)).is_file()


def test_store_that_others_can_write_is_refused(private_store: Path) -> None:
    private_store.mkdir(mode=0o700)
    private_store.chmod(0o777)
    with pytest.raises(CacheError, match=r"can be written by other users \(mode 0777\).*chmod go-w"):
        get_module(request(), FakeBuilder())


def test_module_that_others_can_write_is_refused() -> None:
    module = get_module(request(), FakeBuilder())
    module.chmod(0o666)
    lookup._store.cache_clear()  # what is checked is the first load in a process
    with pytest.raises(CacheError, match=r"module.so can be written by other users"):
        get_module(request(), FakeBuilder())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_can_ask_for_a_module() -> None:
    get_module(request(), FakeBuilder())
    child = os.fork()
    if child == 0:
        ok = get_module(request(FakeSource("int child;\n"), spec="child"), FakeBuilder()).is_file()
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
