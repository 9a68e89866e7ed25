"""Records behave as frozen dataclasses do, and define themselves without compiling anything."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys

import pytest

from jitgen.records import record


@record
class Point:
    """A record with a default and a field that does not count."""

    x: int
    y: int = 2
    label: str = dataclasses.field(default="", compare=False)

    @property
    def total(self) -> int:
        return self.x + self.y


@record(eq=False)
class Named:
    name: str


def test_values_come_by_position_name_and_default() -> None:
    assert (Point(1).total, Point(1, 5).total, Point(y=3, x=1).total) == (3, 6, 4)
    assert repr(Point(1, label="a")) == "Point(x=1, y=2, label='a')"


@pytest.mark.parametrize(
    ("args", "given", "message"),
    [
        ((), {}, "Point lacks x"),
        ((1, 2, "a", 4), {}, "Point takes 3 values, got 4"),
        ((1,), {"x": 2}, "Point got two values for 'x'"),
        ((1,), {"z": 2}, "Point has no field 'z'"),
        ((), {"z": 2}, "Point has no field 'z'"),
    ],
)
def test_wrong_values_are_refused(args: tuple, given: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Point(*args, **given)


def test_equality_and_hash_are_those_of_the_compared_fields() -> None:
    assert Point(1, label="a") == Point(1, label="b") and hash(Point(1)) == hash(Point(1, label="b"))
    assert Point(1) != Point(2) and Point(1) != (1, 2, "")
    assert Named("a") != Named("a") and len({Named("a"), Named("a")}) == 2


def test_record_cannot_be_changed() -> None:
    point = Point(1)
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'x'"):
        point.x = 2
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot delete field 'x'"):
        del point.x


def test_what_reads_dataclasses_reads_records() -> None:
    assert dataclasses.is_dataclass(Point) and [f.name for f in dataclasses.fields(Point(1))] == ["x", "y", "label"]
    assert dataclasses.replace(Point(1, label="a"), y=7) == Point(1, 7)
    assert dataclasses.asdict(Point(1)) == {"x": 1, "y": 2, "label": ""}
    assert not dataclasses.fields(Point)[2].compare
    match Point(4, 5):
        case Point(x, y):
            assert (x, y) == (4, 5)


def test_copies_are_equal() -> None:
    point = Point(1, label="a")
    for made in (copy.copy(point), copy.deepcopy(point), pickle.loads(pickle.dumps(point))):
        assert made == point and made.label == "a"


def test_definition_compiles_nothing() -> None:
    program = (
        "import builtins\nfrom jitgen.records import record\n"
        "def fail(*args, **given): raise AssertionError('compiled')\n"
        "builtins.exec = builtins.eval = builtins.compile = fail\n"
        "@record\nclass A:\n    x: int = 1\n"
        "assert A() == A(1)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
