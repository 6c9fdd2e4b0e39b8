"""Inputs of which float64 can say what integers their keys and values become.

A number close to half-way between two integers becomes either, as the last bits of float32 have it:
two right graphs may differ there, and by a whole step. No tolerance could tell that from a defect.
So tokens with such a number are drawn again, and every integer of every case is held to be exactly
the one that float64 says, in every target and on every machine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rope_export.artifacts.comparison import Errors, tolerance
from rope_export.attention.block import Attention
from rope_export.errors import BadInputError
from rope_export.proof.reference import keys_and_values
from rope_export.proof.rounded_cache import Rounding
from rope_export.runtime.token_places import Places

# A provider may err twice as much as eager PyTorch; the other half is for what it did not draw.
_FACTOR = 4.0
_AT_ONCE = 1024
_ROUNDS = 4000


@torch.no_grad()
def settle(
    block: Attention,
    rounding: Rounding,
    tokens: Tensor,
    at: Places,
    ids: Tensor | None,
    draw: Callable[[int], Tensor],
) -> None:
    """Draw tokens again, in place, until none has a key or value that could round either way.

    Args:
        block: gives the weights.
        rounding: of its cache.
        tokens: hidden states ``[B, T, hidden_size]``.
        at: row and place of those that a call encodes.
        ids: positions ``[B, T]`` or ``[A, B, T]``, or None: the places.
        draw: makes so many tokens, ``[1, n, hidden_size]``.

    Raises:
        BadInputError: there are none, as far as can be seen.
    """
    row, place = (torch.from_numpy(part) for part in at)
    positions = place if ids is None else ids[..., row, place]
    longest = int(positions.max()) + 1
    for _ in range(_ROUNDS):
        settled = torch.cat(
            [
                _settled(block, rounding, tokens[r, p], now, longest)
                for r, p, now in zip(
                    row.split(_AT_ONCE),
                    place.split(_AT_ONCE),
                    positions.split(_AT_ONCE, dim=-1),
                    strict=True,
                )
            ]
        )
        row, place, positions = row[~settled], place[~settled], positions[..., ~settled]
        if not len(row):
            return
        tokens[row, place] = draw(len(row))[0]
    raise BadInputError(
        f"cache_dtype cannot be proven for this block: {_ROUNDS} random tokens have all a key or "
        "value that float32 does not tell from half a step of the integers"
    )


def _settled(
    block: Attention, rounding: Rounding, tokens: Tensor, positions: Tensor, longest: int
) -> Tensor:
    """Whether each of the tokens ``[n, hidden_size]`` becomes the same integers in float32."""
    # One more, at the last position: frequencies may follow it.
    hidden = torch.cat((tokens, tokens[:1])).unsqueeze(0)
    last = torch.full_like(positions[..., :1], longest - 1)
    ids = torch.cat((positions, last), dim=-1).unsqueeze(-2)
    exact = keys_and_values(block, hidden, position_ids=ids)
    _, *eager = block.heads(hidden, position_ids=ids)
    products = max(block.hidden_size, block.num_heads * block.value_head_dim)
    floor = tolerance(Errors(0.0, 0.0, 0.0), "float32", products).rel
    settled = torch.ones(len(tokens) + 1, dtype=torch.bool)
    for truth, got, scale, distance in zip(
        exact, eager, rounding.scales, rounding.distances(exact), strict=True
    ):
        steps, off = (truth / scale)[0], ((got.double() - truth) / scale)[0]
        largest, furthest = steps.abs().amax((0, 2)), off.abs().amax((0, 2))
        band = torch.maximum(floor * largest, _FACTOR * furthest)
        settled &= distance[0].amin((0, 2)) > band
    return settled[:-1]
