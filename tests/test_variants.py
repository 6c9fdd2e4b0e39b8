"""Every variant of RotaryEmbedding: eager, compiled, exported, in onnxruntime, against float64."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl

from rope_export import Attention, BadInputError, RotaryEmbedding, export, replay, validate
from rope_export.lowering import lowering_to, rules
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

DIM, LONGEST, TRAINED, SWITCH = 8, 64, 16, 20
PAIRS = np.arange(DIM // 2)


# Frequencies, as their papers have them, in float64

Frequencies = Callable[[int], np.ndarray]


def series(base: float = 10000.0, dim: int = DIM) -> np.ndarray:
    return base ** (-np.arange(0, dim, 2) / dim)


def yarn(factor: float, original: int) -> np.ndarray:
    turning = [original / (2 * np.pi * turns) for turns in (32, 1)]  # wavelengths over 2 pi
    first, last = (DIM / 2 * np.log(length) / np.log(10000.0) for length in turning)
    first, last = max(np.floor(first), 0), min(np.ceil(last), DIM - 1)
    interpolated = np.clip((PAIRS - first) / (last - first), 0, 1)
    return series() * (interpolated / factor + 1 - interpolated)


def llama3(factor: float, low: float, high: float, original: int) -> np.ndarray:
    """Meta's own code, by wavelength."""
    scaled = []
    for freq in series():
        wavelength = 2 * np.pi / freq
        if wavelength < original / high:
            scaled.append(freq)
        elif wavelength > original / low:
            scaled.append(freq / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * freq / factor + smooth * freq)
    return np.array(scaled)


def dynamic(longest: int) -> np.ndarray:
    n = max(longest, TRAINED)
    return series(10000.0 * ((4.4 * n / TRAINED) - (4.4 - 1)) ** (DIM / (DIM - 2)))


SHORT, LONG = [1.0, 1.1, 1.2, 1.3], [1.0, 2.5, 4.0, 9.0]


def longrope(longest: int) -> np.ndarray:
    return series() / (SHORT if longest <= SWITCH else LONG)


def fixed(freqs: Iterable[float]) -> Frequencies:
    return lambda _: np.asarray(freqs, dtype=np.float64)


def stored(freqs: Iterable[float]) -> np.ndarray:
    """What is learned is a float32 parameter."""
    return np.asarray(freqs, dtype=np.float32).astype(np.float64)


CUSTOM = [0.9, 0.123, 0.04, 0.0017]
DYNAMIC = {"rope_type": "dynamic", "factor": 4.4, "original_max_position_embeddings": TRAINED}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": SHORT,
    "long_factor": LONG,
    "factor": 3.0,
    "original_max_position_embeddings": SWITCH,
}
LONGROPE_FACTOR = np.sqrt(1 + np.log(3.0) / np.log(SWITCH))
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
SECTIONS = {"rope_type": "default", "mrope_section": [1, 2, 1]}
INTERLEAVED = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}


@dataclass(frozen=True)
class Variant:
    """What a RotaryEmbedding is made with, and what it then has to compute.

    Attributes:
        arguments: of the constructor, beside ``dim``.
        frequencies: by the number of positions in the batch's longest sequence.
        axis_of_pair: which position of a token turns each pair, if it has several.
        one_position: whether a token may have one position for all axes.
        factor: multiplies rotated pairs.
        scale_base: of xPos, after interpolation.
        reaches: how many positions the sequences tried have.
        width: of a head.
    """

    arguments: dict[str, Any]
    frequencies: Frequencies = field(default=fixed(series()))
    axis_of_pair: Sequence[int] | None = None
    one_position: bool = True
    factor: float = 1.0
    scale_base: float | None = None
    reaches: Sequence[int] = (1, 9, LONGEST)
    width: int = DIM

    def make(self, **changes: Any) -> RotaryEmbedding:
        arguments = {"dim": DIM, "max_seq_len": LONGEST} | self.arguments | changes
        return RotaryEmbedding(**arguments)

    @property
    def layout(self) -> str:
        return self.arguments.get("layout", "interleaved")

    @property
    def axes(self) -> int:
        return 1 if self.axis_of_pair is None else max(self.axis_of_pair) + 1

    @property
    def tokens_first(self) -> bool:
        return self.arguments.get("seq_before_head_dim", False)

    @property
    def forms(self) -> list[str]:
        """How positions may be given."""
        forms = ["implied", "[S]", "[B, S]"] if self.one_position else []
        return forms if self.axes == 1 else [*forms, "[A, B, S]"]

    @property
    def form(self) -> str:
        """The one with most positions in it."""
        return self.forms[-1]


HALF, ANY = {"layout": "half"}, {"max_seq_len": None}
FAR = (5000, 1_000_000)
AROUND_THE_SWITCH = (1, SWITCH, SWITCH + 1, LONGEST)
AROUND_THE_TRAINED = (1, TRAINED, TRAINED + 1, LONGEST)
VARIANTS = {
    "half": Variant(HALF),
    "interleaved": Variant({}),
    "half, any length": Variant(HALF | ANY, reaches=FAR),
    "interleaved, any length": Variant(ANY, reaches=FAR),
    "partial": Variant({}, width=12),
    "linear": Variant({"scaling": {"rope_type": "linear", "factor": 4.0}}, fixed(series() / 4)),
    "ntk": Variant(
        {"scaling": {"rope_type": "ntk", "factor": 4.0}},
        fixed(series(10000.0 * 4.0 ** (DIM / (DIM - 2)))),
    ),
    "yarn": Variant({"scaling": YARN}, fixed(yarn(4.0, TRAINED)), factor=0.1 * np.log(4.0) + 1),
    "llama3": Variant({"scaling": LLAMA3} | HALF, fixed(llama3(8.0, 1.0, 4.0, 256))),
    "proportional": Variant(
        {"scaling": {"rope_type": "proportional", "partial_rotary_factor": 0.5}} | HALF,
        fixed([*series()[:2], 0, 0]),
    ),
    "longrope": Variant(
        {"scaling": LONGROPE} | HALF, longrope, factor=LONGROPE_FACTOR, reaches=AROUND_THE_SWITCH
    ),
    "longrope, any length": Variant(
        {"scaling": LONGROPE} | ANY, longrope, factor=LONGROPE_FACTOR, reaches=AROUND_THE_SWITCH
    ),
    "dynamic": Variant({"scaling": DYNAMIC} | HALF, dynamic, reaches=AROUND_THE_TRAINED),
    "dynamic, any length": Variant(
        {"scaling": DYNAMIC} | ANY, dynamic, reaches=(*AROUND_THE_TRAINED, *FAR)
    ),
    "sections": Variant({"scaling": SECTIONS} | HALF, axis_of_pair=[0, 1, 1, 2]),
    "interleaved sections": Variant({"scaling": INTERLEAVED} | HALF, axis_of_pair=[0, 1, 2, 0]),
    "dynamic sections": Variant(
        {"scaling": DYNAMIC | {"mrope_section": [1, 2, 1]}},
        dynamic,
        axis_of_pair=[0, 1, 1, 2],
        reaches=AROUND_THE_TRAINED,
    ),
    "axial": Variant(
        {"scaling": {"rope_type": "axial"}} | HALF,
        fixed([*series(dim=DIM // 2), *series(dim=DIM // 2)]),
        axis_of_pair=[0, 0, 1, 1],
        one_position=False,
    ),
    "learned": Variant({"learned_freq": True}, fixed(stored(series()))),
    "learned, any length": Variant(
        {"learned_freq": True, "custom_freqs": torch.tensor(CUSTOM), "interpolate_factor": 3.3}
        | HALF
        | ANY,
        fixed(stored(CUSTOM) / 3.3),
        reaches=FAR,
    ),
    "xpos": Variant({"use_xpos": True, "xpos_scale_base": 40}, scale_base=40),
    "xpos, any length": Variant({"use_xpos": True} | HALF | ANY, scale_base=512, reaches=(9, 500)),
    "interpolated xpos": Variant(
        {"use_xpos": True, "xpos_scale_base": 20, "interpolate_factor": 3.3},
        fixed(series() / 3.3),
        scale_base=66,
    ),
    "pixel": Variant({"freqs_for": "pixel"}, fixed(np.pi * np.linspace(1, 5, DIM // 2))),
    "constant": Variant({"freqs_for": "constant", "num_freqs": 3}, fixed([1, 1, 1])),
    "custom": Variant({"custom_freqs": torch.tensor(CUSTOM, dtype=torch.float64)}, fixed(CUSTOM)),
    "interpolated": Variant({"interpolate_factor": 3.3}, fixed(series() / 3.3)),
    "tokens first": Variant(HALF | {"seq_before_head_dim": True}),
}
EVERY = pytest.mark.parametrize("name", VARIANTS)
EVERY_FORM = pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name, variant in VARIANTS.items() for form in variant.forms],
)
GIVEN = [(name, variant.form) for name, variant in VARIANTS.items()]
# One way through the code each, where the length alone says which positions there are.
IMPLIED = [
    (name, "implied") for name in ("half, any length", "longrope", "dynamic", "learned", "xpos")
]
# These differ from others in the numbers of a table only: what traces meets them once, not often.
NUMBERS = {
    *("linear", "ntk", "yarn", "llama3", "proportional", "pixel", "constant", "custom"),
    *("interpolated", "half", "interleaved", "half, any length", "interleaved sections"),
}
DISTINCT = [(name, form) for name, form in GIVEN if name not in NUMBERS]
USUAL = [(name, form) for name, form in GIVEN if name in ("half", "interleaved")]


# Inputs and truth


def heads(variant: Variant, batch: int, length: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng([batch, length])
    drawn = [rng.standard_normal((batch, count, length, variant.width)) for count in (3, 1)]
    q, k = (torch.from_numpy(x).float() for x in drawn)
    return (q.transpose(1, 2), k.transpose(1, 2)) if variant.tokens_first else (q, k)


def draw(variant: Variant, form: str, batch: int, length: int, reach: int) -> Tensor | None:
    """Positions below ``reach``, one of which is the last; the first row has small ones."""
    shapes = {
        "implied": (),
        "[S]": (length,),
        "[B, S]": (batch, length),
        "[A, B, S]": (variant.axes, batch, length),
    }
    if form == "implied":
        return None
    ids = np.random.default_rng([length, reach]).integers(0, reach, shapes[form])
    if ids.ndim > 1:
        ids[..., 0, :] //= 4
    ids.flat[ids.size // 2] = reach - 1
    return torch.from_numpy(ids)


def truth(
    variant: Variant, inputs: Sequence[Tensor], positions: np.ndarray, origin: float = 0.0
) -> list[np.ndarray]:
    """Queries and keys turned by complex multiplication in float64."""
    freqs = variant.frequencies(int(positions.max()) + 1)
    of_pair = np.broadcast_to(positions[..., None], (*positions.shape, len(freqs)))
    if positions.ndim == 3:
        of_pair = np.stack([positions[axis] for axis in variant.axis_of_pair], axis=-1)
    turn = variant.factor * np.exp(1j * of_pair * freqs)
    scale = np.ones_like(turn.real)
    if variant.scale_base is not None:
        decay = (2 * np.arange(len(freqs)) / (2 * len(freqs)) + 0.4) / 1.4
        scale = decay ** ((of_pair - origin) / variant.scale_base)
    turned = []
    for x, multiplier in zip(inputs, (turn * scale, turn / scale), strict=True):
        x = x.double().numpy()
        x = x.swapaxes(1, 2).copy() if variant.tokens_first else x.copy()
        first, second = pairs(variant, len(freqs))
        complexes = x[..., first] + 1j * x[..., second]
        complexes = complexes * (multiplier[:, None] if multiplier.ndim == 3 else multiplier)
        x[..., first], x[..., second] = complexes.real, complexes.imag
        turned.append(x.swapaxes(1, 2) if variant.tokens_first else x)
    return turned


def pairs(variant: Variant, count: int) -> tuple[slice, slice]:
    if variant.layout == "half":
        return slice(0, count), slice(count, 2 * count)
    return slice(0, 2 * count, 2), slice(1, 2 * count, 2)


def origin_of(rope: RotaryEmbedding) -> float:
    return 0.0 if rope.xpos is None else rope.xpos.origin


def assert_true(
    outputs: Iterable[Any],
    variant: Variant,
    rope: RotaryEmbedding,
    inputs: Sequence[Tensor],
    ids: Tensor | None,
) -> None:
    length = inputs[0].shape[1 if variant.tokens_first else 2]
    positions = np.arange(length) if ids is None else ids.numpy()
    expected = truth(variant, inputs, positions, origin_of(rope))
    for output, exact in zip(outputs, expected, strict=True):
        got = output.detach().numpy() if isinstance(output, Tensor) else output
        assert got.dtype == np.float32
        assert_close(got, exact)


def assert_close(got: np.ndarray, exact: np.ndarray) -> None:
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-6 * max(1.0, np.nanmax(np.abs(exact))))


def shapes_of(variant: Variant, form: str) -> list[tuple[int, int, int]]:
    """Batches, lengths and reaches to try, none of them the shape that is traced."""
    if form == "implied":
        return [(1 + reach % 3, reach, reach) for reach in variant.reaches if reach <= FAR[0]]
    return [
        (3, 1 if index == 0 else 11 + 6 * index, reach)
        for index, reach in enumerate(variant.reaches)
    ]


def warm_up(variant: Variant, rope: RotaryEmbedding) -> None:
    """Calls whose lengths, dtypes and positions must not be remembered."""
    for length, dtype in ((13, torch.float32), (33, torch.bfloat16), (2, torch.float64)):
        inputs = [x.to(dtype) for x in heads(variant, 1, length)]
        rope.rotate(*inputs, position_ids=draw(variant, variant.form, 1, length, 40))
        with torch.inference_mode():
            rope.rotate(*inputs, position_ids=draw(variant, variant.forms[0], 1, length, 40))


# Eager


@EVERY_FORM
def test_eager_is_the_rotation_of_float64(name, form):
    variant = VARIANTS[name]
    rope = variant.make()
    for batch, length, reach in shapes_of(variant, form):
        inputs = heads(variant, batch, length)
        # Of the same shape, and not to be remembered.
        rope.rotate(*inputs, position_ids=draw(variant, form, batch, length, 12))
        ids = draw(variant, form, batch, length, reach)
        outputs = rope.rotate(*inputs, position_ids=ids)
        assert_true(outputs, variant, rope, inputs, ids)


@EVERY
def test_an_offset_is_as_good_as_positions(name):
    variant = VARIANTS[name]
    rope, inputs = variant.make(), heads(variant, 2, 7)
    if not variant.one_position:
        with pytest.raises(BadInputError, match=r"position_ids \[2, B, S\] must be given"):
            rope.rotate(*inputs, offset=3)
        return
    for offset in (3, 57, torch.tensor(11)):
        outputs = rope.rotate(*inputs, offset=offset)
        assert_true(outputs, variant, rope, inputs, torch.arange(7) + offset)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "xpos" in name])
def test_scores_of_xpos_decay_with_the_distance_alone(name):
    variant = VARIANTS[name]
    inputs, ids = heads(variant, 2, 24), draw(variant, "[B, S]", 2, 24, LONGEST)
    q, k = variant.make().rotate(*inputs, position_ids=ids)
    scores = (q @ k.transpose(-1, -2)).numpy()
    for origin in (0, 17.5):
        exact_q, exact_k = truth(variant, inputs, ids.numpy(), origin)
        assert_close(scores, exact_q @ exact_k.swapaxes(-1, -2))


@pytest.mark.parametrize("sections", [[4, 2, 2], [3, 3, 2]], ids=str)
@pytest.mark.parametrize(
    ("interleaved", "model"),
    [
        (False, modeling_qwen2_vl.Qwen2VLRotaryEmbedding),
        (True, modeling_qwen3_vl.Qwen3VLTextRotaryEmbedding),
    ],
)
def test_sections_are_those_of_qwen(interleaved, model, sections):
    scaling = {"mrope_section": sections, "mrope_interleaved": interleaved, "type": "mrope"}
    rope = RotaryEmbedding(16, layout="half", scaling=scaling)
    variant = Variant({}, axis_of_pair=[0, 1, 2], width=16)
    inputs, ids = heads(variant, 3, 11), draw(variant, "[A, B, S]", 3, 11, 5000)
    angles = ids.unsqueeze(-1) * torch.from_numpy(series(dim=16))
    stated = types.SimpleNamespace(mrope_section=sections)
    cos, sin = (model.recomposition_frequencies(stated, t) for t in (angles.cos(), angles.sin()))
    wide = [x.double() for x in inputs]
    expected = modeling_qwen2_vl.apply_rotary_pos_emb(*wide, cos, sin)
    for ours, theirs in zip(rope.rotate(*inputs, position_ids=ids), expected, strict=True):
        assert_close(ours.numpy(), theirs.numpy())


@pytest.mark.parametrize(
    "model",
    [
        modeling_qwen2_vl.Qwen2VLVisionRotaryEmbedding,
        modeling_qwen3_vl.Qwen3VLVisionRotaryEmbedding,
    ],
)
def test_axial_is_the_vision_tower_of_qwen(model):
    variant = VARIANTS["axial"]
    inputs, ids = heads(variant, 3, 11), draw(variant, "[A, B, S]", 3, 11, LONGEST)
    inv_freq = torch.tensor([1.0, 0.01], dtype=torch.float64)  # of 10000, over half of the head
    angles = ids.flatten(1).T.unsqueeze(-1) * inv_freq  # patches one after another: [N, 2, pairs]
    cos, sin = (
        model.recomposition_frequencies(None, t).unflatten(0, (3, 11))
        for t in (angles.cos(), angles.sin())
    )
    wide = [x.double() for x in inputs]
    expected = modeling_qwen2_vl.apply_rotary_pos_emb(*wide, cos, sin)
    actual = variant.make().rotate(*inputs, position_ids=ids)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours.numpy(), theirs.numpy())


@pytest.mark.parametrize("name", ["sections", "interleaved sections", "axial"])
def test_xpos_has_no_second_axis(name):
    variant = VARIANTS[name]
    with pytest.raises(BadInputError, match="use_xpos"):
        variant.make(use_xpos=True)


# torch.compile and torch.export


class Rotate(torch.nn.Module):
    def __init__(self, rope: RotaryEmbedding) -> None:
        super().__init__()
        self.rope = rope

    def forward(
        self, q: Tensor, k: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.rope.rotate(q, k, position_ids=position_ids)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


LENGTHS = (7, 2, 33, 16, 5, LONGEST, 3, 21, 17, 10)


@pytest.mark.parametrize(("name", "form"), [*USUAL, *DISTINCT, *IMPLIED])
def test_ten_lengths_compile_to_at_most_two_full_graphs(name, form):
    variant, counter = VARIANTS[name], CompileCounter()
    rope = variant.make()
    warm_up(variant, rope)
    compiled = torch.compile(Rotate(rope), fullgraph=True, backend=counter)
    for length in LENGTHS:
        inputs = heads(variant, 2, length)
        ids = draw(variant, form, 2, length, max(variant.reaches) if length % 2 else 12)
        outputs = compiled(*inputs) if ids is None else compiled(*inputs, ids)
        assert_true(outputs, variant, rope, inputs, ids)
    assert 1 <= counter.frame_count <= 2
    warm_up(variant, rope)
    inputs, ids = heads(variant, 2, 40), draw(variant, form, 2, 40, 60)
    assert_true(compiled(*inputs, ids), variant, rope, inputs, ids)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "learned" in name])
def test_gradients_of_learned_frequencies_flow_through_the_compiled_graph(name):
    variant, counter = VARIANTS[name], CompileCounterWithBackend("aot_eager")
    rope = variant.make()
    compiled = torch.compile(Rotate(rope), fullgraph=True, backend=counter)
    first, second = pairs(variant, DIM // 2)
    for length in LENGTHS[:4]:
        inputs = heads(variant, 2, length)
        ids = draw(variant, "[B, S]", 2, length, LONGEST)
        weights = [torch.linspace(-1, 1, x.numel()).reshape(x.shape) for x in inputs]
        given = [x.clone().requires_grad_() for x in inputs]
        outputs = compiled(*given, ids)
        loss = sum((w * y).sum() for w, y in zip(weights, outputs, strict=True))
        got = torch.autograd.grad(loss, [rope.freqs, *given])

        slower = variant.arguments.get("interpolate_factor", 1.0)
        freqs = torch.from_numpy(variant.frequencies(LONGEST) * slower).requires_grad_()
        exact = [x.double().requires_grad_() for x in inputs]
        turn = torch.polar(torch.ones(()).double(), ids.unsqueeze(1).unsqueeze(-1) * freqs / slower)
        loss = 0.0
        for x, w in zip(exact, weights, strict=True):
            turned = torch.complex(x[..., first], x[..., second]) * turn
            loss = loss + (w[..., first] * turned.real + w[..., second] * turned.imag).sum()
        for ours, theirs in zip(got, torch.autograd.grad(loss, [freqs, *exact]), strict=True):
            assert theirs.abs().max() > 0.1
            assert_close(ours.numpy(), theirs.numpy())
    assert 1 <= counter.frame_count <= 2


def dynamic_shapes(
    *tensors: Tensor | None, longest: int = LONGEST, tokens_first: bool = False
) -> tuple[Any, ...]:
    """Batch and length of heads, and of positions in any form."""
    batch = torch.export.Dim("batch", max=LONGEST)
    length = torch.export.Dim("length", max=longest)
    shapes = []
    for tensor in tensors:
        if tensor is None:
            shapes.append(None)
        elif tensor.is_floating_point():
            shapes.append({0: batch, 1 if tokens_first else 2: length})
        else:
            sizes = (batch, length) if tensor.ndim > 1 else (length,)
            shapes.append(dict(enumerate(sizes, start=max(0, tensor.ndim - 2))))
    return tuple(shapes)


@pytest.mark.parametrize(("name", "form"), [*DISTINCT, *IMPLIED])
def test_torch_export_serves_shapes_it_never_saw(name, form):
    variant = VARIANTS[name]
    module = Rotate(variant.make())
    warm_up(variant, module.rope)
    arguments = (*heads(variant, 2, 6), draw(variant, form, 2, 6, 12))
    longest = min(module.rope.positions, FAR[0])
    shapes = dynamic_shapes(*arguments, longest=longest, tokens_first=variant.tokens_first)
    called = torch.export.export(module, arguments, dynamic_shapes=shapes).module()
    for batch, length, reach in shapes_of(variant, form):
        inputs = heads(variant, batch, length)
        ids = draw(variant, form, batch, length, reach)
        assert_true(called(*inputs, ids), variant, module.rope, inputs, ids)


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
            opset_version=rules.OPSETS[target],
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
    """Once for every graph that holds the entry."""
    return pytest.mark.parametrize(
        ("graph", "name", "form"),
        [(target, *entry) for target in targets for entry in entries if entry in ENTRIES[target]],
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


def count(program: torch.onnx.ONNXProgram, kind: str) -> int:
    return sum(node.op_type == kind for node in program.model.graph)


@pytest.mark.parametrize("graph", ["onnx"], indirect=True)
def test_lowered_every_rotation_is_one_operator(graph):
    program = graph.program
    rotations = producers(program)
    assert {(node.domain, node.op_type) for node in rotations} == {("", "RotaryEmbedding")}
    assert len({id(node) for node in rotations}) == len(rotations) == 2 * len(ENTRIES["onnx"])
    assert count(program, "RotaryEmbedding") == len(rotations)
    assert program.model.opset_imports[""] == 23


@pytest.mark.parametrize("graph", [None, "primitive"], indirect=True)
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


# Positions that are not served


def unserved(rope: RotaryEmbedding) -> list[int]:
    return [-1, -(2**40), rope.positions, rope.positions + 1, 2**40]


@EVERY
def test_eager_refuses_positions_it_does_not_serve(name):
    variant = VARIANTS[name]
    rope, inputs = variant.make(), heads(variant, 2, 6)
    for position in unserved(rope):
        for form in variant.forms[1:]:
            ids = draw(variant, form, 2, 6, 12)
            ids.view(-1)[4] = position
            with pytest.raises(BadInputError, match=f"position.* 0 … {rope.positions - 1}"):
                rope.rotate(*inputs, position_ids=ids)
        if variant.one_position:
            for offset in (position, torch.tensor(position)):
                with pytest.raises(BadInputError, match=f"position.* 0 … {rope.positions - 1}"):
                    rope.rotate(*inputs, offset=offset)


@pytest.mark.parametrize(
    "name", ["half", "half, any length", "dynamic", "learned", "xpos, any length"]
)
def test_compiled_no_number_comes_of_positions_that_are_not_served(name):
    variant = VARIANTS[name]
    rope, inputs = variant.make(), heads(variant, 2, 6)
    compiled = torch.compile(Rotate(rope), fullgraph=True, backend="aot_eager")
    for position in (-1, rope.positions):
        ids = draw(variant, "[B, S]", 2, 6, 12)
        ids[1, 4] = position
        try:
            outputs = compiled(*inputs, ids)
        except (IndexError, RuntimeError, BadInputError):
            continue
        for got in outputs:
            assert got[1, :, 4].isnan().all()


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


# Whole blocks

WIDE = {"layout": "half", "max_seq_len": 48}
WIDE_SECTIONS = {"rope_type": "default", "mrope_section": [2, 3, 3]}
BLOCKS: dict[str, tuple[dict[str, Any], bool]] = {
    "dynamic": ({"scaling": DYNAMIC}, False),
    "sections": ({"scaling": WIDE_SECTIONS}, False),
    "sections, ids": ({"scaling": WIDE_SECTIONS}, True),
    "axial, ids": ({"scaling": {"rope_type": "axial"}}, True),
    "xpos": ({"use_xpos": True, "xpos_scale_base": 64}, False),
    "learned": ({"learned_freq": True}, False),
}
ROTATED = {
    "ort": {"com.microsoft::GroupQueryAttention": 1, "RotaryEmbedding": 2, "MatMul": 4},
    "onnx": {"Attention": 1, "RotaryEmbedding": 2, "MatMul": 4},
    "primitive": {"Softmax": 1, "MatMul": 6},
}
FUSED = {"com.microsoft::GroupQueryAttention": 1, "MatMul": 2}
KINDS = {kind for counts in ROTATED.values() for kind in counts}


def block_with(rope: RotaryEmbedding) -> Attention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Attention(32, 2, rope=rope)


def exchanged_axes(rope: RotaryEmbedding) -> RotaryEmbedding:
    axes = tuple(1 - axis for axis in rope._found.axis_of_pair)
    rope._found = replace(rope._found, axis_of_pair=axes)
    rope.reset_parameters()
    return rope


def other_frequencies(rope: RotaryEmbedding) -> RotaryEmbedding:
    with torch.no_grad():
        rope.freqs[3] *= 1.05
    return rope


def with_scaling(**changes: Any) -> Callable[[RotaryEmbedding], RotaryEmbedding]:
    return lambda rope: RotaryEmbedding(16, **WIDE, scaling=rope.scaling | changes)


def made_with(**arguments: Any) -> Callable[[RotaryEmbedding], RotaryEmbedding]:
    return lambda _: RotaryEmbedding(16, **WIDE, **arguments)


WRONG: dict[str, list[Callable[[RotaryEmbedding], RotaryEmbedding]]] = {
    "dynamic": [
        with_scaling(factor=4.8),
        with_scaling(original_max_position_embeddings=TRAINED + 1),
        made_with(),
    ],
    "sections": [made_with(theta=10500.0)],
    "sections, ids": [
        with_scaling(mrope_section=[3, 3, 2]),
        with_scaling(mrope_section=[2, 4, 2]),
        with_scaling(mrope_section=[3, 3, 2], mrope_interleaved=True),
    ],
    "axial, ids": [exchanged_axes],
    "xpos": [
        made_with(use_xpos=True, xpos_scale_base=70),
        made_with(),
    ],
    "learned": [other_frequencies],
}


# With implied positions sections are a plain rotation: one target will do.
@pytest.mark.parametrize(
    ("name", "target"),
    [(name, target) for name in BLOCKS for target in rules.TARGETS if name != "sections"]
    + [("sections", "ort")],
)
def test_blocks_of_every_variant_are_proven_and_wrong_ones_fail(tmp_path, name, target):
    arguments, with_ids = BLOCKS[name]
    block = block_with(RotaryEmbedding(16, **WIDE, **arguments))
    result = export(block, tmp_path / "block", target=target, position_ids=with_ids, validate=True)
    assert result.report.passed, result.report.to_markdown()
    assert replay(result.path).passed
    found = {kind: n for kind, n in result.ops.items() if kind in KINDS}
    assert found == (FUSED if (name, target) == ("sections", "ort") else ROTATED[target])
    for mutate in WRONG[name]:
        wrong = block_with(mutate(RotaryEmbedding(16, **WIDE, **arguments)))
        assert not validate(result, wrong).passed


@pytest.mark.parametrize("target", rules.TARGETS)
def test_a_block_with_two_axes_needs_positions_as_an_input(tmp_path, target):
    block = block_with(RotaryEmbedding(16, **WIDE, scaling={"rope_type": "axial"}))
    with pytest.raises(BadInputError, match="position_ids must be an input: tokens have 2 axes"):
        export(block, tmp_path / "block", target=target)
    assert list(tmp_path.iterdir()) == []


def test_a_block_knows_where_its_own_sequence_is():
    """Its heads are ``[B, H, S, D]`` whatever order the embedding was made for."""
    usual = block_with(RotaryEmbedding(16, **WIDE))
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 9, 32))).float()
    other = block_with(RotaryEmbedding(16, **WIDE, seq_before_head_dim=True))
    torch.testing.assert_close(other(x), usual(x))


@pytest.mark.parametrize("name", ["dynamic", "learned"])
def test_blocks_in_half_precision_are_proven(tmp_path, name):
    arguments, _ = BLOCKS[name]
    block = block_with(RotaryEmbedding(16, **WIDE, **arguments)).half()
    result = export(block, tmp_path / "block", validate=True)
    assert result.report.passed, result.report.to_markdown()


def test_the_artifact_states_learned_frequencies(tmp_path):
    rope = other_frequencies(RotaryEmbedding(16, **WIDE, learned_freq=True))
    result = export(block_with(rope), tmp_path / "block")
    config = json.loads((result.path / "config.json").read_text())
    assert config["block"]["rope"]["inv_freq"] == rope.freqs.tolist()
    assert config["block"]["rope"]["theta"] is None
