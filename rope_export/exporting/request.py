"""`Request`: what is exported, checked once, by which inputs it is traced, and what it is to serve.

There are two: `block` knows what an `Attention` takes and gives, `module` reads it from an example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from rope_export.artifacts.targets import PROVIDERS, TARGETS
from rope_export.errors import BadInputError
from rope_export.exporting.signature import Signature
from rope_export.lowering.choice import Choice
from rope_export.lowering.target import Target

DEFAULT_LONGEST = 4096


@dataclass(frozen=True)
class Entry:
    """How a trace begins.

    Attributes:
        module: what is called.
        args: with which tensors.
        kwargs: and which by name.
        dynamic_shapes: what the tracer is told of their axes.
        prefix: in front of the names of weights, where the module was wrapped.
        note: what was done to the module before, in plain words, or None.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dynamic_shapes: Any
    prefix: str = ""
    note: str | None = None


class Request(Protocol):
    """What the road from `export` to a proven graph needs to know of its subject."""

    @property
    def module(self) -> nn.Module:
        """What is exported."""
        ...

    @property
    def target(self) -> str:
        """One of `targets.TARGETS`."""
        ...

    @property
    def providers(self) -> tuple[str, ...]:
        """Providers the graph must be legal on."""
        ...

    @property
    def dtype(self) -> str:
        """Of weights and activations."""
        ...

    @property
    def longest(self) -> int:
        """Longest sequence served."""
        ...

    @property
    def padding(self) -> str:
        """The side on which prompts are padded."""
        ...

    @property
    def form(self) -> str | None:
        """Name of the form every attention takes, or None: the best."""
        ...

    @property
    def onnxruntime(self) -> str:
        """The oldest onnxruntime the graph is to run in."""
        ...

    @property
    def seed(self) -> int:
        """Of the inputs of the proof."""
        ...

    @property
    def graph_name(self) -> str:
        """What the graph is called."""
        ...

    @property
    def learned(self) -> Sequence[str]:
        """Names of weights that stay apart in the graph even where they are equal."""
        ...

    def known(self) -> tuple[Signature, tuple[Choice, ...]] | None:
        """What the graph takes and gives and how it attends, where that needs no trace."""
        ...

    def entries(self, served: Mapping[str, int]) -> Iterator[Entry]:
        """How it is called to be traced, and how else where that serves less than was asked.

        Args:
            served: the largest size of labels that the traces so far were found to end at.

        Raises:
            BadInputError: the module does not run on its example.
        """
        ...

    def signature_of(
        self, program: torch.export.ExportedProgram, entry: Entry, target: Target
    ) -> Signature:
        """What a trace takes and gives, its axes checked.

        Args:
            program: traced from ``entry``.
            entry: how.
            target: has noted what attentions and rotations were given.
        """
        ...

    def narrowed(self, error: Exception) -> Exception:
        """What is raised where the tracer narrows an axis."""
        ...

    def describe(self, signature: Signature) -> dict[str, Any]:
        """What was exported and how, as ``config.json`` has it."""
        ...


def checked_providers(target: str, providers: Sequence[str]) -> tuple[str, ...]:
    """Providers, each once, of a target that exists.

    Raises:
        BadInputError: the target or a provider is unknown, or there is none.
    """
    if target not in TARGETS:
        raise BadInputError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    chosen = tuple(dict.fromkeys([providers] if isinstance(providers, str) else providers))
    unknown = [p for p in chosen if p not in PROVIDERS]
    if unknown or not chosen:
        got = repr(unknown[0]) if unknown else "none"
        raise BadInputError(f"providers must be some of {', '.join(PROVIDERS)}, got {got}")
    return chosen
