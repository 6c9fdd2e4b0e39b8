"""Blocks of every variant are exported and proven, and wrong ones fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from selection import slow_unless
from variants import DYNAMIC, TRAINED

from rope_export import Attention, BadInputError, RotaryEmbedding, export, replay, validate
from rope_export.artifacts.targets import TARGETS

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


BY_DEFAULT = [
    ("dynamic", "ort"),
    ("sections, ids", "ort"),
    ("axial, ids", "onnx"),
    ("xpos", "primitive"),
    ("learned", "ort"),
]


# With implied positions sections are a plain rotation: one target will do.
@pytest.mark.parametrize(
    ("name", "target"),
    slow_unless(
        lambda *row: row in BY_DEFAULT,
        [(name, target) for name in BLOCKS for target in TARGETS if name != "sections"]
        + [("sections", "ort")],
    ),
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


@pytest.mark.parametrize("target", TARGETS)
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


@pytest.mark.parametrize("name", ["dynamic", pytest.param("learned", marks=pytest.mark.slow)])
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
