"""Decoders of transformers compute, train and generate with our attention what they did before."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from checkpoints import CASES, COMPOSITE, LONGEST, SERVED, WINDOW, _model_class, randomise
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, BloomConfig, BloomModel

from rope_export import BadInputError, export
from rope_export.decoders import DecoderAttention, DecoderWithCache, replace_attention
from rope_export.lowering import lowering_to
from rope_export.lowering.target import Target

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
TOKENS = 24


@cache
def _built(name: str) -> nn.Module:
    case = CASES[name]
    torch.manual_seed(0)
    model = _model_class(case).from_config(case.config(), attn_implementation="eager")
    randomise(model)
    return model.eval()


def original(name: str) -> Any:
    """A model nobody else has."""
    return copy.deepcopy(_built(name))


def replaced(name: str) -> Any:
    model = original(name)
    assert replace_attention(model, max_seq_len=LONGEST)
    return model


def tokens(length: int = TOKENS, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, 32, (batch, length), generator=generator)


def deviation(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max() / expected.abs().max())


def assert_close(actual: Tensor, expected: Tensor, within: float = 1e-5) -> None:
    assert deviation(actual, expected) <= within


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


@torch.no_grad()
def whole(model: Any, mask: Tensor | None) -> Tensor:
    result = model(input_ids=tokens(), attention_mask=mask, use_cache=False)[0]
    return result if mask is None else result[mask.bool()]


@torch.no_grad()
def served(model: Any, steps: tuple[int, ...]) -> Iterator[Tensor]:
    past, end = None, 0
    for count in steps:
        given = tokens(sum(steps))[:, end : end + count]
        result = model(input_ids=given, past_key_values=past, use_cache=True)
        past, end = result.past_key_values, end + count
        yield result[0]


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
        actual = ours(ids, attention_mask=seen, use_cache=False)[0]
        assert_close(actual, theirs(ids, attention_mask=added, use_cache=False)[0])
        with pytest.raises(BadInputError, match="bool"):
            ours(ids, attention_mask=added)


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


# Graphs.


class Served:
    """A graph with its cache, called as an application would."""

    def __init__(self, session: onnxruntime.InferenceSession, model: Any, batch: int) -> None:
        self.session = session
        self.past = [t.numpy() for pair in DecoderWithCache(model).empty_cache(batch) for t in pair]

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        names = [given.name for given in self.session.get_inputs()]
        assert names[:2] == ["input_ids", "attention_mask"]
        given = [ids.numpy(), mask.numpy(), *self.past]
        logits, *self.past = self.session.run(None, dict(zip(names, given, strict=True)))
        return torch.from_numpy(np.asarray(logits))


EXPORTED = {
    "Qwen3": {"com.microsoft::GroupQueryAttention"},
    "gpt-oss": {"com.microsoft::GroupQueryAttention"},
    "GPT-NeoX": {"com.microsoft::GroupQueryAttention", "RotaryEmbedding"},
}


@pytest.mark.parametrize("name", EXPORTED)
def test_its_graph_serves_what_the_original_computes(name, tmp_path):
    theirs, ours = original(name), replaced(name)
    if name == "gpt-oss":
        ours.set_experts_implementation("batched_mm")
    decoder = DecoderWithCache(ours)
    result = export(decoder, tmp_path / "decoder", max_seq_len=LONGEST, **decoder.example())
    kinds = ("GroupQueryAttention", "MultiHeadAttention")
    fused = {f"com.microsoft::{kind}" for kind in kinds} | {"Attention", "RotaryEmbedding"}
    assert fused & set(result.ops) == EXPORTED[name]
    # In one branch each: for a single token, for all rows, for one row.
    assert result.ops["com.microsoft::GroupQueryAttention"] == 3 * CASES[name].layers
    # Nothing is left of transformers' masks and angles.
    assert not {"Trilu", "LessOrEqual", "Cos", "Sin"} & set(result.ops)
    session = onnxruntime.InferenceSession(result.model, providers=["CPUExecutionProvider"])
    for steps in SERVED.values():
        graph, end = Served(session, ours, 2), 0
        for expected in served(theirs, steps):
            count = expected.shape[1]
            ids = tokens(sum(steps))[:, end : end + count]
            end += count
            actual = graph(ids, torch.ones(2, end, dtype=torch.long))
            assert_close(actual, expected, 2e-5)
    # Rows of 12 and 7 tokens, padded on the right, then three more each: as if they were alone.
    lengths, graph = (12, 7), Served(session, ours, 2)
    ids = tokens(15)
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
    logits = graph(ids[:, :12], mask)
    parts = [[logits[row, :length]] for row, length in enumerate(lengths)]
    for new in range(3):
        mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), dim=1)
        logits = graph(torch.stack([ids[r, n + new] for r, n in enumerate(lengths)])[:, None], mask)
        for row in range(2):
            parts[row].append(logits[row])
    for row, length in enumerate(lengths):
        with torch.no_grad():
            alone = theirs(ids[row : row + 1, : length + 3], use_cache=False).logits[0]
        assert length + 3 > WINDOW
        assert_close(torch.cat(parts[row]), alone, 2e-5)


OTHERS = ("Mistral", "Gemma 3", "Qwen2-VL, text", "DeepSeek-V2")


@pytest.mark.parametrize("name", OTHERS)
def test_no_axis_is_narrowed(name):
    ours = replaced(name)
    if name == "DeepSeek-V2":
        ours.set_experts_implementation("batched_mm")
    decoder = DecoderWithCache(ours)
    example = decoder.example()
    ranges = {
        "batch": (1, 2**31 - 1),
        "sequence": (1, 48),
        "past_sequence": (0, 47),
        "past_sequence+sequence": (1, 48),
    }
    dims = {
        label: torch.export.Dim(f"axis_{index}", min=low, max=high)
        for index, (label, (low, high)) in enumerate(ranges.items())
    }
    shapes: dict[str, Any] = {
        argument: {axis: dims[label] for axis, label in axes.items()}
        for argument, axes in example["dynamic_shapes"].items()
    }
    shapes["past_key_values"] = [
        (shapes["past_key_values"],) * 2 for _ in example["kwargs"]["past_key_values"]
    ]
    with torch.no_grad(), lowering_to(Target("ort", ("cpu",), LONGEST)):
        program = torch.export.export(
            decoder, (), example["kwargs"], dynamic_shapes=shapes, strict=False
        )
    kept = {(int(r.lower), int(r.upper)) for r in program.range_constraints.values()}
    assert kept == set(ranges.values())


@torch.no_grad()
@pytest.mark.parametrize("name", ["Mistral", "DeepSeek-V2", "Llama 2"])
def test_in_eager_pytorch_it_serves_the_same(name):
    theirs, decoder = original(name), DecoderWithCache(replaced(name))
    assert_close(decoder(tokens()), whole(theirs, None))
    for steps in SERVED.values():
        past, end = decoder.empty_cache(2), 0
        for expected in served(theirs, steps):
            count = expected.shape[1]
            ids = tokens(sum(steps))[:, end : end + count]
            end += count
            actual, past = decoder(ids, torch.ones(2, end, dtype=torch.long), past)
            assert_close(actual, expected)
            assert {t.shape[2] for pair in past for t in pair} == {end}


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
        (_look_both_ways, "both ways"),
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
    for unknown in (bert, bloom):
        with pytest.raises(BadInputError, match=r"model_type '(bert|bloom)' is not known"):
            replace_attention(unknown)
    with pytest.raises(BadInputError, match=r"has no module 'gpt_neox\.layers\.0\.self_attn'"):
        replace_attention(original("GPT-NeoX"), family="phi")
    with pytest.raises(BadInputError, match="both ways"):
        replace_attention(original("RoFormer"))


def test_an_unknown_name_can_be_read_as_a_known_family():
    theirs, ours = original("Llama 3"), original("Llama 3")
    ours.config.__class__ = type("Renamed", (type(ours.config),), {"model_type": "a new one"})
    with pytest.raises(BadInputError, match="'a new one' is not known"):
        replace_attention(ours)
    assert replace_attention(ours, family="llama", max_seq_len=LONGEST)
    assert_close(whole(ours, None), whole(theirs, None))


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


def test_composite_models_keep_their_other_parts():
    for name, case in CASES.items():
        if case.model_type in COMPOSITE:
            model = original(name)
            names = replace_attention(model)
            assert all(".language_model." in path for path in names)
            others = [m for m in model.modules() if isinstance(m, DecoderAttention)]
            assert len(others) == case.layers


def test_importing_it_imports_no_transformers():
    check = "import sys, rope_export, rope_export.decoders; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
