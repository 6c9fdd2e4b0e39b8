"""The block as transformers has it, in PyTorch and by its exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rope_export.attention.block import Attention
from rope_export.bench import steps as ours
from rope_export.bench.peer_weights import library, read_weights, shape_of
from rope_export.bench.turns import Job, Step
from rope_export.exporting.tracing import quiet_torch


def llama_config(shape: dict[str, Any], **more: Any) -> Any:
    """Of a model with one layer that has the block's attention."""
    return library("transformers").LlamaConfig(
        hidden_size=shape["hidden_size"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        rope_parameters={"rope_type": "default", "rope_theta": shape["theta"]},
        max_position_embeddings=shape["longest"],
        num_hidden_layers=1,
        intermediate_size=8,
        vocab_size=8,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        **more,
    )


def llama_attention(shape: dict[str, Any], weights: dict[str, torch.Tensor]) -> Any:
    """A model of transformers that is one attention and its angles."""
    llama = library("transformers.models.llama.modeling_llama")

    class AttentionOnly(llama.LlamaPreTrainedModel):  # type: ignore[misc,name-defined]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.rotary_emb = llama.LlamaRotaryEmbedding(config)
            self.self_attn = llama.LlamaAttention(config, 0)

        def forward(self, hidden_states: torch.Tensor, cache: Any = None) -> torch.Tensor:
            places = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            if cache is not None:
                places = places + cache.get_seq_length()
            angles = self.rotary_emb(hidden_states, places[None])
            # By place: releases differ in what they call the cache.
            output, _ = self.self_attn(hidden_states, angles, None, cache)
            result: torch.Tensor = output
            return result

    dtype, device = (getattr(weights["o_proj.weight"], name) for name in ("dtype", "device"))
    model = AttentionOnly(llama_config(shape)).to(device, dtype).eval()
    projections = {name: w for name, w in weights.items() if "_proj." in name}
    model.self_attn.load_state_dict(projections)
    # In float32 whatever the dtype of the model: that is how transformers loads it.
    model.rotary_emb = llama.LlamaRotaryEmbedding(model.config).to(device)
    return model


def step(job: Job) -> Step:
    """Its own attention in eager PyTorch."""
    shape, weights, x = read_weights(job)
    model = llama_attention(shape, weights)
    if job.phase == "prefill":
        return ours.torch_step(job, lambda: model(x))
    # The cache that generate() takes where none is asked for: it grows with every token.
    cache = library("transformers").DynamicCache(config=model.config)
    past = job.length - 1
    model(x[:, :past], cache)

    def run() -> torch.Tensor:
        if cache.get_seq_length() > past:
            cache.crop(-1)
        output: torch.Tensor = model(x[:, past:], cache)
        return output

    return ours.torch_step(job, run)


def export(block: Attention, folder: Path, provider: str) -> None:
    """What its own exporter makes of it."""
    exporters = library("transformers.exporters.exporter_onnx")
    model = llama_attention(shape_of(block), block.state_dict())
    example = {"hidden_states": torch.zeros(2, 6, block.hidden_size, dtype=block.dtype)}
    config = exporters.OnnxConfig(dynamic=True, ort_fusions=provider)
    with quiet_torch(), torch.no_grad():
        exported = exporters.OnnxExporter().export(model, example, config=config)
    exporters.OnnxExporter.save_program(exported.program, folder / "model.onnx")


def graph_step(job: Job) -> Step:
    """That graph in onnxruntime."""
    session = ours.opened(job, Path(job.folder) / job.contender)
    inputs = {session.input_names[0]: ours.tokens_of(job)}
    return ours.session_step(job, session, inputs, session.output_names[0])
