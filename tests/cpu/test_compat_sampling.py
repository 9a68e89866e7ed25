"""flashinfer.sampling and flashinfer.logits_processor, as code written for them calls them."""

from __future__ import annotations

import pytest
import torch
from sampling_cases import filtered, logits_of, top_k_support

import jitgen
from jitgen.compat.flashinfer import logits_processor as lp
from jitgen.compat.flashinfer import sampling
from jitgen.errors import UnsupportedOption

X = logits_of(4, 1003, torch.float32, "cpu")
P = X.softmax(-1)


@pytest.mark.parametrize(
    ("call", "filters"),
    [
        (lambda s: sampling.sampling_from_probs(P, seed=s), {}),
        (lambda s: sampling.sampling_from_logits(X, seed=s), {}),
        (lambda s: sampling.top_p_sampling_from_probs(P, 0.6, seed=s, offset=64), {"top_p": 0.6}),
        (lambda s: sampling.top_k_sampling_from_probs(P, 6, seed=s), {"top_k": 6}),
        (lambda s: sampling.min_p_sampling_from_probs(P, 0.2, seed=s), {"min_p": 0.2}),
        (lambda s: sampling.top_k_top_p_sampling_from_logits(X, 20, 0.6, seed=s), {"top_k": 20, "top_p": 0.6}),
        (
            lambda s: sampling.top_k_top_p_sampling_from_probs(P, 20, 0.6, None, "joint", seed=s),
            {"top_k": 20, "top_p": 0.6, "order": "joint"},
        ),
    ],
)
def test_tokens_stay_in_the_support_and_reach_all_of_it(call, filters):
    want, unsure = filtered(X, **filters)
    tokens = torch.stack([call(torch.arange(4) + 1000 * s) for s in range(400)])
    assert tokens.dtype == torch.int32
    for row in range(4):
        seen = torch.bincount(tokens[:, row].long(), minlength=X.shape[1]) > 0
        assert not bool((seen & (want[row] == 0) & ~unsure[row]).any())
        assert bool(seen[want[row] > 0.05].all())


def test_invalid_rows_give_token_0():
    probs = P.clone()
    probs[2] = 0
    tokens, valid = sampling.top_p_sampling_from_probs(probs, 0.9, seed=1, return_valid=True)
    assert valid.tolist() == [True, True, False, True] and int(tokens[2]) == 0
    probs[1, 5] = float("nan")
    with pytest.raises(ValueError, match="probs contain NaN"):
        sampling.sampling_from_probs(probs, check_nan=True)


def test_a_seed_tensor_of_one_element_serves_all_rows_with_streams_of_their_own():
    flat = torch.full((64, 1000), 1e-3)
    tokens = sampling.sampling_from_probs(flat, seed=torch.tensor([7]), offset=torch.tensor([0]))
    assert len(tokens.unique()) > 50


def test_tokens_have_the_dtype_of_the_indices():
    probs = torch.softmax(torch.randn(3, 50), -1)
    for dtype in (torch.int32, torch.int64):
        at = torch.tensor([2, 0, 2, 1], dtype=dtype)
        tokens = sampling.sampling_from_probs(probs, indices=at, seed=3, offset=0)
        want = jitgen.sample(probs, from_logits=False, indices=at, seed=3, offset=0)
        assert tokens.dtype == dtype and torch.equal(tokens, want.to(dtype))
        pipe = lp.LogitsPipe([lp.TopP(), lp.Sample()], input_type=lp.TensorType.PROBS)
        assert pipe(probs, top_p=0.9, indices=at, seed=3, offset=0).dtype == dtype
    assert sampling.sampling_from_probs(probs, seed=3, offset=0).dtype == torch.int32


def test_unknown_arguments_are_not_swallowed():
    for call, given in (
        (sampling.softmax, {"temprature": 0.5}),
        (sampling.top_k_renorm_probs, {"top_k": 3, "top_p": 0.9}),
        (sampling.top_k_mask_logits, {"top_k": 3, "top_p": 0.9}),
    ):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            call(torch.randn(3, 50), **given)


def test_renormalisation_masks_and_softmax():
    assert torch.equal(sampling.top_k_mask_logits(X, 9), torch.where(top_k_support(X, 9), X, -torch.inf))
    for got, filters in (
        (sampling.top_p_renorm_probs(P, 0.7), {"top_p": 0.7}),
        (sampling.top_k_renorm_probs(P, 9), {"top_k": 9}),
    ):
        want, unsure = filtered(P, from_logits=False, **filters)
        assert not bool(unsure.any())
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(
        sampling.softmax(X, temperature=torch.full((4,), 0.5)), (X * 2).softmax(-1), rtol=1e-5, atol=1e-8
    )


def test_chain_speculation_adds_to_the_counts_given():
    target = P.expand(3, 4, 1003)
    ids = torch.multinomial(P[:3], 3, replacement=True)
    draft = torch.stack([P[i] for i in range(3)]).expand(3, 3, 1003)
    accepted, emitted = torch.full((3,), 10, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    out, counted, sent = sampling.chain_speculative_sampling(draft, ids.T.int(), target, accepted, emitted, seed=3)
    assert out.shape == (3, 4) and counted is accepted and sent is emitted
    assert accepted.tolist() == [13, 13, 13] and emitted.tolist() == [3, 3, 3]


def test_a_pipe_is_one_call_of_sample():
    seeds = torch.arange(4)
    pipe = lp.LogitsPipe([lp.Temperature(), lp.Softmax(), lp.TopK(), lp.TopP(), lp.Sample()])
    got = pipe(X, temperature=0.8, top_k=30, top_p=0.9, seed=seeds)
    assert torch.equal(got, jitgen.sample(X, temperature=0.8, top_k=30, top_p=0.9, seed=seeds))
    joint = lp.LogitsPipe([lp.Softmax(), lp.TopK(joint_topk_topp=True), lp.TopP(), lp.Sample()])
    assert torch.equal(
        joint(X, top_k=30, top_p=0.9, seed=seeds), jitgen.sample(X, top_k=30, top_p=0.9, order="joint", seed=seeds)
    )
    probs = lp.LogitsPipe([lp.TopP(), lp.MinP()])(lp.TaggedTensor.probs(P), top_p=0.8, min_p=0.01)
    assert torch.equal(probs, jitgen.renorm(P, top_p=0.8, min_p=0.01))
    masked = lp.LogitsPipe([lp.TopK()], input_type=lp.TensorType.LOGITS)(X, top_k=5)
    assert torch.equal(masked, jitgen.mask_logits(X, top_k=5))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "needs at least one processor"),
        ([lp.Temperature(), lp.TopP()], r"processor 1: TopP\(\) does not take logits. Put Softmax\(\) before it."),
        ([lp.Softmax(), lp.Temperature()], r"processor 1: Temperature\(\) does not take probs"),
        ([lp.MinP(), lp.Sample(), lp.TopK()], "does not take indices"),
        ([lp.Sample()], "takes both logits and probabilities. Say by input_type"),
        ([print], "processor 0 is"),
    ],
)
def test_pipes_that_make_no_sense_are_refused(steps, message):
    with pytest.raises(UnsupportedOption, match=message) as caught:
        lp.LogitsPipe(steps)
    assert isinstance(caught.value, ValueError)  # what FlashInfer raises


def test_what_one_kernel_cannot_do_is_done_by_two():
    pipe = lp.LogitsPipe([lp.TopP(top_p=0.9), lp.TopP(top_p=0.5)])
    assert len(pipe.compiled_ops) == 2
    assert torch.equal(pipe(P), jitgen.renorm(jitgen.renorm(P, top_p=0.9), top_p=0.5))


def test_a_pipe_that_is_not_compiled_runs_its_steps_one_by_one():
    pipe = lp.LogitsPipe([lp.Softmax(), lp.TopK(), lp.Sample()], compile=False)
    assert pipe.compiled_ops is None and pipe.initial_type is lp.TensorType.LOGITS
    seeds = torch.arange(4)
    apart = pipe(X, top_k=9, seed=seeds)
    assert torch.equal(apart, sampling.sampling_from_probs(sampling.top_k_renorm_probs(sampling.softmax(X), 9), seed=seeds))
    pipe.compile()
    assert len(pipe.compiled_ops) == 1


def test_parameters_of_processors_hold_where_the_call_gives_none():
    pipe = lp.LogitsPipe([lp.Softmax(), lp.TopK(top_k=3), lp.TopP(top_p=0.4)])
    assert torch.equal(pipe(X), jitgen.renorm(jitgen.softmax(X), top_k=3, top_p=0.4))
    assert torch.equal(pipe(X, top_k=7), jitgen.renorm(jitgen.softmax(X), top_k=7, top_p=0.4))


class Bias(lp.LogitsProcessor):
    """A processor of a user's own."""

    def legalize(self, input_type):
        if input_type is not lp.TensorType.LOGITS:
            raise ValueError("takes logits")
        return [BiasOp(**self.params)]


class BiasOp(lp.ParameterizedOp):
    IN = OUT = lp.TensorType.LOGITS

    def __call__(self, tensor, **kwargs):
        return lp.TaggedTensor(tensor.data + self._get_param("bias", kwargs), self._validate_input_type(tensor))


def test_processors_rules_and_checks_of_the_user_take_part():
    bias, seeds, seen = torch.randn(X.shape[1]), torch.arange(4), []
    steps = [Bias(), Bias(bias=bias), lp.Softmax(), lp.TopK(), lp.Sample()]
    doubled = lp.FusionRule((BiasOp, BiasOp), lambda ops: ops[0].default_params == {}, lambda ops: BiasOp(bias=2 * bias))
    pipe = lp.LogitsPipe(steps, custom_fusion_rules=[doubled], custom_validity_checks=[seen.extend])
    assert len(seen) == 5 and [type(op) for op in pipe.compiled_ops[:-1]] == [BiasOp] and len(pipe.compiled_ops) == 2
    assert torch.equal(pipe(X, top_k=5, seed=seeds), jitgen.sample(X + 2 * bias, top_k=5, seed=seeds))
    assert torch.equal(lp.LogitsPipe(steps[1:])(X, top_k=5, seed=seeds), jitgen.sample(X + bias, top_k=5, seed=seeds))
    with pytest.raises(ValueError, match="takes logits"):
        lp.LogitsPipe([lp.Softmax(), Bias()])

    def refuse(ops):
        raise lp.CompileError(f"{len(ops)} steps are too many")

    with pytest.raises(lp.CompileError, match="5 steps are too many"):
        lp.LogitsPipe(steps, custom_validity_checks=[refuse])


def test_tagged_tensors_are_tensors_with_a_type():
    tagged = lp.TaggedTensor.logits(X)
    assert (tagged.shape, tagged.dtype, tagged.device, tagged.size(1)) == (X.shape, X.dtype, X.device, 1003)
    assert torch.equal(torch.exp(tagged), X.exp())
    with pytest.raises(lp.CompileError, match="was given probs"):
        lp.LogitsPipe([lp.Softmax()])(lp.TaggedTensor.probs(P))


def test_missing_parameters_and_unknown_orders_are_named():
    with pytest.raises(UnsupportedOption, match="needs top_p"):
        lp.LogitsPipe([lp.Softmax(), lp.TopP(), lp.Sample()])(X)
    with pytest.raises(UnsupportedOption, match="filter_apply_order='p'"):
        sampling.top_k_top_p_sampling_from_probs(P, 3, 0.5, filter_apply_order="p")
