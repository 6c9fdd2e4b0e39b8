"""Families of models: what their configurations mean and how their tensors are called.

A row for each ``model_type``. A family that differs from a known one only in names, biases,
widths or windows is a few lines here; nothing else has to know of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rope_export.errors import BadInputError
from rope_export.pretrained.fields import Fields
from rope_export.pretrained.layer import Layout, Rope
from rope_export.specs import Latent, QKNorm

Order = Literal["stacked", "grouped"]
SLIDING, FULL = "sliding_attention", "full_attention"
_OF_EVERY_ROPE = {"rope_type", "rope_theta", "partial_rotary_factor"}


@dataclass(frozen=True)
class Tensors:
    """Names of a layer's tensors, without ``.weight`` and ``.bias``.

    Attributes:
        home: what they share, from the layer's number on; any prefix may come before it.
        q: queries.
        k: keys.
        v: values.
        o: output.
        qkv: queries, keys and values in one, instead of the three.
        order: rows of ``qkv``: all queries, all keys, all values (``"stacked"``), or for each group
            its queries, its key and its value (``"grouped"``).
        q_norm: norm of queries.
        k_norm: norm of keys; with an asterisk, one tensor a head.
        sinks: sinks, a tensor by itself.
        others: what may be there and is no part of the attention.
    """

    home: str = "layers.{layer}.self_attn."
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    qkv: str | None = None
    order: Order = "stacked"
    q_norm: str = "q_norm"
    k_norm: str = "k_norm"
    sinks: str = "sinks"
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` states its attention.

    Attributes:
        models: models one knows it by.
        source: where this is defined.
        tensors: names of its tensors.
        layout: which channels form a pair.
        spelled: field names where they differ from most families'.
        defaults: what is assumed where a field is missing, as the family's own code does.
        rope: RoPE of a layer.
        rotates: whether a layer has RoPE, where not all have.
        window: sliding window of a layer.
        norm: norm of queries and keys.
        scale: factor on the scores; None for ``head_dim ** -0.5``.
        softcap: the field with the bound of the scores.
        kv_heads: key and value heads, where ``num_key_value_heads`` does not say it; else None.
        qkv_bias: whether queries, keys and values have biases, or the fields any of which says so.
        out_bias: the same of the output.
        head_dim: width of a head, where ``head_dim`` does not say it.
        latent: latents, or None.
        causal: whether later tokens are hidden.
        sinks: whether heads have sinks.
        refuses: why a configuration is not attention with RoPE as this package has it, or None.
    """

    models: str
    source: str = "transformers"
    tensors: Tensors = field(default_factory=Tensors)
    layout: Layout = "half"
    spelled: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rope: Callable[[Family, Fields, int, int], Rope] = lambda *given: rotary(*given)
    rotates: Callable[[Fields, int], bool] | None = None
    window: Callable[[Fields, int], int | None] = lambda _f, _layer: None
    norm: Callable[[Fields], QKNorm | None] = lambda _: None
    scale: Callable[[Fields], float | None] = lambda _: None
    softcap: str | None = None
    kv_heads: Callable[[Fields], int | None] = lambda _: None
    qkv_bias: bool | str | tuple[str, ...] = False
    out_bias: bool | str = False
    head_dim: Callable[[Fields], int] | None = None
    latent: Callable[[Fields], Latent | None] = lambda _: None
    causal: bool = True
    sinks: bool = False
    refuses: Callable[[Fields], str | None] = lambda _: None


# RoPE of a layer


def rotary(
    family: Family, f: Fields, layer: int, head_dim: int, *, layer_type: str | None = None
) -> Rope:
    """The model's RoPE, the same in every layer, or that of the layer's type."""
    stated = f.rope(layer_type or layer_type_of(f, layer))
    dim = int(head_dim * stated["partial_rotary_factor"])
    plain = stated["rope_type"] == "default" and set(stated) <= _OF_EVERY_ROPE
    return Rope(dim, stated["rope_theta"], family.layout, None if plain else stated)


def _gemma3_rope(family: Family, f: Fields, layer: int, head_dim: int) -> Rope:
    """Windowed layers have a base of their own, and no scaling."""
    kind = layer_type_of(f, layer) or (SLIDING if _GEMMA3_SLIDES(f, layer) else FULL)
    stated = f.get("rope_parameters")
    if isinstance(stated, Mapping) and not f.content.get("rope_scaling"):
        if kind not in stated:
            raise BadInputError(f"config.json: rope_parameters has no {kind!r}, got {stated!r}")
        return rotary(family, f, layer, head_dim, layer_type=kind)
    if kind == FULL:
        return rotary(family, f, layer, head_dim)
    return Rope(head_dim, f.number("rope_local_base_freq", 10000.0), family.layout)


def _gptj_rope(family: Family, f: Fields, layer: int, head_dim: int) -> Rope:
    del layer, head_dim
    return Rope(f.integer("rotary_dim"), 10000.0, family.layout)


def _roformer_rope(family: Family, f: Fields, layer: int, head_dim: int) -> Rope:
    del f, layer
    return Rope(head_dim, 10000.0, family.layout)


def _phi3_rope(family: Family, f: Fields, layer: int, head_dim: int) -> Rope:
    """Phi-3's first files call longrope "su" and "yarn"."""
    found = rotary(family, f, layer, head_dim)
    scaling = found.scaling
    if scaling is not None and scaling["rope_type"] == "yarn":
        stated = f.content.get("rope_scaling") or f.get("rope_parameters")
        renamed = {**f.content, "rope_scaling": {**stated, "rope_type": "longrope"}}
        return rotary(family, replace(f, content=renamed), layer, head_dim)
    return found


def _chatglm_rope(family: Family, f: Fields, layer: int, head_dim: int) -> Rope:
    """Half of each head. ChatGLM2-32k divides positions by the ratio, later ones raise the base."""
    del layer
    ratio = f.number("rope_ratio", 1.0)
    if ratio != 1 and "chatglm2" in str(f.get("_name_or_path", "")).lower():
        return _chatglm2_rope(family, f, 0, head_dim)
    return Rope(head_dim // 2, 10000.0 * ratio, family.layout)


def _chatglm2_rope(family: Family, f: Fields, layer: int, head_dim: int) -> Rope:
    del layer
    ratio = f.number("rope_ratio", 1.0)
    scaling = None if ratio == 1 else {"rope_type": "linear", "factor": ratio}
    return Rope(head_dim // 2, 10000.0, family.layout, scaling)


def _latent_rope(family: Family, f: Fields, layer: int, head_dim: int) -> Rope:
    """The rotated part of a head is stated by itself."""
    del head_dim
    layout: Layout = "interleaved" if f.flag("rope_interleave", default=True) else "half"
    found = rotary(family, f, layer, f.integer("qk_rope_head_dim"))
    return replace(found, dim=f.integer("qk_rope_head_dim"), layout=layout)


# Windows


def layer_type_of(f: Fields, layer: int) -> str | None:
    """Type of a layer as ``layer_types`` has it, if it does."""
    types = f.per_layer("layer_types")
    if types is None:
        return None
    kind = types[layer]
    if kind not in (SLIDING, FULL):
        raise BadInputError(
            f"config.json: layer_types must hold {SLIDING} and {FULL}, got {kind!r} for layer "
            f"{layer}"
        )
    return str(kind)


def _window(f: Fields) -> int | None:
    return None if f.get("sliding_window") is None else f.integer("sliding_window")


def _in_every_layer(f: Fields, layer: int) -> int | None:
    del layer
    return _window(f)


def _in_every_layer_if_used(f: Fields, layer: int) -> int | None:
    return _in_every_layer(f, layer) if f.flag("use_sliding_window") else None


def _by_layer_type(f: Fields, layer: int) -> int | None:
    return _window(f) if layer_type_of(f, layer) == SLIDING else None


Types = Callable[[Fields, int], bool]


def _with_types(sliding: Types) -> Callable[[Fields, int], int | None]:
    """By ``layer_types``; where they are missing, layers of which ``sliding`` holds."""

    def window(f: Fields, layer: int) -> int | None:
        if f.get("layer_types") is not None:
            return _by_layer_type(f, layer)
        return _window(f) if sliding(f, layer) else None

    return window


def _every_other(_: Fields, layer: int) -> bool:
    return layer % 2 == 0


def _from_max_window_layers(f: Fields, layer: int) -> bool:
    return f.flag("use_sliding_window") and layer >= f.integer("max_window_layers")


def _pattern(default: int) -> Types:
    """All but every so manieth layer."""

    def sliding(f: Fields, layer: int) -> bool:
        every = f.get("sliding_window_pattern", default)
        if isinstance(every, str):  # EXAONE 4 also spells it out, "LLLG"
            return every[layer % len(every)] == "L"
        return (layer + 1) % f.integer("sliding_window_pattern", default) != 0

    return sliding


def _qwen(f: Fields, layer: int) -> int | None:
    if not f.flag("use_sliding_window"):
        return None
    return _with_types(_from_max_window_layers)(f, layer)


def _qwen2_moe(f: Fields, layer: int) -> int | None:
    if not f.flag("use_sliding_window"):
        return None
    return _with_types(lambda f, i: i % 2 == 0 and i < f.integer("max_window_layers"))(f, layer)


def _rotates(f: Fields, layer: int) -> bool:
    """Whether SmolLM3 rotates in a layer; ``no_rope_layers`` has 1 where it does."""
    stated = f.per_layer("no_rope_layers")
    if stated is not None:
        return bool(stated[layer])
    return (layer + 1) % f.integer("no_rope_layer_interval", 4) != 0


def _smollm3_window(f: Fields, layer: int) -> int | None:
    if not f.flag("use_sliding_window"):
        return None
    return _with_types(lambda f, i: not _rotates(f, i))(f, layer)


_GEMMA3_SLIDES = _pattern(6)
_COHERE2_WINDOW = _with_types(_pattern(4))
_EXAONE4_WINDOW = _with_types(_pattern(4))


# Widths, norms, scales, refusals


def _hidden_over_heads(f: Fields) -> int:
    """Of families that have no field for it; another field of that name says nothing."""
    return f.integer("hidden_size") // f.integer("num_attention_heads")


def _rms(eps: str = "rms_norm_eps", **how: Any) -> Callable[[Fields], QKNorm]:
    return lambda f: QKNorm(eps=f.number(eps, 1e-6), **how)


def _layer_norm(flag: str, **how: Any) -> Callable[[Fields], QKNorm | None]:
    def norm(f: Fields) -> QKNorm | None:
        return (
            QKNorm("layer", eps=f.number("layer_norm_eps", 1e-5), **how) if f.flag(flag) else None
        )

    return norm


def _from_scalar(f: Fields) -> float:
    return math.pow(f.number("query_pre_attn_scalar"), -0.5)


def _latent(f: Fields) -> Latent:
    rank = f.get("q_lora_rank")
    return Latent(
        f.integer("kv_lora_rank"),
        None if rank is None else f.integer("q_lora_rank"),
        bias=f.flag("attention_bias"),
    )


def _latent_scale(f: Fields) -> float:
    """YaRN's magnitude goes into the scale, squared (DeepSeek-V2, appendix B)."""
    scale = math.pow(f.integer("qk_nope_head_dim") + f.integer("qk_rope_head_dim"), -0.5)
    stated = f.rope()
    all_dim = stated.get("mscale_all_dim")
    if stated["rope_type"] != "default" and all_dim:
        factor = float(stated.get("factor") or 1.0)
        magnitude = 0.1 * float(all_dim) * math.log(factor) + 1 if factor > 1 else 1.0
        scale *= magnitude**2
    return scale


def _bidirectional(f: Fields) -> str | None:
    if f.get("use_bidirectional_attention"):
        return "use_bidirectional_attention is not causal attention, which this family is here"
    return None


def _falcon_refuses(f: Fields) -> str | None:
    return "alibi is true: its attention has ALiBi, no RoPE" if f.flag("alibi") else None


def _baichuan_refuses(f: Fields) -> str | None:
    """The 13B models have ALiBi and no field that says so."""
    if f.get("max_position_embeddings") is None or f.get("num_attention_heads") == 40:
        return "this is Baichuan 13B, whose attention has ALiBi, no RoPE"
    return None


def _roformer_refuses(f: Fields) -> str | None:
    if f.flag("rotary_value"):
        return "rotary_value is true: values would be rotated too"
    if f.flag("is_decoder"):
        return "is_decoder is true: this family is here as an encoder"
    return None


def _latent_refuses(f: Fields) -> str | None:
    if f.get("num_key_value_heads") not in (None, f.get("num_attention_heads")):
        return (
            "num_key_value_heads must equal num_attention_heads with latents, "
            f"got {f.get('num_key_value_heads')!r}"
        )
    return None


def _falcon_kv_heads(f: Fields) -> int | None:
    """A group each (40B and later), one for all (7B), or one a head."""
    grouped = f.flag("new_decoder_architecture")
    return 1 if f.flag("multi_query", default=True) and not grouped else None


def _chatglm_refuses(f: Fields) -> str | None:
    if not f.flag("multi_query_attention"):
        return "multi_query_attention is not true: this is ChatGLM 1, whose attention is another"
    return None


_LLAMA = Family(
    "Llama 1, 2, 3, 3.1, and most models built like them",
    qkv_bias="attention_bias",
    out_bias="attention_bias",
)
_GLM = Family(
    "GLM-4-9B, GLM-Edge",
    layout="interleaved",
    defaults={
        "num_key_value_heads": 2,
        "head_dim": 128,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
    },
    qkv_bias="attention_bias",
)
_QWEN2 = Family(
    "Qwen2, Qwen2.5",
    defaults={"num_key_value_heads": 32, "max_window_layers": 28, "sliding_window": 4096},
    window=_qwen,
    qkv_bias=True,
)
_QWEN3 = replace(
    _LLAMA,
    models="Qwen3",
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_window_layers": 28,
        "sliding_window": 4096,
    },
    window=_qwen,
    norm=_rms(),
)
_GEMMA = replace(
    _LLAMA,
    models="Gemma",
    defaults={"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256},
    refuses=_bidirectional,
)
_GEMMA2_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA3 = replace(
    _GEMMA,
    models="Gemma 3",
    defaults=_GEMMA2_DEFAULTS | {"rope_theta": 1000000.0},
    rope=_gemma3_rope,
    window=_with_types(_GEMMA3_SLIDES),
    norm=_rms(unit_offset=True),
    scale=_from_scalar,
)
_CHATGLM = Family(
    "ChatGLM3, GLM-4 (remote code)",
    source="THUDM/chatglm3-6b, modeling_chatglm.py",
    tensors=Tensors(
        home="layers.{layer}.self_attention.",
        qkv="query_key_value",
        o="dense",
        others=("rotary_pos_emb.inv_freq",),
    ),
    layout="interleaved",
    spelled={
        "num_hidden_layers": ("num_layers",),
        "num_key_value_heads": ("multi_query_group_num",),
        "head_dim": ("kv_channels",),
        "max_position_embeddings": ("seq_length",),
    },
    rope=_chatglm_rope,
    refuses=_chatglm_refuses,
    qkv_bias=("add_bias_linear", "add_qkv_bias"),
    out_bias="add_bias_linear",
)
_DEEPSEEK = Family(
    "DeepSeek-V2, V2-Lite, V2.5",
    layout="interleaved",
    defaults={"q_lora_rank": 1536},
    rope=_latent_rope,
    latent=_latent,
    scale=_latent_scale,
    head_dim=lambda f: f.integer("qk_nope_head_dim") + f.integer("qk_rope_head_dim"),
    out_bias="attention_bias",
    refuses=_latent_refuses,
)
_QWEN2_VL = replace(
    _QWEN2,
    head_dim=_hidden_over_heads,
    models="Qwen2-VL's language model, M-RoPE",
    defaults={
        **_QWEN2.defaults,
        "num_key_value_heads": 8,
        "rope_theta": 1000000.0,
        "max_window_layers": 80,
    },
)

FAMILIES: dict[str, Family] = {
    "baichuan": Family(
        "Baichuan 7B, Baichuan2 7B",
        source="baichuan-inc/Baichuan2-7B-Base, modeling_baichuan.py",
        tensors=Tensors(qkv="W_pack"),
        refuses=_baichuan_refuses,
    ),
    "chatglm": _CHATGLM,
    "chatglm2": replace(
        _CHATGLM,
        models="ChatGLM2, whose 32k variant divides positions",
        source="THUDM/chatglm2-6b-32k, modeling_chatglm.py",
        rope=_chatglm2_rope,
    ),
    "cohere": Family(
        "Command R",
        layout="interleaved",
        defaults={"rope_theta": 500000.0},
        norm=_layer_norm("use_qk_norm", over="each_head"),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
    ),
    "cohere2": Family(
        "Command R7B, Command A",
        layout="interleaved",
        defaults={"sliding_window": 4096},
        rotates=lambda f, i: _COHERE2_WINDOW(f, i) is not None,
        window=_COHERE2_WINDOW,
        head_dim=_hidden_over_heads,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
    ),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": replace(_DEEPSEEK, models="DeepSeek-V3, R1"),
    "ernie4_5": replace(
        _LLAMA,
        models="ERNIE 4.5",
        layout="interleaved",
        defaults={"num_key_value_heads": 2, "head_dim": 128, "rope_theta": 500000.0},
        qkv_bias="use_bias",
        out_bias="use_bias",
    ),
    "exaone4": Family(
        "EXAONE 4",
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "rms_norm_eps": 1e-5},
        rotates=lambda f, i: _window(f) is None or _EXAONE4_WINDOW(f, i) is not None,
        window=_EXAONE4_WINDOW,
        norm=_rms(),
    ),
    "falcon": Family(
        "Falcon 7B, 40B, 180B, Falcon2",
        tensors=Tensors(
            home="h.{layer}.self_attention.", qkv="query_key_value", o="dense", order="grouped"
        ),
        spelled={
            "num_attention_heads": ("num_attention_heads", "n_head"),
            "num_hidden_layers": ("num_hidden_layers", "n_layer"),
            "num_key_value_heads": ("num_kv_heads", "n_head_kv"),
        },
        defaults={"max_position_embeddings": 2048},
        kv_heads=_falcon_kv_heads,
        head_dim=_hidden_over_heads,
        qkv_bias="bias",
        out_bias="bias",
        refuses=_falcon_refuses,
    ),
    "gemma": _GEMMA,
    "gemma2": replace(
        _GEMMA,
        models="Gemma 2",
        defaults={**_GEMMA2_DEFAULTS, "attn_logit_softcapping": 50.0},
        window=_with_types(_every_other),
        scale=_from_scalar,
        softcap="attn_logit_softcapping",
    ),
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
    "glm": _GLM,
    "glm4": replace(_GLM, models="GLM-4-0414, GLM-Z1"),
    "gpt_neox": Family(
        "GPT-NeoX, Pythia",
        tensors=Tensors(
            home="layers.{layer}.attention.",
            qkv="query_key_value",
            o="dense",
            order="grouped",
            others=("bias", "masked_bias", "rotary_emb.inv_freq"),
        ),
        spelled={"rope_theta": ("rotary_emb_base",), "partial_rotary_factor": ("rotary_pct",)},
        head_dim=_hidden_over_heads,
        defaults={"partial_rotary_factor": 0.25, "attention_bias": True},
        qkv_bias="attention_bias",
        out_bias="attention_bias",
    ),
    "gpt_oss": replace(
        _LLAMA,
        models="gpt-oss",
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "rope_theta": 150000.0,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        window=_with_types(_every_other),
        sinks=True,
    ),
    "gptj": Family(
        "GPT-J",
        tensors=Tensors(home="h.{layer}.attn.", o="out_proj", others=("bias", "masked_bias")),
        layout="interleaved",
        spelled={
            "hidden_size": ("n_embd",),
            "num_attention_heads": ("n_head",),
            "num_hidden_layers": ("n_layer",),
            "max_position_embeddings": ("n_positions",),
        },
        defaults={"rotary_dim": 64, "max_position_embeddings": 2048},
        head_dim=_hidden_over_heads,
        rope=_gptj_rope,
    ),
    "granite": replace(
        _LLAMA, models="Granite 3", scale=lambda f: f.number("attention_multiplier", 1.0)
    ),
    "helium": Family(
        "Helium",
        layout="interleaved",
        defaults={"num_key_value_heads": 20, "head_dim": 128, "rope_theta": 100000.0},
        qkv_bias="attention_bias",
    ),
    "internlm2": Family(
        "InternLM2, InternLM2.5",
        source="internlm/internlm2-7b, modeling_internlm2.py",
        tensors=Tensors(home="layers.{layer}.attention.", qkv="wqkv", o="wo", order="grouped"),
        qkv_bias="bias",
        out_bias="bias",
    ),
    "llama": _LLAMA,
    "mistral": replace(
        _LLAMA,
        models="Mistral 7B, Nemo, Small",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        window=_in_every_layer,
        qkv_bias=False,
        out_bias=False,
    ),
    "mixtral": Family(
        "Mixtral",
        defaults={"num_key_value_heads": 8, "rope_theta": 1000000.0},
        window=_in_every_layer,
    ),
    "nemotron": replace(
        _LLAMA, models="Nemotron-4, Minitron", defaults={"partial_rotary_factor": 0.5}
    ),
    "olmo2": replace(
        _LLAMA, models="OLMo 2", defaults={"rms_norm_eps": 1e-5}, norm=_rms(over="projection")
    ),
    "phi": Family(
        "Phi-1.5, Phi-2",
        tensors=Tensors(o="dense", q_norm="q_layernorm", k_norm="k_layernorm"),
        defaults={"partial_rotary_factor": 0.5},
        norm=_layer_norm("qk_layernorm", bias=True),
        qkv_bias=True,
        out_bias=True,
    ),
    "phi3": Family(
        "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        tensors=Tensors(qkv="qkv_proj"),
        defaults={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 1.0,
        },
        rope=_phi3_rope,
        window=_in_every_layer,
    ),
    "qwen2": _QWEN2,
    "qwen2_moe": replace(
        _QWEN2,
        models="Qwen1.5-MoE, Qwen2-MoE",
        defaults={**_QWEN2.defaults, "num_key_value_heads": 16, "qkv_bias": True},
        window=_qwen2_moe,
        qkv_bias="qkv_bias",
    ),
    "qwen2_vl": _QWEN2_VL,
    "qwen2_vl_text": _QWEN2_VL,
    "qwen3": _QWEN3,
    "qwen3_moe": replace(
        _QWEN3,
        models="Qwen3-MoE",
        defaults={"num_key_value_heads": 4, "sliding_window": 4096},
        window=_in_every_layer_if_used,
    ),
    "roformer": Family(
        "RoFormer",
        tensors=Tensors(
            home="layer.{layer}.attention.",
            q="self.query",
            k="self.key",
            v="self.value",
            o="output.dense",
            others=("output.LayerNorm.weight", "output.LayerNorm.bias"),
        ),
        layout="interleaved",
        defaults={"max_position_embeddings": 1536},
        rope=_roformer_rope,
        qkv_bias=True,
        out_bias=True,
        causal=False,
        refuses=_roformer_refuses,
    ),
    "smollm3": replace(
        _LLAMA,
        models="SmolLM3",
        defaults={"num_key_value_heads": 4, "rope_theta": 2000000.0},
        rotates=_rotates,
        window=_smollm3_window,
    ),
    "stablelm": Family(
        "StableLM 2, StableLM 3B, 12B",
        tensors=Tensors(q_norm="q_layernorm.norms.*", k_norm="k_layernorm.norms.*"),
        defaults={
            "num_key_value_heads": 32,
            "partial_rotary_factor": 0.25,
            "layer_norm_eps": 1e-5,
        },
        spelled={"partial_rotary_factor": ("partial_rotary_factor", "rope_pct")},
        head_dim=_hidden_over_heads,
        norm=_layer_norm("qk_layernorm", over="each_head"),
        qkv_bias="use_qkv_bias",
    ),
    "starcoder2": replace(
        _LLAMA,
        models="StarCoder2",
        defaults={"num_key_value_heads": 2, "use_bias": True},
        window=_in_every_layer,
        qkv_bias="use_bias",
        out_bias="use_bias",
    ),
}
