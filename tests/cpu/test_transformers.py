"""attn_implementation="jitgen": models compute what eager attention computes, in every form of mask and cache."""

from __future__ import annotations

import inspect

import pytest
import torch

pytest.importorskip(
    "transformers", minversion="5.17", reason="transformers 5.17 or later is not installed: pip install '.[transformers]'"
)

import transformers
from transformers_cases import (
    ALTERNATING,
    COMMON,
    DECODERS,
    GROUPED,
    LENGTH,
    WINDOW,
    assert_near,
    batch,
    by_both,
    cache_argument,
    counted,
    decoder,
    generate,
    with_weights,
)

import jitgen
from jitgen.compat.transformers import register


def assert_equal_where(kept, got, want):
    """Results of real tokens; those of padding mean nothing, and implementations differ in them."""
    assert_near(got[kept.bool()], want[kept.bool()])


# ---- decoders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_those_of_eager_attention_with_any_padding(name):
    model, (ids, left) = decoder(name), batch()
    for mask in (left, left.flip(1), None):
        want, got = by_both(model, lambda model, mask=mask: model(ids, attention_mask=mask).logits)
        assert_equal_where(torch.ones_like(ids) if mask is None else mask, got, want)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", [n for n in DECODERS if n not in ("qwen3", "deepseek-v3")])
def test_generated_tokens_are_those_of_eager_attention(name, cache):
    chunks = inspect.signature(transformers.masking_utils.create_chunked_causal_mask).parameters
    if (name, cache) == ("llama4", "static") and "block_sequence_ids" not in chunks:
        pytest.skip(f"transformers {transformers.__version__} fails to make the mask of chunks, for any attention")
    model, (ids, left) = decoder(name), batch()
    want, got = by_both(model, lambda model: generate(model, ids, left, cache_implementation=cache))
    assert torch.equal(got, want)


def test_beams_share_and_reorder_a_cache():
    model, (ids, left) = decoder("llama"), batch()
    want, got = by_both(model, lambda model: generate(model, ids, left, num_beams=3, max_new_tokens=8))
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_a_prompt_may_be_given_in_pieces(name):
    """Several rows at once over a cache, whose window has moved past its first keys."""
    model, (ids, left) = decoder(name), batch()

    def in_pieces(model):
        cache, found = transformers.DynamicCache(config=model.config), []
        for begin, end in ((0, 10), (10, 11), (11, 30), (30, LENGTH)):
            places = dict(attention_mask=left[:, :end], position_ids=torch.arange(begin, end)[None])
            found.append(model(ids[:, begin:end], **places, **{cache_argument(model): cache}).logits)
        return torch.cat(found, 1)

    want, got = by_both(model, in_pieces)
    assert_equal_where(left, got, want)
    whole, _ = by_both(model, lambda model: model(ids, attention_mask=left, position_ids=torch.arange(LENGTH)[None]).logits)
    assert_equal_where(left, got, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_as_close_to_float32_as_those_of_eager_attention(dtype):
    model, (ids, left) = decoder("gemma2"), batch()
    exact, _ = by_both(model, lambda model: model(ids, attention_mask=left).logits[left.bool()])
    want, got = by_both(model.to(dtype), lambda model: model(ids, attention_mask=left).logits[left.bool()].float())
    assert (got - exact).square().mean() <= 1.5 * (want - exact).square().mean()


def test_autocast_computes_attention_in_its_dtype():
    model, (ids, left) = decoder("llama"), batch()
    exact, _ = by_both(model, lambda model: model(ids, attention_mask=left).logits[left.bool()])
    with torch.autocast("cpu", torch.bfloat16):
        want, got = by_both(model, lambda model: model(ids, attention_mask=left).logits[left.bool()].float())
    assert (got - exact).square().mean() <= 1.5 * (want - exact).square().mean()


# ---- masks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences_do_not_see_each_other(name):
    model, ids, lengths = decoder(name), batch()[0][:1], (10, 22, 5)
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    starts = torch.tensor([0, 10, 32, 37], dtype=torch.int32)
    packed = dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=22, max_length_k=22)

    def alone(model):
        return torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)

    want, _ = by_both(model, alone)
    _, got = by_both(model, lambda model: model(ids, position_ids=places, use_cache=False).logits)
    assert_equal_where(torch.ones_like(ids), got, want)
    _, got = by_both(model, lambda model: model(ids, position_ids=places, **packed).logits)
    assert_equal_where(torch.ones_like(ids), got, want)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_that_is_a_tensor_is_taken_as_it_is(kind):
    model, ids = decoder("llama"), batch()[0]
    kept = (torch.rand(3, 1, LENGTH, LENGTH) > 0.5) | torch.eye(LENGTH, dtype=torch.bool)
    added = torch.where(kept, 0.0, torch.finfo(torch.float32).min)
    want, got = by_both(model, lambda model: model(ids, attention_mask=added).logits)
    if kind == "bool":
        with torch.no_grad():
            got = model(ids, attention_mask=kept).logits
    assert_equal_where(torch.ones_like(ids), got, want)


def test_images_see_themselves_whole():
    """Gemma 3 adds masks of its own to causal and windowed ones, in its text layers, and has none in those of images."""
    vision = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8,
        vision_use_head=False,
    )  # fmt: skip
    text = dict(GROUPED, head_dim=16, sliding_window=WINDOW, layer_types=ALTERNATING)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=3, boi_token_index=1, eoi_token_index=2
    )
    model, (ids, left) = with_weights(transformers.Gemma3ForConditionalGeneration(config)), batch()
    ids[:, 12:16] = ids[:, 31:35] = 3
    left[1, 10:] = 1
    given = dict(attention_mask=left, token_type_ids=(ids == 3).long(), pixel_values=torch.randn(6, 3, 32, 32))
    want, got = by_both(model, lambda model: model(ids, **given).logits)
    assert_equal_where(left, got, want)


# ---- encoders, and cross attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BertConfig", "ModernBertConfig"])
def test_encoders_see_both_ways_but_no_padding(name):
    given = dict(COMMON, num_hidden_layers=4)
    if name == "ModernBertConfig":  # every third layer sees all keys, the others a window on both sides
        given |= dict(local_attention=WINDOW, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)
    model = with_weights(transformers.AutoModel.from_config(getattr(transformers, name)(**given)))
    ids, left = batch()
    with_hole = left.flip(1)
    with_hole[2, 10:15] = 0
    for mask in (left.flip(1), with_hole, None):
        want, got = by_both(model, lambda model, mask=mask: model(ids, attention_mask=mask).last_hidden_state)
        assert_equal_where(torch.ones_like(ids) if mask is None else mask, got, want)


def test_a_decoder_attends_what_an_encoder_made():
    config = transformers.BertConfig(**COMMON, is_decoder=True, add_cross_attention=True)
    model, (ids, left) = with_weights(transformers.BertLMHeadModel(config)), batch()
    source, real = torch.randn(3, 21, 64), torch.ones(3, 21, dtype=torch.int64)
    real[0, 5:] = 0
    given = dict(attention_mask=left, encoder_hidden_states=source, encoder_attention_mask=real)
    want, got = by_both(model, lambda model: model(ids, **given).logits)
    assert_equal_where(left, got, want)


def test_t5_has_biases_by_position_and_no_scale():
    config = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, vocab_size=128, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    ids, right = batch()[0], batch()[1].flip(1)
    found = []
    with torch.no_grad(), counted() as layers:
        for name in ("eager", "jitgen"):  # two models: older releases set the implementation of T5's parts when they are made
            model = with_weights(transformers.T5ForConditionalGeneration._from_config(config, attn_implementation=name))
            logits = model(ids, attention_mask=right, decoder_input_ids=ids[:, :11]).logits
            found.append((logits, generate(model, ids, right, max_new_tokens=9)))
    assert set(layers) == {"T5Attention"}
    assert_near(found[1][0], found[0][0])
    assert torch.equal(found[1][1], found[0][1])


def test_whisper_hears_with_an_encoder_and_cross_attention():
    config = transformers.WhisperConfig(
        d_model=64, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=128,
        encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=8, max_source_positions=50, max_target_positions=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model, ids, sound = with_weights(transformers.WhisperForConditionalGeneration(config)), batch()[0], torch.randn(3, 8, 100)
    want, got = by_both(model, lambda model: model(sound, decoder_input_ids=ids).logits)
    assert_near(got, want)
    start = torch.ones(3, 1, dtype=torch.int64)
    given = dict(decoder_input_ids=start, suppress_tokens=None, begin_suppress_tokens=None, max_new_tokens=12)
    want, got = by_both(model, lambda model: model.generate(sound, do_sample=False, **given))
    assert torch.equal(got, want)


OWN_ATTENTION = {
    "BlipTextModel": dict(COMMON, encoder_hidden_size=64, projection_dim=64, sep_token_id=3),  # a part of another model
    "BloomModel": dict(hidden_size=64, n_layer=2, n_head=4, vocab_size=128),
    "MegatronBertModel": COMMON,
    "MptModel": dict(d_model=64, n_heads=4, n_layers=2, vocab_size=128),
    "XGLMModel": dict(d_model=64, ffn_dim=96, num_layers=2, attention_heads=4, vocab_size=128),
}


@pytest.mark.filterwarnings("ignore:a model of .* computes attention itself")  # which counting is a variant for
@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_a_model_that_computes_attention_itself_has_the_mask_it_adds(name):
    kind, (ids, left) = getattr(transformers, name), batch()
    for mask in (left, left.flip(1), None):
        found = []
        with torch.no_grad(), counted() as layers:
            for implementation in ("eager", "jitgen"):  # two models: these keep what they were made with
                config = kind.config_class(**OWN_ATTENTION[name])
                model = with_weights(kind._from_config(config, attn_implementation=implementation))
                found.append(model(ids, attention_mask=mask).last_hidden_state)
        assert model.config._attn_implementation == "jitgen" and not layers
        assert torch.equal(*found)


def test_a_variant_that_a_model_does_not_ask_for_is_said():
    register("unheard", jitgen.Variant(score_mod=lambda score, b, h, q_idx, kv_idx: score * 2))
    config = transformers.BloomConfig(**OWN_ATTENTION["BloomModel"])
    model = with_weights(transformers.BloomModel._from_config(config, attn_implementation="unheard"))
    with torch.no_grad(), pytest.warns(UserWarning, match="BloomConfig computes attention itself .* 'unheard'"):
        model(batch()[0])
