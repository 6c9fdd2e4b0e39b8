"""Masks and caches of any kind inside a module are exported, proven and replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modules
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from modules import (
    AXES,
    LONGEST,
    ONE,
    Served,
    drawn,
    module_of,
    with_past,
)
from onnx import numpy_helper
from torch import Tensor, nn

from rope_export import Attention, RotaryEmbedding, export, replay
from rope_export.runtime import Decoder

# --- masks and caches of other kinds ---------------------------------------------------------


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_padding_is_proven_where_the_length_is_fixed(tmp_path, batch):
    module = modules.enlivened(Served())
    given = drawn(batch, 7, 32), torch.ones(batch, 7, dtype=torch.int64)
    result = export(module, tmp_path / "x", args=given, validate=True)
    assert result.report.passed, result.report.to_markdown()
    case = next(c for c in result.report.cases if c.name == "rows of different lengths")
    assert 0 < case.tokens < 7 * batch
    assert replay(result.path).passed


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
    assert {case.past for case in result.report.cases} == {0, 1, 3, 16, LONGEST - 1}
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


class Uneven(nn.Module):
    """Two attentions with packed projections of one width, and more query heads in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Attention(
                64,
                heads,
                num_kv_heads=kv_heads,
                head_dim=16,
                rope=RotaryEmbedding(16, layout="half", max_seq_len=LONGEST),
            )
            for heads, kv_heads in ((4, 2), (6, 1))
        )

    def forward(self, x: Tensor, attention_mask: Tensor, pasts: Any) -> Any:
        presents = []
        for layer, past in zip(self.layers, pasts, strict=True):
            attended, present = layer(x, attention_mask=attention_mask, past=past)
            x = x + attended
            presents.append(present)
        return x, presents


def test_layers_of_different_heads_keep_their_own_scales(tmp_path):
    pasts = [tuple(drawn(2, heads, 3, 16, seed=s) for s in (1, 2)) for heads in (2, 1)]
    result = export(
        modules.enlivened(Uneven()),
        tmp_path / "x",
        args=(drawn(2, 4, 64), torch.ones(2, 7, dtype=torch.int64), pasts),
        dynamic_shapes=[
            {0: "batch", 1: "sequence"},
            {0: "batch", 1: "past+sequence"},
            [({0: "batch", 2: "past"},) * 2] * 2,
        ],
        validate=True,
    )
    assert result.report.passed, result.report.to_markdown()


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


@pytest.mark.parametrize("target", ["ort", pytest.param("onnx", marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_pairs_are_not_taken_for_padding_and_replay(tmp_path, name):
    result = exported_with_mask(name, tmp_path / "x")
    assert result.report.passed, result.report.to_markdown()
    assert replay(result.path).passed


@pytest.mark.slow
def test_a_cache_that_no_decoder_can_drive_replays(tmp_path):
    result = of_one_token(tmp_path / "x", "onnx")
    assert result.graph["cache"] is None
    assert replay(result.path).passed


@pytest.mark.slow
def test_masks_of_other_dtypes_are_served(tmp_path):
    result = export(
        modules.enlivened(Served()),
        tmp_path / "x",
        args=with_past(4, dtype=torch.bool),
        dynamic_shapes=[ONE, {0: "batch", 1: "past+sequence"}, {0: "batch", 2: "past"}],
        validate=True,
    )
    assert result.report.passed, result.report.to_markdown()


@pytest.mark.slow
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
