"""What serving calls refuse: the message names the plan's value and the call's, before anything is launched."""

from __future__ import annotations

import itertools

import pytest
import torch
from serving_batch import Batch

import jitgen
from jitgen.errors import (
    GradNotSupported,
    LaunchError,
    PlanMismatch,
    ShapeMismatch,
    UnsupportedDevice,
    UnsupportedDtype,
    VariantError,
)

PAGE = 16


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


@pytest.fixture
def batch():
    return Batch([(1, 40), (2, 20)])


@pytest.fixture
def plan(batch):
    return batch.plan()


@pytest.fixture
def paged(batch):
    k, v, lists = batch.pages(PAGE)
    return (k, v), batch.csr(lists)


# ---- making a plan ---------------------------------------------------------------------------------------------------------

PLANS = [
    (dict(max_batch=0), ShapeMismatch, "max_batch is 0, expected a positive integer"),
    (dict(num_kv_heads=3), ShapeMismatch, "num_q_heads is 4, num_kv_heads 3. The number of query heads must be a multiple"),
    (dict(head_dim=20), ShapeMismatch, "head_dim is 20, expected a multiple of 8 from 8 to 512"),
    (dict(dtype=torch.float64), UnsupportedDtype, "dtype is float64, expected float32 or bfloat16 or float16 on cpu"),
    (dict(dtype=torch.float8_e4m3fn), UnsupportedDtype, "It is that of q: a cache of 8 bits is kv_dtype=torch.float8_e4m3fn"),
    (dict(dtype="bfloat16"), TypeError, "dtype is 'bfloat16' of type str, expected one like torch.bfloat16"),
    (dict(kv_dtype="int8"), TypeError, "kv_dtype is 'int8' of type str, expected one like torch.bfloat16"),
    (dict(layout="dense"), ShapeMismatch, "layout='dense' is not a layout of a plan. Use 'paged' or 'ragged'"),
    (dict(max_kv_len=-1), ShapeMismatch, "max_kv_len is -1, expected a positive integer or None"),
    (dict(max_q_len=1.5), ShapeMismatch, "max_q_len is 1.5, expected a positive integer or None"),
    (dict(page_size=0), ShapeMismatch, "page_size is 0, expected a positive integer or None"),
    (dict(page_size="16"), ShapeMismatch, "page_size is '16', expected a positive integer or None"),
    (dict(page_size=16, layout="ragged"), ShapeMismatch, "page_size is 16 and layout 'ragged': only paged plans"),
    (dict(split="fixed", kv_split=0), ShapeMismatch, "kv_split is 0, expected a positive integer or None"),
    (dict(split="even"), ShapeMismatch, "split='even' is not a way to split"),
    (dict(split="fixed"), ShapeMismatch, "split='fixed' and kv_split=None do not go together"),
    (dict(kv_split=64), ShapeMismatch, "split='balanced' and kv_split=64 do not go together"),
    (dict(family="decode"), VariantError, "family='decode' needs a plan on cuda, this one is on cpu"),
    (dict(device="meta"), UnsupportedDevice, "device is meta, expected cpu or cuda"),
]


class Four:
    """An integer of somebody else's, as NumPy has them."""

    def __index__(self) -> int:
        return 4


def test_plan_takes_integers_of_any_type():
    plan = jitgen.Plan(Four(), Four(), Four(), Four(), 16, max_kv_len=Four(), dtype=torch.float32, device="cpu")
    assert plan.max_batch == plan.max_tokens == plan.num_q_heads == plan.max_kv_len == 4
    assert all(type(value) is int for value in (plan.max_batch, plan.num_kv_heads, plan.head_dim_v, plan.max_kv_len))


@pytest.mark.parametrize("change, error, message", PLANS, ids=[next(iter(p[0])) for p in PLANS])
def test_plan_names_what_it_cannot_be_made_from(change, error, message):
    given = (
        dict(max_batch=2, max_tokens=8, num_q_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32, device="cpu") | change
    )
    sizes = [given.pop(n) for n in ("max_batch", "max_tokens", "num_q_heads", "num_kv_heads", "head_dim")]
    with pytest.raises(error) as caught:
        jitgen.Plan(*sizes, **given)
    assert message in str(caught.value)


# ---- update ----------------------------------------------------------------------------------------------------------------

UPDATES = [
    ([0, 1, 3], [40], ShapeMismatch, "q_indptr has 3 entries, kv_len 1. Expected batch + 1 and batch"),
    ([0, 1, 2, 3], [1, 1, 1], PlanMismatch, "the lengths are those of 3 requests, the plan was made for max_batch=2"),
    ([0, 1, 4], [40, 20], PlanMismatch, "q_indptr ends with 4 rows, the plan was made for max_tokens=3"),
    ([1, 2, 3], [40, 20], ShapeMismatch, "q_indptr is [1, 2, 3], expected numbers that start with 0 and never fall"),
    ([0, 2, 1], [40, 20], ShapeMismatch, "q_indptr is [0, 2, 1], expected numbers that start with 0 and never fall"),
    ([0, 1, 3], [40, -1], ShapeMismatch, "kv_len is [40, -1], expected no negative length"),
    ([0, 1, 3], [101, 1], PlanMismatch, "a request has 101 keys, the plan was made for max_kv_len=100"),
    ([0, 0, 3], [1, 90], PlanMismatch, "a request has 3 query rows, the plan was made for max_q_len=2"),
]


@pytest.mark.parametrize("q_indptr, kv_len, error, message", UPDATES)
def test_update_names_the_length_that_does_not_fit(batch, q_indptr, kv_len, error, message):
    plan = batch.plan(max_kv_len=100, max_q_len=2)
    with pytest.raises(error) as caught:
        plan.update(batch.ints(q_indptr), batch.ints(kv_len))
    assert message in str(caught.value)


def test_update_refuses_more_rows_than_keys_where_positions_are_read(batch):
    plan = batch.plan(causal)
    with pytest.raises(ShapeMismatch, match=r"request 1 has q_len 2 and kv_len 1, .* append them first"):
        plan.update(batch.ints([0, 1, 3]), batch.ints([40, 1]))
    batch.plan().update(batch.ints([0, 1, 3]), batch.ints([40, 1]))  # no position is read


@pytest.mark.parametrize("layout", ["paged", "ragged"])
def test_update_refuses_64_bit_numbers_whose_low_bits_would_fit(batch, layout):
    plan, high = batch.plan(layout=layout), 2**32  # plus a valid number
    q_indptr, kv_len = batch.q_indptr().long(), batch.kv_len().long()
    other = {"kv_len": kv_len} if layout == "paged" else {"kv_indptr": batch.kv_indptr().long()}
    with pytest.raises(PlanMismatch, match="q_indptr ends with 2147483647 rows"):
        plan.update(q_indptr + torch.tensor([0, 0, high]), **other)
    with pytest.raises(ShapeMismatch, match=r"kv_len is .*, expected at most 268435456 keys"):
        plan.update(q_indptr, **{name: t + torch.tensor([0] * (len(t) - 1) + [high]) for name, t in other.items()})


def test_call_refuses_64_bit_page_numbers_whose_low_bits_would_fit(batch, plan, paged):
    kv, (indptr, indices) = paged
    with pytest.raises(LaunchError, match="page"):
        jitgen.paged_attention(batch.q, kv, (indptr, indices.long() + 2**32), plan)


def test_update_refuses_tensors_of_other_kinds(plan, batch):
    with pytest.raises(UnsupportedDtype, match="kv_len has dtype float32, expected int32 or int64"):
        plan.update(batch.q_indptr(), batch.kv_len().float())
    with pytest.raises(ShapeMismatch, match=r"q_indptr has shape \(1, 3\), expected 1 dimension"):
        plan.update(batch.q_indptr()[None], batch.kv_len())
    with pytest.raises(TypeError, match=r"q_indptr is a list, expected a torch.Tensor of int32 or int64"):
        plan.update([0, 1], batch.kv_len())


def test_update_takes_what_belongs_to_the_layout(plan, batch):
    with pytest.raises(PlanMismatch, match="layout='paged', whose update takes kv_len"):
        plan.update(batch.q_indptr(), kv_indptr=batch.kv_indptr())
    with pytest.raises(PlanMismatch, match="was given no kv_len"):
        plan.update(batch.q_indptr())
    ragged = batch.plan(layout="ragged")
    with pytest.raises(PlanMismatch, match="layout='ragged', whose update takes kv_indptr"):
        ragged.update(batch.q_indptr(), batch.kv_len())
    with pytest.raises(ShapeMismatch, match="kv_indptr has 3 entries, kv_len 1, expected one more"):
        ragged.update(batch.q_indptr(), batch.ints([1]), kv_indptr=batch.kv_indptr())


# ---- calls -----------------------------------------------------------------------------------------------------------------


def test_call_needs_lengths(batch, paged):
    plan = jitgen.Plan(2, 3, 4, 2, 16, dtype=torch.float32, device="cpu")
    with pytest.raises(PlanMismatch, match=r"Call plan.update\(q_indptr, kv_len\) first"):
        jitgen.paged_attention(batch.q, *paged, plan)


def test_call_names_the_layout(batch, plan):
    with pytest.raises(PlanMismatch, match="made for layout='paged', this is the call for 'ragged' keys"):
        jitgen.ragged_attention(batch.q, *batch.ragged(), plan)


def test_call_names_heads_of_the_plan_and_its_own(batch, plan, paged):
    (k, v), table = paged
    with pytest.raises(PlanMismatch, match="q has 8 heads of head_dim 16, the plan was made for num_q_heads=4 and head_dim=16"):
        jitgen.paged_attention(torch.zeros(3, 8, 16), (k, v), table, plan)
    with pytest.raises(PlanMismatch, match=r"k and v have 1 heads of head_dim 16 and 16, .* num_kv_heads=2"):
        jitgen.paged_attention(batch.q, (k[:, :, :1], v[:, :, :1]), table, plan)
    with pytest.raises(PlanMismatch, match="head_dim_v=16"):
        jitgen.paged_attention(batch.q, (k, v[..., :8]), table, plan)
    with pytest.raises(PlanMismatch, match="q has dtype bfloat16, the plan was made for dtype=float32"):
        jitgen.paged_attention(batch.q.bfloat16(), (k, v), table, plan)
    with pytest.raises(PlanMismatch, match="k or v has dtype float16"):
        jitgen.paged_attention(batch.q, (k.half(), v.half()), table, plan)


def test_call_names_the_page_size_of_the_plan_and_its_own(batch, paged):
    with pytest.raises(PlanMismatch, match="the kv cache has pages of 16 keys, the plan was made for page_size=32"):
        jitgen.paged_attention(batch.q, *paged, batch.plan(page_size=32))
    jitgen.paged_attention(batch.q, *paged, batch.plan(page_size=16))


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedDevice, match="device is cuda, and torch finds no GPU here"):
        jitgen.Plan(2, 3, 4, 2, 16, device="cuda")


@pytest.mark.parametrize("scale", ["x", float("nan"), torch.tensor(0.5)])
def test_call_names_a_scale_that_is_no_number(batch, plan, paged, scale):
    with pytest.raises(VariantError, match=r"scale is .* expected a finite number"):
        jitgen.paged_attention(batch.q, *paged, plan, scale=scale)


def test_call_refuses_an_out_whose_rows_are_one(batch, plan, paged):
    out = torch.zeros(1, 1, 16).expand(3, 4, 16)
    with pytest.raises(ShapeMismatch, match="rows of it share memory"):
        jitgen.paged_attention(batch.q, *paged, plan, out=out)


def test_call_names_what_is_captured(batch, plan, paged):
    slopes = torch.ones(4)
    biased = jitgen.Variant(score_mod=lambda s, b, h, q_idx, kv_idx: s * slopes[h])
    with pytest.raises(VariantError, match=r"bind got 'slope', which no hook captures. Captured: slopes\."):
        jitgen.paged_attention(batch.q, *paged, plan, variant=biased, slope=slopes)
    with pytest.raises(VariantError, match=r"Captured: nothing\."):
        jitgen.paged_attention(batch.q, *paged, plan, slope=slopes)


def test_call_suggests_the_other_kv_layout(batch):
    cache = torch.zeros(4, 2, 2, PAGE, 16)  # HND
    with pytest.raises(PlanMismatch, match=r'k and v have 16 heads .* Is kv_layout right \("NHD" or "HND"\)\?'):
        jitgen.paged_attention(batch.q, cache, batch.block_table([[0, 1, 2], [3, 1]]), batch.plan())


def test_call_names_rows_of_the_plan_and_its_own(batch, plan, paged):
    with pytest.raises(PlanMismatch, match=r"q has 2 rows, plan.update was given 3"):
        jitgen.paged_attention(batch.q[:2], *paged, plan)
    with pytest.raises(PlanMismatch, match="q has 9 rows, the plan was made for max_tokens=3"):
        jitgen.paged_attention(torch.zeros(9, 4, 16), *paged, plan)


def test_call_names_the_form_of_a_cache(batch, plan, paged):
    table = paged[1]
    for cache in (torch.zeros(4, PAGE, 2, 16), torch.zeros(4, 3, PAGE, 2, 16)):
        with pytest.raises(ShapeMismatch, match=r"the kv cache has shape .* expected a pair of \[pages, page_size"):
            jitgen.paged_attention(batch.q, cache, table, plan)
    with pytest.raises(ShapeMismatch, match=r"the v cache has shape \(4, 16, 32\)"):
        jitgen.paged_attention(batch.q, (torch.zeros(4, PAGE, 2, 16), torch.zeros(4, PAGE, 32)), table, plan)
    with pytest.raises(ShapeMismatch, match="kv_layout='NDH' is not a layout"):
        jitgen.paged_attention(batch.q, torch.zeros(4, 2, PAGE, 2, 16), table, plan, kv_layout="NDH")
    with pytest.raises(ShapeMismatch, match="the kv cache has pages of 0 keys"):
        jitgen.paged_attention(batch.q, torch.zeros(4, 2, 0, 2, 16), table, plan)
    with pytest.raises(ShapeMismatch, match=r"expected unit stride along head_dim"):
        jitgen.paged_attention(batch.q, torch.zeros(4, 2, PAGE, 16, 2).mT, table, plan)


def test_call_names_the_form_of_a_table(batch, plan, paged):
    cache = paged[0]
    with pytest.raises(TypeError, match="page_table is a str"):
        jitgen.paged_attention(batch.q, cache, "pages", plan)
    with pytest.raises(UnsupportedDtype, match="block_table has dtype float32"):
        jitgen.paged_attention(batch.q, cache, torch.zeros(2, 3), plan)
    with pytest.raises(PlanMismatch, match=r"the page table has 1 requests, plan.update was given 2"):
        jitgen.paged_attention(batch.q, cache, torch.zeros(1, 3, dtype=torch.int32), plan)
    with pytest.raises(UnsupportedDevice, match="the page table is on meta, the plan on cpu"):
        jitgen.paged_attention(batch.q, cache, torch.zeros(2, 3, dtype=torch.int32, device="meta"), plan)


def test_page_lists_must_be_long_enough(batch, plan, paged):
    (k, v), (indptr, indices) = paged
    lists = batch.pages(PAGE)[2]
    with pytest.raises(ShapeMismatch, match="request 0 has kv_len 40, which takes 3 pages of 16, but its page list has 2"):
        jitgen.paged_attention(batch.q, (k, v), torch.zeros(2, 2, dtype=torch.int32), plan)
    with pytest.raises(ShapeMismatch, match="request 1 has kv_len 20, which takes 2 pages of 16, but its page list has 1"):
        jitgen.paged_attention(batch.q, (k, v), (indptr, indices[:4]), plan)
    table = jitgen.PageTable.csr(indptr, indices)
    jitgen.paged_attention(batch.q, (k, v), table, plan)
    indptr[2] = 4  # in place: looked at again
    with pytest.raises(ShapeMismatch, match="request 1 has kv_len 20"):
        jitgen.paged_attention(batch.q, (k, v), table, plan)
    with torch.inference_mode():  # whose tensors do not say that they changed
        table = jitgen.PageTable.csr(*batch.csr(lists))
        jitgen.paged_attention(batch.q, (k, v), table, plan)
        table.indptr[2] = 4
        with pytest.raises(ShapeMismatch, match="request 1 has kv_len 20"):
            jitgen.paged_attention(batch.q, (k, v), table, plan)
    numbers = batch.csr(lists)[0].int().numpy()  # nor do those that NumPy writes to
    table = jitgen.PageTable.csr(torch.from_numpy(numbers), batch.csr(lists)[1])
    jitgen.paged_attention(batch.q, (k, v), table, plan)
    numbers[:] = [10**9, 10**9 + 3, 10**9 + 5]
    with pytest.raises(ShapeMismatch, match="request 0 has kv_len 40"):
        jitgen.paged_attention(batch.q, (k, v), table, plan)


@pytest.mark.parametrize("page", [-1, 99])
def test_pages_that_do_not_exist_are_an_error(batch, plan, paged, page):
    (k, v), (indptr, indices) = paged
    at = int(indptr[1]) + 1
    indices[at] = page
    message = (
        rf"request 1 names a page that the cache does not have: entry 1 is {page}, expected 0 to .* the first 2, .* 20 keys"
    )
    block_table = torch.stack([indices[:3], torch.cat([indices[indptr[1] : at + 1], torch.tensor([-1])])])
    for table in ((indptr, indices), (indptr.int(), indices.int()), block_table):
        with pytest.raises(LaunchError, match=message):
            jitgen.paged_attention(batch.q, (k, v), table, plan)


@pytest.mark.parametrize("starts", [[0, 4, 2], [-1, 2, 4]], ids=["falls", "negative"])
def test_page_lists_that_begin_nowhere_are_an_error(batch, plan, paged, starts):
    (k, v), _ = paged
    table = torch.tensor(starts), torch.arange(8) % k.shape[0]
    with pytest.raises(ShapeMismatch, match=r"indptr of the page table is \[.*\], expected numbers from 0 on that never fall"):
        jitgen.paged_attention(batch.q, (k, v), table, plan)


def test_ragged_keys_that_do_not_exist_are_an_error(batch):
    plan = batch.plan(layout="ragged")
    k, v = batch.ragged()
    with pytest.raises(LaunchError, match="reach past the rows of k and v"):
        jitgen.ragged_attention(batch.q, k[:-1], v[:-1], plan)


def test_results_must_fit(batch, plan, paged):
    with pytest.raises(ShapeMismatch, match=r"out has shape \(3, 4, 8\), expected \(3, 4, 16\)"):
        jitgen.paged_attention(batch.q, *paged, plan, out=torch.zeros(3, 4, 8))
    with pytest.raises(UnsupportedDtype, match="out has dtype bfloat16, q has float32"):
        jitgen.paged_attention(batch.q, *paged, plan, out=torch.zeros(3, 4, 16, dtype=torch.bfloat16))
    with pytest.raises(ShapeMismatch, match=r"lse has shape \(4, 3\), expected \(3, 4\)"):
        jitgen.paged_attention(batch.q, *paged, plan, lse=torch.zeros(4, 3))
    with pytest.raises(UnsupportedDtype, match="lse has dtype float64"):
        jitgen.paged_attention(batch.q, *paged, plan, lse=torch.zeros(3, 4, dtype=torch.float64))


def test_call_names_what_is_no_tensor(batch, plan, paged):
    with pytest.raises(TypeError, match=r"q is a list, expected a torch\.Tensor"):
        jitgen.paged_attention(batch.q.tolist(), *paged, plan)
    with pytest.raises(TypeError, match=r"lse is a bool, expected a torch\.Tensor"):
        jitgen.paged_attention(batch.q, *paged, plan, lse=True)
    ragged = batch.update(batch.plan(layout="ragged"))
    with pytest.raises(ShapeMismatch, match=r"k has shape .*, expected \[total_kv, num_kv_heads, head_dim\]"):
        jitgen.ragged_attention(batch.q, *paged[0], ragged)
    with pytest.raises(TypeError, match=r"v is a PageTable, expected a torch\.Tensor"):
        jitgen.ragged_attention(batch.q, batch.ragged()[0], jitgen.PageTable.of(paged[1]), ragged)


def test_gradients_are_refused(batch, plan, paged):
    with pytest.raises(GradNotSupported):
        jitgen.paged_attention(batch.q.clone().requires_grad_(), *paged, plan)


# ---- variants --------------------------------------------------------------------------------------------------------------


def test_a_call_with_another_mask_is_refused(batch, plan, paged):
    with pytest.raises(
        PlanMismatch, match=r"not the one the plan was made for: .*\(no mask, the call has \(kv_idx <= q_idx\)\)"
    ):
        jitgen.paged_attention(batch.q, *paged, plan, variant=causal)


def test_a_mask_may_not_change_between_update_and_call(batch, paged):
    width = 10

    def window(b, h, q_idx, kv_idx):
        return q_idx - kv_idx < width

    plan = batch.plan(window)
    width = 20
    with pytest.raises(PlanMismatch, match=r"mask reads 'width', which is 20 now and was planned with its former value \(10\)"):
        jitgen.paged_attention(batch.q, *paged, plan)
    batch.update(plan)
    jitgen.paged_attention(batch.q, *paged, plan)


def test_a_norm_needs_its_own_plan(batch, plan, paged):
    class Sigmoid(jitgen.OnlineNorm):
        state = {}  # noqa: RUF012
        order = "any"

        def update(self, s, st):
            return torch.sigmoid(s), 1.0, st

        def finalize(self, o, st):
            return o

    with pytest.raises(PlanMismatch, match="the variant has a softmax replacement, the plan was made for one that has softmax"):
        jitgen.paged_attention(batch.q, *paged, plan, variant=jitgen.Variant(softmax=Sigmoid))
    own = batch.plan(jitgen.Variant(softmax=Sigmoid))
    with pytest.raises(VariantError, match="the logsumexp was asked for"):
        jitgen.paged_attention(batch.q, *paged, own, return_lse=True)


def test_q_index_belongs_to_the_plan(batch, plan, paged):
    with pytest.raises(PlanMismatch, match="the variant has q_index='local', the plan's has 'absolute'"):
        jitgen.paged_attention(batch.q, *paged, plan, variant=jitgen.Variant(q_index="local"))


def test_unknown_captures_are_refused(batch, plan, paged):
    with pytest.raises(VariantError, match=r"bind got 'slopes', which no hook captures.* Nor has the call an option"):
        jitgen.paged_attention(batch.q, *paged, plan, slopes=torch.zeros(4))


def test_captured_tensors_must_reach_as_far_as_positions(batch, paged):
    bias = torch.zeros(39)

    def by_key(score, b, h, q_idx, kv_idx):
        return score + bias[kv_idx]

    with pytest.raises(ShapeMismatch, match="captured tensor 'bias' has size 39 along axis 0, which kv_idx indexes up to 39"):
        batch.plan(by_key)


def test_plan_must_be_a_plan(batch, paged):
    with pytest.raises(TypeError, match=r"plan is a NoneType, expected a jitgen.Plan"):
        jitgen.paged_attention(batch.q, *paged, None)


# ---- updates that are refused ----------------------------------------------------------------------------------------------


def test_a_refused_update_leaves_no_lengths():
    plan = jitgen.Plan(2, 8, 2, 1, 64, dtype=torch.float32, device="cpu", page_size=4)
    q, cache, table = torch.randn(3, 2, 64), torch.randn(4, 2, 4, 1, 64), torch.arange(4, dtype=torch.int32).view(2, 2)
    q_indptr, kv_len = torch.tensor([0, 1, 3]), torch.tensor([5, 7])
    plan.update(q_indptr, kv_len)
    for _ in range(3):
        want = jitgen.paged_attention(q, cache, table, plan)
    with pytest.raises(ShapeMismatch, match="expected no negative length"):
        plan.update(q_indptr, torch.tensor([5, -7]))
    with pytest.raises(PlanMismatch, match=r"no lengths since its last update was refused\. Call plan\.update"):
        jitgen.paged_attention(q, cache, table, plan)
    with pytest.raises(PlanMismatch, match="no lengths since its last update was refused"):
        plan.explain()
    assert torch.equal(jitgen.paged_attention(q, cache, table, plan.update(q_indptr, kv_len)), want)


def test_starts_of_keys_may_be_changed_by_their_owner_after_the_update():
    plan = jitgen.Plan(2, 8, 2, 1, 64, dtype=torch.float32, device="cpu", layout="ragged")
    q, k, v = torch.randn(3, 2, 64), torch.randn(12, 1, 64), torch.randn(12, 1, 64)
    q_indptr, kv_indptr = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 3], [0, 5, 12]))
    want = jitgen.ragged_attention(q, k, v, plan.update(q_indptr, kv_indptr=kv_indptr))
    kv_indptr.fill_(0)  # on the CPU lengths are copied: here they are those of the next step already
    assert torch.equal(jitgen.ragged_attention(q, k, v, plan), want)


# ---- variants of calls -----------------------------------------------------------------------------------------------------


def test_a_mask_over_several_captures_is_the_plans_whatever_else_a_call_reads():
    torch.manual_seed(0)
    tensors = [torch.randint(0, 9, (16,)) for _ in range(4)]
    a, b, c, d = tensors
    least = 3

    def mask(batch, h, q_idx, kv_idx):
        return (a[q_idx] <= b[kv_idx]) | (c[q_idx] <= d[kv_idx]) | (kv_idx % 5 < least)

    plan = jitgen.Plan(2, 8, 2, 1, 64, dtype=torch.float32, device="cpu", page_size=4, variant=mask, max_kv_len=16)
    q, cache, table = torch.randn(3, 2, 64), torch.randn(4, 2, 4, 1, 64), torch.arange(4, dtype=torch.int32).view(2, 2)
    plan.update(torch.tensor([0, 1, 3]), torch.tensor([5, 7]))
    want = jitgen.paged_attention(q, cache, table, plan)
    for order in itertools.permutations(tensors):  # captures are numbered by first use in all hooks

        def score(s, batch, h, q_idx, kv_idx, order=order):
            return s + 0.0 * sum(weight * t[kv_idx] for weight, t in zip((1, 2, 3, 5), order, strict=True))

        zero = jitgen.Variant(score_mod=score, mask_mod=mask)
        got = jitgen.paged_attention(q, cache, table, plan, variant=zero)
        assert (got - want).abs().max() < 1e-6
