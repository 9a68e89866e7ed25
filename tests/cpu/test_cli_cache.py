"""jitgen cache on a store of fake kernels: what it lists, finds, compares and removes."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys

import pytest
from fake_builder import TARGET, FakeBuilder, FakeSource, request

from jitgen import cache
from jitgen.__main__ import main

FIRST = FakeSource("int kernel = 1;\n")
SECOND = FakeSource("int kernel = 2;\n")


@pytest.fixture
def store(private_store):
    """A store with two kernels that differ in their source and in a flag."""
    cache.get_module(request(FIRST, spec="first"), FakeBuilder())
    other = {**TARGET, "flags": ("-O2",)}
    cache.get_module(request(SECOND, spec="second", target=other), FakeBuilder())
    return private_store


def names(store) -> list[str]:
    return cache.Store(store).names()


def run_json(capsys, *arguments: str, code: int = 0):
    assert main(["cache", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_ls_lists_every_kernel_and_their_total(store, capsys):
    assert main(["cache", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["kernel", "what", "for", "size", "age"]
    assert {line.split()[0] for line in lines[1:3]} == set(names(store))
    assert lines[-1].startswith("2 kernels, ") and lines[-1].endswith(str(store))


def test_ls_of_no_store_says_so(private_store, capsys):
    assert main(["cache", "ls"]) == 0
    assert capsys.readouterr().out == f"{private_store} holds no kernels\n"
    assert not private_store.exists()


def test_ls_in_json_has_sizes_in_bytes(store, capsys):
    listed = run_json(capsys, "ls")
    assert {entry["name"] for entry in listed} == set(names(store))
    assert all(entry["size"] > len(FIRST.text) * 100 and entry["label"] == "fake kernel" for entry in listed)


def test_another_store_can_be_named(store, tmp_path, capsys):
    moved = shutil.copytree(store, tmp_path / "moved")
    assert main(["cache", "clear", "--yes", "--dir", str(moved)]) == 0
    assert (names(moved), len(names(store))) == ([], 2)


def test_info_shows_stores_in_the_order_of_look_up(store, tmp_path, monkeypatch, capsys):
    layer = shutil.copytree(store, tmp_path / "layer")
    monkeypatch.setenv("JITGEN_PREBUILT", str(layer))
    found = run_json(capsys, "info")
    assert [(s["kind"], s["root"], s["kernels"]) for s in found["stores"]] == [
        ("prebuilt layer", str(layer), 2),
        ("user store", str(store), 2),
    ]
    assert main(["cache", "info"]) == 0
    assert f"1. prebuilt layer  {layer}" in capsys.readouterr().out


def test_info_counts_what_failures_left(store, capsys):
    (store / "failed" / "cpu-bad").mkdir(parents=True)
    assert main(["cache", "info"]) == 0
    assert "1 failed builds; 'jitgen cache gc' removes them" in capsys.readouterr().out


def test_info_of_a_kernel_shows_its_target_and_files(store, capsys):
    name = names(store)[0]
    facts = run_json(capsys, "info", name[:12])
    assert (facts["name"], facts["target"]["compiler"]) == (name, "g++ 12")
    assert {"kernel.cpp", "module.so", "key.json"} <= set(facts["files"])
    assert main(["cache", "info", name]) == 0
    assert "g++ 12" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "message"), [("cpu-", "fits 2 entries"), ("nothing", "is no entry")])
def test_unclear_kernel_is_an_error(store, given, message, capsys):
    assert main(["cache", "info", given]) == 1
    assert message in capsys.readouterr().err


def test_explain_names_the_flag_and_the_line_that_differ(store, capsys):
    assert main(["cache", "explain", *names(store)]) == 0
    text = capsys.readouterr().out
    assert "target.flags: -O" in text
    assert "-int kernel = " in text and "+int kernel = " in text


def test_explain_of_a_damaged_kernel_says_so(store, capsys):
    (store / names(store)[0] / "key.json").write_text("{")
    assert main(["cache", "explain", *names(store)]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_explain_of_one_kernel_twice_says_equal(store, capsys):
    assert main(["cache", "explain", names(store)[0], names(store)[0]]) == 0
    assert "equal" in capsys.readouterr().out


def test_verify_passes_an_untouched_store(store, capsys):
    assert main(["cache", "verify"]) == 0
    assert "2 kernels" in capsys.readouterr().out


def test_verify_finds_the_damaged_kernel(store, capsys):
    good, bad = names(store)
    (store / bad / "module.so").write_bytes(b"\x7fELF")
    assert main(["cache", "verify"]) == 1
    text = capsys.readouterr().out
    assert f"{bad}: module.so has 4 bytes" in text and good not in text
    assert set(run_json(capsys, "verify", code=1)) == {good, bad}


def test_gc_removes_leftovers_and_keeps_kernels(store, capsys):
    (store / "failed" / "cpu-bad").mkdir(parents=True)
    (store / "failed" / "cpu-bad" / "build.log").write_text("error")
    assert main(["cache", "gc"]) == 0
    assert "removed failed/cpu-bad" in capsys.readouterr().out
    assert len(names(store)) == 2
    assert main(["cache", "gc"]) == 0
    assert capsys.readouterr().out == "nothing to remove\n"


def test_gc_removes_kernels_older_than_asked(store, capsys):
    old, new = names(store)
    os.utime(store / old, (0, 0))
    removed = run_json(capsys, "gc", "--older-than", "30")["removed"]
    assert str(store / old) in removed
    assert names(store) == [new]


def test_clear_without_an_answer_removes_nothing(store, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["cache", "clear"]) == 2
    assert "--yes" in capsys.readouterr().err
    assert len(names(store)) == 2


@pytest.mark.parametrize(("answer", "code", "left"), [("y", 0, 0), ("no", 1, 2), ("", 1, 2)])
def test_clear_asks_on_a_terminal(store, answer, code, left, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    assert main(["cache", "clear"]) == code
    assert len(names(store)) == left


def test_no_home_directory_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr("jitgen.paths.cache_dir", lambda: None)
    assert main(["cache", "ls"]) == 1
    assert "Set JITGEN_CACHE_DIR" in capsys.readouterr().err
