"""What `export` and `validate` need to know of a thing that is exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from rope_export.lowering import rules
from rope_export.trial import Progress, Trial

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Built:
    """A graph, and what was decided on the way.

    Attributes:
        model: tidy, ready to be saved.
        facts: forms chosen and why, how the cache is kept, and which outputs belong to tokens.
    """

    model: ir.Model
    facts: dict[str, Any]


class Subject(Protocol):
    """A module, and everything that is particular to exporting and proving it.

    Attributes:
        module: what is exported.
        target: one of `rules.TARGETS`.
        dtype: of weights and activations.
        providers: providers the graph must be legal on.
    """

    target: str
    dtype: str
    providers: tuple[str, ...]

    @property
    def module(self) -> nn.Module:
        """What is exported."""
        ...

    def build(self) -> Built:
        """Trace, check the axes, lower and tidy.

        Raises:
            ExportError: an axis that was to be dynamic came out fixed or with a narrower range.
            BadInputError: the module cannot be traced.
        """
        ...

    def runs_on(self) -> dict[str, str | None]:
        """For every provider, why it lacks the graph's operators, or None; after `build`."""
        ...

    def trials(self, progress: Progress) -> tuple[list[Trial], list[str]]:
        """Choose shapes this machine can run, draw inputs, evaluate truth and eager; after `build`.

        Returns:
            the trials, and what they leave out, in plain words.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What was exported and how, as ``config.json`` has it."""
        ...

    def sensitivity(self) -> dict[str, float]:
        """Relative change of the truth under typical defects: what the proof would have seen."""
        ...


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put every part of ``module`` in evaluation mode, and back into its own afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def rotation_name(choice: rules.Choice) -> str:
    """Where the rotation happens, as the report has it."""
    if choice.form.rotation is None:
        return f"inside {choice.form.attention}"
    return choice.form.rotation.removeprefix("::")
