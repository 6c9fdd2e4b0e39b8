"""`export`: the operators asked for, axes that stay dynamic, nothing of this machine inside."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mutants
import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from selection import slow_unless

from rope_export import Attention, BadInputError, ExportError, RotaryEmbedding, export
from rope_export.artifacts.targets import OPSETS, TARGETS
from rope_export.exporting import tracing
from rope_export.exporting.block import BlockRequest
from rope_export.proof.reference import attention_truth

FUSED = {
    "ort": {"com.microsoft::GroupQueryAttention": 1, "MatMul": 2},
    "onnx": {"Attention": 1, "RotaryEmbedding": 2, "MatMul": 4},
    "primitive": {"Softmax": 1, "MatMul": 6},
}
KINDS = {"Attention", "RotaryEmbedding", "MatMul", "Softmax"}
DTYPES = ("float32", "float16")


def notable(ops: dict[str, int]) -> dict[str, int]:
    return {name: n for name, n in ops.items() if "::" in name or name in KINDS}


def axes(value: onnx.ValueInfoProto) -> list[str | int]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("target", TARGETS)
def test_operators_interface_and_versions(proven_block, target):
    result = proven_block(target)
    assert notable(result.ops) == FUSED[target]
    model = onnx.load(result.model)
    assert model.ir_version <= 11
    (opset,) = [o.version for o in model.opset_import if o.domain == ""]
    assert opset == OPSETS[target] <= 24
    ((name, shape),) = [(v.name, axes(v)) for v in model.graph.input]
    assert (name, shape) == ("hidden_states", ["batch", "sequence", mutants.HIDDEN])
    ((name, shape),) = [(v.name, axes(v)) for v in model.graph.output]
    assert (name, shape) == ("output", ["batch", "sequence", mutants.HIDDEN])
    if target != "ort":
        onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_of_this_machine_is_inside(proven_block, target):
    result = proven_block(target)
    model = onnx.load(result.model)
    text = re.sub(rb"[^ -~]+", b"\n", result.model.read_bytes()).decode()
    folders = [str(folder) for folder in (Path.cwd(), Path.home(), result.path.parent)]
    for place in (*folders, "site-packages", ".py", "pkg."):
        assert place not in text
    for part in (model, model.graph, *model.graph.node, *model.graph.initializer):
        assert not part.metadata_props
        assert not part.doc_string


@pytest.mark.parametrize(
    ("target", "layout", "position_ids"),
    slow_unless(
        lambda *row: row == ("onnx", "half", True),
        [
            ("onnx", "half", False),
            ("onnx", "half", True),
            ("onnx", "interleaved", False),
            ("onnx", "interleaved", True),
            ("primitive", "half", True),
            ("primitive", "interleaved", False),
        ],
    ),
)
def test_onnx_reference_evaluator_agrees(tmp_path, target, layout, position_ids):
    """ONNX's own executable specification, independent of onnxruntime's kernels."""
    block = mutants.block(layout=layout, rotary_dim=8, qkv_bias=True)
    result = export(block, tmp_path / "block", target=target, position_ids=position_ids)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 11, mutants.HIDDEN)).astype(np.float32)
    feed, ids = {"hidden_states": x}, None
    if position_ids:
        feed["position_ids"] = rng.integers(0, mutants.LONGEST, (2, 11))
        ids = torch.from_numpy(feed["position_ids"])
    (output,) = ReferenceEvaluator(str(result.model)).run(None, feed)
    truth = attention_truth(block, torch.from_numpy(x), position_ids=ids)
    np.testing.assert_allclose(output, truth.numpy(), rtol=1e-4, atol=2e-6)


YARN, LONGROPE = mutants.YARN, mutants.LONGROPE
# One row for each way a feature meets a target; operators that must and must not occur.
VARIANTS = [
    ("ort", {}, {}, {"com.microsoft::GroupQueryAttention": 1, "MatMul": 2}),
    ("ort", {"num_kv_heads": 1}, {}, {"com.microsoft::GroupQueryAttention": 1, "MatMul": 2}),
    ("ort", {"num_kv_heads": 4}, {}, {"com.microsoft::GroupQueryAttention": 1, "MatMul": 2}),
    ("ort", {"layout": "interleaved"}, {}, {"com.microsoft::GroupQueryAttention": 1, "MatMul": 2}),
    ("ort", {"qkv_bias": True}, {}, {"com.microsoft::GroupQueryAttention": 1, "MatMul": 2}),
    (
        "ort",
        {"head_dim": 40},
        {},
        {"com.microsoft::GroupQueryAttention": 1, "RotaryEmbedding": 2, "MatMul": 4},
    ),
    (
        "ort",
        {"rotary_dim": 8},
        {},
        {"com.microsoft::GroupQueryAttention": 1, "RotaryEmbedding": 2, "MatMul": 4},
    ),
    (
        "ort",
        {},
        {"position_ids": True},
        {"com.microsoft::GroupQueryAttention": 1, "RotaryEmbedding": 2, "MatMul": 4},
    ),
    (
        "ort",
        {"causal": False},
        {},
        {"com.microsoft::MultiHeadAttention": 1, "RotaryEmbedding": 2, "MatMul": 4},
    ),
    ("ort", {"head_dim": 12}, {}, {"Attention": 1, "RotaryEmbedding": 2, "MatMul": 4}),
    ("onnx", {"head_dim": 2}, {}, {"Attention": 1, "RotaryEmbedding": 2, "MatMul": 4}),
    ("onnx", {"causal": False}, {}, {"Attention": 1, "RotaryEmbedding": 2, "MatMul": 4}),
    ("onnx", {}, {"position_ids": True}, {"Attention": 1, "RotaryEmbedding": 2, "MatMul": 4}),
    ("onnx", {"rotary_dim": 4}, {}, {"Attention": 1, "RotaryEmbedding": 2, "MatMul": 4}),
    ("primitive", {"causal": False, "layout": "interleaved"}, {}, {"Softmax": 1, "MatMul": 6}),
    ("primitive", {"rotary_dim": 4}, {"position_ids": True}, {"Softmax": 1, "MatMul": 6}),
    ("ort", {"scaling": YARN}, {}, {"com.microsoft::GroupQueryAttention": 1, "MatMul": 2}),
    ("onnx", {"scaling": YARN}, {}, {"Attention": 1, "RotaryEmbedding": 2, "MatMul": 4}),
    ("primitive", {"scaling": YARN}, {}, {"Softmax": 1, "MatMul": 6}),
    (
        "ort",
        {"scaling": LONGROPE},
        {},
        {"com.microsoft::GroupQueryAttention": 1, "RotaryEmbedding": 2, "MatMul": 4},
    ),
    ("onnx", {"scaling": LONGROPE}, {}, {"Attention": 1, "RotaryEmbedding": 2, "MatMul": 4}),
    (
        "onnx",
        {"scaling": LONGROPE},
        {"position_ids": True},
        {"Attention": 1, "RotaryEmbedding": 2, "MatMul": 4},
    ),
    ("primitive", {"scaling": LONGROPE}, {}, {"Softmax": 1, "MatMul": 6}),
]


# Interleaved, the whole width not rotated, positions as an input, and a scaling with two tables.
BY_DEFAULT = {
    *(VARIANTS.index(row) for row in VARIANTS if row[:2] == ("ort", {"layout": "interleaved"})),
    *(VARIANTS.index(row) for row in VARIANTS if row[:2] == ("ort", {"rotary_dim": 8})),
    *(VARIANTS.index(row) for row in VARIANTS if row[0] == "ort" and "position_ids" in row[2]),
    *(VARIANTS.index(row) for row in VARIANTS if row[:2] == ("ort", {"scaling": LONGROPE})),
}


def in_dtypes() -> Iterator[tuple[Any, ...]]:
    """The first row of every set of operators in both dtypes, others in one or the other.

    By default run the first of every set, in one dtype, and what differs most from it.
    """
    seen = set()
    for index, row in enumerate(VARIANTS):
        operators = row[0], *row[3]
        is_first = operators not in seen
        seen.add(operators)
        for dtype in DTYPES if is_first else DTYPES[index % 2 :][:1]:
            by_default = dtype == DTYPES[index % 2] if is_first else index in BY_DEFAULT
            yield pytest.param(*row, dtype, marks=() if by_default else pytest.mark.slow)


@pytest.mark.parametrize(("target", "shape", "options", "ops", "dtype"), [*in_dtypes()])
def test_variants_lower_as_ruled_and_are_proven(tmp_path, target, shape, options, ops, dtype):
    block = mutants.block(dtype, **shape)
    result = export(block, tmp_path / "block", target=target, validate=True, **options)
    assert notable(result.ops) == ops
    assert result.report.passed, result.report.to_markdown()


@pytest.mark.parametrize(
    ("target", "longest"),
    slow_unless(
        lambda *row: row in (("ort", 1), ("onnx", 2)),
        [("ort", 1), ("ort", 2), ("ort", 7), ("onnx", 1), ("onnx", 2), ("primitive", 1)],
    ),
)
def test_short_tables(tmp_path, target, longest):
    result = export(
        mutants.block(max_seq_len=longest), tmp_path / "block", target=target, validate=True
    )
    assert result.report.passed
    assert max(case.sequence for case in result.report.cases) == longest


@pytest.mark.parametrize(
    ("target", "batch"),
    slow_unless(
        lambda *row: row in (("ort", 3), ("onnx", 3)),
        [("ort", 1), ("ort", 3), ("onnx", 3), ("primitive", 1)],
    ),
)
def test_static_graphs_have_one_shape(tmp_path, target, batch):
    result = export(
        mutants.block(), tmp_path / "block", target=target, static=True, batch=batch, validate=True
    )
    assert result.report.passed
    model = onnx.load(result.model)
    assert axes(model.graph.input[0]) == [batch, mutants.LONGEST, mutants.HIDDEN]
    assert axes(model.graph.output[0]) == [batch, mutants.LONGEST, mutants.HIDDEN]


@pytest.mark.parametrize(
    ("target", "with_rope"),
    slow_unless(
        lambda *row: row in (("ort", False), ("onnx", True)),
        [("ort", False), ("ort", True), ("onnx", True), ("primitive", False)],
    ),
)
def test_a_block_without_rope_and_one_without_a_table(tmp_path, target, with_rope):
    torch.manual_seed(0)
    rope = RotaryEmbedding(16, layout="half") if with_rope else None
    block = Attention(64, 4, num_kv_heads=2, head_dim=16, rope=rope)
    result = export(block, tmp_path / "block", target=target, max_seq_len=40, validate=True)
    assert result.report.passed, result.report.to_markdown()


def test_training_mode_and_warm_calls_leave_no_trace(proven_block, tmp_path):
    block = mutants.block()
    cold = proven_block().model.read_bytes()
    block.train()
    block(torch.randn(1, 9, mutants.HIDDEN))
    warm = export(block, tmp_path / "warm").model.read_bytes()
    assert block.training
    assert cold == warm


class LengthBaked(Attention):
    """Reads the length once too often: a length of eight or more takes another path."""

    def forward(self, hidden_states, **given):
        if hidden_states.shape[1] > 7:
            hidden_states = hidden_states * 2
        return super().forward(hidden_states, **given)


class BatchBaked(Attention):
    """A reshape that fixes the batch."""

    def forward(self, hidden_states, **given):
        hidden_states = hidden_states.reshape(2, -1, self.hidden_size)
        return super().forward(hidden_states, **given)


@pytest.mark.parametrize("kind", [LengthBaked, BatchBaked])
def test_an_axis_that_does_not_stay_dynamic_fails_the_export(tmp_path, kind):
    rope = RotaryEmbedding(16, layout="half", max_seq_len=64)
    block = kind(64, 4, head_dim=16, rope=rope)
    with pytest.raises(ExportError, match="narrowed an axis"):
        export(block, tmp_path / "block")
    assert list(tmp_path.iterdir()) == []


class Doubling(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.mark.parametrize(
    ("dims", "says"),
    [
        ({0: torch.export.Dim("b", min=1, max=100)}, "axis 1 of x was to be dynamic"),
        (
            {0: torch.export.Dim("b", min=1, max=100), 1: torch.export.Dim("s", min=1, max=50)},
            "axis 1 of x was to serve 1 … 64 and came out as 1 … 50",
        ),
        (
            {0: torch.export.Dim("b", min=2, max=100), 1: torch.export.Dim("s", min=1, max=64)},
            "axis 0 of x was to serve 1 … 100 and came out as 2 … 100",
        ),
    ],
)
def test_ranges_are_checked_against_what_was_asked(dims, says):
    program = torch.export.export(Doubling(), (torch.ones(3, 5),), dynamic_shapes={"x": dims})
    with pytest.raises(ExportError, match=re.escape(says)):
        tracing.check_ranges(program, {"x": {0: (1, 100), 1: (1, 64)}})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target": "tflite"}, "target must be one of ort, onnx, primitive, got 'tflite'"),
        ({"providers": ["tpu"]}, "providers must be some of cpu, cuda, got 'tpu'"),
        ({"providers": []}, "providers must be some of cpu, cuda, got none"),
        ({"max_seq_len": 0}, "max_seq_len must be at least 1, got 0"),
        ({"max_seq_len": 49}, "at most the 48 positions .*got 49"),
        ({"batch": 2}, "batch is for static graphs.*batch=2"),
        ({"batch": 0, "static": True}, "batch must be at least 1, got 0"),
    ],
)
def test_arguments_are_checked_before_anything_is_written(tmp_path, options, says):
    with pytest.raises(BadInputError, match=says):
        export(mutants.block(), tmp_path / "block", **options)
    assert list(tmp_path.iterdir()) == []


def test_mixed_dtypes_are_refused(tmp_path):
    block = mutants.block()
    block.o_proj.half()
    with pytest.raises(BadInputError, match=r"one dtype .* got float16, float32"):
        export(block, tmp_path / "block")


def test_a_plan_survives_its_configuration():
    plan = BlockRequest.checked(
        mutants.block(),
        target="onnx",
        providers=["cpu", "cuda", "cpu"],
        max_seq_len=None,
        position_ids=True,
        static=False,
        batch=1,
        seed=5,
    )
    assert plan.providers == ("cpu", "cuda")
    assert BlockRequest.from_json(plan.to_json(), plan.block) == plan


class Adapted(torch.nn.Module):
    """An adapter as PEFT libraries have it: the weight is still there, and is not all."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.delta = torch.nn.Linear(base.in_features, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.delta(x)


class Louder(Attention):
    """Attention that its attributes say nothing of."""

    def forward(self, hidden_states, **given):
        return 1.05 * super().forward(hidden_states, **given)


def adapted(block):
    block.v_proj = Adapted(block.v_proj)


def hooked(block):
    block.o_proj.register_forward_hook(lambda _module, _given, output: 2 * output)


def subclassed(block):
    block.__class__ = Louder


@pytest.mark.parametrize(
    ("target", "change", "message"),
    [
        *(
            (target, change, message)
            for target in TARGETS
            for change, message in (
                (adapted, "v_proj must be a plain nn.Linear, .* got Adapted: merge adapters"),
                (hooked, "o_proj must have no forward hooks"),
            )
        ),
        # By its numbers, which no target has a part in.
        ("ort", subclassed, "eager PyTorch is off its float64 truth by 0.05"),
    ],
)
def test_what_weights_do_not_say_is_refused_not_left_out(tmp_path, target, change, message):
    block = mutants.block()
    change(block)
    with pytest.raises(BadInputError, match=message):
        export(block, tmp_path / "block", target=target, validate=True)
    assert list(tmp_path.iterdir()) == []
