"""`Situation`: what a form is asked to express, and which sizes of blocks follow from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rope_export.inspection import since

if TYPE_CHECKING:
    from rope_export.attention.block import Attention

# A window is computed in blocks of its size, not smaller, from so many blocks on: measured, below
# that GroupQueryAttention's whole triangle is as fast.
SMALLEST_BLOCK = 128
BLOCKS_TO_WIN = 4
# Without causal order GroupQueryAttention on the CPU keeps the scores of all queries of a call.
# More of them share a copy of the keys; fewer waste less of what is beyond a window.
MOST_QUERIES = 512
QUERIES = 256


@dataclass(frozen=True)
class Situation:
    """What a form is asked to express.

    Attributes:
        provider: where it runs.
        dtype: of weights and activations.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: width of a head.
        rotary_dim: rotated width of a head, 0 without RoPE.
        causal: whether later tokens are hidden.
        tabled: the angles of queries and keys are one cos/sin table indexed by position.
        implied_positions: a token's position is its place in its row.
        longest: longest sequence served.
        cache: past keys and values come in and present ones go out.
        mask: an ``attention_mask`` comes in.
        padding: the side on which prompts are padded, with ``mask``.
        window: sliding window, 0 without.
        softcap: scores are capped.
        sinks: each head has a sink.
        value_head_dim: width of a value head.
        cache_bits: of the integers that keys and values are stored as, 0: they are not.
        alone: the graph is made for this provider only.
        window_cache: the cache holds the window only.
        slots: of such a cache, 0 where that is any number.
        onnxruntime: the oldest one it is to run in.
    """

    provider: str
    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    causal: bool
    tabled: bool
    implied_positions: bool
    longest: int
    cache: bool = False
    mask: bool = False
    padding: str = "right"
    window: int = 0
    softcap: bool = False
    sinks: bool = False
    value_head_dim: int = 0
    cache_bits: int = 0
    alone: bool = True
    window_cache: bool = False
    slots: int = 0
    onnxruntime: str = since.NEWEST

    @property
    def hides_keys(self) -> bool:
        """Whether there may be keys that a query does not see."""
        return self.causal or self.mask or self.window > 0

    @property
    def integer_step(self) -> int:
        """What widths of heads with integers in a cache of the window are multiples of, or 0."""
        return 128 // self.cache_bits if self.cache_bits and self.window_cache else 0

    @property
    def window_block(self) -> int:
        """Tokens in a block when windows are computed by blocks."""
        return max(self.window, SMALLEST_BLOCK)

    @property
    def by_blocks(self) -> bool:
        """Whether prompts are long enough for blocks of the window to win."""
        return (
            self.provider == "cpu"
            and self.alone
            and self.window > 0
            and not self.cache_bits
            and self.longest > BLOCKS_TO_WIN * self.window_block
        )

    @property
    def apart(self) -> bool:
        """Whether rows, or blocks of queries, may be calls of their own: nothing is causal."""
        return self.provider == "cpu" and self.alone and not self.causal and not self.cache

    @property
    def query_block(self) -> int:
        """Queries in one call of GroupQueryAttention that is not causal, or 0: all."""
        if self.apart and self.window:
            return min(MOST_QUERIES, max(SMALLEST_BLOCK, self.window // 2)) * self.by_blocks
        return QUERIES * (self.apart and self.longest > QUERIES)


# What is spoken of where no block is given: causal, with grouped heads.
PLAIN = Situation(
    provider="cpu",
    dtype="float32",
    num_heads=16,
    num_kv_heads=8,
    head_dim=64,
    rotary_dim=64,
    causal=True,
    tabled=True,
    implied_positions=True,
    longest=16384,
    value_head_dim=64,
)


def situations(
    block: Attention,
    providers: Iterable[str],
    *,
    dtype: str,
    implied_positions: bool,
    longest: int,
    cache: bool = False,
    mask: bool = False,
    padding: str = "right",
    slots: int | None = None,
    onnxruntime: str = since.NEWEST,
) -> list[Situation]:
    """Describe ``block`` once for each provider.

    ``slots`` are those of a cache of the window, 0 where that is any number; None: it keeps all.
    """
    rope = block.rope
    rounding = block.cache_rounding if cache else None
    return [
        Situation(
            provider=provider,
            dtype=dtype,
            num_heads=block.num_heads,
            num_kv_heads=block.num_kv_heads,
            head_dim=block.head_dim,
            rotary_dim=0 if rope is None else rope.dim,
            causal=block.causal,
            tabled=rope is not None and rope.one_table,
            implied_positions=implied_positions,
            longest=longest,
            cache=cache,
            mask=mask,
            padding=padding,
            window=block.window or 0,
            softcap=block.softcap is not None,
            sinks=block.sinks is not None,
            value_head_dim=block.value_head_dim,
            window_cache=slots is not None,
            slots=slots or 0,
            onnxruntime=onnxruntime,
            cache_bits=0 if rounding is None else rounding.bits,
        )
        for provider in providers
    ]
