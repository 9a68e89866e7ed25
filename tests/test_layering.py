"""Imports inside the package point one way: from calls and tools down to errors, never up."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Bottom to top. A module may import from its own layer and from those below it. A name ending in * covers a family.
LAYERS = {
    "errors": ["errors", "records", "deep"],
    "machine": ["env", "paths", "memo", "progress", "events", "toolchain", "target"],
    "expressions": ["ir", "ir_*", "arith", "location", "guards", "program", "evaluate", "norm_parts"],
    "language": [
        "refusals",
        "symbols",
        "gather",
        "ops_*",
        "trace",
        "proxies",
        "captures",
        "captured_kinds",
        "norms",
        "norm_hooks",
        "rows",
        "row_hooks",
        "masks",
        "signatures",
        "hooks",
        "variant",
    ],
    "generator": ["abi", "emit*", "spec", "tiles*", "families"],
    "rendering": ["linemap", "render"],
    "store": ["cache*"],
    "requests": ["portable", "manifest", "recording"],
    "building": ["host_part", "loader", "build"],
    "calls": [
        "checks", "looks", "runtime", "streams", "recall", "fp8", "layouts", "dense*", "api", "reference", "mask_tiles", "flex",
        "op", "recipes", "lift*", "trackers", "graph*", "block_*", "serving*", "sampling*", "rotary", "kv_*",
    ],
    "compat": ["compat*"],
    "tools": ["bench*", "show*", "doctor*", "demo", "prebuild*", "cli*", "__main__"],
}
# What a layer may import beyond itself, where that is less than everything below it.
NARROW = {
    "expressions": {"errors"},
    "language": {"errors", "expressions"},
    "store": {"errors", "machine"},
    "requests": {"errors", "machine", "expressions"},
    "building": {"errors", "machine", "store", "requests"},
}
DISTRIBUTION_DIRECTORIES = ("cache", "kernel_templates")  # importable from the checkout only; their names are jitgen.*


def source_files(*directories: str) -> list[Path]:
    return sorted(path for directory in directories for path in (ROOT / directory).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "jitgen" else parts
    return ".".join(p for p in parts if p != "__init__")


def imported_names(path: Path) -> Iterator[tuple[str, int]]:
    """What a file imports anywhere, functions included, with the lines; imports for type checkers do not count."""
    tree = ast.parse(path.read_text(), str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def layer_of(module: str) -> str:
    """Layer of a module, named without the leading 'jitgen.'."""
    first = module.split(".")[0]
    for layer, names in LAYERS.items():
        if any(first == n or (n.endswith("*") and first.startswith(n[:-1])) for n in names):
            return layer
    raise AssertionError(f"jitgen.{module} stands in no layer: add it to LAYERS in tests/test_layering.py")


MODULES = {module_name(p): p for p in source_files("jitgen", "cache")}


def own_imports(path: Path) -> Iterator[tuple[str, int]]:
    """The package's modules that a file imports, without the leading 'jitgen.'."""
    for name, line in imported_names(path):
        parts = name.split(".")
        if parts[0] == "jitgen":
            inner = parts[1:]
            while inner and ".".join(inner) not in MODULES:
                inner.pop()  # a name inside a module
            if inner:
                yield ".".join(inner), line


@pytest.mark.parametrize("module", [m for m in MODULES if m])
def test_module_imports_only_what_lies_below_it(module):
    order, layer = list(LAYERS), layer_of(module)
    allowed = NARROW.get(layer, set(order[: order.index(layer)])) | {layer}
    wrong = [
        f"{MODULES[module].relative_to(ROOT)}:{line}: {layer} imports jitgen.{name} of {layer_of(name)}"
        for name, line in own_imports(MODULES[module])
        if layer_of(name) not in allowed
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", source_files("jitgen", "cache", "tests", "examples"), ids=lambda p: str(p.relative_to(ROOT)))
def test_directories_of_the_checkout_are_imported_by_their_installed_names(path):
    wrong = [
        f"{path}:{line}: imports {name}"
        for name, line in imported_names(path)
        if name.split(".")[0] in DISTRIBUTION_DIRECTORIES
    ]
    assert not wrong, "\n".join(wrong)


def test_every_name_in_the_layers_exists():
    firsts = {m.split(".")[0] for m in MODULES}
    for names in LAYERS.values():
        for n in names:
            assert any(f.startswith(n[:-1]) if n.endswith("*") else f == n for f in firsts), f"no module {n}"


def test_templates_hold_no_python():
    assert [p.name for p in source_files("kernel_templates")] == ["__init__.py"]
    assert (ROOT / "kernel_templates" / "__init__.py").read_text() == ""
