"""Variants of one's own in a model, torch.compile, what masks are made of, and errors."""

from __future__ import annotations

import inspect

import pytest
import torch

pytest.importorskip(
    "transformers", minversion="5.17", reason="transformers 5.17 or later is not installed: pip install '.[transformers]'"
)

import transformers
from torch.nn.attention.flex_attention import create_block_mask
from transformers import masking_utils
from transformers_cases import GROUPED, LENGTH, assert_near, batch, cache_argument, decoder, generate, with_weights

import jitgen
from jitgen.compat.transformers import ModelMask, _register, register
from jitgen.compat.transformers._mask import model_mask
from jitgen.errors import (
    GradNotSupported,
    InvalidType,
    InvalidValue,
    ShapeMismatch,
    UnsupportedOption,
    VariantError,
)
from jitgen.mask_tiles import TILE_FULL, TILE_NONE, classify
from jitgen.variant import resolve


def slope_of(h):
    return -0.05 * (h + 1)


def alibi(score, b, h, q_idx, kv_idx):
    return score + slope_of(h) * (q_idx - kv_idx)


@torch.no_grad()
def eager_logits(model, ids, mask):
    """Logits by eager attention under a mask [batch or 1, heads or 1, length, length] that is added."""
    model.set_attn_implementation("eager")
    return model(ids, attention_mask=mask).logits


@torch.no_grad()
def logits(model, name, *args, **options):
    model.set_attn_implementation(name)
    return model(*args, **options).logits


# ---- variants -------------------------------------------------------------------------------------------------------------


def causal_bias(bias):
    """``bias`` where a query may look, the least float elsewhere."""
    length = bias.shape[-1]
    keep = torch.ones(length, length, dtype=torch.bool).tril()
    return torch.where(keep, bias, torch.finfo(torch.float32).min)


def test_a_score_mod_is_added_to_a_model_in_one_line():
    register("alibi", jitgen.Variant(score_mod=alibi))
    model, (ids, _) = decoder("llama"), batch()
    place, heads = torch.arange(LENGTH), torch.arange(4)
    bias = slope_of(heads)[:, None, None] * (place[:, None] - place)
    want = eager_logits(model, ids, causal_bias(bias)[None].expand(3, -1, -1, -1))
    assert_near(logits(model, "alibi", ids), want)


def test_hooks_see_positions_also_where_a_cache_has_dropped_its_first_keys():
    """Logits of generated tokens, over a cache of the last keys, are those of one pass over all."""

    def by_place(score, b, h, q_idx, kv_idx):
        return score + torch.cos(0.3 * kv_idx) * torch.sin(0.2 * q_idx)

    register("by_place", by_place)
    model, (ids, left) = decoder("mistral"), batch()
    model.set_attn_implementation("by_place")
    for cache in (None, "static"):
        given = dict(output_logits=True, return_dict_in_generate=True, cache_implementation=cache)
        found = generate(model, ids, left, **given)
        steps = len(found.logits)
        mask = torch.nn.functional.pad(left, (0, steps), value=1)
        want = logits(model, "by_place", found.sequences, attention_mask=mask)[:, -steps - 1 : -1]
        assert_near(torch.stack(found.logits, 1), want)


def test_a_mask_keeps_keys_among_those_of_the_model_or_replaces_its_pattern():
    def prefix(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) | (kv_idx < 12)

    register("among", jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: kv_idx % 3 != 1))
    register("prefix", prefix, replace_mask=True)
    model, (ids, _) = decoder("llama"), batch()
    right = torch.ones_like(ids)
    right[1, 30:] = 0
    place = torch.arange(LENGTH)
    q, k, real = place[:, None], place, right.bool()[:, None, None]
    least = torch.finfo(torch.float32).min
    for name, keep in (("among", (k <= q) & (k % 3 != 1)), ("prefix", (k <= q) | (k < 12))):
        rows = right.bool() & keep.any(1)
        want = eager_logits(model, ids, torch.where(keep & real, 0.0, least))[rows]
        assert_near(logits(model, name, ids, attention_mask=right)[rows], want)


def test_a_replaced_mask_does_not_show_room_of_a_cache_that_is_not_written():
    register("all", jitgen.Variant(mask_mod=lambda b, h, q_idx, kv_idx: kv_idx >= 0), replace_mask=True)
    model, ids = decoder("llama"), batch()[0]
    want = logits(model, "all", ids)  # and no padding mask, which would hide that room too
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    assert_near(logits(model, "all", ids, **{cache_argument(model): cache}), want)


def test_a_function_of_the_layer_chooses_its_variant():
    scales = [0.5, 0.0]

    def of_layer(module):
        if module.layer_idx == 1:
            return None
        scale = scales[module.layer_idx]
        return jitgen.Variant(score_mod=lambda score, b, h, q_idx, kv_idx: score - scale * (q_idx - kv_idx))

    register("first_layer", of_layer)
    model, (ids, left) = decoder("llama"), batch()
    with torch.no_grad():
        want = {}
        for name in ("eager", "first_layer"):
            model.set_attn_implementation(name)
            found = model.model(ids, attention_mask=left, output_hidden_states=True).hidden_states
            want[name] = found
    assert not torch.allclose(want["eager"][1][left.bool()], want["first_layer"][1][left.bool()])
    place = torch.arange(LENGTH)
    hidden = causal_bias(-0.5 * (place[:, None] - place))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        first = model.model(ids[2:], attention_mask=hidden[None, None], output_hidden_states=True).hidden_states
    assert_near(want["first_layer"][1][2:], first[1])


def test_hooks_of_rows_and_other_normalisations_work_in_a_model():
    class Sigmoid(jitgen.OnlineNorm):
        def update(self, score, state):
            return torch.sigmoid(score), 1.0, state

        def finalize(self, o, state):
            return o

    def softer(q, b, h, q_idx):
        return q * 0.5

    register("sigmoid", jitgen.Variant(softmax=Sigmoid, q_transform=softer))
    model, (ids, left) = decoder("mistral"), batch()

    def by_hand(module, query, key, value, attention_mask, scaling=None, **others):
        key, value = (t.repeat_interleave(2, 1) for t in (key, value))
        weights = torch.sigmoid(0.5 * scaling * query @ key.mT) * attention_mask
        return (weights @ value).transpose(1, 2), None

    transformers.AttentionInterface.register("by_hand", by_hand)
    transformers.AttentionMaskInterface.register("by_hand", masking_utils.sdpa_mask)
    want = logits(model, "by_hand", ids, attention_mask=left)
    assert_near(logits(model, "sigmoid", ids, attention_mask=left)[left.bool()], want[left.bool()])


def test_a_bias_and_a_soft_cap_of_the_model_come_before_the_variants_score_mod():
    register("doubled", jitgen.Variant(score_mod=lambda score, b, h, q_idx, kv_idx, *, scale: score * 2 + 0 * scale))
    model, (ids, _) = decoder("gemma2"), batch()

    def by_hand(module, query, key, value, attention_mask, scaling=None, softcap=None, **others):
        key, value = (t.repeat_interleave(2, 1) for t in (key, value))
        score = 2 * softcap * torch.tanh(scaling * query @ key.mT / softcap)
        return (torch.where(attention_mask, score, -torch.inf).softmax(-1) @ value).transpose(1, 2), None

    transformers.AttentionInterface.register("by_hand", by_hand)
    transformers.AttentionMaskInterface.register(
        "by_hand", lambda *args, **given: masking_utils.sdpa_mask(*args, **given | dict(allow_is_causal_skip=False))
    )
    assert_near(logits(model, "doubled", ids), logits(model, "by_hand", ids))


# ---- torch.compile --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss"])
def test_a_compiled_model_is_one_graph(name):
    register()
    model, (ids, left) = decoder(name), batch()
    torch._dynamo.reset()
    want = logits(model, "jitgen", ids, attention_mask=left, use_cache=False)
    with torch.no_grad():
        got = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, attention_mask=left, use_cache=False).logits
    torch.testing.assert_close(got[left.bool()], want[left.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_compiled_steps_of_generation_share_graphs(name, monkeypatch):
    """As generate compiles them on a GPU: masks are made outside and given to the compiled forward."""
    register()
    model, (ids, left) = decoder(name), batch()
    model.set_attn_implementation("jitgen")
    want, forward = generate(model, ids, left), model.forward
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)

    def steps_compiled(input_ids=None, **given):
        return (compiled if input_ids.shape[1] == 1 else forward)(input_ids=input_ids, **given)

    steps_compiled.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(model, "forward", steps_compiled)
    assert torch.equal(generate(model, ids, left, cache_implementation="static"), want)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # a second once the window moves


# ---- masks ----------------------------------------------------------------------------------------------------------------


def test_no_mask_of_queries_and_keys_is_made_and_tiles_are_skipped(monkeypatch):
    made: list[ModelMask] = []
    monkeypatch.setattr(ModelMask, "dense", lambda self: pytest.fail("a mask was made as a tensor"))
    register()
    model, (ids, left) = decoder("gemma3"), batch()
    model.set_attn_implementation("jitgen")
    monkeypatch.setitem(
        masking_utils.AttentionMaskInterface._global_mapping,
        "jitgen",
        lambda *args, **given: made.append(model_mask(*args, **given)) or made[-1],
    )
    with torch.no_grad():
        model(ids, attention_mask=left)
    assert len(made) == 2  # of full and of sliding layers
    for mask in made:
        program, values = resolve(mask_mod=mask.hook(local=False))
        kinds = classify(program, values, q_len=LENGTH, kv_len=LENGTH, tile_q=4, tile_kv=4, b=0)[0]
        assert (kinds[0] == TILE_NONE).all() and kinds[-1, 0] == TILE_NONE  # padding up to 9
        assert kinds[-2, -3] == TILE_FULL and kinds[4, 6] == TILE_NONE


@pytest.mark.parametrize("given", [None, "left", "hole"])
def test_code_that_computes_with_the_mask_has_the_tensor_of_sdpa(given):
    padding = None if given is None else torch.ones(2, 20, dtype=torch.bool)
    if given is not None:
        padding[0, :5] = False
    if given == "hole":
        padding[1, 7] = False
    causal = masking_utils.sliding_window_causal_mask_function(6)
    sizes = dict(batch_size=2, q_length=3, kv_length=12, q_offset=torch.tensor(16), kv_offset=8, mask_function=causal)
    mask = model_mask(**sizes, attention_mask=padding)
    want = masking_utils.sdpa_mask(**sizes, attention_mask=padding, allow_is_causal_skip=False)
    assert mask.shape == tuple(want.shape) and mask.dtype == torch.bool and mask.dim() == 4
    assert torch.equal(mask[:, 0], want[:, 0]) and torch.equal(mask & want, want) and torch.equal(~mask, ~want)
    assert torch.equal(torch.cat([mask, want], 1), torch.cat([want, want], 1))
    assert torch.equal(torch.where(mask, 1, 0), want.long()) and torch.equal(mask.expand(2, 4, 3, 12), want.expand(2, 4, 3, 12))


def test_a_mask_follows_its_layer_to_another_device():
    padding = torch.ones(2, 20, dtype=torch.bool)
    padding[0, :5] = padding[1, 7] = False
    causal = masking_utils.chunked_causal_mask_function(8, torch.tensor([5, 0]))
    mask = model_mask(2, 20, 20, mask_function=causal, attention_mask=padding)
    assert mask.to("cpu") is mask and mask.to(device="cpu", non_blocking=True) is mask
    assert torch.equal(mask.to(torch.int32), mask[:].int()) and torch.equal(mask.to(padding), mask[:])
    there = mask.to("meta")
    found = there.hook(local=False)(*(torch.zeros(1, dtype=torch.int64, device="meta") for _ in range(4)))
    assert found.device.type == "meta" and there.device.type == "meta"


# ---- errors ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    register()
    made = decoder("llama")
    made.set_attn_implementation("jitgen")
    return made


def test_what_is_not_computed_is_refused(model):
    ids = batch()[0]
    with pytest.raises(GradNotSupported, match=r"torch\.no_grad"):
        model(ids)
    with torch.no_grad(), pytest.raises(UnsupportedOption, match=r"output_attentions=True.*'eager'"):
        model(ids, output_attentions=True)
    with torch.no_grad(), pytest.raises(UnsupportedOption, match="head_mask was given"):
        model(ids, head_mask=torch.ones(4))
    trained = with_weights(
        transformers.LlamaForCausalLM._from_config(
            transformers.LlamaConfig(**GROUPED, attention_dropout=0.1), attn_implementation="jitgen"
        )
    ).train()
    with torch.no_grad(), pytest.raises(UnsupportedOption, match=r"dropout=0.1.*model.eval"):
        trained(ids)


def test_masks_that_do_not_fit_are_named(model):
    ids = batch()[0]
    causal = lambda b, h, q_idx, kv_idx: q_idx >= kv_idx  # noqa: E731
    with torch.no_grad():
        with pytest.raises(ShapeMismatch, match=r"attention_mask has shape \(3, 1, 36, 37\), expected .*\(3, 4, 37, 37\)"):
            model(ids, attention_mask=torch.ones(3, 1, LENGTH - 1, LENGTH))
        with pytest.raises(ShapeMismatch, match="made for 12 query rows and 12 keys, and the layer has 37 and 37"):
            model(ids, attention_mask=model_mask(3, 12, 12))
        with pytest.raises(InvalidType, match=r"a BlockMask.*and_mask_function"):
            model(ids, attention_mask=create_block_mask(causal, 3, 1, LENGTH, LENGTH, device="cpu"))
        with pytest.raises(ShapeMismatch, match="the batch is 3, expected 1"):
            model(ids, cu_seq_lens_q=torch.tensor([0, LENGTH]))


def test_what_cannot_be_registered_is_named():
    for name in ("sdpa", "flash_mine", "paged|mine", "", 3):
        with pytest.raises(InvalidValue, match="name is"):
            register(name)
    with pytest.raises(VariantError, match="no variant was given"):
        register(replace_mask=True)
    with pytest.raises(VariantError, match="q_index='local'"):
        register("mine", jitgen.Variant(score_mod=alibi, q_index="local"))
    with pytest.raises(VariantError, match="takes 2 positional parameters"):
        register("mine", lambda a, b: a)
    with pytest.raises(UnsupportedOption, match=r"4\.57\.1 is installed.*5\.17 or later"):
        _register.check_version("4.57.1")
    _register.check_version("5.17.0")
    _register.check_version("6.0.dev0")


@torch.no_grad()
def test_hooks_that_exclude_each_other_are_named():
    ids = batch()[0]
    register("sinks", jitgen.Variant(sink=0.0))
    with pytest.raises(VariantError, match=r"s_aux.*has a sink"):
        logits(decoder("gpt-oss"), "sinks", ids)
    register("rows", jitgen.Variant(output_transform=lambda o, lse, b, h, q_idx: o / o.rms()))
    with pytest.raises(ShapeMismatch, match="head dims are 20 and 20, no multiples of 8"):
        logits(decoder("mistral, head dim 20"), "rows", ids)
