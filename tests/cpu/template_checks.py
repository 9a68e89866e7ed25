"""What holds for every template and every generated source; used by the tests of golden files."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from jinja2 import meta, nodes

from jitgen import paths, render

Branches = dict[tuple[str, int, int], set[bool]]


def template_names(directory: str) -> list[str]:
    """Templates below a directory, as the environment names them."""
    root = paths.template_dir()
    return sorted(p.relative_to(root).as_posix() for p in (root / directory).rglob("*.jinja"))


def parsed(template: str) -> nodes.Template:
    return render.environment().parse((paths.template_dir() / template).read_text())


@cache
def parts_of(template: str) -> frozenset[str]:
    """The template itself and all that it includes, directly or through others."""
    included = meta.find_referenced_templates(parsed(template))
    return frozenset({template}).union(*(parts_of(part) for part in included if part))


@cache
def names_set_in(template: str) -> frozenset[str]:
    """What the template sets outside of any block, for itself and its parts."""
    return frozenset(node.target.name for node in parsed(template).body if isinstance(node, nodes.Assign))


def record_branches(render_all: Callable[[], object]) -> Branches:
    """Every condition of the templates rendered, by template, line and number on that line, and the values it had."""
    found: Branches = {}

    def went(point: tuple[str, int, int], value: object) -> object:
        found[point].add(bool(value))
        return value

    def with_recorder(tree, name, *rest, **options):
        for node in tree.find_all((nodes.If, nodes.CondExpr)):
            point = (name, node.lineno, sum(known[:2] == (name, node.lineno) for known in found))
            found[point] = set()
            call = nodes.Call(nodes.Name("went", "load"), [nodes.Const(point), node.test], [], None, None)
            node.test = call.set_lineno(node.lineno).set_environment(environment)
        return generate(tree, name, *rest, **options)

    render.environment.cache_clear()
    environment = render.environment()
    generate = environment._generate
    environment.globals["went"] = went
    environment._generate = with_recorder  # the hook that jinja2 provides for this
    render_all()
    render.environment.cache_clear()
    return found


def assert_both_ways(template: str, branches: Branches) -> None:
    """Each condition of a template was true in one case and false in another."""
    if "{% if" in (paths.template_dir() / template).read_text():
        assert any(name == template for name, *_ in branches), f"no golden case renders {template}"
    lines = (paths.template_dir() / template).read_text().splitlines()
    one_way = {line for (name, line, _), ways in branches.items() if name == template and ways != {True, False}}
    assert not one_way, "always the same way:\n" + "\n".join(f"{template}:{n}: {lines[n - 1]}" for n in sorted(one_way))


def assert_tidy(text: str) -> None:
    """Nothing in a generated source shows that it was generated."""
    code = re.sub(r"//[^\n]*", "", text)
    assert "\t" not in text
    assert not re.findall(r"[ \t]+$", text, re.MULTILINE)
    assert not re.findall(r"[^ \n] *//$", text, re.MULTILINE)  # an empty comment behind code
    assert "\n\n\n" not in text
    assert not re.findall(r"\b(?:None|True|False|Undefined|nan|inf)\b", code)
    assert "{{" not in code.replace("{{}}", "") and "{%" not in text and "\ue000" not in text
    for opening, closing in ("{}", "()", "[]"):
        assert code.count(opening) == code.count(closing)
    assert text.endswith("}\n") or text.endswith(";\n")
