"""Every variant of RotaryEmbedding, what it has to compute in float64, and inputs to try it on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rope_export import RotaryEmbedding

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


def count(program: torch.onnx.ONNXProgram, kind: str) -> int:
    return sum(node.op_type == kind for node in program.model.graph)


# Positions that are not served


def unserved(rope: RotaryEmbedding) -> list[int]:
    return [-1, -(2**40), rope.positions, rope.positions + 1, 2**40]
