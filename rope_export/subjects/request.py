"""`ModuleRequest`: what `export` was asked to do with a module, checked once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from rope_export.attention import Attention
from rope_export.errors import BadInputError
from rope_export.lowering import rules
from rope_export.plan import PADDINGS, checked_providers, refuse_what_weights_do_not_say
from rope_export.rotary import RotaryEmbedding
from rope_export.subjects.call import DTYPES, Call
from rope_export.subjects.labels import AxisRange, is_name, names_in, size_of

DynamicShapes = Mapping[str, Any] | Sequence[Any]
"""Which axes vary, by argument."""
DrawInputs = Callable[[Mapping[str, int], np.random.Generator], Mapping[str, Any]]
"""From sizes of labels and a generator to arguments by name."""

_DEFAULT_LONGEST = 4096
_PRECISION = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


class ModuleRequest:
    """A module, an example of its inputs, and how it is exported.

    Args:
        call: the module and its example.
        axes: for each tensor that goes in, what is asked of its dynamic axes.
        inputs: draws inputs for the proof, or None.
        output_names: of outputs that are no cache, or None.
        target: one of `rules.TARGETS`.
        providers: providers the graph must be legal on.
        longest: longest sequence served.
        padding: the side on which prompts are padded.
        seed: of the inputs of the proof.
    """

    def __init__(
        self,
        call: Call,
        axes: Sequence[Mapping[int, AxisRange]],
        inputs: DrawInputs | None,
        output_names: Sequence[str] | None,
        *,
        target: str,
        providers: tuple[str, ...],
        longest: int,
        padding: str,
        seed: int,
    ) -> None:
        self.call = call
        self.axes = [dict(of_leaf) for of_leaf in axes]
        self.sizes = _sizes_of(call, axes)
        self.inputs = inputs
        self.output_names = None if output_names is None else list(output_names)
        self.target = target
        self.providers = providers
        self.longest = longest
        self.padding = padding
        self.seed = seed
        self.dtype = _compute_dtype(call)

    @property
    def module(self) -> nn.Module:
        """What is exported."""
        return self.call.module

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
    ) -> ModuleRequest:
        """Check a request against the module and its example.

        Raises:
            BadInputError: an argument is not acceptable.
        """
        if not isinstance(module, nn.Module):
            raise BadInputError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
        chosen = checked_providers(target, providers)
        if padding not in PADDINGS:
            raise BadInputError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
        _check_parts(module)
        call = Call(module, args, kwargs)
        axes = _asked(call, {} if dynamic_shapes is None else dynamic_shapes)
        longest = _longest(module, axes, max_seq_len)
        if inputs is not None and not callable(inputs):
            raise BadInputError(
                f"inputs must be a function that draws inputs, got {type(inputs).__name__}"
            )
        if output_names is not None:
            _check_names(output_names)
        return cls(
            call,
            axes,
            inputs,
            output_names,
            target=target,
            providers=chosen,
            longest=longest,
            padding=padding,
            seed=seed,
        )

    def to_json(self) -> dict[str, Any]:
        """The request as ``config.json`` has it."""
        return {
            "target": self.target,
            "providers": list(self.providers),
            "longest": self.longest,
            "padding": self.padding,
            "seed": self.seed,
            "output_names": self.output_names,
            "axes": {
                leaf.name: {
                    str(axis): [asked.label, asked.low, asked.high]
                    for axis, asked in of_leaf.items()
                }
                for leaf, of_leaf in zip(self.call.leaves, self.axes, strict=True)
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
            BadInputError: the example's tensors are others.
        """
        module = getattr(module, "_orig_mod", module)
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
            call,
            axes,
            inputs,
            content["output_names"],
            target=content["target"],
            providers=tuple(content["providers"]),
            longest=content["longest"],
            padding=content["padding"],
            seed=content["seed"],
        )

    def asked(self) -> Iterator[tuple[str, int, AxisRange]]:
        """Every dynamic axis: the input's name, the axis, and what is asked of it."""
        for leaf, of_leaf in zip(self.call.leaves, self.axes, strict=True):
            for axis, asked in of_leaf.items():
                yield leaf.name, axis, asked


def _check_parts(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, Attention):
            refuse_what_weights_do_not_say(part, name)
    if any(p.is_meta for p in module.parameters()):
        raise BadInputError("weights must be there, got a module on the meta device")
    wrong = {
        str(p.dtype).removeprefix("torch.")
        for p in module.parameters()
        if p.is_floating_point() and p.dtype not in _PRECISION
    }
    if wrong:
        raise BadInputError(
            f"weights must be one of {', '.join(rules.DTYPES)}, got {', '.join(sorted(wrong))}"
        )


def _compute_dtype(call: Call) -> str:
    """The narrowest floating dtype of weights, or of inputs where there are none."""
    of_weights = [p.dtype for p in call.module.parameters() if p.dtype in _PRECISION]
    of_inputs = [t.dtype for t in call.tensors if t.dtype in _PRECISION]
    found = of_weights or of_inputs or [torch.float32]
    return DTYPES[min(found, key=lambda dtype: _PRECISION[dtype])]


def _longest(
    module: nn.Module, axes: Sequence[Mapping[int, AxisRange]], max_seq_len: int | None
) -> int:
    ropes = [part for part in module.modules() if isinstance(part, RotaryEmbedding)]
    tables = [rope.max_seq_len for rope in ropes if rope.max_seq_len is not None]
    asked = [each.high for of_leaf in axes for each in of_leaf.values() if each.high is not None]
    if max_seq_len is None:
        return min(tables) if tables else max(asked, default=_DEFAULT_LONGEST)
    if max_seq_len < 1:
        raise BadInputError(f"max_seq_len must be at least 1, got {max_seq_len}")
    served = min((rope.positions for rope in ropes), default=max_seq_len)
    if max_seq_len > served:
        raise BadInputError(
            f"max_seq_len must be at most the {served} positions of the module's RotaryEmbedding, "
            f"got {max_seq_len}"
        )
    return max_seq_len


def _asked(call: Call, dynamic_shapes: DynamicShapes) -> list[dict[int, AxisRange]]:
    """What is asked of each tensor's axes."""
    axes: list[dict[int, AxisRange]] = [{} for _ in call.leaves]
    arguments = list(call.arguments)
    if not isinstance(dynamic_shapes, Mapping):
        if not isinstance(dynamic_shapes, list | tuple):
            raise BadInputError(
                "dynamic_shapes must be a mapping from inputs to axes, got "
                f"{type(dynamic_shapes).__name__}"
            )
        if len(dynamic_shapes) > len(arguments):
            raise BadInputError(
                f"dynamic_shapes must have one entry for each of {', '.join(arguments)}, got "
                f"{len(dynamic_shapes)}"
            )
        dynamic_shapes = dict(zip(arguments, dynamic_shapes, strict=False))
    by_name = {leaf.name: index for index, leaf in enumerate(call.leaves)}
    for name, spec in dynamic_shapes.items():
        if name in call.arguments:
            indices = [i for i, leaf in enumerate(call.leaves) if leaf.argument == name]
            found = list(_over(spec, call.arguments[name], name))
        elif name in by_name:
            indices, found = [by_name[name]], [spec]
        else:
            known = list(dict.fromkeys([*arguments, *by_name]))
            raise BadInputError(
                f"dynamic_shapes must name inputs of {type(call.module).__name__} "
                f"({', '.join(known)}), got {name!r}"
            )
        for index, of_leaf in zip(indices, found, strict=True):
            axes[index] |= _of_tensor(of_leaf, call.tensors[index], call.leaves[index].name)
    return axes


def _over(spec: Any, value: Any, name: str) -> Iterator[Any]:
    """The part of a specification that is each tensor's, in the order of the flattened value."""
    if isinstance(value, torch.Tensor):
        yield spec
        return
    if not isinstance(value, Mapping | list | tuple):
        return
    nested = isinstance(spec, Mapping) and any(
        isinstance(part, Mapping | list | tuple) for part in spec.values()
    )
    of_axes = isinstance(spec, Mapping) and all(isinstance(key, int) for key in spec)
    of_axes = of_axes and not nested
    keys = list(value) if isinstance(value, Mapping) else list(range(len(value)))
    for key in keys:
        if spec is None or of_axes:
            yield from _over(spec, value[key], f"{name}.{key}")
            continue
        if isinstance(spec, Mapping) == isinstance(value, Mapping) and len(spec) == len(value):
            try:
                part = spec[key]
            except (KeyError, IndexError):
                part = None
            yield from _over(part, value[key], f"{name}.{key}")
            continue
        raise BadInputError(
            f"dynamic_shapes of {name} must be a mapping of axes, or nested as the argument is, "
            f"got {spec!r}"
        )


def _of_tensor(spec: Any, tensor: torch.Tensor, name: str) -> dict[int, AxisRange]:
    if spec is None:
        return {}
    if isinstance(spec, Mapping):
        by_axis = dict(spec)
    elif isinstance(spec, list | tuple) and len(spec) == tensor.ndim:
        by_axis = dict(enumerate(spec))
    else:
        raise BadInputError(
            f"dynamic_shapes of {name} must be a mapping from axes to labels, got {spec!r}"
        )
    found = {}
    for axis, label in by_axis.items():
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise BadInputError(
                f"dynamic_shapes of {name} must have axes as integers, got {axis!r}"
            )
        if not -tensor.ndim <= axis < tensor.ndim:
            raise BadInputError(
                f"dynamic_shapes of {name} must name one of its {tensor.ndim} axes, got {axis}"
            )
        asked = _labelled(label, name, axis % tensor.ndim, tensor.shape[axis])
        if asked is not None:
            found[axis % tensor.ndim] = asked
    return found


def _labelled(label: Any, name: str, axis: int, size: int) -> AxisRange | None:
    if label is None or (type(label) is int and label == size):
        return None
    if isinstance(label, str):
        if not names_in(label):
            raise BadInputError(
                f"dynamic_shapes of {name} must label axis {axis} with a name, got {label!r}"
            )
        return AxisRange(label.replace(" ", ""))
    if type(label).__name__ == "_DimHint":
        if "STATIC" in str(label):
            return None
        stem = "".join(c if c.isalnum() else "_" for c in name)
        return AxisRange(f"{stem}_{axis}", label.min, label.max)
    low, high = getattr(label, "min", None), getattr(label, "max", None)
    text = getattr(label, "__name__", None)
    if not isinstance(text, str):
        raise BadInputError(
            f"dynamic_shapes of {name} must label axis {axis} with a text or a torch.export.Dim, "
            f"or give its size {size}, got {label!r}"
        )
    names_in(text)
    bounded = high if isinstance(high, int) and high < 2**31 else None
    return AxisRange(text.replace(" ", ""), low if isinstance(low, int) and low else None, bounded)


def _check_names(output_names: Any) -> None:
    listed = isinstance(output_names, list | tuple)
    if not listed or not all(isinstance(name, str) and name for name in output_names):
        raise BadInputError(f"output_names must be a list of names, got {output_names!r}")


def _sizes_of(call: Call, axes: Sequence[Mapping[int, AxisRange]]) -> dict[str, int]:
    """What every name in a label is in the example.

    Raises:
        BadInputError: a name has two sizes or none, or arithmetic does not come to the example's.
    """
    sizes: dict[str, tuple[int, str]] = {}
    computed: list[tuple[str, int, int, str]] = []
    for leaf, tensor, of_leaf in zip(call.leaves, call.tensors, axes, strict=True):
        for axis, asked in of_leaf.items():
            size, label = tensor.shape[axis], asked.label
            if asked.high is not None and size > asked.high:
                raise BadInputError(
                    f"axis {axis} of {leaf.name} is labelled {label}, at most {asked.high}, and "
                    f"is {size} in the example"
                )
            if not is_name(label):
                computed.append((leaf.name, axis, size, label))
                continue
            known, where = sizes.setdefault(label, (size, leaf.name))
            if known != size:
                raise BadInputError(
                    f"axis {axis} of {leaf.name} is labelled {label}, which is {known} in the "
                    f"example's {where}, got {size}"
                )
    known_sizes = {label: size for label, (size, _) in sizes.items()}
    for name, axis, size, label in computed:
        missing = [part for part in names_in(label) if part not in known_sizes]
        if len(missing) == 1:
            known_sizes |= _solved(label, missing[0], size, known_sizes)
            missing = [part for part in missing if part not in known_sizes]
        if missing:
            raise BadInputError(
                f"axis {axis} of {name} is labelled {label}, and no axis is labelled {missing[0]}"
            )
        wanted = size_of(label, known_sizes)
        if wanted != size:
            raise BadInputError(
                f"axis {axis} of {name} is labelled {label}, which is {wanted} in the example, "
                f"got {size}"
            )
    return known_sizes


def _solved(label: str, name: str, size: int, known: Mapping[str, int]) -> dict[str, int]:
    """The size of the one name at which a label is ``size``, if there is just one."""
    found = [n for n in range(size + 1) if size_of(label, {**known, name: n}) == size]
    return {name: found[0]} if len(found) == 1 else {}
