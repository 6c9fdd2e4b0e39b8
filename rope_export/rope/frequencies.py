"""Inverse frequencies, cos/sin tables and decay rates: pure functions, in float64.

Everything here runs on the host from Python scalars and is rounded once, at the end, so a
table row is as exact at position 16 million as at position 1. Which of it a RoPE type uses is
said in `rope_types`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rope_export.checks import finite_number, positive_integer
from rope_export.errors import BadInputError

FreqsFor = Literal["lang", "pixel", "constant"]
FREQS_FOR: tuple[str, ...] = get_args(FreqsFor)


def default_inv_freq(dim: int, theta: float) -> Tensor:
    """Inverse frequencies of the original RoPE: ``theta ** (-2i / dim)``.

    Source: Su et al., "RoFormer" (2021), section 3.2.2.

    Args:
        dim: rotated width of a head, even.
        theta: the base.

    Returns:
        ``[dim / 2]`` float64, in radians per position.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
    return theta**-exponents


def pixel_inv_freq(dim: int, max_freq: float) -> Tensor:
    """Frequencies for coordinates in -1 … 1: from pi to ``max_freq / 2 * pi`` in even steps.

    Source: rotary-embedding-torch, ``freqs_for="pixel"``.

    Args:
        dim: rotated width of a head, even.
        max_freq: the highest frequency, as pixels along an axis.

    Returns:
        ``[dim / 2]`` float64, in radians per unit of the coordinate.
    """
    return torch.linspace(1.0, max_freq / 2, dim // 2, dtype=torch.float64, device="cpu") * math.pi


def unscaled_frequencies(
    dim: int,
    theta: float,
    *,
    custom_freqs: Tensor | None = None,
    freqs_for: str = "lang",
    max_freq: float = 10,
    num_freqs: int = 1,
) -> Tensor:
    """Frequencies by the arguments of rotary-embedding-torch.

    Args:
        dim: rotated width of a head, even.
        theta: the base of ``"lang"``.
        custom_freqs: ``[r / 2]``, taken as they are.
        freqs_for: ``"lang"`` for a series of wavelengths, ``"pixel"`` for coordinates,
            ``"constant"`` for ones.
        max_freq: the highest frequency of ``"pixel"``.
        num_freqs: how many ``"constant"`` has.

    Returns:
        ``[r / 2]`` float64.

    Raises:
        BadInputError: an argument is out of range; the message names it and its value.
    """
    if custom_freqs is not None:
        return _given_frequencies(custom_freqs)
    if freqs_for not in FREQS_FOR:
        raise BadInputError(f"freqs_for must be one of {', '.join(FREQS_FOR)}, got {freqs_for!r}")
    if freqs_for == "lang":
        return default_inv_freq(dim, theta)
    if freqs_for == "pixel":
        return pixel_inv_freq(dim, finite_number("max_freq", max_freq))
    count = positive_integer("num_freqs", num_freqs)
    return torch.ones(count, dtype=torch.float64, device="cpu")


def _given_frequencies(custom_freqs: Tensor) -> Tensor:
    if not isinstance(custom_freqs, Tensor):
        raise BadInputError(f"custom_freqs must be a tensor, got {type(custom_freqs).__name__}")
    if custom_freqs.ndim != 1 or not len(custom_freqs):
        raise BadInputError(
            f"custom_freqs must be one axis of frequencies, got {tuple(custom_freqs.shape)}"
        )
    if custom_freqs.is_complex() or not bool(custom_freqs.isfinite().all()):
        got = custom_freqs.dtype if custom_freqs.is_complex() else custom_freqs.tolist()
        raise BadInputError(f"custom_freqs must be finite and real, got {got}")
    return custom_freqs.detach().to("cpu", torch.float64)


def xpos_log_decay(dim: int) -> Tensor:
    """Logarithms of xPos's decay of each pair over one ``scale_base`` of positions.

    Source: Sun et al., "A Length-Extrapolatable Transformer" (2022), section 3.1, gamma 0.4.

    Args:
        dim: rotated width of a head, even.

    Returns:
        ``[dim / 2]`` float64, all below zero.
    """
    channels = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu")
    return ((channels + 0.4 * dim) / (1.4 * dim)).log()


def cos_sin_table(
    inv_freq: Tensor, length: int, attention_factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions ``0 … length - 1``.

    Args:
        inv_freq: ``[r / 2]`` float64.
        length: number of rows.
        attention_factor: multiplies both.

    Returns:
        two ``[length, r / 2]`` float32 tables, each entry the float64 value rounded once.
    """
    positions = torch.arange(length, dtype=torch.float64, device="cpu")
    angles = torch.outer(positions, inv_freq.to("cpu", torch.float64))
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
    return cos.to(torch.float32), sin.to(torch.float32)


@dataclass(frozen=True)
class Switch:
    """Other frequencies for sequences longer than the model was first trained on.

    Attributes:
        length: the longest sequence that still uses the first ones. The whole batch switches when
            its largest position reaches it.
        inv_freq: ``[dim / 2]`` float64, used beyond.
    """

    length: int
    inv_freq: Tensor


@dataclass(frozen=True)
class Stretch:
    """Frequencies that slow down as the sequence outgrows the trained length.

    With ``n`` positions in the batch's longest sequence the base of the series is multiplied by
    ``(factor * n / length - (factor - 1)) ** (dim / (dim - 2))``, from ``n = length`` on.

    Attributes:
        length: the longest sequence that is not stretched.
        factor: how fast the base grows.
    """

    length: int
    factor: float


@dataclass(frozen=True)
class Frequencies:
    """What a RoPE type comes down to.

    Attributes:
        inv_freq: ``[dim / 2]`` float64, in radians per position.
        attention_factor: multiplies cosines and sines (and so the scores by its square).
        beyond: what replaces ``inv_freq`` in longer sequences, or None.
        stretch: how ``inv_freq`` follows the length of the sequence, or None.
        axis_of_pair: for positions with several axes, which one turns each of the ``dim / 2``
            pairs; None for one axis.
        one_position: whether a token may be given one position for all axes (text does, a patch
            of an image cannot).
    """

    inv_freq: Tensor
    attention_factor: float = 1.0
    beyond: Switch | None = None
    stretch: Stretch | None = None
    axis_of_pair: tuple[int, ...] | None = None
    one_position: bool = True

    @property
    def axes(self) -> int:
        """How many positions a token has."""
        return 1 if self.axis_of_pair is None else max(self.axis_of_pair) + 1
