"""jitgen show: what it prints of a variant, how it finds it, and that its tile classes are true."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

import jitgen
from jitgen import mask_tiles, toolchain
from jitgen.__main__ import main
from jitgen.errors import KernelNotPrebuilt, ShapeMismatch
from jitgen.show_target import load_variant
from jitgen.show_text import expression

needs_compiler = pytest.mark.skipif(toolchain.find_cxx() is None, reason="no C++ compiler on this machine")

USER_FILE = """
import torch
import jitgen

window, cap = 100, 30.0
doc = jitgen.sorted(torch.arange(1000) // 150)
slopes = torch.linspace(0.1, 1.0, 4)


def causal_window(b, h, q_idx, kv_idx):
    return (kv_idx <= q_idx) & (q_idx - kv_idx < window)


def soft_cap(score, b, h, q_idx, kv_idx):
    return cap * torch.tanh(score / cap)


class Packed:
    def score_mod(self, score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (kv_idx - q_idx)

    def mask_mod(self, b, h, q_idx, kv_idx):
        return (doc[q_idx] == doc[kv_idx]) & (kv_idx <= q_idx)


class Sigmoid(jitgen.OnlineNorm):
    def update(self, score, state):
        return torch.sigmoid(score), 1.0, state


class Mean(jitgen.OnlineNorm):
    state = {"keys": 0.0}

    def update(self, score, state):
        return torch.ones_like(score), 1.0, {"keys": state["keys"] + jitgen.row_sum(torch.ones_like(score))}

    def finalize(self, o, state):
        return o / state["keys"].clamp(min=1)

    def merge(self, a, b):
        return {"keys": a["keys"] + b["keys"]}, 1.0, 1.0


rope = jitgen.Rope(theta=5e5)
weight = torch.ones(64)


class Rotated:
    def q_transform(self, q, b, h, q_idx):
        return rope(q * weight, q_idx)

    def k_transform(self, k, b, kv_h, kv_idx):
        return rope(k, kv_idx + 3) * 2.0


class Family:
    local = jitgen.Variant(mask_mod=causal_window, score_mod=soft_cap)


def make():
    return Family.local
"""


@pytest.fixture
def user_file(tmp_path):
    path = tmp_path / "user_masks.py"
    path.write_text(USER_FILE)
    return path


def show_json(capsys, *arguments: object) -> dict:
    assert main(["show", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---- the target -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hooks"),
    [
        ("causal_window", {"mask"}),
        ("soft_cap", {"score"}),
        ("Packed", {"score", "mask"}),
        ("Family.local", {"score", "mask"}),
        ("Sigmoid", {"weight", "rescale", "finalize"}),
        ("Mean", {"weight", "rescale", "next keys", "finalize", "merged keys", "scale of a", "scale of b"}),
        ("Rotated", {"q rows", "k rows"}),
    ],
)
def test_function_class_variant_and_norm_are_shown(user_file, name, hooks, capsys):
    assert set(show_json(capsys, f"{user_file}:{name}")["hooks"]) == hooks


def test_module_is_found_in_the_current_directory(user_file, monkeypatch):
    monkeypatch.chdir(user_file.parent)
    monkeypatch.syspath_prepend(str(user_file.parent))
    assert load_variant("user_masks:causal_window").trace().program.mask is not None


def test_file_named_like_a_library_hides_nothing(tmp_path):
    path = tmp_path / "torch.py"
    path.write_text("import torch\n\ndef mask(b, h, q_idx, kv_idx):\n    return kv_idx <= q_idx\n")
    program = load_variant(f"{path}:mask").trace().program
    assert program.mask is jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx).trace().program.mask
    assert sys.modules["torch"] is torch


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{file}:causal", "has no 'causal'. Did you mean causal_window?"),
        ("{file}:zzz", "It has causal_window, soft_cap, Packed, Sigmoid, Mean, Rotated."),
        ("{file}:make", "'make' takes 0 positional parameters"),
        ("{file}:cap", "variant is 30.0 of type float"),
        ("/nowhere/masks.py:causal", "/nowhere/masks.py is not a file"),
        ("no_such_module:causal", "there is no module 'no_such_module'"),
    ],
)
def test_wrong_target_is_code_1_and_says_what_there_is(user_file, target, message, capsys):
    assert main(["show", target.format(file=user_file)]) == 1
    assert message in capsys.readouterr().err


def test_error_in_the_users_file_is_reported_at_its_line(tmp_path, capsys):
    path = tmp_path / "broken.py"
    path.write_text("window = 3\nmask = window / 0\n")
    assert main(["show", f"{path}:mask"]) == 1
    assert f"ZeroDivisionError: division by zero ({path}:2)" in capsys.readouterr().err


def test_a_file_that_does_not_parse_is_reported_at_its_line(tmp_path, capsys):
    path = tmp_path / "broken.py"
    path.write_text("window = 3\ndef mask(:\n")
    assert main(["show", f"{path}:mask"]) == 1
    error = capsys.readouterr().err
    assert f"({path}:2)" in error and "importlib" not in error


def test_a_file_that_ends_the_program_is_said(tmp_path, capsys):
    path = tmp_path / "script.py"
    path.write_text("import sys\nsys.exit(0)\n")
    assert main(["show", f"{path}:mask"]) == 1
    assert f"script.py ended the program (SystemExit: 0 ({path}:2))" in capsys.readouterr().err


# ---- the report -----------------------------------------------------------------------------------------------------


def test_report_names_expressions_captures_kernel_and_key(user_file, private_store, capsys):
    assert main(["show", f"{user_file}:Family.local", "--head-dim", "64", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"  score     .*tanh\(\(score / cap\)\)", text)
    assert "mask      (kv_idx <= q_idx) and ((q_idx - kv_idx) < window)" in text
    assert "cap       float, now 30.0" in text and "window    int, now 100" in text
    assert "cpu, float32, head_dim 64" in text
    assert "key       cpu-" in text and "no: the first call compiles it" in text


def test_transforms_of_rows_are_shown_step_by_step(user_file, capsys):
    assert main(["show", f"{user_file}:Rotated", "--head-dim", "64", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "q rows    o * weight[d], then rotated by Rope(theta=500000.0)" in text
    assert "k rows    rotated by Rope(theta=500000.0) at q_idx + 3, then o * 2.0" in text
    assert "first     kernels of their own write the transformed rows to copies" in text


def test_inputs_that_are_copied_are_said(user_file, capsys):
    options = ["show", f"{user_file}:causal_window", "--arch", "9.0a", "--head-dim"]
    assert main([*options, "40"]) == 0
    assert "copies    q, k and v in each call, with zeros up to the head dim of the kernel" in capsys.readouterr().out
    assert main([*options, "64"]) == 0
    assert "copies    inputs whose rows are not contiguous" in capsys.readouterr().out


@needs_compiler
def test_stored_kernel_is_found_and_its_key_is_the_entrys_name(user_file, private_store, capsys):
    variant = load_variant(f"{user_file}:Family.local")
    arguments = (f"{user_file}:Family.local", "--head-dim", 32, "--dtype", "bfloat16", "--device", "cpu")
    before = show_json(capsys, *arguments)["kernel"]
    assert before["entry"] is None
    q = torch.zeros(1, 1, 8, 32, dtype=torch.bfloat16)
    jitgen.attention(q, q, q, variant)
    after = show_json(capsys, *arguments)["kernel"]
    assert after["key"] == before["key"]
    assert after["entry"] == str(private_store / after["key"])


@pytest.mark.parametrize(
    ("options", "family", "arch"),
    [
        (["--arch", "9.0"], "sm90", "9.0a"),
        (["--arch", "9.0a"], "sm90", "9.0a"),
        (["--arch", "9.0", "--family", "sm80"], "sm80", "9.0"),
        (["--arch", "8.6"], "sm80", "8.6"),
        (["--arch", "12.0"], "sm80", "12.0"),
        (["--arch", "9.0", "--q-len", "1", "--kv-len", "4096"], "decode", "9.0a"),
        (["--arch", "8.6", "--q-len", "1", "--kv-len", "4096"], "decode", "8.6"),
    ],
    ids=" ".join,
)
def test_cuda_kernel_is_shown_without_a_gpu(user_file, options, family, arch, capsys):
    data = show_json(capsys, f"{user_file}:causal_window", *options, "--source", "--head-dim", 40)
    kernel = data["kernel"]
    assert (kernel["family"], kernel["arch"], kernel["dtype"], kernel["head_dim"]) == (family, arch, "bfloat16", 64)
    assert "__global__" in data["source"] and "mask_tile(" in data["source"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", "8.0", "--family", "sm90"], "family='sm90' needs compute capability 9.0"),
        (["--arch", "8.0", "--dtype", "float32"], "dtype is float32, expected bfloat16 or float16 or float8_e4m3fn on cuda"),
        (["--arch", "9.0", "--family", "sm90", "--head-dim", "512"], "family='sm90' has no kernel for head_dim 512"),
        (["--q-len", "100", "--kv-len", "50"], "q_len 100 is larger than kv_len 50"),
        (["--heads", "3", "--kv-heads", "2"], "3 query heads do not divide among 2 KV heads"),
        (["--head", "1"], "--head 1 is not one of 1 heads"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_choice_is_code_1(user_file, options, message, capsys):
    assert main(["show", f"{user_file}:causal_window", *options]) == 1
    assert message in capsys.readouterr().err


def test_source_is_numbered_on_request(user_file, capsys):
    assert main(["show", f"{user_file}:causal_window", "--source"]) == 0
    plain = capsys.readouterr().out
    assert main(["show", f"{user_file}:causal_window", "--source", "--line-numbers"]) == 0
    numbered = capsys.readouterr().out
    assert "\n// generated by jitgen" in plain and "\n  1  // generated by jitgen" in numbered


def test_expression_with_shared_parts_is_not_printed_without_end():
    def score(s, b, h, q_idx, kv_idx):
        for _ in range(40):
            s = s * torch.sin(s)
        return s

    program = jitgen.Variant(score_mod=score).trace().program
    assert "too long to print" in expression(program.score, [])


@needs_compiler
def test_mask_is_drawn_after_the_report(user_file, capsys):
    assert main(["show", "--mask", f"{user_file}:causal_window", "--q-len", "64", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "mask of head 0: queries down, keys to the right; tiles of 48 x 256\n  █▄" in text


@needs_compiler
def test_mask_is_written_as_a_picture(user_file, tmp_path, capsys):
    path = tmp_path / "mask.png"
    assert main(["show", f"{user_file}:Packed", "--head", "3", "--mask", str(path)]) == 0
    assert f"wrote {path}: head 3, 1000 x 1000 pixels" in capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG")


@needs_compiler
def test_picture_that_cannot_be_written_is_one_message(user_file, tmp_path, capsys):
    path = tmp_path / "nowhere" / "mask.png"
    assert main(["show", f"{user_file}:causal_window", "--mask", str(path)]) == 1
    message = f"{path} cannot be written: No such file or directory. Name another file."
    assert capsys.readouterr().err == f"jitgen show: {message}\n"


def test_picture_of_no_mask_is_refused(user_file, capsys):
    assert main(["show", f"{user_file}:soft_cap", "--mask"]) == 1
    assert "has no mask_mod" in capsys.readouterr().err


# ---- tile classes ---------------------------------------------------------------------------------------------------


@needs_compiler
def test_sizes_come_from_captured_tensors(user_file, capsys):
    tiles = show_json(capsys, f"{user_file}:Packed")["tiles"]
    assert (tiles["q_len"], tiles["kv_len"], tiles["num_q_heads"]) == (1000, 1000, 4)
    assert len(tiles["per_head"]) == 4


@needs_compiler
def test_causal_tiles_are_counted_as_geometry_says(user_file, capsys):
    data = show_json(capsys, f"{user_file}:causal_window", "--q-len", 48 * 4, "--kv-len", 256 * 4, "--device", "cpu")
    assert (data["kernel"]["tile_q"], data["kernel"]["tile_kv"]) == (48, 256)
    # rows 832 to 1023 against keys: their windows reach from key 733 on, so two of four key tiles are never touched
    assert (data["tiles"]["none"], data["tiles"]["partial"], data["tiles"]["full"]) == (4 * 2 + 3, 1 + 4, 0)


@needs_compiler
def test_classes_of_tiles_are_true_of_their_elements(user_file):
    traced = load_variant(f"{user_file}:Packed").trace()
    program, values = traced.program, traced.values()
    sizes = {"q_len": 500, "kv_len": 1000, "q_offset": 500}
    kinds = mask_tiles.classify(program, values, **sizes, tile_q=48, tile_kv=64, num_q_heads=2)
    kept = jitgen.reference.mask_of(program, values, **sizes, num_q_heads=2)[0]
    assert kinds.shape == (2, 11, 16)
    for head, row, column in torch.cartesian_prod(*(torch.arange(n) for n in kinds.shape)).tolist():
        tile = kept[head, 48 * row : 48 * row + 48, 64 * column : 64 * column + 64]
        assert kinds[head, row, column] == int(tile.any()) + int(tile.all())  # none, partial, full


def test_tiles_without_a_mask_are_full_and_compile_nothing(private_store):
    program = jitgen.Variant().trace().program
    kinds = mask_tiles.classify(program, [], q_len=100, kv_len=100, tile_q=64, tile_kv=64)
    assert kinds.tolist() == [[[mask_tiles.TILE_FULL] * 2] * 2]
    assert not private_store.exists()


def test_tiles_beyond_a_captured_tensor_are_refused(user_file):
    traced = load_variant(f"{user_file}:Packed").trace()
    with pytest.raises(ShapeMismatch, match=r"'doc' has size 1000 along axis 0, which .* indexes up to 1999"):
        mask_tiles.classify(traced.program, traced.values(), q_len=8, kv_len=2000, tile_q=8, tile_kv=8)


@needs_compiler
def test_new_captured_value_needs_no_new_module(user_file, monkeypatch):
    variant = load_variant(f"{user_file}:causal_window")
    sizes = {"q_len": 256, "kv_len": 256, "tile_q": 64, "tile_kv": 64}
    traced = variant.trace()
    narrow = mask_tiles.classify(traced.program, traced.values(), **sizes)
    monkeypatch.setenv("JITGEN_MODE", "frozen")
    traced = variant.bind(window=1000).trace()
    wide = mask_tiles.classify(traced.program, traced.values(), **sizes)
    assert narrow[0, 3].tolist() == [0, 1, 1, 1] and wide[0, 3].tolist() == [2, 2, 2, 1]


def test_machine_that_cannot_compile_still_shows_the_rest(user_file, private_store, monkeypatch, capsys):
    monkeypatch.setattr(mask_tiles, "_libraries", {})
    monkeypatch.setenv("JITGEN_MODE", "frozen")
    data = show_json(capsys, f"{user_file}:causal_window", "--device", "cpu")
    assert "JITGEN_MODE=frozen" in data["tiles"]["problem"] and data["kernel"]["key"].startswith("cpu-")
    traced = load_variant(f"{user_file}:causal_window").trace()
    with pytest.raises(KernelNotPrebuilt):
        mask_tiles.classify(traced.program, traced.values(), q_len=8, kv_len=8, tile_q=8, tile_kv=8)
