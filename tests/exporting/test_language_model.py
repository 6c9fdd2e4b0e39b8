"""A language model with a cache: its graph, defects in it, and generation through a Decoder."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import modules
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from modules import (
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    LONGEST,
    VOCABULARY,
    LanguageModel,
    Models,
    tree,
)
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from selection import slow_unless

from rope_export import BadInputError, export, replay, validate
from rope_export.artifacts.targets import OPSETS, TARGETS
from rope_export.exporting.stages import Evidence
from rope_export.exporting.subject import Subject
from rope_export.proof import validator
from rope_export.runtime import Decoder
from rope_export.runtime.trial import Progress

BY_TARGET = pytest.mark.parametrize("target", slow_unless(lambda target: target == "ort", TARGETS))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@BY_TARGET
def test_names_and_axes(models, target):
    _, result = models.get(target)
    inputs, outputs = modules.interface(result)
    past = ["batch", KV_HEADS, "past_sequence", HEAD_DIM]
    present = ["batch", KV_HEADS, "past_sequence+sequence", HEAD_DIM]
    pairs = [f"{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
    assert inputs == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "past_sequence+sequence"],
        **{f"past_key_values.{pair}": past for pair in pairs},
    }
    assert outputs == {
        "logits": ["batch", "sequence", VOCABULARY],
        **{f"present.{pair}": present for pair in pairs},
    }


@pytest.mark.parametrize(
    ("target", "wanted", "unwanted"),
    [
        ("ort", {"com.microsoft::GroupQueryAttention"}, {"Attention", "RotaryEmbedding"}),
        pytest.param(
            "onnx",
            {"Attention", "RotaryEmbedding", "RMSNormalization"},
            {"com.microsoft::GroupQueryAttention"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "primitive",
            {"Softmax"},
            {"com.microsoft::GroupQueryAttention", "Attention", "RotaryEmbedding"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_operators_and_one_table_for_all_layers(models, target, wanted, unwanted):
    _, result = models.get(target)
    assert wanted <= set(result.ops)
    assert not unwanted & set(result.ops)
    model = onnx.load(result.model)
    tables = [t for t in model.graph.initializer if ".angles.cos" in t.name]
    tables += [t for t in model.graph.initializer if ".angles.sin" in t.name]
    assert [list(t.dims) for t in tables] == [[LONGEST, HEAD_DIM // 2]] * 2
    angles = np.arange(LONGEST)[:, None] * 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    for table, function in zip(tables, (np.cos, np.sin), strict=True):
        np.testing.assert_allclose(numpy_helper.to_array(table), function(angles), atol=1e-7)
    (opset,) = [o.version for o in model.opset_import if o.domain == ""]
    assert opset == OPSETS[target]
    if target != "ort":
        assert {o.domain for o in model.opset_import} <= {"", "pkg.onnxscript.torch_lib.common"}
        onnx.checker.check_model(model, full_check=True)


@BY_TARGET
def test_a_right_model_is_proven_and_replays(models, target):
    _, result = models.get(target)
    report = result.report
    assert report.passed, report.to_markdown()
    assert set(report.providers["cpu"].nodes) == {"CPUExecutionProvider"}
    names = {case.name for case in report.cases}
    assert {"one token", "decode", "chunk", "rows of different lengths"} <= names
    assert {"prefill and decode", "prefill and decode, rows of different lengths"} <= names
    pairs = {f"present.{n}.{kind}" for n in range(LAYERS) for kind in ("key", "value")}
    assert {case.tensor for case in report.cases} == {"logits"} | pairs
    again = replay(result.path)
    assert again.passed
    assert [(c.name, c.tensor) for c in again.cases] == [(c.name, c.tensor) for c in report.cases]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "primitive"])
def test_onnx_reference_evaluator_agrees(models, target):
    """ONNX's own executable specification against the model in plain PyTorch, float64."""
    model, result = models.get(target)
    given = modules.example(model, batch=2, length=3, past=4, seed=5)
    given["attention_mask"][1, 2:4] = 0
    given["attention_mask"][0, -1] = 0
    wanted = modules.in_double(model, **given)
    tensors = [given["input_ids"], given["attention_mask"]]
    tensors += [t for pair in given["past_key_values"] for t in pair]
    inputs, outputs = modules.interface(result)
    feed = dict(zip(inputs, (t.numpy() for t in tensors), strict=True))
    got = ReferenceEvaluator(str(result.model)).run(None, feed)
    real = given["attention_mask"].bool()
    for name, ours, theirs in zip(outputs, got, wanted, strict=True):
        truth = theirs.numpy()
        if name == "logits":
            ours, truth = ours[real[:, 4:]], truth[real[:, 4:]]
        else:
            ours, truth = ours.swapaxes(1, 2)[real], truth.swapaxes(1, 2)[real]
        np.testing.assert_allclose(ours, truth, rtol=1e-4, atol=2e-5)


def test_the_same_export_gives_the_same_bytes(models, tmp_path):
    _, result = models.get()
    other = modules.language_model()
    other.train()
    modules.in_double(other, **modules.example(other))  # a warm call leaves no trace
    export(
        other,
        tmp_path / result.path.name,
        kwargs=modules.example(other),
        dynamic_shapes=modules.LABELS,
        validate=True,
    )
    assert tree(tmp_path / result.path.name) == tree(result.path)


@BY_TARGET
def test_nothing_of_this_machine_is_inside(models, target):
    _, result = models.get(target)
    places = {str(Path.cwd()), str(Path.home()), str(result.path.parent)}
    for name, content in tree(result.path).items():
        for place in (*places, "site-packages", "test_modules", "modules.py"):
            assert place.encode() not in content, (name, place)


def noised(model: LanguageModel) -> LanguageModel:
    wrong = copy.deepcopy(model)
    weight = wrong.layers[0].attention.v_proj.weight
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(weight.shape, generator=generator)
    weight.data *= (1 + 1e-3 * noise).to(weight.dtype)
    return wrong


def test_validate_knows_the_model(models, tmp_path):
    model, result = models.get()
    folder = Path(shutil.copytree(result.path, tmp_path / "copy"))
    given = modules.example(model, batch=3, length=6, past=2, seed=9)  # other examples do as well
    report = validate(folder, model, kwargs=given)
    assert report.passed
    assert json.loads((folder / "report.json").read_text())["passed"] is True
    report = validate(folder, noised(model), kwargs=given)
    assert not report.passed
    assert json.loads((folder / "report.json").read_text())["passed"] is False
    assert {c.tensor for c in report.cases if not c.passed} >= {"logits", "present.0.value"}
    assert not {c.tensor for c in report.cases if not c.passed} & {"present.0.key"}


def test_modes_of_all_parts_are_as_they_were(models, tmp_path):
    _, result = models.get()
    model = modules.language_model().train()
    model.layers[1].eval()
    model.layers[1].mlp.train()
    before = {name: part.training for name, part in model.named_modules()}
    seen = []
    model.norm.register_forward_pre_hook(lambda part, _: seen.append(part.training))
    report = validate(
        Path(shutil.copytree(result.path, tmp_path / "copy")), model, kwargs=modules.example(model)
    )
    assert report.passed  # though its dropout is on
    assert seen
    assert not any(seen)
    assert {name: part.training for name, part in model.named_modules()} == before
    with pytest.raises(BadInputError):
        export(model, tmp_path / "x", kwargs=modules.example(model) | {"input_ids": torch.ones(1)})
    assert {name: part.training for name, part in model.named_modules()} == before


# --- defects in its graph -------------------------------------------------------------------


@pytest.fixture
def remembered(monkeypatch) -> None:
    """`validate` traces and evaluates a module once, not again for each of its wrong graphs."""
    make = validator.evidence

    def evidence(subject: Subject, progress: Progress) -> Evidence:
        key = id(subject.request.module)
        if key not in REMEMBERED:
            REMEMBERED[key] = make(subject, progress)
        return REMEMBERED[key]

    monkeypatch.setattr(validator, "evidence", evidence)


REMEMBERED: dict[int, Evidence] = {}


@pytest.mark.usefixtures("remembered")
@pytest.mark.parametrize("mutate", modules.GRAPH_MUTANTS, ids=lambda m: m.__name__)
@pytest.mark.parametrize(
    ("target", "dtype"),
    slow_unless(
        lambda *row: row == ("ort", "float32"),
        [("ort", "float32"), ("ort", "float16"), ("primitive", "float32")],
    ),
)
def test_a_wrong_graph_fails(models, target, dtype, mutate, tmp_path):
    model, result = models.get(target, dtype)
    folder = Path(shutil.copytree(result.path, tmp_path / "copy"))
    graph = onnx.load(folder / "model.onnx")
    mutate(graph)
    onnx.save(graph, folder / "model.onnx")
    report = validate(folder, model, kwargs=modules.example(model))
    assert not report.passed
    assert report.providers["cpu"].status == "ok"
    assert all(case.reason is None for case in report.cases if not case.passed)
    # Where it is deployed the same graph is refused before it runs.
    with pytest.raises(BadInputError, match=r"model\.onnx: altered"):
        replay(folder)


def test_a_graph_that_does_not_run_fails(models, tmp_path):
    model, result = models.get()
    folder = Path(shutil.copytree(result.path, tmp_path / "copy"))
    graph = onnx.load(folder / "model.onnx")
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(graph, folder / "model.onnx")
    report = validate(folder, model, kwargs=modules.example(model))
    assert not report.passed


# --- served by a Decoder ----------------------------------------------------------------------

PROMPTS = ([1, 2, 3, 4, 5], [7], [9, 8, 11])


@torch.no_grad()
def greedy(model: LanguageModel, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens in eager PyTorch, always from the whole text: no cache is trusted."""
    text = list(prompt)
    for _ in range(count):
        ids = torch.tensor([text])
        logits = model(ids, torch.ones_like(ids), model.empty_cache())["logits"]
        text.append(int(logits[0, -1].argmax()))
    return text[len(prompt) :]


def served(decoder: Decoder, count: int, padding: str, *, chunks: int = 1) -> list[list[int]]:
    """The same of a batch of prompts, in several prefills."""
    width = max(map(len, PROMPTS))
    ids = np.zeros((len(PROMPTS), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        place = slice(0, len(prompt)) if padding == "right" else slice(width - len(prompt), width)
        ids[row, place], mask[row, place] = prompt, 1
    ends = [width] if chunks == 1 else [2, width]
    parts, start = [], 0
    for end in ends:
        parts.append(decoder.prefill(ids[:, start:end], attention_mask=mask[:, start:end]))
        start = end
    logits = np.concatenate(parts, axis=1)
    last = [len(p) - 1 if padding == "right" else width - 1 for p in PROMPTS]
    tokens = logits[np.arange(len(PROMPTS)), last].argmax(-1)
    found = [tokens]
    for _ in range(count - 1):
        tokens = decoder.decode(tokens[:, None])[:, 0].argmax(-1)
        found.append(tokens)
    return np.stack(found, axis=1).tolist()


@pytest.mark.parametrize(
    ("target", "padding", "chunks"),
    slow_unless(
        lambda target, padding, _: target == "ort" and padding == "right",
        [("ort", "right", 1), ("ort", "left", 1), ("onnx", "right", 1), ("primitive", "right", 1)],
    ),
)
def test_greedy_generation_is_that_of_pytorch(models, target, padding, chunks):
    model, result = models.get(target, padding=padding)
    wanted = [greedy(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in wanted}) == len(PROMPTS)
    assert max(len(set(tokens)) for tokens in wanted) > 2  # no single word over and over
    decoder = Decoder.open(result.path, batch=len(PROMPTS), capacity=20)
    assert decoder.layout.packs_rows == (target == "ort")
    for _ in range(2):
        assert served(decoder, 12, padding, chunks=chunks) == wanted
        decoder.reset()
    assert decoder.lengths == (0, 0, 0)


def test_a_prompt_in_chunks(models):
    model, result = models.get()
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    decoder = Decoder.open(result.path)
    whole = decoder.prefill([prompt])
    decoder.reset()
    parts = [decoder.prefill([prompt[:3]]), decoder.prefill([prompt[3:7]]), decoder.decode([[6]])]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-5)
    (truth, *_) = modules.in_double(
        model, torch.tensor([prompt]), torch.ones(1, 8, dtype=torch.int64), model.empty_cache()
    )
    np.testing.assert_allclose(whole, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["ort", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_full_cache_is_refused_and_kept(models, target):
    _, result = models.get(target)
    decoder = Decoder.open(result.path, batch=2, capacity=6)
    decoder.prefill([[1, 2, 3, 4], [5, 6, 0, 0]], attention_mask=[[1, 1, 1, 1], [1, 1, 0, 0]])
    assert decoder.lengths == (4, 2)
    with pytest.raises(BadInputError, match="4 of 6 tokens are taken and 3 more do not fit"):
        decoder.prefill([[1, 2, 3], [1, 2, 3]])
    assert decoder.lengths == (4, 2)
    decoder.decode([[7], [8]])
    decoder.decode([[7], [8]])
    with pytest.raises(BadInputError, match="the cache is full"):
        decoder.decode([[7], [8]])
    assert decoder.lengths == (6, 4)
    with pytest.raises(BadInputError, match=f"1 to the {LONGEST} tokens .* got {LONGEST + 1}"):
        Decoder.open(result.path, capacity=LONGEST + 1)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (np.ones((2, 3), np.float32), "input_ids must be int64 as the graph is, got float32"),
        (np.ones((3, 3), np.int64), r"input_ids must be \[2, S\] .* got \[3, 3\]"),
        (np.ones((2, 0), np.int64), r"at least one token, got \[2, 0\]"),
        (np.ones((2, 3, 1), np.int64), r"input_ids must be \[2, S\] .* got \[2, 3, 1\]"),
        (np.ones(2, np.int64), r"got \[2\]"),
    ],
)
def test_ids_that_do_not_fit_are_refused(models, ids, says):
    _, result = models.get()
    decoder = Decoder.open(result.path, batch=2)
    with pytest.raises(BadInputError, match=says):
        decoder.prefill(ids)
    assert decoder.lengths == (0, 0)


def test_the_graph_runs_in_onnxruntime_itself(models):
    """Without anything of ours between: a plain session and plain arrays."""
    model, result = models.get()
    given = modules.example(model, batch=3, length=5, past=2, seed=4)
    session = onnxruntime.InferenceSession(result.model, providers=["CPUExecutionProvider"])
    tensors = [given["input_ids"], given["attention_mask"]]
    tensors += [t for pair in given["past_key_values"] for t in pair]
    names = [value.name for value in session.get_inputs()]
    got = session.run(None, {n: t.numpy() for n, t in zip(names, tensors, strict=True)})
    for ours, truth in zip(got, modules.in_double(model, **given), strict=True):
        np.testing.assert_allclose(ours, truth, rtol=1e-4, atol=2e-5)
