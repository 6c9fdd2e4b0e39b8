"""The block as onnxruntime-genai's builder makes it, cut out of a whole model's graph."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from rope_export import runtime
from rope_export.attention.block import Attention
from rope_export.bench import steps as ours
from rope_export.bench.peer_transformers import llama_config
from rope_export.bench.peer_weights import library, shape_of
from rope_export.bench.turns import Job, Step

_BUILT_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def build(block: Attention, folder: Path, provider: str) -> None:
    """One layer by onnxruntime-genai's builder; the attention is cut out of its graph."""
    import onnx

    transformers, tokenizers = library("transformers"), library("tokenizers")
    shape = shape_of(block)
    source, built = folder / "checkpoint", folder / "built"
    model = transformers.LlamaForCausalLM(llama_config(shape)).to(block.dtype)
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


def step(job: Job) -> Step:
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
