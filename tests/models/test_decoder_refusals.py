"""What would act beside the weights of a decoder is refused, and nothing is changed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from checkpoints import LONGEST
from decoders import original, replaced, tokens
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomModel,
    DacConfig,
    DacModel,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
)

from rope_export import BadInputError
from rope_export.dispatch import lowering_to
from rope_export.lowering.target import Target
from rope_export.models.decoder_with_cache import DecoderWithCache
from rope_export.models.replacement import replace_attention

pytestmark = [
    pytest.mark.filterwarnings(
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
    ),
    pytest.mark.filterwarnings("ignore:# The axis name:UserWarning"),
]


FIRST_TOKEN = dict.fromkeys(
    ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0
)


# What is refused.


class Adapted(nn.Module):
    """As adapters wrap a projection."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


class Quantised(nn.Linear):
    """As libraries of quantised layers derive theirs."""


def _attention(model: Any) -> Any:
    return model.model.layers[1].self_attn


def _adapt(model: Any) -> None:
    _attention(model).v_proj = Adapted(_attention(model).v_proj)


def _quantise(model: Any) -> None:
    _attention(model).o_proj = Quantised(128, 64, bias=False)


def _whole_numbers(model: Any) -> None:
    linear = _attention(model).q_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)


def _hook(model: Any) -> None:
    _attention(model).k_proj.register_forward_hook(lambda *_: None)


def _parametrise(model: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(_attention(model).k_proj)


def _widen(model: Any) -> None:
    _attention(model).k_proj = nn.Linear(64, 128, bias=False)


def _forget(model: Any) -> None:
    _attention(model).k_proj = None


def _extend(model: Any) -> None:
    _attention(model).gate_proj = nn.Linear(64, 64)


def _compile(model: Any) -> None:
    _attention(model).compile()


def _look_both_ways(model: Any) -> None:
    model.config.is_causal = False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_adapt, r"layers\.1\.self_attn\.v_proj is .*Adapted"),
        (_quantise, r"o_proj is .*Quantised"),
        (_whole_numbers, r"q_proj\.weight is .*int8"),
        (_hook, "k_proj has hooks"),
        (_parametrise, "k_proj"),
        (_widen, r"k_proj\.weight must be \(64, 64\).*\(128, 64\)"),
        (_forget, r"lacks 'k_proj\.weight'"),
        (_extend, r"has 'gate_proj\.bias'"),
        (_compile, "compiled"),
        (_look_both_ways, "is_causal is False"),
    ],
)
def test_what_acts_beside_the_weights_is_refused_and_nothing_changed(change, message):
    model = original("Llama 3")
    change(model)
    before = list(model.modules())
    with pytest.raises(BadInputError, match=message):
        replace_attention(model)
    assert list(model.modules()) == before


def test_what_is_no_decoder_of_transformers_is_refused():
    with pytest.raises(BadInputError, match="of transformers, got Linear"):
        replace_attention(nn.Linear(2, 2))
    with pytest.raises(BadInputError, match="compiled"):
        replace_attention(torch.compile(original("Llama 3")))
    with pytest.raises(BadInputError, match="of transformers, got Sequential"):
        replace_attention(nn.Sequential(original("Llama 3")))
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        bert = BertModel(BertConfig(**small, intermediate_size=16, vocab_size=8))
        bloom = BloomModel(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=8))
        # Whose head is called "decoder", and which has a part of that name that is no model.
        modern = ModernBertDecoderForCausalLM(
            ModernBertDecoderConfig(**small, intermediate_size=16, vocab_size=8, **FIRST_TOKEN)
        )
        sounds = DacModel(DacConfig(encoder_hidden_size=8, decoder_hidden_size=32))
    for unknown in (bert, bloom, modern, sounds):
        with pytest.raises(
            BadInputError, match=r"model_type '(bert|bloom|modernbert-decoder|dac)' is not known"
        ):
            replace_attention(unknown)
        with pytest.raises(BadInputError, match="no attention of this package"):
            DecoderWithCache(unknown)
    version = re.escape(transformers.__version__)
    with pytest.raises(
        BadInputError, match=version + r" has no module 'gpt_neox\.layers\.0\.self_attn'"
    ):
        replace_attention(original("GPT-NeoX"), family="phi")
    with pytest.raises(BadInputError, match="both ways"):
        replace_attention(original("RoFormer"))


def test_scores_that_would_be_dropped_out_are_refused_in_training():
    model = original("StarCoder2")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout, layer.self_attn.residual_dropout = 0.1, 1.0
    replace_attention(model)
    model(tokens())
    with pytest.raises(BadInputError, match=r"attention_dropout must be 0 in training, got 0\.1"):
        model.train()(tokens())
    attention = model.model.layers[0].self_attn
    attention.scores_dropout = 0.0
    position_ids = torch.arange(3)[None]
    dropped, _ = attention(torch.randn(1, 3, 64), position_ids=position_ids)
    assert not dropped.any()


def test_positions_beyond_the_tables_are_refused():
    model = original("Llama 3")
    replace_attention(model, max_seq_len=16)
    assert model(tokens(16)).logits.shape[1] == 16
    with pytest.raises(BadInputError, match="raise max_seq_len"):
        model(tokens(17))


def test_graphs_are_refused_without_replacement_with_adapters_and_of_experts_onnx_lacks():
    with pytest.raises(BadInputError, match="replace_attention"):
        DecoderWithCache(original("Llama 3"))
    model = replaced("Llama 3")
    _adapt(model)
    with pytest.raises(BadInputError, match=r"v_proj must be a plain nn\.Linear"):
        DecoderWithCache(model)
    decoder = DecoderWithCache(replaced("Mixtral"))
    with (
        lowering_to(Target("ort", ("cpu",), LONGEST)),
        pytest.raises(BadInputError, match="set_experts_implementation"),
    ):
        torch.export.export(decoder, (tokens(),), strict=False)
