"""What every peer is given: the same block's weights and tokens, and PyTorch around them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

from rope_export.attention.block import Attention
from rope_export.bench import steps as ours
from rope_export.bench.turns import Job
from rope_export.proof.arrays import from_numpy


def library(name: str) -> Any:
    """A module that may be missing, and whose types are not checked."""
    return importlib.import_module(name)


def shape_of(block: Attention) -> dict[str, Any]:
    """A plain block in numbers."""
    assert block.rope is not None
    return {
        "hidden_size": block.hidden_size,
        "num_heads": block.num_heads,
        "num_kv_heads": block.num_kv_heads,
        "head_dim": block.head_dim,
        "theta": block.rope.theta,
        "longest": block.rope.positions,
    }


def save_weights(block: Attention, folder: Path, _: str) -> None:
    """Write what a step that is PyTorch needs."""
    torch.save(block.state_dict(), folder / "weights.pt")
    (folder / "shape.json").write_text(json.dumps(shape_of(block)))


def read_weights(job: Job) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]:
    """The block in numbers, its weights and its tokens, where the job runs."""
    torch.set_grad_enabled(False)
    folder = Path(job.folder) / job.contender
    weights = torch.load(folder / "weights.pt", map_location=job.provider)
    tokens = from_numpy(ours.tokens_of(job)).to(job.provider)
    return json.loads((folder / "shape.json").read_text()), weights, tokens


def projected(
    shape: dict[str, Any], weights: dict[str, torch.Tensor], x: torch.Tensor
) -> list[torch.Tensor]:
    """Queries, keys and values ``[B, S, heads, head_dim]``."""
    return [
        torch.nn.functional.linear(x, weights[f"{name}_proj.weight"]).unflatten(
            -1, (-1, shape["head_dim"])
        )
        for name in ("q", "k", "v")
    ]


def attended(weights: dict[str, torch.Tensor], q: Any, k: Any, v: Any) -> torch.Tensor:
    """PyTorch's attention of ``[B, heads, S, head_dim]`` and the output projection."""
    context = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )
    return torch.nn.functional.linear(context.transpose(1, 2).flatten(2), weights["o_proj.weight"])
