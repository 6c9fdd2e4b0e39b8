"""Fields of a configuration that bear on attention and that its family's row does not read.

A row reads the fields its family has. Read by another family's row, a configuration may state more:
a window, a bound on the projections, a scale of its own. What such a field says must be what the
layer is anyway, or the layer would compute something else, with the right weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from rope_export.errors import BadInputError
from rope_export.pretrained.family import Family
from rope_export.pretrained.fields import Fields
from rope_export.pretrained.layer import Layer
from rope_export.pretrained.statements import FULL, SLIDING

# Names of fields that say something of attention, whatever the family.
_BEARS = re.compile(
    r"attn|attention|window|sliding|qkv|(^|_)qk_|soft_?cap|logit_cap|rope|rotary|causal|bidirect"
    r"|alibi|(^|_)sinks?(_|$)|layer_types|(^|_)nope|head_dim|head_size|(kv|q|o)_lora|kv_channels"
    r"|(^|_)(q|k|v|kv|query|key|value)_(norm|bias|clip|scale|multiplier)|query_pre"
    r"|^(use_|add_)?bias(_linear)?$|^out_bias$|position_(embedding|encoding)_type|relative_pos"
    r"|^(index|indexer|swa|global|local)_|_k_eq_v|kv_shared|temperature_tuning|^full_attn"
    r"|norm_?(eps|epsilon)$|norm_eps$"
)
# Of those, what says nothing of what attention computes when it is run: rates of dropout, how and
# how precisely it is computed, and parts of a model that are none of its layers'.
_IDLE = re.compile(
    r"dropout|pdrop|drop_rate|flash|sdpa|attn_impl|^_attn|output_attentions|in_fp32|upcast"
    r"|parallel_attn|apply_query_key_layer_scaling|cross_attention|vision|image|audio|mlp|moe|router"
    r"|expert|(^|_)head_bias|final_logit|chunk_size_feed_forward|is_encoder_decoder"
    # What tensors have in their shapes, which are checked one by one.
    r"|^num_(attention_heads|key_value_heads|kv_heads)$|^_?sliding_window_pattern$"
    # Judged by itself.
    "|^layer_types$"
)
_OF_ROPE = re.compile(r"rope|rotary|alibi|position_|(^|_)nope|head_dim|head_size")
_ONE_IS_NONE = re.compile("factor|multiplier|scale|ratio")


def refuse_unread(f: Fields, family: Family, layer: Layer, *, rope_only: bool = False) -> None:
    """Refuse what ``family`` did not read and ``layer`` does not have.

    Args:
        f: the configuration, after the layer was read from it.
        family: the row it was read by.
        layer: what was read.
        rope_only: only its RoPE is of interest.

    Raises:
        BadInputError: a field bears on attention, was not read, and says something else than what
            the layer is; the message has its name and value.
    """
    if not rope_only:
        _refuse_other_types(f, layer)
    known = f.read | {*family.idle}
    if family.window is not Family.window:  # the width is of some of its layers
        known.add("sliding_window")
    if family.head_dim is not None:  # its own code has another width; tensors say if that is right
        known.add("head_dim")
    for name, value in f.content.items():
        if name in known or not _BEARS.search(name) or _IDLE.search(name):
            continue
        if rope_only and not _OF_ROPE.search(name):
            continue
        if not _holds(name, value, f, layer):
            raise BadInputError(
                f"config.json: {name} is {_shown(value)}, which bears on attention and which "
                f"family {layer.family} does not read: layer {layer.index} would compute something "
                "else than the model"
            )
    if rope_only or not family.causal:
        return
    if any("ForMaskedLM" in str(a) for a in f.content.get("architectures") or ()):
        raise BadInputError(
            f"config.json: architectures is {f.content['architectures']!r}, a model that sees both "
            f"ways, and family {layer.family} is causal"
        )


def _refuse_other_types(f: Fields, layer: Layer) -> None:
    """A layer has a window where ``layer_types`` says so, and nowhere else."""
    types = f.content.get("layer_types")
    if not types:
        return
    kind = types[layer.index] if layer.index < len(types) else None
    if kind != (FULL if layer.window is None else SLIDING):
        has = "no window" if layer.window is None else f"a window of {layer.window}"
        raise BadInputError(
            f"config.json: layer_types has {kind!r} for layer {layer.index}, to which family "
            f"{layer.family} gives {has}"
        )


def _holds(name: str, value: Any, f: Fields, layer: Layer) -> bool:
    """Whether a field that was not read says of the layer what it is."""
    if value is None:
        return True
    test = _SAYS.get(name)
    if test is not None:
        try:
            return bool(test(layer, value))
        except (TypeError, ValueError, IndexError):
            return False
    if re.search("norm_?(eps|epsilon)$", name):
        # Of the norms of queries and keys where no field gave theirs.
        known = any(re.search("eps", read) and read in f.content for read in f.read)
        return layer.qk_norm is None or known or value == layer.qk_norm.eps
    if isinstance(value, int | float) and value == 1 and _ONE_IS_NONE.search(name):
        return True
    return value in (False, "", [], {}, ())


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_Says = Callable[[Layer, Any], object]


def _width(layer: Layer, value: Any) -> bool:
    return bool(value == layer.head_dim)


def _is_window(layer: Layer, value: Any) -> bool:
    return bool(layer.window == value)


def _share(layer: Layer, value: Any) -> bool:
    return layer.rope is None or int(layer.head_dim * value) == layer.rope.dim


def _base(layer: Layer, value: Any) -> bool:
    return layer.rope is None or float(value) == layer.rope.theta


def _pairs(layer: Layer, value: Any) -> bool:
    return layer.rope is None or bool(value) == (layer.rope.layout == "interleaved")


def _rotates(layer: Layer, value: Any) -> bool:
    return bool(value) == (layer.rope is not None)


def _parameters(layer: Layer, value: Any) -> bool:
    """Of a row that reads none: the plain RoPE it has."""
    if not value or layer.rope is None:
        return True
    kind = value.get("rope_type", value.get("type", "default"))
    theta, share = value.get("rope_theta"), value.get("partial_rotary_factor")
    plain = kind == "default" and layer.rope.scaling is None
    return plain and (theta is None or _base(layer, theta)) and (not share or _share(layer, share))


def _rotates_here(layer: Layer, value: Any) -> bool:
    return not value or _rotates(layer, value[layer.index])


def _rotates_by_interval(layer: Layer, value: Any) -> bool:
    return not value or _rotates(layer, (layer.index + 1) % value)


def _cap(layer: Layer, value: Any) -> bool:
    return not value or layer.softcap == value


def _causal(layer: Layer, value: Any) -> bool:
    return bool(value) == layer.causal


def _biases(layer: Layer, value: Any) -> bool:
    return not value or layer.qkv_bias


def _biases_everywhere(layer: Layer, value: Any) -> bool:
    return not value or (layer.qkv_bias and layer.out_bias)


def _normed(layer: Layer, value: Any) -> bool:
    return bool(value) == (layer.qk_norm is not None)


_SAYS: Mapping[str, _Says] = {
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size", "attention_window", "window_size"), _is_window
    ),
    **dict.fromkeys(("use_sliding_window",), lambda a, v: bool(v) == (a.window is not None)),
    "max_window_layers": lambda a, v: a.window is None or a.index >= v,
    **dict.fromkeys(("is_causal", "causal", "use_causal_mask"), _causal),
    "use_bidirectional_attention": lambda a, v: not v or not a.causal,
    **dict.fromkeys(
        ("attn_logit_softcapping", "attn_logit_softcap", "attention_logit_cap", "softcap"), _cap
    ),
    "attention_multiplier": lambda a, v: math.isclose(v, a.scale),
    "query_pre_attn_scalar": lambda a, v: math.isclose(v**-0.5, a.scale),
    "scale_attn_weights": lambda _, v: v,
    **dict.fromkeys(("rope_theta", "rotary_emb_base", "rope_base"), _base),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _parameters),
    **dict.fromkeys(
        ("partial_rotary_factor", "rotary_pct", "rope_pct", "rotary_percentage"), _share
    ),
    "rotary_dim": lambda a, v: a.rope is None or a.rope.dim == v,
    **dict.fromkeys(("rope_interleave", "rope_interleaved", "rotary_interleaved"), _pairs),
    **dict.fromkeys(("use_rope", "rotary", "use_rotary", "use_rotary_embedding"), _rotates),
    "no_rope_layers": _rotates_here,
    "no_rope_layer_interval": _rotates_by_interval,
    **dict.fromkeys(
        ("position_embedding_type", "position_encoding_type"),
        lambda _, v: "rope" in v or "rotary" in v,
    ),
    **dict.fromkeys(
        ("head_dim", "head_size", "kv_channels", "attention_head_dim", "qk_head_dim"), _width
    ),
    "v_head_dim": lambda a, v: v == a.value_head_dim,
    **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm", "use_qk_layernorm"), _normed),
    **dict.fromkeys(
        ("attention_bias", "attn_bias", "qkv_bias", "use_qkv_bias", "use_attention_bias"), _biases
    ),
    **dict.fromkeys(("attention_out_bias", "out_bias"), lambda a, v: not v or a.out_bias),
    **dict.fromkeys(("bias", "use_bias", "add_bias_linear"), _biases_everywhere),
}
