"""`Planner`: the sizes a module is proven at, none of them the ones it was traced at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rope_export import runtime
from rope_export.artifacts.cache_layout import MASK, CacheLayout
from rope_export.errors import BadInputError
from rope_export.exporting.labels import names_in, size_of
from rope_export.exporting.signature import Signature
from rope_export.lowering.choice import Choice

# Beyond so many operations (about a minute of float64 here) a length is not proven.
_TRUTH_FLOPS = 4e12
_MEMORY_SHARE = 0.6
# The largest size proven of a label that the graph bounds and nobody gave a maximum.
_UNASKED = 512
BATCH_LABELS = ("batch", "rows")


@dataclass(frozen=True)
class Sizes:
    """One case before its numbers.

    Attributes:
        name: what it covers.
        sizes: of every label that stands for itself.
        lengths: new tokens of each row that are no padding; empty when none is.
        steps: when not empty, the case is one full pass that is run in several calls: how many
            tokens each row is given in each.
        given: whether the inputs are the caller's own example.
    """

    name: str
    sizes: Mapping[str, int]
    lengths: tuple[int, ...] = ()
    steps: tuple[tuple[int, ...], ...] = ()
    given: bool = False

    @property
    def loud(self) -> bool:
        """Inputs are never louder than the caller's own."""
        return False


class Planner:
    """Chooses sizes.

    Args:
        signature: what the graph takes and gives.
        choices: the forms its attentions took.
        layout: how a Decoder drives it, or None.
        longest: longest sequence served.
        heads: of the attention that has most.
        operations: float64 operations at given sizes.
        example: sizes of the labels in the caller's example.
    """

    def __init__(
        self,
        signature: Signature,
        choices: Sequence[Choice],
        layout: CacheLayout | None,
        *,
        longest: int,
        heads: int,
        operations: Callable[[Mapping[str, int]], float],
        example: Mapping[str, int],
    ) -> None:
        self._signature = signature
        self._choices = choices
        self._layout = layout
        self._longest = longest
        self._heads = heads
        self._operations = operations
        self._example = example

    def planned(self) -> tuple[list[Sizes], list[str]]:
        """Cases before their numbers, and what they leave out, in plain words."""
        signature = self._signature
        free, notes = signature.free, []
        unstated: list[str] = []
        new, past = signature.sequence, signature.past
        new = new if new in free else None
        past = past if past in free else None
        others = [label for label in free if label not in (new, past)]
        lengthy = self._lengthy(others)
        longest: dict[str, int] = {}
        for label in free:
            high = free[label][1]
            if high is None and label not in BATCH_LABELS:
                unstated.append(label)
            elif high is not None and label != past and label not in BATCH_LABELS:
                fits, why = self._affordable(label, high)
                if label in signature.limits and fits > _UNASKED:
                    fits, why = _UNASKED, "nobody asked for more"
                longest[label] = fits
                if fits < high:
                    notes.append(f"proven only up to {label} {fits} of {high}: {why}")

        def sizes(batch: int, length: int, before: int = 0) -> dict[str, int]:
            chosen = {}
            for index, label in enumerate(others):
                size = batch
                if label in lengthy:  # all of them together are about as long as a sequence
                    size = round(length ** (1 / len(lengthy)))
                # No two alike: what reads one axis for another would not show.
                more = 2 * (index + (label in lengthy and new is not None))
                chosen[label] = self._signature.within(label, size + more if size > 1 else 1)
            if new is not None:
                chosen[new] = self._signature.within(new, length)
            if past is not None:
                chosen[past] = self._signature.within(past, before)
            return {label: chosen[label] for label in free}

        given = Sizes("the example", {label: self._example[label] for label in free}, given=True)
        if not free:
            drawn = [Sizes("fixed", {}), Sizes("fixed again", {})]
            return [given, *drawn, *self._padded(sizes)], notes
        planned = [
            given,
            Sizes("smallest" if new is None else "one token", sizes(1, 1)),
            Sizes("odd sizes" if new is None else "odd length", sizes(3 if new is None else 1, 13)),
            Sizes("larger sizes" if new is None else "batch of five", sizes(5, 32)),
            Sizes("two rows", sizes(2, 7)),
        ]
        for label, high in longest.items():
            name = "longest" if label == new else f"longest {label}"
            planned.append(Sizes(name, sizes(1, 1) | {label: high}))
        planned += self._padded(sizes)
        if past is not None:
            planned += self._after_a_past(sizes)
        distinct = {
            (tuple(case.sizes.items()), case.lengths, case.steps, case.given): case
            for case in reversed(planned)
        }
        served = [case for case in reversed(distinct.values()) if self._serves(case)]
        for label in unstated:
            most = max(case.sizes[label] for case in served)
            notes.append(
                f"{label} has no stated maximum: no line of the module bounds it, and it is "
                f"proven up to {most} (torch.export.Dim({label!r}, max=N) or "
                f"--range {label}=1:N states one)"
            )
        return served, notes

    def _lengthy(self, labels: Sequence[str]) -> list[str]:
        """Labels that count no rows: they stand behind the first axis."""
        first = {
            name
            for axes in self._signature.inputs.values()
            for name in (names_in(axes[0]) if axes and isinstance(axes[0], str) else ())
        }
        return [label for label in labels if label not in first and label not in BATCH_LABELS]

    def _serves(self, case: Sizes) -> bool:
        """Whether no sequence is over the longest, and no axis below nothing."""
        signature = self._signature
        fits = all(size_of(text, case.sizes) <= self._longest for text in signature.lengths)
        axes = [axis for of_input in signature.inputs.values() for axis in of_input]
        return fits and all(size_of(axis, case.sizes) >= 0 for axis in axes)

    def _padded(self, sizes: Callable[..., dict[str, int]]) -> list[Sizes]:
        """Rows of different lengths, where there is a mask to say so."""
        signature = self._signature
        if not signature.masked or (signature.layers and signature.past is None):
            return []
        chosen = sizes(4, 13)
        length = self._signature.new_tokens(chosen)
        rows = size_of(signature.inputs[MASK][0], chosen)
        if length < 2:
            return []
        lengths = tuple(max(1, n) for n in (length, 1, length // 2, length - 1))
        lengths = tuple(lengths[row % 4] for row in range(rows))
        if all(n == length for n in lengths):
            lengths = (length - 1,) * rows
        return [Sizes("rows of different lengths", chosen, lengths=lengths)]

    def _after_a_past(self, sizes: Callable[..., dict[str, int]]) -> list[Sizes]:
        longest = self._longest
        ends = self._signature.free[str(self._signature.past)][1]
        longest = min(longest, (longest if ends is None else ends) + 1)
        new = self._signature.new
        fewest = new if isinstance(new, int) else 1
        planned = [
            Sizes("decode after one", sizes(2, 1, 1)),
            Sizes("decode", sizes(2, 1, 16)),
            Sizes("decode at capacity", sizes(1, 1, max(0, longest - fewest))),
        ]
        if self._signature.sequence not in self._signature.free:
            return planned
        planned += [
            Sizes("chunk", sizes(1, 5, 9)),
            Sizes("chunk up to capacity", sizes(1, 3, max(0, longest - 3))),
        ]
        for window in dict.fromkeys(self._signature.windows.values()):
            far = max(0, min(longest - 4, 10 * window + 3))
            planned += [
                Sizes("decode, at the window", sizes(1, 1, min(window, longest - 1))),
                Sizes("decode, windows on", sizes(2, 1, far)),
                Sizes("chunk, windows on", sizes(1, 4, far)),
            ]
        if self._layout is None or self._layout.by_rows:
            planned.append(Sizes("chunk of a batch", sizes(3, 4, 9)))
        if self._layout is None:
            return planned
        over = min(max(self._signature.windows.values(), default=0), 64)
        rows, length = 3, min(max(24, 3 * over), longest)
        chosen = sizes(rows, length)
        if length < 8 or chosen[str(self._signature.sequence)] != length:
            return planned
        rows = size_of(self._signature.inputs[self._signature.tokens][0], chosen)
        third = length // 3
        chunks = [third, third] if self._layout.by_rows or rows == 1 else [third]
        even = [(n,) * rows for n in [*chunks, *[1] * min(6, length - sum(chunks))]]
        planned.append(Sizes("prefill and decode", chosen, steps=tuple(even)))
        if self._layout.ragged and rows > 1:
            ragged = [tuple((third, 1, third // 2 + 1)[row % 3] for row in range(rows))]
            ragged += [(1,) * rows] * min(6, length - third)
            name = "prefill and decode, rows of different lengths"
            planned.append(Sizes(name, chosen, steps=tuple(ragged)))
        return planned

    def _affordable(self, label: str, high: int) -> tuple[int, str]:
        """The largest size up to ``high`` whose truth is affordable here, and why not more."""
        base = {name: low for name, (low, _) in self._signature.free.items()}
        near, far = (self._signature.within(label, size) for size in (64, 128))
        if high <= far or near == far:
            return high, ""
        less, more = (self._operations(base | {label: size}) for size in (near, far))
        # Operations as a line and a square through two points.
        square = max(0.0, (more / far - less / near) / (far - near))
        line = max(0.0, less / near - square * near)
        copies = max((max(c.score_copies.values()) for c in self._choices), default=0.0)
        available = _MEMORY_SHARE * runtime.available_memory()
        width = sum(self._elements(base | {label: far})) / far

        def fits(size: int) -> str:
            if line * size + square * size**2 > _TRUTH_FLOPS:
                return "float64 truth for more would take too long"
            needed = 4 * copies * self._heads * size**2 + 24 * width * size
            if needed > available:
                return f"more would need over {available / 2**30:.1f} GiB"
            return ""

        size, why = high, fits(high)
        while size > far and fits(size):
            size //= 2
        return size, why

    def _elements(self, sizes: Mapping[str, int]) -> list[int]:
        axes = [*self._signature.inputs.values()]
        for of_output in self._signature.outputs.values():
            try:
                [size_of(axis, sizes) for axis in of_output]
            except (KeyError, BadInputError):
                continue
            axes.append(of_output)
        return [int(np.prod([size_of(axis, sizes) for axis in each])) for each in axes]
