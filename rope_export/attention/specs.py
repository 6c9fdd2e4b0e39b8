"""How attention projects and normalises, as data: what `Attention` takes and checkpoints state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from rope_export.checks import finite_number, positive_integer
from rope_export.errors import BadInputError

NormKind = Literal["rms", "layer"]
NormOver = Literal["head", "each_head", "projection"]


@dataclass(frozen=True)
class QKNorm:
    """How queries and keys are normalised before they are rotated.

    Attributes:
        kind: ``"rms"`` (Qwen3) or ``"layer"`` norm (Phi).
        over: ``"head"``: every head alone, all with one weight; ``"each_head"``: every head alone,
            each with its own (Cohere, StableLM); ``"projection"``: all heads as one (OLMo 2).
        bias: whether a layer norm adds a bias.
        unit_offset: a weight ``w`` multiplies by ``1 + w`` (Gemma).
        eps: added to the mean square, above 0: without it a head of zeros, as at padding, would be
            divided by nothing.

    Raises:
        BadInputError: a field is out of range.
    """

    kind: NormKind = "rms"
    over: NormOver = "head"
    bias: bool = False
    unit_offset: bool = False
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("kind", self.kind, get_args(NormKind)),
            ("over", self.over, get_args(NormOver)),
        ):
            if value not in choices:
                raise BadInputError(
                    f"{name} of a norm must be one of {', '.join(choices)}, got {value!r}"
                )
        if self.bias and self.kind == "rms":
            raise BadInputError("bias is of a layer norm, got it with kind 'rms'")
        finite_number("qk_norm_eps", self.eps)


@dataclass(frozen=True)
class Latent:
    """Ranks of the latents of multi-head latent attention (MLA).

    Source: DeepSeek-AI, "DeepSeek-V2" (2024), section 2.1.

    Attributes:
        kv_rank: width of the latent of keys and values.
        q_rank: width of the latent of queries, or None where they are projected at once.
        eps: of the RMS norm of each latent.
        bias: biases on the projections into the latents.

    Raises:
        BadInputError: a field is out of range.
    """

    kv_rank: int
    q_rank: int | None = None
    eps: float = 1e-6
    bias: bool = False

    def __post_init__(self) -> None:
        positive_integer("kv_rank", self.kv_rank)
        if self.q_rank is not None:
            positive_integer("q_rank", self.q_rank)
        finite_number("eps of a latent", self.eps)
