"""Any module as the subject of an export: traced from an example, proven away from it."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from rope_export import graph
from rope_export.errors import BadInputError, ExportError
from rope_export.lowering import rules
from rope_export.lowering.target import Target
from rope_export.runtime.layout import MASK
from rope_export.subjects.base import Built, rotation_name
from rope_export.subjects.call import Flat
from rope_export.subjects.labels import size_of
from rope_export.subjects.module_cases import Cases, run_eagerly
from rope_export.subjects.request import ModuleRequest
from rope_export.subjects.signature import Signature, signature_of
from rope_export.tracing import convert, trace
from rope_export.trial import Progress, Trial

_LEAST_TRACED = 2


class ModuleSubject:
    """A module exported from an example of its inputs.

    Args:
        request: the module, its example, and how.
    """

    def __init__(self, request: ModuleRequest) -> None:
        self.module = request.module
        self.target = request.target
        self.dtype = request.dtype
        self.providers = request.providers
        self._request = request
        self._traced: tuple[torch.export.ExportedProgram, Target, Signature] | None = None
        self._cases: Cases | None = None

    def build(self) -> Built:
        """Trace, check the axes, lower and tidy."""
        request = self._request
        program, target, signature = self._trace()
        model = convert(program, request.target)
        prefix = "module."
        graph.tidy(
            model,
            signature.inputs,
            signature.outputs,
            name=type(self.module).__name__,
            parameters={f"{prefix}{name}" for name, _ in self.module.named_parameters()},
            prefix=prefix,
        )
        choices = target.choices
        forms = list(dict.fromkeys(choice.form for choice in choices))
        operators = graph.operators(model)
        rotations = list(dict.fromkeys(rotation_name(choice) for choice in choices))
        if not rotations and "RotaryEmbedding" in operators:
            rotations = ["RotaryEmbedding"]
        passed_over = [reason for choice in choices for reason in choice.reasons]
        if request.target == "ort" and not choices and "Attention" in operators:
            passed_over.append(
                "F.scaled_dot_product_attention of the module's own becomes Attention, whose "
                "memory is quadratic in the length on the CPU; rope_export.Attention in its place "
                "lowers to fused operators"
            )
        facts = {
            "attention": ", ".join(form.attention.removeprefix("::") for form in forms)
            or ("Attention" if "Attention" in operators else "the module's own"),
            "rotation": ", ".join(rotations) or "the module's own",
            "passed_over": list(dict.fromkeys(passed_over)),
            "branches": list(dict.fromkeys(b for choice in choices for b in choice.branches)),
            "tokens": signature.tokens,
            "padding_mask": MASK if signature.masked else None,
            "packs_rows": self.cases.packs_rows,
            "cache": None if self.cases.layout is None else self.cases.layout_json(),
            "outputs": signature.kinds,
            "ranges": {label: list(range_) for label, range_ in signature.free.items()},
        }
        return Built(model, facts)

    @property
    def cases(self) -> Cases:
        """What the proof runs."""
        if self._cases is None:
            _, target, signature = self._trace()
            self._cases = Cases(self._request, signature, target.choices)
        return self._cases

    def _trace(self) -> tuple[torch.export.ExportedProgram, Target, Signature]:
        if self._traced is not None:
            return self._traced
        request = self._request
        if self.dtype == "bfloat16" and "cpu" in request.providers:
            raise BadInputError(
                f"dtype bfloat16 is not possible for provider cpu: {rules.ANY_GRAPH[0].reason}"
            )
        call = request.call
        run_eagerly(request, call.tensors, "the example inputs")
        tensors = self._tensors_to_trace()
        target = Target(request.target, request.providers, request.longest, request.padding)
        flat = Flat(call, request.output_names)
        flat.eval()
        shapes = tuple(
            {axis: _dim(asked.low, asked.high) for axis, asked in of_leaf.items()}
            for of_leaf in request.axes
        )
        try:
            program = trace(flat, tuple(tensors), {}, {"tensors": shapes}, target)
        except ExportError as error:
            raise BadInputError(self._narrowed(str(error))) from error
        signature = signature_of(request, program, flat.outputs, target.lengths)
        self._traced = program, target, signature
        return self._traced

    def _tensors_to_trace(self) -> list[Tensor]:
        """The example, but for axes of 0 or 1, which would be taken for broadcasting."""
        request = self._request
        example = request.sizes
        sizes = dict(example)
        for label, size in sizes.items():
            lows = [a.low for _, _, a in request.asked() if a.label == label and a.low is not None]
            sizes[label] = max([size, _LEAST_TRACED, *lows])
        for total, parts in _sums_by_name(example).items():
            sizes[total] = sum(sizes[part] for part in parts)
        if sizes == example:
            # Copies: a tensor that is given twice, or is a weight, would be traced as one.
            return [tensor.detach().clone() for tensor in request.call.tensors]
        shapes = [
            [
                size_of(of_leaf[axis].label, sizes) if axis in of_leaf else size
                for axis, size in enumerate(tensor.shape)
            ]
            for tensor, of_leaf in zip(request.call.tensors, request.axes, strict=True)
        ]
        tensors = [
            _resized(tensor, shape)
            for tensor, shape in zip(request.call.tensors, shapes, strict=True)
        ]
        changed = ", ".join(
            f"{label} {sizes[label]}" for label in sizes if sizes[label] != example[label]
        )
        run_eagerly(
            request,
            tensors,
            f"sizes it is traced at ({changed}, since a graph traced at 0 or 1 would broadcast); "
            "give an example with sizes of 2 and more, and label sums as sums",
        )
        return tensors

    def _narrowed(self, message: str) -> str:
        """What torch says of one of our flat tensors, in the caller's names."""
        found = re.search(r"\[(\d+)\]\.size\(\)\[(\d+)\].*constant \((\d+)\)", message)
        if found is None:
            return message
        index, axis, size = (int(part) for part in found.groups())
        name, label = self._request.call.names[index], self._request.axes[index][axis].label
        return (
            f"axis {axis} of {name} was to be dynamic ({label}) and {type(self.module).__name__} "
            f"works with size {size} only: look for numbers that stand for it, such as a reshape, "
            "an expand or a buffer of that size, or leave the axis fixed"
        )

    def runs_on(self) -> dict[str, str | None]:
        """For every provider, why it lacks the graph's operators, or None."""
        _, target, _ = self._trace()
        verdicts = dict(target.lacks)
        if self.dtype == "bfloat16":
            verdicts["cpu"] = verdicts.get("cpu") or rules.ANY_GRAPH[0].reason
        return {provider: verdicts.get(provider) for provider in rules.PROVIDERS}

    def trials(self, progress: Progress) -> tuple[list[Trial], list[str]]:
        """Cases, and what they leave out, in plain words."""
        return self.cases.trials(progress)

    def describe(self) -> dict[str, Any]:
        """The module and the request, as ``config.json`` has them."""
        _, _, signature = self._trace()
        call = self._request.call
        described = {
            "class": type(self.module).__name__,
            "parameters": sum(p.numel() for p in self.module.parameters()),
            "inputs": {name: [str(a) for a in axes] for name, axes in signature.inputs.items()},
            "outputs": {name: [str(a) for a in axes] for name, axes in signature.outputs.items()},
            "constants": {name: str(value) for name, value in call.constants.items()},
        }
        return {"module": described, "export": self._request.to_json()}

    def sensitivity(self) -> dict[str, float]:
        """What typical defects would have shown."""
        return self.cases.sensitivity()


def _dim(low: int | None, high: int | None) -> Any:
    bounds = {}
    if low is not None and low > _LEAST_TRACED:
        bounds["min"] = low
    if high is not None:
        bounds["max"] = high
    return torch.export.Dim.DYNAMIC(**bounds) if bounds else torch.export.Dim.DYNAMIC


def _sums_by_name(sizes: dict[str, int]) -> dict[str, tuple[str, str]]:
    """Labels that are sums by their names: ``total_x`` of ``past_x`` and ``x``."""
    found = {}
    for label, size in sizes.items():
        stem = label.removeprefix("total_")
        parts = f"past_{stem}", stem
        known = stem != label and all(part in sizes for part in parts)
        if known and size == sum(sizes[part] for part in parts):
            found[label] = parts
    return found


def _resized(tensor: Tensor, shape: list[int]) -> Tensor:
    """A tensor of another shape with the values of ``tensor``, repeated; zeros if it has none."""
    if list(tensor.shape) == shape:
        return tensor.detach().clone()
    if not tensor.numel():
        return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    for axis, size in enumerate(shape):
        index = torch.arange(size, device=tensor.device) % tensor.shape[axis]
        tensor = tensor.index_select(axis, index)
    return tensor
