"""Small modules of a user's own: a language model with a cache, and attention written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rope_export import Attention, ExportResult, RotaryEmbedding, export

VOCABULARY, HIDDEN, HEADS, KV_HEADS, LAYERS, LONGEST = 23, 64, 4, 2, 2, 32
HEAD_DIM = HIDDEN // HEADS
LABELS = {
    "input_ids": {0: "batch", 1: "sequence"},
    "attention_mask": {0: "batch", 1: "past_sequence+sequence"},
    "past_key_values": {0: "batch", 2: "past_sequence"},
}
Cache = tuple[Tensor, Tensor]


class Layer(nn.Module):
    """Attention and an MLP, each behind a norm, with a RoPE of its own."""

    def __init__(self, **attention: Any) -> None:
        super().__init__()
        rope = RotaryEmbedding(HEAD_DIM, layout="half", max_seq_len=LONGEST)
        self.norm = nn.RMSNorm(HIDDEN)
        self.attention = Attention(HIDDEN, HEADS, num_kv_heads=KV_HEADS, rope=rope, **attention)
        self.mlp = nn.Sequential(
            nn.Linear(HIDDEN, 96), nn.SiLU(), nn.Dropout(0.5), nn.Linear(96, HIDDEN)
        )

    def forward(self, x: Tensor, attention_mask: Tensor, past: Cache) -> tuple[Tensor, Cache]:
        attended, present = self.attention(self.norm(x), attention_mask=attention_mask, past=past)
        x = x + attended
        return x + self.mlp(x), present


class LanguageModel(nn.Module):
    """Token ids to logits; the head is the embedding."""

    def __init__(self, layers: int = LAYERS, **attention: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer(**attention) for _ in range(layers))
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: list[Cache]
    ) -> dict[str, Any]:
        x, presents = self.embedding(input_ids), []
        for layer, past in zip(self.layers, past_key_values, strict=True):
            x, present = layer(x, attention_mask, past)
            presents.append(present)
        return {"logits": self.head(self.norm(x)), "present_key_values": presents}

    def empty_cache(self) -> list[Cache]:
        return [layer.attention.empty_cache() for layer in self.layers]


def enlivened(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give all weights numbers of a size at which every part matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        normal = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            normal *= 1.5 * (parameter[0].numel()) ** -0.5
        else:
            normal = 1 + normal / 4
        parameter.data = normal.to(parameter.dtype)
    return module


def language_model(dtype: str = "float32", **options: Any) -> LanguageModel:
    model = enlivened(LanguageModel(**options), seed=11).eval()
    return model.to(getattr(torch, dtype))


def example(
    model: LanguageModel, batch: int = 2, length: int = 4, past: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Inputs to trace the model with."""
    generator = torch.Generator().manual_seed(seed)
    dtype = model.head.weight.dtype
    shape = (batch, KV_HEADS, past, HEAD_DIM)
    return {
        "input_ids": torch.randint(0, VOCABULARY, (batch, length), generator=generator),
        "attention_mask": torch.ones(batch, past + length, dtype=torch.int64),
        "past_key_values": [
            tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
            for _ in model.layers
        ],
    }


class Models:
    """Language models and their artifacts, made when they are first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[tuple[str, ...], tuple[LanguageModel, ExportResult]] = {}

    def get(
        self, target: str = "ort", dtype: str = "float32", padding: str = "right"
    ) -> tuple[LanguageModel, ExportResult]:
        key = target, dtype, padding
        if key not in self._made:
            model = language_model(dtype)
            result = export(
                model,
                self._root / "-".join(key),
                kwargs=example(model),
                dynamic_shapes=LABELS,
                target=target,
                padding=padding,
                validate=True,
            )
            self._made[key] = model, result
        return self._made[key]


class Served(nn.Module):
    """One attention with a mask and, where it is given one, a past in one pair."""

    def __init__(self) -> None:
        super().__init__()
        rope = RotaryEmbedding(16, layout="half", max_seq_len=LONGEST)
        self.attention = Attention(32, 2, rope=rope)

    def forward(self, x: Tensor, attention_mask: Tensor, past: Cache | None = None) -> Any:
        return self.attention(x, attention_mask=attention_mask, past=past)


class SelfAttention(nn.Module):
    """Attention of PyTorch with the rotation of ours, ``[B, S, 32]``."""

    def __init__(self, rotate: Callable[..., Any], *, causal: bool = True, **rope: Any) -> None:
        super().__init__()
        self.rope = RotaryEmbedding(8, **rope)
        self.qkv = nn.Linear(32, 96)
        self.o = nn.Linear(32, 32)
        self.rotate, self.causal = rotate, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        q, k = self.rotate(self.rope, q, k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(y.transpose(1, 2).flatten(2))


class Given(nn.Module):
    """A linear layer, and whatever is to be done with it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


def module_of(forward: Callable[..., Any]) -> nn.Module:
    """A module with that ``forward``, which finds ``self.linear``."""
    return enlivened(type("Given", (Given,), {"forward": forward})()).eval()


def axes(value: onnx.ValueInfoProto) -> list[str | int]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def interface(result: ExportResult) -> tuple[dict[str, Any], dict[str, Any]]:
    """Axes of the inputs and outputs of the graph on disk."""
    graph = onnx.load(result.model).graph
    inputs, outputs = ({v.name: axes(v) for v in part} for part in (graph.input, graph.output))
    return inputs, outputs


def tensors_in(value: Any) -> list[Tensor]:
    if is_dataclass(value) and not isinstance(value, Mapping):
        value = [getattr(value, field.name) for field in fields(value)]
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def run(result: ExportResult, *args: Any, **kwargs: Any) -> list[np.ndarray]:
    """Outputs of the graph in onnxruntime, for tensors in the order of its inputs."""
    session = onnxruntime.InferenceSession(result.model, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    given = [t.detach().numpy() for t in tensors_in((args, kwargs))]
    return session.run(None, dict(zip(names, given, strict=True)))


def widened(value: Any) -> Any:
    wide = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if wide else value


@torch.no_grad()
def in_double(module: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    """What the module itself gives in float64, in plain PyTorch."""
    args, kwargs = pytree.tree_map(widened, (args, kwargs))
    return tensors_in(copy.deepcopy(module).eval().double()(*args, **kwargs))


def agrees(
    result: ExportResult, module: nn.Module, *args: Any, limit: float = 3e-6, **kwargs: Any
) -> None:
    """Compare onnxruntime with plain PyTorch in float64."""
    got, wanted = run(result, *args, **kwargs), in_double(module, *args, **kwargs)
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        truth = theirs.numpy()
        assert ours.shape == truth.shape
        if truth.dtype.kind == "f":
            error = np.linalg.norm(ours.astype(np.float64) - truth)
            assert error <= limit * max(float(np.linalg.norm(truth)), 1e-30)
        else:
            assert ours.dtype == truth.dtype
            assert np.array_equal(ours, truth)


# --- defects in the graph of a language model -----------------------------------------------

GraphMutation = Callable[[onnx.ModelProto], None]


def initializer(model: onnx.ModelProto, part: str) -> onnx.TensorProto:
    (tensor,) = [t for t in model.graph.initializer if part in t.name]
    return tensor


def change(tensor: onnx.TensorProto, to: Callable[[np.ndarray], np.ndarray]) -> None:
    before = numpy_helper.to_array(tensor)
    after = np.ascontiguousarray(to(before.copy())).astype(before.dtype)
    assert not np.array_equal(before, after)
    tensor.CopyFrom(numpy_helper.from_array(after, tensor.name))


def graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """A graph and those in its branches and loops."""
    inner = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return [graph, *(part for g in inner for part in graphs(g))]


def read_instead(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for part in graphs(graph):
        for node in part.node:
            node.input[:] = [names.get(name, name) for name in node.input]


def swap_inputs(model: onnx.ModelProto, first: str, second: str) -> None:
    read_instead(model.graph, {first: second, second: first})


def swap_outputs(model: onnx.ModelProto, first: str, second: str) -> None:
    names = {first: second, second: first}
    read_instead(model.graph, names)
    for node in model.graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]


def sine_negated(model: onnx.ModelProto) -> None:
    change(initializer(model, "angles.sin"), lambda t: -t)


def tables_one_row_off(model: onnx.ModelProto) -> None:
    for name in ("angles.cos", "angles.sin"):
        change(initializer(model, name), lambda t: np.concatenate([t[:1], t[:-1]]))


def weights_with_noise(model: onnx.ModelProto) -> None:
    rng = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".weight") and len(tensor.dims) == 2:
            change(tensor, lambda w: w * (1 + 1e-3 * rng.standard_normal(w.shape)))


def pasts_of_a_layer_exchanged(model: onnx.ModelProto) -> None:
    swap_inputs(model, "past_key_values.1.key", "past_key_values.1.value")


def presents_of_a_layer_exchanged(model: onnx.ModelProto) -> None:
    swap_outputs(model, "present.1.key", "present.1.value")


def caches_of_layers_exchanged(model: onnx.ModelProto) -> None:
    """Each layer reads and writes the cache of the other: generation alone would not show it."""
    for kind in ("key", "value"):
        swap_inputs(model, f"past_key_values.0.{kind}", f"past_key_values.1.{kind}")
        swap_outputs(model, f"present.0.{kind}", f"present.1.{kind}")


def mask_ignored(model: onnx.ModelProto) -> None:
    """Padding counts as tokens."""
    read_instead(model.graph, {"attention_mask": "defect.ones"})
    ones = numpy_helper.from_array(np.array([1], dtype=np.int64))
    for node in (
        helper.make_node("ConstantOfShape", ["defect.size"], ["defect.ones"], value=ones),
        helper.make_node("Shape", ["attention_mask"], ["defect.size"]),
    ):
        model.graph.node.insert(0, node)


def rotation_dropped_in_one_layer(model: onnx.ModelProto) -> None:
    """Layer 1 attends to heads as they were projected."""
    fused = [n for n in model.graph.node if "present.1.key" in n.output and n.op_type == "If"]
    if fused:
        still = {}
        for name, value in (("cos", 1), ("sin", 0)):
            table = initializer(model, f"angles.{name}")
            array = np.full_like(numpy_helper.to_array(table), value)
            still[table.name] = f"defect.{name}"
            model.graph.initializer.append(numpy_helper.from_array(array, still[table.name]))
        for attribute in fused[0].attribute:
            read_instead(attribute.g, still)
        return
    producers = {output: node for node in model.graph.node for output in node.output}
    joins = [n for n in model.graph.node if n.op_type == "Concat" and n.attribute[0].i == -1]
    assert len(joins) == 2 * LAYERS
    for join in joins[-2:]:
        source = producers[join.input[0]]  # half times cosine minus half times sine
        while source.op_type != "Slice":
            source = producers[source.input[0]]
        join.op_type = "Identity"
        del join.input[:], join.attribute[:]
        join.input.append(source.input[0])


GRAPH_MUTANTS: tuple[GraphMutation, ...] = (
    sine_negated,
    tables_one_row_off,
    weights_with_noise,
    pasts_of_a_layer_exchanged,
    presents_of_a_layer_exchanged,
    caches_of_layers_exchanged,
    mask_ignored,
    rotation_dropped_in_one_layer,
)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_past(new: int, *, dtype: torch.dtype = torch.int64) -> tuple[Any, ...]:
    pair = drawn(2, 2, 3, 16), drawn(2, 2, 3, 16, seed=1)
    return drawn(2, new, 32), torch.ones(2, 3 + new, dtype=dtype), pair


def linear(self: Any, x: Tensor) -> Tensor:
    return self.linear(x)


def plus(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return self.linear(x) + y


ONE = {0: "batch", 1: "sequence"}
AXES = {0: "b", 1: "s"}
X, Y, Z = drawn(3, 5, 4), drawn(3, 5, 4, seed=1), drawn(3, 5, 4, seed=2)
