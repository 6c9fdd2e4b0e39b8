"""Small checkpoints of language models, written and run by transformers: oracles for attention.

A `Case` is a configuration; `Oracle` writes its checkpoint, with no parameter as it was
initialised, reads it back with transformers and records what its attention modules are given and
give, in the model's own forward pass: with its own masks, positions and caches.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from caches import cache_in, caching
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions
from transformers.models.roformer.modeling_roformer import RoFormerSinusoidalPositionalEmbedding

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16
WINDOW = 8
TRAINED = 16  # tokens, where frequencies depend on it
LONGEST = 48
BATCH = 2

WHOLE = 24  # tokens of one call without a cache, past window and trained length
SERVED = {
    # The trained length is passed by a single token, the window by a chunk.
    "in small calls": (6, 3, 6, 1, 1, 1, 7, 1),
    "after a long prompt": (20, 1, 5, 1),
}

Call = tuple[Tensor, Tensor]
"""What an attention module was given, and what it gave."""


@dataclass(frozen=True)
class Case:
    """A configuration, by the class that transformers has for it.

    Attributes:
        model_type: of ``config.json``: the family.
        arguments: of the configuration, besides the small sizes all share.
        layers: how many.
        targets: of export, besides ``ort``.
        bare: the checkpoint is that of the model without its head.
        exported: layers that are exported; none where another case is built alike.
    """

    model_type: str
    arguments: dict[str, Any] = field(default_factory=dict)
    layers: int = 2
    targets: tuple[str, ...] = ()
    bare: bool = False
    exported: tuple[int, ...] = (0,)

    @property
    def family(self) -> str | None:
        """None: ``model_type`` says it."""
        return None

    @property
    def causal(self) -> bool:
        return self.model_type != "roformer"

    @property
    def axes(self) -> int:
        """Axes of positions that are given, 0 when they are implied."""
        return 3 if self.model_type.startswith("qwen2_vl") else 0

    def config(self) -> transformers.PreTrainedConfig:
        sizes = {
            "vocab_size": 32,
            "hidden_size": HIDDEN,
            "intermediate_size": 32,
            "num_hidden_layers": self.layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": LONGEST,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if self.model_type in COMPOSITE:
            small = COMPOSITE[self.model_type] | {
                "text_config": sizes | self.arguments,
            }
            return AutoConfig.for_model(self.model_type, **small)
        if self.model_type in WITHOUT_GROUPS:
            del sizes["num_key_value_heads"]
        return AutoConfig.for_model(self.model_type, **sizes | self.arguments)


WITHOUT_GROUPS = ("falcon", "gpt_neox", "gptj", "roformer")
COMPOSITE: dict[str, dict[str, Any]] = {
    "gemma3": {
        "vision_config": {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 8,
            "patch_size": 4,
        },
        "mm_tokens_per_image": 4,
    },
    "qwen2_vl": {
        "vision_config": {"depth": 1, "embed_dim": 8, "num_heads": 1, "hidden_size": HIDDEN}
    },
}


def rotating(**parameters: Any) -> dict[str, Any]:
    """Arguments that say how the model rotates, as transformers 5 spells it."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, **parameters}}


def slides(*layers: bool) -> dict[str, Any]:
    """Arguments of models whose layers are of two kinds."""
    kinds = ["sliding_attention" if sliding else "full_attention" for sliding in layers]
    return {"sliding_window": WINDOW, "layer_types": kinds}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.25, 1.5, 2.0],
    "long_factor": [1.5, 3.0, 5.0, 9.0],
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": TRAINED,
}
LATENT = {
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": HEADS,
    "first_k_dense_replace": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
DEEPSEEK_YARN = YARN | {"mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 4.0, "beta_slow": 1.0}
MROPE = rotating(mrope_section=[4, 2, 2])
# Large enough to be seen where it is not the usual.
EPS = 0.1

CASES = {
    "Llama 2": Case("llama", bare=True),
    "Llama 3": Case("llama", rotating(rope_theta=500000.0) | {"head_dim": 32}, exported=()),
    "Llama 3.1": Case("llama", rotating(**LLAMA3) | {"attention_bias": True}, exported=()),
    "Llama, linear": Case("llama", rotating(rope_type="linear", factor=4.0), exported=()),
    "Llama, dynamic": Case(
        "llama",
        rotating(rope_type="dynamic", factor=4.0) | {"max_position_embeddings": TRAINED},
        targets=("onnx",),
    ),
    "Llama, YaRN": Case("llama", rotating(**YARN), exported=()),
    "Mistral": Case("mistral", {"sliding_window": WINDOW, "head_dim": 32}),
    "Mistral without a window": Case("mistral", {"sliding_window": None}, exported=()),
    "Mixtral": Case("mixtral", {"num_local_experts": 2, "sliding_window": WINDOW}),
    "Qwen2": Case(
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        exported=(1,),
    ),
    "Qwen2 with a window not in use": Case("qwen2", {"sliding_window": WINDOW}, exported=()),
    "Qwen2.5, YaRN": Case("qwen2", rotating(**YARN), exported=()),
    "Qwen2-MoE": Case(
        "qwen2_moe",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        layers=3,
    ),
    "Qwen2-MoE without biases": Case(
        "qwen2_moe",
        {"qkv_bias": False, "num_experts": 2, "num_experts_per_tok": 1},
        exported=(),
    ),
    "Qwen3": Case("qwen3", {"rms_norm_eps": EPS, "head_dim": 32}),
    "Qwen3 with windows and biases": Case(
        "qwen3",
        {"attention_bias": True, "use_sliding_window": True, "max_window_layers": 1}
        | {"sliding_window": WINDOW, "head_dim": HEAD_DIM},
        exported=(),
    ),
    "Qwen3-MoE": Case(
        "qwen3_moe",
        {
            "head_dim": 32,
            "rms_norm_eps": EPS,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
        },
    ),
    "GLM": Case("glm", {"head_dim": 32}),
    "GLM-4": Case("glm4", {"head_dim": 32, "attention_bias": False}),
    "Phi": Case("phi", rotating(partial_rotary_factor=0.5), exported=()),
    "Phi with norms": Case("phi", {"qk_layernorm": True, "layer_norm_eps": EPS}, targets=("onnx",)),
    "Phi-3": Case("phi3", {"sliding_window": WINDOW}, exported=()),
    "Phi-3, LongRoPE": Case(
        "phi3",
        rotating(**LONGROPE, partial_rotary_factor=0.5)
        | {"max_position_embeddings": 4 * TRAINED, "original_max_position_embeddings": TRAINED},
        targets=("primitive",),
    ),
    "Gemma": Case("gemma", {"head_dim": 32}),
    "Gemma 2": Case(
        "gemma2",
        {"head_dim": 32, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 24}
        | slides(True, False),
    ),
    "Gemma 3, text": Case(
        "gemma3_text",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "rms_norm_eps": EPS,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            },
        }
        | slides(True, False),
        exported=(1,),
    ),
    "Gemma 3": Case("gemma3", {"head_dim": 32, "query_pre_attn_scalar": 24} | slides(True, False)),
    "gpt-oss": Case(
        "gpt_oss",
        {"head_dim": 32, "num_local_experts": 2, "num_experts_per_tok": 1} | slides(True, False),
    ),
    "GPT-NeoX": Case("gpt_neox", rotating(partial_rotary_factor=0.25)),
    "GPT-NeoX without biases": Case("gpt_neox", {"attention_bias": False}, exported=()),
    "GPT-J": Case("gptj", {"rotary_dim": 8}),
    "Falcon, multi-query": Case("falcon"),
    "Falcon, grouped": Case(
        "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}, exported=()
    ),
    "Falcon, multi-head": Case("falcon", {"multi_query": False, "bias": True}, exported=()),
    "StableLM": Case("stablelm", {"use_qkv_bias": True}, exported=()),
    "StableLM with norms": Case(
        "stablelm", {"qk_layernorm": True, "layer_norm_eps": EPS}, targets=("primitive",)
    ),
    "StarCoder2": Case("starcoder2", {"use_bias": True, "sliding_window": WINDOW}),
    "StarCoder2 without biases": Case("starcoder2", {"use_bias": False}, exported=()),
    "OLMo 2": Case("olmo2", {"rms_norm_eps": EPS}, targets=("onnx",)),
    "OLMo": Case("olmo", {"attention_bias": True}),
    "OLMo 3": Case(
        "olmo3",
        {
            "rms_norm_eps": EPS,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                "full_attention": {"rope_theta": 500.0, **YARN},
            },
        }
        | slides(True, False),
    ),
    "CWM": Case("cwm", {"head_dim": 32} | slides(False, True), exported=(1,)),
    "SmolLM3": Case("smollm3", {"no_rope_layers": [1, 0]}, exported=(1,), targets=("primitive",)),
    "SmolLM3 with windows": Case(
        "smollm3",
        {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": WINDOW},
        exported=(),
    ),
    "Command R": Case("cohere", {"layer_norm_eps": EPS}, exported=()),
    "Command R+": Case("cohere", {"use_qk_norm": True, "layer_norm_eps": EPS}),
    "Command R7B": Case("cohere2", slides(True, False)),
    "Granite": Case("granite", {"attention_multiplier": 0.2}),
    "Nemotron": Case("nemotron", {"head_dim": 32}),
    "EXAONE 4": Case("exaone4", {"rms_norm_eps": EPS} | slides(True, False)),
    "EXAONE 4 without windows": Case(
        "exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 2},
        exported=(),
    ),
    "Helium": Case("helium", {"head_dim": HEAD_DIM}),
    "ERNIE 4.5": Case("ernie4_5", {"head_dim": 32, "use_bias": True}),
    "DeepSeek-V2": Case(
        "deepseek_v2",
        LATENT | {"q_lora_rank": 20, "rms_norm_eps": EPS} | rotating(**DEEPSEEK_YARN),
        targets=("onnx", "primitive"),
    ),
    "DeepSeek-V2-Lite": Case("deepseek_v2", LATENT | {"q_lora_rank": None}),
    "DeepSeek-V3": Case(
        "deepseek_v3",
        LATENT | {"q_lora_rank": 20, "attention_bias": True} | rotating(**DEEPSEEK_YARN),
    ),
    "DeepSeek-V3, halves": Case(
        "deepseek_v3",
        LATENT | {"q_lora_rank": None, "rope_interleave": False, "rms_norm_eps": EPS},
        exported=(),
    ),
    "RoFormer": Case("roformer", targets=("onnx",)),
    "Qwen2-VL, text": Case("qwen2_vl_text", MROPE, targets=("onnx",)),
    "Qwen2-VL": Case("qwen2_vl", MROPE),
}


def randomise(model: nn.Module) -> None:
    """Parameters that are none of the usual, so that scores spread and a dropped one shows."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # RoFormer keeps its sines as one
            continue
        drawn = torch.randn(parameter.shape, generator=generator)
        if "norm" in name.lower() and not name.endswith("bias"):
            parameter.data = 1 + drawn / 2
        elif parameter.ndim > 1:
            parameter.data = drawn * 1.2 * parameter.shape[-1] ** -0.5
        else:
            parameter.data = drawn / 2


def _model_class(case: Case) -> Any:
    if case.model_type in COMPOSITE:
        return AutoModelForImageTextToText
    if case.bare or not case.causal or case.model_type == "qwen2_vl_text":
        return AutoModel
    return AutoModelForCausalLM


_LAYER = re.compile(
    r"(?:layers|layer|h)\.(\d+)\.(?:self_attn|self_attention|attn|attention)(?:\.self)?$"
)


class Oracle:
    """A checkpoint, and the model that transformers makes of it."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.folder = folder
        model = _model_class(case).from_config(case.config(), attn_implementation="eager")
        randomise(model)
        model.save_pretrained(folder)
        del model

    def _decoder(self) -> nn.Module:
        model = _model_class(self.case).from_pretrained(self.folder, attn_implementation="eager")
        model.eval()
        if self.case.model_type in COMPOSITE:
            return model.model.language_model
        return model.base_model

    @torch.no_grad()
    def run(self, steps: Sequence[int], *, cached: bool) -> list[list[Call]]:
        """Record calls of every layer's attention, one after the other with a cache.

        Returns:
            for every layer, what each call was given and gave.
        """
        decoder = self._decoder()  # a new one: some keep the longest length they have seen
        with recording(decoder, self.case.layers) as calls:
            past, end = None, 0
            for seed, count in enumerate(steps):
                generator = torch.Generator().manual_seed(seed)
                x = torch.randn(BATCH, count, HIDDEN, generator=generator)
                arguments: dict[str, Any] = {}
                if self.case.axes:
                    arguments["position_ids"] = positions(end, count)
                if self.case.causal:
                    arguments |= {**caching(decoder, past), "use_cache": cached}
                result = decoder(inputs_embeds=x, **arguments)
                past = cache_in(result)
                end += count
        return calls


def positions(start: int, count: int) -> Tensor:
    """Positions of an image's tokens on three axes, unlike in every row: ``[3, BATCH, count]``."""
    token = torch.arange(start, start + count)
    axes = torch.stack((token, token // 3 + 1, (token * 5) % 11))
    return torch.stack((axes, (axes + 2) % LONGEST), dim=1)


@contextmanager
def recording(decoder: nn.Module, layers: int) -> Iterator[list[list[Call]]]:
    """What the attention modules of ``decoder`` are given and give, while it runs."""
    calls: list[list[Call]] = [[] for _ in range(layers)]
    handles = []
    for name, module in decoder.named_modules():
        found = _LAYER.search(name)
        if found is None or "vision" in name:
            continue
        if name.endswith("attention") and hasattr(module, "self"):
            continue  # RoFormer's, with the residual stream added
        index = int(found[1])
        giving = module
        if name.endswith(".self"):
            giving = decoder.get_submodule(name.removesuffix("self") + "output.dense")

        def given(
            _module: nn.Module, args: Any, kwargs: Any, result: Any, *, index: int = index
        ) -> None:
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            calls[index].append((x, result))

        handles.append(module.register_forward_hook(given, with_kwargs=True))
        if giving is not module:

            def gave(_module: nn.Module, _args: Any, result: Any, *, index: int = index) -> None:
                x, _ = calls[index][-1]
                calls[index][-1] = (x, result)

            handles.append(giving.register_forward_hook(gave))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
        for layer in calls:
            layer[:] = [(x, y[0] if isinstance(y, tuple) else y) for x, y in layer]


# Families whose code is not in transformers, from what their authors published.


@dataclass(frozen=True)
class Written:
    """A checkpoint of one layer, and what its attention is by definition, in float64.

    Attributes:
        config: of ``config.json``.
        weights: by the names of the published checkpoints.
        heads: projected tokens ``[B, S, hidden]`` and weights to queries, keys and values
            ``[B, S, heads, width]``.
        rotate: heads, their positions and the length so far to rotated heads.
        output: the name of the output projection.
        family: the row of the table of families, where ``model_type`` does not say it.
    """

    config: dict[str, Any]
    weights: dict[str, tuple[int, ...]]
    heads: Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, Tensor, Tensor]]
    rotate: Callable[[Tensor, Tensor, int], Tensor]
    output: str
    family: str | None = None
    causal: bool = True
    axes: int = 0


def _linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    bias = weights.get(f"{name}.bias")
    y = x @ weights[f"{name}.weight"].T
    return y if bias is None else y + bias


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))


def _rotate_halves(base: float, factor: float = 1.0) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Channel ``i`` with ``i + width / 2``."""

    def rotate(x: Tensor, position: Tensor, length: int) -> Tensor:
        del length
        return _turn_halves(x, position / factor, base)

    return rotate


def _rotate_dynamic(
    base: float, factor: float, trained: int
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The base grows with the length, once that is beyond the trained one."""

    def rotate(x: Tensor, position: Tensor, length: int) -> Tensor:
        width, grown = x.shape[-1], base
        if length > trained:
            stretch = factor * length / trained - (factor - 1)
            grown = base * stretch ** (width / (width - 2))
        return _turn_halves(x, position, grown)

    return rotate


def _turn_halves(x: Tensor, position: Tensor, base: float) -> Tensor:
    width = x.shape[-1]
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = torch.exp(1j * position[:, None] * frequencies)[:, None]
    turned = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * turns
    return torch.cat((turned.real, turned.imag), dim=-1)


def _rotate_first_half_in_pairs(
    base: float, factor: float = 1.0
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Neighbouring channels of the first half of a head; the second half stands still."""

    def rotate(x: Tensor, position: Tensor, length: int) -> Tensor:
        del length
        width = x.shape[-1] // 2
        frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        turns = torch.exp(1j * position[:, None] / factor * frequencies)[:, None]
        pairs = torch.view_as_complex(x[..., :width].unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * turns).flatten(-2)
        return torch.cat((turned, x[..., width:]), dim=-1)

    return rotate


def _baichuan() -> Written:
    """Baichuan-7B and Baichuan2-7B.

    Source: class Attention of models/modeling_baichuan.py in github.com/baichuan-inc/Baichuan-7B.
    """
    name = "model.layers.0.self_attn."

    def heads(x: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = _linear(x, weights, name + "W_pack").chunk(3, dim=-1)
        return _split(q, HEADS), _split(k, HEADS), _split(v, HEADS)

    return Written(
        {
            "architectures": ["BaiChuanForCausalLM"],
            "model_type": "baichuan",
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "num_hidden_layers": 1,
            "max_position_embeddings": LONGEST,
            "rms_norm_eps": 1e-6,
            "vocab_size": 32,
        },
        {name + "W_pack.weight": (3 * HIDDEN, HIDDEN), name + "o_proj.weight": (HIDDEN, HIDDEN)},
        heads,
        _rotate_halves(10000.0),
        name + "o_proj",
    )


def _chatglm(
    rotate: Callable[[Tensor, Tensor, int], Tensor],
    *,
    groups: int = KV_HEADS,
    qkv_bias: bool = True,
    bias: bool = False,
    family: str | None = None,
    **config: Any,
) -> Written:
    """ChatGLM2, ChatGLM3 and GLM-4 as first published.

    Source: classes RotaryEmbedding and SelfAttention, and apply_rotary_pos_emb, of
    modeling_chatglm.py in huggingface.co/THUDM/chatglm3-6b (github.com/THUDM/LongAlign has it too).
    That of chatglm2-6b-32k divides positions by ``rope_ratio``, later ones multiply the base by it.
    """
    name = "transformer.encoder.layers.0.self_attention."
    width = 32
    kv = groups * width

    def heads(x: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        mixed = _linear(x, weights, name + "query_key_value")
        q, k, v = mixed.split((HEADS * width, kv, kv), dim=-1)
        return _split(q, HEADS), _split(k, groups), _split(v, groups)

    rows = HEADS * width + 2 * kv
    weights: dict[str, tuple[int, ...]] = {
        name + "query_key_value.weight": (rows, HIDDEN),
        name + "dense.weight": (HIDDEN, HEADS * width),
        "transformer.rotary_pos_emb.inv_freq": (width // 4,),
    }
    if qkv_bias or bias:
        weights[name + "query_key_value.bias"] = (rows,)
    if bias:
        weights[name + "dense.bias"] = (HIDDEN,)
    return Written(
        {
            "architectures": ["ChatGLMModel"],
            "model_type": "chatglm",
            "add_bias_linear": bias,
            "add_qkv_bias": qkv_bias,
            "hidden_size": HIDDEN,
            "kv_channels": width,
            "layernorm_epsilon": 1e-5,
            "multi_query_attention": True,
            "multi_query_group_num": groups,
            "num_attention_heads": HEADS,
            "num_layers": 1,
            "original_rope": True,
            "padded_vocab_size": 32,
            "rmsnorm": True,
            "seq_length": LONGEST,
            **config,
        },
        weights,
        heads,
        rotate,
        name + "dense",
        family,
    )


def _internlm2(
    rotate: Callable[[Tensor, Tensor, int], Tensor], *, bias: bool = False, **config: Any
) -> Written:
    """InternLM2 and 2.5.

    Source: classes InternLM2RotaryEmbedding (and those of linear and dynamic scaling) and
    InternLM2Attention of modeling_internlm2.py in huggingface.co/internlm/internlm2-7b
    (github.com/IntMeGroup/HarmonyIQA has it too).
    """
    name = "model.layers.0.attention."
    groups, width = HEADS // KV_HEADS, HEAD_DIM

    def heads(x: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        grouped = _linear(x, weights, name + "wqkv").unflatten(-1, (KV_HEADS, groups + 2, width))
        q = grouped[..., :groups, :].flatten(-3, -2)
        return q, grouped[..., groups, :], grouped[..., groups + 1, :]

    rows = KV_HEADS * (groups + 2) * width
    weights: dict[str, tuple[int, ...]] = {
        name + "wqkv.weight": (rows, HIDDEN),
        name + "wo.weight": (HIDDEN, HIDDEN),
    }
    if bias:
        weights |= {name + "wqkv.bias": (rows,), name + "wo.bias": (HIDDEN,)}
    return Written(
        {
            "architectures": ["InternLM2ForCausalLM"],
            "model_type": "internlm2",
            "bias": bias,
            "hidden_size": HIDDEN,
            "max_position_embeddings": LONGEST,
            "num_attention_heads": HEADS,
            "num_hidden_layers": 1,
            "num_key_value_heads": KV_HEADS,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "vocab_size": 32,
            **config,
        },
        weights,
        heads,
        rotate,
        name + "wo",
    )


WRITTEN = {
    "Baichuan 7B": _baichuan(),
    "ChatGLM2": _chatglm(_rotate_first_half_in_pairs(10000.0)),
    "ChatGLM2, 32k": _chatglm(
        _rotate_first_half_in_pairs(10000.0, factor=16.0), rope_ratio=16, family="chatglm2"
    ),
    "ChatGLM2, 32k, by its name": _chatglm(
        _rotate_first_half_in_pairs(10000.0, factor=16.0),
        rope_ratio=16,
        _name_or_path="THUDM/chatglm2-6b-32k",
    ),
    "ChatGLM3, 128k": _chatglm(
        _rotate_first_half_in_pairs(500.0 * 10000.0), rope_ratio=500.0, groups=1
    ),
    "ChatGLM with all biases": _chatglm(
        _rotate_first_half_in_pairs(10000.0), qkv_bias=False, bias=True
    ),
    "InternLM2": _internlm2(_rotate_halves(1000000.0)),
    "InternLM2, linear": _internlm2(
        _rotate_halves(1000.0, factor=3.0),
        bias=True,
        rope_theta=1000,
        rope_scaling={"type": "linear", "factor": 3.0},
    ),
    "InternLM2.5, dynamic": _internlm2(
        _rotate_dynamic(1000000.0, 2.0, TRAINED),
        max_position_embeddings=TRAINED,
        rope_scaling={"type": "dynamic", "factor": 2.0},
    ),
}


class Definition:
    """A written checkpoint on disk, and its attention computed in float64."""

    def __init__(self, written: Written, folder: Path) -> None:
        self.case = written
        self.folder = folder
        generator = torch.Generator().manual_seed(0)
        self.weights = {}
        for name, shape in written.weights.items():
            drawn = torch.randn(shape, generator=generator)
            self.weights[name] = drawn * 1.2 * shape[-1] ** -0.5 if len(shape) > 1 else drawn / 2
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(written.config))
        safetensors.torch.save_file(self.weights, folder / "model.safetensors")

    def run(self, steps: Sequence[int], *, cached: bool) -> list[list[Call]]:
        """As `Oracle.run` does."""
        del cached  # one call attends to no past
        written = self.case
        weights = {name: weight.double() for name, weight in self.weights.items()}
        calls: list[Call] = []
        keys: list[Tensor] = []
        values: list[Tensor] = []
        end = 0
        for seed, count in enumerate(steps):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(BATCH, count, HIDDEN, generator=generator)
            q, k, v = written.heads(x.double(), weights)
            position = torch.arange(end, end + count, dtype=torch.float64)
            end += count
            keys.append(written.rotate(k, position, end))  # and so it stays
            values.append(v)
            groups = q.shape[-2] // k.shape[-2]
            every_k, every_v = (
                torch.cat(kept, dim=1).repeat_interleave(groups, dim=-2) for kept in (keys, values)
            )
            scores = torch.einsum("bqhd,bkhd->bhqk", written.rotate(q, position, end), every_k)
            hidden = torch.arange(end) > position[:, None]
            weight = (scores / q.shape[-1] ** 0.5).masked_fill(hidden, -math.inf).softmax(-1)
            context = torch.einsum("bhqk,bkhd->bqhd", weight, every_v).flatten(-2)
            calls.append((x, _linear(context, weights, written.output)))
        return [calls]


# What transformers makes of a configuration, without its weights.


@dataclass(frozen=True)
class Facts:
    """Of one layer; named as in `rope_export.families.Layer`.

    Attributes:
        eps: of the norm of queries and keys, None without one.
        ranks: of the latents of queries and of keys and values, None without them.
        inv_freq: frequencies of its rotation, None where it does not rotate.
        attention_factor: what multiplies rotated heads.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    sinks: bool
    qkv_bias: bool
    out_bias: bool
    eps: float | None
    ranks: tuple[int | None, int] | None
    inv_freq: Tensor | None
    attention_factor: float


_WINDOW_ON_ALL = ("mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2")
_WINDOW_BY_LAYER = (
    *("cohere2", "cwm", "exaone4", "gemma2", "gemma3_text", "gpt_oss", "olmo3"),
    *("qwen2", "qwen2_moe", "qwen2_vl_text", "qwen3", "smollm3"),
)


@lru_cache(maxsize=1)
def _built(content: str) -> transformers.PreTrainedModel:
    config = AutoConfig.for_model(**json.loads(content))
    with torch.device("meta"):
        return AutoModel.from_config(config, attn_implementation="eager")


def facts_of(content: dict[str, Any], layer: int) -> Facts:
    """Read a configuration as transformers does, and the modules it builds from it."""
    model = _built(json.dumps(content))
    config = model.config.get_text_config()
    name, attention = next(
        (name, module)
        for name, module in model.named_modules()
        if (found := _LAYER.search(name))
        and int(found[1]) == layer
        and not re.search("vision|visual", name)
        and not hasattr(module, "self")
    )
    own = vars(attention) | attention._modules
    width = next(
        own[key]
        for key in ("qk_head_dim", "head_dim", "head_size", "attention_head_size")
        if key in own
    )
    heads = config.num_attention_heads
    if "num_kv_heads" in own:  # Falcon's
        kv_heads = own["num_kv_heads"]
    else:
        kv_heads = heads // own.get("num_key_value_groups", 1)
    projections = [
        own[key]
        for key in ("q_proj", "q_b_proj", "query", "query_key_value", "qkv_proj")
        if own.get(key) is not None
    ]
    for key in ("o_proj", "out_proj", "dense"):
        if key in own:
            out = own[key]
            break
    else:
        out = model.get_submodule(name.removesuffix("self") + "output.dense")
    windowed = config.model_type in _WINDOW_ON_ALL
    if config.model_type in _WINDOW_BY_LAYER:
        windowed = config.layer_types[layer] == "sliding_attention"
    inv_freq, factor = _frequencies(model, attention, config, layer)
    return Facts(
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        value_head_dim=own.get("v_head_dim", width),
        causal=config.model_type != "roformer",
        window=config.sliding_window if windowed else None,
        # Gemma 3's modules have it too, and do not pass it on.
        softcap=own.get("attn_logit_softcapping") if config.model_type == "gemma2" else None,
        scale=own.get("scaling", width**-0.5),
        sinks="sinks" in attention._parameters,
        qkv_bias=projections[0].bias is not None,
        out_bias=out.bias is not None,
        eps=_eps(own),
        ranks=(own["q_lora_rank"], own["kv_lora_rank"]) if "kv_lora_rank" in own else None,
        inv_freq=inv_freq,
        attention_factor=factor,
    )


def _eps(own: dict[str, Any]) -> float | None:
    norm = own.get("q_norm") or own.get("q_layernorm")
    if norm is None:
        return None
    one = next(module for module in norm.modules() if not isinstance(module, nn.ModuleList))
    one = one.norms[0] if hasattr(one, "norms") else one
    return one.variance_epsilon if hasattr(one, "variance_epsilon") else one.eps


def _frequencies(
    model: nn.Module, attention: nn.Module, config: Any, layer: int
) -> tuple[Tensor | None, float]:
    own = vars(attention)
    kind = config.model_type
    if kind == "gptj":
        return _of_table(create_sinusoidal_positions(2, config.rotary_dim)), 1.0
    if kind == "roformer":
        table = RoFormerSinusoidalPositionalEmbedding(
            2, config.hidden_size // config.num_attention_heads
        )
        return _of_table(table.create_weight()), 1.0
    if (
        not own.get("use_rope", True)
        or (kind == "cohere2" and own["sliding_window"] is None)
        or (kind == "exaone4" and own["sliding_window"] is not None and not own["is_sliding"])
    ):
        return None, 1.0
    rotary = next(
        module
        for name, module in model.named_modules()
        if name.endswith("rotary_emb") and not re.search("vision|visual", name)
    )
    made = type(rotary)(config)  # again: there are no numbers on the meta device
    if kind in ("gemma3_text", "olmo3"):
        layer_type = config.layer_types[layer]
        return (
            getattr(made, f"{layer_type}_inv_freq"),
            getattr(made, f"{layer_type}_attention_scaling"),
        )
    return made.inv_freq, made.attention_scaling


def _of_table(table: Tensor) -> Tensor:
    """Frequencies of a table of sines and cosines: the angles at position 1."""
    sin, cos = table[1].double().chunk(2)
    return torch.atan2(sin, cos)
