"""Inspection says of exported graphs what is known from how they were built."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import onnx
import pytest
import torch
from inspected import GQA, MHA, WRITTEN_OUT, rotating
from selection import slow_unless

from rope_export import Attention, RotaryEmbedding, export
from rope_export.attention.random_block import random_block
from rope_export.inspection.report import inspect_model

LONGEST = 48


def counted(graph: onnx.GraphProto) -> Counter[str]:
    """Operators of a graph and its subgraphs, straight from the file."""
    counts: Counter[str] = Counter()
    for node in graph.node:
        counts[f"{node.domain}::{node.op_type}" if node.domain else node.op_type] += 1
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                counts += counted(attribute.g)
    return counts


# --- exports of this package ----------------------------------------------------------------

# What is exported, and: operator that rotates, how often, layout, width, angles, positions' input;
# operator that attends, how often, heads, key/value heads, where scores are in memory.
EXPORTS = {
    "ort, float16, cache": (
        {"dtype": "float16"},
        {"target": "ort", "cache": True},
        (GQA, 3, "half", 16, "table", ()),  # one token, the whole batch, and row by row
        (GQA, 3, 4, 2, "never"),
    ),
    "ort, window, cache": (
        {"window": 8, "max_seq_len": 1024, "layout": "interleaved"},
        {"target": "ort", "cache": True},
        ("RotaryEmbedding", 2, "interleaved", 16, "table", ("attention_mask",)),
        (GQA, 4, 4, 2, "never"),  # one token, by blocks, at once, row by row
    ),
    "ort, sinks, not causal": (
        {"sinks": True, "causal": False},
        {"target": "ort"},
        (GQA, 1, "half", 16, "table", ()),
        (GQA, 1, 4, 2, "on cpu"),
    ),
    "onnx, partial, interleaved, positions": (
        {"rotary_dim": 8, "layout": "interleaved"},
        {"target": "onnx", "position_ids": True},
        ("RotaryEmbedding", 2, "interleaved", 8, "table", ("position_ids",)),
        ("Attention", 1, 4, 2, "on cpu"),
    ),
    "onnx, float16, cache": (
        {"dtype": "float16"},
        {"target": "onnx", "cache": True},
        ("RotaryEmbedding", 2, "half", 16, "table", ("attention_mask",)),
        ("Attention", 1, 4, 2, "on cpu"),
    ),
    "primitive, float16, partial, interleaved, cache": (
        {"dtype": "float16", "rotary_dim": 8, "layout": "interleaved"},
        {"target": "primitive", "cache": True},
        ("arithmetic", 2, "interleaved", 8, "table", ("attention_mask",)),
        (WRITTEN_OUT, 1, None, None, "always"),
    ),
    "primitive, angles by length": (
        {
            "scaling": {
                "rope_type": "dynamic",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        {"target": "primitive"},
        ("arithmetic", 2, "half", 16, "computed", ()),
        (WRITTEN_OUT, 1, None, None, "always"),
    ),
    "primitive, static": (
        {},
        {"target": "primitive", "static": True},
        ("arithmetic", 2, "half", 16, "constant", ()),
        (WRITTEN_OUT, 1, None, None, "always"),
    ),
}


@pytest.mark.parametrize(
    "name",
    slow_unless(
        lambda name: name in ("ort, window, cache", "primitive, static") or "positions" in name,
        EXPORTS,
    ),
)
def test_own_exports(name, tmp_path):
    shape, options, rotation, attends = EXPORTS[name]
    size = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": LONGEST}
    block = random_block(**{**size, **shape})
    result = export(block, tmp_path / "block", validate=False, **options)
    model = onnx.load(result.path / "model.onnx")
    report = inspect_model(result.path / "model.onnx")

    operator, count, layout, width, kind, positions = rotation
    longest = shape.get("max_seq_len", LONGEST)
    (found,) = report.rotations
    assert (found.operator, len(found.nodes), found.layout) == (operator, count, layout)
    assert (found.width, found.angles.kind, found.angles.positions) == (width, kind, positions)
    assert (report.positions, report.longest) == ("bounded", longest)
    if kind != "computed":
        half = shape.get("dtype") == "float16" and operator == GQA  # else tables stay float32
        assert [table.shape for table in found.angles.tables] == [(longest, width // 2)] * 2
        assert sum(t.bytes for t in found.angles.tables) == longest * width * (2 if half else 4)

    operator, count, heads, kv_heads, scores = attends
    (use,) = report.attention
    assert (use.operator, len(use.nodes), use.scores) == (operator, count, scores)
    assert (use.heads, use.kv_heads) == (heads, kv_heads)
    assert use.window == (shape.get("window") if operator == GQA else None)

    assert report.operators == counted(model.graph)
    assert report.ir_version == model.ir_version
    assert report.opsets["ai.onnx"] == {"ort": 23, "onnx": 23, "primitive": 18}[options["target"]]
    assert report.producer.startswith("rope-export ")
    assert report.weights[shape.get("dtype", "float32")] >= 64 * (64 + 32 + 32 + 64) * 2
    assert (report.external, report.local_paths) == ((), None)
    if options.get("static"):
        assert report.inputs[0].axes == (1, LONGEST, 64)
        assert [mask.length for mask in report.masks] == [LONGEST]
        assert any("constants of 48 tokens" in note for note in report.notes)
        assert any("no axis of any input is dynamic" in note for note in report.notes)
    else:
        assert report.inputs[0].axes == ("batch", "sequence", 64)
        assert report.notes == ()
    if options.get("cache"):
        assert report.cache is not None
        assert report.cache.layers == 1
        assert report.cache.inputs == ("past_key", "past_value")
        assert report.cache.outputs == ("present_key", "present_value")
        assert report.cache.axes == ("batch", 2, "past_sequence", 16)
    else:
        assert report.cache is None


def test_without_a_longest_position_and_both_ways(tmp_path):
    rope = RotaryEmbedding(8, layout="half")
    block = Attention(64, 4, causal=False, rope=rope).eval()
    result = export(block, tmp_path / "endless", target="ort", validate=False)
    report = inspect_model(result.path / "model.onnx")
    assert (report.positions, report.longest) == ("bounded", 2**25)  # beyond them is NaN
    (rotation,) = report.rotations
    assert (rotation.operator, rotation.layout, rotation.width) == ("RotaryEmbedding", "half", 8)
    assert len(rotation.angles.tables) == 4  # two pairs, composed
    assert [(use.operator, use.scores) for use in report.attention] == [(MHA, "never")]


def test_what_is_not_causal_keeps_scores_unless_it_is_scanned_by_blocks(tmp_path):
    rope = RotaryEmbedding(16, layout="half", max_seq_len=1024)
    block = Attention(64, 4, causal=False, sinks=True, rope=rope).eval()
    result = export(block, tmp_path / "blocks", target="ort", validate=False)
    report = inspect_model(result.path / "model.onnx")
    # One call up to 256 tokens; blocks of queries beyond.
    uses = [(use.operator, len(use.nodes), use.scores) for use in report.attention]
    assert sorted(uses) == [(GQA, 1, "never"), (GQA, 1, "on cpu")]


# --- plain exports --------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
)
@pytest.mark.filterwarnings("ignore:# The axis name:UserWarning")
def test_a_plain_export_of_a_llama(tmp_path):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rotary = LlamaRotaryEmbedding(config)
            self.attention = LlamaAttention(config, 0)

        def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            turns = self.rotary(hidden, position_ids)
            return self.attention(hidden, turns, attention_mask=None)[0]

    path = tmp_path / "llama.onnx"
    axes = ({0: "batch", 1: "sequence"},) * 2
    inputs = torch.zeros(2, 9, 64), torch.arange(9).expand(2, -1)
    torch.onnx.export(Layer().eval(), inputs, path, dynamo=True, dynamic_shapes=axes, verbose=False)
    plain = onnx.load(path, load_external_data=False)
    report = inspect_model(path)
    (rotation,) = report.rotations
    assert (rotation.operator, len(rotation.nodes)) == ("arithmetic", 2)  # q and k
    assert (rotation.layout, rotation.width) == ("half", 16)
    assert (rotation.angles.kind, rotation.angles.tables) == ("computed", ())
    assert rotation.angles.positions == ("position_ids",)
    assert (report.positions, report.longest) == ("unbounded", None)
    (use,) = report.attention
    assert (use.operator, len(use.nodes), use.scores) == (WRITTEN_OUT, 1, "always")
    assert [each.axes for each in report.inputs] == [
        ("batch", "sequence", 64),
        ("batch", "sequence"),
    ]
    assert report.operators == counted(plain.graph)
    traced = sum(
        any('File "/' in entry.value for entry in node.metadata_props) for node in plain.graph.node
    )
    assert traced > 30
    assert report.local_paths is not None
    assert report.local_paths.nodes == traced
    assert report.local_paths.example.endswith(".py")
    assert any(f"{traced} nodes carry local file paths" in note for note in report.notes)
    (file,) = report.external
    assert (file.name, file.problem) == ("llama.onnx.data", None)


def test_nothing_heavy_is_imported(tmp_path, artifact_of_block):
    script = (
        "import sys\n"
        "from rope_export._cli.inspect import inspect\n"
        "inspect(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'torch', 'onnxruntime'} & set(sys.modules)\n"
    )
    for given in (["--help"], [str(rotating(tmp_path))], [str(artifact_of_block.path), "--json"]):
        result = subprocess.run(
            [sys.executable, "-c", script, *given], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        assert result.stdout
