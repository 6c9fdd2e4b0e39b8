"""`Layer`: the geometry of one layer's attention, as a checkpoint's configuration states it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from rope_export.attention.specs import Latent, QKNorm
from rope_export.errors import BadInputError

if TYPE_CHECKING:
    from rope_export.attention.block import Attention
    from rope_export.rope.embedding import RotaryEmbedding


Layout = Literal["half", "interleaved"]


@dataclass(frozen=True)
class Rope:
    """Arguments of a `RotaryEmbedding`.

    Attributes:
        dim: rotated width of a head.
        theta: the base.
        layout: which channels form a pair.
        scaling: a ``rope_parameters`` object, or None for the original RoPE.
    """

    dim: int
    theta: float
    layout: Layout
    scaling: Mapping[str, Any] | None = None

    def embedding(self, max_seq_len: int | None) -> RotaryEmbedding:
        """Build it, for so many positions.

        Raises:
            BadInputError: a parameter is missing, unknown or out of range.
        """
        from rope_export.rope.embedding import RotaryEmbedding

        try:
            return RotaryEmbedding(
                self.dim,
                theta=self.theta,
                layout=self.layout,
                scaling=self.scaling,
                max_seq_len=max_seq_len,
            )
        except BadInputError as error:
            # Of the file, not of an argument.
            said = str(error).replace("scaling", "rope_parameters")
            raise BadInputError(f"config.json: {said}") from None


@dataclass(frozen=True)
class Layer:
    """One layer's attention: arguments of `Attention`, and where they come from.

    Attributes:
        family: row of the table of families.
        index: which layer.
        hidden_size: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: width of a query or key head.
        value_head_dim: width of a value head.
        rope: its RoPE, or None where the layer has none.
        causal: whether later tokens are hidden.
        window: sliding window, or None.
        softcap: bound of the scores, or None.
        scale: factor on the scores.
        sinks: whether heads have sinks.
        qk_norm: norm of queries and keys, or None.
        latent: latents of queries, keys and values, or None.
        qkv_bias: biases on queries, keys and values.
        out_bias: bias on the output.
        max_position_embeddings: longest sequence the model states.
    """

    family: str
    index: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    rope: Rope | None
    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    sinks: bool
    qk_norm: QKNorm | None
    latent: Latent | None
    qkv_bias: bool
    out_bias: bool
    max_position_embeddings: int

    def attention(self, max_seq_len: int | None = None) -> Attention:
        """Build it, without the checkpoint's weights, for so many positions."""
        from rope_export.attention.block import Attention

        served = self.max_position_embeddings if max_seq_len is None else max_seq_len
        return Attention(
            self.hidden_size,
            self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            value_head_dim=self.value_head_dim,
            rope=None if self.rope is None else self.rope.embedding(served),
            causal=self.causal,
            window=self.window,
            softcap=self.softcap,
            sinks=self.sinks,
            qk_norm=self.qk_norm or False,
            latent=self.latent,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            scale=self.scale,
        )

    def summary(self) -> str:
        """The layer in a line."""
        heads = f"{self.num_heads} heads of {self.head_dim}"
        if self.num_kv_heads != self.num_heads:
            heads = f"{self.num_heads} query and {self.num_kv_heads} key/value heads"
            heads += f" of {self.head_dim}"
        parts = [f"layer {self.index} ({self.family})", f"hidden {self.hidden_size}", heads]
        if self.rope is None:
            parts.append("no RoPE")
        else:
            kind = (self.rope.scaling or {}).get("rope_type", "default")
            width = f" on {self.rope.dim} of each" if self.rope.dim != self.head_dim else ""
            parts.append(f"RoPE {kind}{width}, {self.rope.layout}, theta {self.rope.theta:g}")
        if self.latent is not None:
            parts.append(f"latents of {self.latent.q_rank or 'no'} and {self.latent.kv_rank}")
        for name, value in (("window", self.window), ("soft cap", self.softcap)):
            if value is not None:
                parts.append(f"{name} {value:g}")
        if self.qk_norm is not None:
            parts.append(f"{self.qk_norm.kind} norm of queries and keys")
        if self.sinks:
            parts.append("sinks")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The layer as plain data."""
        return asdict(self)
