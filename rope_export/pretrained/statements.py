"""What fields of a configuration mean where families differ: functions the table refers to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rope_export.attention.specs import Latent, QKNorm
from rope_export.errors import BadInputError
from rope_export.pretrained.family import Family
from rope_export.pretrained.fields import Fields
from rope_export.pretrained.layer import Layout, Rope

SLIDING, FULL = "sliding_attention", "full_attention"
_OF_EVERY_ROPE = {"rope_type", "rope_theta", "partial_rotary_factor"}

# RoPE of a layer


def rotary(
    family: Family, f: Fields, layer: int, head_dim: int, *, layer_type: str | None = None
) -> Rope:
    """The model's RoPE, the same in every layer, or that of the layer's type."""
    aside = replace(f, read=set())  # that it has types says nothing of windows
    stated = f.rope(layer_type or layer_type_of(aside, layer))
    dim = int(head_dim * stated["partial_rotary_factor"])
    plain = stated["rope_type"] == "default" and set(stated) <= _OF_EVERY_ROPE
    return Rope(dim, stated["rope_theta"], family.layout, None if plain else stated)


def gemma3_rope(family: Family, f: Fields, layer: int, head_dim: int) -> Rope:
    """Windowed layers have a base of their own, and no scaling."""
    kind = layer_type_of(f, layer) or (SLIDING if GEMMA3_SLIDES(f, layer) else FULL)
    stated = f.get("rope_parameters")
    if isinstance(stated, Mapping) and not f.rope_scaling:
        if kind not in stated:
            raise BadInputError(f"config.json: rope_parameters has no {kind!r}, got {stated!r}")
        return rotary(family, f, layer, head_dim, layer_type=kind)
    if kind == FULL:
        return rotary(family, f, layer, head_dim)
    return Rope(head_dim, f.number("rope_local_base_freq", 10000.0), family.layout)


def olmo3_rope(family: Family, f: Fields, layer: int, head_dim: int) -> Rope:
    """Older files have one scaling, which is of the layers without windows."""
    kind = SLIDING if OLMO3_WINDOW(f, layer) is not None else FULL
    stated = f.rope_scaling or f.get("rope_parameters") or {}
    if isinstance(stated, Mapping) and any(isinstance(v, Mapping) for v in stated.values()):
        return rotary(family, f, layer, head_dim, layer_type=kind)
    if kind == FULL:
        return rotary(family, f, layer, head_dim)
    return Rope(head_dim, f.number("rope_theta"), family.layout)


def neox_rope(family: Family, f: Fields, layer: int, head_dim: int) -> Rope:
    """The share is of a stated ``head_dim``, though heads have the width that is left to them."""
    return rotary(family, f, layer, f.integer("head_dim", head_dim))


def gptj_rope(family: Family, f: Fields, layer: int, head_dim: int) -> Rope:
    """The rotated width is stated, the base is not."""
    del layer, head_dim
    return Rope(f.integer("rotary_dim"), 10000.0, family.layout)


def roformer_rope(family: Family, f: Fields, layer: int, head_dim: int) -> Rope:
    """Nothing of it is stated."""
    del f, layer
    return Rope(head_dim, 10000.0, family.layout)


def phi3_rope(family: Family, f: Fields, layer: int, head_dim: int) -> Rope:
    """Phi-3's first files call longrope "su" and "yarn"."""
    found = rotary(family, f, layer, head_dim)
    scaling = found.scaling
    if scaling is not None and scaling["rope_type"] == "yarn":
        stated = f.rope_scaling or f.get("rope_parameters")
        renamed = {**f.content, "rope_scaling": {**stated, "rope_type": "longrope"}}
        return rotary(family, replace(f, content=renamed), layer, head_dim)
    return found


def chatglm_rope(family: Family, f: Fields, layer: int, head_dim: int) -> Rope:
    """Half of each head. ChatGLM2-32k divides positions by the ratio, later ones raise the base."""
    del layer
    ratio = f.number("rope_ratio", 1.0)
    if ratio != 1 and "chatglm2" in str(f.get("_name_or_path", "")).lower():
        return chatglm2_rope(family, f, 0, head_dim)
    return Rope(head_dim // 2, 10000.0 * ratio, family.layout)


def chatglm2_rope(family: Family, f: Fields, layer: int, head_dim: int) -> Rope:
    """Half of each head; positions are divided by ``rope_ratio``."""
    del layer
    ratio = f.number("rope_ratio", 1.0)
    scaling = None if ratio == 1 else {"rope_type": "linear", "factor": ratio}
    return Rope(head_dim // 2, 10000.0, family.layout, scaling)


def latent_rope(family: Family, f: Fields, layer: int, head_dim: int) -> Rope:
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


def in_every_layer(f: Fields, layer: int) -> int | None:
    """``sliding_window``, the same everywhere."""
    del layer
    return _window(f)


def in_every_layer_if_used(f: Fields, layer: int) -> int | None:
    """The same where ``use_sliding_window`` says so."""
    return in_every_layer(f, layer) if f.flag("use_sliding_window") else None


def _by_layer_type(f: Fields, layer: int) -> int | None:
    return _window(f) if layer_type_of(f, layer) == SLIDING else None


Types = Callable[[Fields, int], bool]


def with_types(sliding: Types) -> Callable[[Fields, int], int | None]:
    """By ``layer_types``; where they are missing, layers of which ``sliding`` holds."""

    def window(f: Fields, layer: int) -> int | None:
        if f.get("layer_types") is not None:
            return _by_layer_type(f, layer)
        return _window(f) if sliding(f, layer) else None

    return window


def every_other(_: Fields, layer: int) -> bool:
    """Windows in even layers, counted from 0."""
    return layer % 2 == 0


def all_but_every_fourth_from_the_first(_: Fields, layer: int) -> bool:
    """Windows in layers 1, 2, 3, 5, …."""
    return layer % 4 != 0


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


def qwen(f: Fields, layer: int) -> int | None:
    """Windows from ``max_window_layers`` on, if ``use_sliding_window`` says so."""
    if not f.flag("use_sliding_window"):
        return None
    return with_types(_from_max_window_layers)(f, layer)


def qwen2_moe(f: Fields, layer: int) -> int | None:
    """Windows in even layers below ``max_window_layers``, if they are used."""
    if not f.flag("use_sliding_window"):
        return None
    return with_types(lambda f, i: i % 2 == 0 and i < f.integer("max_window_layers"))(f, layer)


def rotates(f: Fields, layer: int) -> bool:
    """Whether SmolLM3 rotates in a layer; ``no_rope_layers`` has 1 where it does."""
    stated = f.per_layer("no_rope_layers")
    if stated is not None:
        return bool(stated[layer])
    return (layer + 1) % f.integer("no_rope_layer_interval", 4) != 0


def smollm3_window(f: Fields, layer: int) -> int | None:
    """Windows in the layers without RoPE, if they are used."""
    if not f.flag("use_sliding_window"):
        return None
    return with_types(lambda f, i: not rotates(f, i))(f, layer)


GEMMA3_SLIDES = _pattern(6)
COHERE2_WINDOW = with_types(_pattern(4))
EXAONE4_WINDOW = with_types(_pattern(4))
OLMO3_WINDOW = with_types(_pattern(4))


def exaone4_rotates(f: Fields, layer: int) -> bool:
    """All layers, or those with windows where there are any."""
    return _window(f) is None or EXAONE4_WINDOW(f, layer) is not None


def cohere2_rotates(f: Fields, layer: int) -> bool:
    """Layers with windows."""
    return COHERE2_WINDOW(f, layer) is not None


# Widths, norms, scales, refusals


def hidden_over_heads(f: Fields) -> int:
    """Of families that have no field for it; another field of that name says nothing."""
    return f.integer("hidden_size") // f.integer("num_attention_heads")


def rms(eps: str = "rms_norm_eps", **how: Any) -> Callable[[Fields], QKNorm]:
    """RMS norm with the epsilon of that field, and fields of `QKNorm`."""
    return lambda f: QKNorm(eps=f.number(eps, 1e-6), **how)


def layer_norm(flag: str, **how: Any) -> Callable[[Fields], QKNorm | None]:
    """Layer norm where ``flag`` is set."""

    def norm(f: Fields) -> QKNorm | None:
        return (
            QKNorm("layer", eps=f.number("layer_norm_eps", 1e-5), **how) if f.flag(flag) else None
        )

    return norm


def from_scalar(f: Fields) -> float:
    """``query_pre_attn_scalar`` stands for the head width."""
    return math.pow(f.number("query_pre_attn_scalar"), -0.5)


def latent(f: Fields) -> Latent:
    """Ranks of DeepSeek's latents."""
    rank = f.get("q_lora_rank")
    return Latent(
        f.integer("kv_lora_rank"),
        None if rank is None else f.integer("q_lora_rank"),
        bias=f.flag("attention_bias"),
    )


def latent_scale(f: Fields) -> float:
    """YaRN's magnitude goes into the scale, squared (DeepSeek-V2, appendix B)."""
    scale = math.pow(f.integer("qk_nope_head_dim") + f.integer("qk_rope_head_dim"), -0.5)
    stated = f.rope()
    all_dim = stated.get("mscale_all_dim")
    if stated["rope_type"] != "default" and all_dim:
        factor = float(stated.get("factor") or 1.0)
        magnitude = 0.1 * float(all_dim) * math.log(factor) + 1 if factor > 1 else 1.0
        scale *= magnitude**2
    return scale


def bidirectional(f: Fields) -> str | None:
    """Gemma's embedding models see both ways."""
    if f.get("use_bidirectional_attention"):
        return "use_bidirectional_attention is not causal attention, which this family is here"
    return None


def falcon_refuses(f: Fields) -> str | None:
    """The first Falcons have ALiBi."""
    return "alibi is true: its attention has ALiBi, no RoPE" if f.flag("alibi") else None


def baichuan_refuses(f: Fields) -> str | None:
    """The 13B models have ALiBi and no field that says so."""
    if f.get("max_position_embeddings") is None or f.get("num_attention_heads") == 40:
        return "this is Baichuan 13B, whose attention has ALiBi, no RoPE"
    return None


def roformer_refuses(f: Fields) -> str | None:
    """Rotated values, and decoders."""
    if f.flag("rotary_value"):
        return "rotary_value is true: values would be rotated too"
    if f.flag("is_decoder"):
        return "is_decoder is true: this family is here as an encoder"
    return None


def latent_refuses(f: Fields) -> str | None:
    """Latents have no grouped heads."""
    if f.get("num_key_value_heads") not in (None, f.get("num_attention_heads")):
        return (
            "num_key_value_heads must equal num_attention_heads with latents, "
            f"got {f.get('num_key_value_heads')!r}"
        )
    return None


def falcon_kv_heads(f: Fields) -> int | None:
    """A group each (40B and later), one for all (7B), or one a head."""
    grouped = f.flag("new_decoder_architecture")
    return 1 if f.flag("multi_query", default=True) and not grouped else None


def chatglm_refuses(f: Fields) -> str | None:
    """The first ChatGLM has positions on two axes."""
    if not f.flag("multi_query_attention"):
        return "multi_query_attention is not true: this is ChatGLM 1, whose attention is another"
    return None
