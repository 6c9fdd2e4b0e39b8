"""From a configuration to the geometry of its layers, by the table of families."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rope_export.errors import BadInputError
from rope_export.pretrained.checkpoint import naming, read_config
from rope_export.pretrained.families import FAMILIES
from rope_export.pretrained.family import Family
from rope_export.pretrained.fields import Fields, text_config
from rope_export.pretrained.layer import Layer
from rope_export.pretrained.statements import rotary
from rope_export.pretrained.unread import refuse_unread


def family_of(config: Mapping[str, Any], name: str | None = None) -> tuple[str, Family]:
    """The row of a configuration, or the one named.

    Raises:
        BadInputError: there is none; the message has those there are.
    """
    stated = text_config(config).get("model_type") if name is None else name
    family = FAMILIES.get(stated) if isinstance(stated, str) else None
    if isinstance(stated, str) and family is not None:
        return stated, family
    known = ", ".join(FAMILIES)
    if name is not None:
        raise BadInputError(f"family must be one of {known}; got {name!r}")
    if stated is None:
        raise BadInputError(f"config.json has no 'model_type'; known are {known}")
    near = difflib.get_close_matches(str(stated), FAMILIES, 1, 0.75)
    hint = f" (near: {near[0]})" if near else ""
    raise BadInputError(
        f"config.json: model_type {stated!r} is not known{hint}; if its attention is like that of "
        f"one of these, name it as family: {known}"
    )


def layers_of(config: Mapping[str, Any], family: str | None = None) -> list[Layer]:
    """Geometry of every layer.

    Raises:
        BadInputError: as of `layer_of`.
    """
    _, row = family_of(config, family)
    count = _fields(config, row).integer("num_hidden_layers")
    return [layer_of(config, index, family) for index in range(count)]


def layer_of(
    config: Mapping[str, Any], layer: int, family: str | None = None, *, rope_only: bool = False
) -> Layer:
    """Geometry of one layer's attention.

    Args:
        config: content of a ``config.json``, old or new spelling; of a multimodal model, its
            language model's part is read.
        layer: which, from 0.
        family: a row of `FAMILIES`, instead of that of ``model_type``.
        rope_only: only the layer's RoPE is of interest: what else the configuration states and the
            family does not read is let pass.

    Raises:
        BadInputError: the family is unknown or not attention with RoPE, there is no such layer, or
            a field is missing or of no use, or one that bears on attention is not read by the
            family and says something else than what the layer is; the message names it and its
            value.
    """
    name, row = family_of(config, family)
    f = _fields(config, row)
    count = f.integer("num_hidden_layers")
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
        raise BadInputError(
            f"layer must be one of 0 … {count - 1}, the model has {count}; got {layer!r}"
        )
    refusal = row.refuses(f)
    if refusal:
        raise BadInputError(f"config.json: {refusal}")
    hidden_size, num_heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    if row.head_dim is not None:
        head_dim = row.head_dim(f)
    elif f.get("head_dim") is None and hidden_size % num_heads:
        raise BadInputError(
            f"config.json: {f.name('hidden_size')} must be a multiple of "
            f"{f.name('num_attention_heads')} without head_dim, got {hidden_size} and {num_heads}"
        )
    else:
        head_dim = f.integer("head_dim", hidden_size // num_heads)
    num_kv_heads = row.kv_heads(f) or f.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise BadInputError(
            f"config.json: {f.name('num_attention_heads')} must be a multiple of "
            f"{f.name('num_key_value_heads')}, got {num_heads} and {num_kv_heads}"
        )
    latent = row.latent(f)
    scale = row.scale(f)
    rotates = row.rotates is None or row.rotates(f, layer)
    capped = row.softcap is not None and f.get(row.softcap) is not None
    made = Layer(
        family=name,
        index=layer,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads if latent else num_kv_heads,
        head_dim=head_dim,
        value_head_dim=f.integer("v_head_dim") if latent else head_dim,
        rope=(row.rope or rotary)(row, f, layer, head_dim) if rotates else None,
        causal=row.causal,
        window=row.window(f, layer),
        softcap=f.number(row.softcap) if row.softcap and capped else None,
        scale=head_dim**-0.5 if scale is None else scale,
        sinks=row.sinks,
        qk_norm=row.norm(f),
        latent=latent,
        qkv_bias=latent is None and _biased(f, row.qkv_bias),
        out_bias=_biased(f, row.out_bias),
        max_position_embeddings=f.integer("max_position_embeddings", 4096),
    )
    refuse_unread(f, row, made, rope_only=rope_only)
    return made


def layer_at(
    path: str | Path, layer: int, family: str | None = None, *, rope_only: bool = False
) -> Layer:
    """Geometry of one layer of the checkpoint in a folder; arguments and errors as `layer_of`."""
    with naming(Path(path)):
        return layer_of(read_config(Path(path)), layer, family, rope_only=rope_only)


def _fields(config: Mapping[str, Any], row: Family) -> Fields:
    return Fields(text_config(config), row.spelled, row.defaults)


def _biased(f: Fields, stated: bool | str | tuple[str, ...]) -> bool:
    if isinstance(stated, bool):
        return stated
    return any(f.flag(name) for name in ([stated] if isinstance(stated, str) else stated))
