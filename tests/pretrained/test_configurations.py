"""Configurations as published are read as transformers reads them, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import CASES
from transformers import AutoConfig

from rope_export import BadInputError, RotaryEmbedding
from rope_export.pretrained.geometry import layer_of

pytestmark = [
    # torch's exporter copies its own deprecated LeafSpec.
    pytest.mark.filterwarnings(
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
    ),
    # It says so for every axis that two inputs share.
    pytest.mark.filterwarnings("ignore:# The axis name:UserWarning"),
]

# Configurations alone: what they leave out, and how they have been spelt.

YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
DEEPSEEK = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
GPT_OSS = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "rope_type": "yarn",
    "truncate": False,
}
SHORT, LONG = [1.0 + pair / 40 for pair in range(48)], [1.0 + pair for pair in range(48)]
FULL_AND_SLIDING = ["sliding_attention"] * 3 + ["full_attention"]


def published(model_type: str, hidden: int, heads: int, kv: int | None = None, **rest: Any) -> Any:
    content = {"model_type": model_type, "hidden_size": hidden, "num_attention_heads": heads}
    if kv is not None:
        content["num_key_value_heads"] = kv
    return content | {"num_hidden_layers": 4} | rest


# As in published files, as far as attention reads them, with four layers.
PUBLISHED = {
    "Llama 2 7B": published("llama", 4096, 32, 32, max_position_embeddings=4096, rope_scaling=None),
    "Llama 2 70B": published("llama", 8192, 64, 8, max_position_embeddings=4096),
    "Llama 3.1 8B": published(
        "llama",
        *(4096, 32, 8),
        attention_bias=False,
        max_position_embeddings=131072,
        rope_scaling=LLAMA3,
        rope_theta=500000.0,
    ),
    "Mistral 7B v0.1": published(
        "mistral", 4096, 32, 8, rope_theta=10000.0, sliding_window=4096, head_dim=None
    ),
    "Mistral Nemo": published(
        "mistral", 5120, 32, 8, rope_theta=1000000.0, sliding_window=None, head_dim=128
    ),
    "Mixtral 8x7B": published("mixtral", 4096, 32, 8, rope_theta=1e6, sliding_window=None),
    "Qwen2.5 7B": published(
        "qwen2",
        *(3584, 28, 4),
        max_position_embeddings=131072,
        max_window_layers=28,
        rope_theta=1000000.0,
        sliding_window=131072,
        use_sliding_window=False,
        rope_scaling=YARN,
    ),
    "Qwen2 with windows": published(
        "qwen2", 3584, 28, 4, max_window_layers=2, sliding_window=4096, use_sliding_window=True
    ),
    "Qwen1.5-MoE": published(
        "qwen2_moe",
        *(2048, 16, 16),
        max_window_layers=21,
        sliding_window=32768,
        use_sliding_window=False,
        rope_theta=1000000.0,
    ),
    "Qwen3 0.6B": published(
        "qwen3",
        *(1024, 16, 8),
        head_dim=128,
        max_window_layers=28,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=None,
        use_sliding_window=False,
        attention_bias=False,
    ),
    "Qwen3-30B-A3B": published(
        "qwen3_moe", 2048, 32, 4, head_dim=128, rope_theta=1000000.0, sliding_window=None
    ),
    "GLM-4 9B": published(
        "glm", 4096, 32, 2, attention_bias=True, head_dim=128, rope_theta=10000.0
    ),
    "GLM-4-0414": published(
        "glm4", 4096, 32, 2, attention_bias=False, partial_rotary_factor=0.5, rope_theta=10000.0
    ),
    "Phi-2": published(
        "phi", 2560, 32, partial_rotary_factor=0.4, qk_layernorm=False, rope_theta=10000.0
    ),
    "Phi-3 mini 4k": published("phi3", 3072, 32, 32, rope_scaling=None, sliding_window=2047),
    "Phi-3 mini 128k": published(
        "phi3",
        *(3072, 32, 32),
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling={"short_factor": SHORT, "long_factor": LONG, "type": "longrope"},
        rope_theta=10000.0,
        sliding_window=262144,
    ),
    "Phi-4 mini": published(
        "phi3",
        *(3072, 24, 8),
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        partial_rotary_factor=0.75,
        rope_scaling={"short_factor": SHORT, "long_factor": LONG, "type": "longrope"},
    ),
    "Gemma 2B": published("gemma", 2048, 8, 1, head_dim=256, rope_theta=10000.0),
    "Gemma 2 9B": published(
        "gemma2",
        *(3584, 16, 8),
        attn_logit_softcapping=50.0,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        rope_theta=10000.0,
    ),
    "Gemma 2 27B": published(
        "gemma2", 4608, 32, 16, head_dim=128, query_pre_attn_scalar=144, sliding_window=4096
    ),
    "Gemma 3 1B": published(
        "gemma3_text",
        *(1152, 4, 1),
        head_dim=256,
        query_pre_attn_scalar=256,
        rope_local_base_freq=10000,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=512,
        sliding_window_pattern=3,
    ),
    "Gemma 3 4B": {
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "model_type": "gemma3_text",
            "num_hidden_layers": 6,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    },
    "gpt-oss": published(
        "gpt_oss",
        *(2880, 64, 8),
        attention_bias=True,
        head_dim=64,
        max_position_embeddings=131072,
        rope_scaling=GPT_OSS,
        rope_theta=150000,
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "GPT-NeoX 20B": published("gpt_neox", 6144, 64, rotary_emb_base=10000, rotary_pct=0.25),
    "Pythia with another base": published("gpt_neox", 512, 8, rotary_emb_base=500, rotary_pct=0.5),
    "GPT-J": {
        "model_type": "gptj",
        "n_embd": 4096,
        "n_head": 16,
        "n_layer": 4,
        "n_positions": 2048,
        "rotary": True,
        "rotary_dim": 64,
    },
    "Falcon 7B": published(
        "falcon",
        *(4544, 71),
        alibi=False,
        bias=False,
        multi_query=True,
        new_decoder_architecture=False,
        parallel_attn=True,
    ),
    "Falcon 40B": published(
        "falcon", 8192, 128, alibi=False, new_decoder_architecture=True, num_kv_heads=8
    ),
    "Falcon 2": published(
        "falcon",
        *(4096, 32),
        new_decoder_architecture=True,
        num_kv_heads=8,
        rope_theta=500042,
    ),
    "StableLM 2": published(
        "stablelm", 2048, 32, 32, partial_rotary_factor=0.25, rope_theta=10000, use_qkv_bias=True
    ),
    "StarCoder2": published(
        "starcoder2",
        *(3072, 24, 2),
        rope_theta=999999.4420358813,
        sliding_window=4096,
        use_bias=True,
    ),
    "OLMo 2": published("olmo2", 4096, 32, 32, attention_bias=False, rope_theta=500000),
    "SmolLM3": published(
        "smollm3",
        *(2048, 16, 4),
        no_rope_layer_interval=4,
        no_rope_layers=[1, 1, 1, 0],
        rope_theta=5000000.0,
        use_sliding_window=False,
    ),
    "Command R": published("cohere", 8192, 64, 64, rope_theta=8000000.0, use_qk_norm=False),
    "Command R7B": published(
        "cohere2",
        *(4096, 32, 8),
        head_dim=128,
        rope_scaling=None,
        rope_theta=50000,
        rotary_pct=1.0,
        sliding_window=4096,
        sliding_window_pattern=4,
    ),
    "Granite 3": published(
        "granite", 4096, 32, 8, attention_multiplier=0.0078125, rope_theta=10000000.0
    ),
    "Minitron": published(
        "nemotron", 4096, 48, 8, head_dim=128, partial_rotary_factor=0.5, rope_theta=10000.0
    ),
    "EXAONE 4 32B": published(
        "exaone4",
        *(5120, 40, 8),
        head_dim=128,
        rope_scaling=LLAMA3 | {"factor": 16.0},
        rope_theta=1000000,
        sliding_window=4096,
        sliding_window_pattern="LLLG",
        layer_types=FULL_AND_SLIDING,
    ),
    "EXAONE 4 1.2B": published(
        "exaone4",
        *(2048, 32, 8),
        head_dim=64,
        rope_theta=1000000,
        sliding_window=None,
        sliding_window_pattern=None,
        layer_types=["full_attention"] * 4,
    ),
    "Helium 1": published("helium", 2560, 20, 20, head_dim=128, rope_theta=100000.0),
    "ERNIE 4.5": published("ernie4_5", 1024, 16, 2, head_dim=128, rope_theta=500000.0),
    "DeepSeek-V2-Lite": published(
        "deepseek_v2",
        *(2048, 16, 16),
        kv_lora_rank=512,
        max_position_embeddings=163840,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        rope_scaling=DEEPSEEK,
        rope_theta=10000,
        v_head_dim=128,
    ),
    "DeepSeek-V3": published(
        "deepseek_v3",
        *(7168, 128, 128),
        kv_lora_rank=512,
        max_position_embeddings=163840,
        q_lora_rank=1536,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_scaling=DEEPSEEK | {"mscale": 1.0, "mscale_all_dim": 1.0},
        rope_theta=10000,
    ),
    "RoFormer": published("roformer", 768, 12, embedding_size=768, rotary_value=False),
    "Qwen2-VL": published(
        "qwen2_vl",
        *(1536, 12, 2),
        max_window_layers=28,
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
        rope_theta=1000000.0,
        sliding_window=32768,
        use_sliding_window=False,
        vision_config={"depth": 1, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16},
    ),
}
# What every file has; with the values that transformers takes without them.
ESSENTIAL = ("hidden_size", "num_attention_heads", "n_embd", "n_head")
OF_LATENTS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank")


def sparse(model_type: str) -> dict[str, Any]:
    config = AutoConfig.for_model(model_type)
    text = config.get_text_config()
    content = {"model_type": model_type, "num_hidden_layers": 6}
    if model_type == "gptj":
        content = {"model_type": model_type, "n_layer": 6}
    if model_type == "nemotron":  # without it transformers itself fails
        content["num_key_value_heads"] = 8
    names = [name for name in (*ESSENTIAL, *OF_LATENTS) if name in text.to_dict()]
    content |= {name: getattr(text, name) for name in names}
    if config is text:
        return content
    return {"model_type": model_type, "text_config": content | {"model_type": text.model_type}}


SPARSE = sorted({case.model_type for case in CASES.values()})


def assert_read_as_theirs(content: dict[str, Any], known: dict[str, Any], layer: int) -> None:
    theirs = vars(checkpoints.facts_of(known, layer)).copy()
    inv_freq, factor = theirs.pop("inv_freq"), theirs.pop("attention_factor")
    ours = layer_of(content, layer)
    read = vars(ours) | {
        "eps": ours.qk_norm and ours.qk_norm.eps,
        "ranks": ours.latent and (ours.latent.q_rank, ours.latent.kv_rank),
    }
    read["scale"] = pytest.approx(read["scale"], rel=1e-12)
    assert theirs == {name: read[name] for name in theirs}
    rope = RotaryEmbedding.from_config(content, layer, max_seq_len=64)
    if inv_freq is None:
        assert rope is None
        assert ours.rope is None
    else:
        assert ours.rope.dim == rope.dim == 2 * len(inv_freq)
        torch.testing.assert_close(rope.inv_freq, inv_freq.double(), rtol=1e-6, atol=0)
        assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


def layers_of(content: dict[str, Any]) -> int:
    text = content.get("text_config", content)
    return text.get("num_hidden_layers") or text["n_layer"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read_as_theirs(name):
    content = PUBLISHED[name]
    for layer in range(layers_of(content)):
        assert_read_as_theirs(content, content, layer)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_transformers_makes_of_published_ones_is_read_as_theirs(name):
    content = PUBLISHED[name]
    saved = json.loads(AutoConfig.for_model(**content).to_json_string(use_diff=False))
    for layer in range(layers_of(content)):
        assert_read_as_theirs(saved, content, layer)


@pytest.mark.parametrize("family", SPARSE)
def test_what_a_configuration_leaves_out_is_what_transformers_takes(family):
    content = sparse(family)
    for layer in (0, 1, 3, 5):  # of either kind, where there are two
        assert_read_as_theirs(content, content, layer)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("Llama 2 7B", {"partial_rotary_factor": 0.5}),
        ("Qwen3 0.6B", {"rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 0.5}}),
        ("Mistral 7B v0.1", {"use_sliding_window": False}),
        ("Llama 2 7B", {"layer_types": ["sliding_attention"] * 4, "sliding_window": 16}),
    ],
    ids=str,
)
def test_fields_that_a_family_does_not_have_are_ignored_as_by_transformers_or_refused(name, field):
    content = PUBLISHED[name] | field
    try:
        layer_of(content, 0)
    except BadInputError:
        return
    assert_read_as_theirs(content, content, 0)


def test_longrope_by_its_first_name_is_longrope():
    # transformers 5 has lost it.
    content = PUBLISHED["Phi-3 mini 128k"]
    older = content | {"rope_scaling": content["rope_scaling"] | {"type": "su"}}
    now, then = (RotaryEmbedding.from_config(c, max_seq_len=8192) for c in (content, older))
    ids = torch.tensor([[0, 3, 5000]])
    for mine, its in zip(then.cos_sin(ids), now.cos_sin(ids), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["Qwen2-VL", "Llama 3.1 8B", "SmolLM3"])
def test_a_configuration_is_an_object_a_dictionary_or_a_folder(name, tmp_path):
    content = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    given = [content, AutoConfig.for_model(**content), tmp_path, str(tmp_path)]
    made = [RotaryEmbedding.from_config(config, max_seq_len=64) for config in given]
    for rope in made:
        assert rope.axes == (3 if name == "Qwen2-VL" else 1)
        assert torch.equal(rope.inv_freq, made[0].inv_freq)
        assert rope.max_seq_len == 64
    assert [RotaryEmbedding.from_config(c, 3, max_seq_len=8) is None for c in given] == [
        name == "SmolLM3"
    ] * 4


BAICHUAN_13B = published("baichuan", 5120, 40, model_max_length=4096)
CHATGLM_6B = {
    "model_type": "chatglm",
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "max_sequence_length": 2048,
    "num_attention_heads": 32,
    "num_layers": 28,
    "position_encoding_2d": True,
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "bert"}, "bert"),
        ({}, "model_type"),
        (PUBLISHED["Falcon 7B"] | {"alibi": True}, "[aA][lL][iI][bB][iI]"),
        (PUBLISHED["RoFormer"] | {"rotary_value": True}, "rotary_value"),
        (PUBLISHED["Gemma 3 1B"] | {"use_bidirectional_attention": True}, "bidirectional"),
        (BAICHUAN_13B, "[aA][lL][iI][bB][iI]"),
        (CHATGLM_6B, "ChatGLM 1"),
    ],
    ids=[
        *("unknown", "unnamed", "Falcon with ALiBi", "rotated values", "EmbeddingGemma"),
        *("Baichuan 13B", "ChatGLM 6B"),
    ],
)
def test_what_is_not_rope_attention_is_refused_by_name(content, message):
    with pytest.raises(BadInputError, match=message):
        layer_of(content, 0)


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(BadInputError, match=f"layer.*{layer}"):
        layer_of(PUBLISHED["Llama 2 7B"], layer)


def test_an_unknown_name_can_be_read_as_a_known_family():
    content = PUBLISHED["Llama 3.1 8B"] | {"model_type": "a new one"}
    assert layer_of(content, 0, family="llama") == layer_of(PUBLISHED["Llama 3.1 8B"], 0)
