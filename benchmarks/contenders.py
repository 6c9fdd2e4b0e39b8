"""What benchmarks/train.py trains: the block, and our rotation or another library's in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from rope_export import Attention
from rope_export.attention.random_block import random_block
from rope_export.attention.random_inputs import draw, input_gain
from rope_export.proof.reference import exact_angles, rotate_exactly
from rope_export.rope.frequencies import Frequencies
from rope_export.rope.pairs import Layout
from rope_export.rope.rotation import repeat_for_pairs, swap_pairs

Pair = tuple[Tensor, Tensor]
LENGTHS = 6


@dataclass(frozen=True)
class Task:
    """What every contender does."""

    device: str
    dtype: str
    batch: int
    seq: int
    hidden: int
    heads: int
    kv_heads: int
    mode: str

    def __str__(self) -> str:
        shape = f"batch {self.batch}, seq {self.seq}, hidden {self.hidden}"
        return f"{self.device}, {self.dtype}, {shape}, {self.heads}/{self.kv_heads} heads"

    @property
    def width(self) -> int:
        """Of a head."""
        return self.hidden // self.heads

    @property
    def products(self) -> int:
        """Length of the longest sum of products: the gradient of a weight goes over all tokens."""
        return max(self.hidden, self.batch * self.seq)

    @property
    def lengths(self) -> list[int]:
        """Even and odd ones, the longest last."""
        return [max(2, self.seq * n // LENGTHS - n % 2) for n in range(1, LENGTHS + 1)]

    def block(self, layout: Layout = "half", seed: int = 0) -> Attention:
        """The block with our rotation, on the CPU."""
        return random_block(
            hidden_size=self.hidden,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            layout=layout,
            max_seq_len=self.seq,
            dtype=self.dtype,
            seed=seed,
        ).train()

    @cached_property
    def gain(self) -> float:
        """Of inputs at which a wrong rotation shows in the attention."""
        return input_gain(self.block(), 0)

    def tokens(self, length: int) -> Tensor:
        """Random hidden states that want a gradient."""
        drawn = draw(np.random.default_rng(0), self.block(), self.batch, length, self.gain)
        return drawn.to(self.device).requires_grad_()

    def gradient(self, length: int) -> Tensor:
        """Random gradient of the output."""
        drawn = draw(np.random.default_rng(1), self.block(), self.batch, length, 1.0)
        return drawn.to(self.device)


class OfTransformers(nn.Module):
    """As a Llama of transformers rotates: cosines and sines anew for each step."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama import modeling_llama

        config = LlamaConfig(
            hidden_size=task.hidden,
            num_attention_heads=task.heads,
            max_position_embeddings=task.seq,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
        self.cos_sin = modeling_llama.LlamaRotaryEmbedding(config)
        self.apply_to: Callable[..., Pair] = modeling_llama.apply_rotary_pos_emb

    def rotate(self, q: Tensor, k: Tensor, **_positions: object) -> Pair:
        """Rotate both."""
        positions = torch.arange(q.shape[-2], device=q.device).unsqueeze(0)
        cos, sin = self.cos_sin(q, positions)
        return self.apply_to(q, k, cos, sin)


class OfLiger(OfTransformers):
    """Liger's kernel, which rotates in place, with the angles of transformers."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        from liger_kernel.transformers.rope import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
            liger_rotary_pos_emb,
        )

        self.apply_to = liger_rotary_pos_emb


class OfFlashAttn(nn.Module):
    """flash-attn's kernel, with tables as its own module has them: in the dtype of the queries."""

    cos: Tensor
    sin: Tensor

    def __init__(self, task: Task) -> None:
        super().__init__()
        from flash_attn.layers.rotary import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
            apply_rotary_emb,
        )

        self.apply_to: Callable[..., Tensor] = apply_rotary_emb
        angles, dtype = float32_angles(task.seq, task.width), getattr(torch, task.dtype)
        self.register_buffer("cos", angles.cos().to(dtype))
        self.register_buffer("sin", angles.sin().to(dtype))

    def rotate(self, q: Tensor, k: Tensor, **_positions: object) -> Pair:
        """Rotate both; the kernel takes ``[B, S, H, D]``, as they lie in memory."""
        q, k = (self.apply_to(x.transpose(1, 2), self.cos, self.sin) for x in (q, k))
        return q.transpose(1, 2), k.transpose(1, 2)


class OfRotaryEmbeddingTorch(nn.Module):
    """rotary-embedding-torch, which caches, and counts positions in the dtype of the queries."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        from rotary_embedding_torch import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
            RotaryEmbedding,
        )

        self.rope = RotaryEmbedding(dim=task.width)

    def rotate(self, q: Tensor, k: Tensor, **_positions: object) -> Pair:
        """Rotate both."""
        return self.rope.rotate_queries_or_keys(q), self.rope.rotate_queries_or_keys(k)


class Textbook(nn.Module):
    """Angles in float32, the rest rounded to the dtype at every step: coarse, and right."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout: Layout = layout

    def rotate(self, q: Tensor, k: Tensor, **_positions: object) -> Pair:
        """Rotate both."""
        angles = float32_angles(q.shape[-2], q.shape[-1]).to(q.device)
        angles = repeat_for_pairs(angles, layout=self.layout)
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
        q, k = (x * cos + swap_pairs(x, layout=self.layout) * sin for x in (q, k))
        return q, k


class Exact(nn.Module):
    """Float64, by complex numbers."""

    def __init__(self, found: Frequencies, layout: Layout) -> None:
        super().__init__()
        self.found, self.layout = found, layout

    def rotate(self, q: Tensor, k: Tensor, **_positions: object) -> Pair:
        """Rotate both."""
        length = q.shape[-2]
        angles = exact_angles(torch.arange(length), self.found, length)
        return rotate_exactly(q, angles, self.layout), rotate_exactly(k, angles, self.layout)


def float32_angles(length: int, width: int) -> Tensor:
    inverse = 1.0 / 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    return torch.outer(torch.arange(length, dtype=torch.float32), inverse)


@dataclass(frozen=True)
class Rotation:
    """Which channels a contender pairs, and what it has in the place of our rotation."""

    layout: Layout | None
    theirs: Callable[[Task], nn.Module] | None = None
    package: str = "rope_export"
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def ours(self) -> str:
        """Which of ours has the same pairing."""
        return "ours interleaved" if self.layout == "interleaved" else "ours"


ROTATIONS = {
    "ours": Rotation("half"),
    "ours interleaved": Rotation("interleaved"),
    "no rope": Rotation(None),
    "transformers": Rotation("half", OfTransformers, "transformers"),
    "rotary-embedding-torch": Rotation(
        "interleaved", OfRotaryEmbeddingTorch, "rotary_embedding_torch"
    ),
    "flash-attn": Rotation("half", OfFlashAttn, "flash_attn", ("cuda",)),
    "liger": Rotation("half", OfLiger, "liger_kernel", ("cuda",)),
}
OURS = ("ours", "ours interleaved")
