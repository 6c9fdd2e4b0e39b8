"""`RotaryEmbedding`: holds the tables, chooses positions, leaves the arithmetic to `rotation`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rope_export import frequencies, lowering
from rope_export.errors import BadInputError
from rope_export.rotation import LAYOUTS, Layout, rotate_pairs

# Without a longest length, positions are split as 4096 * coarse + fine, and the two exact
# rotations are composed. 2443 coarse rows reach 10 million positions.
_FINE_ROWS = 4096
_COARSE_ROWS = 2443
_INTEGERS = (torch.int32, torch.int64)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding whose graph holds no data-dependent control flow.

    Cosines and sines are computed in float64 and rounded once to float32. They are
    non-persistent buffers that follow the module between devices but never change dtype:
    ``.to(torch.bfloat16)`` leaves them exact. Nothing is cached or mutated in a forward pass.

    With ``max_seq_len`` the angles are one table of that many rows and longer sequences are
    refused. Without it every position below 10 006 528 is served by composing two tabled
    rotations (error below 1e-6), at the price of a second gather.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).

    Args:
        dim: rotated width of each head, even. Heads may be wider: the rest passes through.
        theta: the base of the geometric series of frequencies.
        layout: ``"interleaved"`` (pairs ``2i, 2i+1``; RoFormer, GPT-J, rotary-embedding-torch)
            or ``"half"`` (pairs ``i, i + dim/2``; Llama, GPT-NeoX).
        scaling: a Hugging Face ``rope_parameters`` or ``rope_scaling`` object, one of
            `frequencies.ROPE_TYPES`, or None for the original RoPE. Its ``rope_theta``, if it has
            one, must equal ``theta``.
        max_seq_len: rows of the table, or None for any length.

    Raises:
        BadInputError: an argument is out of range; the message names it and its value.
    """

    freqs: Tensor
    cos: Tensor
    sin: Tensor
    coarse_cos: Tensor | None
    coarse_sin: Tensor | None

    def __init__(
        self,
        dim: int,
        *,
        theta: float = 10000.0,
        layout: Layout = "interleaved",
        scaling: Mapping[str, Any] | None = None,
        max_seq_len: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(dim, bool) or not isinstance(dim, int) or dim <= 0 or dim % 2:
            raise BadInputError(f"dim must be a positive even integer, got {dim!r}")
        if layout not in LAYOUTS:
            raise BadInputError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        if max_seq_len is not None and (type(max_seq_len) is not int or max_seq_len < 1):
            raise BadInputError(f"max_seq_len must be an integer above 0, got {max_seq_len!r}")
        self.dim = dim
        self.theta: float | None = frequencies.check_theta(theta)
        self.layout: Layout = layout
        self.max_seq_len = max_seq_len
        # Plain float64 tensor, not a buffer: no cast or device move may touch it.
        found = frequencies.frequencies(dim, float(theta), scaling, max_seq_len)
        self.scaling = None if scaling is None else dict(scaling)
        self.attention_factor = found.attention_factor
        self._inv_freq = found.inv_freq
        # Within a table that never reaches the switch there is nothing to switch to.
        reached = found.beyond is not None and (max_seq_len or math.inf) > found.beyond.length
        self.beyond = found.beyond if reached else None
        self.register_buffer("freqs", torch.empty(dim // 2, dtype=torch.float32))
        for name in ("cos", "sin", "coarse_cos", "coarse_sin"):
            self.register_buffer(name, None, persistent=False)
        self.reset_parameters()

    @property
    def inv_freq(self) -> Tensor:
        """Inverse frequencies ``[dim / 2]``, float64, in radians per position."""
        return self._inv_freq

    @property
    def positions(self) -> int:
        """How many positions are served: ``0 … positions - 1``."""
        return self.max_seq_len if self.max_seq_len is not None else _FINE_ROWS * _COARSE_ROWS

    # Without a table for all positions: position = fine + fine_rows * coarse.
    fine_rows = _FINE_ROWS
    coarse_rows = _COARSE_ROWS

    def extra_repr(self) -> str:
        """One line for ``print(module)``."""
        return (
            f"dim={self.dim}, theta={self.theta}, layout={self.layout!r}, "
            f"scaling={self.scaling}, "
            f"max_seq_len={self.max_seq_len}"
        )

    def reset_parameters(self) -> None:
        """Rebuild ``freqs`` and the tables on the module's device (a no-op on ``meta``)."""
        device = self.freqs.device
        rows = self.max_seq_len if self.max_seq_len is not None else _FINE_ROWS
        if device.type == "meta":
            # Shapes only; the values come when the module is moved to a real device.
            shape = (rows * (2 if self.beyond else 1), self.dim // 2)
            self.cos, self.sin = (
                torch.empty(shape, device=device),
                torch.empty(shape, device=device),
            )
        else:
            self.freqs = self._inv_freq.to(device, torch.float32)
            # The factor goes into one of two tables that are composed, so that it counts once.
            self.cos, self.sin = self._tables(rows, self.attention_factor, 1, device)
        if self.max_seq_len is None:
            self.coarse_cos, self.coarse_sin = self._tables(_COARSE_ROWS, 1.0, _FINE_ROWS, device)

    def _tables(
        self, rows: int, factor: float, stride: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every ``stride``-th position; those beyond the switch below."""
        sets = [self._inv_freq] + ([self.beyond.inv_freq] if self.beyond else [])
        tables = [frequencies.cos_sin_table(f * stride, rows, factor) for f in sets]
        cos, sin = (torch.cat(parts).to(device) for parts in zip(*tables, strict=True))
        return cos, sin

    def table_rows(self, position_ids: Tensor, rows: int) -> Tensor:
        """Rows of tables of ``rows`` positions: the positions, or those of the set beyond.

        The choice is arithmetic on the largest position, the same for the whole batch.
        """
        if self.beyond is None:
            return position_ids
        return position_ids + rows * (position_ids.max() >= self.beyond.length).to(torch.int64)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        was_meta = self.freqs.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta or self.cos.dtype != torch.float32 or self.freqs.dtype != torch.float32:
            self.freqs = self.freqs.to(torch.float32)
            self.reset_parameters()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.freqs.is_meta:
            return
        loaded = self.freqs.detach().to("cpu", torch.float32)
        differs = not torch.equal(loaded, self._inv_freq.to(torch.float32))
        if differs:  # another base, or frequencies that were trained: they are the truth now
            self._inv_freq = loaded.to(torch.float64)
            self.theta, self.beyond = None, None
        if differs or self.cos.is_meta:
            self.reset_parameters()

    def cos_sin(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Look up the angles of the given positions.

        Args:
            position_ids: integers of any shape, each in ``0 … positions - 1``.

        Returns:
            cosines and sines, ``[*position_ids.shape, dim / 2]`` float32.

        Raises:
            IndexError: a position is out of range (eager; the exported operators differ).
        """
        if self.coarse_cos is None or self.coarse_sin is None:
            ids = self.table_rows(position_ids, self.positions)
            return F.embedding(ids, self.cos), F.embedding(ids, self.sin)
        coarse = position_ids // _FINE_ROWS
        fine = position_ids - coarse * _FINE_ROWS
        if self.beyond is not None:
            chosen = self.table_rows(position_ids, 1) - position_ids  # 0 or 1
            coarse, fine = coarse + chosen * _COARSE_ROWS, fine + chosen * _FINE_ROWS
        cos_a, sin_a = F.embedding(coarse, self.coarse_cos), F.embedding(coarse, self.coarse_sin)
        cos_b, sin_b = F.embedding(fine, self.cos), F.embedding(fine, self.sin)
        return cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b

    def implied_positions(self, seq_len: int, offset: int | Tensor = 0) -> Tensor:
        """Positions ``offset … offset + seq_len - 1`` as int64 ``[seq_len]``.

        Raises:
            BadInputError: they reach beyond the last position served, or ``offset`` is not an
                integer.
        """
        _check_offset(offset)
        last = seq_len if isinstance(offset, Tensor) else seq_len + offset
        if last > self.positions or (not isinstance(offset, Tensor) and offset < 0):
            raise BadInputError(
                f"positions must lie in 0 … {self.positions - 1}, got {offset} … {last - 1}; "
                "raise max_seq_len"
            )
        return torch.arange(seq_len, device=self.cos.device) + offset

    def rotate(
        self,
        q: Tensor,
        k: Tensor,
        *,
        position_ids: Tensor | None = None,
        offset: int | Tensor = 0,
    ) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys by their positions.

        Args:
            q: ``[B, H, S, D]`` with ``D >= dim``.
            k: ``[B, H_kv, S, D]``.
            position_ids: ``[S]`` or ``[B, S]`` integers; implied as ``offset … offset + S - 1``.
            offset: position of the first token when ``position_ids`` is not given, as an int or
                a 0-d integer tensor.

        Returns:
            rotated ``q`` and ``k``, same shapes and dtypes.

        Raises:
            BadInputError: a shape, dtype or position does not fit.
        """
        return (
            self._rotate_heads(q, position_ids, offset, "q"),
            self._rotate_heads(k, position_ids, offset, "k"),
        )

    def rotate_queries_or_keys(self, t: Tensor, *, offset: int | Tensor = 0) -> Tensor:
        """Rotate one tensor by its implied positions.

        Args:
            t: ``[..., S, D]`` with ``D >= dim``.
            offset: position of the first token, as an int or a 0-d integer tensor.

        Returns:
            the rotated tensor, same shape and dtype.
        """
        return self._rotate_heads(t, None, offset, "t")

    def _rotate_heads(
        self, x: Tensor, position_ids: Tensor | None, offset: int | Tensor, name: str
    ) -> Tensor:
        if x.ndim < 2 or x.shape[-1] < self.dim:
            raise BadInputError(
                f"{name} must be [..., S, D] with D >= {self.dim}, got {tuple(x.shape)}"
            )
        if position_ids is None:
            positions = self.implied_positions(x.shape[-2], offset)
        else:
            positions = check_position_ids(position_ids, x)
        target = lowering.active()
        if target is not None and x.ndim == 4:
            return target.rotate(self, x, positions)
        cos, sin = self.cos_sin(positions)
        if cos.ndim == 3:  # [B, S, r/2] -> [B, 1, S, r/2], shared by the heads
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return rotate_pairs(x, cos, sin, layout=self.layout)


def _check_offset(offset: int | Tensor) -> None:
    if isinstance(offset, Tensor):
        if offset.ndim or offset.dtype not in _INTEGERS:
            raise BadInputError(
                f"offset must be an integer or a 0-d tensor of int32 or int64, "
                f"got {offset.dtype} of shape {tuple(offset.shape)}"
            )
    elif isinstance(offset, float | bool):
        raise BadInputError(f"offset must be an integer or a 0-d integer tensor, got {offset!r}")


def check_position_ids(position_ids: Tensor, x: Tensor) -> Tensor:
    """Return ``position_ids`` if they fit ``x`` ``[B, H, S, D]``.

    Raises:
        BadInputError: they are not int32 or int64, or not ``[S]``, ``[1, S]`` or ``[B, S]``.
    """
    if position_ids.dtype not in _INTEGERS:
        raise BadInputError(f"position_ids must be int32 or int64, got {position_ids.dtype}")
    if position_ids.ndim not in (1, 2) or (position_ids.ndim == 2 and x.ndim != 4):
        raise BadInputError(
            f"position_ids must be [S] or [B, S], got {tuple(position_ids.shape)} "
            f"for an input {tuple(x.shape)}"
        )
    if position_ids.shape[-1] != x.shape[-2]:
        raise BadInputError(
            f"position_ids must have the sequence length {x.shape[-2]} as last axis, "
            f"got {tuple(position_ids.shape)}"
        )
    if position_ids.ndim == 2 and position_ids.shape[0] not in (1, x.shape[0]):
        raise BadInputError(
            f"position_ids must have one row or {x.shape[0]}, got {tuple(position_ids.shape)}"
        )
    return position_ids
