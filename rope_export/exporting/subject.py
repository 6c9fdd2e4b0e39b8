"""`Subject`: one export on its way from what was asked to a graph; the same road for everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from rope_export.artifacts.cache_layout import MASK, CacheLayout
from rope_export.artifacts.targets import IR_VERSIONS, PROVIDERS
from rope_export.errors import ExportError, RopeExportError
from rope_export.exporting import graph
from rope_export.exporting.request import Entry, Request
from rope_export.exporting.signature import Signature
from rope_export.exporting.tracing import convert, trace
from rope_export.lowering import rules
from rope_export.lowering.choice import Choice
from rope_export.lowering.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Traced:
    """A traced program, and what was recorded on the way.

    Attributes:
        program: in PyTorch's operators and the target's own.
        signature: what it takes and gives.
        target: has the forms chosen.
        prefix: in front of the names of weights.
        note: what was done to the module before, in plain words, or None.
    """

    program: torch.export.ExportedProgram
    signature: Signature
    target: Target
    prefix: str
    note: str | None


@dataclass(frozen=True)
class Interface:
    """How a graph is used.

    Attributes:
        signature: what it takes and gives.
        choices: the forms its attentions took.
        layout: how a `Decoder` drives it, or None.
        packs_rows: whether caches that go out have each row's tokens from the first slot on.
        notes: what that rules out, in plain words.
    """

    signature: Signature
    choices: tuple[Choice, ...]
    layout: CacheLayout | None
    packs_rows: bool
    notes: tuple[str, ...]


class Subject:
    """What is exported, asked once and traced at most once.

    Args:
        request: what was asked.
    """

    def __init__(self, request: Request) -> None:
        self.request = request

    @cached_property
    def traced(self) -> Traced:
        """Trace, and check the axes.

        Raises:
            ExportError: an axis that was to be dynamic came out fixed or with a narrower range.
            BadInputError: the module cannot be traced.
        """
        first: RopeExportError | None = None
        fallback: Traced | None = None
        served: dict[str, int] = {}
        for entry in self.request.entries(served):
            try:
                traced = self._traced(entry)
            except RopeExportError as error:
                first = first or error
                continue
            if not traced.signature.limits:
                return traced
            free = traced.signature.free
            served |= {label: free[label][1] or 0 for label in traced.signature.limits}
            if fallback is None or _serves_more(traced.signature, fallback.signature):
                fallback = traced
        if fallback is None:
            assert first is not None
            raise first
        return fallback

    def _traced(self, entry: Entry) -> Traced:
        request = self.request
        target = Target(
            request.target,
            request.providers,
            request.longest,
            request.padding,
            request.form,
            request.onnxruntime,
        )
        try:
            program = trace(
                entry.module,
                entry.args,
                entry.kwargs,
                entry.dynamic_shapes,
                target,
                prefix=entry.prefix,
            )
        except ExportError as error:
            raise request.narrowed(error) from error
        signature = request.signature_of(program, entry, target)
        return Traced(program, signature, target, entry.prefix, entry.note)

    @cached_property
    def interface(self) -> Interface:
        """How the graph is used: known beforehand, or read from its trace."""
        known, note = self.request.known(), None
        if known is None:
            known = self.traced.signature, tuple(self.traced.target.choices)
            note = self.traced.note
        return _interface(self.request, *known, note)

    def graph(self) -> ir.Model:
        """The traced program in ONNX, tidy."""
        request, signature, prefix = self.request, self.traced.signature, self.traced.prefix
        model = convert(self.traced.program, self.traced.target)
        graph.tidy(
            model,
            signature.inputs,
            signature.outputs,
            name=request.graph_name,
            parameters={f"{prefix}{name}" for name in request.learned},
            prefix=prefix,
        )
        model.ir_version = IR_VERSIONS[request.target]
        return model

    def runs_on(self) -> dict[str, str | None]:
        """For every provider, why it lacks the graph's operators, or None."""
        verdicts = dict(self.traced.target.lacks)
        if self.request.dtype == "bfloat16":
            verdicts.setdefault("cpu", rules.ANY_GRAPH[0].reason)
        return {provider: verdicts.get(provider) for provider in PROVIDERS}

    def facts(self, model: ir.Model) -> dict[str, Any]:
        """What the report says of the graph: forms chosen and why, its cache, its outputs."""
        interface = self.interface
        signature, choices = interface.signature, interface.choices
        operators = graph.operators(model)
        forms = list(dict.fromkeys(choice.form for choice in choices))
        rotations = list(dict.fromkeys(_rotation(choice) for choice in choices))
        if not rotations and "RotaryEmbedding" in operators:
            rotations = ["RotaryEmbedding"]
        passed_over = [reason for choice in choices for reason in choice.reasons]
        if self.request.target == "ort" and not choices and "Attention" in operators:
            passed_over.append(
                "F.scaled_dot_product_attention of the module's own becomes Attention, whose "
                "memory is quadratic in the length on the CPU; rope_export.Attention in its place "
                "lowers to fused operators"
            )
        return {
            "attention": ", ".join(form.attention.removeprefix("::") for form in forms)
            or ("Attention" if "Attention" in operators else "the module's own"),
            "rotation": ", ".join(rotations) or "the module's own",
            "passed_over": list(dict.fromkeys(passed_over)),
            "branches": list(dict.fromkeys(b for choice in choices for b in choice.branches)),
            "tokens": signature.tokens,
            "padding_mask": MASK if signature.masked else None,
            "packs_rows": interface.packs_rows,
            "cache": None if interface.layout is None else asdict(interface.layout),
            "outputs": signature.kinds,
            **({"windows": windowed} if (windowed := signature.windowed()) else {}),
            "ranges": {label: list(range_) for label, range_ in signature.free.items()},
        }

    def describe(self) -> dict[str, Any]:
        """What was exported and how, as ``config.json`` has it."""
        return self.request.describe(self.interface.signature)


def _serves_more(one: Signature, other: Signature) -> bool:
    """Whether a signature has larger sizes where another ends and nobody asked it to."""
    ends = [(one.free.get(label, (0, 0))[1], other.free[label][1]) for label in other.limits]
    return all(high is None or high > (end or 0) for high, end in ends)


def _interface(
    request: Request, signature: Signature, choices: Sequence[Choice], note: str | None
) -> Interface:
    # An attention without a cache has no say in what caches look like, where others have one.
    cached = [choice for choice in choices if choice.cached] or choices
    caching = [choice for choice in cached if choice.form.packs_rows]
    mixed = 0 < len(caching) < len(cached)
    packs_rows = bool(caching) and not mixed
    notes = [limit for choice in choices for limit in choice.limits]
    notes += [] if note is None else [note]
    if mixed and signature.layers:
        notes.append(
            "layers keep their caches in different orders: a Decoder serves rows of one length only"
        )
    layout = signature.layout(
        capacity=request.longest,
        packs_rows=packs_rows,
        by_rows=not caching or all(choice.by_rows for choice in caching),
        padding=request.padding,
        ragged=not mixed and not any(choice.one_length for choice in choices),
    )
    if packs_rows and signature.reads_past and layout is not None:
        notes.append(
            "the module computes with the length of its past (a shape of past_key_values): the "
            "cache grows with each step instead of staying in one buffer, and a Decoder serves "
            "rows of one length only; take positions from attention_mask to change that"
        )
    notes += signature.limits.values()
    return Interface(signature, tuple(choices), layout, packs_rows, tuple(dict.fromkeys(notes)))


def _rotation(choice: Choice) -> str:
    """Where the rotation happens."""
    if choice.form.rotation is None:
        return f"inside {choice.form.attention}"
    return choice.form.rotation.removeprefix("::")
