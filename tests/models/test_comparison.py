"""A replacement that computes something else than the module it is for is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from checkpoints import LONGEST, randomise
from decoders import assert_close, original, tokens
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rope_export import BadInputError
from rope_export.models.replacement import replace_attention
from rope_export.pretrained import geometry

SMALL = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def made(kind: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL | fields)
    model = transformers.AutoModel.from_config(config)
    randomise(model)
    return model.to(dtype).eval()


# What no field says, or a field says that nobody reads.

UNLIKE = [
    ("EuroBert", "llama", {}, "both ways"),
    ("Olmo", "llama", {"clip_qkv": 0.5}, ""),
    ("Olmo", "llama", {"clip_qkv": 8.0}, ""),  # which only loud tokens pass
    ("Cwm", "llama", {"sliding_window": 8}, "window"),
    ("Cwm", "llama", {"sliding_window": 8192}, "window"),
    ("Ministral", "llama", {"sliding_window": 4096, "head_dim": 16}, "window"),
    ("GraniteMoe", "llama", {"attention_multiplier": 0.3}, ""),
    ("GraniteMoe", "llama", {"attention_multiplier": 1.0}, "scaled by 1"),
    ("Cohere", "llama", {}, "rotates pairs as interleaved"),
    ("Llama", "cohere", {}, "rotates pairs as half"),
    ("Glm", "nemotron", {"head_dim": 16, "attention_bias": False}, "rotates pairs"),
    ("Cohere2", "cohere", {"sliding_window": 4096}, "window|no RoPE"),
    ("Gemma2", "llama", {"query_pre_attn_scalar": 16, "sliding_window": 4096}, ""),
    ("SmolLM3", "llama", {"no_rope_layers": [1, 0]}, "no RoPE"),
    ("NanoChat", "llama", {}, "norm"),
]


@pytest.mark.parametrize(("kind", "family", "fields", "guess"), UNLIKE)
def test_what_a_family_lacks_is_seen_in_what_layers_compute(
    kind, family, fields, guess, monkeypatch
):
    monkeypatch.setattr(geometry, "refuse_unread", lambda *_, **__: None)
    model = made(kind, **fields)
    with pytest.raises(BadInputError, match=rf"replacement as family {family} is off") as raised:
        replace_attention(model, family=family)
    assert "\n" not in str(raised.value)
    assert any(word in str(raised.value) for word in guess.split("|"))


@pytest.mark.parametrize(
    ("kind", "family", "fields"),
    [
        ("Olmo", "llama", {}),
        ("Arcee", "llama", {}),
        ("SeedOss", "llama", {"attention_bias": False, "head_dim": 32}),
        ("GraniteMoe", "granite", {"attention_multiplier": 0.3}),
        (
            "Ministral",
            "mistral",
            {"sliding_window": 4096, "layer_types": ["sliding_attention"] * 2, "head_dim": 16},
        ),
    ],
)
def test_a_model_of_another_name_is_replaced_where_its_attention_is_the_same(kind, family, fields):
    model = made(kind, **fields)
    with torch.no_grad():
        before = model(tokens())[0]
        assert len(replace_attention(model, family=family)) == 2
        assert_close(model(tokens())[0], before)


# What acts in a model of a known family, and its configuration does not say.


def _scale(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 1.05


def _norm(model: Any) -> None:
    model.model.layers[1].self_attn.k_norm.variance_epsilon = 0.2


def _frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq *= 1.01


def _magnitude(model: Any) -> None:
    model.model.rotary_emb.attention_scaling = 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", [_scale, _norm, _frequencies, _magnitude])
def test_what_no_configuration_says_is_seen_in_any_dtype(change, dtype):
    model = original("Qwen3").to(dtype)
    if change is _frequencies and dtype != torch.float32:
        pytest.skip("rounded frequencies are made anew")
    change(model)
    with pytest.raises(BadInputError, match=r"self_attn: its replacement as family qwen3 is off"):
        replace_attention(model, max_seq_len=LONGEST)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["Qwen3", "Gemma 2", "GPT-J", "DeepSeek-V2", "Llama, YaRN"])
def test_no_rounding_is_taken_for_a_difference(name, dtype):
    model = original(name).to(dtype)  # transformers' own frequencies are rounded with it
    assert replace_attention(model, max_seq_len=LONGEST)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_loud_weights_are_not_taken_for_a_difference():
    model = original("Llama 3")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 40.0
        layer.self_attn.v_proj.weight.data *= 1e-4
    assert replace_attention(model, max_seq_len=LONGEST)


# The model itself.


def state_of(model: nn.Module) -> list[Any]:
    found: list[Any] = [{n: id(p) for n, p in model.named_parameters()}]
    found.append({n: (p.clone(), p.grad) for n, p in model.named_parameters()})
    found.append({n: b.clone() for n, b in model.named_buffers()})
    found.append([(id(m), m.training, sorted(vars(m))) for m in model.modules()])
    found.append([len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()])
    return [*found, copy.deepcopy(model.config.to_dict()), model.config._attn_implementation]


def assert_same(actual: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert actual == expected


@pytest.mark.parametrize("name", ["Qwen3", "Llama, dynamic", "Mistral"])
def test_a_model_that_is_refused_is_as_it_was(name):
    model = original(name).train()
    model.model.layers[0].eval()
    model(tokens(40)).logits.sum().backward()
    model.model.layers[1].self_attn.scaling *= 1.05
    before, numbers = state_of(model), torch.random.get_rng_state()
    with pytest.raises(BadInputError, match="off"):
        replace_attention(model, max_seq_len=LONGEST)
    assert torch.equal(torch.random.get_rng_state(), numbers)
    assert_same(state_of(model), before)


def test_a_model_that_is_replaced_keeps_its_mode_gradients_and_numbers():
    model = original("Qwen3").train()
    model.model.layers[0].eval()
    model(tokens()).logits.sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    numbers = torch.random.get_rng_state()
    replace_attention(model, max_seq_len=LONGEST)
    assert torch.equal(torch.random.get_rng_state(), numbers)
    assert {n: p.grad for n, p in model.named_parameters()} == grads
    now = {name: m.training for name, m in model.named_modules()}
    assert all(now[name] == modes[name] for name in modes.keys() & now.keys())
    assert [layer.self_attn.window for layer in model.model.layers] == [None, None]
    assert not any("forward" in vars(m) for m in model.modules())


def test_windows_are_as_wide_as_they_were():
    model = made("Mistral", sliding_window=4096)
    replace_attention(model)
    assert {layer.self_attn.window for layer in model.layers} == {4096}
    assert model.config.sliding_window == 4096


def test_few_positions_are_compared_where_few_are_served():
    for served in (1, 2, 5):
        model = original("Llama 3")
        replace_attention(model, max_seq_len=served)


def test_without_numbers_only_what_a_configuration_says_is_known():
    with torch.device("meta"):
        model, other = made_on_meta("Llama"), made_on_meta("Arcee")
    assert len(replace_attention(model)) == 2
    with pytest.raises(BadInputError, match="load its weights first"):
        replace_attention(other, family="llama")


def made_on_meta(kind: str) -> Any:
    return transformers.AutoModel.from_config(getattr(transformers, f"{kind}Config")(**SMALL))


def test_caches_that_pytorch_is_told_how_to_rebuild_are_still_written_to(monkeypatch):
    """As transformers registers its own when it exports: whoever maps over them gets another."""
    kind = transformers.DynamicCache

    def apart(cache: Any) -> Any:
        return [layer.keys for layer in cache.layers], None

    def rebuilt(_: Any, __: Any) -> Any:
        return kind()

    monkeypatch.setitem(pytree.SUPPORTED_NODES, kind, pytree.NodeDef(kind, apart, rebuilt, None))
    assert len(replace_attention(original("Llama 3"))) == 2


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_that_went_through_half_precision_is_replaced(half):
    """Its rotary embedding keeps rounded frequencies; those of its replacement are exact."""
    model = original("Llama 3").to(half).float()
    assert len(replace_attention(model)) == 2
