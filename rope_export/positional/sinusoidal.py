"""The original Transformer's input: scaled token embeddings and sinusoidal positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rope_export.checks import positive_integer
from rope_export.errors import BadInputError
from rope_export.rope import frequencies
from rope_export.rope.angles import keeping_values
from rope_export.rope.positions import INTEGERS, check_offset


class SinusoidalPositionalEncoding(nn.Module):
    """Add sines and cosines of the position to the input, then apply dropout.

    Channel ``2i`` holds ``sin(p / 10000^(2i / d_model))`` and channel ``2i + 1`` the cosine of the
    same angle: float64 rounded once to float32, in a non-persistent buffer that follows the module
    between devices but never changes dtype. Nothing is cached or mutated in a forward pass.

    The state dict is empty. One that is loaded may hold the table as ``pe``, as PyTorch's tutorials
    save it: dropped if it is this very encoding, up to its own precision, and refused otherwise.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.5; the dropout, 5.4.

    Args:
        d_model: width of the input, even.
        max_len: rows of the table. Longer sequences are refused.
        dropout: probability that an element of the sum becomes zero in training, in [0, 1).

    Raises:
        BadInputError: an argument is out of range; the message names it and its value.
    """

    encoding: Tensor

    def __init__(self, d_model: int, max_len: int = 5000, dropout: float = 0.1) -> None:
        super().__init__()
        d_model = positive_integer("d_model", d_model, even=True)
        max_len = positive_integer("max_len", max_len)
        number = isinstance(dropout, int | float) and not isinstance(dropout, bool)
        if not number or not 0 <= dropout < 1:
            raise BadInputError(f"dropout must be a number in [0, 1), got {dropout!r}")
        self.d_model = d_model
        self.max_len = max_len
        self.dropout = nn.Dropout(dropout)
        table = torch.empty(max_len, d_model, dtype=torch.float32)
        self.register_buffer("encoding", table, persistent=False)
        self.reset_parameters()

    def extra_repr(self) -> str:
        """One line for ``print(module)``."""
        return f"d_model={self.d_model}, max_len={self.max_len}"

    def reset_parameters(self) -> None:
        """Rebuild the table ``[max_len, d_model]`` on the module's device."""
        self.encoding = self._rows(self.max_len).to(self.encoding.device)

    def _rows(self, count: int) -> Tensor:
        """The first ``count`` rows, made on the host."""
        inv_freq = frequencies.default_inv_freq(self.d_model, 10000.0)
        cos, sin = frequencies.cos_sin_table(inv_freq, count)
        return torch.stack((sin, cos), dim=-1).flatten(1)

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> SinusoidalPositionalEncoding:
        was_meta = self.encoding.is_meta
        super()._apply(keeping_values(fn), recurse)  # type: ignore[no-untyped-call]
        if was_meta:
            self.reset_parameters()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *args: Any
    ) -> None:
        saved = state_dict.pop(f"{prefix}pe", None)
        if saved is not None and not self._is_saved_as(saved):
            args[-1].append(  # the error messages
                f"{prefix}pe must be this encoding, [length, {self.d_model}] with sines in even "
                f"channels, got other values in {tuple(saved.shape)}"
            )
        if self.encoding.is_meta and metadata.get("assign_to_params_buffers"):
            # Weights leave meta by assignment, but here is nothing that could be assigned.
            self.encoding = self._rows(self.max_len).to(torch.get_default_device())
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)

    def _is_saved_as(self, pe: Tensor) -> bool:
        """Whether ``pe`` holds these rows as ``[L, d]``, ``[1, L, d]`` or ``[L, 1, d]``."""
        width, length = self.d_model, pe.numel() // self.d_model
        if pe.shape not in {(length, width), (1, length, width), (length, 1, width)}:
            return False
        rows = pe.detach().reshape(length, width).to("cpu", torch.float64)
        # Computed in float32, 100 000 rows err by 0.007; in bfloat16, any are rounded by 0.002.
        return bool(((rows - self._rows(length)).abs() < 0.01).all())

    def forward(
        self, x: Tensor, *, offset: int | Tensor = 0, position_ids: Tensor | None = None
    ) -> Tensor:
        """Add the encoding of positions ``offset … offset + S - 1``, or of given ones.

        The sum is made in float32 (float64 input: float64) and rounded once.

        Args:
            x: ``[..., S, d_model]``, floating point, batch first.
            offset: position of the first token, as an int or a 0-d integer tensor.
            position_ids: ``[S]`` or ``[B, S]`` integers, instead.

        Returns:
            the sum after dropout, same shape and dtype. Where positions are known only to
            an accelerator or a graph, nothing can raise: rows of positions out of range are NaN.

        Raises:
            BadInputError: a shape, dtype or position does not fit.
        """
        if x.ndim < 2 or x.shape[-1] != self.d_model or not x.is_floating_point():
            raise BadInputError(
                f"x must be floating point [..., S, {self.d_model}], "
                f"got {x.dtype} of shape {tuple(x.shape)}"
            )
        length = x.shape[-2]
        if position_ids is None:
            first = _known(offset)
            last = first + length - 1
        else:
            _check_ids(position_ids, x)
            first, last = _known_range(position_ids)
        if first < 0 or last >= self.max_len:
            got = f"{int(first)} … {last}"  # int: Dynamo formats no bare symbol
            raise BadInputError(
                f"positions must lie in 0 … {self.max_len - 1}, got {got}; raise max_len"
            )
        if position_ids is not None or isinstance(offset, Tensor):
            positions = position_ids
            if positions is None:
                positions = torch.arange(length, device=self.encoding.device) + offset
            served = positions.clamp(0, self.max_len - 1)
            rows = F.embedding(served, self.encoding)
            rows = torch.where((served == positions).unsqueeze(-1), rows, math.nan)
        else:
            rows = self.encoding[offset : offset + length]
        added: Tensor = self.dropout(x + rows)
        return added.to(x.dtype)


def _known(offset: int | Tensor) -> int:
    """``offset`` if it can be read without waiting for an accelerator, else 0."""
    check_offset(offset)
    if not isinstance(offset, Tensor):
        return offset
    on_host = type(offset) is Tensor and offset.device.type == "cpu"  # not a fake one
    return int(offset) if on_host and not torch.compiler.is_compiling() else 0


def _check_ids(position_ids: Tensor, x: Tensor) -> None:
    wanted = [(x.shape[-2],), (*x.shape[:-2], x.shape[-2])]
    if position_ids.is_floating_point() or tuple(position_ids.shape) not in wanted:
        raise BadInputError(
            f"position_ids must be integers {' or '.join(str(list(w)) for w in wanted)}, got "
            f"{position_ids.dtype} of shape {tuple(position_ids.shape)}"
        )


def _known_range(position_ids: Tensor) -> tuple[int, int]:
    """The least and the largest position, if they can be read here, else 0 and 0."""
    on_host = type(position_ids) is Tensor and position_ids.device.type == "cpu"
    if torch.compiler.is_compiling() or not on_host or not position_ids.numel():
        return 0, 0
    return int(position_ids.min()), int(position_ids.max())


class TokenEmbedding(nn.Module):
    """Look tokens up in a learned table and scale them by ``sqrt(d_model)``.

    Weights start as N(0, 1 / d_model), as in the authors' tensor2tensor and unlike `nn.Embedding`:
    scaled, they have unit variance beside encodings within ±1, and ``embedding.weight`` may be
    shared with the projection before the softmax.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.4.

    Args:
        vocab_size: number of tokens.
        d_model: width of an embedding.
        padding_idx: a token whose row starts as zeros and is not trained, as in `nn.Embedding`.

    Raises:
        BadInputError: an argument is out of range; the message names it and its value.
    """

    def __init__(self, vocab_size: int, d_model: int, *, padding_idx: int | None = None) -> None:
        super().__init__()
        vocab_size = positive_integer("vocab_size", vocab_size)
        d_model = positive_integer("d_model", d_model)
        rows = range(-vocab_size, vocab_size)
        if padding_idx is not None and (type(padding_idx) is not int or padding_idx not in rows):
            raise BadInputError(
                f"padding_idx must lie in {rows[0]} … {rows[-1]}, got {padding_idx!r}"
            )
        self.embedding = _Embedding(vocab_size, d_model, padding_idx=padding_idx)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed tokens, scaled in float32 (float64 weights: float64) and rounded once.

        Args:
            tokens: int32 or int64 of any shape, each in ``0 … vocab_size - 1``.

        Returns:
            ``[*tokens.shape, d_model]`` in the dtype of the weights.

        Raises:
            BadInputError: ``tokens`` are neither int32 nor int64.
        """
        if tokens.dtype not in INTEGERS:
            raise BadInputError(f"tokens must be int32 or int64, got {tokens.dtype}")
        rows: Tensor = self.embedding(tokens)
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return (wide * math.sqrt(self.embedding.embedding_dim)).to(rows.dtype)


class _Embedding(nn.Embedding):
    """Rows of unit length to begin with, even if a trainer initialises every submodule again."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)
        self._fill_padding_idx_with_zero()
