"""`ModuleRequest`: any module, with an example of its inputs and what is asked of their axes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from rope_export.artifacts.cache_layout import PADDINGS
from rope_export.errors import BadInputError
from rope_export.exporting.call import DTYPE_NAMES, Call, Flat
from rope_export.exporting.dynamic_shapes import DynamicShapes, LabelledCall, axes_asked
from rope_export.exporting.entries import Entries
from rope_export.exporting.labels import AxisRange
from rope_export.exporting.parts import check_parts
from rope_export.exporting.request import DEFAULT_LONGEST, Entry, checked_providers
from rope_export.exporting.signature import Signature, signature_of
from rope_export.exporting.tracing import NarrowedError
from rope_export.exporting.window_caches import windows_of
from rope_export.inspection import since
from rope_export.lowering import rules
from rope_export.lowering.choice import Choice
from rope_export.lowering.target import Target
from rope_export.rope.embedding import RotaryEmbedding

DrawInputs = Callable[[Mapping[str, int], np.random.Generator], Mapping[str, Any]]
"""From sizes of labels and a generator to arguments by name."""

_PRECISION = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


class ModuleRequest:
    """A module, an example of its inputs, and how it is exported.

    Args:
        labelled: the module, its example, and what is asked of their axes.
        inputs: draws inputs for the proof, or None.
        output_names: of outputs that are no cache, or None.
        target: one of `targets.TARGETS`.
        providers: providers the graph must be legal on.
        padding: the side on which prompts are padded.
        seed: of the inputs of the proof.
        onnxruntime: the oldest one the graph is to run in.
    """

    form: str | None = None

    def __init__(
        self,
        labelled: LabelledCall,
        inputs: DrawInputs | None,
        output_names: Sequence[str] | None,
        *,
        target: str,
        providers: tuple[str, ...],
        padding: str,
        seed: int,
        onnxruntime: str = since.NEWEST,
    ) -> None:
        self.labelled = labelled
        self.call = labelled.call
        self.longest = labelled.longest
        self.inputs = inputs
        self.output_names = None if output_names is None else list(output_names)
        self.target = target
        self.providers = providers
        self.padding = padding
        self.seed = seed
        self.onnxruntime = onnxruntime
        self.dtype = _compute_dtype(self.call)

    @property
    def module(self) -> nn.Module:
        """What is exported."""
        return self.call.module

    @property
    def graph_name(self) -> str:
        """What the graph is called."""
        return type(self.module).__name__

    @property
    def learned(self) -> Sequence[str]:
        """Names of weights that stay apart in the graph even where they are equal."""
        return [name for name, _ in self.module.named_parameters()]

    @classmethod
    def checked(
        cls,
        module: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        dynamic_shapes: DynamicShapes | None,
        inputs: DrawInputs | None,
        output_names: Sequence[str] | None,
        *,
        target: str,
        providers: Sequence[str],
        max_seq_len: int | None,
        padding: str,
        seed: int,
        onnxruntime: str = since.NEWEST,
    ) -> ModuleRequest:
        """Check a request against the module and its example.

        Raises:
            BadInputError: an argument is not acceptable.
        """
        module = _checked(module, inputs)
        chosen = checked_providers(target, providers)
        if padding not in PADDINGS:
            raise BadInputError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
        call = Call(module, args, kwargs)
        axes = axes_asked(call, {} if dynamic_shapes is None else dynamic_shapes)
        longest, why = _longest(module, axes, max_seq_len)
        if output_names is not None:
            _check_names(output_names)
        request = cls(
            LabelledCall(call, axes, longest=longest, asked_longest=max_seq_len, why_longest=why),
            inputs,
            output_names,
            target=target,
            providers=chosen,
            padding=padding,
            seed=seed,
            onnxruntime=onnxruntime,
        )
        if request.dtype == "bfloat16" and "cpu" in chosen:
            raise BadInputError(
                f"dtype bfloat16 is not possible for provider cpu: {rules.ANY_GRAPH[0].reason}"
            )
        return request

    def to_json(self) -> dict[str, Any]:
        """The request as ``config.json`` has it."""
        return {
            "target": self.target,
            "providers": list(self.providers),
            "longest": self.longest,
            "max_seq_len": self.labelled.asked_longest,
            "padding": self.padding,
            "seed": self.seed,
            "onnxruntime": self.onnxruntime,
            "output_names": self.output_names,
            "axes": {
                leaf.name: {
                    str(axis): [asked.label, asked.low, asked.high]
                    for axis, asked in of_leaf.items()
                }
                for leaf, of_leaf in zip(self.call.leaves, self.labelled.axes, strict=True)
            },
        }

    @classmethod
    def from_json(
        cls,
        content: dict[str, Any],
        module: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        inputs: DrawInputs | None,
    ) -> ModuleRequest:
        """Read a request back from ``config.json``, for a module and example as they were then.

        Raises:
            BadInputError: the example's tensors are others, or the module is none that a graph can
                be made of.
        """
        module = _checked(module, inputs)
        call = Call(module, args, kwargs)
        by_name = content["axes"]
        if list(by_name) != call.names:
            raise BadInputError(
                f"args must be those of the export, {', '.join(by_name)}, got "
                f"{', '.join(call.names)}"
            )
        axes = [
            {int(axis): AxisRange(*asked) for axis, asked in by_name[name].items()}
            for name in call.names
        ]
        for name, tensor, of_leaf in zip(call.names, call.tensors, axes, strict=True):
            if max(of_leaf, default=-1) >= tensor.ndim:
                raise BadInputError(
                    f"{name} must have more than {max(of_leaf)} axes, as at the export, got "
                    f"{list(tensor.shape)}"
                )
        return cls(
            LabelledCall(
                call,
                axes,
                longest=content["longest"],
                asked_longest=content.get("max_seq_len"),
            ),
            inputs,
            content["output_names"],
            target=content["target"],
            providers=tuple(content["providers"]),
            padding=content["padding"],
            seed=content["seed"],
            onnxruntime=content.get("onnxruntime", since.NEWEST),
        )

    def known(self) -> tuple[Signature, tuple[Choice, ...]] | None:
        """What is known before a trace: nothing."""
        return None

    def entries(self, served: Mapping[str, int]) -> Iterator[Entry]:
        """The module as a function from tensors to tensors, and the example.

        Args:
            served: the largest size of labels that the traces so far were found to end at.

        Raises:
            BadInputError: the module does not run on it, or at the sizes it is traced at.
        """
        return iter(Entries(self.labelled, self.output_names, served))

    def signature_of(
        self, program: torch.export.ExportedProgram, entry: Entry, target: Target
    ) -> Signature:
        """Read what the graph takes and gives from its trace.

        Raises:
            BadInputError: an axis came out fixed or narrower than asked for, or a cache of the
                window is not to be told from others.
        """
        flat = entry.module
        assert isinstance(flat, Flat)
        windows = windows_of(self.labelled, flat, target.windows)
        return signature_of(self.labelled, program, flat.outputs, target.lengths, windows)

    def narrowed(self, error: Exception) -> Exception:
        """What torch says of one of our flat tensors, in the caller's names."""
        if not isinstance(error, NarrowedError) or error.axis is None:
            return BadInputError(str(error))
        index, axis, size = error.axis
        name, label = self.call.names[index], self.labelled.axes[index][axis].label
        argument = self.call.leaves[index].argument
        by = "" if error.line is None else f", by {error.line}"
        return BadInputError(
            f"axis {axis} of {name} was to be dynamic ({label}) and {type(self.module).__name__} "
            f"works with size {size} only{by}: use a tensor's own size, such as "
            f"{argument}.shape[{axis}], instead of int(), == and numbers, reshapes and buffers of "
            "that size, or leave the axis fixed"
        )

    def describe(self, signature: Signature) -> dict[str, Any]:
        """The module and the request, as ``config.json`` has them."""
        call = self.call
        described = {
            "class": type(self.module).__name__,
            "parameters": sum(p.numel() for p in self.module.parameters()),
            "inputs": {name: [str(a) for a in axes] for name, axes in signature.inputs.items()},
            "outputs": {name: [str(a) for a in axes] for name, axes in signature.outputs.items()},
            "constants": {name: str(value) for name, value in call.constants.items()},
        }
        return {"module": described, "export": self.to_json()}


def _checked(module: Any, inputs: Any) -> nn.Module:
    """The module itself, out of what torch.compile wraps it in."""
    if not isinstance(module, nn.Module):
        raise BadInputError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    inner: nn.Module = getattr(module, "_orig_mod", module)
    if inputs is not None and not callable(inputs):
        raise BadInputError(
            f"inputs must be a function that draws inputs, got {type(inputs).__name__}"
        )
    check_parts(inner)
    return inner


def _compute_dtype(call: Call) -> str:
    """The narrowest floating dtype of weights, or of inputs where there are none."""
    of_weights = [p.dtype for p in call.module.parameters() if p.dtype in _PRECISION]
    of_inputs = [t.dtype for t in call.tensors if t.dtype in _PRECISION]
    found = of_weights or of_inputs or [torch.float32]
    return DTYPE_NAMES[min(found, key=lambda dtype: _PRECISION[dtype])]


def _longest(
    module: nn.Module, axes: Sequence[Mapping[int, AxisRange]], max_seq_len: int | None
) -> tuple[int, str]:
    """Longest sequence served, and what says so."""
    ropes = [part for part in module.modules() if isinstance(part, RotaryEmbedding)]
    tables = [rope.max_seq_len for rope in ropes if rope.max_seq_len is not None]
    asked = [each.high for of_leaf in axes for each in of_leaf.values() if each.high is not None]
    if max_seq_len is None:
        if tables:
            return min(tables), "the max_seq_len of the module's RotaryEmbedding"
        return max(asked, default=DEFAULT_LONGEST), "the largest maximum stated"
    if max_seq_len < 1:
        raise BadInputError(f"max_seq_len must be at least 1, got {max_seq_len}")
    served = min((rope.positions for rope in ropes), default=max_seq_len)
    if max_seq_len > served:
        raise BadInputError(
            f"max_seq_len must be at most the {served} positions of the module's RotaryEmbedding, "
            f"got {max_seq_len}"
        )
    return max_seq_len, "by max_seq_len"


def _check_names(output_names: Any) -> None:
    listed = isinstance(output_names, list | tuple)
    if not listed or not all(isinstance(name, str) and name for name in output_names):
        raise BadInputError(f"output_names must be a list of names, got {output_names!r}")
