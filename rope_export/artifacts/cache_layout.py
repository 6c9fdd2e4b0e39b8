"""`CacheLayout`: how a graph keeps its keys and values, as ``config.json`` has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

PADDINGS = ("right", "left")
KINDS = ("key", "value")
MASK = "attention_mask"
WINDOW = "window"
BITS = {"int8": 8, "int4": 4}
"""Of the integers that keys and values may be stored as; two of four bits share a byte."""


def resident(tokens: npt.ArrayLike, window: int, capacity: int) -> npt.NDArray[np.int64]:
    """How many of so many tokens lie in a cache of the window: the latest, from slot 0 on.

    ``capacity - window + 1`` slots are freed at once when a token finds all of them taken.

    Args:
        tokens: of each row.
        window: tokens that must be there.
        capacity: slots.
    """
    counted = np.asarray(tokens, dtype=np.int64)
    freed = capacity - window + 1
    over = np.maximum(counted - capacity, 0)
    found: npt.NDArray[np.int64] = counted - freed * -(-over // freed)
    return found


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer.

    Attributes:
        num_kv_heads: key and value heads.
        head_dim: width of a key.
        value_head_dim: width of a value.
        window: latest tokens that are kept at least; 0: all are.
        slots: with a window, how many tokens the graph has room for; 0: any from the window on.
    """

    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    window: int = 0
    slots: int = 0


@dataclass(frozen=True)
class CacheLayout:
    """How a graph keeps its cache, and how it is called.

    Attributes:
        layers: keys and values of each layer.
        capacity: longest sequence served.
        packs_rows: each row's tokens lie from its first slot on, so that past and present can be
            one buffer; else the present is a new tensor with the columns of the mask.
        by_rows: several new tokens of a batch with a past are served in one call.
        padding: the side on which prompts are padded.
        position_axes: axes of ``position_ids``, 0 when they are implied.
        tokens: the input that holds new tokens.
        output: the output that belongs to them.
        past: names of the inputs, with ``{layer}`` and ``{kind}`` (key or value) to be filled in.
        present: names of the outputs, likewise.
        mask: whether ``attention_mask`` is an input.
        ragged: whether rows may be padded and differ in length.
        dtype: one of `BITS` where keys and values are stored as integers, else None.
    """

    layers: tuple[LayerCache, ...]
    capacity: int
    packs_rows: bool
    by_rows: bool
    padding: str
    position_axes: int
    tokens: str = "hidden_states"
    output: str = "output"
    past: str = "past_{kind}"
    present: str = "present_{kind}"
    mask: bool = True
    ragged: bool = True
    dtype: str | None = None

    @property
    def windows(self) -> tuple[int, ...]:
        """The windows of those layers that keep no more."""
        return tuple(dict.fromkeys(layer.window for layer in self.layers if layer.window))

    def names(self) -> Iterator[tuple[str, str, int, int]]:
        """Input, output, heads and width of every past and present tensor, in the graph's order."""
        for index, layer in enumerate(self.layers):
            for kind, width in zip(KINDS, (layer.head_dim, layer.value_head_dim), strict=True):
                past = self.past.format(layer=index, kind=kind)
                present = self.present.format(layer=index, kind=kind)
                yield past, present, layer.num_kv_heads, self.stored_width(width)

    def stored_width(self, width: int) -> int:
        """Entries that a head of ``width`` channels takes in a tensor of the cache."""
        return width if self.dtype is None else width * BITS[self.dtype] // 8

    def bytes_of_token(self, element: int) -> int:
        """What one token of one row takes in all layers.

        Args:
            element: bytes of a number where the cache is of floating point.
        """
        size = element if self.dtype is None else 1
        return sum(heads * width * size for _, _, heads, width in self.names())

    @classmethod
    def from_json(cls, content: Any) -> CacheLayout:
        """Read it back from ``config.json``.

        Raises:
            KeyError, TypeError, ValueError: something in it is not as `export` writes it.
        """
        wanted = {field.name for field in fields(cls)}
        # What was written before there were other dtypes has none.
        if not isinstance(content, dict) or {"dtype", *content} != wanted:
            raise ValueError("'cache' must describe how the graph keeps its cache")
        layers = tuple(LayerCache(**layer) for layer in content["layers"])
        if not layers:
            raise ValueError("the cache has no layers")
        numbers = [entry for layer in layers for entry in asdict(layer).items()]
        numbers += [(name, content[name]) for name in ("capacity", "position_axes")]
        for name, value in numbers:
            least = 0 if name in ("position_axes", "window", "slots") else 1
            if type(value) is not int or value < least:
                raise ValueError(f"{name!r} of the cache is {value!r}")
        for layer in layers:
            if layer.slots and not 0 < layer.window <= layer.slots:
                raise ValueError(f"a window of {layer.window} in {layer.slots} slots of the cache")
        for name in ("packs_rows", "by_rows", "mask", "ragged"):
            if type(content[name]) is not bool:
                raise TypeError(f"{name!r} of the cache is {content[name]!r}, not bool")
        for name in ("tokens", "output", "past", "present"):
            if type(content[name]) is not str:
                raise TypeError(f"{name!r} of the cache is {content[name]!r}, not str")
        for name in ("past", "present"):
            content[name].format(layer=0, kind="key")
        if content.get("dtype") not in (None, *BITS):
            raise ValueError(f"dtype of the cache is {content['dtype']!r}")
        if content["padding"] not in PADDINGS:
            raise ValueError(f"padding of the cache is {content['padding']!r}")
        return cls(**content | {"layers": layers})
