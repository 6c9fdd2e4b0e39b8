"""The same block as other libraries make it, with the same weights.

Each is an optional installation; one that is missing, or that has no such block, says so.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rope_export import runtime
from rope_export.bench import steps as ours
from rope_export.bench.turns import Job, Step
from rope_export.rope.pairs import Layout

if TYPE_CHECKING:
    from rope_export.attention.block import Attention
    from rope_export.rope.embedding import RotaryEmbedding

_BUILT_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


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


def _library(name: str) -> Any:
    """A module that may be missing, and whose types are not checked."""
    return importlib.import_module(name)


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


def _shape(block: Attention) -> dict[str, Any]:
    assert block.rope is not None
    return {
        "hidden_size": block.hidden_size,
        "num_heads": block.num_heads,
        "num_kv_heads": block.num_kv_heads,
        "head_dim": block.head_dim,
        "theta": block.rope.theta,
        "longest": block.rope.positions,
    }


def _save_weights(block: Attention, folder: Path, _: str) -> None:
    torch.save(block.state_dict(), folder / "weights.pt")
    (folder / "shape.json").write_text(json.dumps(_shape(block)))


def _read(job: Job) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]:
    from rope_export.proof.arrays import from_numpy

    torch.set_grad_enabled(False)
    folder = Path(job.folder) / job.contender
    weights = torch.load(folder / "weights.pt", map_location=job.provider)
    tokens = from_numpy(ours.tokens_of(job)).to(job.provider)
    return json.loads((folder / "shape.json").read_text()), weights, tokens


def _projected(
    shape: dict[str, Any], weights: dict[str, torch.Tensor], x: torch.Tensor
) -> list[torch.Tensor]:
    """Queries, keys and values ``[B, S, heads, head_dim]``."""
    return [
        torch.nn.functional.linear(x, weights[f"{name}_proj.weight"]).unflatten(
            -1, (-1, shape["head_dim"])
        )
        for name in ("q", "k", "v")
    ]


def _attended(weights: dict[str, torch.Tensor], q: Any, k: Any, v: Any) -> torch.Tensor:
    """PyTorch's attention of ``[B, heads, S, head_dim]`` and the output projection."""
    context = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )
    return torch.nn.functional.linear(context.transpose(1, 2).flatten(2), weights["o_proj.weight"])


def _rotary_embedding_torch(job: Job) -> Step:
    shape, weights, x = _read(job)
    rope = (
        _library("rotary_embedding_torch")
        .RotaryEmbedding(
            dim=shape["head_dim"], theta=shape["theta"], cache_max_seq_len=shape["longest"]
        )
        .to(x.device)
    )

    def run() -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in _projected(shape, weights, x))
        q, k = rope.rotate_queries_or_keys(q), rope.rotate_queries_or_keys(k)
        return _attended(weights, q, k, v)

    return ours.torch_step(job, run)


def _llama_config(shape: dict[str, Any], **more: Any) -> Any:
    return _library("transformers").LlamaConfig(
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


def _llama_attention(shape: dict[str, Any], weights: dict[str, torch.Tensor]) -> Any:
    """A model of transformers that is one attention and its angles."""
    llama = _library("transformers.models.llama.modeling_llama")

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
            output, _ = self.self_attn(
                hidden_states, angles, attention_mask=None, past_key_values=cache
            )
            result: torch.Tensor = output
            return result

    dtype, device = (getattr(weights["o_proj.weight"], name) for name in ("dtype", "device"))
    model = AttentionOnly(_llama_config(shape)).to(device, dtype).eval()
    projections = {name: w for name, w in weights.items() if "_proj." in name}
    model.self_attn.load_state_dict(projections)
    # In float32 whatever the dtype of the model: that is how transformers loads it.
    model.rotary_emb = llama.LlamaRotaryEmbedding(model.config).to(device)
    return model


def _transformers(job: Job) -> Step:
    shape, weights, x = _read(job)
    model = _llama_attention(shape, weights)
    if job.phase == "prefill":
        return ours.torch_step(job, lambda: model(x))
    # The cache that generate() takes where none is asked for: it grows with every token.
    cache = _library("transformers").DynamicCache(config=model.config)
    past = job.length - 1
    model(x[:, :past], cache)

    def run() -> torch.Tensor:
        if cache.get_seq_length() > past:
            cache.crop(-1)
        output: torch.Tensor = model(x[:, past:], cache)
        return output

    return ours.torch_step(job, run)


def _export_by_transformers(block: Attention, folder: Path, provider: str) -> None:
    from rope_export.exporting.tracing import quiet_torch

    exporters = _library("transformers.exporters.exporter_onnx")
    model = _llama_attention(_shape(block), block.state_dict())
    example = {"hidden_states": torch.zeros(2, 6, block.hidden_size, dtype=block.dtype)}
    config = exporters.OnnxConfig(dynamic=True, ort_fusions=provider)
    with quiet_torch(), torch.no_grad():
        exported = exporters.OnnxExporter().export(model, example, config=config)
    exporters.OnnxExporter.save_program(exported.program, folder / "model.onnx")


def _graph_of_one_input(job: Job) -> Step:
    session = ours.opened(job, Path(job.folder) / job.contender)
    inputs = {session.input_names[0]: ours.tokens_of(job)}
    return ours.session_step(job, session, inputs, session.output_names[0])


def _build_with_genai(block: Attention, folder: Path, provider: str) -> None:
    """One layer by onnxruntime-genai's builder; the attention is cut out of its graph."""
    import onnx

    transformers, tokenizers = _library("transformers"), _library("tokenizers")
    shape = _shape(block)
    source, built = folder / "checkpoint", folder / "built"
    model = transformers.LlamaForCausalLM(_llama_config(shape)).to(block.dtype)
    projections = {name: w for name, w in block.state_dict().items() if "_proj." in name}
    model.model.layers[0].self_attn.load_state_dict(projections)
    model.save_pretrained(source)
    # It wants a tokenizer.
    words = tokenizers.models.WordLevel({str(i): i for i in range(8)}, unk_token="0")
    tokenizer = tokenizers.Tokenizer(words)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(source)
    dtype = str(block.dtype).removeprefix("torch.")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(source), "-o", str(built), "-c", str(folder / "cache")]
    command += ["-p", _BUILT_TYPES[dtype], "-e", provider]
    command += ["--extra_options", "exclude_embeds=1", "exclude_lm_head=1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError((result.stderr.strip().splitlines() or ["the builder failed"])[-1])
    graph = onnx.load(built / "model.onnx")
    _cut_out_attention(graph.graph)
    onnx.save(graph, folder / "model.onnx")
    (folder / "shape.json").write_text(json.dumps(shape))


def _cut_out_attention(graph: Any) -> None:
    """Leave what lies between the norm before the attention and the sum after it."""
    start, end = "/model/layers.0/input_layernorm/output_0", "/model/layers.0/attn/o_proj/"
    wanted = {"present.0.key", "present.0.value"}
    wanted |= {out for node in graph.node for out in node.output if out.startswith(end)}
    kept = []
    for node in reversed(graph.node):
        if wanted & set(node.output) and start not in node.output:
            kept.append(node)
            wanted |= set(node.input)
    for node in kept:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == start:
                    names[index] = "hidden_states"
                elif name.startswith(end):
                    names[index] = "output"
    outputs = [o for o in graph.output if o.name.startswith("present")]
    (states,) = (o for o in graph.output if o.name == "hidden_states")
    states.name = "output"
    inputs = [i for i in graph.input if i.name in wanted]
    (embeddings,) = (i for i in graph.input if i.name == "inputs_embeds")
    embeddings.name = "hidden_states"
    weights = [w for w in graph.initializer if w.name in wanted]
    for field, values in (
        (graph.node, reversed(kept)),
        (graph.input, [embeddings, *inputs]),
        (graph.output, [states, *outputs]),
        (graph.initializer, weights),
        (graph.value_info, []),
    ):
        copies = [copy.deepcopy(value) for value in values]
        del field[:]
        field.extend(copies)


def _genai(job: Job) -> Step:
    """As onnxruntime-genai runs it: past and present are one buffer, but for a first prompt."""
    session = ours.opened(job, Path(job.folder) / job.contender)
    tokens = ours.tokens_of(job)
    batch, past = len(tokens), job.length - 1
    shape = json.loads((Path(job.folder) / job.contender / "shape.json").read_text())
    heads, width = shape["num_kv_heads"], shape["head_dim"]
    kinds = ("key", "value")
    empty = np.zeros((batch, heads, 0, width), tokens.dtype)
    names = {f"past_key_values.0.{kind}": empty for kind in kinds}
    if job.phase == "prefill":
        mask = np.ones((batch, job.length), np.int64)
        inputs = {"hidden_states": tokens, "attention_mask": mask, **names}
        return ours.session_step(job, session, inputs, "output")
    mask = np.ones((batch, past), np.int64)
    filled = session.run({"hidden_states": tokens[:, :-1], "attention_mask": mask, **names})
    room = np.zeros((batch, heads, 1, width), tokens.dtype)
    arrays = [np.concatenate((filled[f"present.0.{kind}"], room), axis=2) for kind in kinds]
    buffers = [runtime.on_device(array, job.provider) for array in arrays]
    given = [tokens[:, -1:], np.ones((batch, job.length), np.int64)]
    values = [runtime.on_device(array, job.provider) for array in given]
    binding = session.raw.io_binding()

    def run() -> Any:
        for name, value in zip(("hidden_states", "attention_mask"), values, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("output", job.provider)
        for kind, buffer in zip(kinds, buffers, strict=True):
            binding.bind_ortvalue_input(f"past_key_values.0.{kind}", buffer)
            binding.bind_ortvalue_output(f"present.0.{kind}", buffer)
        session.raw.run_with_iobinding(binding)
        return binding.get_outputs()[0]

    return Step(
        run,
        lambda value: ours.answered(job, runtime.from_ort(value)),
        ours.device_memory(job.provider),
        kept=(arrays, given),
    )


def _torchtune(job: Job) -> Step:
    shape, weights, x = _read(job)
    rope = (
        _library("torchtune.modules")
        .RotaryPositionalEmbeddings(
            shape["head_dim"], max_seq_len=shape["longest"], base=shape["theta"]
        )
        .to(x.device)
    )

    def run() -> torch.Tensor:
        q, k, v = _projected(shape, weights, x)
        heads = (rope(q), rope(k), v)
        return _attended(weights, *(t.transpose(1, 2) for t in heads))

    return ours.torch_step(job, run)


def _flash_attn(job: Job) -> Step:
    attend = _library("flash_attn").flash_attn_func
    shape, weights, x = _read(job)
    layer = _library("flash_attn.layers.rotary").RotaryEmbedding
    rope = layer(shape["head_dim"], base=shape["theta"], device=x.device)

    def run() -> torch.Tensor:
        q, k, v = _projected(shape, weights, x)
        q, kv = rope(q, torch.stack((k, v), dim=2))
        context = attend(q, *kv.unbind(2), causal=True)
        return torch.nn.functional.linear(context.flatten(2), weights["o_proj.weight"])

    return ours.torch_step(job, run)


def _liger(job: Job) -> Step:
    turn = _library("liger_kernel.transformers.rope").liger_rotary_pos_emb
    llama = _library("transformers.models.llama.modeling_llama")
    shape, weights, x = _read(job)
    angles = llama.LlamaRotaryEmbedding(_llama_config(shape)).to(x.device)
    places = torch.arange(job.length, device=x.device)[None]

    def run() -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in _projected(shape, weights, x))
        q, k = turn(q, k, *angles(x, places))
        return _attended(weights, q, k, v)

    return ours.torch_step(job, run)


PEERS = {
    "rotary-embedding-torch": Peer(
        "rotary_embedding_torch",
        "rotary-embedding-torch",
        "interleaved",
        _save_weights,
        _rotary_embedding_torch,
    ),
    "transformers": Peer(
        "transformers",
        "transformers",
        "half",
        _save_weights,
        _transformers,
        phases=("prefill", "decode"),
    ),
    "transformers-onnx": Peer(
        "transformers", "transformers", "half", _export_by_transformers, _graph_of_one_input
    ),
    "genai": Peer(
        "onnxruntime_genai",
        "--no-deps onnxruntime-genai (its onnxruntime would break onnxruntime-gpu)",
        "half",
        _build_with_genai,
        _genai,
        phases=("prefill", "decode"),
    ),
    "torchtune": Peer("torchtune", "torchtune torchao", "interleaved", _save_weights, _torchtune),
    "flash-attn": Peer("flash_attn", "flash-attn", "half", _save_weights, _flash_attn, cuda=True),
    "liger": Peer("liger_kernel", "liger-kernel", "half", _save_weights, _liger, cuda=True),
}
NAMES = tuple(PEERS)
STEPS = {name: peer.step for name, peer in PEERS.items()}
