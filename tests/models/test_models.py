"""Families of language models, as transformers runs them, against our block and its graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from caches import caching
from selection import slow_unless
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache

from rope_export import Attention, ExportResult, RotaryEmbedding, export
from rope_export.lowering import situation

pytestmark = [
    # torch's exporter copies its own deprecated LeafSpec.
    pytest.mark.filterwarnings(
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
    ),
    # It says so for every axis that two inputs share.
    pytest.mark.filterwarnings("ignore:# The axis name:UserWarning"),
]

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WINDOW, LONGEST = 64, 4, 2, 16, 5, 32
CLOSE = {"rtol": 5e-6, "atol": 5e-6}  # of outputs up to 14
# Of three rows, in nine columns of prompt; then columns in which every row has a token.
PROMPTS, WIDTH, DECODED = (9, 4, 1), 9, 4
STEPS = {"at once": (9, 1, 1, 1, 1), "in chunks": (6, 3, 1, 2, 1)}

Call = Callable[[Tensor, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class Family:
    """A model of transformers, and the arguments that should make our block its attention.

    Attributes:
        config: class of its configuration.
        arguments: of that, where they matter to attention.
        block: of ours.
        rotation: of our RotaryEmbedding, which else turns halves of whole heads.
    """

    config: type[transformers.PreTrainedConfig]
    arguments: dict[str, Any] = field(default_factory=dict)
    block: dict[str, Any] = field(default_factory=dict)
    rotation: dict[str, Any] = field(default_factory=dict)


def rotating(part: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": part}


SLIDES = {"sliding_window": WINDOW, "layer_types": ["sliding_attention"]}
FAMILIES = {
    "Llama": Family(transformers.LlamaConfig),
    "Qwen2": Family(transformers.Qwen2Config, block={"qkv_bias": True}),
    "Qwen3": Family(
        transformers.Qwen3Config, {"rms_norm_eps": 0.1}, block={"qk_norm": True, "qk_norm_eps": 0.1}
    ),
    "GLM": Family(
        transformers.GlmConfig,
        {"attention_bias": True, "rope_parameters": rotating(1.0)},
        block={"qkv_bias": True},
        rotation={"layout": "interleaved"},
    ),
    "Phi3": Family(
        transformers.Phi3Config, {"rope_parameters": rotating(0.5)}, rotation={"dim": HEAD_DIM // 2}
    ),
    "Mistral": Family(
        transformers.MistralConfig, {"sliding_window": WINDOW}, block={"window": WINDOW}
    ),
    "Gemma2": Family(
        transformers.Gemma2Config,
        {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 24, **SLIDES},
        block={"softcap": 2.0, "scale": 24**-0.5, "window": WINDOW},
    ),
    "gpt-oss": Family(  # its default rotation is YaRN
        transformers.GptOssConfig,
        {"num_local_experts": 2, "num_experts_per_tok": 1, **SLIDES},
        block={"sinks": True, "qkv_bias": True, "out_bias": True, "window": WINDOW},
    ),
    "ModernBERT": Family(
        transformers.ModernBertConfig,
        {"local_attention": 2 * WINDOW, "layer_types": ["sliding_attention"]},
        block={"num_kv_heads": HEADS, "causal": False, "window": WINDOW},
    ),
}
CAUSAL = [name for name in FAMILIES if name != "ModernBERT"]


class Model:
    """A family's model of one layer, whose attention reads the embeddings as they come."""

    def __init__(self, family: Family) -> None:
        self.config = family.config(
            vocab_size=8,
            hidden_size=HIDDEN,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            pad_token_id=0,
            **family.arguments,
        )
        self.model = AutoModel.from_config(self.config, attn_implementation="eager").eval()
        (layer,) = self.model.layers
        if isinstance(self.config, transformers.ModernBertConfig):
            self.model.embeddings.norm = nn.Identity()
            self.attention = layer.attn
        else:
            layer.input_layernorm = nn.Identity()
            self.attention = layer.self_attn
        self.attention.register_forward_hook(self._keep)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.attention.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            # Scores spread, and norms, sinks and biases are none of the usual.
            parameter.data = drawn * 1.5 / 8 if parameter.ndim == 2 else 1 + drawn / 2

    def _keep(self, _module: nn.Module, _given: object, result: tuple[Tensor, ...]) -> None:
        self.kept = result[0]

    @torch.no_grad()
    def __call__(self, x: Tensor, **arguments: Any) -> Tensor:
        self.model(inputs_embeds=x, **arguments)
        return self.kept

    def weights(self) -> dict[str, Tensor]:
        """By our names."""
        weights = {}
        for name, weight in self.attention.state_dict().items():
            if name in ("qkv_proj.weight", "Wqkv.weight"):
                kv = (weight.shape[0] - HIDDEN) // 2
                parts = weight.split((HIDDEN, kv, kv))
                weights |= {f"{n}_proj.weight": w for n, w in zip("qkv", parts, strict=True)}
            else:
                weights[name.replace("Wo.", "o_proj.")] = weight
        return weights


@cache
def theirs_of(name: str) -> Model:
    return Model(FAMILIES[name])


def ours_of(name: str) -> Attention:
    family, theirs = FAMILIES[name], theirs_of(name)
    turning = theirs.config.rope_parameters
    turning = turning.get("sliding_attention", turning)  # some have one for each kind of layer
    rotation = {"dim": HEAD_DIM, "layout": "half"} | family.rotation
    rope = RotaryEmbedding(**rotation, scaling=turning, max_seq_len=LONGEST)
    arguments = {"num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "rope": rope} | family.block
    block = Attention(HIDDEN, HEADS, **arguments)
    missing, unexpected = block.load_state_dict(theirs.weights(), strict=False)
    assert (missing, unexpected) == (["rope.freqs"], [])
    return block.eval().requires_grad_(False)


# Calls one after the other, served by theirs, by ours, and by a graph in onnxruntime.


class TheirsServed:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.past = DynamicCache(config=model.config)

    def __call__(self, x: Tensor, mask: Tensor | None) -> Tensor:
        arguments = {}
        if mask is not None:  # as `generate` has it
            ids = (mask.cumsum(-1) - 1).clamp(min=0)[:, -x.shape[1] :]
            arguments = {"attention_mask": mask, "position_ids": ids}
        return self.model(x, **caching(self.model.model, self.past), **arguments)


class OursServed:
    def __init__(self, block: Attention, batch: int) -> None:
        self.block = block
        self.past = block.empty_cache(batch)

    def __call__(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y, self.past = self.block(x, past=self.past, attention_mask=mask)
        return y


class GraphServed:
    def __init__(self, session: onnxruntime.InferenceSession, batch: int) -> None:
        self.session = session
        self.past = [np.zeros((batch, KV_HEADS, 0, HEAD_DIM), np.float32)] * 2

    def __call__(self, x: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        past = dict(zip(("past_key", "past_value"), self.past, strict=True))
        y, *self.past = self.session.run(
            ["output", "present_key", "present_value"],
            {"hidden_states": x.numpy(), "attention_mask": mask.numpy(), **past},
        )
        return torch.from_numpy(y)


def drive(call: Call, x: Tensor, mask: Tensor | None, steps: Sequence[int]) -> Tensor:
    """Outputs of calls with so many columns in each."""
    outputs, end = [], 0
    for count in steps:
        seen = None if mask is None else mask[:, : end + count]
        outputs.append(call(x[:, end : end + count], seen))
        end += count
    return torch.cat(outputs, dim=1)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(1))


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Prompts padded on one side, what is decoded after them, and its mask."""
    mask = torch.ones(len(PROMPTS), WIDTH + DECODED, dtype=torch.int64)
    for row, count in enumerate(PROMPTS):
        mask[row, slice(WIDTH - count) if side == "left" else slice(count, WIDTH)] = 0
    return tokens(*mask.shape), mask


def expected_of(name: str, side: str, steps: Sequence[int]) -> Tensor:
    """What they give for the real tokens of `padded`, row after row."""
    theirs = theirs_of(name)
    x, mask = padded(side)
    if side == "right" and "window" in FAMILIES[name].block:
        # Their window counts padding in the middle of a row, ours tokens.
        rows = [theirs(x[row : row + 1, real]) for row, real in enumerate(mask.bool())]
        return torch.cat(rows, dim=1)[0]
    return drive(TheirsServed(theirs), x, mask, steps)[mask.bool()]


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2, 24])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_full_pass_is_theirs(name, length):
    x = tokens(2, length)
    torch.testing.assert_close(ours_of(name)(x), theirs_of(name)(x), **CLOSE)


@pytest.mark.parametrize(
    "steps",
    [
        (1,) * 8,
        (WINDOW - 1, 1, 1, 1),
        (WINDOW, 1, 1, 1),
        (WINDOW + 1, 1, 1),
        (3, WINDOW, 1, 2, WINDOW + 2, 1, 1),
        (12, 9, 1, 1, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CAUSAL)
def test_prefill_chunks_and_decoding_are_theirs(name, steps):
    x = tokens(2, sum(steps))
    theirs, ours = TheirsServed(theirs_of(name)), OursServed(ours_of(name), 2)
    expected = drive(theirs, x, None, steps)
    torch.testing.assert_close(drive(ours, x, None, steps), expected, **CLOSE)
    (layer,) = theirs.past.layers
    for kept, whole in zip((layer.keys, layer.values), ours.past, strict=True):
        # Theirs forgets what no window reaches any more.
        torch.testing.assert_close(whole[:, :, -kept.shape[2] :], kept, **CLOSE)


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CAUSAL)
def test_padded_batches_are_theirs(name, side, steps):
    x, mask = padded(side)
    actual = drive(OursServed(ours_of(name), len(x)), x, mask, steps)[mask.bool()]
    torch.testing.assert_close(actual, expected_of(name, side, steps), **CLOSE)


def opened(result: ExportResult) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(result.model, options, providers=["CPUExecutionProvider"])


# Only `ort` moves padding about; and what families share is exported once for each target: GLM has
# the biases of Qwen2, gpt-oss the window of Mistral.
GRAPHS = [
    *(("ort", "left", name) for name in CAUSAL if name not in ("Qwen2", "Mistral")),
    *(("ort", "right", name) for name in ("Llama", "gpt-oss")),
    *(("onnx", "left", name) for name in ("Qwen3", "GLM", "Phi3", "Gemma2", "gpt-oss")),
    *(("primitive", "right", name) for name in ("Qwen3", "Gemma2", "gpt-oss")),
]
BY_DEFAULT = (
    ("ort", "left", "gpt-oss"),
    ("ort", "left", "GLM"),
    ("onnx", "left", "Phi3"),
    ("primitive", "right", "Qwen3"),
)


@pytest.mark.parametrize(
    ("target", "side", "name"), slow_unless(lambda *row: row in BY_DEFAULT, GRAPHS)
)
def test_graphs_with_a_cache_are_theirs(target, side, name, tmp_path):
    folder = tmp_path / "block"
    session = opened(export(ours_of(name), folder, target=target, cache=True, padding=side))
    x, mask = padded(side)
    for steps in STEPS.values():
        actual = drive(GraphServed(session, len(x)), x, mask, steps)[mask.bool()]
        torch.testing.assert_close(actual, expected_of(name, side, steps), **CLOSE)


def test_prompts_computed_in_blocks_of_the_window_are_theirs(tmp_path, monkeypatch):
    # Blocks of 128 would need far positions, where the float32 angles of theirs show.
    monkeypatch.setattr(situation, "SMALLEST_BLOCK", WINDOW)
    block = ours_of("gpt-oss")
    result = export(block, tmp_path / "block", target="ort", cache=True, padding="left")
    assert f"blocks of {WINDOW}" in result.graph["branches"][-1]
    session, longest_whole = opened(result), situation.BLOCKS_TO_WIN * WINDOW
    for length in range(longest_whole, longest_whole + WINDOW + 2):
        x, mask = tokens(2, length + 2), torch.ones(2, length + 2, dtype=torch.int64)
        mask[1, : length // 3] = 0
        actual, expected = (
            drive(serve, x, mask, (length, 1, 1))[mask.bool()]
            for serve in (GraphServed(session, 2), TheirsServed(theirs_of("gpt-oss")))
        )
        torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize(
    ("target", "side"),  # `ort` takes the operator of `onnx`
    [
        (None, "left"),
        (None, "right"),
        ("ort", "left"),
        pytest.param("primitive", "right", marks=pytest.mark.slow),
    ],
)
def test_padded_bidirectional_batches_are_theirs(target, side, tmp_path):
    x, mask = (t[:, :WIDTH] for t in padded(side))
    block, folder = ours_of("ModernBERT"), tmp_path / "block"
    if target is None:
        actual = block(x, attention_mask=mask)
    else:
        plan = {"target": target, "attention_mask": True, "padding": side}
        feeds = {"hidden_states": x.numpy(), "attention_mask": mask.numpy()}
        actual = torch.from_numpy(opened(export(block, folder, **plan)).run(None, feeds)[0])
    expected = theirs_of("ModernBERT")(x, attention_mask=mask)
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], **CLOSE)
