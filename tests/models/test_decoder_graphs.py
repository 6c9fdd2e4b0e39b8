"""Graphs of decoders of transformers serve what the original computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from checkpoints import CASES, LONGEST, SERVED, WINDOW
from decoders import assert_close, original, replaced, served, tokens, whole
from selection import slow_unless
from torch import Tensor

from rope_export import export
from rope_export.dispatch import lowering_to
from rope_export.lowering.target import Target
from rope_export.models.decoder_with_cache import DecoderWithCache

pytestmark = [
    pytest.mark.filterwarnings(
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
    ),
    pytest.mark.filterwarnings("ignore:# The axis name:UserWarning"),
]


# Graphs.


class Served:
    """A graph with its cache, called as an application would."""

    def __init__(self, session: onnxruntime.InferenceSession, model: Any, batch: int) -> None:
        self.session = session
        self.past = [t.numpy() for pair in DecoderWithCache(model).empty_cache(batch) for t in pair]

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        names = [given.name for given in self.session.get_inputs()]
        assert names[:2] == ["input_ids", "attention_mask"]
        given = [ids.numpy(), mask.numpy(), *self.past]
        logits, *self.past = self.session.run(None, dict(zip(names, given, strict=True)))
        return torch.from_numpy(np.asarray(logits))


EXPORTED = {
    "Qwen3": {"com.microsoft::GroupQueryAttention"},
    "gpt-oss": {"com.microsoft::GroupQueryAttention"},
    "GPT-NeoX": {"com.microsoft::GroupQueryAttention", "RotaryEmbedding"},
}


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "Qwen3", EXPORTED))
def test_its_graph_serves_what_the_original_computes(name, tmp_path):
    theirs, ours = original(name), replaced(name)
    if name == "gpt-oss":
        ours.set_experts_implementation("batched_mm")
    decoder = DecoderWithCache(ours)
    result = export(decoder, tmp_path / "decoder", max_seq_len=LONGEST, **decoder.example())
    kinds = ("GroupQueryAttention", "MultiHeadAttention")
    fused = {f"com.microsoft::{kind}" for kind in kinds} | {"Attention", "RotaryEmbedding"}
    assert fused & set(result.ops) == EXPORTED[name]
    # In one branch each: for a single token, for all rows, for one row.
    assert result.ops["com.microsoft::GroupQueryAttention"] == 3 * CASES[name].layers
    # Nothing is left of transformers' masks and angles.
    assert not {"Trilu", "LessOrEqual", "Cos", "Sin"} & set(result.ops)
    session = onnxruntime.InferenceSession(result.model, providers=["CPUExecutionProvider"])
    for steps in SERVED.values():
        graph, end = Served(session, ours, 2), 0
        for expected in served(theirs, steps):
            count = expected.shape[1]
            ids = tokens(sum(steps))[:, end : end + count]
            end += count
            actual = graph(ids, torch.ones(2, end, dtype=torch.long))
            assert_close(actual, expected, 2e-5)
    # Rows of 12 and 7 tokens, padded on the right, then three more each: as if they were alone.
    lengths, graph = (12, 7), Served(session, ours, 2)
    ids = tokens(15)
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
    logits = graph(ids[:, :12], mask)
    parts = [[logits[row, :length]] for row, length in enumerate(lengths)]
    for new in range(3):
        mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), dim=1)
        logits = graph(torch.stack([ids[r, n + new] for r, n in enumerate(lengths)])[:, None], mask)
        for row in range(2):
            parts[row].append(logits[row])
    for row, length in enumerate(lengths):
        with torch.no_grad():
            alone = theirs(ids[row : row + 1, : length + 3], use_cache=False).logits[0]
        assert length + 3 > WINDOW
        assert_close(torch.cat(parts[row]), alone, 2e-5)


OTHERS = ("Mistral", "Gemma 3", "Qwen2-VL, text", "DeepSeek-V2")


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "Qwen2-VL, text", OTHERS))
def test_no_axis_is_narrowed(name):
    ours = replaced(name)
    if name == "DeepSeek-V2":
        ours.set_experts_implementation("batched_mm")
    decoder = DecoderWithCache(ours)
    example = decoder.example()
    ranges = {
        "batch": (1, 2**31 - 1),
        "sequence": (1, 48),
        "past_sequence": (0, 47),
        "past_sequence+sequence": (1, 48),
    }
    dims = {
        label: torch.export.Dim(f"axis_{index}", min=low, max=high)
        for index, (label, (low, high)) in enumerate(ranges.items())
    }
    shapes: dict[str, Any] = {
        argument: {axis: dims[label] for axis, label in axes.items()}
        for argument, axes in example["dynamic_shapes"].items()
    }
    shapes["past_key_values"] = [
        (shapes["past_key_values"],) * 2 for _ in example["kwargs"]["past_key_values"]
    ]
    with torch.no_grad(), lowering_to(Target("ort", ("cpu",), LONGEST)):
        program = torch.export.export(
            decoder, (), example["kwargs"], dynamic_shapes=shapes, strict=False
        )
    kept = {(int(r.lower), int(r.upper)) for r in program.range_constraints.values()}
    assert kept == set(ranges.values())


@torch.no_grad()
@pytest.mark.parametrize("name", ["Mistral", "DeepSeek-V2", "Llama 2"])
def test_in_eager_pytorch_it_serves_the_same(name):
    theirs, decoder = original(name), DecoderWithCache(replaced(name))
    assert_close(decoder(tokens()), whole(theirs, None))
    for steps in SERVED.values():
        past, end = decoder.empty_cache(2), 0
        for expected in served(theirs, steps):
            count = expected.shape[1]
            ids = tokens(sum(steps))[:, end : end + count]
            end += count
            actual, past = decoder(ids, torch.ones(2, end, dtype=torch.long), past)
            assert_close(actual, expected)
            assert {t.shape[2] for pair in past for t in pair} == {end}
