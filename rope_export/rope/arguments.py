"""`choose`: which frequencies the arguments of a `RotaryEmbedding` ask for, by either spelling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rope_export.checks import finite_number
from rope_export.errors import BadInputError
from rope_export.rope.frequencies import Frequencies, unscaled_frequencies
from rope_export.rope.rope_types import frequencies

_DEFAULT_THETA = 10000.0


@dataclass(frozen=True)
class Chosen:
    """What the arguments of a `RotaryEmbedding` come down to.

    Attributes:
        freqs: ``[r / 2]`` float64, as its state dict holds them: before interpolation.
        found: everything else, after interpolation.
        theta: the base, or None where the frequencies are not a series of it.
    """

    freqs: Tensor
    found: Frequencies
    theta: float | None


def choose(
    dim: int,
    theta: float | None,
    *,
    custom_freqs: Tensor | None,
    freqs_for: str,
    max_freq: float,
    num_freqs: int,
    interpolate_factor: float,
    theta_rescale_factor: float,
    scaling: Mapping[str, Any] | None,
    max_seq_len: int | None,
) -> Chosen:
    """Frequencies by ``scaling``, or by the arguments of rotary-embedding-torch.

    Raises:
        BadInputError: an argument is out of range, or two contradict each other.
    """
    interpolate_factor = finite_number("interpolate_factor", interpolate_factor, at_least=1.0)
    series = custom_freqs is None and freqs_for == "lang"
    base = _base(dim, theta, theta_rescale_factor, scaling)
    if scaling is None:
        freqs = unscaled_frequencies(
            dim,
            base,
            custom_freqs=custom_freqs,
            freqs_for=freqs_for,
            max_freq=max_freq,
            num_freqs=num_freqs,
        )
        return Chosen(freqs, Frequencies(freqs / interpolate_factor), base if series else None)
    for name, value, stated in (
        ("custom_freqs", "a tensor", custom_freqs is not None),
        ("freqs_for", repr(freqs_for), freqs_for != "lang"),
        ("interpolate_factor", interpolate_factor, interpolate_factor != 1),
        ("theta_rescale_factor", theta_rescale_factor, theta_rescale_factor != 1),
    ):
        if stated:
            raise BadInputError(f"{name} and scaling exclude each other, got {value} and {scaling}")
    found = frequencies(dim, base, scaling, max_seq_len)
    return Chosen(found.inv_freq, found, base)


def _base(
    dim: int, theta: float | None, rescale: float, scaling: Mapping[str, Any] | None
) -> float:
    """The base of the series, rescaled as rotary-embedding-torch does (bloc97, 2023)."""
    rescale = finite_number("theta_rescale_factor", rescale)
    if theta is None:
        theta = scaling.get("rope_theta") if isinstance(scaling, Mapping) else None
        theta = _DEFAULT_THETA if theta is None else theta
    base = finite_number("theta", theta)
    if rescale == 1:
        return base
    if dim < 4:
        raise BadInputError(f"theta_rescale_factor needs a dim of at least 4, got {dim}")
    try:
        return finite_number("theta", base * rescale ** (dim / (dim - 2)))
    except OverflowError:
        raise BadInputError(
            f"theta_rescale_factor must leave theta finite, got {rescale:g}"
        ) from None
