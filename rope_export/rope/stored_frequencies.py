"""The ``freqs`` of a state dict or a cast module: whether they are those, and what they were."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rope_export.rope.frequencies import default_inv_freq, unscaled_frequencies

_NARROW = (torch.float16, torch.bfloat16)
_FORMULAS = 2e-6  # what float32 formulas differ by, relative
# Fewer frequencies fit some series by chance.
_FEWEST = 4
# Of the distance between two round numbers: wider, one of them lies there by chance.
_NARROW_ENOUGH = 0.1
_POWERS_OF_TEN = range(13)
_RESCALED_BY = range(2, 33)
_PIXELS = 4097


@dataclass(frozen=True)
class Unrounded:
    """What rounded frequencies were, as far as that can be told.

    Attributes:
        dtype: what they were rounded to.
        name: of the argument of `RotaryEmbedding` that gives them, ``theta`` or ``max_freq``.
        least: the smallest value of it that explains every one of them.
        most: the largest.
        value: what it was, or None where that cannot be told.
        freqs: ``[r / 2]`` float64, exact, by ``value``.
    """

    dtype: torch.dtype
    name: str
    least: float
    most: float
    value: float | None
    freqs: Tensor | None

    @property
    def doubt(self) -> str:
        """Why it cannot be told, in plain words."""
        shown = str(self.dtype).removeprefix("torch.")
        return (
            f"rounded to {shown}, they could be those of any {self.name} in "
            f"{self.least:.9g} … {self.most:.9g}"
        )


def placed_as(like: Tensor, values: Tensor) -> Tensor:
    """``values``, distributed as ``like`` is where it is sharded (FSDP2)."""
    if type(like.data) is Tensor:
        return values
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like.data, DTensor):
        return values
    values = values.to(like.device, like.dtype)
    return distribute_tensor(values, like.data.device_mesh, like.data.placements)


def same_frequencies(given: Tensor, freqs: Tensor) -> bool:
    """Whether stored frequencies are these, as far as the dtype they were rounded to can say."""
    kept = given.detach().to("cpu")
    if kept.shape != freqs.shape:
        return False
    if kept.dtype not in _NARROW and torch.equal(kept.float(), freqs.float()):
        return True
    dtype = _rounded_to(kept)
    return dtype is not None and _explains(freqs, kept, dtype)


def unrounded(given: Tensor, *, freqs_for: str) -> Unrounded | None:
    """What frequencies were before the module that holds them was cast to half precision.

    The class's default (``theta=10000``, ``max_freq=10``) is taken if it explains all of them to
    the rounding. Otherwise the rounding leaves a range of ``theta`` or ``max_freq``, and what is
    taken is the one number in it that people write: of one or two digits, a power of two, a
    whole number of pixels, or the default rescaled by a whole ``theta_rescale_factor``. Where
    there is none or there are several, or where the range is so wide that one lies in it by
    chance, it cannot be told.

    Args:
        given: ``[r / 2]``, in half precision or wider.
        freqs_for: as of `RotaryEmbedding`.

    Returns:
        what is known of them, or None: they were not rounded, or no formula gives them.
    """
    kept = given.detach().to("cpu")
    dtype, dim = _rounded_to(kept), 2 * len(kept)
    if dtype is None or freqs_for not in ("lang", "pixel"):  # "constant" is rounded to itself
        return None
    name, default = ("theta", 10000.0) if freqs_for == "lang" else ("max_freq", 10.0)
    by_default = _formula(name, default, dim)
    if _explains(by_default, kept, dtype):
        return Unrounded(dtype, name, default, default, default, by_default)
    if len(kept) < _FEWEST:
        return None
    least, most = _range(kept, dtype, name)
    if not (0 < least <= most < math.inf):
        return None
    if not _explains(_formula(name, math.sqrt(least * most), dim), kept, dtype):
        return None  # the first of them, on which the argument has no say, is another
    value = _only(least, most, _round_numbers(name, dim))
    freqs = None if value is None else _formula(name, value, dim)
    return Unrounded(dtype, name, least, most, value, freqs)


def _rounded_to(kept: Tensor) -> torch.dtype | None:
    """The half precision that holds each of these numbers, the coarser if both do."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(kept.to(dtype).double(), kept.double()):
            return dtype
    return None


def _explains(freqs: Tensor, kept: Tensor, dtype: torch.dtype) -> bool:
    """Whether each of ``kept`` is one of ``freqs``, rounded to ``dtype``."""
    least, most = _before_rounding(kept, dtype)
    return bool(((least <= freqs) & (freqs <= most)).all())


def _before_rounding(kept: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Between what each number lay, float64."""
    size = kept.double().abs()
    # Below, numbers are subnormal; of what came to float16 by way of bfloat16, in float16.
    tiny = max(torch.finfo(each).tiny for each in (dtype, kept.dtype))
    _, exponent = torch.frexp(size.clamp(min=tiny))
    ulp = torch.ldexp(torch.full_like(size, torch.finfo(dtype).eps / 2), exponent)
    slack = ulp / 2 + _FORMULAS * size
    return kept.double() - slack, kept.double() + slack


def _formula(name: str, value: float, dim: int) -> Tensor:
    if name == "theta":
        return default_inv_freq(dim, value)
    return unscaled_frequencies(dim, 1.0, freqs_for="pixel", max_freq=value)


def _range(kept: Tensor, dtype: torch.dtype, name: str) -> tuple[float, float]:
    """Between what the argument lay; the first frequency does not depend on it."""
    low, high = (bound[1:] for bound in _before_rounding(kept, dtype))
    steps = torch.arange(1, len(kept), dtype=torch.float64)
    if name == "theta":  # f = theta ** (-2i / dim): the higher, the smaller theta is
        power = -len(kept) / steps
        ends = (high**power).max(), (low.clamp(min=0) ** power).min()
    else:  # f = pi * (1 + (max_freq / 2 - 1) * i / (n - 1))
        per_step = (len(kept) - 1) / steps
        lowest, highest = (2 * (1 + (end / math.pi - 1) * per_step) for end in (low, high))
        ends = lowest.max(), highest.min()
    return float(ends[0]), float(ends[1])


def _round_numbers(name: str, dim: int) -> Iterator[list[float]]:
    """Numbers that people write, by kind, in order."""
    for digits in (range(1, 10), range(10, 100)):
        yield [float(digit * 10**power) for power in _POWERS_OF_TEN for digit in digits]
    yield [2.0**power for power in range(1, 33)]
    if name == "max_freq":
        for step in (1, 8):  # most images are so many patches wide
            yield [float(pixels) for pixels in range(step, _PIXELS, step)]
    elif dim > 2:
        yield [10000.0 * factor ** (dim / (dim - 2)) for factor in _RESCALED_BY]


def _only(least: float, most: float, kinds: Iterable[Sequence[float]]) -> float | None:
    """The one number in the range, if it is no wonder that it is the only one."""
    found: list[tuple[float, bool]] = []
    for numbers in kinds:
        for number in numbers:
            if least <= number <= most:
                nearest = min(abs(other - number) for other in numbers if other != number)
                found.append((number, most - least <= _NARROW_ENOUGH * nearest))
    same = all(math.isclose(number, found[0][0], rel_tol=1e-9) for number, _ in found)
    return found[0][0] if same and any(surely for _, surely in found) else None
