"""OnlineNorm.merge: what is refused, and that requests cut along their keys come out as whole ones, on the CPU."""

from __future__ import annotations

import inspect
from copy import copy
from types import SimpleNamespace

import pytest
import torch
from cascade_batch import SharedBatch
from norm_cases import MERGED, MergedSigmoid, MergedSoftmax, MergedStickBreaking, Power, Sigmoid, StickBreaking
from serving_batch import Batch, poisoned

import jitgen
from jitgen import reference
from jitgen.errors import PlanMismatch, UnsupportedVariant, VariantError
from jitgen.program import Program
from jitgen.serving_explain import host_pieces
from jitgen.serving_segments import make_segments
from jitgen.show_text import plans_text

PAGE = 16
LONG = [(1, 9001), (1, 5), (2, 3003), (40, 1501), (0, 9), (3, 777)]


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def variant_of(name, **hooks):
    return jitgen.Variant(softmax=MERGED[name], mask_mod=causal, **hooks)


@pytest.fixture
def many_threads():
    """More threads than this machine may have: more pieces."""
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    yield
    torch.set_num_threads(before)


def run(batch, plan, has_lse):
    """Output and logsumexp of a call, into buffers full of NaN."""
    out, lse = poisoned(plan, batch.q)
    lse = lse if has_lse else None
    if plan.layout == "ragged":
        jitgen.ragged_attention(batch.q, *batch.ragged(), plan, out=out, lse=lse)
    else:
        k, v, lists = batch.pages(PAGE)
        jitgen.paged_attention(batch.q, (k, v), batch.csr(lists), plan, out=out, lse=lse)
    return out, lse


def assert_close(batch, variant, got):
    """Within the rounding of float32 sums of as many terms: weights of a norm may add up to thousands."""
    (out, lse), (exact, exact_lse) = got, batch.expected(variant)
    terms = copy(batch)
    terms.v = [v.abs() for v in batch.v]
    program = variant.trace().program
    bare = jitgen.Variant(softmax=variant.softmax, mask_mod=variant.mask_mod) if program.output is not None else variant
    assert not out.isnan().any()
    assert ((out.double() - exact).abs() <= 2e-6 * terms.expected(bare)[0] + 1e-7).all()
    if lse is not None:
        torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-6, atol=1e-5)


def has_lse(name):
    return variant_of(name).trace().program.norm.lse is not None


# ---- the reference -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [1, 7, 64, 1000])
@pytest.mark.parametrize("name", MERGED)
def test_the_reference_is_the_same_in_parts(name, part):
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (37, 101, 101))
    variant = variant_of(name)
    whole = reference.attention(q, k, v, variant, return_lse=has_lse(name))
    parts = reference.attention(q, k, v, variant, return_lse=has_lse(name), kv_split=part)
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-11)


def test_the_reference_refuses_parts_of_a_norm_without_merge():
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(VariantError, match=r"kv_split=2 was given, but the variant's OnlineNorm has no merge\(a, b\)"):
        reference.attention(q, q, q, jitgen.Variant(softmax=Sigmoid), kv_split=2)


# ---- plans ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [{}, {"split": "fixed", "kv_split": 600}], ids=["balanced", "fixed"])
@pytest.mark.parametrize("layout", ["paged", "ragged"])
@pytest.mark.parametrize("name", MERGED)
def test_cut_requests_are_joined_by_merge(many_threads, name, layout, split):
    batch, variant = Batch(LONG), variant_of(name)
    plan = batch.plan(variant, layout=layout, **split)
    pieces = host_pieces(plan, plan.classes[0], *plan.trace())
    assert len(pieces) >= len({tuple(p) for p in pieces[:, :6].tolist()}) + 8
    got = run(batch, plan, has_lse(name))
    assert_close(batch, variant, got)
    assert torch.equal(run(batch, plan, False)[0], got[0])


@pytest.mark.parametrize("name", MERGED)
def test_fixed_pieces_do_not_depend_on_the_rest_of_the_batch(many_threads, name):
    batch, variant = Batch(LONG), variant_of(name)
    plan = batch.plan(variant, split="fixed", kv_split=512)
    k, v, lists = batch.pages(PAGE)
    together = jitgen.paged_attention(batch.q, (k, v), batch.csr(lists), plan)
    at = 0
    for b, (rows, keys) in enumerate(LONG):
        plan.update(batch.ints([0, rows]), batch.ints([keys]))
        alone = jitgen.paged_attention(batch.q[at : at + rows], (k, v), batch.csr([lists[b]]), plan)
        assert torch.equal(alone, together[at : at + rows])
        at += rows


def test_hooks_see_the_joined_row(many_threads):
    gate = torch.randn(4)
    hooks = {
        "output_transform": lambda o, lse, b, h, q_idx: o * torch.sigmoid(gate[h] + 0.001 * lse + 0.01 * q_idx),
        "lse_transform": lambda lse, b, h, q_idx: lse * (h + 1),
    }
    for name in ("softmax", "stick_breaking", "forgetting"):
        batch, variant = Batch(LONG), variant_of(name, **hooks)
        assert_close(batch, variant, run(batch, batch.plan(variant), True))


def test_captured_values_reach_merge(many_threads):
    class Scaled(Power):
        def __init__(self, table):
            self.table = table

        def update(self, s, st):
            weight = torch.relu(s) * self.table[1]
            return weight, 1.0, {"total": st["total"] + jitgen.row_sum(weight)}

        def merge(self, a, b):
            return {"total": a["total"] + b["total"] - self.table[0]}, 1.0, 1.0

    batch, variant = Batch(LONG), jitgen.Variant(softmax=Scaled(torch.tensor([1e-3, 0.5])), mask_mod=causal)
    assert_close(batch, variant, run(batch, batch.plan(variant), False))


@pytest.mark.parametrize("levels", [
    ([1, 1, 1, 1, 1], [[(5, 37)], [(1, 3), (1, 18), (1, 1), (1, 4), (1, 9)]]),
    ([3, 1, 5, 2, 2], [[(5, 37)], [(2, 11), (3, 5)], [(1, 9), (1, 1), (1, 30), (1, 4), (1, 7)]]),
    ([1, 2, 1, 1, 1], [[(1, 0), (3, 16), (1, 0)], [(1, 9), (1, 4), (1, 0), (1, 4), (1, 700)]]),
    ([40, 3, 70, 1], [[(4, 640)], [(1, 40), (1, 3), (1, 75), (1, 1)]]),
], ids=["shared", "three", "some share", "prefill"])  # fmt: skip
@pytest.mark.parametrize("name", MERGED)
def test_levels_of_a_cascade_are_joined_by_merge(many_threads, name, levels):
    shared = SharedBatch(*levels)
    hooks = {} if name in ("sigmoid", "power") else {"lse_transform": lambda lse, b, h, q_idx: lse * (q_idx + 1)}
    variant = variant_of(name, **hooks)
    caches, cascade = shared.build()
    plan = shared.plan(variant, room=2).update(cascade)
    out, lse = poisoned(plan, shared.whole.q)
    lse = lse if has_lse(name) else None
    jitgen.paged_attention(shared.whole.q, caches, cascade, plan, out=out, lse=lse)
    assert_close(shared.whole, variant, (out, lse))


def test_a_gpu_keeps_the_states_of_norms_for_fixed_cuts():
    sizes = SimpleNamespace(
        levels=1, split="fixed", kv_split=512, max_kv_len=2000, max_batch=3, max_tokens=6, cut_len=4, num_q_heads=4,
        head_dim_v=16, device=torch.device("meta"), q_index="absolute",
    )  # fmt: skip
    shapes = {}
    for name in ("sigmoid", "power", "softmax"):
        segments = make_segments(sizes, variant_of(name).trace().program)
        shapes[name] = segments.levels, tuple(segments.state_lse.shape)
    assert shapes == {"sigmoid": (4, (24, 4, 0)), "power": (4, (24, 4, 1)), "softmax": (4, (24, 4, 2))}
    assert make_segments(sizes, jitgen.Variant(softmax=StickBreaking).trace().program) is None
    assert make_segments(sizes, Program()).state_lse.shape == (24, 4, 1)


# ---- which plans fit -----------------------------------------------------------------------------------------------------


def test_norms_that_are_cut_differently_need_plans_of_their_own():
    batch = Batch([(1, 40)])
    k, v, lists = batch.pages(PAGE)
    pages = batch.csr(lists)
    plan = batch.plan(jitgen.Variant(softmax=MergedSigmoid))
    jitgen.paged_attention(batch.q, (k, v), pages, plan, variant=jitgen.Variant(softmax=MergedSigmoid))
    for other in (Sigmoid, Power, MergedStickBreaking):
        with pytest.raises(PlanMismatch, match="another OnlineNorm than the plan's, and the two are not cut alike"):
            jitgen.paged_attention(batch.q, (k, v), pages, plan, variant=jitgen.Variant(softmax=other))


def test_explain_and_show_say_whether_requests_are_cut(many_threads):
    batch = Batch([(1, 20000)])
    assert "not cut" not in batch.plan(jitgen.Variant(softmax=MergedStickBreaking)).explain()
    whole = "cpu: requests are not cut, as the norm has no merge(a, b)"
    assert whole in batch.plan(jitgen.Variant(softmax=StickBreaking)).explain()
    norms = (Sigmoid, StickBreaking, *MERGED.values())
    told = {norm: plans_text(jitgen.Variant(softmax=norm).trace().program.norm) for norm in norms}
    assert told[Sigmoid].endswith("except in decode on a GPU, where parts are added: it has no state and no factor")
    assert told[StickBreaking] == "do not cut requests along their keys, as it has no merge(a, b)"
    assert {told[norm] for norm in MERGED.values()} == {"cut long requests along their keys"}


# ---- what is refused -----------------------------------------------------------------------------------------------------


class NoTuple(MergedSoftmax):
    def merge(self, a, b):
        return a


class OtherState(MergedSoftmax):
    def merge(self, a, b):
        return {"total": a["total"] + b["total"]}, 1.0, 1.0


class NoNumber(MergedSoftmax):
    def merge(self, a, b):
        return a, 1.0, "one"


class Assigns(MergedSoftmax):
    def merge(self, a, b):
        self.joined = a
        return a, 1.0, 1.0


class Reduces(MergedSoftmax):
    def merge(self, a, b):
        return a, 1.0, jitgen.row_sum(b["total"])


@pytest.mark.parametrize(
    "norm, message",
    [
        (NoTuple, r"NoTuple.merge returned .*, expected \(state, scale_a, scale_b\)"),
        (OtherState, r"OtherState.merge returned the state \['total'\], expected a dict of \['largest', 'total'\]"),
        (NoNumber, r"NoNumber.merge returned 'one'.*, expected f32"),
        (Assigns, r"a hook assigns attribute 'joined' of a Assigns. Hooks are pure"),
        (Reduces, r"Reduces.merge uses row_sum, and it is given two states and no row"),
    ],
)
def test_a_merge_that_is_no_merge_is_refused_at_its_line(norm, message):
    with pytest.raises(UnsupportedVariant, match=message) as raised:
        jitgen.Variant(softmax=norm)
    first = inspect.getsourcelines(norm.merge)[1]
    assert first <= raised.value.line <= first + 2


class StartsTwice(Power):
    """Both parts began with the start value."""

    def merge(self, a, b):
        return {"total": a["total"] + b["total"]}, 1.0, 1.0


class OtherWay(MergedStickBreaking):
    """As if the keys of b were visited first."""

    def merge(self, a, b):
        return {"carry": a["carry"] + b["carry"]}, torch.exp(b["carry"]), 1.0


class FirstOnly(MergedSigmoid):
    """Not associative, nor symmetric where any order is claimed."""

    def merge(self, a, b):
        return {}, 1.0, 0.5


class KeepsState(MergedStickBreaking):
    """The output is right for two parts, and the state is not."""

    def merge(self, a, b):
        return {"carry": a["carry"]}, 1.0, torch.exp(a["carry"])


@pytest.mark.parametrize("norm", [StartsTwice, OtherWay, FirstOnly, KeepsState])
def test_a_merge_that_does_not_join_parts_is_refused(norm):
    with pytest.raises(VariantError, match=rf"{norm.__name__}.merge does not join parts: a row of 11 logits has the"):
        jitgen.Variant(softmax=norm)


def test_what_is_refused_says_which_part_saw_nothing():
    class NoKeys(MergedSoftmax):
        def merge(self, a, b):
            state, of_a, of_b = MergedSoftmax.merge(self, a, b)
            return state, torch.where(b["total"] == 0, 0.5, of_a), of_b

    with pytest.raises(VariantError, match="A part that saw no key has the start state, and must change nothing"):
        jitgen.Variant(softmax=NoKeys)


def test_merge_is_part_of_what_a_variant_means():
    ids = {jitgen.Variant(softmax=norm).trace().program.id for norm in (Sigmoid, MergedSigmoid)}
    assert len(ids) == 2
