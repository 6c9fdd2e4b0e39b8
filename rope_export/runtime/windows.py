"""Layers that keep a window only: how many slots they have, and what can be taken back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rope_export.artifacts.cache_layout import CacheLayout, resident
from rope_export.checks import positive_integer
from rope_export.errors import BadInputError


def window_slots(layout: CacheLayout, asked: int | None) -> tuple[int, ...]:
    """Slots of every layer's cache, 0 where a layer keeps all tokens.

    Args:
        layout: of the cache.
        asked: for layers that keep a window only, or None: the window.

    Raises:
        BadInputError: no layer does, a window does not fit, or the graph has another number.
    """
    if asked is not None:
        asked = positive_integer("window_capacity", asked)
        if not layout.windows:
            raise BadInputError(
                f"window_capacity is of layers that keep a window only, got {asked}: this graph "
                "keeps all tokens (it was exported without cache='window')"
            )
        if asked < max(layout.windows):
            raise BadInputError(
                f"window_capacity must be at least the window of {max(layout.windows)} tokens, "
                f"got {asked}"
            )
        fixed = [layer.slots for layer in layout.layers if layer.slots not in (0, asked)]
        if fixed:
            raise BadInputError(
                f"window_capacity must be the {fixed[0]} slots that this graph has, got {asked}"
            )
    slots = []
    for layer in layout.layers:
        kept = layer.slots or asked or layer.window
        slots.append(kept if layer.window else 0)
    return tuple(slots)


def check_rewind(
    layout: CacheLayout,
    slots: tuple[int, ...],
    now: npt.NDArray[np.int64],
    then: npt.NDArray[np.int64],
) -> None:
    """Check that rows can go back to so many tokens while buffers stay as they are.

    A window's tokens move only when all slots are taken; until then, those before lie where they
    lay.

    Args:
        layout: of the cache.
        slots: of its layers, as of `window_slots`.
        now: tokens of each row.
        then: tokens of each row to go back to.

    Raises:
        BadInputError: a layer has pushed out tokens that it would need.
    """
    for layer, capacity in zip(layout.layers, slots, strict=True):
        if not layer.window:
            continue
        kept, wanted = (resident(n, layer.window, capacity) for n in (now, then))
        lost = np.flatnonzero(wanted != kept - (now - then))
        if len(lost):
            row = int(lost[0])
            # Just after tokens were pushed out, the window is what is left.
            most = int(kept[row]) - (layer.window if now[row] > capacity else 0)
            raise BadInputError(
                f"{now[row] - then[row]} tokens of row {row} cannot be taken back: a layer keeps "
                f"a window of {layer.window} in {capacity} slots and has pushed out what came "
                f"before; after {now[row]} tokens at most {most} can (a larger window_capacity "
                "leaves room for more)"
            )
