"""The truth of a decoder of transformers is held to transformers' own code too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import CASES, LONGEST
from decoders import assert_close, original, replaced, tokens
from selection import slow_unless
from torch import nn

from rope_export import BadInputError, DecoderWithCache, export
from rope_export.models.own_code import own_code
from rope_export.proof.own_code import agreement_notes

pytestmark = [
    pytest.mark.filterwarnings(
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
    ),
    pytest.mark.filterwarnings("ignore:# The axis name:UserWarning"),
]
CAUSAL = [name for name, case in CASES.items() if case.causal]
# With windows, without RoPE in some layers, latents, and parameters that are made of others.
BY_DEFAULT = {"Gemma 2", "Gemma 3", "GPT-J", "DeepSeek-V2", "Phi-3", "StableLM with norms"}


def decoder_of(name: str) -> Any:
    model = replaced(name)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")
    return DecoderWithCache(model)


@pytest.mark.parametrize("name", slow_unless(lambda name: name in BY_DEFAULT, CAUSAL))
def test_both_are_the_same_in_float64(name):
    decoder = decoder_of(name)
    (note,) = agreement_notes(decoder, LONGEST, {})
    kind = type(original(name).get_decoder().get_submodule(path_of(decoder)))
    assert note.startswith(f"by transformers' own code ({kind.__name__} with the present weights")


def path_of(decoder: Any) -> str:
    inner = decoder.model.get_decoder()
    found = (path for path, part in inner.named_modules() if part is decoder.attentions[0])
    return next(found)


@pytest.mark.parametrize("name", ["Phi-3", "GPT-NeoX", "DeepSeek-V2", "StableLM with norms"])
def test_their_own_code_has_the_present_weights_and_leaves_the_model_as_it_is(name):
    model, theirs = replaced(name), original(name)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs.load_state_dict(model.state_dict())
    before = [*model.modules()]
    with torch.no_grad():
        ours = model(tokens())[0]
        with own_code(model) as classes:
            assert not any("DecoderAttention" in type(m).__name__ for m in model.modules())
            assert_close(model(tokens())[0], theirs(tokens())[0], within=1e-6)
        assert len(classes) == 1
        assert [*model.modules()] == before
        assert torch.equal(model(tokens())[0], ours)


def _scale(attention: Any) -> None:
    attention.scale *= 1.0001


def _window(attention: Any) -> None:
    attention.window = 7


def _both_ways(attention: Any) -> None:
    attention.causal = False


def _no_angles(attention: Any) -> None:
    attention.rope = None


def _epsilon(attention: Any) -> None:
    attention.q_norm.eps = attention.k_norm.eps = 1e-3


@pytest.mark.parametrize("change", [_scale, _window, _both_ways, _no_angles, _epsilon])
def test_a_replacement_that_is_no_longer_the_same_is_refused(change):
    decoder = decoder_of("Qwen3 with windows and biases")
    change(decoder.attentions[1])
    with pytest.raises(BadInputError, match=r"transformers' own Qwen3Attention .*: off by"):
        agreement_notes(decoder, LONGEST, {})


def test_an_export_says_so_or_is_refused_and_nothing_is_written(tmp_path):
    decoder = decoder_of("Llama 2")
    how = decoder.example() | {"max_seq_len": LONGEST, "validate": True}
    report = export(decoder, tmp_path / "same", **how).report
    assert report.passed
    assert sum("by transformers' own code (LlamaAttention" in note for note in report.notes) == 1
    decoder.attentions[0].scale *= 1.05
    with pytest.raises(BadInputError, match="transformers' own LlamaAttention"):
        export(decoder, tmp_path / "other", **how)
    assert [path.name for path in tmp_path.iterdir()] == ["same"]


def test_a_model_around_one_is_held_to_it_too():
    class Around(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids).logits

    around = Around(replaced("Llama 3"))
    assert agreement_notes(around, LONGEST, {})
    around.model.model.layers[0].self_attn.causal = False
    with pytest.raises(BadInputError, match="LlamaAttention"):
        agreement_notes(around, LONGEST, {})
    assert agreement_notes(nn.Linear(2, 2), LONGEST, {}) == []
