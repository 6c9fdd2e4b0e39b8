"""Attention blocks with random weights: to export a shape before there is a model."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from rope_export import runtime
from rope_export.artifacts.artifact import Artifact
from rope_export.attention.block import Attention
from rope_export.errors import BadInputError
from rope_export.rope.embedding import RotaryEmbedding
from rope_export.rope.pairs import Layout

_DEFAULT_THETA = 10000.0


def rotated_width(head_dim: int, scaling: Mapping[str, Any]) -> int:
    """Rotated part of a head, as a ``rope_parameters`` object states it.

    Of type "proportional" the whole head is paired and the share says how many pairs turn.

    Raises:
        BadInputError: the share is not a number above 0 and up to 1.
    """
    share = scaling.get("partial_rotary_factor")
    if share is None or scaling.get("rope_type", scaling.get("type")) == "proportional":
        return head_dim
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise BadInputError(
            f"scaling['partial_rotary_factor'] must be above 0 and at most 1, got {share!r}"
        )
    return int(head_dim * share)


def block_of_artifact(folder: str | Path) -> Attention:
    """The block of an artifact that ``rope-export block`` made, from the options kept with it.

    Raises:
        BadInputError: it is no artifact, or was not made by that command.
    """
    artifact = Artifact.read(Path(folder), verify=False)
    options = artifact.config.get("options") or {}
    # The others say how it was exported.
    known = {name for made in (random_block, Attention) for name in signature(made).parameters}
    arguments = {name: value for name, value in options.items() if name in known}
    if "checkpoint" in options:
        raise BadInputError(
            f"{folder}: is layer {options.get('layer')} of {options['checkpoint']!r}: "
            "Attention.from_checkpoint makes its block"
        )
    if not {"hidden_size", "num_heads", "max_seq_len"} <= set(arguments):
        raise BadInputError(
            f"{folder}: does not say how to make its block; it was exported from Python"
        )
    return random_block(**arguments)


def random_block(
    *,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    theta: float | None = None,
    scaling: Mapping[str, Any] | None = None,
    rotary_dim: int | None = None,
    layout: Layout = "half",
    max_seq_len: int,
    dtype: str = "float32",
    seed: int = 0,
    **variant: Any,
) -> Attention:
    """Make a block whose weights depend on ``seed`` alone; the global generator is untouched.

    Every argument is checked, and the size against this machine's memory, before anything is
    allocated. Arguments as of `RotaryEmbedding` and `Attention`, whose optional ones ``variant``
    has; ``theta`` defaults to ``scaling["rope_theta"]`` or 10000, ``rotary_dim`` to the share of
    ``head_dim`` that ``scaling["partial_rotary_factor"]`` states, or all of it.

    Raises:
        BadInputError: an argument is out of range, or the block does not fit in memory.
    """
    if head_dim is None and num_heads > 0 and hidden_size % num_heads:
        raise BadInputError(
            f"hidden_size must be a multiple of num_heads when head_dim is not given, "
            f"got {hidden_size} and {num_heads}"
        )
    width = head_dim or hidden_size // max(1, num_heads)
    stated = scaling if isinstance(scaling, Mapping) else {}
    if theta is None:
        theta = stated.get("rope_theta") or _DEFAULT_THETA
    if rotary_dim is None:
        rotary_dim = rotated_width(width, stated)
    if rotary_dim == width and width % 2:
        raise BadInputError(
            f"head_dim must be even unless rotary_dim says how much of it is rotated, got {width}"
        )

    def build() -> Attention:
        rope = RotaryEmbedding(
            rotary_dim, theta=theta, layout=layout, scaling=scaling, max_seq_len=max_seq_len
        )
        return Attention(
            hidden_size,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=rope,
            **variant,
        )

    with torch.device("meta"):
        outline = build()
    tensors = (*outline.parameters(), *outline.buffers())
    # Weights, their float64 copies, the packed copy in the graph, and the file being written.
    needed = 5 * sum(tensor.numel() * 4 for tensor in tensors)
    available = runtime.available_memory()
    if needed > available:
        raise BadInputError(
            f"hidden_size, num_heads and max_seq_len must fit in memory: they need about "
            f"{needed / 2**30:,.1f} GiB, {available / 2**30:,.1f} GiB are free here"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = build()
        # What training would move from where it starts: at 1 and 0 it could be left out unseen.
        with torch.no_grad():
            for norm in (block.q_norm, block.k_norm):
                if norm is not None:
                    norm.weight.uniform_(0.5, 1.5)
            if block.sinks is not None:
                block.sinks.normal_()
    return block.to(getattr(torch, dtype)).eval()
