"""The same block as other libraries make it, with the same weights.

Each is an optional installation; one that is missing, or that has no such block, says so.
"""

from __future__ import annotations

import copy
import importlib.util
import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch

from rope_export.attention.block import Attention
from rope_export.bench import peer_genai, peer_transformers
from rope_export.bench.peer_rotations import (
    flash_attn,
    liger,
    rotary_embedding_torch,
    torchtune,
)
from rope_export.bench.peer_weights import save_weights
from rope_export.bench.turns import Job, Step
from rope_export.rope.embedding import RotaryEmbedding
from rope_export.rope.pairs import Layout


@dataclass(frozen=True)
class Peer:
    """One library's way to make the block.

    Attributes:
        package: module that must be importable.
        install: what ``pip install`` is told.
        layout: which channels it rotates together; weights are put in that order.
        prepare: writes what `step` needs into a folder.
        step: makes the step in the contender's process.
        phases: what it is measured at here.
        cuda: whether it runs on CUDA alone.
    """

    package: str
    install: str
    layout: Layout
    prepare: Callable[[Attention, Path, str], None]
    step: Callable[[Job], Step]
    phases: tuple[str, ...] = ("prefill",)
    cuda: bool = False


def prepare(name: str, phase: str, block: Attention, folder: Path, provider: str) -> str | None:
    """Write what a peer needs; why it cannot run, or None."""
    peer = PEERS[name]
    if importlib.util.find_spec(peer.package) is None:
        return f"not installed: pip install {peer.install}"
    if phase not in peer.phases:
        return f"measured here at {' and '.join(peer.phases)} only"
    if peer.cuda and provider != "cuda":
        return "runs on CUDA only"
    other = _special(block)
    if other is not None:
        return f"compared here for plain blocks only, and this one has {other}"
    here = folder / name
    if not here.exists():
        here.mkdir()
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            peer.prepare(_in_layout(block, peer.layout), here, provider)
    return None


def _special(block: Attention) -> str | None:
    """What of the block the peers spell in ways of their own, or None."""
    rope = block.rope
    found = {
        "a window": block.window is not None,
        "a soft cap": block.softcap is not None,
        "sinks": block.sinks is not None,
        "norms of queries and keys": block.q_norm is not None,
        "latent keys and values": block.latent is not None,
        "no causal order": not block.causal,
        "values of another width": block.value_head_dim != block.head_dim,
        "biases": any(name.endswith("bias") for name, _ in block.named_parameters()),
        "a scale of its own": abs(block.scale * block.head_dim**0.5 - 1) > 1e-6,
        "no RoPE": rope is None,
    }
    if rope is not None:
        found["a partial rotation"] = rope.dim != block.head_dim
        found["a RoPE that is scaled or learned"] = not rope.one_table or not _is_plain(rope)
    return next((name for name, is_so in found.items() if is_so), None)


def _is_plain(rope: RotaryEmbedding) -> bool:
    """Whether its frequencies are the geometric series of ``theta``, and positions are counted."""
    if rope.theta is None or rope.axes > 1 or rope.interpolate_factor != 1:
        return False
    series = rope.theta ** -(torch.arange(0, rope.dim, 2, dtype=torch.float64) / rope.dim)
    return bool(torch.allclose(rope.inv_freq, series, rtol=1e-6)) and rope.attention_factor == 1


def _in_layout(block: Attention, layout: Layout) -> Attention:
    """The same block with channels of queries and keys in the order that ``layout`` pairs."""
    assert block.rope is not None
    if block.rope.layout == layout:
        return block
    pairs = torch.arange(block.head_dim).reshape(2, -1)
    order = pairs.T.reshape(-1) if layout == "interleaved" else pairs.reshape(-1, 2).T.reshape(-1)
    moved = copy.deepcopy(block)
    for projection in (moved.q_proj, moved.k_proj):
        heads = projection.weight.data.unflatten(0, (-1, block.head_dim))
        projection.weight.data = heads[:, order].flatten(0, 1).contiguous()
    return moved


PEERS = {
    "rotary-embedding-torch": Peer(
        "rotary_embedding_torch",
        "rotary-embedding-torch",
        "interleaved",
        save_weights,
        rotary_embedding_torch,
    ),
    "transformers": Peer(
        "transformers",
        "transformers",
        "half",
        save_weights,
        peer_transformers.step,
        phases=("prefill", "decode"),
    ),
    "transformers-onnx": Peer(
        "transformers",
        "transformers",
        "half",
        peer_transformers.export,
        peer_transformers.graph_step,
    ),
    "genai": Peer(
        "onnxruntime_genai",
        "--no-deps onnxruntime-genai (its onnxruntime would break onnxruntime-gpu)",
        "half",
        peer_genai.build,
        peer_genai.step,
        phases=("prefill", "decode"),
    ),
    "torchtune": Peer("torchtune", "torchtune torchao", "interleaved", save_weights, torchtune),
    "flash-attn": Peer("flash_attn", "flash-attn", "half", save_weights, flash_attn, cuda=True),
    "liger": Peer("liger_kernel", "liger-kernel", "half", save_weights, liger, cuda=True),
}
NAMES = tuple(PEERS)
STEPS = {name: peer.step for name, peer in PEERS.items()}
