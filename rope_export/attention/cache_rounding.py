"""`CacheRounding`: keys and values of a cache as small integers."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rope_export.artifacts.cache_layout import BITS
from rope_export.rope.pairs import join_pairs, split_pairs

Pair = tuple[Tensor, Tensor]


class CacheRounding(nn.Module):
    """How keys and values become integers and come back: one scale for each channel.

    The arithmetic is that of onnxruntime's GroupQueryAttention, in float32: a number is multiplied
    by the reciprocal of its scale, rounded with ties to even and kept within the integers there
    are; times the scale it is what attention sees, of the new tokens too. Four bits are stored two
    to a byte: 8 is added, and of channels ``2i`` and ``2i + 1`` the first is in the low half.

    Args:
        dtype: ``"int8"`` or ``"int4"``.
        key_scale: ``[num_kv_heads, head_dim]`` float32, all above 0.
        value_scale: ``[num_kv_heads, value_head_dim]``, likewise.
    """

    key_scale: Tensor
    value_scale: Tensor
    key_reciprocal: Tensor
    value_reciprocal: Tensor

    def __init__(self, dtype: str, key_scale: Tensor, value_scale: Tensor) -> None:
        super().__init__()
        self.dtype = dtype
        self.bits = BITS[dtype]
        for kind, scale in (("key", key_scale), ("value", value_scale)):
            of_channels = scale.detach().float()[None, :, None, :].contiguous()
            self.register_buffer(f"{kind}_scale", of_channels, persistent=False)
            # Rounded once, on the host: a graph that divided would fall to another side of a tie.
            self.register_buffer(f"{kind}_reciprocal", 1.0 / of_channels, persistent=False)

    def extra_repr(self) -> str:
        """One line for ``print(module)``."""
        return self.dtype

    @property
    def storage(self) -> torch.dtype:
        """Of what is stored: int8, or bytes of two 4-bit integers."""
        return torch.int8 if self.bits == 8 else torch.uint8

    def stored_width(self, width: int) -> int:
        """Entries that a head of ``width`` channels takes."""
        return width * self.bits // 8

    def encode(self, keys: Tensor, values: Tensor) -> Pair:
        """Heads ``[B, G, S, width]`` as they are stored: ``[B, G, S, stored width]`` integers."""
        return (
            self._encoded(keys, self.key_reciprocal),
            self._encoded(values, self.value_reciprocal),
        )

    def decode(self, keys: Tensor, values: Tensor) -> Pair:
        """What attention sees of stored keys and values: ``[B, G, T, width]`` float32."""
        return self._decoded(keys, self.key_scale), self._decoded(values, self.value_scale)

    def _encoded(self, x: Tensor, reciprocal: Tensor) -> Tensor:
        largest = 2 ** (self.bits - 1) - 1
        whole = torch.round(x.float() * reciprocal).clamp(-largest - 1, largest)
        if self.bits == 8:
            return whole.to(torch.int8)
        low, high = split_pairs(whole + 8, x.shape[-1] // 2, "interleaved")
        return (low + 16 * high).to(torch.uint8)

    def _decoded(self, stored: Tensor, scale: Tensor) -> Tensor:
        whole = stored.float()
        if self.bits == 4:
            high = torch.floor(whole / 16)
            whole = join_pairs(whole - 16 * high, high, "interleaved") - 8
        return whole * scale

    def to_json(self) -> dict[str, Any]:
        """As ``config.json`` has it: the bytes of the scales in base64, little-endian float32."""
        return {
            "dtype": self.dtype,
            **{
                f"{kind}_scale": {
                    "shape": list(scale.shape[1::2]),
                    "float32": base64.b64encode(scale.numpy().astype("<f4").tobytes()).decode(),
                }
                for kind, scale in (("key", self.key_scale), ("value", self.value_scale))
            },
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> CacheRounding:
        """Read it back from ``config.json``.

        Raises:
            KeyError, TypeError, ValueError: something in it is not as `to_json` writes it.
        """
        scales = []
        for kind in ("key", "value"):
            entry = content[f"{kind}_scale"]
            array = np.frombuffer(base64.b64decode(entry["float32"]), dtype="<f4")
            scales.append(torch.from_numpy(array.astype(np.float32).reshape(entry["shape"])))
        return cls(content["dtype"], *scales)
