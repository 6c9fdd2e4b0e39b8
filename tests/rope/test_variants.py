"""Every variant of RotaryEmbedding in eager PyTorch is the rotation of its paper in float64."""

from __future__ import annotations

import types

import pytest
import torch
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl
from variants import (
    LONGEST,
    VARIANTS,
    Variant,
    assert_close,
    assert_true,
    draw,
    heads,
    series,
    shapes_of,
    truth,
    unserved,
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
EVERY = pytest.mark.parametrize("name", VARIANTS)
EVERY_FORM = pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name, variant in VARIANTS.items() for form in variant.forms],
)


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


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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
