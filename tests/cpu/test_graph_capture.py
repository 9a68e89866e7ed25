"""What calls in a CUDA graph keep, and for how long: with a driver that is a stand-in, and the C library's own semaphores."""

from __future__ import annotations

import ctypes
import weakref

import pytest
import torch

from jitgen import dense_split, graph_capture
from jitgen.dense_split import SplitCall
from jitgen.graph_capture import GraphTable, capture_number

POST = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Driver:
    """Of one stream, which captures the graph that ``number`` names."""

    def __init__(self):
        self.number, self.refusal = 1, 0
        self.owned = {}  # the functions of user objects, by the graph that owns them

    def cuStreamGetCaptureInfo_v2(self, stream, status, number, graph, *rest):
        number._obj.value, graph._obj.value = self.number, 0x1000 * self.number
        return 0

    def cuUserObjectCreate(self, made, pointer, function, count, flags):
        assert (count, flags) == (1, 1)
        made._obj.value = 7
        self._made = pointer.value, function.value
        return self.refusal

    def cuGraphRetainUserObject(self, graph, made, count, flags):
        assert (made.value, count, flags) == (7, 1, 1)  # the graph's is the only reference
        self.owned.setdefault(graph.value // 0x1000, []).append(self._made)
        return 0

    def destroy(self, number):
        for pointer, function in self.owned.pop(number, []):
            POST(function)(pointer)


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(graph_capture, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: driver.number != 0)
    return driver


def test_what_a_graph_keeps_goes_with_it(driver):
    table = GraphTable()
    for driver.number in (1, 2, 3):
        table.of(capture_number(0), 0)["room"] = object()
        assert table.of(driver.number, 0) is table.of(driver.number, 0)
    table.drop()
    assert len(table) == 3
    driver.destroy(2)
    for _ in range(2):
        table.drop()
        assert list(table._graphs) == [1, 3]
    driver.destroy(1)
    driver.destroy(3)
    table.drop()
    assert len(table) == 0


def test_a_driver_that_tells_no_end_keeps_everything(driver):
    table, driver.refusal = GraphTable(), 801
    table.of(1, 0)
    driver.destroy(1)
    table.drop()
    assert len(table) == 1


def test_a_driver_that_tells_no_number_has_a_graph_for_each_call(driver, monkeypatch):
    monkeypatch.setattr(driver, "cuStreamGetCaptureInfo_v2", lambda *_: 1)
    numbers = [capture_number(0) for _ in range(3)]
    assert len(set(numbers)) == 3 and all(numbers)
    driver.number = 0
    assert capture_number(0) == 0


class Room:
    def __init__(self, call, stream, tail, *, is_captured):
        self.is_captured = is_captured


def test_rooms_of_captured_calls_live_as_long_as_their_graph(driver, monkeypatch):
    monkeypatch.setattr(dense_split, "Room", Room)
    monkeypatch.setattr(dense_split, "_captured", GraphTable())
    monkeypatch.setattr(dense_split, "_rooms", {})
    call = object.__new__(SplitCall)
    call.kernel, call.sizes, call.is_shared, call.device = "kernel", (1, 2, 3, 4), False, torch.device("cuda", 0)
    kept = []
    for driver.number in range(1, 6):
        room = call._room(0, capture_number(0), b"")
        assert room.is_captured and call._room(0, capture_number(0), b"") is room
        kept.append(weakref.ref(room))
        del room
        driver.destroy(driver.number - 1)
    assert [r() is None for r in kept] == [True, True, True, False, False]  # the fifth call came before the fourth graph's end
    driver.number = 0
    driver.destroy(5)
    assert not call._room(0, 0, b"").is_captured
    assert all(r() is None for r in kept)
