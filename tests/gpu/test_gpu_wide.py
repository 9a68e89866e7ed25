"""Head dims above 256 on CUDA, where two warps share rows of a prefill, against the oracle in float64."""

from __future__ import annotations

import pytest
import torch
from cascade_batch import SharedBatch
from gallery import CASES, Sizes
from gallery.rounding import inputs, largest_error, rounding_error
from norm_cases import MERGED, Sigmoid, StickBreaking
from serving_batch import Batch, poisoned

import jitgen
from jitgen import reference

DEVICE = "cuda"
TIMES_ROUNDING = 1.5  # largest error allowed, as a multiple of what rounding the weights and the output costs
CALLS = [(1, 301, "absolute"), (101, 301, "absolute"), (101, 301, "local"), (130, 130, "absolute"), (257, 67, "local")]
EDGES = [(63, 63, "absolute"), (64, 128, "absolute"), (65, 129, "absolute"), (127, 31, "local"), (256, 513, "absolute")]
LENGTHS = [(1, 1), (33, 33), (0, 40), (64, 65), (17, 1000), (127, 128), (128, 300), (129, 129), (257, 700), (5, 2049)]
LONG = [(40, 4001), (5, 30), (64, 2003), (100, 3000)]
SHARED = {
    "decode": ([1] * 19, [[(19, 1000)], [(1, 16 * (b % 5) + b + 1) for b in range(19)]]),
    "three": ([3, 1, 5, 2, 2], [[(5, 370)], [(2, 110), (3, 5)], [(1, 9), (1, 1), (1, 300), (1, 4), (1, 7)]]),
    "prefill": ([150, 3, 270, 1], [[(4, 640)], [(1, 150), (1, 3), (1, 275), (1, 1)]]),
}
EPS = torch.finfo(torch.bfloat16).eps


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def unit_rows(o, lse, b, h, q_idx):
    return o * torch.rsqrt(jitgen.row_sum(o * o) + 1e-6)


def by_largest(o, lse, b, h, q_idx):
    return o / (jitgen.row_max(o) + 1.0) * torch.sigmoid(lse)


# ---- dense calls -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sm80", "sm90_wide"])
def family(request):
    """Each prefill family that this device can run."""
    if request.param == "sm90_wide" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the sm90_wide family needs compute capability 9.0")
    return request.param


@pytest.fixture(params=["sm80", "sm90_wide", "decode"])
def any_family(request):
    """Each family that this device can run."""
    if request.param == "sm90_wide" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the sm90_wide family needs compute capability 9.0")
    return request.param


def check_dense(case, dtype, calls, family, head_dim=512):
    for q_len, kv_len, q_index in calls:
        z = Sizes(q_len, kv_len, head_dim=head_dim, device=DEVICE)
        variant, (q, k, v) = case.make(z), inputs(z, dtype)
        program = variant.trace().program
        want_lse = program.norm is None or program.norm.lse is not None
        want = reference.attention(q, k, v, variant, q_index=q_index, return_lse=want_lse)
        got = jitgen.attention(q, k, v, variant, q_index=q_index, return_lse=want_lse, family=family)
        where = f"q_len {q_len}, kv_len {kv_len}, {q_index}"
        if want_lse:
            (got, got_lse), (want, exact_lse) = got, want
            torch.testing.assert_close(got_lse.double(), exact_lse, rtol=1e-5, atol=5e-3, msg=lambda m: f"{where}: {m}")  # noqa: B023
        allowed = TIMES_ROUNDING * rounding_error(q, k, v, variant, want, q_index) + torch.finfo(dtype).eps * 1e-2
        error = largest_error(got, want)
        assert error <= allowed, f"{where}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_dense_kernel_is_the_oracle(case, family):
    check_dense(case, torch.bfloat16, CALLS, family)


@pytest.mark.parametrize("name", ["causal", "gpt_oss", "sigmoid", "stick_breaking", "gated_output"])
def test_dense_kernel_in_float16_is_the_oracle(name, family):
    check_dense(CASES[name], torch.float16, CALLS, family)


@pytest.mark.parametrize("name", ["causal", "gemma2", "alibi_slopes", "chunked", "stick_breaking"])
def test_dense_kernel_is_the_oracle_at_the_edges_of_tiles(name, family):
    check_dense(CASES[name], torch.bfloat16, EDGES, family)


@pytest.mark.parametrize("head_dim", [264, 384])
def test_head_dims_between_are_padded(head_dim):
    check_dense(CASES["causal"], torch.bfloat16, CALLS[:2], None, head_dim)


@pytest.mark.parametrize("output", [unit_rows, by_largest], ids=lambda f: f.__name__)
def test_output_transform_sees_whole_rows(output, family):
    q, k, v = (torch.randn(1, h, n, 512, device=DEVICE, dtype=torch.bfloat16) for h, n in ((4, 77), (2, 300), (2, 300)))
    variant = jitgen.Variant(mask_mod=causal, output_transform=output)
    want = reference.attention(q, k, v, variant)
    error = (jitgen.attention(q, k, v, variant, family=family).double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert error.max() <= 2 * EPS


@pytest.mark.parametrize("rows", [1, 4])
def test_few_rows_over_many_keys_are_cut_among_the_ctas(rows):
    q, k, v = (torch.randn(2, h, n, 512, device=DEVICE, dtype=torch.bfloat16) for h, n in ((8, rows), (2, 4099), (2, 4099)))
    want, exact_lse = reference.attention(q, k, v, jitgen.Variant(mask_mod=causal), return_lse=True)
    out, lse = jitgen.attention(q, k, v, jitgen.Variant(mask_mod=causal), return_lse=True)
    error = (out.double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert error.max() <= 2 * EPS
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-4)


# ---- plans -----------------------------------------------------------------------------------------------------------------


def check_plan(batch, variant, page_size, family=None, *, tolerance=2.0, **options):
    """Every row of every request, into buffers full of NaN; page_size 0: ragged keys."""
    layout = {"layout": "paged", "page_size": page_size} if page_size else {"layout": "ragged"}
    plan = batch.plan(variant, **layout, family=family, max_kv_len=4096, **options)
    exact, exact_lse = batch.expected(variant)
    out, lse = poisoned(plan, batch.q)
    lse = None if exact_lse.isnan().any() else lse
    if page_size:
        k, v, lists = batch.pages(page_size)
        jitgen.paged_attention(batch.q, (k, v), batch.csr(lists), plan, out=out, lse=lse)
    else:
        jitgen.ragged_attention(batch.q, *batch.ragged(), plan, out=out, lse=lse)
    assert not out.isnan().any()
    size = exact.norm(dim=-1)
    of_row = (out.double() - exact).norm(dim=-1)
    eps = torch.finfo(batch.dtype).eps
    assert (of_row <= tolerance * eps * size + 1e-6).all(), f"relative error {(of_row / size.clamp_min(1e-30)).max():.3g}"
    if lse is not None:
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=5e-3)
    return plan


def make_batch(lengths=LENGTHS, heads=8, kv_heads=2, dtype=torch.bfloat16, seed=0):
    return Batch(lengths, heads, kv_heads, 512, 512, dtype, DEVICE, seed)


def soft_cap():
    cap = 20.0
    return jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: cap * torch.tanh(s / cap), mask_mod=causal)


def every_hook():
    document = (torch.arange(8192, device=DEVICE) // 700).to(torch.int32)
    sinks, gate, cap = torch.linspace(-1, 2, 8, device=DEVICE), torch.linspace(-2, 2, 8, device=DEVICE), 30.0
    return jitgen.Variant(
        score_mod=lambda s, b, h, q_idx, kv_idx: cap * torch.tanh(s / cap),
        mask_mod=lambda b, h, q_idx, kv_idx: (document[q_idx] == document[kv_idx]) & (kv_idx <= q_idx),
        sink=sinks,
        output_transform=lambda o, lse, b, h, q_idx: o * torch.sigmoid(gate[h]),
        lse_transform=lambda lse, b, h, q_idx: lse * 1.4426950408889634,
    )


HOOKS = {
    "plain": lambda: None,
    "causal": lambda: causal,
    "soft_cap": soft_cap,
    "every_hook": every_hook,
    "unit_rows": lambda: jitgen.Variant(mask_mod=causal, output_transform=unit_rows),
    **{f"merged_{name}": lambda name=name: jitgen.Variant(softmax=MERGED[name], mask_mod=causal) for name in MERGED},
    "sigmoid": lambda: jitgen.Variant(mask_mod=causal, softmax=Sigmoid),
    "stick_breaking": lambda: jitgen.Variant(mask_mod=causal, softmax=StickBreaking),
}


@pytest.mark.parametrize("page_size", [0, 1, 3, 16, 64])
@pytest.mark.parametrize("mask", [None, causal], ids=["full", "causal"])
def test_requests_of_every_length_are_attended(family, page_size, mask):
    check_plan(make_batch(), mask, page_size, family)


def test_plan_has_a_kernel_for_few_rows_and_one_for_many():
    plan = check_plan(make_batch(), causal, 16)
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    assert [c.name for c in plan.classes] == ["decode", "sm90_wide" if is_hopper else "sm80"]


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("page_size", [0, 16])
def test_every_hook_is_taken(hooks, any_family, page_size):
    check_plan(make_batch([(3, 300), (1, 77), (70, 500), (2, 1300)]), HOOKS[hooks](), page_size, any_family)


@pytest.mark.parametrize("hooks", ["causal", "every_hook", "unit_rows", "merged_softmax"])
def test_long_requests_are_cut_and_joined(hooks, family):
    check_plan(make_batch(LONG), HOOKS[hooks](), 16, family)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (8, 1), (16, 1), (6, 2), (32, 4), (40, 1)])
def test_query_heads_share_kv_heads(any_family, heads, kv_heads):
    check_plan(make_batch([(2, 300), (1, 77), (20, 120)], heads, kv_heads, torch.float16), causal, 16, any_family)


@pytest.mark.parametrize("page_size", [0, 1, 16])
@pytest.mark.parametrize(
    "lengths", [[(1, n) for n in (1, 15, 16, 17, 33, 300, 1000, 4090, 5, 2049)], [(1, 4001)]], ids=["many", "one"]
)
def test_decode_steps_are_attended(lengths, page_size):
    plan = check_plan(make_batch(lengths), causal, page_size, max_q_len=1)
    assert [c.name for c in plan.classes] == ["decode"]


@pytest.mark.parametrize("name", ["decode", "three", "prefill"])
def test_requests_that_share_keys_get_what_each_gets_alone(name):
    shared = SharedBatch(*SHARED[name], 16, 8, 2, 512, dtype=torch.bfloat16, device=DEVICE)
    caches, cascade = shared.build()
    plan = shared.plan(causal, room=2, page_size=16, max_kv_len=4096).update(cascade, check=True)
    out, lse = poisoned(plan, shared.whole.q)
    jitgen.paged_attention(shared.whole.q, caches, cascade, plan, out=out, lse=lse)
    exact, exact_lse = shared.whole.expected(causal)
    assert not out.isnan().any()
    assert ((out.double() - exact).norm(dim=-1) <= 2 * EPS * exact.norm(dim=-1) + 1e-6).all()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=2e-4)


def test_states_of_parts_are_merged():
    a, b = (torch.randn(70, 8, 512, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    lse_a, lse_b = (torch.randn(70, 8, device=DEVICE) for _ in range(2))
    out, lse = jitgen.merge_state(a, lse_a, b, lse_b)
    weight = torch.sigmoid((lse_a - lse_b).double())[..., None]
    torch.testing.assert_close(out.double(), a.double() * weight + b.double() * (1 - weight), rtol=EPS, atol=EPS)
    torch.testing.assert_close(lse.double(), torch.logaddexp(lse_a.double(), lse_b.double()), rtol=1e-5, atol=1e-5)
