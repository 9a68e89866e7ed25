"""Bundles: the same bytes each time, everything checked before anything is used, found where they are unpacked."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from fake_builder import TARGET, FakeBuilder, FakeSource, request

from jitgen import cache
from jitgen.__main__ import main
from jitgen.cache import archive, bundle
from jitgen.cache.archive import Member
from jitgen.cache.installed import installed_layers
from jitgen.cache.layer import STAMP, make_stamp
from jitgen.errors import BundleError

FORMATS = ("b.tar.xz", "b.tar.gz", "b.tar.zst", "kernels-1.0.whl", "folder")
FIRST, SECOND = FakeSource("int first;\n", includes={"a.h": "1"}), FakeSource("int second;\n")


def has_zstd() -> bool:
    try:
        archive._zstd_writer(io.BytesIO())
    except BundleError:
        return False
    return True


@pytest.fixture
def layer(private_store: Path) -> Path:
    """A store with two kernels and a layer's stamp."""
    cache.get_module(request(FIRST, spec="first"), FakeBuilder())
    cache.get_module(request(SECOND, spec="second"), FakeBuilder())
    (private_store / STAMP).write_text(make_stamp())
    return private_store


def pack(layer: Path, folder: Path, form: str = "b.tar.gz") -> Path:
    if form.endswith("zst") and not has_zstd():
        pytest.skip("no zstandard")
    return bundle.pack([layer], folder / form).path


@pytest.mark.parametrize("form", FORMATS)
def test_bundle_holds_what_a_frozen_process_needs(form: str, layer: Path, tmp_path: Path, monkeypatch) -> None:
    packed = pack(layer, tmp_path, form)
    assert len(bundle.verify(packed).kernels) == 2
    bundle.unpack(packed, tmp_path / "unpacked")
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("JITGEN_PREBUILT", str(tmp_path / "unpacked"))
    monkeypatch.setenv("JITGEN_MODE", "frozen")
    builder = FakeBuilder()
    for source, spec in ((FIRST, "first"), (SECOND, "second")):
        # another compiler than the one it was built with
        module = cache.get_module(request(source, spec=spec, target={**TARGET, "compiler": "clang 99"}), builder)
        assert module.is_relative_to(tmp_path / "unpacked") and builder.num_builds == 0
        assert module.read_bytes() == b"\x7fELF" + source.text.encode() * 100


@pytest.mark.parametrize("form", FORMATS)
def test_packing_twice_gives_the_same_bytes(form: str, layer: Path, tmp_path: Path) -> None:
    first = pack(layer, tmp_path / "a", form)
    for path in layer.rglob("*"):
        os.utime(path, (1e9, 1e9))
    copied = shutil.copytree(layer, tmp_path / "copied")
    second = pack(copied, tmp_path / "b", form)
    if form == "folder":
        files = [sorted((p.relative_to(f), p.read_bytes()) for p in f.rglob("*") if p.is_file()) for f in (first, second)]
        assert files[0] == files[1]
    else:
        assert first.read_bytes() == second.read_bytes()


def test_bundle_holds_nothing_but_kernels(layer: Path, tmp_path: Path) -> None:
    (layer / "failed" / "cpu-x").mkdir(parents=True)
    (layer / "failed" / "cpu-x" / "secret").write_text("a")
    with tarfile.open(pack(layer, tmp_path)) as tar:
        firsts = {name.split("/")[0] for name in tar.getnames()}
    assert firsts == {"bundle.json", STAMP, "index", *cache.Store(layer).names()}


def test_layers_are_merged_and_nothing_twice(layer: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path / "other"))
    cache.get_module(request(SECOND, spec="second"), FakeBuilder())
    cache.get_module(request(FakeSource("int third;\n"), spec="third"), FakeBuilder())
    contents = bundle.pack([layer, tmp_path / "other"], tmp_path / "b.tar.xz")
    assert len(contents.kernels) == len(set(contents.kernels)) == 3


def test_damaged_kernel_is_not_packed(layer: Path, tmp_path: Path) -> None:
    (layer / cache.Store(layer).names()[0] / "build.log").write_text("changed")
    with pytest.raises(BundleError, match=r"is damaged: build\.log"):
        pack(layer, tmp_path)


@pytest.mark.parametrize(("name", "message"), [("b.zip", "expected a name that ends"), ("K.whl", "is no name for a wheel")])
def test_unknown_name_is_refused(name: str, message: str, layer: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=message):
        bundle.pack([layer], tmp_path / name)


def test_store_without_kernels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match="holds no kernels"):
        bundle.pack([tmp_path / "empty"], tmp_path / "b.tar.xz")


# ---- damage and malice --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["b.tar.xz", "b.tar.gz", "kernels-1.0.whl"])
def test_flipped_bits_and_cuts_are_noticed_and_nothing_is_unpacked(form: str, layer: Path, tmp_path: Path) -> None:
    packed = pack(layer, tmp_path, form)
    whole = packed.read_bytes()
    intact = sorted(member.name for member in archive.read_archive(packed))
    for position in range(11, len(whole), len(whole) // 24):
        data = bytearray(whole)
        data[position] ^= 0x10
        for number, content in enumerate((bytes(data), whole[:position])):
            packed.write_bytes(content)
            out = tmp_path / f"out-{position}-{number}"
            try:
                bundle.unpack(packed, out)
            except BundleError:
                assert not out.exists() or cache.Store(out).names() == []
            else:  # a bit that no content depends on, such as a time in a header
                assert sorted(member.name for member in archive.read_archive(packed)) == intact


def tar_of(folder: Path, *members: tarfile.TarInfo | Member) -> Path:
    path = folder / "evil.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            if isinstance(member, Member):
                info = tarfile.TarInfo(member.name)
                info.size = len(member.data)
                tar.addfile(info, io.BytesIO(member.data))
            else:
                tar.addfile(member)
    return path


def link(kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo("index/" + "0" * 32)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(kind: bytes, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is no plain file"):
        bundle.unpack(tar_of(tmp_path, link(kind)), tmp_path / "out")


@pytest.mark.parametrize("name", ["../escape", "/etc/escape", "a/../../escape", "a//b", "./a", "a\\b", "C:/x/.."])
def test_names_that_lead_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="leads elsewhere"):
        bundle.unpack(tar_of(tmp_path, Member(name, b"x")), tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "evil-1.0.whl", "w") as wheel:
        wheel.writestr(zipfile.ZipInfo(name), b"x")
    if "\\" not in name:  # zipfile itself turns that into a slash
        with pytest.raises(BundleError, match="leads elsewhere"):
            bundle.unpack(tmp_path / "evil-1.0.whl", tmp_path / "out")
    assert not (tmp_path / "escape").exists()


def test_symbolic_link_in_a_wheel_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("k/layer/bundle.json")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "evil-1.0.whl", "w") as wheel:
        wheel.writestr(info, "/etc/passwd")
    with pytest.raises(BundleError, match="is no plain file"):
        bundle.unpack(tmp_path / "evil-1.0.whl", tmp_path / "out")


def test_file_that_unpacks_to_more_than_allowed_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(archive, "MAX_FILE", 1000)
    with pytest.raises(BundleError, match="is larger than"):
        bundle.unpack(tar_of(tmp_path, Member("layer.json", bytes(5000))), tmp_path / "out")
    monkeypatch.setattr(archive, "MAX_FILE", 10_000)
    monkeypatch.setattr(archive, "MAX_TOTAL", 8000)
    with pytest.raises(BundleError, match="holds more than"):
        bundle.unpack(tar_of(tmp_path, *[Member(f"x{i}", bytes(5000)) for i in range(3)]), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.pop("layer.json"), "lacks layer.json"),
        (lambda files: files.update(extra=b"x"), "'extra', which is no part of a layer"),
        (lambda files: files.update({"layer.json": b"{}"}), "layer.json is not as it was packed"),
        (lambda files: files.pop("bundle.json"), "is no bundle"),
        (lambda files: files.update({"bundle.json": b'{"format": 99, "files": {}}'}), "has format 99"),
    ],
    ids=["missing", "extra", "changed", "contents", "format"],
)
def test_bundle_with_other_files_than_it_lists_is_refused(change, message: str, layer: Path, tmp_path: Path) -> None:
    files = {member.name: member.data for member in archive.read_archive(pack(layer, tmp_path))}
    change(files)
    with pytest.raises(BundleError, match=message):
        bundle.unpack(tar_of(tmp_path, *(Member(name, data) for name, data in files.items())), tmp_path / "out")


def test_kernel_that_differs_from_its_own_manifest_is_refused(layer: Path, tmp_path: Path) -> None:
    """bundle.json can be written by anyone; the kernel's manifest must agree too."""
    import hashlib

    files = {member.name: member.data for member in archive.read_archive(pack(layer, tmp_path))}
    name = next(name for name in files if name.endswith("module.so"))
    files[name] = b"\x7fELF other code"
    contents = json.loads(files["bundle.json"])
    contents["files"][name] = [len(files[name]), hashlib.sha256(files[name]).hexdigest()]
    files["bundle.json"] = json.dumps(contents).encode()
    with pytest.raises(BundleError, match=r"is damaged: module.so"):
        bundle.unpack(tar_of(tmp_path, *(Member(name, data) for name, data in files.items())), tmp_path / "out")


def test_missing_zstd_says_what_to_do(layer: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression", None)
    with pytest.raises(BundleError, match=r"pip install 'jitgen\[bundle\]'\), or use .tar.xz"):
        bundle.pack([layer], tmp_path / "b.tar.zst")
    assert not list(tmp_path.glob("*.zst"))


# ---- wheels ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(layer: Path, tmp_path: Path) -> Path:
    """A directory of packages with the wheel installed by pip."""
    wheel = pack(layer, tmp_path, "kernels-1.0.whl")
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, env={**os.environ, "PIP_ROOT_USER_ACTION": "ignore"})
    return target


def test_installed_wheel_is_found_without_a_variable(installed: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("JITGEN_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("JITGEN_MODE", "frozen")
    monkeypatch.syspath_prepend(str(installed))
    assert installed_layers() == (installed / "kernels" / "layer",)
    assert cache.get_module(request(FIRST, spec="first"), FakeBuilder()).is_relative_to(installed)
    shutil.rmtree(installed / "kernels-1.0.dist-info")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])  # another path is looked at anew
    assert installed_layers() == ()


OTHERS = (
    *("[jitgen.prebuilt\n", "# jitgen.prebuilt", "\xff"),
    *("[jitgen.prebuilt]\nx = ../../etc\n", "[jitgen.prebuilt]\nx = not_there\n"),
)


@pytest.mark.parametrize("text", OTHERS)
def test_damaged_entry_points_of_others_are_passed_over(text: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "x-1.dist-info").mkdir()
    (tmp_path / "x-1.dist-info" / "entry_points.txt").write_text(text, "latin1")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert installed_layers() == ()


# ---- command line ---------------------------------------------------------------------------------------------------------


def test_command_packs_verifies_and_unpacks(layer: Path, tmp_path: Path, capsys) -> None:
    packed = str(tmp_path / "b.tar.xz")
    assert main(["bundle", "pack", str(layer), "-o", packed]) == 0
    assert "packed" in capsys.readouterr().out
    assert main(["bundle", "verify", packed, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["archs"] == ["x86_64"] and len(facts["kernels"]) == 2 and facts["size"] == os.path.getsize(packed)
    assert main(["bundle", "unpack", packed, "-o", str(tmp_path / "layer")]) == 0
    Path(packed).write_bytes(b"no archive")
    assert main(["bundle", "verify", packed]) == 1
    assert "is no archive" in capsys.readouterr().err
    capsys.readouterr()
    assert main(["bundle", "verify", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err == f"jitgen bundle: {tmp_path / 'none'}: No such file or directory.\n"
