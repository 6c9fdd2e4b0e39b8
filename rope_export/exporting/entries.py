"""How a module is called to be traced: as it is, and how else where that would serve too little.

A trace decides every ``if`` by what the module holds at that moment. A module that keeps tables
from one call to the next would be traced with the tables it happens to have, so what is traced is
a copy; where its tables are too small for what was asked, a copy that has larger ones, or none.
Whether the graph is right is for the proof to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from rope_export.errors import BadInputError
from rope_export.exporting.call import Flat
from rope_export.exporting.copies import Kept, cooled, fresh, kept_by
from rope_export.exporting.dynamic_shapes import LabelledCall
from rope_export.exporting.eager import run_eagerly
from rope_export.exporting.labels import size_of
from rope_export.exporting.request import Entry

_LEAST_TRACED = 2
# Tables are not grown by a call of more tokens: without a cache that is a matter of S x S.
_LARGEST_RUN = 8192
_SHOWN = 3


class Entries:
    """Ways to call a module for a trace.

    Args:
        labelled: the module, its example, and what is asked of their axes.
        output_names: of its results that are no cache, or None.
        served: the largest size of labels that the traces so far were found to end at.
    """

    def __init__(
        self,
        labelled: LabelledCall,
        output_names: list[str] | None,
        served: Mapping[str, int],
    ) -> None:
        self._served = served
        self._labelled = labelled
        self._call = labelled.call
        self._output_names = output_names

    def __iter__(self) -> Iterator[Entry]:
        """A copy as the module is; then, one by one, what may serve more.

        Raises:
            BadInputError: the module does not run on its example, or at the sizes it is traced at.
        """
        call, module = self._call, self._call.module
        run_eagerly(call, self._output_names, call.tensors, "the example inputs")
        tensors = self._tensors_to_trace()
        yield self._entry(fresh(module), tensors)
        grown, kept, size = self._called(tensors)
        if not kept:
            return
        named = named_in_short([f"{path}.{name}".lstrip(".") for path, name in kept])
        if size is not None:
            note = (
                f"what the module keeps from one call to the next ({named}) is, as a call at "
                f"{size} leaves it, fixed in the graph"
            )
            yield self._entry(grown, tensors, note)
        note = f"what the module keeps from one call to the next ({named}) is computed in each call"
        for by in ("none", "zero"):
            yield self._entry(cooled(module, kept, by=by), tensors, note)

    def _entry(self, module: nn.Module, tensors: list[Tensor], note: str | None = None) -> Entry:
        flat = Flat(self._call.of(module), self._output_names, forgets=True)
        flat.eval()
        # Without the bounds asked for: what of them the trace serves is seen in its own.
        shapes = tuple(
            dict.fromkeys(of_leaf, torch.export.Dim.DYNAMIC) for of_leaf in self._labelled.axes
        )
        given = tuple(tensor.clone() for tensor in tensors)
        return Entry(flat, given, {}, {"tensors": shapes}, prefix="module.", note=note)

    def _tensors_to_trace(self) -> list[Tensor]:
        """The example, but for axes of 0 or 1, which would be taken for broadcasting."""
        labelled, example = self._labelled, self._labelled.sizes
        sizes = dict(example)
        for label, size in sizes.items():
            lows = [a.low for _, _, a in labelled.asked() if a.label == label and a.low is not None]
            sizes[label] = max([size, _LEAST_TRACED, *lows])
        for total, parts in _sums_by_name(example).items():
            sizes[total] = sum(sizes[part] for part in parts)
        if sizes == example:
            # Copies: a tensor that is given twice, or is a weight, would be traced as one.
            return [tensor.detach().clone() for tensor in self._call.tensors]
        tensors = self._of(sizes)
        changed = ", ".join(
            f"{label} {sizes[label]}" for label in sizes if sizes[label] != example[label]
        )
        run_eagerly(
            self._call,
            self._output_names,
            tensors,
            f"sizes it is traced at ({changed}, since a graph traced at 0 or 1 would broadcast); "
            "give an example with sizes of 2 and more, and label sums as sums",
        )
        return tensors

    def _of(self, sizes: Mapping[str, int]) -> list[Tensor]:
        """The example at other sizes."""
        shapes = [
            [
                size_of(of_leaf[axis].label, sizes) if axis in of_leaf else size
                for axis, size in enumerate(tensor.shape)
            ]
            for tensor, of_leaf in zip(self._call.tensors, self._labelled.axes, strict=True)
        ]
        return [
            resized(tensor, shape) for tensor, shape in zip(self._call.tensors, shapes, strict=True)
        ]

    def _called(self, tensors: list[Tensor]) -> tuple[nn.Module, Kept, str | None]:
        """A copy that was called at the largest sizes asked for, and what that left behind.

        Returns:
            the copy, what it kept, and those sizes in words, or None where nothing was asked.
        """
        labelled = self._labelled
        sizes, asked = dict(labelled.sizes), {}
        for label, size in sizes.items():
            highs = [a.high for _, _, a in labelled.asked() if a.label == label]
            high = min((h for h in highs if h is not None), default=None)
            if high is None and label == labelled.sequence:
                high = labelled.asked_longest
            if high is not None and high <= _LARGEST_RUN:
                asked[label] = high
            beyond = self._served.get(label, 0) + 1
            sizes[label] = max(2 * size + 1, beyond if beyond <= _LARGEST_RUN else 0)
        if labelled.sequence in asked:  # one row is enough, and less to compute
            sizes |= {label: size for label, size in labelled.sizes.items() if label not in asked}
        called = fresh(self._call.module)
        for each in (labelled.sizes, sizes | asked):
            try:
                given = tensors if each is labelled.sizes else self._of(each)
                run_eagerly(
                    self._call.of(called), self._output_names, given, "larger sizes", anew=False
                )
            except BadInputError:  # a table ends there, or other sizes depend on these
                continue
        words = ", ".join(f"{label} {size}" for label, size in asked.items()) or None
        return called, kept_by(fresh(self._call.module), called), words


def named_in_short(names: Sequence[str]) -> str:
    """The first of many names, and how many there are."""
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def resized(tensor: Tensor, shape: list[int]) -> Tensor:
    """A tensor of another shape with the values of ``tensor``, repeated; zeros if it has none.

    Whole numbers that count up along the last axis, as positions do, count on.
    """
    if list(tensor.shape) == shape:
        return tensor.detach().clone()
    if not tensor.numel():
        return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    first = tensor.detach().flatten()[0]
    counting = counts(tensor)
    for axis, size in enumerate(shape):
        index = torch.arange(size, device=tensor.device) % tensor.shape[axis]
        tensor = tensor.detach().index_select(axis, index)
    if counting:
        tensor = (torch.arange(shape[-1], device=tensor.device) + first).to(tensor).expand(shape)
    return tensor.contiguous()


def counts(tensor: Tensor) -> bool:
    """Whether every row counts up by one, as positions do."""
    if tensor.ndim == 0 or not tensor.numel() or tensor.dtype not in (torch.int32, torch.int64):
        return False
    return bool((tensor.detach().diff(dim=-1) == 1).all())


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
