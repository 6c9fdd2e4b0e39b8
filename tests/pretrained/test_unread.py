"""What a configuration states and a family does not read is refused by name, or is nothing new."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
import torch
from checkpoints import CASES, HEADS, HIDDEN, WHOLE, Oracle, _model_class
from safetensors.torch import save_file
from transformers import AutoConfig

from rope_export import Attention, BadInputError, RotaryEmbedding
from rope_export.pretrained.families import FAMILIES
from rope_export.pretrained.geometry import layer_of, layers_of
from rope_export.pretrained.weights import pieces

PLAIN = {
    "model_type": "mine",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}
SLIDING = ["sliding_attention"] * 2

# What other decoders have beside a Llama's attention: field, value.
BESIDE = [
    ("llama", "clip_qkv", 8.0),
    ("llama", "sliding_window", 4096),
    ("llama", "use_sliding_window", True),
    ("llama", "attention_window_size", 128),
    ("llama", "local_attention_window_len", 512),
    ("llama", "attention_chunk_size", 8192),
    ("llama", "attn_logit_softcapping", 50.0),
    ("llama", "attention_multiplier", 0.015625),
    ("llama", "query_pre_attn_scalar", 144),
    ("llama", "is_causal", False),
    ("llama", "use_bidirectional_attention", True),
    ("llama", "architectures", ["MineForMaskedLM"]),
    ("llama", "use_qk_norm", True),
    ("llama", "qk_l2_clip_threshold", 22.6),
    ("llama", "qk_norm_type", "qwen3"),
    ("llama", "attn_temperature_tuning", True),
    ("llama", "attention_value_scale", 0.707),
    ("llama", "attention_k_eq_v", True),
    ("llama", "num_kv_shared_layers", 1),
    ("llama", "rotary_pct", 0.25),
    ("llama", "rope_interleave", True),
    ("llama", "no_rope_layers", [0, 1]),
    ("llama", "no_rope_layer_interval", 1),
    ("llama", "alibi", True),
    ("llama", "position_embedding_type", "alibi"),
    ("llama", "kv_lora_rank", 16),
    ("llama", "v_head_dim", 8),
    ("deepseek_v3", "index_head_dim", 128),
    ("llama", "layer_types", SLIDING),
    ("qwen2", "attention_out_bias", True),
    ("mistral", "use_sliding_window", False),
    ("mistral", "attention_bias", True),
    ("mistral", "layer_types", ["full_attention"] * 2),
    ("gptj", "rope_theta", 500000.0),
    ("gptj", "rope_parameters", {"rope_type": "linear", "factor": 2.0}),
    ("olmo2", "norm_eps", 1e-3),
    ("gemma3_text", "attn_logit_softcapping", 30.0),
]
OF_ROPE = {"rotary_pct", "rope_interleave", "no_rope_layers", "no_rope_layer_interval", "alibi"}
OF_ROPE |= {"position_embedding_type", "rope_theta", "rope_parameters"}
OF_ROPE |= {"v_head_dim", "index_head_dim"}  # widths of heads


def stated(family: str, **fields: Any) -> dict[str, Any]:
    own: dict[str, Any] = {"sliding_window": 16} if family == "mistral" else {}
    if family == "deepseek_v3":
        own = {"num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": None}
        own |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
    if family == "gptj":
        own = {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8}
    return PLAIN | own | fields


@pytest.mark.parametrize(("family", "field", "value"), BESIDE)
def test_what_a_family_does_not_read_is_refused_by_name_and_value(family, field, value):
    layer_of(stated(family), 0, family)
    content = stated(family, **{field: value})
    for own in ("mine", family):  # named as a family, and of it
        with pytest.raises(BadInputError) as raised:
            layers_of(content | {"model_type": own}, family)
        said = str(raised.value)
        assert field in said
        assert "\n" not in said
        assert repr(value)[:20] in said or (field == "layer_types" and value[0] in said)
    if field not in OF_ROPE:  # which has nothing to do with it
        RotaryEmbedding.from_config(content, family=family)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        (
            "llama",
            {"clip_qkv": None, "sliding_window": None, "layer_types": ["full_attention"] * 2},
        ),
        ("llama", {"use_sliding_window": False, "attention_chunk_size": None, "alibi": False}),
        ("llama", {"attention_multiplier": 0.25, "query_pre_attn_scalar": 16, "rotary_pct": 1.0}),
        ("llama", {"is_causal": True, "no_rope_layers": [1, 1], "rope_interleave": False}),
        ("llama", {"position_embedding_type": "rope_gptj", "kv_channels": 16, "v_head_dim": 16}),
        ("llama", {"attention_dropout": 0.1, "attn_implementation": "eager", "mlp_bias": True}),
        ("llama", {"architectures": ["MineForCausalLM"], "final_logit_softcapping": 30.0}),
        ("llama", {"use_flash_attention": True, "chunk_size_feed_forward": 4, "norm_eps": 1e-3}),
        ("mistral", {"use_sliding_window": True, "layer_types": SLIDING, "attention_bias": False}),
        ("qwen2", {"attention_bias": True, "max_window_layers": 1, "sliding_window": 8}),
        ("gptj", {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default"}}),
    ],
)
def test_what_says_nothing_else_than_the_family_is_let_pass(family, fields):
    plain, more = stated(family), stated(family, **fields)
    assert layers_of(more, family) == layers_of(plain, family)


@pytest.mark.parametrize("kind", ["olmo3", "cwm", "ministral", "moshi", "granitemoe", "nanochat"])
def test_other_decoders_of_transformers_named_as_a_llama(kind):
    # As transformers makes their configurations, with all that it fills in.
    content = AutoConfig.for_model(kind).to_dict()
    content |= {"model_type": "mine"}
    if kind == "nanochat":  # its norms have no weights, and no field says so
        layers_of(content, "llama")
        return
    with pytest.raises(BadInputError, match=r"sliding|rope_parameters has no|attention_multiplier"):
        layers_of(content, "llama")


def test_a_checkpoint_named_as_a_family_is_refused_where_it_states_more(tmp_path):
    layer = layer_of(PLAIN, 0, "llama")
    home = "model.layers.0.self_attn."
    parts = pieces(layer, FAMILIES["llama"].tensors)
    save_file(
        {home + name: torch.randn(part.shape) for part in parts for name in part.tensors},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(PLAIN))
    Attention.from_checkpoint(tmp_path, family="llama")
    (tmp_path / "config.json").write_text(json.dumps(PLAIN | {"clip_qkv": 8}))
    with pytest.raises(BadInputError, match=r"config\.json: clip_qkv is 8, .* family llama does"):
        Attention.from_checkpoint(tmp_path, family="llama")


# Widths of heads.

OF_EVERY_TYPE = {case.model_type: name for name, case in reversed(CASES.items())}
# Falcon's configuration takes none, and Helium's output is as wide as the model whatever it is.
WITHOUT_A_WIDTH = {"falcon", "helium"}


def with_width(name: str, width: int) -> Any:
    case = CASES[name]
    return dataclasses.replace(case, arguments=case.arguments | {"head_dim": width})


@pytest.mark.parametrize("kind", sorted(set(OF_EVERY_TYPE) - WITHOUT_A_WIDTH))
def test_a_stated_width_of_heads_is_what_it_is_to_transformers(kind):
    assert HIDDEN // HEADS != 24
    case = with_width(OF_EVERY_TYPE[kind], 24)
    with torch.device("meta"):
        model = _model_class(case).from_config(case.config())
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not re.search("vision|visual", name)
    }
    content = case.config().to_dict()
    home = FAMILIES[kind].tensors.home.format(layer=0)
    for piece in pieces(layer_of(content, 0), FAMILIES[kind].tensors):
        for tensor in piece.tensors:
            assert [shape for name, shape in shapes.items() if name.endswith(home + tensor)] == [
                piece.shape
            ]


@pytest.mark.parametrize("name", ["Command R7B", "GPT-NeoX", "GPT-J", "RoFormer"])
def test_a_layer_with_a_stated_width_is_theirs(name, tmp_path):
    oracle = Oracle(with_width(name, 24), tmp_path)
    for layer, [(x, expected)] in enumerate(oracle.run((WHOLE,), cached=False)):
        actual = Attention.from_checkpoint(tmp_path, layer)(x)
        assert (actual - expected).abs().max() <= 2e-6 * expected.abs().max()
