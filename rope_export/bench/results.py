"""`Results`: what was measured, as JSON and as a table; no PyTorch needed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from typing import Any

BASE = "eager"
_UNITS = ("", "k", "M", "G", "T", "P")


@dataclass(frozen=True)
class Measurement:
    """One contender at one length.

    Attributes:
        phase: ``"prefill"``: a prompt of ``length`` tokens; ``"decode"``: the last of them, the
            others being in the cache.
        length: tokens.
        contender: its name.
        seconds: what every step took, in the order of the rounds.
        peak_extra_bytes: memory the first step took on top of what was loaded.
        rel_error: relative L2 error of the last tokens against float64 truth.
        allowed_error: what it is held to, of graphs of ours; None: the error is only shown.
        flops: floating-point operations of a step, by arithmetic.
        bytes: bytes that a step must at least read and write.
        failed: why it did not run, else None.
    """

    phase: str
    length: int
    contender: str
    seconds: tuple[float, ...] = ()
    peak_extra_bytes: int = 0
    rel_error: float | None = None
    allowed_error: float | None = None
    flops: int = 0
    bytes: int = 0
    failed: str | None = None

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def wrong(self) -> bool:
        """Whether its numbers are off by more than it is allowed."""
        if self.rel_error is None or self.allowed_error is None:
            return False
        return not self.rel_error <= self.allowed_error

    def ratio_to(self, other: Measurement) -> float:
        """How long it takes, as a multiple of another: the median over the rounds."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


@dataclass(frozen=True)
class Results:
    """Everything one run measured.

    Attributes:
        title: what was measured, in words.
        shape: the same as numbers.
        provider: where.
        dtype: of weights and activations.
        batch: rows.
        limits: what this machine reaches: ``matmul_flops`` and ``copy_bytes`` per second.
        measurements: one for each phase, length and contender.
        environment: machine and versions.
        date: of the run.
        command: that does it again.
    """

    title: str
    shape: dict[str, Any]
    provider: str
    dtype: str
    batch: int
    limits: dict[str, float]
    measurements: tuple[Measurement, ...]
    environment: dict[str, Any]
    date: str = field(default_factory=lambda: date.today().isoformat())
    command: str = ""

    @property
    def passed(self) -> bool:
        """Whether no graph of ours gave wrong numbers."""
        return not any(m.wrong for m in self.measurements)

    def cases(self) -> list[tuple[str, int]]:
        """Phases and lengths, in the order measured."""
        return list(dict.fromkeys((m.phase, m.length) for m in self.measurements))

    def of(self, phase: str, length: int) -> list[Measurement]:
        """Measurements at one phase and length."""
        return [m for m in self.measurements if (m.phase, m.length) == (phase, length)]

    def to_json(self) -> dict[str, Any]:
        """For ``json.dumps``."""
        return {"benchmark": "block", **asdict(self), "passed": self.passed}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Results:
        """Read it back."""
        known = {f.name for f in fields(cls)}
        values = {name: value for name, value in content.items() if name in known}
        made = [Measurement(**m | {"seconds": tuple(m["seconds"])}) for m in values["measurements"]]
        return cls(**values | {"measurements": tuple(made)})

    def table(self) -> list[str]:
        """Lines for people: one table for each phase and length."""
        lines: list[str] = []
        absent = self._absent()
        for phase, length in self.cases():
            lines += ["", f"{phase}, {length} tokens", _HEADS]
            lines += self._rows([m for m in self.of(phase, length) if m.contender not in absent])
        lines += [""] if absent else []
        lines += [f"{name:<24} {why}" for name, why in absent.items()]
        return lines[1:]

    def _absent(self) -> dict[str, str]:
        """Contenders that ran nowhere, and why, where that is the same everywhere."""
        reasons: dict[str, set[str | None]] = {}
        for m in self.measurements:
            reasons.setdefault(m.contender, set()).add(m.failed)
        return {n: why for n, (why, *more) in reasons.items() if why is not None and not more}

    def _rows(self, measured: Sequence[Measurement]) -> list[str]:
        base = next((m for m in measured if m.contender == BASE and m.seconds), None)
        lines = []
        for m in measured:
            if m.failed is not None:
                lines.append(f"{m.contender:<24} {m.failed}")
                continue
            ratio = "" if base is None or not m.seconds else f"{m.ratio_to(base):.2f}x"
            error = "" if m.rel_error is None else f"{m.rel_error:.1e}"
            if m.wrong:
                error += f" WRONG (allowed {m.allowed_error:.1e})"
            low, high = (f"{1e3 * edge(m.seconds):.4g}" for edge in (min, max))
            reach = self.reach(m)
            lines.append(
                f"{m.contender:<24} {1e3 * m.median:>9.4g} {f'{low} … {high}':>19} {ratio:>8} "
                f"{m.peak_extra_bytes / 2**20:>9.0f} {shown(m.flops / m.median, 'FLOP/s'):>13} "
                f"{reach:>10} {error:>9}"
            )
        return lines

    def reach(self, m: Measurement) -> str:
        """Which share of what this machine can do was reached: of its arithmetic or its memory."""
        if not self.limits or not m.seconds:
            return ""
        arithmetic = m.flops / m.median / self.limits["matmul_flops"]
        memory = m.bytes / m.median / self.limits["copy_bytes"]
        return f"{arithmetic:.0%} flop" if arithmetic >= memory else f"{memory:.0%} copy"


_HEADS = (
    f"{'':<24} {'median ms':>9} {'least … most':>19} {'of eager':>8} {'peak MiB':>9} {'':>13} "
    f"{'of limit':>10} {'error':>9}"
)


def shown(amount: float, unit: str) -> str:
    """A number with a decimal prefix."""
    power = 0
    while amount >= 1000 and power < len(_UNITS) - 1:
        amount, power = amount / 1000, power + 1
    return f"{amount:.3g} {_UNITS[power]}{unit}"
