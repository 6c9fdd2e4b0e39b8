"""`Likeness`: inputs of other sizes that are as an example is.

A mask is not a bag of numbers: where it hides, and that something stays visible, is what it says.
Values that are few, infinite or so low that they stand for that, keep their value and their place:
what lies above a diagonal stays there, padding stays on its side, windows keep their width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rope_export.proof.arrays import to_numpy
from rope_export.runtime.token_places import Array

Codes = npt.NDArray[np.int64]
"""Which of the values that are kept stands at each place; -1: any other number."""

_FEW = 4
# What masks in use add to scores so that softmax gives nothing: -1e4 (float16), -1e9, finfo.min.
_LOW = 9e3
_ANY = -1


class Likeness:
    """What of an example other inputs keep.

    Args:
        name: of the input.
        example: its tensor.
        rows: whether the axis before the last is one of queries, not of the batch.
    """

    def __init__(self, name: str, example: Tensor, *, rows: bool) -> None:
        self.name = name
        self._example = example.detach().cpu()
        self._array = to_numpy(self._example.contiguous())
        self._rows = rows
        wide = self._example.double() if self._example.is_floating_point() else self._example
        self._wide: Array = wide.numpy()
        self._kept, self._codes = self._coded()

    @property
    def constant(self) -> bool:
        """Whether it is the same number everywhere."""
        return self._wide.size > 0 and bool((self._wide == self._wide.flat[0]).all())

    @property
    def keeps(self) -> bool:
        """Whether some of its values, such as those that hide, are kept as they are."""
        return bool(self._kept)

    @property
    def _varies(self) -> bool:
        """Whether other numbers may stand in the place of one that is everywhere."""
        many = self._wide.size > 1 and self._wide.dtype.kind == "f"
        return many and self.constant and not _says_what_is_hidden(self.name)

    @property
    def shown(self) -> str:
        """Its numbers in words."""
        if self.constant:
            return f"{self._wide.flat[0]}"
        if self._wide.dtype.kind == "b":
            return "True and False"
        low, high = self._wide.min(), self._wide.max()
        return f"{low:g} … {high:g}" if self._wide.dtype.kind == "f" else f"{low} … {high}"

    def note(self) -> str | None:
        """What a proof by inputs as the example's cannot see, in plain words."""
        if not self.constant:
            return None
        value = self._wide.flat[0]
        if self._wide.size == 1:
            text = f"{self.name} is {value} in the example"
        elif self._wide.dtype.kind == "b":
            text = f"{self.name} is all {value} in the example"
        else:
            text = f"{self.name} is {value:g} everywhere in the example"
        if self._varies:
            return f"{text}: every other case has normally distributed numbers in its place"
        pads = self._wide.size > 1 and ("mask" in self.name or self._wide.dtype.kind == "b")
        what = "padding is not proven; give an example with padding"
        if not pads:
            what = "other values are not proven; give an example that has some"
        return f"{text}: {what}, or inputs="

    def draw(
        self, shape: tuple[int, ...], rng: np.random.Generator, *, varied: bool = True
    ) -> Array:
        """Numbers of another shape.

        Args:
            shape: of as many axes as the example has.
            rng: draws.
            varied: whether floating-point inputs that are the same everywhere may be others.
        """
        if not self._array.size:
            return np.zeros(shape, dtype=self._array.dtype)
        kind = self._wide.dtype.kind
        if varied and self._varies:
            return self._cast(rng.standard_normal(shape) + float(self._wide.flat[0]))
        if self._codes is None:
            if kind == "f":
                return self._cast(self._normal(shape, rng))
            drawn: Array = rng.choice(self._array.reshape(-1), size=shape)
            return drawn.astype(self._array.dtype)
        codes = self._resized(shape, rng)
        numbers = np.zeros(shape)
        if (codes == _ANY).any():
            numbers = self._normal(shape, rng)
        for code, value in enumerate(self._kept):
            numbers = np.where(codes == code, value, numbers)
        return self._cast(numbers)

    def _cast(self, numbers: Array) -> Array:
        return to_numpy(torch.as_tensor(np.asarray(numbers)).to(self._example.dtype))

    def _normal(self, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
        """Numbers that spread as those do that are not kept."""
        values = self._wide.reshape(-1)
        if self._codes is not None:
            values = values[self._codes.reshape(-1) == _ANY]
        spread = float(values.std()) if values.size > 1 else 0.0
        usable = spread > 0 and np.isfinite(spread)
        mean = float(values.mean()) if usable else 0.0
        normal: Array = rng.standard_normal(shape) * (spread if usable else 1.0) + mean
        return normal

    def _coded(self) -> tuple[list[float], Codes | None]:
        """The values that are kept, and where; no places where all numbers are alike."""
        values, kind = self._wide, self._wide.dtype.kind
        if not values.size or kind == "c":
            return [], None
        few = np.unique(values)
        if kind == "f":
            special = few[~np.isfinite(few) | (np.abs(few) >= _LOW)]
            if len(few) <= _FEW and values.size > 2 * len(few):
                special = few
            if not len(special) or np.isnan(few).any():
                return [], None
        elif len(few) <= (2 if kind != "b" else len(few)):
            special = few
        else:
            return [], None
        codes = np.full(values.shape, _ANY, dtype=np.int64)
        for code, value in enumerate(special):
            codes[values == value] = code
        return [float(value) for value in special], codes

    # Places, at other sizes.

    def _resized(self, shape: tuple[int, ...], rng: np.random.Generator) -> Codes:
        assert self._codes is not None
        codes = self._codes
        if not shape:
            return codes
        inner = 2 if self._rows and len(shape) > 1 else 1
        outer = shape[: len(shape) - inner]
        found = np.empty(shape, dtype=np.int64)
        for index in np.ndindex(*outer):
            of_example = tuple(i % n for i, n in zip(index, codes.shape, strict=False))
            part = codes[of_example]
            found[index] = (
                self._matrix(part, shape[-2:], rng)
                if inner == 2
                else self._row(part, shape[-1], rng)
            )
        return found

    def _row(self, codes: Codes, length: int, rng: np.random.Generator) -> Codes:
        """One row of keys: where padding begins or ends is drawn, its side is not."""
        changes = np.flatnonzero(np.diff(codes)) + 1
        if len(changes) == 0:
            return np.full(length, int(codes[0]), dtype=np.int64)
        if len(changes) > 1 or length < 2:
            row: Codes = codes[_spread(len(codes), length)]
            seen: Codes = self._seen(row[None], codes[None])[0]
            return seen
        row = np.full(length, int(codes[0]), dtype=np.int64)
        row[int(rng.integers(1, length)) :] = codes[-1]
        return row

    def _matrix(self, codes: Codes, shape: Sequence[int], rng: np.random.Generator) -> Codes:
        """Queries and keys."""
        queries, keys = shape
        ahead, new_ahead = _ahead(codes.shape), _ahead((queries, keys))
        future, past = codes[ahead > 0], codes[ahead <= 0]
        hidden = int(future[0]) if future.size else _MISSING
        triangular = len(codes) > 1 and bool((future == hidden).all() and (past != hidden).any())
        triangular = triangular and future.size > 0
        base = codes
        if triangular:  # what holds for the rest is asked of the rest
            base = np.where(ahead > 0, _MISSING, codes)
        by_key = _along(base, axis=0)
        if by_key is not None:
            found = np.broadcast_to(self._row(by_key, keys, rng), shape).copy()
        else:
            by_distance = _by_distance(base, ahead)
            if by_distance is not None:
                distances = np.clip(new_ahead, min(by_distance), max(by_distance))
                found = np.vectorize(by_distance.get, otypes=[np.int64])(distances)
            else:
                at = _spread(codes.shape[0], queries), _spread(codes.shape[1], keys)
                found = codes[np.ix_(*at)]
        if triangular:
            found = np.where(new_ahead > 0, hidden, found)
        return self._seen(found, codes)

    def _seen(self, found: Codes, codes: Codes) -> Codes:
        """Rows that see nothing only where the example has some."""
        hidden = self._hidden()
        if hidden is None or (codes == hidden).all(axis=1).any():
            return found
        visible = [int(code) for code in np.unique(codes) if code != hidden]
        blind = (found == hidden).all(axis=1)
        at = np.clip(np.arange(len(found)) + found.shape[1] - len(found), 0, None)
        found[blind, at[blind]] = visible[0] if visible else hidden
        return found

    def _hidden(self) -> int | None:
        """The value that hides, where there are two kinds of place."""
        if not self._kept:
            return None
        lowest = int(np.argmin(self._kept))
        if self._wide.dtype.kind == "b" and "pad" in self.name:
            return int(np.argmax(self._kept))
        return lowest


_MISSING = -2


def _says_what_is_hidden(name: str) -> bool:
    return any(word in name.lower() for word in ("mask", "bias", "pad"))


def _ahead(shape: Sequence[int]) -> Codes:
    """How far a key is ahead of a query, the last of both being level."""
    queries, keys = shape[-2:]
    ahead: Codes = np.arange(keys)[None] - np.arange(queries)[:, None] - (keys - queries)
    return ahead


def _along(codes: Codes, axis: int) -> Codes | None:
    """The one value that each column has, or None where one has several."""
    known = codes != _MISSING
    first = np.take_along_axis(codes, known.argmax(axis)[None], axis)[0]
    same = ((codes == first) | ~known).all()
    return first if same and known.any(axis).all() else None


def _by_distance(codes: Codes, ahead: Codes) -> dict[int, int] | None:
    """The one value at each distance between query and key, or None where there are several."""
    found: dict[int, int] = {}
    for distance, code in zip(ahead.flat, codes.flat, strict=True):
        if code != _MISSING and found.setdefault(int(distance), int(code)) != code:
            return None
    if not found:
        return None
    return {d: found.get(d, 0) for d in range(min(found), max(found) + 1)}


def _spread(old: int, new: int) -> npt.NDArray[np.int64]:
    """For every new place the old one at the same share of the way."""
    places: npt.NDArray[np.int64] = (np.arange(new) * old) // max(new, 1)
    return places
