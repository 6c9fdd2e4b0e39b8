"""Which of a module's caches hold the window only."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rope_export.errors import BadInputError
from rope_export.exporting.call import PAST, Flat
from rope_export.exporting.dynamic_shapes import LabelledCall


def windows_of(
    labelled: LabelledCall, flat: Flat, noted: Sequence[tuple[Tensor, int]]
) -> dict[int, int]:
    """Layers whose cache holds the window only, and the window.

    Args:
        labelled: the example.
        flat: what was traced.
        noted: keys that attentions were given as such a cache, and their windows.

    Raises:
        BadInputError: one was given something else than the keys of a layer in the example.
    """
    windows = {}
    for keys, window in noted:
        place = flat.place_of(keys)
        leaf = None if place is None else labelled.call.leaves[place]
        if leaf is None or leaf.layer is None or leaf.name != f"{PAST}.{leaf.layer}.key":
            got = "something made of them" if leaf is None else leaf.name
            raise BadInputError(
                "a cache of the window must reach its Attention as it is given, one (key, value) "
                f"pair for each layer in a list of pairs, got {got}"
            )
        windows[leaf.layer] = window
    return windows
