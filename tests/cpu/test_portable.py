"""Requests as plain values: what comes back is the same kernel, and nothing else can be asked for."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gallery import CASES, Sizes

import jitgen
from jitgen import mask_tiles, runtime
from jitgen.errors import ManifestError
from jitgen.manifest import parse_manifest, request_text
from jitgen.portable import ASKING, pack, unpack
from jitgen.prebuild_units import spec_of
from jitgen.target import cpu_target

ROOT = Path(__file__).parent.parent.parent
PROGRAM = jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx).trace().program
SPEC = spec_of(PROGRAM, "float32", (64, 64), "portable")


def through_toml(call: tuple) -> tuple:
    """A request packed, written to a manifest, read and unpacked."""
    text = request_text(pack(call), "a title\nof two lines")
    (request,) = parse_manifest(text, Path("m.toml")).requests
    return unpack(request)


@pytest.mark.parametrize("name", CASES)
def test_every_variant_of_the_gallery_comes_back_as_it_was(name: str) -> None:
    program = CASES[name].make(Sizes(33, 65)).trace().program
    spec = spec_of(program, "float32", (16, 16), "portable")
    function, (back,) = through_toml((runtime.module_path, spec))
    assert function is runtime.module_path
    assert (back.digest, back.program.id, back.target) == (spec.digest, program.id, spec.target)
    assert back.program.slots == program.slots and [s.name for s in back.program.slots] == [s.name for s in program.slots]


def test_request_with_several_arguments_comes_back() -> None:
    function, (program, target) = through_toml((mask_tiles.module_path, PROGRAM, cpu_target("avx2")))
    assert function is mask_tiles.module_path
    assert (program.id, target) == (PROGRAM.id, cpu_target("avx2"))


def test_fields_with_their_default_are_left_out() -> None:
    (argument,) = pack((runtime.module_path, SPEC))["arguments"]
    assert argument["dtype"] == "float32" and "layout" not in argument
    assert argument["program"] == {"class": "program.Program", "mask": {"node": 2}}


def test_value_without_portable_form_is_refused() -> None:
    with pytest.raises(TypeError, match="a set has no portable form"):
        pack((runtime.module_path, {1}))


def changed(**changes: object) -> dict:
    return {**json.loads(json.dumps(pack((runtime.module_path, SPEC)))), **changes}


def with_argument(**changes: object) -> dict:
    request = changed()
    request["arguments"][0].update(changes)
    return request


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (changed(function="os:system"), "'os:system' is not a function module_path of jitgen"),
        (changed(function="jitgen.cache.admin:clear"), "is not a function module_path"),
        (changed(function="jitgen.nothing:module_path"), "No module named 'jitgen.nothing'"),
        (with_argument(**{"class": "cache.store.Store"}), "is not a part of a kernel"),
        (with_argument(**{"class": "os.Path"}), "No module named 'jitgen.os'"),
        (with_argument(new_field=1), "has no field 'new_field'"),
        (with_argument(target={"class": "target", "arch": "z80"}), "'z80' is no architecture"),
        (changed(nodes=[["le", "bool", 0, 1]]), "not defined before they are used"),
        (changed(nodes=[["index", "i32", "time"]]), "KeyError: 'time'"),
        (changed(nodes=[["index", "f32", "q_idx"]]), "should be f32, and is i32"),
        ({}, "function = '' is not a function"),
    ],
    ids=["module", "function", "missing", "class", "outside", "field", "arch", "order", "index", "type", "empty"],
)  # fmt: skip
def test_request_that_is_not_a_kernel_is_refused(request_: dict, message: str) -> None:
    with pytest.raises((ManifestError, jitgen.errors.EnvError), match=message):
        unpack(request_)


def test_request_without_a_field_that_has_a_default_still_fits() -> None:
    request = with_argument()
    request["arguments"][0]["layout"] = "dense"
    assert unpack(request)[1][0].digest == unpack(with_argument())[1][0].digest == SPEC.digest


PACKING = """
import json, jitgen
from jitgen import runtime
from jitgen.portable import pack
from jitgen.prebuild_units import spec_of
cap = 3.0
def mask_mod(b, h, q, k):
    return (k <= q) & (q < 5 * h)
program = jitgen.Variant(score_mod=lambda s, b, h, q, k: s * cap + q - k, mask_mod=mask_mod).trace().program
print(json.dumps(pack((runtime.module_path, spec_of(program, "float32", (64, 64), "portable")))))
"""


def test_packed_form_does_not_depend_on_the_hash_seed() -> None:
    texts = {
        subprocess.run(
            [sys.executable, "-c", PACKING], env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, check=True
        ).stdout
        for seed in ("0", "77")
    }
    assert len(texts) == 1


def test_every_kind_of_kernel_can_be_recorded() -> None:
    """Whoever calls build.get_module is a function of the agreed name, and passes itself with its arguments."""
    for path in sorted((ROOT / "jitgen").rglob("*.py")):
        for function in [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]:
            calls = [n for n in ast.walk(function) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "get_module"]
            for call in calls:
                where = f"{path.relative_to(ROOT)}:{call.lineno}"
                assert function.name == ASKING, f"{where}: call get_module in a function named {ASKING}(...) of plain arguments"
                assert any(keyword.arg == "call" for keyword in call.keywords), f"{where}: pass call=({ASKING}, *arguments)"
