"""`Family`: one row of the table, and the names of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rope_export.attention.specs import Latent, QKNorm
from rope_export.pretrained.fields import Fields
from rope_export.pretrained.layer import Layout, Rope

Order = Literal["stacked", "grouped"]


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
        rope: RoPE of a layer of a head width, if not `statements.rotary`.
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
        idle: fields that bear on attention in other families, and that this one's own code ignores
            or has read in another form (`unread`).
    """

    models: str
    source: str = "transformers"
    tensors: Tensors = field(default_factory=Tensors)
    layout: Layout = "half"
    spelled: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rope: Callable[[Family, Fields, int, int], Rope] | None = None
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
    idle: tuple[str, ...] = ()
