"""Graphs whose cache holds integers: proven, in every target to the last integer, and mutants."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cached_mutants import nodes_of
from mutants import change, table
from onnx import TensorProto, helper, numpy_helper
from selection import slow_unless

from rope_export import Attention, Report, export, replay, validate
from rope_export.artifacts.files import sha256
from rope_export.artifacts.targets import TARGETS
from rope_export.attention.random_block import random_block
from rope_export.inspection.report import inspect_model
from rope_export.proof.reference import attention_truth
from rope_export.runtime import Decoder

DTYPES = ("int8", "int4")
HIDDEN, HEADS, KV_HEADS, WIDTH, LONGEST = 64, 4, 2, 16, 48
KEY, VALUE = "cache_rounding.key_scale", "cache_rounding.value_scale"
DRIVEN = {
    "prefill and decode",
    "prefill and decode, rows of different lengths",
    "padded chunks",
}


def block_of(**changes: object) -> Attention:
    shape = {"hidden_size": HIDDEN, "num_heads": HEADS, "num_kv_heads": KV_HEADS}
    return random_block(**{**shape, "head_dim": WIDTH, "max_seq_len": LONGEST, **changes})


class Exports:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.block = block_of()
        self.known: dict[tuple[str, str], Path] = {}

    def get(self, target: str, dtype: str) -> Path:
        if (target, dtype) not in self.known:
            folder = self.root / f"{target}-{dtype}"
            export(self.block, folder, target=target, cache=True, cache_dtype=dtype, validate=True)
            self.known[target, dtype] = folder
        return self.known[target, dtype]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("integers"))


@pytest.fixture(scope="module", params=[(t, d) for t in TARGETS for d in DTYPES], ids="-".join)
def graph(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def report_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "report.json").read_text())


def test_right_graphs_pass_and_every_integer_is_compared(exports, graph):
    report = report_of(exports.get(*graph))
    assert report["passed"]
    stored = {c["name"] for c in report["cases"] if c["tensor"].startswith("present_")}
    assert {c["name"] for c in report["cases"]} - stored == DRIVEN
    for case in report["cases"]:
        if case["tensor"] != "output":
            assert case["rel_error"] == case["eager_rel_error"] == 0  # of integers: how many differ
            assert case["row_tolerance"] < 1 / (KV_HEADS * WIDTH)
            assert "loss" not in case


def test_what_the_graph_takes_and_gives(exports, graph):
    target, dtype = graph
    model = onnx.load(exports.get(target, dtype) / "model.onnx")
    element, width = {"int8": (TensorProto.INT8, 16), "int4": (TensorProto.UINT8, 8)}[dtype]
    values = [*model.graph.input, *model.graph.output]
    caches = [value for value in values if value.name.startswith(("past_", "present_"))]
    assert len(caches) == 4
    for value in caches:
        kind = value.type.tensor_type
        assert kind.elem_type == element
        assert [kind.shape.dim[i].dim_value for i in (1, 3)] == [KV_HEADS, width]
    assert bool(nodes_of(model, "GroupQueryAttention")) == (target == "ort")


def test_the_loss_is_reported_beside_the_lowering_and_is_that_of_float64(exports):
    folder = exports.get("ort", "int8")
    report, text = report_of(folder), (folder / "report.md").read_text()
    losses = {c["name"]: c["loss"] for c in report["cases"] if c["tensor"] == "output"}
    quiet = {name: loss for name, loss in losses.items() if "loud" not in name}
    assert set(losses) - set(quiet) == {"loud inputs", "decode, loud"}
    assert 1e-3 < max(quiet.values()) < 0.06
    assert min(losses[name] for name in ("loud inputs", "decode, loud")) > 0.3  # clipped
    assert "## Loss of the integer cache" in text
    assert "int8, 64 bytes a token (in float32 256)" in text
    four = report_of(exports.get("ort", "int4"))["cases"]
    assert min(c["loss"] for c in four if c["tensor"] == "output") > max(quiet.values())


def test_the_loss_is_the_distance_to_the_same_inputs_with_a_cache_of_numbers(exports):
    """From a stored prompt: its output against the block's own."""
    folder = exports.get("primitive", "int8")
    config = json.loads((folder / "config.json").read_text())
    vector = next(v for v in config["test_vectors"] if v["name"] == "odd length")
    tensors = {}
    for file in (folder / vector["folder"]).iterdir():
        tensor = onnx.TensorProto.FromString(file.read_bytes())
        tensors[tensor.name] = numpy_helper.to_array(tensor)
    kept = attention_truth(exports.block, torch.tensor(tensors["hidden_states"])).numpy()
    wanted = np.linalg.norm(tensors["output"] - kept) / np.linalg.norm(kept)
    assert vector["bounds"]["output"]["loss"] == pytest.approx(wanted, rel=1e-3)


def test_an_artifact_proves_itself_again_and_without_pytorch(exports, graph):
    folder = exports.get(*graph)
    again = replay(folder)
    assert again.passed
    assert again.loss is not None
    if graph == ("ort", "int8"):
        assert validate(folder, exports.block).passed


def test_one_targets_cache_goes_on_in_another(exports):
    """A prompt by each, its cache handed to the next, token after token."""
    sessions = {
        target: onnxruntime.InferenceSession(
            exports.get(target, "int4") / "model.onnx", providers=["CPUExecutionProvider"]
        )
        for target in TARGETS
    }
    rng = np.random.default_rng(5)
    x = rng.standard_normal((1, 9, HIDDEN)).astype(np.float32)
    past = {f"past_{k}": np.zeros((1, KV_HEADS, 0, WIDTH // 2), np.uint8) for k in ("key", "value")}
    order = ["primitive", "ort", "onnx", "ort", "primitive"]
    parts = []
    for target, (start, end) in zip(order, [(0, 5), (5, 6), (6, 7), (7, 8), (8, 9)], strict=True):
        mask = np.ones((1, end), np.int64)
        y, key, value = sessions[target].run(
            ["output", "present_key", "present_value"],
            {"hidden_states": x[:, start:end], "attention_mask": mask, **past},
        )
        past = {"past_key": key, "past_value": value}
        parts.append(y)
    alone = sessions["onnx"].run(
        ["output", "present_key", "present_value"],
        {
            "hidden_states": x,
            "attention_mask": np.ones((1, 9), np.int64),
            **{name: value[:, :, :0] for name, value in past.items()},
        },
    )
    np.testing.assert_array_equal(past["past_key"], alone[1])
    np.testing.assert_array_equal(past["past_value"], alone[2])
    np.testing.assert_allclose(np.concatenate(parts, axis=1), alone[0], rtol=0, atol=3e-6)


def test_a_decoder_keeps_integers_in_its_buffers(exports, graph):
    target, dtype = graph
    decoder = Decoder.open(exports.get(target, dtype), batch=2, capacity=20)
    x = np.random.default_rng(1).standard_normal((2, 12, HIDDEN)).astype(np.float32)
    mask = np.ones((2, 8), np.int64)
    mask[1, 5:] = 0
    prompt = decoder.prefill(x[:, :8], attention_mask=mask)
    tokens = [decoder.decode(x[:, i : i + 1]) for i in range(8, 12)]
    assert decoder.lengths == (12, 9)
    size = KV_HEADS * WIDTH * 2 // (2 if dtype == "int4" else 1)
    tokens_held = 20 if target == "ort" else 12
    assert decoder.cache_bytes == 2 * tokens_held * size
    alone = Decoder.open(exports.get(target, dtype), capacity=20)
    row = np.concatenate((x[1:, :5], x[1:, 8:]), axis=1)
    wanted = alone.prefill(row)
    got = np.concatenate((prompt[1:, :5], *(t[1:] for t in tokens)), axis=1)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-6)


# Variants: what the rules allow, in other shapes

VARIANTS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "sinks and soft cap": ({"sinks": True, "softcap": 3.0, "qk_norm": True}, {}),
    "window": ({"window": 10, "num_kv_heads": 1}, {}),
    "long window": ({"window": 10, "max_seq_len": 530}, {}),
    "cache of the window": ({"window": 10, "head_dim": 32}, {"cache": "window"}),
    "cache of the window, narrow": ({"window": 10, "head_dim": 8}, {"cache": "window"}),
    "left padding": ({"qkv_bias": True}, {"padding": "left"}),
    "positions": ({"layout": "interleaved"}, {"position_ids": True}),
    "yarn": (
        {
            "scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 12,
            }
        },
        {},
    ),
    "dynamic": (
        {
            "scaling": {
                "rope_type": "dynamic",
                "factor": 2.0,
                "original_max_position_embeddings": 12,
            }
        },
        {},
    ),
    "partial": ({"rotary_dim": 4, "head_dim": 8}, {}),
    "wide values": ({"value_head_dim": 24}, {}),
    "width of twelve": ({"head_dim": 12}, {}),
    "width of twenty-four": ({"head_dim": 24}, {}),
}
QUICK = [("sinks and soft cap", "ort", "int4"), ("left padding", "ort", "int8")]
QUICK += [("cache of the window", "ort", "int4"), ("cache of the window", "onnx", "int8")]
QUICK += [("cache of the window", "primitive", "int4")]
QUICK += [("positions", "onnx", "int4"), ("wide values", "ort", "int4"), ("window", "ort", "int8")]


@pytest.mark.parametrize(
    ("variant", "target", "dtype"),
    [
        pytest.param(v, t, d, marks=() if (v, t, d) in QUICK else pytest.mark.slow)
        for v in VARIANTS
        for t in TARGETS
        for d in DTYPES
    ],
)
def test_other_blocks_pass(variant, target, dtype, tmp_path):
    made, options = VARIANTS[variant]
    report = export(
        block_of(**made),
        tmp_path / "block",
        target=target,
        cache_dtype=dtype,
        validate=True,
        **{"cache": True, **options},
    ).report
    assert report.passed, [(c.name, c.tensor, c.reason) for c in report.cases if not c.passed]


def test_inspect_says_what_the_cache_holds(exports, graph):
    target, dtype = graph
    report = inspect_model(exports.get(target, dtype) / "model.onnx")
    assert report.cache is not None
    assert report.cache.inputs == ("past_key", "past_value")
    assert report.cache.outputs == ("present_key", "present_value")
    assert report.cache.dtype == {"int8": "int8", "int4": "uint8"}[dtype]
    bits = {use.cache_bits for use in report.attention}
    assert bits == ({8 if dtype == "int8" else 4} if target == "ort" else {None})


def test_calibration_of_the_callers_is_used_and_not_called_random(tmp_path):
    block = block_of()
    x = np.random.default_rng(0).standard_normal((30, HIDDEN)).astype(np.float32)
    folder = tmp_path / "block"
    for scale, given in ((1.0, x), (2.0, 2 * x)):
        export(block, folder, cache=True, cache_dtype="int8", calibration=given)
        found = numpy_helper.to_array(table(onnx.load(folder / "model.onnx"), VALUE))
        values = np.abs(x @ block.v_proj.weight.detach().numpy().T).max(0).reshape(KV_HEADS, WIDTH)
        np.testing.assert_allclose(found[0, :, 0], scale * values / 127, rtol=1e-5)
    assert not any("random" in note for note in report_of(folder)["notes"])


def test_random_calibration_is_said(exports):
    assert any("random hidden states" in n for n in report_of(exports.get("ort", "int8"))["notes"])


# Mutants

Mutation = Callable[[onnx.ModelProto], None]


def _tables(model: onnx.ModelProto, kind: str) -> list[onnx.TensorProto]:
    stem = f"cache_rounding.{kind}_"
    return [t for t in model.graph.initializer if t.name.startswith(stem)]


def scales_exchanged(model: onnx.ModelProto) -> None:
    for key, value in zip(_tables(model, "key"), _tables(model, "value"), strict=True):
        key.name, value.name = value.name, key.name


def key_scale_three_percent_off(model: onnx.ModelProto) -> None:
    change(table(model, KEY), lambda t: t * 1.03)


def value_scale_three_percent_off(model: onnx.ModelProto) -> None:
    change(table(model, VALUE), lambda t: t * 1.03)


def both_ways_three_percent_off(model: onnx.ModelProto) -> None:
    """Integers that come back as they should: only what is stored is not what was meant."""
    for tensor in _tables(model, "value"):
        factor = 1 / 1.03 if tensor.name.endswith("reciprocal") else 1.03
        change(tensor, lambda t, factor=factor: t * factor)


def key_scales_rolled(model: onnx.ModelProto) -> None:
    for tensor in _tables(model, "key"):
        change(tensor, lambda t: np.roll(t, 1, axis=-1))


def value_scales_rolled(model: onnx.ModelProto) -> None:
    for tensor in _tables(model, "value"):
        change(tensor, lambda t: np.roll(t, 1, axis=-1))


def scales_of_the_other_head(model: onnx.ModelProto) -> None:
    for tensor in _tables(model, "key"):
        change(tensor, lambda t: np.roll(t, 1, axis=1))


def one_scale_for_all_channels(model: onnx.ModelProto) -> None:
    for tensor in _tables(model, "value"):
        pick = np.min if tensor.name.endswith("reciprocal") else np.max
        change(tensor, lambda t, pick=pick: np.full_like(t, pick(t)))


MUTANTS: tuple[Mutation, ...] = (
    scales_exchanged,
    key_scale_three_percent_off,
    value_scale_three_percent_off,
    both_ways_three_percent_off,
    key_scales_rolled,
    value_scales_rolled,
    scales_of_the_other_head,
    one_scale_for_all_channels,
)


def clipping_lost(model: onnx.ModelProto) -> None:
    """Integers beyond the last ones wrap around as the cast has it."""
    clips = [n for n in nodes_of(model, "Clip") if n.input[0].startswith("Round")]
    assert len(clips) == 2
    for clip in clips:
        clip.op_type = "Identity"
        del clip.input[1:]


def clipped_one_early(model: onnx.ModelProto) -> None:
    """At -127 or -7, as symmetric integers often are."""
    lowest = {n.input[1] for n in nodes_of(model, "Clip") if n.input[0].startswith("Round")}
    for name in lowest:
        change(table(model, name), lambda t: t + 1)


def ties_away_from_even(model: onnx.ModelProto) -> None:
    """Rounded down from half: a graph that takes Floor(x) for the nearest."""
    for node in nodes_of(model, "Round"):
        node.op_type = "Floor"


ARITHMETIC: tuple[Mutation, ...] = (clipping_lost, clipped_one_early, ties_away_from_even)


def _swap_nibbles(model: onnx.ModelProto, name: str, *, past: bool) -> None:
    """Nodes that exchange the halves of every byte of a past or present."""
    stem = f"swapped_{name}"
    outer, inner = (name, stem) if past else (stem, name)
    for node in _all_nodes(model):
        names = node.input if past else node.output
        for index, each in enumerate(names):
            if each == name:
                names[index] = stem
    four = helper.make_tensor(f"{stem}_four", TensorProto.UINT8, [], [4])
    model.graph.initializer.append(four)
    parts = [
        helper.make_node("BitShift", [outer, four.name], [f"{stem}_{way}"], direction=way)
        for way in ("LEFT", "RIGHT")
    ]
    parts.append(helper.make_node("BitwiseOr", [n.output[0] for n in parts], [inner]))
    nodes = [*parts, *model.graph.node] if past else [*model.graph.node, *parts]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _all_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    kinds = {n.op_type for n in model.graph.node}
    kinds |= {"GroupQueryAttention", "Scan", "If", "Squeeze", "Unsqueeze", "Slice"}
    return [n for kind in kinds for n in nodes_of(model, kind)]


def nibbles_of_past_keys_swapped(model: onnx.ModelProto) -> None:
    _swap_nibbles(model, "past_key", past=True)


def nibbles_of_present_values_swapped(model: onnx.ModelProto) -> None:
    _swap_nibbles(model, "present_value", past=False)


def nibbles_swapped_both_ways(model: onnx.ModelProto) -> None:
    """Right among themselves, and in another order than everyone else's."""
    for name in ("key", "value"):
        _swap_nibbles(model, f"past_{name}", past=True)
        _swap_nibbles(model, f"present_{name}", past=False)


NIBBLES: tuple[Mutation, ...] = (
    nibbles_of_past_keys_swapped,
    nibbles_of_present_values_swapped,
    nibbles_swapped_both_ways,
)


def proven_with(defect: Mutation, folder: Path) -> Report:
    """The stored vectors on the graph while it has a defect."""
    file, config = folder / "model.onnx", folder / "config.json"
    kept = file.read_bytes(), config.read_bytes()
    model = onnx.load_from_string(kept[0])
    defect(model)
    file.write_bytes(model.SerializeToString())
    content = json.loads(kept[1])
    content["files"]["model.onnx"] = sha256(file)
    config.write_text(json.dumps(content))
    try:
        return replay(folder)
    finally:
        file.write_bytes(kept[0])
        config.write_bytes(kept[1])


@pytest.mark.parametrize("defect", MUTANTS, ids=lambda d: d.__name__)
@pytest.mark.parametrize(
    ("target", "dtype"),
    slow_unless(
        lambda target, dtype: target == "ort" or (target == "onnx") == (dtype == "int4"),
        itertools.product(TARGETS, DTYPES),
    ),
)
def test_wrong_scales_are_found(exports, target, dtype, defect):
    report = proven_with(defect, exports.get(target, dtype))
    assert not report.passed
    assert all(case.reason is None for case in report.cases)  # it runs, and is wrong


@pytest.mark.parametrize("defect", ARITHMETIC, ids=lambda d: d.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", ["onnx", "primitive"])
def test_wrong_arithmetic_is_found(exports, target, dtype, defect):
    report = proven_with(defect, exports.get(target, dtype))
    assert not report.passed
    assert all(case.reason is None for case in report.cases)


@pytest.mark.parametrize("defect", NIBBLES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("target", TARGETS)
def test_other_orders_of_nibbles_are_found(exports, target, defect):
    report = proven_with(defect, exports.get(target, "int4"))
    assert not report.passed
    if (target, defect) != ("ort", nibbles_swapped_both_ways):  # which onnxruntime does not run
        assert any(case.reason is None and not case.passed for case in report.cases)
