"""Every variant under torch.compile and torch.export is one graph, right at any length."""

from __future__ import annotations

import pytest
import torch
from selection import slow_unless
from torch import Tensor
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from variants import (
    DIM,
    DISTINCT,
    FAR,
    GIVEN,
    IMPLIED,
    LONGEST,
    VARIANTS,
    assert_close,
    assert_true,
    draw,
    dynamic_shapes,
    heads,
    pairs,
    shapes_of,
    warm_up,
)

from rope_export import BadInputError, RotaryEmbedding

pytestmark = [
    # torch's exporter copies its own deprecated LeafSpec.
    pytest.mark.filterwarnings(
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
    ),
    # It says so for every axis that two inputs share.
    pytest.mark.filterwarnings("ignore:# The axis name:UserWarning"),
]
USUAL = [(name, form) for name, form in GIVEN if name in ("half", "interleaved")]


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


@pytest.mark.parametrize(
    ("name", "form"),
    slow_unless(lambda *row: row in (*USUAL[:1], *IMPLIED[1:3]), [*USUAL, *DISTINCT, *IMPLIED]),
)
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


@pytest.mark.parametrize(
    "name",
    slow_unless(lambda name: name == "learned", [name for name in VARIANTS if "learned" in name]),
)
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


@pytest.mark.parametrize(
    ("name", "form"),
    slow_unless(
        lambda name, form: form == "implied" or name == "dynamic sections", [*DISTINCT, *IMPLIED]
    ),
)
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
