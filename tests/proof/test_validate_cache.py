"""The validator proves prefill, chunks and decoding, and finds what is wrong with a cache."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cached_mutants
import mutants
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from selection import slow_unless

from rope_export import Attention, Report, export, replay, validate
from rope_export.artifacts.files import sha256
from rope_export.artifacts.targets import TARGETS
from rope_export.exporting.block import BlockRequest
from rope_export.exporting.stages import Evidence
from rope_export.exporting.subject import Subject
from rope_export.proof import validator
from rope_export.runtime.trial import Progress

DTYPES = ("float32", "float16")
PRESENTS = ("present_key", "present_value")
TENSORS = ("output", *PRESENTS)
# Outputs of calls whose past lies in the graph's own buffers.
DRIVEN = {
    "prefill and decode",
    "prefill and decode, rows of different lengths",
    "padded chunks",
}


# Arithmetic is proven by default without a cache, and with one by the tests of the decoder.
BY_DEFAULT = [("ort", "float32"), ("onnx", "float32")]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(graph, marks=() if graph in BY_DEFAULT else pytest.mark.slow)
        for graph in itertools.product(TARGETS, DTYPES)
    ],
    ids="-".join,
)
def graph(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Target and dtype; tests that share one follow each other."""
    return request.param


@pytest.fixture(scope="module", params=slow_unless(lambda dtype: dtype == "float32", DTYPES))
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", autouse=True)
def truth_worked_out_once() -> Iterator[None]:
    """Of the blocks that stay as they are; what is run and compared stays `validate`."""
    known: dict[BlockRequest, Evidence] = {}
    make = validator.evidence

    def remembered(subject: Subject, progress: Progress) -> Evidence:
        request = subject.request
        assert isinstance(request, BlockRequest)
        if not hasattr(request.block, "unchanged"):
            return make(subject, progress)
        if request not in known:
            known[request] = make(subject, progress)
        return known[request]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validator, "evidence", remembered)
        yield


@pytest.fixture(scope="module")
def proven(exports: mutants.Exports) -> Callable[..., Report]:
    """The report on what was exported."""

    @functools.cache
    def prove(*graph: str, **options: str) -> Report:
        block, folder = exports.get(*graph, **options)
        block.unchanged = True
        report = validate(folder, block)
        assert report.to_json() == json.loads((folder / "report.json").read_text())
        return report

    return prove


def failures(report: Report) -> list[tuple[str, str]]:
    return [(case.name, case.tensor) for case in report.cases if not case.passed]


def misanswered(report: Report) -> bool:
    """Whether an output fails in a call whose past is given, and so is right."""
    return any(case.past and case.tensor == "output" and not case.passed for case in report.cases)


def validated_with(
    defect: Callable[[onnx.ModelProto], None], artifact: tuple[Attention, Path]
) -> Report:
    """The report on an artifact while its graph has a defect."""
    block, folder = artifact
    block.unchanged = True
    file = folder / "model.onnx"
    content = file.read_bytes()
    model = onnx.load_from_string(content)
    defect(model)
    file.write_bytes(model.SerializeToString())
    try:
        return validate(folder, block)
    finally:
        file.write_bytes(content)


# What is right passes, and the report says what was compared


@pytest.mark.parametrize("variant", ["plain", "varied"])
def test_a_right_graph_passes(proven, graph, variant):
    report = proven(*graph, variant=variant)
    assert report.passed, failures(report)
    compared: dict[str, set[str]] = {}
    for case in report.cases:
        assert case.tokens > 0
        compared.setdefault(case.name, set()).add(case.tensor)
    # The present of a driven call is not looked at: the calls after it read it.
    assert {name for name, tensors in compared.items() if tensors == {"output"}} == DRIVEN
    assert all(compared[name] == set(TENSORS) for name in compared.keys() - DRIVEN)


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("ort", {"variant": "varied", "padding": "left"}),
        ("onnx", {"variant": "capped"}),
        ("ort", {"variant": "long"}),
    ],
)
def test_other_right_graphs_pass(proven, target, options):
    report = proven(target, **options)
    assert report.passed, failures(report)


def test_every_kind_of_past_is_proven(proven, graph):
    """No past, one token, either side of the window, and one less than the graph serves."""
    report = proven(*graph, variant="varied")
    window, capacity = mutants.WINDOW, mutants.LONGEST
    for tensor in TENSORS:
        compared = [case for case in report.cases if case.tensor == tensor]
        decoded = {case.past for case in compared if case.sequence == 1}
        assert {0, 1, window - 1, window, window + 1, capacity - 1} <= decoded
        chunks = [case for case in compared if case.past and case.sequence > 1]
        assert any(case.past + case.sequence == capacity for case in chunks)
        assert any(case.past < window < case.past + case.sequence for case in chunks)
        assert any(case.batch > 1 for case in chunks)
        assert any(case.sequence == capacity for case in compared)


def test_padded_rows_are_proven(proven, graph):
    """Fewer tokens are compared than the batch has columns, with a past and without."""
    report = proven(*graph, variant="varied")
    outputs = [case for case in report.cases if case.tensor == "output"]
    padded = [case for case in outputs if case.tokens < case.batch * case.sequence]
    assert {bool(case.past) for case in padded if case.name not in DRIVEN} == {True, False}
    assert DRIVEN - {"prefill and decode"} <= {case.name for case in padded}


def test_the_report_says_what_defects_of_a_variant_would_show(proven, graph):
    shown = proven(*graph, variant="varied").sensitivity
    for defect in (
        "window one token wider",
        "soft cap dropped",
        "sinks dropped",
        "query and key norms dropped",
    ):
        assert shown[defect] > 0.03


# A graph that is wrong fails: that of another block


def wrong_block_fails(artifact: tuple[Attention, Path], mend: mutants.BlockMutation) -> None:
    wrong, folder = artifact
    right = mutants.mutated(wrong, mend)
    if hasattr(right, "unchanged"):
        del right.unchanged
    report = validate(folder, right)
    assert report.providers["cpu"].status == "ok"
    assert "output" in {tensor for _, tensor in failures(report)}
    # By its numbers: it runs.
    assert all(case.reason is None for case in report.cases)


@pytest.mark.parametrize(
    ("mend", "variant"),
    cached_mutants.CACHED_BLOCK_MUTANTS,
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_graph_of_a_wrong_block_fails(exports, graph, mend, variant):
    wrong_block_fails(exports.get(*graph, variant=variant), mend)


@pytest.mark.parametrize("mend", cached_mutants.CAPPED_BLOCK_MUTANTS, ids=lambda m: m.__name__)
def test_the_standard_attention_of_a_wrong_block_fails(exports, dtype, mend):
    wrong_block_fails(exports.get("onnx", dtype, variant="capped"), mend)


# ... or one whose cache goes wrong


@pytest.mark.parametrize("defect", cached_mutants.CACHED_GRAPH_MUTANTS, ids=lambda d: d.__name__)
def test_a_wrong_cache_fails(exports, graph, defect):
    report = validated_with(defect, exports.get(*graph))
    assert all(case.reason is None for case in report.cases)
    assert {tensor for _, tensor in failures(report)} & set(PRESENTS)
    if defect in cached_mutants.MISREAD_PAST:
        assert misanswered(report)


def test_padding_on_the_left_that_leaks_fails(exports):
    made = exports.get("ort", variant="varied", padding="left")
    assert misanswered(validated_with(cached_mutants.mask_ignored, made))


@pytest.mark.parametrize("target", ["onnx", pytest.param("primitive", marks=pytest.mark.slow)])
def test_places_that_count_padding_fail(exports, dtype, target):
    made = exports.get(target, dtype, variant="varied")
    report = validated_with(cached_mutants.mask_of_columns, made)
    assert misanswered(report)


def test_norms_after_the_rotation_fail(exports, graph):
    target, dtype = graph
    # Inside GroupQueryAttention there is no place after the rotation: a form that turns first.
    made = exports.get(target, dtype, variant="long" if target == "ort" else "varied")
    report = validated_with(cached_mutants.norm_after_rotation, made)
    assert not report.passed
    assert all(case.reason is None for case in report.cases)


def test_a_last_position_that_is_wrong_fails(exports, graph):
    report = validated_with(mutants.last_table_row_stale, exports.get(*graph))
    assert {"decode at capacity", "chunk up to capacity"} <= {name for name, _ in failures(report)}


# ... or whose calls of GroupQueryAttention go wrong


@pytest.mark.parametrize("variant", ["plain", "long"])
@pytest.mark.parametrize(
    "defect", [cached_mutants.lengths_one_less, cached_mutants.lengths_one_more]
)
def test_lengths_that_are_off_fail(exports, dtype, defect, variant):
    made = exports.get("ort", dtype, variant=variant)
    assert misanswered(validated_with(defect, made))


@pytest.mark.parametrize(
    ("variant", "which"), [("plain", 0), ("plain", 1), ("long", 0), ("long", 1), ("long", 2)]
)
def test_an_inverted_branch_fails(exports, dtype, variant, which):
    made = exports.get("ort", dtype, variant=variant)
    report = validated_with(lambda m: cached_mutants.branches_exchanged(m, which), made)
    assert not report.passed


@pytest.mark.parametrize("by", [1, -1])
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_a_window_that_is_off_in_one_branch_fails(exports, dtype, which, by):
    """One token, blocks of a long prompt, the one call, and rows of a chunk: each by itself."""
    made = exports.get("ort", dtype, variant="long")
    model = onnx.load(made[1] / "model.onnx")
    assert len(cached_mutants.nodes_of(model, "GroupQueryAttention")) == 4
    report = validated_with(lambda m: cached_mutants.window_attribute_off(m, which, by), made)
    assert not report.passed
    assert all(case.reason is None for case in report.cases)


@pytest.mark.parametrize("variant", ["plain", "long"])
def test_single_tokens_are_proven_by_themselves(exports, dtype, variant):
    made = exports.get("ort", dtype, variant=variant)
    defects = [cached_mutants.queries_of_single_tokens_unscaled]
    if dtype == "float32":  # elsewhere the operator needs no sinks to be fast
        defects.append(cached_mutants.sinks_of_single_tokens_weigh)
    for defect in defects:
        assert misanswered(validated_with(defect, made))


@pytest.mark.parametrize(
    "defect", [cached_mutants.rest_of_the_buffer_lost, cached_mutants.long_chunk_taken_for_a_prompt]
)
def test_long_prompts_that_the_decoder_gets_wrong_fail(exports, dtype, defect):
    """Their past and present are one buffer, longer than the prompt, and chunks may be long."""
    made = exports.get("ort", dtype, variant="long")
    assert not validated_with(defect, made).passed


# Whatever is served is proven


@pytest.mark.parametrize(
    ("target", "longest"),
    slow_unless(lambda _, longest: longest == 2, [("ort", 2), ("ort", 8), ("onnx", 8)]),
)
def test_short_capacities(target, longest, tmp_path):
    block = mutants.block(max_seq_len=longest)
    result = export(block, tmp_path / "block", target=target, cache=True, validate=True)
    assert result.report.passed, failures(result.report)
    assert replay(result.path).passed


def test_frequencies_that_follow_the_length(tmp_path):
    block = mutants.block(scaling=mutants.LONGROPE)
    result = export(block, tmp_path / "block", cache=True, validate=True)
    assert result.report.passed, failures(result.report)
    assert any("across the switch" in note for note in result.notes)
    assert not validate(result, mutants.mutated(block, mutants.switch_ignored)).passed


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("position_ids", [False, True])
def test_rows_out_of_step_take_the_frequencies_of_the_longest(tmp_path, padding, position_ids):
    """With the switch within the shortest prompts: each row's own length would be wrong for it."""
    scaling = {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 8}
    block = mutants.block(scaling=scaling, max_seq_len=24)
    options = {"cache": True, "padding": padding, "position_ids": position_ids}
    result = export(block, tmp_path / "block", validate=True, **options)
    assert result.report.passed, failures(result.report)
    assert "rows of different lengths" in {case.name for case in result.report.cases}
    assert not validate(result, mutants.mutated(block, stretch_ignored)).passed


def stretch_ignored(wrong: Attention) -> None:
    assert wrong.rope is not None
    wrong.rope._found = replace(wrong.rope._found, stretch=None)
    wrong.rope.reset_parameters()


# Stored vectors


@pytest.mark.parametrize(
    ("target", "options"),
    slow_unless(
        lambda target, _: target != "primitive",
        [
            *itertools.product(TARGETS, ({"variant": "plain"}, {"variant": "varied"})),
            ("ort", {"variant": "varied", "padding": "left"}),
            ("ort", {"variant": "long"}),
        ],
    ),
)
def test_stored_vectors_are_backend_test_data(exports, target, options):
    """Any runtime replays them: inputs and outputs by their order, every element specified."""
    _, folder = exports.get(target, **options)
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    config = json.loads((folder / "config.json").read_text())
    loud = {v["folder"] for v in config["test_vectors"] if "loud" in v["name"]}
    names = [value.name for value in session.get_inputs()]
    assert [value.name for value in session.get_outputs()] == list(TENSORS)
    after_a_past = 0
    for data in sorted(folder.glob("test_data_set_*")):
        inputs, outputs = tensors(data, "input"), tensors(data, "output")
        assert len(inputs) == len(names)
        assert len(outputs) == len(TENSORS)
        assert len(list(data.iterdir())) == len(names) + len(TENSORS)
        given = dict(zip(names, inputs, strict=True))
        after_a_past += given["past_key"].shape[2] > 0
        # Near ties decide a token of a loud input, in PyTorch as here.
        close = 1e-3 if data.name in loud else 1e-4
        for got, wanted in zip(session.run(None, given), outputs, strict=True):
            assert got.dtype == wanted.dtype
            np.testing.assert_allclose(got, wanted, rtol=close, atol=close)
    assert after_a_past >= 2


def tensors(data: Path, kind: str) -> list[np.ndarray]:
    count = len(list(data.glob(f"{kind}_*.pb")))
    return [numpy_helper.to_array(onnx.load_tensor(data / f"{kind}_{k}.pb")) for k in range(count)]


@pytest.mark.parametrize("variant", ["plain", "varied"])
def test_replay_covers_the_driven_cases(exports, graph, variant):
    _, folder = exports.get(*graph, variant=variant)
    report = replay(folder)
    assert report.passed, failures(report)
    assert {case.name for case in report.cases} >= DRIVEN
    assert {case.tensor for case in report.cases} == set(TENSORS)
    steps = {v["name"]: v["steps"] for v in vectors_of(folder) if v["steps"]}
    assert steps.keys() == DRIVEN
    assert any(len(set(step)) > 1 for step in steps["padded chunks"])
    # They are the full pass once more, on its own files.
    folders = {v["name"]: v["folder"] for v in vectors_of(folder)}
    assert {folders[name] for name in DRIVEN} == {folders["batch of five"]}


def vectors_of(folder: Path) -> list[dict[str, object]]:
    return json.loads((folder / "config.json").read_text())["test_vectors"]


def test_replay_fails_on_a_stored_present_that_is_wrong(exports, graph, tmp_path):
    """The stored presents are compared, not only carried along."""
    _, folder = exports.get(*graph)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    vector = next(v for v in config["test_vectors"] if v["name"] == "decode")
    file = copy / vector["folder"] / "output_2.pb"
    tensor = onnx.load_tensor(file)
    mutants.change(tensor, lambda t: np.roll(t, 1, axis=2))
    file.write_bytes(tensor.SerializeToString())
    name = file.relative_to(copy).as_posix()
    config["files"][name] = sha256(file)
    (copy / "config.json").write_text(json.dumps(config))
    assert failures(replay(copy)) == [("decode", "present_value")]
