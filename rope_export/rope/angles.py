"""`Angles`: from positions to cosines and sines, exactly, inside any graph.

Frequencies that never move are tabled: one table where the longest position is known, two that
are composed where it is not. Frequencies that are learned, or that follow the length of the
sequence, are multiplied by the positions in float64 and reduced to one turn before they are
rounded to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rope_export.rope.frequencies import Frequencies, cos_sin_table

# Without a longest length, positions are split as 4096 * coarse + fine, and the two exact
# rotations are composed. 8192 coarse rows reach 2^25 positions.
FINE_ROWS = 4096
COARSE_ROWS = 8192


def keeping_values(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What ``nn.Module._apply`` is given, so that it moves tensors but never casts or empties them.

    A tensor that leaves ``meta`` has no values to keep: its module rebuilds it.
    """

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if tensor.is_meta:
            return result.to(tensor.dtype)
        return tensor.to(result.device)

    return moved


class Angles(nn.Module):
    """Cosines and sines of positions.

    All state is non-persistent buffers that follow the module between devices and never change
    dtype. Nothing is mutated in a forward pass.

    Out of range there is no number: eager PyTorch raises, and in an exported graph, where nothing
    can raise on every runtime alike, the angles of such a position are NaN.

    Args:
        found: the frequencies.
        rows: positions served by one table, or None for ``FINE_ROWS * COARSE_ROWS`` by two.
        learned: whether `forward` will be given frequencies; nothing is tabled then.
        interpolate_factor: what frequencies given to `forward` are divided by.
        device: where the tables go.
    """

    cos: Tensor | None
    sin: Tensor | None
    coarse_cos: Tensor | None
    coarse_sin: Tensor | None
    inv_freq: Tensor | None
    exponents: Tensor | None
    growth: Tensor | None
    axis_of_pair: Tensor | None
    interpolation: Tensor
    tau: Tensor
    factor: Tensor
    nan: Tensor

    def __init__(
        self,
        found: Frequencies,
        rows: int | None,
        *,
        learned: bool = False,
        interpolate_factor: float = 1.0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.rows = rows
        self.learned = learned
        self.interpolate_factor = interpolate_factor
        tables = ("cos", "sin", "coarse_cos", "coarse_sin")
        others = ("inv_freq", "exponents", "growth", "axis_of_pair", "interpolation", "tau")
        for name in (*tables, *others, "factor", "nan"):
            self.register_buffer(name, None, persistent=False)
        self.rebuild(found, device or torch.get_default_device())

    def rebuild(self, found: Frequencies, device: torch.device) -> None:
        """Make every buffer anew on ``device``, for these frequencies."""
        reach = self.rows if self.rows is not None else math.inf
        self.scaled = found.attention_factor != 1.0
        # Within a table that never reaches the switch there is nothing to switch to.
        self.switch = found.beyond if found.beyond and found.beyond.length < reach else None
        self.stretch = found.stretch if found.stretch and found.stretch.length < reach else None
        # Tensors, because torch.onnx writes Python's floats as float32; of one axis, because
        # compilers take float64 of none for Python's floats, and compile twice.
        self.tau, self.interpolation = (
            torch.tensor([x], dtype=torch.float64, device=device)
            for x in (math.tau, self.interpolate_factor)
        )
        self.factor, self.nan = (
            torch.tensor(x, dtype=torch.float32, device=device)
            for x in (found.attention_factor, math.nan)
        )
        if found.axis_of_pair is not None:
            self.axis_of_pair = torch.tensor(found.axis_of_pair, device=device)
        if self.learned:
            return
        self.inv_freq = found.inv_freq.to(device)
        if self.stretch is not None:
            factor, length = self.stretch.factor, self.stretch.length
            terms = [float(length), factor / length, factor - 1]
            self.growth = torch.tensor(terms, dtype=torch.float64, device=device)
            pairs = len(found.inv_freq)
            steps = torch.arange(pairs, dtype=torch.float64, device="cpu")
            self.exponents = (-2 * steps / (2 * pairs - 2)).to(device)
            return
        # Both sets of frequencies lie side by side in a row: a lookup reads both, then chooses.
        sets = (found.inv_freq, self.switch.inv_freq) if self.switch else (found.inv_freq,)
        rates, factor = torch.cat(sets), found.attention_factor
        # The factor goes into one of two tables that are composed, so that it counts once.
        self.cos, self.sin = _table(rates, self.rows or FINE_ROWS, factor, device)
        if self.rows is None:
            coarse = _table(rates * FINE_ROWS, COARSE_ROWS, 1.0, device)
            self.coarse_cos, self.coarse_sin = coarse

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Angles:
        return super()._apply(keeping_values(fn), recurse)  # type: ignore[no-untyped-call,no-any-return]

    @property
    def tabled(self) -> bool:
        """Whether the angles of all positions are one table indexed by position."""
        return self.cos is not None and self.coarse_cos is None and self.switch is None

    @property
    def positions(self) -> int:
        """How many positions there are angles for: ``0 … positions - 1``."""
        return self.rows if self.rows is not None else FINE_ROWS * COARSE_ROWS

    def forward(
        self,
        positions: Tensor,
        learned: Tensor | None = None,
        *,
        axes_lead: bool = False,
        limit: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions.

        Args:
            positions: integers ``[..., S]``, or ``[A, ..., S]`` with ``axes_lead``.
            learned: ``[r / 2]`` frequencies, for a module made with ``learned``.
            axes_lead: whether every token has one position for each axis.
            limit: positions served, if not all there are angles for.

        Returns:
            twice ``[..., S, r / 2]`` float32.

        Raises:
            IndexError: a position is out of range (eager on the CPU; elsewhere tables assert, and
                where there is none, or in an exported graph, the result is NaN).
        """
        # A lookup outside the tables stops by itself where it can.
        covered = self.cos is not None and limit is None
        served = None
        if torch.compiler.is_exporting() or not covered:
            served = (positions >= 0) & (positions < (limit or self.positions))
            if positions.device.type == "cpu" and _known_to_fail(served):
                raise IndexError("a position is out of range")
            positions = torch.where(served, positions, torch.zeros_like(positions))
        if self.learned or self.stretch is not None:
            cos, sin = self._computed(positions, learned)
        else:
            cos, sin = self._looked_up(positions)
        if served is not None:  # a rotation by NaN is NaN in both channels of the pair
            cos = torch.where(served.unsqueeze(-1), cos, self.nan)
        if not axes_lead:
            return cos, sin
        assert self.axis_of_pair is not None
        return _of_their_axis(cos, self.axis_of_pair), _of_their_axis(sin, self.axis_of_pair)

    def _looked_up(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        assert self.cos is not None  # not so only where they are computed
        assert self.sin is not None
        if self.coarse_cos is None or self.coarse_sin is None:
            cos, sin = F.embedding(positions, self.cos), F.embedding(positions, self.sin)
        else:
            coarse = positions // FINE_ROWS
            fine = positions - coarse * FINE_ROWS
            cos_a, sin_a = (
                F.embedding(coarse, self.coarse_cos),
                F.embedding(coarse, self.coarse_sin),
            )
            cos_b, sin_b = F.embedding(fine, self.cos), F.embedding(fine, self.sin)
            cos, sin = cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b
        if self.switch is not None:  # arithmetic on the largest position of the whole batch
            longer = positions.max() >= self.switch.length
            (cos, long_cos), (sin, long_sin) = cos.chunk(2, dim=-1), sin.chunk(2, dim=-1)
            cos, sin = torch.where(longer, long_cos, cos), torch.where(longer, long_sin, sin)
        return cos, sin

    def _computed(self, positions: Tensor, learned: Tensor | None) -> tuple[Tensor, Tensor]:
        """Angles multiplied out in float64, in a form ONNX has.

        Few runtimes have a float64 cosine, so whole turns are taken off in float64 first.
        """
        if learned is not None:
            inv_freq = learned.to(torch.float64) / self.interpolation
        else:
            assert self.inv_freq is not None
            inv_freq = self.inv_freq * self._slowdown(positions)
        angles = positions.unsqueeze(-1) * inv_freq
        reduced = (angles - torch.round(angles / self.tau) * self.tau).to(torch.float32)
        cos, sin = reduced.cos(), reduced.sin()
        return (cos * self.factor, sin * self.factor) if self.scaled else (cos, sin)

    def _slowdown(self, positions: Tensor) -> Tensor:
        """By how much each frequency is multiplied, ``[r / 2]``: 1 up to the trained length.

        The base grows to ``base * growth ** (dim / (dim - 2))``, so ``base ** (-2i / dim)`` is
        multiplied by ``growth ** (-2i / (dim - 2))``.
        """
        assert self.growth is not None
        assert self.exponents is not None
        trained, rate, shift = self.growth.unbind()
        longest = torch.maximum((positions.max() + 1).to(torch.float64), trained)
        return torch.exp((longest * rate - shift).log() * self.exponents)


def _known_to_fail(served: Tensor) -> bool:
    """Whether some position is not served, as far as that can be read here."""
    if torch.compiler.is_compiling():
        return False
    try:
        return not bool(served.all())
    except RuntimeError:  # a fake tensor, or one mapped over
        return False


def _of_their_axis(of_axes: Tensor, axis_of_pair: Tensor) -> Tensor:
    """``[A, ..., r / 2]`` to ``[..., r / 2]``: every pair by its own axis."""
    chosen = of_axes[0]
    for axis in range(1, of_axes.shape[0]):
        chosen = torch.where(axis_of_pair == axis, of_axes[axis], chosen)
    return chosen


def _table(rates: Tensor, rows: int, factor: float, device: torch.device) -> tuple[Tensor, Tensor]:
    if device.type == "meta":  # shapes only; the values come with a real device
        shape = (rows, len(rates))
        return torch.empty(shape, device=device), torch.empty(shape, device=device)
    cos, sin = cos_sin_table(rates, rows, factor)
    return cos.to(device), sin.to(device)
