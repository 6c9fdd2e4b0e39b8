"""`export` of any module: what its graph is, that it is proven, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modules
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from modules import (
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    LONGEST,
    VOCABULARY,
    LanguageModel,
    Models,
    SelfAttention,
    Served,
    agrees,
    interface,
    module_of,
)
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.export import Dim

from rope_export import (
    Attention,
    BadInputError,
    RotaryEmbedding,
    apply_rotary_emb,
    export,
    replay,
    validate,
    validator,
)
from rope_export.artifact import Artifact
from rope_export.lowering import rules
from rope_export.runtime import Decoder

TARGETS = rules.TARGETS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- a language model with a cache ------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
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
        (
            "onnx",
            {"Attention", "RotaryEmbedding", "RMSNormalization"},
            {"com.microsoft::GroupQueryAttention"},
        ),
        (
            "primitive",
            {"Softmax"},
            {"com.microsoft::GroupQueryAttention", "Attention", "RotaryEmbedding"},
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
    assert opset == rules.OPSETS[target]
    if target != "ort":
        assert {o.domain for o in model.opset_import} <= {"", "pkg.onnxscript.torch_lib.common"}
        onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("target", TARGETS)
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


@pytest.mark.parametrize("target", TARGETS)
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
    make = validator._subject

    def subject(artifact: Artifact, module: torch.nn.Module, *args: Any) -> Any:
        if id(module) not in REMEMBERED:
            made = make(artifact, module, *args)
            trials = made.trials(lambda _: None)
            made.trials = lambda _: trials
            REMEMBERED[id(module)] = made
        return REMEMBERED[id(module)]

    monkeypatch.setattr(validator, "_subject", subject)


REMEMBERED: dict[int, Any] = {}


@pytest.mark.usefixtures("remembered")
@pytest.mark.parametrize("mutate", modules.GRAPH_MUTANTS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("target", ["ort", "primitive"])
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
    [("ort", "right", 1), ("ort", "left", 1), ("onnx", "right", 1), ("primitive", "right", 1)],
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


@pytest.mark.parametrize("target", ["ort", "onnx"])
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


# --- modules of any kind ----------------------------------------------------------------------


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(*shape: int, high: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def heads(rope: RotaryEmbedding, q: Tensor, k: Tensor) -> Any:
    return rope.rotate(q, k)


def each(rope: RotaryEmbedding, q: Tensor, k: Tensor) -> Any:
    return rope.rotate_queries_or_keys(q, offset=5), rope.rotate_queries_or_keys(k, offset=3)


def together(rope: RotaryEmbedding, q: Tensor, k: Tensor) -> Any:
    return rope.rotate_queries_and_keys(q, k)


def given_places(rope: RotaryEmbedding, q: Tensor, k: Tensor) -> Any:
    places = torch.arange(q.shape[2]) * 2 + 1
    return rope.rotate(q, k, position_ids=places[None].expand(q.shape[0], -1))


def by_angles(rope: RotaryEmbedding, q: Tensor, k: Tensor) -> Any:
    angles = rope(torch.arange(q.shape[2]))
    return apply_rotary_emb(angles, q), apply_rotary_emb(angles, k)


# Which rotation, with which RoPE, in which targets; whether it is one RotaryEmbedding each.
ROTATIONS = [
    (heads, {"max_seq_len": 40, "layout": "half"}, "onnx", True),
    (heads, {"max_seq_len": 40, "layout": "half"}, "primitive", False),
    (heads, {"learned_freq": True}, "ort", True),
    (each, {"max_seq_len": 48}, "ort", True),
    (together, {"use_xpos": True, "max_seq_len": 40}, "ort", True),
    (given_places, {"max_seq_len": 80, "layout": "half"}, "ort", True),
    (by_angles, {}, "ort", False),
]


@pytest.mark.parametrize(
    ("rotate", "rope", "target", "as_operators"),
    [
        pytest.param(*row, id=f"{row[2]}-{row[0].__name__}-{'-'.join(row[1]) or 'plain'}")
        for row in ROTATIONS
    ],
)
def test_rotations_in_attention_of_pytorch(tmp_path, rotate, rope, target, as_operators):
    causal = rotate is not each  # an encoder, for once
    module = modules.enlivened(SelfAttention(rotate, causal=causal, **rope))
    labels = {"x": {0: "batch", 1: Dim("sequence", max=36)}}
    result = export(
        module,
        tmp_path / "x",
        args=(drawn(2, 6, 32),),
        dynamic_shapes=labels,
        target=target,
        validate=True,
    )
    assert result.report.passed, result.report.to_markdown()
    assert (result.ops.get("RotaryEmbedding") == 2) == as_operators
    assert max(case.sequence for case in result.report.cases) == 36
    for batch, length in ((1, 1), (3, 33)):
        agrees(result, module, drawn(batch, length, 32, seed=length), limit=1e-5)
    if rotate is not by_angles:
        assert result.report.sensitivity["sine negated"] > 1e-2


class Mixed(nn.Module):
    """Embedding, convolution, both norms, an einsum, and a table of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.batch_norm, self.layer_norm = nn.BatchNorm1d(8), nn.LayerNorm(8)
        self.batch_norm.running_mean.copy_(torch.linspace(-1, 1, 8))
        self.batch_norm.running_var.copy_(torch.linspace(0.5, 2, 8))
        self.weight = nn.Parameter(torch.empty(8, 2, 4))
        self.register_buffer("table", torch.linspace(0, 1, 8), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).transpose(1, 2)
        x = F.gelu(self.batch_norm(self.convolution(x))).transpose(1, 2) + self.table
        return torch.einsum("bsd,dhk->bhsk", self.layer_norm(x), self.weight)


class Vision(nn.Module):
    """Patches with a class token, whose number is fixed by the image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        rope = RotaryEmbedding(8, layout="half", max_seq_len=17)
        self.attention = Attention(32, 4, causal=False, rope=rope)
        self.token = nn.Parameter(torch.empty(1, 1, 32))
        self.head = nn.Linear(32, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1)
        return self.head(x + self.attention(x))[:, 0]


class Cross(nn.Module):
    """Queries of one sequence, keys of another, each with positions of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rope = RotaryEmbedding(8)
        self.q, self.kv = nn.Linear(16, 16), nn.Linear(16, 32)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (2, 8)).transpose(1, 2)
            for t in (self.q(x), *self.kv(memory).chunk(2, -1))
        )
        q, k = self.rope.rotate_queries_or_keys(q), self.rope.rotate_queries_or_keys(k, offset=2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Branching(modules.Given):
    """Control flow that a graph can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda t: self.linear(t) * 2, lambda t: t - 1, (x,))


ONE = {0: "batch", 1: "sequence"}
ATTENDING = {"query": ONE, "key": {0: "batch", 1: "keys"}, "value": {0: "batch", 1: "keys"}}
OTHERS = {
    "mixed": (Mixed, lambda b, s: (ids(b, s, seed=s),), {"ids": ONE}, ["onnx", "primitive"]),
    "vision, nothing dynamic": (Vision, lambda *_: (drawn(1, 3, 16, 16),), None, TARGETS),
    "cross attention": (
        Cross,
        lambda b, s: (drawn(b, s, 16), drawn(b, s + 2, 16, seed=1)),
        {"x": ONE, "memory": {0: "batch", 1: "keys"}},
        ["ort"],
    ),
    "attention of PyTorch": (
        lambda: nn.MultiheadAttention(16, 4, batch_first=True),
        lambda b, s: (drawn(b, s, 16), *[drawn(b, s + 2, 16, seed=1)] * 2),
        ATTENDING,
        ["ort"],
    ),
    "encoder layer, in training": (
        lambda: nn.TransformerEncoderLayer(16, 4, 32, dropout=0.5, batch_first=True).train(),
        lambda b, s: (drawn(b, s, 16),),
        {"src": ONE},
        ["ort"],
    ),
    "branches": (Branching, lambda b, _: (drawn(b, 3, 4, seed=b),), {"x": {0: "batch"}}, ["ort"]),
}


@pytest.mark.parametrize(
    ("name", "target"), [(name, target) for name, row in OTHERS.items() for target in row[3]]
)
def test_modules_of_any_kind(tmp_path, name, target):
    make, draw, labels, _ = OTHERS[name]
    module = modules.enlivened(make())
    result = export(
        module,
        tmp_path / "x",
        args=draw(2, 5),
        dynamic_shapes=labels,
        target=target,
        validate=True,
    )
    assert result.report.passed, result.report.to_markdown()
    assert replay(result.path).passed
    for batch, length in ((1, 1), (3, 8)):
        agrees(result, module, *draw(batch, length), limit=1e-5)


def test_a_model_of_transformers_with_padding(tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=12,
        max_position_embeddings=40,
    )
    model = BertModel(config).eval()
    given = {"input_ids": ids(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    result = export(
        model,
        tmp_path / "bert",
        kwargs=given,
        dynamic_shapes=dict.fromkeys(given, ONE),
        max_seq_len=40,
        validate=True,
    )
    assert result.report.passed, result.report.to_markdown()
    assert "rows of different lengths" in {case.name for case in result.report.cases}
    _, outputs = interface(result)
    assert outputs == {
        "last_hidden_state": ["batch", "sequence", 32],
        "pooler_output": ["batch", 32],
    }
    agrees(result, model, ids(3, 9, seed=2), torch.ones(3, 9, dtype=torch.int64), limit=1e-5)


def test_half_precision_inside_a_float32_model(tmp_path):
    module = module_of(lambda self, x: self.half(self.linear(x).half()).float())
    module.half_layer = nn.Linear(4, 4).half()
    type(module).half = lambda self, x: self.half_layer(x)
    result = export(
        module, tmp_path / "x", args=(drawn(3, 4),), dynamic_shapes=[{0: "batch"}], validate=True
    )
    assert result.report.passed
    assert result.graph["dtype"] == "float16"


# --- its interface -------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["u", "v"])


@dataclass
class Parts:
    first: Tensor
    rest: list[Tensor]


def model_output(self: Any, x: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    y = self.linear(x)
    return BaseModelOutput(last_hidden_state=y, hidden_states=(x * 2, y * 3))


def variadic(self: Any, x: Tensor, *more: Tensor, **named: Tensor) -> Tensor:
    for index, tensor in enumerate(more):
        x = x + (index + 2) * tensor
    for name in sorted(named):
        x = x * named[name]
    return self.linear(x)


def with_options(
    self: Any, x: Tensor, mask: Tensor | None = None, *, y: Tensor, sign: bool = True, how: str = ""
) -> Tensor:
    assert how in ("", "plain")
    x = x if mask is None else x * mask
    return self.linear(x) + (y if sign else -y)


X, Y, Z = drawn(3, 5, 4), drawn(3, 5, 4, seed=1), drawn(3, 5, 4, seed=2)
KEYS = tuple(drawn(3, 2, 4, 8, seed=seed) for seed in (1, 2))
BS = ["b", "s", 4]
AXES = {0: "b", 1: "s"}
# What forward is, its arguments, labels, and the axes of inputs and outputs by name.
INTERFACES = {
    "nested containers": (
        lambda self, state: self.linear(state["a"]) + state["b"][0] - 2 * state["b"][1],
        ({"a": X, "b": [Y, Z]},),
        {},
        {"state": AXES},
        {"state.a": BS, "state.b.0": BS, "state.b.1": BS},
        {"output": BS},
    ),
    "namedtuples": (
        lambda self, p: Pair(self.linear(p.u), p.v * 2),
        (Pair(X, Y),),
        {},
        {"p": Pair(AXES, {0: "b"})},
        {"p.u": BS, "p.v": ["b", 5, 4]},
        {"u": BS, "v": ["b", 5, 4]},
    ),
    "a mapping with numbers": (
        lambda self, d: {1: self.linear(d[1]), 2: d[2] * 2},
        ({1: X, 2: Y},),
        {},
        {"d": {1: {0: "b"}, 2: {1: "s"}}},
        {"d.1": ["b", 5, 4], "d.2": [3, "s", 4]},
        {"output_1": ["b", 5, 4], "output_2": [3, "s", 4]},
    ),
    "output of transformers": (
        model_output,
        (X,),
        {},
        {"x": AXES},
        {"x": BS},
        {"last_hidden_state": BS, "hidden_states.0": BS, "hidden_states.1": BS},
    ),
    "a dataclass": (
        lambda self, x: Parts(self.linear(x), [x * 2, x * 3]),
        (X,),
        {},
        {"x": AXES},
        {"x": BS},
        {"first": BS, "rest.0": BS, "rest.1": BS},
    ),
    "any number of arguments": (
        variadic,
        (X, Y, Z),
        {"w": X + 1},
        {"x": AXES, "more_0": AXES, "more_1": AXES, "w": AXES},
        {"x": BS, "more_0": BS, "more_1": BS, "w": BS},
        {"output": BS},
    ),
    "keywords, None and constants": (
        with_options,
        (X,),
        {"y": Y, "sign": False, "how": "plain"},
        {"x": AXES, "y": AXES},
        {"x": BS, "y": BS},
        {"output": BS},
    ),
    "one pair of keys and values": (
        lambda self, x, past: (self.linear(x), (past[0] * 2, past[1] - 1)),
        (X, KEYS),
        {},
        {"x": AXES, "past": {0: "b", 2: "p"}},
        {
            "x": BS,
            "past_key_values.0.key": ["b", 2, "p", 8],
            "past_key_values.0.value": ["b", 2, "p", 8],
        },
        {"output": BS, "present.0.key": ["b", 2, "p", 8], "present.0.value": ["b", 2, "p", 8]},
    ),
    "the same tensor twice, and an input": (
        lambda self, x: (lambda y: {"a": y, "b": y, "c": x})(self.linear(x)),
        (X,),
        {},
        {"x": AXES},
        {"x": BS},
        {"a": BS, "b": BS, "c": BS},
    ),
    "an input as it is": (lambda _, x: x, (X,), {}, {"x": AXES}, {"x": BS}, {"output": BS}),
    "one tensor given twice": (
        lambda self, x, y: self.linear(x) - y,
        (X, X),
        {},
        {"x": AXES, "y": AXES},
        {"x": BS, "y": BS},
        {"output": BS},
    ),
    "integers, booleans and numbers": (
        lambda self, x: {
            "best": self.linear(x).argmax(-1),
            "above": x > 0,
            "sum": x.sum(),
            "places": torch.arange(x.shape[1]),
        },
        (X,),
        {},
        {"x": AXES},
        {"x": BS},
        {"best": ["b", "s"], "above": BS, "sum": [], "places": ["s"]},
    ),
    "outputs without the dynamic axes": (
        lambda self, x: (self.linear(x).mean((0, 1)), self.linear.weight * x[0, 0]),
        (X,),
        {},
        {"x": AXES},
        {"x": BS},
        {"output_0": [4], "output_1": [4, 4]},
    ),
    "one axis": (
        lambda _, v: v * 2,
        (drawn(6),),
        {},
        {"v": {0: "n"}},
        {"v": ["n"]},
        {"output": ["n"]},
    ),
    "no axis": (
        lambda self, v, n: self.linear.bias * v + n,
        (torch.tensor(1.5), torch.tensor(3)),
        {},
        None,
        {"v": [], "n": []},
        {"output": [4]},
    ),
    "a result that is partly None": (
        lambda self, x: (None, self.linear(x), None),
        (X,),
        {},
        {"x": AXES},
        {"x": BS},
        {"output_1": BS},
    ),
}


@pytest.mark.parametrize("name", INTERFACES)
def test_interfaces(tmp_path, name):
    forward, args, kwargs, labels, inputs, outputs = INTERFACES[name]
    module = module_of(forward)
    result = export(
        module, tmp_path / "x", args=args, kwargs=kwargs, dynamic_shapes=labels, validate=True
    )
    assert interface(result) == (inputs, outputs)
    assert result.report.passed, result.report.to_markdown()
    agrees(result, module, *args, **kwargs)
    if [] not in [*inputs.values(), *outputs.values()]:
        assert replay(result.path).passed


def test_constants_are_in_the_notes(tmp_path):
    result = export(
        module_of(with_options),
        tmp_path / "x",
        args=(X,),
        kwargs={"y": Y, "sign": False, "how": "plain"},
    )
    (note,) = result.notes
    assert note == "fixed in the graph, as in the example: sign=False, how='plain'"
    config = json.loads((result.path / "config.json").read_text())
    assert config["module"]["constants"] == {"sign": "False", "how": "plain"}


def test_outputs_are_renamed_and_caches_are_not(tmp_path):
    module = module_of(lambda self, x, past: (self.linear(x), (past[0] * 2, past[1]), x * 2))
    result = export(
        module,
        tmp_path / "x",
        args=(X, KEYS),
        dynamic_shapes=({0: "b", 1: "s"}, {0: "b", 2: "p"}),
        output_names=["logits", "twice"],
        validate=True,
    )
    assert list(interface(result)[1]) == ["logits", "present.0.key", "present.0.value", "twice"]
    assert result.report.passed


def test_one_pair_of_an_attention_is_served(tmp_path):
    model = modules.enlivened(Served())
    result = export(
        model,
        tmp_path / "x",
        args=with_past(4),
        dynamic_shapes=[ONE, {0: "batch", 1: "past+sequence"}, {0: "batch", 2: "past"}],
        target="onnx",
        validate=True,
    )
    assert result.report.passed, result.report.to_markdown()
    assert list(interface(result)[1]) == ["output", "present.0.key", "present.0.value"]
    decoder = Decoder.open(result.path)
    x = drawn(1, 5, 32, seed=3)
    parts = [decoder.prefill(x[:, :4].numpy()), decoder.decode(x[:, 4:].numpy())]
    (truth,) = modules.in_double(model.attention, x)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), truth, rtol=1e-4, atol=1e-5)


def test_weights_are_copied_where_they_are_examples(tmp_path):
    """A graph must not take a tensor that is given for the weight it was in the example."""
    module = module_of(lambda self, x, w: F.linear(x, w) + self.linear(x))
    result = export(
        module,
        tmp_path / "x",
        args=(X, module.linear.weight),
        dynamic_shapes={"x": AXES},
        validate=True,
    )
    assert result.report.passed
    agrees(result, module, Y, drawn(4, 4, seed=7))


# --- labels ----------------------------------------------------------------------------------

BATCHED = ["b", "s", 4]


def blocks(self: Any, x: Tensor) -> Tensor:
    return self.linear(x.unflatten(1, (-1, 8)).mean(2))


def joined(self: Any, x: Tensor, past: Tensor, mask: Tensor) -> Tensor:
    return self.linear(torch.cat((past, x), dim=1)) * mask.unsqueeze(-1)


def linear(self: Any, x: Tensor) -> Tensor:
    return self.linear(x)


def plus(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return self.linear(x) + y


SUMMED = {"x": {1: "sequence"}, "past": {1: "past_sequence"}}
SUM = ["past_sequence+sequence", "sequence+past_sequence"]
JOINED = [drawn(2, 3, 4), drawn(2, 5, 4, seed=1), drawn(2, 8)]
EMPTY = [drawn(2, 1, 4), drawn(2, 0, 4), drawn(2, 1)]
LABELLED = {
    "Dims": (
        linear,
        [X],
        {"x": {-3: Dim("b"), -2: Dim("s", min=2, max=50)}},
        {"x": BATCHED},
        BATCHED,
        {"b": [1, None], "s": [2, 50]},
    ),
    "hints": (
        linear,
        [X],
        {"x": {0: Dim.DYNAMIC(max=9), 1: Dim.AUTO, 2: Dim.STATIC}},
        {"x": ["x_0", "x_1", 4]},
        ["x_0", "x_1", 4],
        {"x_0": [1, 9], "x_1": [1, None]},
    ),
    "a batch of one": (linear, [X[:1, :1]], (["b", "s", None],), {"x": BATCHED}, BATCHED, {}),
    "sizes that stay": (linear, [X], {"x": {0: "b", 1: 5}}, {"x": ["b", 5, 4]}, ["b", 5, 4], {}),
    "blocks": (
        blocks,
        [drawn(2, 24, 4)],
        {"x": {0: "b", 1: "8*blocks"}},
        {"x": ["b", "8*blocks", 4]},
        None,
        {"b": [1, None], "blocks": [1, None]},
    ),
    "one block": (
        blocks,
        [drawn(1, 8, 4)],
        {"x": {0: "b", 1: "8 * blocks"}},
        {"x": ["b", "8*blocks", 4]},
        None,
        {},
    ),
    "one less": (
        lambda self, x, y: self.linear(x)[:, 1:] * y,
        [X, drawn(3, 4, 4)],
        {"x": AXES, "y": {0: "b", 1: "s-1"}},
        {"x": BATCHED, "y": ["b", "s-1", 4]},
        ["b", "s-1", 4],
        {},
    ),
    "a sum": (
        joined,
        JOINED,
        {**SUMMED, "mask": {1: "past_sequence + sequence"}},
        {"x": [2, "sequence", 4], "past": [2, "past_sequence", 4], "mask": [2, SUM[0]]},
        [2, SUM[1], 4],
        {"past_sequence": [1, None], "sequence": [1, None]},
    ),
    "a sum after an empty past": (
        joined,
        EMPTY,
        {**SUMMED, "mask": {1: "past_sequence+sequence"}},
        {"x": [2, "sequence", 4], "past": [2, "past_sequence", 4], "mask": [2, SUM[0]]},
        [2, SUM[1], 4],
        {},
    ),
    "a sum by its name": (
        joined,
        EMPTY,
        {**SUMMED, "mask": {1: "total_sequence"}},
        {"x": [2, "sequence", 4], "past": [2, "past_sequence", 4], "mask": [2, SUM[1]]},
        [2, SUM[1], 4],
        {},
    ),
    "two that must be equal": (
        plus,
        [X, Y],
        {"x": {0: "b", 1: "s"}, "y": {0: "b", 1: "t"}},
        {"x": BATCHED, "y": BATCHED},
        BATCHED,
        {"b": [1, None], "s": [1, None]},
    ),
    "the narrower of two ranges": (
        plus,
        [X, Y],
        {"x": {0: Dim("b", max=9)}, "y": {0: Dim("b", max=7)}},
        {"x": ["b", 5, 4], "y": ["b", 5, 4]},
        ["b", 5, 4],
        {"b": [1, 7]},
    ),
}


@pytest.mark.parametrize("name", LABELLED)
def test_labels(tmp_path, name):
    forward, args, labels, inputs, output, ranges = LABELLED[name]
    module = module_of(forward)
    result = export(module, tmp_path / "x", args=args, dynamic_shapes=labels)
    got, outputs = interface(result)
    assert got == inputs
    if output is not None:
        assert outputs == {"output": output}
    for label, served in ranges.items():
        assert result.graph["ranges"][label] == served
    assert replay(result.path).passed
    agrees(result, module, *args)


def test_leaf_names_are_keys_too(tmp_path):
    module = module_of(lambda self, x, past: (self.linear(x), past[0][0] * 2, past[1][1] * 2))
    pairs = [KEYS, KEYS[::-1]]
    labels = {"x": AXES, "past_key_values.0.key": {0: "b"}, "past_key_values.1.value": {2: "p"}}
    result = export(module, tmp_path / "x", args=(X, pairs), dynamic_shapes=labels, validate=True)
    inputs, _ = interface(result)
    assert inputs["past_key_values.0.key"] == ["b", 2, 4, 8]
    assert inputs["past_key_values.0.value"] == [3, 2, 4, 8]
    assert inputs["past_key_values.1.value"] == [3, 2, "p", 8]
    assert result.report.passed


def test_sizes_that_the_module_refuses_bound_a_label(tmp_path):
    """A guard on a shape narrows what is served, and the proof goes up to it."""

    def forward(self, x):
        if x.shape[1] > 20:
            raise ValueError(f"at most 20, got {x.shape[1]}")
        return self.linear(x)

    module = module_of(forward)
    result = export(module, tmp_path / "x", args=(X,), dynamic_shapes={"x": AXES}, validate=True)
    assert result.graph["ranges"]["s"] == [1, 20]
    assert result.report.passed
    assert max(case.sequence for case in result.report.cases) == 20


# --- masks and caches of other kinds ---------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_padding_is_proven_where_the_length_is_fixed(tmp_path, batch):
    module = modules.enlivened(Served())
    given = drawn(batch, 7, 32), torch.ones(batch, 7, dtype=torch.int64)
    result = export(module, tmp_path / "x", args=given, validate=True)
    assert result.report.passed, result.report.to_markdown()
    case = next(c for c in result.report.cases if c.name == "rows of different lengths")
    assert 0 < case.tokens < 7 * batch
    assert replay(result.path).passed


def with_past(new: int, *, dtype: torch.dtype = torch.int64) -> tuple[Any, ...]:
    pair = drawn(2, 2, 3, 16), drawn(2, 2, 3, 16, seed=1)
    return drawn(2, new, 32), torch.ones(2, 3 + new, dtype=dtype), pair


def of_one_token(folder: Path, target: str) -> Any:
    labels = [{0: "batch"}, {0: "batch", 1: "past+1"}, {0: "batch", 2: "past"}]
    return export(
        modules.enlivened(Served()),
        folder,
        args=with_past(1),
        dynamic_shapes=labels,
        target=target,
        validate=True,
    )


def test_a_graph_for_one_token_is_proven_after_a_past(tmp_path):
    result = of_one_token(tmp_path / "x", "ort")
    assert result.report.passed, result.report.to_markdown()
    assert {case.past for case in result.report.cases} == {0, 1, 16, LONGEST - 1}
    assert result.graph["ranges"]["past"] == [0, LONGEST - 1]


class Placed(Served):
    def forward(self, x: Tensor, attention_mask: Tensor, past: Any, position_ids: Tensor) -> Any:
        return self.attention(
            x, attention_mask=attention_mask, past=past, position_ids=position_ids
        )


def test_positions_continue_where_the_past_ends(tmp_path):
    """The example's begin at 3, after a past of 3: those of an empty past begin at 0."""
    model = modules.enlivened(Placed())
    ids_after = (torch.arange(4) + 3).expand(2, -1)
    result = export(
        model,
        tmp_path / "x",
        args=(*with_past(4), ids_after),
        dynamic_shapes=[ONE, {0: "batch", 1: "past+sequence"}, {0: "batch", 2: "past"}, ONE],
        validate=True,
    )
    assert result.report.passed, result.report.to_markdown()
    assert LONGEST in {case.sequence for case in result.report.cases}
    decoder = Decoder.open(result.path)
    x, places = drawn(1, 5, 32, seed=3), torch.tensor([[7, 9, 4, 4, 20]])
    parts = [
        decoder.prefill(x[:, :4].numpy(), position_ids=places[:, :4].numpy()),
        decoder.decode(x[:, 4:].numpy(), position_ids=places[:, 4:].numpy()),
    ]
    mask, empty = torch.ones(1, 5, dtype=torch.int64), model.attention.empty_cache()
    truth, *_ = modules.in_double(model, x, mask, empty, places)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), truth, rtol=1e-4, atol=1e-5)


def test_token_ids_that_count_up_are_no_positions(tmp_path):
    model = modules.language_model(layers=1)
    given = modules.example(model) | {"input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])}
    result = export(model, tmp_path / "x", kwargs=given, dynamic_shapes=modules.LABELS)
    stored = onnx.TensorProto()
    for file in sorted(result.path.glob("test_data_set_*/input_0.pb")):
        stored.ParseFromString(file.read_bytes())
        assert set(numpy_helper.to_array(stored).ravel()) <= set(range(1, 9))


class AnyMask(nn.Module):
    """A mask that says who sees whom, under the name of a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)


CAUSAL = torch.ones(7, 7, dtype=torch.bool).tril()
MASKS = {
    "of pairs": (CAUSAL.expand(2, 1, 7, 7), {0: "batch", 2: "sequence", 3: "sequence"}),
    "of one batch": (CAUSAL, {0: "sequence", 1: "sequence"}),
}


def exported_with_mask(name: str, folder: Path) -> Any:
    mask, labels = MASKS[name]
    shapes = {"x": ONE, "attention_mask": labels}
    module = modules.enlivened(AnyMask())

    def draw(sizes: Any, _: Any) -> dict[str, Tensor]:
        length = sizes["sequence"]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        pairs = seen.expand(sizes["batch"], 1, length, length)
        return {"attention_mask": pairs if mask.ndim == 4 else seen}

    given = drawn(2, 7, 16), mask
    return export(module, folder, args=given, dynamic_shapes=shapes, inputs=draw, validate=True)


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_pairs_are_not_taken_for_padding(tmp_path, name):
    result = exported_with_mask(name, tmp_path / "x")
    assert result.report.passed, result.report.to_markdown()


# --- what is refused -----------------------------------------------------------------------


class Decomposing(modules.Given):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return torch.linalg.qr(y)[0]


class Deciding(modules.Given):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if y.sum() > 0:
            return y
        return -y


class Leaving(modules.Given):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2)


class Raising(modules.Given):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] > 1, "two at least"
        return self.linear(x)


def hooked() -> nn.Module:
    module = Served()
    module.attention.q_proj.register_forward_hook(lambda *_: None)
    return module


class Adapter(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def adapted() -> nn.Module:
    module = Served()
    module.attention.q_proj = Adapter(32, 32)
    return module


def exporting(forward: Any = linear, *args: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A module, and what `export` is given beside it."""
    module = forward if isinstance(forward, nn.Module) else module_of(forward)
    return module, {"args": args or (X,), "dynamic_shapes": None, **options}


def labelled(labels: Any, *args: Any) -> tuple[Any, dict[str, Any]]:
    return exporting(plus if args else linear, *args, dynamic_shapes=labels)


LINE = r"test_modules\.py:\d+ `"
MASKED = drawn(2, 7, 32), torch.ones(2, 7, dtype=torch.int64)
REFUSED = {
    # labels
    "unknown input": (labelled({"y": AXES}), r"inputs of Given \(x\), got 'y'"),
    "no such axis": (labelled({"x": {3: "b"}}), "one of its 3 axes, got 3"),
    "no such axis from the end": (labelled({"x": {-4: "b"}}), "got -4"),
    "an axis by name": (labelled({"x": {"0": "b"}}), "axes as integers, got '0'"),
    "two names": (labelled({"x": {0: "b c"}}), "got 'b c'"),
    "no name": (labelled({"x": {0: ""}}), "got ''"),
    "a number": (labelled({"x": {0: "3"}}), "with a name, got '3'"),
    "a call": (labelled({"x": {0: "f(x)"}}), r"\+, -, \* and // .* got 'f\(x\)'"),
    "a quotient": (labelled({"x": {0: "b/2"}}), "got 'b/2'"),
    "a division by zero": (labelled({"x": {0: "b", 1: "b//0"}}), "divide by zero"),
    "a float": (labelled({"x": {0: 1.5}}), "text or a torch.export.Dim, .* got 1.5"),
    "another size": (labelled({"x": {0: 7}}), "give its size 3, got 7"),
    "a truth value": (labelled({"x": {0: True}}), "got True"),
    "no mapping of axes": (labelled({"x": "batch"}), "mapping from axes to labels, got 'batch'"),
    "no mapping": (labelled(5), "mapping from inputs to axes, got int"),
    "a text for a mapping": (labelled("batch"), "mapping from inputs to axes, got str"),
    "too many entries": (labelled([AXES, AXES]), "one entry for each of x, got 2"),
    "too few axes": (labelled({"x": ("b", "s")}), r"got \('b', 's'\)"),
    "two sizes of a label": (labelled({"x": {0: "b", 1: "b"}}), "is 3 in the example's x, got 5"),
    "a sum that is not": (
        labelled({"x": {0: "b", 1: "b+1"}}),
        r"labelled b\+1, which is 4 in the example, got 5",
    ),
    "a part without a label": (labelled({"x": {0: "b+c"}}), "no axis is labelled b"),
    "less than the example": (labelled({"x": {0: Dim("b", max=2)}}), "at most 2, and is 3"),
    "an axis the module fixes": (
        exporting(lambda self, x: self.linear(x).reshape(3, -1), dynamic_shapes={"x": AXES}),
        r"axis 0 of x was to be dynamic \(b\) and Given works with size 3 only",
    ),
    "an axis that stays one": (labelled({"y": {1: "t"}}, X, drawn(3, 1, 4)), r"traced at \(t 2"),
    # inputs
    "too few arguments": (exporting(plus, X), "missing a required argument: 'y'"),
    "too many arguments": (exporting(linear, X, X), "too many positional arguments"),
    "an unknown keyword": (exporting(kwargs={"z": X}), "unexpected keyword argument 'z'"),
    "a text for arguments": (exporting(args="x"), "tuple of example inputs, got str"),
    "no tensor": (exporting(lambda self, n: self.linear(torch.ones(n, 4)), 3), "hold a tensor"),
    "no example": (exporting(args=None), "example inputs of Given, got None"),
    "complex numbers": (exporting(linear, X.to(torch.complex64)), "got complex64"),
    "double precision": (exporting(linear, X.double()), "x must be one of .* got float64"),
    "sparse": (exporting(linear, torch.eye(4).to_sparse()), "got float32 sparse_coo"),
    "an array": (exporting(linear, X.numpy()), "a tensor, a number, a text or None, got ndarray"),
    "what the module refuses": (
        exporting(linear, drawn(3, 5)),
        LINE + "return self.linear.* raises RuntimeError at the example inputs",
    ),
    # outputs
    "nothing returned": (exporting(lambda *_: None), "must return a tensor, got NoneType"),
    "an empty result": (exporting(lambda *_: ()), "must return a tensor, got tuple"),
    "a number returned": (exporting(lambda _, x: (x, 3)), "output_1 must be .* got int 3"),
    "a text returned": (exporting(lambda _, x: {"a": x, "b": "c"}), "got str 'c'"),
    "a set returned": (exporting(lambda *_: {"a": {1}}), "got set: a graph"),
    "complex returned": (exporting(lambda _, x: torch.fft.fft(x)), "got complex64"),
    "double returned": (exporting(lambda _, x: x.double()), "output must .* got float64"),
    "the name of an input": (exporting(lambda _, x: {"x": x * 2}), "name of an input"),
    "one name twice": (
        exporting(lambda _, x: {"a.b": x, "a": {"b": x * 2}}),
        "two outputs would be named 'a.b'",
    ),
    "too few names": (exporting(output_names=[]), "name the 1 outputs .* got 0"),
    "a text of names": (exporting(output_names="y"), "list of names, got 'y'"),
    "an empty name": (exporting(output_names=[""]), r"list of names, got \[''\]"),
    # what it does
    "a decision": (exporting(Deciding()), LINE + r"if y\.sum\(\) > 0:` depends on the values"),
    "numpy": (exporting(Leaving()), LINE + r"return torch\.from_numpy.* cannot be traced"),
    "no ONNX form": (exporting(Decomposing()), r"linalg_qr, used by `.*torch\.linalg\.qr.*no form"),
    "random numbers": (exporting(lambda _, x: x + torch.rand_like(x)), "same numbers"),
    "dropout that stays on": (
        exporting(lambda self, x: F.dropout(self.linear(x), 0.5, training=True)),
        "output of two runs differs",
    ),
    "sizes it raises on": (
        exporting(Raising(), dynamic_shapes={"x": AXES}),
        LINE + r"assert .* raises AssertionError at b 1, s 1: two at least",
    ),
    "no finite numbers": (exporting(lambda _, x: torch.log(x - 1e9)), "finite numbers"),
    # its parts
    "hooks": (exporting(hooked(), *MASKED), "attention.q_proj must have no forward hooks"),
    "adapters": (exporting(adapted(), *MASKED), "attention.q_proj must be a plain nn.Linear"),
    "double weights": (exporting(nn.Linear(4, 4).double(), X), "weights must .* got float64"),
    "weights without numbers": (exporting(nn.Linear(4, 4, device="meta"), X), "meta device"),
    "bfloat16 on the CPU": (exporting(nn.Linear(4, 4).bfloat16(), X.bfloat16()), "bfloat16"),
    "a class": (({"module": nn.Linear}, {"args": (X,)}), "torch.nn.Module, got type"),
    # options
    "a cache": (exporting(cache=True), "cache is of an Attention exported alone"),
    "one length": (exporting(static=True), "static is of an Attention exported alone"),
    "no such target": (exporting(target="tflite"), "target must be one of"),
    "no length": (exporting(max_seq_len=0), "max_seq_len must be at least 1, got 0"),
    "longer than its table": (
        exporting(Served(), *MASKED, max_seq_len=33),
        "at most the 32 positions .* got 33",
    ),
    "padding on no side": (exporting(padding="top"), "padding must be one of"),
    # what draws inputs
    "inputs that are no function": (exporting(inputs={"x": X}), "must be a function"),
    "inputs that raise": (exporting(inputs=lambda *_: 1 / 0), "ZeroDivisionError"),
    "inputs without a generator": (exporting(inputs=lambda _: {}), "TypeError"),
    "inputs without names": (exporting(inputs=lambda *_: [X]), "by name, got list"),
    "inputs of another name": (exporting(inputs=lambda *_: {"y": X}), r"\(x\), got 'y'"),
    "inputs of another shape": (
        exporting(inputs=lambda *_: {"x": X[:2]}),
        r"x as \[3, 5, 4\] of torch.float32, got \[2, 5, 4\]",
    ),
    "inputs of another dtype": (
        exporting(inputs=lambda *_: {"x": X.half()}),
        "got .* of torch.float16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_one_line_and_leaves_nothing(tmp_path, name):
    (module, options), says = REFUSED[name]
    if isinstance(module, dict):
        module = module["module"]
    with pytest.raises(BadInputError, match=says) as caught:
        export(module, tmp_path / "x", **options)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_leaves_the_artifact_that_was_there(tmp_path):
    export(module_of(linear), tmp_path / "x", args=(X,))
    before = tree(tmp_path)
    for name in ("no name", "a decision", "no ONNX form", "inputs that raise"):
        (module, options), says = REFUSED[name]
        with pytest.raises(BadInputError, match=says):
            export(module, tmp_path / "x", **options)
        assert tree(tmp_path) == before


def test_inputs_are_drawn_by_the_caller(tmp_path):
    """Sizes come by label, arrays do as well as tensors, and what is left out is drawn as ever."""
    seen = []

    def draw(sizes: dict[str, int], rng: np.random.Generator) -> dict[str, Any]:
        seen.append(sizes)
        shape = sizes["b"], sizes["s"], 4
        return {"x": rng.standard_normal(shape).astype(np.float32) + 100}

    module = module_of(lambda self, x, y: self.linear(x - 100) + y)
    result = export(
        module,
        tmp_path / "x",
        args=(X, Y),
        dynamic_shapes=[AXES, AXES],
        inputs=draw,
        validate=True,
    )
    assert result.report.passed
    assert {tuple(sizes) for sizes in seen} == {("b", "s")}
    session = json.loads((result.path / "config.json").read_text())["test_vectors"]
    assert len(session) == len({(s["b"], s["s"]) for s in seen}) - 1  # one was for sensitivity
    stored = onnx.TensorProto()
    stored.ParseFromString((result.path / "test_data_set_1/input_0.pb").read_bytes())
    assert abs(numpy_helper.to_array(stored).mean() - 100) < 1


def test_validate_knows_what_was_exported(tmp_path):
    module = module_of(linear)
    result = export(module, tmp_path / "x", args=(X,), dynamic_shapes={"x": AXES})
    other, two = module_of(lambda self, y: self.linear(y)), module_of(plus)
    for wrong, args, says in (
        (module, None, "args must be example inputs of Given, as given to export, got None"),
        (module, (drawn(4),), r"x must have more than 1 axes, as at the export, got \[4\]"),
        (module, (X.half(),), "raises RuntimeError"),
        (other, (X,), "args must be those of the export, x, got y"),
        (two, (X, Y), "args must be those of the export, x, got x, y"),
        (Attention(16, 2), (drawn(2, 5, 16),), "those of the export, x, got hidden_states"),
    ):
        with pytest.raises(BadInputError, match=says):
            validate(result, wrong, args=args)
    for forward, reason in (
        (lambda self, x: {"y": self.linear(x)}, "the graph has no output 'y'"),
        (lambda self, x: self.linear(x)[..., :2], "output is (1, 1, 4), not (1, 1, 2)"),
        (lambda self, x: self.linear(x) > 0, "output is float32, not bool"),
        (lambda self, x: self.linear(x) * 1.001, None),
    ):
        report = validate(result, module_of(forward), args=(X,))
        assert not report.passed
        assert report.cases[0].reason == reason
    assert validate(str(result.path), torch.compile(module), kwargs={"x": Y}).passed


# --- known defects --------------------------------------------------------------------------


def test_numbers_without_axes_replay(tmp_path):
    module = module_of(lambda self, x: (self.linear(x), x.sum()))
    result = export(module, tmp_path / "x", args=(X,), dynamic_shapes=[AXES], validate=True)
    assert result.report.passed
    assert replay(result.path).passed


def test_numbers_without_axes_are_given_as_they_are(tmp_path):
    module = module_of(lambda self, x, n: (self.linear(x), n * 2))
    result = export(module, tmp_path / "x", args=(X, torch.tensor(3)), validate=True)
    assert result.report.passed, result.report.to_markdown()


def test_a_tensor_for_arguments_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="tuple of example inputs, got Tensor"):
        export(module_of(linear), tmp_path / "x", args=X)


def test_an_output_that_is_a_constant_keeps_its_name(tmp_path):
    module = module_of(lambda self, x: {"y": self.linear(x), "version": torch.tensor(3)})
    result = export(module, tmp_path / "x", args=(X,), dynamic_shapes={"x": AXES}, validate=True)
    assert list(interface(result)[1]) == ["y", "version"]
    assert result.report.passed


@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_a_padding_mask_in_attention_of_pytorch(tmp_path, target):
    module = module_of(
        lambda _, x, padding: F.scaled_dot_product_attention(
            x, x, x, attn_mask=~padding[:, None, None, :]
        )
    )
    labels = {"x": {0: "b", 2: "s"}, "padding": AXES}
    given = drawn(2, 2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    result = export(
        module, tmp_path / "x", args=given, dynamic_shapes=labels, target=target, validate=True
    )
    assert result.report.passed, result.report.to_markdown()


def test_equal_weights_stay_apart(tmp_path):
    module = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4))
    result = export(module, tmp_path / "x", args=(X,))
    names = {t.name for t in onnx.load(result.model).graph.initializer}
    assert {"0.weight", "2.weight"} <= names


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_of_pairs_replays(tmp_path, name):
    assert replay(exported_with_mask(name, tmp_path / "x").path).passed


def test_a_cache_that_no_decoder_can_drive_replays(tmp_path):
    result = of_one_token(tmp_path / "x", "onnx")
    assert result.graph["cache"] is None
    assert replay(result.path).passed


def test_masks_of_other_dtypes_are_served(tmp_path):
    result = export(
        modules.enlivened(Served()),
        tmp_path / "x",
        args=with_past(4, dtype=torch.bool),
        dynamic_shapes=[ONE, {0: "batch", 1: "past+sequence"}, {0: "batch", 2: "past"}],
        validate=True,
    )
    assert result.report.passed, result.report.to_markdown()


def test_a_past_of_fixed_length(tmp_path):
    result = export(
        modules.enlivened(Served()),
        tmp_path / "x",
        args=with_past(4),
        dynamic_shapes=[ONE, {0: "batch", 1: "sequence+3"}, {0: "batch"}],
        validate=True,
    )
    assert result.graph["ranges"]["sequence"] == [1, LONGEST - 3]
    assert result.report.passed, result.report.to_markdown()
