"""What a module keeps between calls, and random numbers: neither is what a graph has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from rope_export.errors import BadInputError
from rope_export.exporting.call import Call
from rope_export.exporting.copies import fresh, kept_by
from rope_export.exporting.eager import run_eagerly
from rope_export.exporting.entries import named_in_short
from rope_export.exporting.module import ModuleRequest
from rope_export.proof.arrays import to_numpy
from rope_export.runtime.token_places import Array

# Tables made anew for another length differ in their last bits, other numbers by far more.
_SAME = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}


def refuse_what_a_graph_cannot_keep(
    request: ModuleRequest, others: Sequence[Callable[[], list[Tensor]]]
) -> None:
    """Refuse a module whose results depend on anything but its inputs.

    Copies of it are called with the example, one of them after other calls.

    Args:
        request: has the module and its example.
        others: draw inputs of other calls.

    Raises:
        BadInputError: it gives other numbers each time, or after other calls.
    """
    call = request.call
    first, second = (_results(request, call.fresh()) for _ in range(2))
    name = _differing(request, first, second, exact=True)
    kind = type(request.module).__name__
    if name is not None:
        raise BadInputError(
            f"{kind} must give the same numbers for the same inputs, and {name} of two runs "
            "differs: look for random numbers and dropout that is always on"
        )
    used = call.fresh()
    for draw in others:
        try:
            run_eagerly(used, request.output_names, draw(), "other sizes", anew=False)
        except BadInputError:  # the case itself will say so
            continue
    try:
        name = _differing(request, first, _results(request, used), exact=False)
    except BadInputError:  # what was left does not fit what comes
        name = next(iter(first))
    if name is None:
        return
    kept = kept_by(fresh(request.module), used.module)
    named = named_in_short([f"{path}.{leaf}".lstrip(".") for path, leaf in kept]) or "something"
    raise BadInputError(
        f"{kind} must give the same numbers after other calls, and {name} differs: it keeps "
        f"{named} from one call to the next, and a graph keeps nothing; take it as an input and "
        "return it as an output"
    )


def _results(request: ModuleRequest, call: Call) -> dict[str, Array]:
    leaves, results = run_eagerly(
        call, request.output_names, call.tensors, "the example inputs", anew=False
    )
    return {
        leaf.name: to_numpy(result.detach().cpu().contiguous())
        for leaf, result in zip(leaves, results, strict=True)
    }


def _differing(
    request: ModuleRequest, first: dict[str, Array], second: dict[str, Array], *, exact: bool
) -> str | None:
    """The first result that is another, or None."""
    for name, array in first.items():
        other, floats = second[name], array.dtype.kind not in "biu"
        if array.shape != other.shape:
            return name
        if exact or not floats:
            if not np.array_equal(array, other, equal_nan=floats):
                return name
            continue
        wide, now = np.nan_to_num(array.astype(np.float64)), np.nan_to_num(other.astype(np.float64))
        off = np.linalg.norm(now - wide) / max(float(np.linalg.norm(wide)), 1e-300)
        if off > _SAME[request.dtype]:
            return name
    return None
