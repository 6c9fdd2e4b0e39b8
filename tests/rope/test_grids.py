"""Axial angles compiled and exported are right on grids that were never traced."""

from __future__ import annotations

import io
from itertools import product

import onnxruntime
import pytest
import torch
from drop_in import ROUNDING, angles_of_grid, assert_within, normal, theirs, turned
from rotary_embedding_torch import apply_rotary_emb as their_apply
from selection import slow_unless
from torch._dynamo.testing import CompileCounter

from rope_export import BadInputError, RotaryEmbedding, apply_rotary_emb, export

# As their README has it, of one to three axes, and every other kind of frequencies.
PIXEL = {"dim": 8, "freqs_for": "pixel", "max_freq": 256}
LANG = {"dim": 8, "freqs_for": "lang"}
KINDS = {
    "pixel": (2, PIXEL, None),
    "pixel, 1 axis": (1, PIXEL, None),
    "pixel, 3 axes": (3, PIXEL | {"max_freq": 10}, None),
    "pixel, offsets": (2, PIXEL, (0.3, -0.5)),
    "pixel, learned": (2, PIXEL | {"learned_freq": True}, None),
    "lang": (2, LANG | {"interpolate_factor": 2.0}, None),
    "lang, offsets": (3, LANG, (300, 0.1, 7)),
    "constant": (2, {"dim": 8, "freqs_for": "constant", "num_freqs": 4}, None),
    "custom": (2, LANG | {"custom_freqs": torch.tensor([0.9, 3.0])}, torch.tensor([2.0, 5.0])),
}
# Traced is (4, 5, 6), which is none of these; of fewer axes, the last are left out.
GRIDS = ((7, 9, 3), (2, 3, 2), (1, 4, 2), (5, 1, 1), (1, 1, 1), (33, 17, 2))
kinds = pytest.mark.parametrize(
    "kind", slow_unless(lambda kind: kind in ("pixel", "pixel, 3 axes", "pixel, offsets"), KINDS)
)
# torch's exporter copies its own deprecated LeafSpec.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
)


class Grid(torch.nn.Module):
    """What users write: the size of the grid is that of the input."""

    def __init__(self, axes, config, offsets):
        super().__init__()
        self.rope, self.axes, self.offsets = RotaryEmbedding(**config), axes, offsets

    def forward(self, x):
        freqs = self.rope.get_axial_freqs(*x.shape[1 : 1 + self.axes], offsets=self.offsets)
        return apply_rotary_emb(freqs, x)


def heads(kind, sizes=(4, 5, 6), dtype=torch.float32):
    axes, config, _ = KINDS[kind]
    width = 2 * len(RotaryEmbedding(**config).freqs) * axes
    return normal(2, *sizes[:axes], width + 2, dtype=dtype)


def assert_turned(actual, kind, x):
    """By float64 truth, and by them; angles are float32, so that they end at their rounding."""
    axes, config, offsets = KINDS[kind]
    sizes = tuple(x.shape[1 : 1 + axes])
    angles, factors = angles_of_grid(config, sizes, offsets)
    rounding = {torch.float16: 2.0**-10, torch.float32: 0.0}[x.dtype]
    off = x.double().abs().amax().item() * 1.5
    slack = off * (3 * ROUNDING * factors + 2e-6 + rounding)
    slack = slack.repeat(2, axis=-1)
    truth = turned(x, angles)
    width = angles.shape[-1] * 2
    assert_within(actual[..., :width], truth[..., :width], slack)
    assert torch.equal(actual[..., width:], x[..., width:])
    peer = theirs(**config)
    by_them = their_apply(peer.get_axial_freqs(*sizes, offsets=offsets), x.float())
    assert_within(actual[..., :width], by_them[..., :width], 4 * slack)


def dynamic(kind):
    return ({axis + 1: torch.export.Dim.DYNAMIC for axis in range(KINDS[kind][0])},)


@kinds
def test_eager_is_right_on_every_grid(kind):
    module = Grid(*KINDS[kind])
    for sizes in GRIDS:
        assert_turned(module(heads(kind, sizes)).detach(), kind, heads(kind, sizes))


@kinds
def test_grids_compile_to_at_most_two_full_graphs(kind):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(Grid(*KINDS[kind]), backend=counter, fullgraph=True)
    for sizes in ((4, 5, 6), (7, 9, 3), (2, 3, 2), (33, 17, 2), (6, 12, 4)):
        x = heads(kind, sizes)
        assert_turned(compiled(x).detach(), kind, x)
    torch._dynamo.reset()
    assert 1 <= counter.frame_count <= 2


@kinds
def test_torch_export_serves_grids_it_never_saw(kind):
    program = torch.export.export(
        Grid(*KINDS[kind]), (heads(kind),), dynamic_shapes=dynamic(kind)
    ).module()
    for sizes in GRIDS:
        assert_turned(program(heads(kind, sizes)).detach(), kind, heads(kind, sizes))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    slow_unless(
        lambda kind, dtype: (kind, dtype) == ("pixel, offsets", torch.float16),
        product(KINDS, (torch.float32, torch.float16)),
    ),
    ids=str,
)
def test_plain_onnx_export_serves_grids_it_never_saw(kind, dtype):
    module = Grid(*KINDS[kind]).to(dtype).eval()
    example = heads(kind, dtype=dtype)
    program = torch.onnx.export(
        module, (example,), dynamo=True, dynamic_shapes=dynamic(kind), verbose=False
    )
    content = io.BytesIO()
    program.save(content)
    session = onnxruntime.InferenceSession(content.getvalue(), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    for sizes in GRIDS:
        x = heads(kind, sizes, dtype)
        (found,) = session.run(None, {given.name: x.numpy()})
        assert_turned(torch.from_numpy(found), kind, x)


@pytest.mark.parametrize(
    ("kind", "target"),
    slow_unless(
        lambda *row: row in (("pixel", "ort"), ("pixel, learned", "primitive")),
        product([kind for kind in KINDS if KINDS[kind][0] < 3], ("ort", "onnx", "primitive")),
    ),
)
def test_every_target_serves_grids_it_never_saw(kind, target, tmp_path):
    names = {1: "height", 2: "width"}
    axes = KINDS[kind][0]
    shapes = {"x": {axis + 1: names[axis + 1] for axis in range(axes)}}
    module = Grid(*KINDS[kind]).eval()
    result = export(
        module,
        tmp_path / "grid",
        kwargs={"x": heads(kind)},
        dynamic_shapes=shapes,
        target=target,
        validate=False,
    )
    session = onnxruntime.InferenceSession(str(result.model), providers=["CPUExecutionProvider"])
    for sizes in GRIDS:
        x = heads(kind, sizes)
        (found,) = session.run(None, {"x": x.numpy()})
        assert_turned(torch.from_numpy(found), kind, x)


# Sizes as offsets


OFFSETS = {
    "one size": lambda x: (x.shape[2], 0),
    "both": lambda x: (x.shape[2], x.shape[1]),
    "half of one": lambda x: (0.1, -x.shape[1] / 2),
    "an input": lambda x: x[0, 0, 0, :2],
    "a list that holds one": lambda x: [x[0, 0, 0, 0], 0.5],
}


class ByItsSize(torch.nn.Module):
    def __init__(self, offsets, **config):
        super().__init__()
        self.rope, self.offsets = RotaryEmbedding(**config), offsets

    def forward(self, x):
        return self.rope.get_axial_freqs(x.shape[1], x.shape[2], offsets=self.offsets(x))


@pytest.mark.parametrize("config", [PIXEL, LANG], ids=["pixel", "lang"])
@pytest.mark.parametrize("which", OFFSETS)
def test_offsets_may_follow_the_grid(which, config):
    module = ByItsSize(OFFSETS[which], **config)

    def assert_right(actual, x):
        offsets = [float(offset) for offset in OFFSETS[which](x)]
        exact, factors = (
            each.repeat(2, axis=-1) for each in angles_of_grid(config, x.shape[1:3], offsets)
        )
        assert_within(actual, exact, 2.1 * ROUNDING * factors)

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    shapes = ({1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(module, (normal(2, 4, 5, 6),), dynamic_shapes=shapes).module()
    for sizes in ((4, 5), (7, 9), (2, 3), (33, 17)):
        x = normal(2, *sizes, 6)
        assert_right(module(x), x)
        assert_right(compiled(x), x)
        assert_right(exported(x), x)
    torch._dynamo.reset()
    assert counter.frame_count <= 2


def test_an_offset_that_is_no_sequence_is_refused():
    for offsets in (3, torch.tensor(3.0)):
        with pytest.raises(BadInputError, match=r"^offsets .* each of 1 axes, got .*3"):
            RotaryEmbedding(8).get_axial_freqs(2, offsets=offsets)
