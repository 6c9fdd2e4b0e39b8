"""Decoders of transformers compute, train and generate with our attention what they did before."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoints import CASES, COMPOSITE, LONGEST, SERVED
from decoders import TOKENS, assert_close, original, replaced, served, tokens, whole
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rope_export import BadInputError
from rope_export.models.decoder_attention import DecoderAttention
from rope_export.models.replacement import replace_attention

pytestmark = [
    pytest.mark.filterwarnings(
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
    ),
    pytest.mark.filterwarnings("ignore:# The axis name:UserWarning"),
]
CAUSAL = [name for name, case in CASES.items() if case.causal]
# Where some parameters are made of several tensors, or of their rows in another order.
REMADE = ("phi3", "gpt_neox", "falcon", "deepseek_v2", "deepseek_v3")
REMADE_CASES = ("StableLM with norms",)
MASKS = {
    "none": (0, 0, 0),
    "padded left": (5, 0, 0),
    "padded right": (0, 0, 7),
    "rows of either": (3, 4, 6),
}


def mask_of(kind: str) -> Tensor | None:
    if kind == "none":
        return None
    left, other_left, right = MASKS[kind]
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, :left] = 0
    mask[1, :other_left] = 0
    mask[1, TOKENS - right :] = 0
    return mask


def gradients(model: Any) -> dict[str, Tensor]:
    """By name, of the parameters that exist before and after."""
    model.train().zero_grad()
    model(input_ids=tokens(), use_cache=False)[0].square().mean().backward()
    model.eval()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_model_computes_what_it_computed(name):
    ours = replaced(name)
    for kind in MASKS:  # each time a new one: some keep the longest length they have seen
        assert_close(whole(ours, mask_of(kind)), whole(original(name), mask_of(kind)))
    for steps in SERVED.values():
        for actual, expected in zip(
            served(ours, steps), served(original(name), steps), strict=True
        ):
            assert_close(actual, expected)


@pytest.mark.parametrize("name", CAUSAL)
def test_it_learns_what_it_learned(name):
    expected, actual = gradients(original(name)), gradients(replaced(name))
    shared = expected.keys() & actual.keys()
    assert len(shared) > len(expected) / 2
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for parameter in shared:
        difference = (actual[parameter] - expected[parameter]).abs().max()
        assert difference <= 1e-5 * expected[parameter].abs().max() + 1e-7 * largest


@pytest.mark.parametrize("name", CAUSAL)
def test_weights_stay_what_and_where_they_are(name):
    model = original(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = {id(p) for p in model.parameters()}
    names = replace_attention(model, max_seq_len=LONGEST)
    assert len(names) == CASES[name].layers
    for path in names:
        assert isinstance(model.get_submodule(path), DecoderAttention)
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[key], state[key]) for key in state)
    kept = {id(p) for p in model.parameters()} <= parameters
    assert kept == (CASES[name].model_type not in REMADE and name not in REMADE_CASES)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert replace_attention(model) == []
    # And back: another model's weights go in by their own names.
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert not any(model.load_state_dict(state))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


GENERATING = (
    *("Llama 3.1", "Llama, dynamic", "Qwen3", "Gemma 2", "Gemma 3, text", "Mistral", "gpt-oss"),
    *("Phi-3, LongRoPE", "GPT-NeoX", "GPT-J", "Falcon, multi-query", "DeepSeek-V3", "Command R7B"),
)


@pytest.mark.parametrize("name", GENERATING)
def test_it_generates_the_same_tokens(name):
    ours = replaced(name)
    ids = tokens(9, batch=3)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[2, :1] = 0
    ids = torch.where(mask.bool(), ids, 0)
    plan = {"max_new_tokens": 14, "do_sample": False}
    for how in (
        {},
        {"attention_mask": mask},
        {"attention_mask": mask, "num_beams": 2},
        {"attention_mask": mask, "cache_implementation": "static", "disable_compile": True},
    ):
        expected = original(name).generate(ids, **plan, **how)
        assert torch.equal(ours.generate(ids, **plan, **how), expected)


@pytest.mark.parametrize("name", ["Qwen3", "Mistral", "gpt-oss"])
def test_rows_of_several_sequences_and_masks_of_ones_own_are_understood(name):
    theirs, ours = original(name), replaced(name)
    ids = tokens()
    apart = torch.cat((torch.arange(13), torch.arange(11))).expand(2, -1)
    seen = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    seen[:, :, 9:, 4] = False
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)  # as theirs takes it
    with torch.no_grad():
        actual, expected = (m(ids, position_ids=apart, use_cache=False)[0] for m in (ours, theirs))
        assert_close(actual, expected)
        if name != "gpt-oss":  # which transformers gives no positions for its masks
            assert_close(actual[:, 13:], ours(ids[:, 13:], use_cache=False)[0])
        expected = theirs(ids, attention_mask=added, use_cache=False)[0]
        for mask in (seen, added, torch.where(seen, 0.0, -3e38).double()):
            assert_close(ours(ids, attention_mask=mask, use_cache=False)[0], expected)
        near = torch.where(seen, (torch.arange(TOKENS) - torch.arange(TOKENS)[:, None]) / 3, added)
        expected = theirs(ids, attention_mask=near, use_cache=False)[0]
        assert_close(ours(ids, attention_mask=near, use_cache=False)[0], expected)
        with pytest.raises(
            BadInputError, match=r"bool or numbers to add, .* got .* of torch.int64"
        ):
            ours(ids, attention_mask=seen.long())


def test_an_optimizer_made_before_goes_on():
    model = original("Qwen3")
    optimizer_before = torch.optim.SGD(model.parameters(), lr=0.1)
    replace_attention(model, max_seq_len=LONGEST)
    weight = model.model.layers[1].self_attn.q_norm.weight
    before = weight.detach().clone()
    model(tokens(), labels=tokens()).loss.backward()
    optimizer_before.step()
    assert not torch.equal(weight, before)


def test_frozen_weights_stay_frozen_where_they_are_split():
    model = original("Phi-3")
    model.requires_grad_(False)
    model.model.layers[1].self_attn.qkv_proj.requires_grad_(True)
    replace_attention(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkv"]


@pytest.mark.parametrize("name", ["Llama 3", "StableLM with norms", "DeepSeek-V3", "GPT-J"])
def test_it_is_saved_copied_and_pickled(name, tmp_path):
    theirs, ours = original(name), replaced(name)
    ours.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(whole(back, None), whole(theirs, None))
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(
            whole(again, mask_of("padded left")), whole(ours, mask_of("padded left"))
        )
        assert replace_attention(again) == []


def test_layers_that_turn_alike_share_their_tables():
    model = replaced("Gemma 3, text")
    local, everywhere = (layer.self_attn.rope for layer in model.model.layers)
    assert local is not everywhere
    model = replaced("Llama 3")
    assert model.model.layers[0].self_attn.rope is model.model.layers[1].self_attn.rope


def test_gradient_checkpointing_changes_nothing():
    ours = replaced("Gemma 2")
    expected = gradients(ours)
    getattr(ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable)()
    actual = gradients(ours)
    for parameter, grad in expected.items():
        assert_close(actual[parameter], grad)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen3", "Llama, dynamic"])
def test_a_training_step_is_one_graph_at_any_length_without_masks(name):
    theirs, ours = original(name).train(), replaced(name).train()
    attending: list[dict[str, Any]] = []
    graphs = 0

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        attending.extend(
            node.kwargs
            for node in module.graph.nodes
            if node.target is nn.functional.scaled_dot_product_attention
        )
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    for length in (20, TOKENS):
        ids = tokens(length)
        losses = [model(input_ids=ids, labels=ids).loss for model in (compiled, theirs)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert graphs == 2
    if name == "Qwen3":
        assert attending
        assert all(kwargs["is_causal"] and kwargs["attn_mask"] is None for kwargs in attending)
    for actual, expected in (
        (model.get_input_embeddings().weight.grad for model in (ours, theirs)),
    ):
        assert_close(actual, expected)


def test_an_unknown_name_can_be_read_as_a_known_family():
    theirs, ours = original("Llama 3"), original("Llama 3")
    ours.config.__class__ = type("Renamed", (type(ours.config),), {"model_type": "a new one"})
    with pytest.raises(BadInputError, match="'a new one' is not known"):
        replace_attention(ours)
    assert replace_attention(ours, family="llama", max_seq_len=LONGEST)
    assert_close(whole(ours, None), whole(theirs, None))


def test_composite_models_keep_their_other_parts():
    for name, case in CASES.items():
        if case.model_type in COMPOSITE:
            model = original(name)
            names = replace_attention(model)
            assert all(".language_model." in path for path in names)
            others = [m for m in model.modules() if isinstance(m, DecoderAttention)]
            assert len(others) == case.layers


def test_importing_it_imports_no_transformers():
    check = (
        "import sys; from rope_export import DecoderWithCache, replace_attention; "
        "sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
