"""`LabelledCall`: an example call, and what is asked of its axes; ``dynamic_shapes``, read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from rope_export.errors import BadInputError
from rope_export.exporting.call import Call
from rope_export.exporting.labels import AxisRange, is_name, names_in, size_of

DynamicShapes = Mapping[str, Any] | Sequence[Any]
"""Which axes vary, by argument."""


class LabelledCall:
    """An example call and the labels of its dynamic axes.

    Args:
        call: the module and its example.
        axes: for each tensor that goes in, what is asked of its dynamic axes.
        longest: longest sequence served.
        asked_longest: the same where the caller said it, else None.
        why_longest: what says so, in words.

    Attributes:
        sizes: what every name in a label is in the example.

    Raises:
        BadInputError: a name has two sizes or none, or arithmetic does not come to the example's.
    """

    def __init__(
        self,
        call: Call,
        axes: Sequence[Mapping[int, AxisRange]],
        *,
        longest: int,
        asked_longest: int | None = None,
        why_longest: str = "as asked",
    ) -> None:
        self.call = call
        self.axes = [dict(of_leaf) for of_leaf in axes]
        self.longest = longest
        self.asked_longest = asked_longest
        self.why_longest = why_longest
        self.sizes = _sizes_of(call, axes)

    @property
    def sequence(self) -> str | None:
        """Label of the second axis of the first input, where tokens are counted, or None."""
        of_first = self.axes[0].get(1)
        return None if of_first is None else of_first.label

    def asked(self) -> Iterator[tuple[str, int, AxisRange]]:
        """Every dynamic axis: the input's name, the axis, and what is asked of it."""
        for leaf, of_leaf in zip(self.call.leaves, self.axes, strict=True):
            for axis, asked in of_leaf.items():
                yield leaf.name, axis, asked


def axes_asked(call: Call, dynamic_shapes: DynamicShapes) -> list[dict[int, AxisRange]]:
    """What is asked of each tensor's axes.

    Raises:
        BadInputError: ``dynamic_shapes`` names no input or axis, or labels it with no name.
    """
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
