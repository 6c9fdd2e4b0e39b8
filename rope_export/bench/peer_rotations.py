"""The block with its rotation by other libraries for PyTorch."""

from __future__ import annotations

import torch

from rope_export.bench import steps as ours
from rope_export.bench.peer_transformers import llama_config
from rope_export.bench.peer_weights import attended, library, projected, read_weights
from rope_export.bench.turns import Job, Step


def rotary_embedding_torch(job: Job) -> Step:
    """Rotated by rotary-embedding-torch."""
    shape, weights, x = read_weights(job)
    rope = (
        library("rotary_embedding_torch")
        .RotaryEmbedding(
            dim=shape["head_dim"], theta=shape["theta"], cache_max_seq_len=shape["longest"]
        )
        .to(x.device)
    )

    def run() -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in projected(shape, weights, x))
        q, k = rope.rotate_queries_or_keys(q), rope.rotate_queries_or_keys(k)
        return attended(weights, q, k, v)

    return ours.torch_step(job, run)


def torchtune(job: Job) -> Step:
    """Rotated by torchtune."""
    shape, weights, x = read_weights(job)
    rope = (
        library("torchtune.modules")
        .RotaryPositionalEmbeddings(
            shape["head_dim"], max_seq_len=shape["longest"], base=shape["theta"]
        )
        .to(x.device)
    )

    def run() -> torch.Tensor:
        q, k, v = projected(shape, weights, x)
        heads = (rope(q), rope(k), v)
        return attended(weights, *(t.transpose(1, 2) for t in heads))

    return ours.torch_step(job, run)


def flash_attn(job: Job) -> Step:
    """Rotated and attended by flash-attn."""
    attend = library("flash_attn").flash_attn_func
    shape, weights, x = read_weights(job)
    layer = library("flash_attn.layers.rotary").RotaryEmbedding
    rope = layer(shape["head_dim"], base=shape["theta"], device=x.device)

    def run() -> torch.Tensor:
        q, k, v = projected(shape, weights, x)
        q, kv = rope(q, torch.stack((k, v), dim=2))
        context = attend(q, *kv.unbind(2), causal=True)
        return torch.nn.functional.linear(context.flatten(2), weights["o_proj.weight"])

    return ours.torch_step(job, run)


def liger(job: Job) -> Step:
    """Rotated by Liger's kernel."""
    turn = library("liger_kernel.transformers.rope").liger_rotary_pos_emb
    llama = library("transformers.models.llama.modeling_llama")
    shape, weights, x = read_weights(job)
    angles = llama.LlamaRotaryEmbedding(llama_config(shape)).to(x.device)
    places = torch.arange(job.length, device=x.device)[None]

    def run() -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in projected(shape, weights, x))
        q, k = turn(q, k, *angles(x, places))
        return attended(weights, q, k, v)

    return ours.torch_step(job, run)
