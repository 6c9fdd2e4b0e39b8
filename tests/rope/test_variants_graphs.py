"""Every variant in ONNX graphs, lowered or plain, is right at shapes that were never traced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from selection import slow_unless
from torch import Tensor
from variants import (
    DIM,
    DISTINCT,
    GIVEN,
    HALF,
    IMPLIED,
    LONGEST,
    VARIANTS,
    Variant,
    assert_close,
    assert_true,
    count,
    draw,
    dynamic_shapes,
    heads,
    origin_of,
    pairs,
    shapes_of,
    truth,
    unserved,
    warm_up,
)

from rope_export import RotaryEmbedding
from rope_export.artifacts.targets import OPSETS
from rope_export.dispatch import lowering_to
from rope_export.lowering import onnx as onnx_target
from rope_export.lowering.target import Target

pytestmark = [
    # torch's exporter copies its own deprecated LeafSpec.
    pytest.mark.filterwarnings(
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
    ),
    # It says so for every axis that two inputs share.
    pytest.mark.filterwarnings("ignore:# The axis name:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# onnxruntime


class RotateByAll(torch.nn.Module):
    """Many variants in one graph, which takes half as long as a graph for each.

    Heads are ``[B, H, S, 12]``, of which each variant takes its width.
    """

    def __init__(self, entries: Iterable[tuple[str, str]]) -> None:
        super().__init__()
        self.entries = list(entries)
        self.ropes = torch.nn.ModuleList(VARIANTS[name].make() for name, _ in self.entries)

    def forward(
        self, q: Tensor, k: Tensor, position_ids: Tensor, places: Tensor, grid_ids: Tensor
    ) -> list[Tensor]:
        outputs = []
        for (name, form), rope in zip(self.entries, self.ropes, strict=True):
            variant = VARIANTS[name]
            on_axes = places if variant.axes == 2 else grid_ids
            ids = {"implied": None, "[B, S]": position_ids, "[A, B, S]": on_axes}[form]
            inputs = [x[..., : variant.width] for x in (q, k)]
            if variant.tokens_first:
                inputs = [x.transpose(1, 2) for x in inputs]
            outputs += rope.rotate(*inputs, position_ids=ids)
        return outputs


@dataclass(frozen=True)
class Graph:
    """All variants in one ONNX graph."""

    module: RotateByAll
    program: torch.onnx.ONNXProgram
    session: onnxruntime.InferenceSession

    def rotate(
        self, name: str, form: str, inputs: Sequence[Tensor], ids: Tensor | None
    ) -> list[np.ndarray]:
        """What the graph makes of one variant's own inputs."""
        variant = VARIANTS[name]
        index = self.module.entries.index((name, form))
        q, k = (x.transpose(1, 2) if variant.tokens_first else x for x in inputs)
        wide = [torch.nn.functional.pad(x, (0, 12 - variant.width)) for x in (q, k)]
        batch, length = q.shape[0], q.shape[2]
        none = [torch.zeros(*lead, batch, length, dtype=torch.int64) for lead in ((), (2,), (3,))]
        if ids is not None:
            none[ids.shape[0] - 1 if ids.ndim == 3 else 0] = ids
        names = [node.name for node in self.session.get_inputs()]
        feeds = {n: t.numpy() for n, t in zip(names, (*wide, *none), strict=True)}
        outputs = [node.name for node in self.session.get_outputs()]
        return self.session.run(outputs[2 * index : 2 * index + 2], feeds)

    def rope(self, name: str, form: str) -> RotaryEmbedding:
        return self.module.ropes[self.module.entries.index((name, form))]


def to_onnx(
    module: torch.nn.Module, arguments: tuple[Any, ...], shapes: tuple[Any, ...], target: str | None
) -> torch.onnx.ONNXProgram:
    """A plain export, or one lowered as `rope_export.export` does it."""
    if target is None:
        return torch.onnx.export(
            module, arguments, dynamo=True, dynamic_shapes=shapes, verbose=False
        )
    with lowering_to(Target(target, ("cpu",), 4096)):
        program = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
        return torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSETS[target],
            optimize=False,
            verbose=False,
        )


def session_of(program: torch.onnx.ONNXProgram) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )


ENTRIES = {
    None: [*DISTINCT, ("dynamic", "implied")],
    "onnx": [*GIVEN, *IMPLIED, ("sections", "[B, S]")],
    "primitive": [
        (name, VARIANTS[name].form) for name in ("longrope, any length", "dynamic sections", "xpos")
    ],
}


@cache
def build_graph(target: str | None) -> Graph | Exception:
    module = RotateByAll(ENTRIES[target]).eval()
    for (name, _), rope in zip(module.entries, module.ropes, strict=True):
        warm_up(VARIANTS[name], rope)
    rng = np.random.default_rng(0)
    heads = [torch.zeros(2, count, 6, 12) for count in (3, 1)]
    positions = [torch.from_numpy(rng.integers(0, 12, (*lead, 2, 6))) for lead in ((), (2,), (3,))]
    arguments = (*heads, *positions)
    try:
        program = to_onnx(module, arguments, dynamic_shapes(*arguments), target)
    except Exception as error:  # the same for every test that asks for it
        return error
    return Graph(module, program, session_of(program))


@pytest.fixture
def graph(request) -> Graph:
    """The graph for ``request.param``, a target or None for a plain export."""
    built = build_graph(request.param)
    if isinstance(built, Exception):
        pytest.fail(f"{type(built).__name__}: {built}"[:500], pytrace=False)
    return built


def in_graphs(entries: Iterable[tuple[str, str]], targets: Iterable[str | None] = ENTRIES) -> Any:
    """Once for every graph that holds the entry; plain exports are slow."""
    rows = [(target, *entry) for target in targets for entry in entries if entry in ENTRIES[target]]
    return pytest.mark.parametrize(
        ("graph", "name", "form"),
        slow_unless(lambda target, *_: target is not None, rows),
        indirect=["graph"],
    )


@in_graphs([*GIVEN, *IMPLIED, ("sections", "[B, S]")])
def test_onnxruntime_serves_shapes_that_were_never_traced(graph, name, form):
    variant = VARIANTS[name]
    for batch, length, reach in shapes_of(variant, form):
        inputs = heads(variant, batch, length)
        ids = draw(variant, form, batch, length, reach)
        outputs = graph.rotate(name, form, inputs, ids)
        assert_true(outputs, variant, graph.rope(name, form), inputs, ids)


def producers(program: torch.onnx.ONNXProgram) -> list[Any]:
    """The node behind each output, past changes of shape."""
    found = []
    for value in program.model.graph.outputs:
        node = value.producer()
        while node.op_type in ("Reshape", "Transpose", "Identity", "Cast"):
            node = node.inputs[0].producer()
        found.append(node)
    return found


@pytest.mark.parametrize("graph", ["onnx"], indirect=True)
def test_lowered_every_rotation_is_one_operator(graph):
    program = graph.program
    rotations = producers(program)
    assert {(node.domain, node.op_type) for node in rotations} == {("", "RotaryEmbedding")}
    assert len({id(node) for node in rotations}) == len(rotations) == 2 * len(ENTRIES["onnx"])
    assert count(program, "RotaryEmbedding") == len(rotations)
    assert program.model.opset_imports[""] == 23


@pytest.mark.parametrize(
    "graph", [pytest.param(None, marks=pytest.mark.slow), "primitive"], indirect=True
)
def test_elsewhere_there_is_no_such_operator(graph):
    program = graph.program
    assert count(program, "RotaryEmbedding") == 0
    assert {node.domain for node in program.model.graph} == {""}
    assert program.model.opset_imports[""] <= 20


class RotateOne(torch.nn.Module):
    """Heads of any rank by their implied positions."""

    def __init__(self, shapes: dict[str, tuple[dict[str, Any], int | None, tuple[int, ...]]]):
        super().__init__()
        self.seq_dims = [seq_dim for _, seq_dim, _ in shapes.values()]
        self.ropes = torch.nn.ModuleList(
            RotaryEmbedding(DIM, max_seq_len=LONGEST, **arguments)
            for arguments, _, _ in shapes.values()
        )

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        return [
            rope.rotate_queries_or_keys(t, seq_dim)
            for rope, seq_dim, t in zip(self.ropes, self.seq_dims, tensors, strict=True)
        ]


TOKENS_FIRST = {"seq_before_head_dim": True}
# Constructor, sequence axis, shape; the length is 6.
RANKS = {
    "[S, D]": ({}, None, (6, 8)),
    "[H, S, D]": (HALF, None, (3, 6, 12)),
    "[B, G, H, S, D]": ({}, -2, (2, 2, 3, 6, 12)),
    "[S, H, D]": (TOKENS_FIRST, None, (6, 3, 12)),
    "[B, S, H, D]": (TOKENS_FIRST, None, (2, 6, 3, 8)),
    "[B, S, H, D] by its axis": (HALF, 1, (2, 6, 3, 12)),
    "[B, G, S, H, D]": (HALF | TOKENS_FIRST, None, (2, 2, 6, 3, 8)),
    "[B, H, S, D] by its axis": (TOKENS_FIRST, 2, (2, 3, 6, 8)),
}


def test_heads_of_any_rank_are_rotated_by_one_operator():
    module = RotateOne(RANKS).eval()
    sizes = {n: torch.export.Dim(name, max=LONGEST) for n, name in ((2, "batch"), (6, "length"))}
    shapes = [shape for _, _, shape in RANKS.values()]
    tensors = tuple(torch.zeros(shape) for shape in shapes)
    axes = [{axis: sizes[shape[axis]] for axis in dynamic_axes(shape)} for shape in shapes]
    program = to_onnx(module, tensors, (tuple(axes),), "onnx")
    rotations = producers(program)
    # Where torch cannot merge dynamic axes, five are turned by arithmetic.
    by_node = [len(shape) <= 4 or onnx_target._MERGES_AXES for shape in shapes]
    assert [node.op_type == "RotaryEmbedding" for node in rotations] == by_node
    assert len({id(node) for node in rotations}) == len(RANKS)
    assert count(program, "RotaryEmbedding") == sum(by_node)
    session = session_of(program)
    names = [node.name for node in session.get_inputs()]
    for batch, length in ((1, 1), (5, LONGEST), (3, 17)):
        feeds, expected = {}, []
        for name, (arguments, seq_dim, shape) in zip(names, RANKS.values(), strict=True):
            dynamic = {axis: {2: batch, 6: length}[shape[axis]] for axis in dynamic_axes(shape)}
            given = [dynamic.get(axis, size) for axis, size in enumerate(shape)]
            x = np.random.default_rng(length).standard_normal(given).astype(np.float32)
            feeds[name] = x
            usual = -3 if "seq_before_head_dim" in arguments else -2
            expected.append(turned_alone(x, arguments, usual if seq_dim is None else seq_dim))
        for name, got, exact in zip(RANKS, session.run(None, feeds), expected, strict=True):
            assert got.shape == exact.shape, name
            assert_close(got, exact)


def dynamic_axes(shape: tuple[int, ...]) -> list[int]:
    """The length, which is 6, and a leading batch of 2."""
    return [axis for axis, n in enumerate(shape) if n == 6 or (axis == 0 and n == 2)]


def turned_alone(x: np.ndarray, arguments: dict[str, Any], seq_dim: int) -> np.ndarray:
    last = np.moveaxis(x, seq_dim, -2)
    flat = torch.from_numpy(last.reshape(1, -1, *last.shape[-2:]))
    usual = Variant({"layout": arguments.get("layout", "interleaved")})
    turned, _ = truth(usual, (flat, flat), np.arange(last.shape[-2]))
    return np.moveaxis(turned.reshape(last.shape), -2, seq_dim)


@in_graphs(GIVEN)
def test_a_graph_makes_nan_of_positions_it_does_not_serve(graph, name, form):
    variant = VARIANTS[name]
    rope, inputs = graph.rope(name, form), heads(variant, 2, 6)
    for position in unserved(rope):
        ids = draw(variant, form, 2, 6, 40)
        for axis, row, token in ((0, 1, 4), (-1, 0, 0), (-1, 1, 4)):
            chosen = ids.clone()
            (chosen[axis] if chosen.ndim == 3 else chosen)[row, token] = position
            outputs = graph.rotate(name, form, inputs, chosen)
            outside = (chosen < 0) | (chosen >= rope.positions)
            served = chosen.masked_fill(outside, 0)
            expected = truth(variant, inputs, served.numpy(), origin_of(rope))
            for got, exact in zip(outputs, expected, strict=True):
                assert_unserved(variant, got, exact, outside.numpy(), rope.dim // 2)


def assert_unserved(
    variant: Variant, got: np.ndarray, exact: np.ndarray, outside: np.ndarray, count: int
) -> None:
    """NaN in the pairs that such a position turns, and no plausible number beside them."""
    axis_of_pair = variant.axis_of_pair or [0] * count
    axes = outside if outside.ndim == 3 else outside[None]
    must = np.stack([axes[axis] for axis in axis_of_pair], axis=-1)  # [B, S, pairs]
    if variant.tokens_first:
        got, exact = got.swapaxes(1, 2), exact.swapaxes(1, 2)
    for channels in pairs(variant, count):
        of_pairs = got[..., channels]
        of_heads = np.broadcast_to(must[:, None], of_pairs.shape)
        assert np.isnan(of_pairs[of_heads]).all()
    others = np.broadcast_to(~axes.any(axis=0)[:, None, :, None], got.shape)
    assert not np.isnan(got[others]).any()
    assert_close(np.where(np.isnan(got), exact, got), exact)


@in_graphs([entry for entry in IMPLIED if VARIANTS[entry[0]].make().positions == LONGEST])
def test_implied_positions_beyond_the_last_are_nan_in_a_graph(graph, name, form):
    variant, rope = VARIANTS[name], graph.rope(name, form)
    inputs = heads(variant, 2, LONGEST + 6)
    outputs = graph.rotate(name, form, inputs, None)
    expected = truth(
        variant, [x[:, :, :LONGEST] for x in inputs], np.arange(LONGEST), origin_of(rope)
    )
    for got, exact in zip(outputs, expected, strict=True):
        assert np.isnan(got[:, :, LONGEST:, :DIM]).all()
        assert_close(got[:, :, :LONGEST], exact)
