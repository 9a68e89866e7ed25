"""jitgen.append on the CPU: every way to say places, layouts, transforms, 8-bit caches, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from append_cases import assert_rows_close, check_append, check_written, make_cache, poisoned, random_rows, rotated

import jitgen
from jitgen.errors import LaunchError, ShapeMismatch, UnsupportedDtype, UnsupportedVariant, VariantError

BYTES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


@pytest.mark.parametrize("form", ["csr", "dense", "requests", "slots"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_rows_land_where_the_indices_say(form, layout):
    check_append("cpu", torch.bfloat16, torch.bfloat16, form=form, layout=layout, joined=layout == "HND", page_size=7)


@pytest.mark.parametrize("form", ["csr", "slots"])
def test_indices_may_be_int64_and_heads_odd(form):
    check_append("cpu", torch.float16, torch.float16, form=form, index_dtype=torch.int64, dims=(96, 33), heads=3, page_size=1)


@pytest.mark.parametrize("form", ["dense", "requests", "slots"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transform_is_fused(dtype, form):
    check_append("cpu", dtype, dtype, form=form, transform=True, dims=(64, 48))


@pytest.mark.parametrize("scale", ["number", "tensor", "head", "stored"])
@pytest.mark.parametrize("cache", BYTES, ids=str)
def test_rows_are_quantised(cache, scale):
    check_append("cpu", torch.bfloat16, cache, scale=scale, transform=scale == "stored", form="slots")


def test_float8_without_scale_is_a_conversion_that_saturates():
    kv = tuple(poisoned((2, 4, 1, 8), dtype, "cpu") for dtype in (torch.float8_e4m3fn, torch.float8_e5m2))
    values = torch.tensor([[0.0, -0.0, 1e9, -1e9, 0.0019, 2.0**-17, float("inf"), float("nan")]])
    jitgen.append(kv, values[None], values[None], slot_mapping=torch.tensor([5]))
    for cache, most in zip(kv, (448.0, 57344.0), strict=True):
        got = cache[1, 1, 0].float()
        assert got[7].isnan() and got[2] == most and got[3] == -most and got[6] == most
        assert torch.equal(got[:2].signbit(), torch.tensor([False, True]))


@pytest.mark.parametrize("cache", BYTES[:2], ids=str)
def test_float8_rounds_as_torch_does(cache):
    values = torch.randn(4096, generator=torch.Generator().manual_seed(3)) * torch.logspace(-8, 2, 4096, base=2.0)
    kv = tuple(poisoned((1, 64, 1, 64), cache, "cpu") for _ in range(2))
    jitgen.append(kv, values.view(64, 1, 64), values.view(64, 1, 64), slot_mapping=torch.arange(64))
    assert torch.equal(kv[0].flatten().view(torch.uint8), values.to(cache).view(torch.uint8))


def test_zero_rows_get_a_scale_that_divides():
    kv = tuple(poisoned((1, 4, 1, 8), torch.int8, "cpu") for _ in range(2))
    scales = tuple(torch.full((4, 1), -1.0) for _ in range(2))
    jitgen.append(kv, torch.zeros(1, 1, 8), torch.ones(1, 1, 8), slot_mapping=torch.tensor([2]), scales=scales)
    assert scales[0][2] == 1 and torch.equal(kv[0][0, 2], torch.zeros(1, 8, dtype=torch.int8))
    assert torch.equal(kv[1][0, 2], torch.full((1, 8), 127, dtype=torch.int8))


@pytest.mark.parametrize("joined", [False, True])
def test_mla_cache_takes_both_parts(joined):
    storage = poisoned((5, 16, 576), torch.bfloat16, "cpu")
    kv = (
        (storage[..., :512], storage[..., 512:])
        if joined
        else tuple(poisoned((5, 16, d), torch.bfloat16, "cpu") for d in (512, 64))
    )
    ckv, kpe = (random_rows(i, 11, d, dtype=torch.bfloat16, device="cpu") for i, d in enumerate((512, 64)))
    weight, rope, positions = torch.randn(512), jitgen.Rope(interleave=True), torch.arange(11) + 20

    def norm_and_rotate(ckv, kpe, b, kv_h, pos):
        return ckv / ckv.rms(1e-6) * weight, rope(kpe, pos)

    slots = torch.randperm(80, generator=torch.Generator().manual_seed(0))[:11]
    jitgen.append(kv, ckv, kpe, slot_mapping=slots, positions=positions, transform=norm_and_rotate)
    x = ckv.double()
    want = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight.double()
    assert_rows_close(kv[0].reshape(80, 512)[slots], want)
    assert_rows_close(kv[1].reshape(80, 64)[slots], rotated(kpe[:, None], positions, interleave=True)[:, 0])


def test_rotation_may_be_by_another_position_and_followed_by_more():
    rope, start = jitgen.Rope(), torch.tensor([3, 10])
    k, v = (random_rows(i, 6, 2, 64, dtype=torch.float32, device="cpu") for i in range(2))
    requests, positions = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([3, 4, 5, 10, 11, 12])

    def from_own_start(k, v, b, kv_h, pos):
        return 2.0 * rope(k, pos - start[b]), rope(v, pos)

    cache = make_cache([6, 13], 4, 2, (64, 64), torch.float32, "cpu")
    jitgen.append(cache.kv, k, v, cache.table, positions, requests, transform=from_own_start)
    slots = cache.slots(requests, positions)
    check_written(cache.rows("k")[slots], 2 * rotated(k, positions - start[requests]), "none", None, slots)
    check_written(cache.rows("v")[slots], rotated(v, positions), "none", None, slots)


def test_captured_values_are_arguments_and_the_place_in_memory_is_not_compiled_in(monkeypatch):
    from jitgen import kv_launch

    cache, slots = make_cache([40], 8, 1, (32, 32), torch.float32, "cpu"), torch.arange(4)
    k = torch.ones(4, 1, 32)
    built = []
    original = kv_launch.module_path
    monkeypatch.setattr(kv_launch, "module_path", lambda spec: built.append(spec) or original(spec))
    for factor in (1.25, 2.5):
        jitgen.append(cache.kv, k, k, slot_mapping=slots, transform=lambda k, v, b, kv_h, pos, f=factor: (k * f, v))
        assert (cache.rows("k")[:4] == factor).all()
    assert len(built) <= 1


def test_a_place_that_is_not_there_is_an_error_and_the_others_are_written():
    cache = make_cache([8], 4, 1, (8, 8), torch.float32, "cpu")
    k = torch.ones(2, 1, 8)
    for places in (
        {"slot_mapping": torch.tensor([1000, 2])},
        {"page_table": cache.table[:, :2], "positions": torch.tensor([8, 2]), "batch_indices": torch.tensor([0, 0])},
        {"page_table": (cache.indptr, cache.indices), "positions": torch.tensor([1, 2]), "batch_indices": torch.tensor([1, 0])},
        {"page_table": cache.table, "q_indptr": torch.tensor([0, 2]), "kv_len": torch.tensor([1])},
    ):
        cache.k.fill_(0)
        with pytest.raises(LaunchError, match="not there"):
            jitgen.append(cache.kv, k, k, **places)
        assert cache.k.sum() == 8


@pytest.mark.parametrize("starts", [[-(10**9), 2, 4], [10**9, 10**9 + 2, 4], [-1, 2, 4]], ids=["below", "above", "one_below"])
def test_page_lists_that_begin_nowhere_are_not_followed(starts):
    cache = make_cache([8, 8], 4, 1, (8, 8), torch.float32, "cpu")
    k = torch.ones(2, 1, 8)
    cache.k.fill_(0)
    with pytest.raises(LaunchError, match="not there"):  # of the first token: the second's list is as it should be
        jitgen.append(cache.kv, k, k, (torch.tensor(starts), torch.arange(4)), torch.tensor([1, 0]), torch.tensor([0, 1]))
    assert cache.k.sum() == 8 * (starts[1] == 2)


KV = (torch.zeros(4, 16, 2, 64), torch.zeros(4, 16, 2, 64))
ROWS = torch.zeros(3, 2, 64)
SLOTS = {"slot_mapping": torch.zeros(3, dtype=torch.int64)}
NEED_POSITION = lambda k, v, b, kv_h, pos: (k * pos, v)  # noqa: E731
INT8 = tuple(t.to(torch.int8) for t in KV)
WRONG = {
    "nothing": ({}, ShapeMismatch, "nothing says where the tokens go"),
    "both": ({**SLOTS, "page_table": torch.zeros(1, 4, dtype=torch.int32)}, ShapeMismatch, "each says where tokens go"),
    "one_of_two": ({"q_indptr": torch.tensor([0, 3])}, ShapeMismatch, "q_indptr and kv_len belong together"),
    "heads": ({**SLOTS, "k": torch.zeros(3, 4, 64)}, ShapeMismatch, "k has 4 heads of 64, the k cache has 2 of 64"),
    "layout": ({**SLOTS, "kv_layout": "HND"}, ShapeMismatch, "k has 2 heads of 64, the k cache has 16 of 64"),
    "tokens": ({**SLOTS, "v": torch.zeros(4, 2, 64)}, ShapeMismatch, "v has 4 tokens, k has 3 (axis 0). Both must match."),
    "cache": ({**SLOTS, "kv": KV[0]}, ShapeMismatch, "the kv cache has shape (4, 16, 2, 64), expected a pair"),
    "shared_rows": ({**SLOTS, "kv": (KV[0], KV[1][:1].expand(4, 16, 2, 64))}, ShapeMismatch, "rows of it share memory"),
    "dtype": ({**SLOTS, "kv": tuple(t.double() for t in KV)}, UnsupportedDtype, "the k cache has dtype float64"),
    "slots": ({"slot_mapping": torch.zeros(2, dtype=torch.int64)}, ShapeMismatch, "slot_mapping has 2 entries, expected 3"),
    "int8": ({**SLOTS, "kv": INT8}, VariantError, "the k cache is int8 and there is no scale for it"),
    "scale_of_float": ({**SLOTS, "scales": (1.0, 1.0)}, VariantError, "scales were given, and the k cache is float32"),
    "scale": ({**SLOTS, "kv": INT8, "scales": (0.0, 1.0)}, VariantError, "the scale of k is 0.0, expected a finite number"),
    "scale_shape": ({**SLOTS, "kv": INT8, "scales": (torch.ones(3), 1.0)}, ShapeMismatch, "the scale of k has shape (3,)"),
    "one_scale": ({**SLOTS, "kv": INT8, "scales": 1.0}, VariantError, "scales is 1.0, expected a pair (k_scale, v_scale)"),
    "no_cache": ({**SLOTS, "kv": "x"}, TypeError, "the kv cache is a str, expected a pair"),
    "no_rows": ({**SLOTS, "k": [1.0]}, TypeError, "k is a list, expected a torch.Tensor"),
    "position": ({**SLOTS, "transform": NEED_POSITION}, VariantError, "the transform uses pos"),
    "arity": ({**SLOTS, "transform": lambda k, v: (k, v)}, VariantError, "takes 2 positional parameters, expected 5"),
    "result": ({**SLOTS, "transform": lambda k, v, b, h, pos: k}, UnsupportedVariant, "returned a Sym, expected (k, v)"),
    "mixed": ({**SLOTS, "transform": lambda k, v, b, h, pos: (k + v, v)}, UnsupportedVariant, "computes k from v"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(case):
    given, error, text = WRONG[case]
    call = {"kv": KV, "k": ROWS, "v": ROWS, **given}
    with pytest.raises(error) as caught:
        jitgen.append(**call)
    assert text in str(caught.value)


def test_captured_tensor_must_cover_heads_and_rows():
    for shape in ((1, 64), (2, 32)):
        bias = torch.zeros(shape)
        with pytest.raises(ShapeMismatch, match="captured tensor 'bias' has size"):
            jitgen.append(KV, ROWS, ROWS, transform=lambda k, v, b, kv_h, pos, bias=bias: (k + bias[kv_h], v), **SLOTS)


def test_a_row_is_rotated_once_and_used_after_it_as_it_is():
    rope = jitgen.Rope()
    places = {**SLOTS, "positions": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(UnsupportedVariant, match="rotates a row more than once"):
        jitgen.append(KV, ROWS, ROWS, transform=lambda k, v, b, h, pos: (rope(k, pos) + rope(k, pos + 1), v), **places)
    with pytest.raises(UnsupportedVariant, match="before and after its rotation"):
        jitgen.append(KV, ROWS, ROWS, transform=lambda k, v, b, h, pos: (rope(k, pos) + k, v), **places)
