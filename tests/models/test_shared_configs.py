"""Models made from one config object stay apart, whichever of them has its attention replaced."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from checkpoints import CASES, LONGEST, _model_class, randomise
from decoders import assert_close, tokens, whole
from transformers import AutoConfig, AutoModelForCausalLM

from rope_export import BadInputError, replace_attention
from rope_export.models.decoder_attention import DecoderAttention
from rope_export.models.decoder_with_cache import DecoderWithCache

MASK = torch.ones(2, 24, dtype=torch.long)
MASK[0, :5] = 0
# By default in eager arithmetic (sinks, a cap), in PyTorch's fused attention, and within a model of
# images, whose config holds that of the decoder.
NAMES = ("gpt-oss", "Gemma 2", "Mistral", "Falcon, grouped", "Gemma 3", "Qwen2-VL")


def built(name: str, config: Any) -> Any:
    """By the class itself, which keeps the very object; factories copy it."""
    torch.manual_seed(0)
    cls = _model_class(CASES[name])
    kind = cls if not hasattr(cls, "_model_mapping") else cls._model_mapping[type(config)]
    model = kind(config)
    randomise(model)
    assert model.config is config
    return model.eval()


def stated(config: Any) -> str:
    """All a config says, what it keeps out of its file included."""
    inner = [config, *(getattr(config, name) for name in config.sub_configs)]
    return repr([(one.to_dict(), one._attn_implementation) for one in inner])


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_the_same_config_is_left_alone(name):
    config = CASES[name].config()
    if name == "Gemma 2":  # whose cap PyTorch's attention left out in earlier releases
        config._attn_implementation = "eager"
    theirs, ours = built(name, config), built(name, config)
    before, said = whole(theirs, MASK), stated(config)
    assert replace_attention(ours, max_seq_len=LONGEST)
    later = built(name, config)  # as the first is, after all
    assert (theirs.config, stated(config)) == (config, said)
    for one in (theirs, later):
        assert torch.equal(whole(one, MASK), before)
    assert_close(whole(ours, MASK), before)
    # And from what the replaced one has: by then that is any config.
    assert stated(ours.config) == said
    again = built(name, copy.deepcopy(ours.config))
    assert_close(whole(again, MASK), before)
    # Within the replaced model, one config is still one object.
    held = {id(ours.config), *(id(getattr(ours.config, n)) for n in ours.config.sub_configs)}
    found = [m for m in ours.modules() if isinstance(m, DecoderAttention)]
    assert {id(m.config) for m in found} == {id(ours.get_decoder().config)}
    assert all(id(m.config) in held for m in ours.modules() if hasattr(m, "config"))
    assert not held & {id(config), *(id(getattr(config, n)) for n in config.sub_configs)}


@pytest.mark.parametrize("name", ["gpt-oss", "Mistral", "GPT-NeoX", "Qwen2-VL"])
def test_ways_of_attention_can_be_set_on_either(name):
    config = CASES[name].config()
    theirs, ours = built(name, config), built(name, config)
    expected = whole(theirs, MASK)
    replace_attention(ours, max_seq_len=LONGEST)
    for one in (ours, theirs):
        for way in ("eager", "sdpa", "eager")[0 if one.get_decoder()._supports_sdpa else 2 :]:
            one.set_attn_implementation(way)
            assert one.get_decoder().config._attn_implementation == way
            assert_close(whole(theirs, MASK), expected)
            assert_close(whole(ours, MASK), expected)


def test_a_way_whose_masks_it_cannot_take_is_exchanged_in_the_copy():
    config = CASES["Mistral"].config()
    ours, expected = built("Mistral", config), whole(built("Mistral", config), MASK)
    config._attn_implementation = "flash_attention_2"  # as on a machine that has it
    replace_attention(ours, max_seq_len=LONGEST)
    assert_close(whole(ours, MASK), expected)
    assert ours.config._attn_implementation == "sdpa"
    assert config._attn_implementation == "flash_attention_2"


def test_ways_whose_masks_it_cannot_take_are_refused():
    config = CASES["Mistral"].config()
    ours = built("Mistral", config)
    replace_attention(ours, max_seq_len=LONGEST)
    for way in ("flash_attention_2", "flex_attention", "paged|sdpa"):
        ours.config._attn_implementation = way
        with pytest.raises(BadInputError, match=r"must be 'sdpa' or 'eager'.*, got '" + way[:5]):
            ours.get_decoder().layers[0].self_attn(torch.zeros(1, 3, 64))


@pytest.mark.parametrize("name", ["gpt-oss", "Mistral"])
def test_what_is_saved_is_what_transformers_would_save(name, tmp_path):
    config = CASES[name].config()
    theirs, ours = built(name, config), built(name, config)
    replace_attention(ours, max_seq_len=LONGEST)
    for model, where in ((theirs, "theirs"), (ours, "ours")):
        model.save_pretrained(tmp_path / where)
    saved = [json.loads((tmp_path / w / "config.json").read_text()) for w in ("theirs", "ours")]
    assert saved[0] == saved[1]
    assert "rope_export" not in str(saved[1])
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert_close(whole(back, MASK), whole(theirs, MASK))
    assert_close(whole(ours, MASK), whole(theirs, MASK))
    assert AutoConfig.from_pretrained(tmp_path / "ours").to_dict() == back.config.to_dict()


@torch.no_grad()
def test_models_of_one_config_generate_are_copied_and_exported_side_by_side():
    config = CASES["Mistral"].config()
    theirs, ours = built("Mistral", config), built("Mistral", config)
    replace_attention(ours, max_seq_len=LONGEST)
    plan = {"max_new_tokens": 9, "do_sample": False, "attention_mask": MASK[:, :9]}
    for how in ({}, {"cache_implementation": "static", "disable_compile": True}):
        expected = theirs.generate(tokens(9), **plan, **how)
        for one in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(one.generate(tokens(9), **plan, **how), expected)
    assert_close(DecoderWithCache(ours)(tokens()), whole(theirs, None))
    # A decoder that is replaced by itself leaves the model around it its config.
    inner = built("Mistral", config)
    replace_attention(inner.model, max_seq_len=LONGEST)
    inner.set_attn_implementation("eager")
    assert_close(whole(inner, MASK), whole(theirs, MASK))
    assert inner.config is config
