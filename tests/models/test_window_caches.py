"""Decoders whose layers with a window keep no more than that, beside layers that keep all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from caches import cache_in, caching
from window_layout import resident

from rope_export import BadInputError, export, replay
from rope_export.models.decoder_with_cache import DecoderWithCache
from rope_export.models.replacement import replace_attention
from rope_export.runtime import Decoder
from rope_export.runtime.session import from_ort

pytestmark = [
    pytest.mark.filterwarnings(
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
    ),
    pytest.mark.filterwarnings("ignore:# The axis name:UserWarning"),
]

WINDOW, LONGEST, VOCABULARY = 4, 64, 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": LONGEST,
    "sliding_window": WINDOW,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, tuple[str, dict[str, Any], list[int | None]]] = {
    "all windowed": ("mistral", {}, [WINDOW, WINDOW]),
    "Gemma 2": ("gemma2", {**MIXED, "query_pre_attn_scalar": 16}, [WINDOW, None]),
    "gpt-oss": (
        "gpt_oss",
        {**MIXED, "num_local_experts": 2, "num_experts_per_tok": 1},
        [WINDOW, None],
    ),
    "upper layers": (
        "qwen2",
        {"use_sliding_window": True, "layer_types": MIXED["layer_types"][::-1]},
        [None, WINDOW],
    ),
}


def models(name: str) -> tuple[Any, Any]:
    """Of transformers, and the same with our attention."""
    kind, changes, _ = FAMILIES[name]
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **changes})
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ours.load_state_dict(theirs.state_dict())
    if kind == "gpt_oss":
        ours.set_experts_implementation("batched_mm")
    assert replace_attention(ours.eval(), max_seq_len=LONGEST)
    return theirs.eval(), ours


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))


EXPORTED = [("all windowed", "ort"), ("Gemma 2", "primitive"), ("Gemma 2", "ort")]
EXPORTED += [("gpt-oss", "ort"), ("upper layers", "onnx")]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(pair, marks=() if pair in EXPORTED[:2] else pytest.mark.slow)
        for pair in EXPORTED
    ],
    ids="-".join,
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    name, target = request.param
    theirs, ours = models(name)
    decoder = DecoderWithCache(ours, cache="window")
    folder = tmp_path_factory.mktemp("decoder") / "x"
    how = {**decoder.example(), "target": target, "max_seq_len": LONGEST, "validate": True}
    result = export(decoder, folder, **how)
    return name, target, theirs, decoder, result


def test_it_is_proven_and_replays(made):
    name, _, _, _, result = made
    assert result.report.passed, result.report.to_markdown()
    assert max(case.past for case in result.report.cases) >= 10 * WINDOW
    windows = [layer["window"] for layer in result.graph["cache"]["layers"]]
    assert windows == [window or 0 for window in FAMILIES[name][2]]
    assert replay(result.path).passed


@pytest.mark.parametrize("slots", [None, WINDOW + 3])
def test_it_serves_what_transformers_computes_with_its_cache(made, slots):
    """Far beyond the window, in chunks and token by token, greedy tokens included."""
    _, target, theirs, _, result = made
    ids = tokens(2, 59)
    decoder = Decoder.open(result.path, batch=2, window_capacity=slots)
    past, done = None, 0
    for count in (3, 1, 1, 1, 14, 1, 1, 1, 9, 1, 1, 1, 1, 20, 1, 1, 1):
        given = ids[:, done : done + count]
        with torch.no_grad():
            wanted = theirs(input_ids=given, use_cache=True, **caching(theirs, past))
        past, done = cache_in(wanted), done + count
        got = decoder.decode(given.numpy()) if count == 1 else decoder.prefill(given.numpy())
        logits = wanted["logits"].numpy()
        np.testing.assert_allclose(got, logits, rtol=0, atol=1e-4 * np.abs(logits).max())
        assert (got[:, -1].argmax(-1) == logits[:, -1].argmax(-1)).all()
    assert done == 59
    for layer, value in zip(decoder.layout.layers, decoder._buffers[::2], strict=True):
        whole = LONGEST if target == "ort" else done
        assert from_ort(value).shape[2] == ((slots or WINDOW) if layer.window else whole)


def test_in_pytorch_it_is_the_decoder_that_keeps_all(made):
    *_, decoder, _ = made
    full = DecoderWithCache(decoder.model)
    ids, mask = tokens(2, 41), torch.ones(2, 41, dtype=torch.int64)
    mask[1, 30:33] = 0  # padding of a call
    caches = [full.empty_cache(2), decoder.empty_cache(2, window_capacity=WINDOW + 2)]
    with torch.no_grad():
        for start, stop in ((0, 7), (7, 8), (8, 33), (33, 34), (34, 41)):
            part = ids[:, start:stop]
            wanted, caches[0] = full(part, mask[:, :stop], caches[0])
            got, caches[1] = decoder(part, mask[:, :stop], caches[1])
            real = mask[:, start:stop].bool()
            torch.testing.assert_close(got[real], wanted[real], rtol=1e-4, atol=1e-4)
    for attention, (key, _), (whole, _) in zip(
        decoder.attentions, caches[1], caches[0], strict=True
    ):
        if attention.window is None:
            assert key.shape[2] == 41
            continue
        kept = resident(41, WINDOW + 2, WINDOW)
        torch.testing.assert_close(key[0, :, :kept], whole[0, :, 41 - kept :], rtol=1e-4, atol=1e-4)


def test_windows_of_fixed_sizes_are_made_for_cuda(tmp_path):
    _, ours = models("all windowed")
    decoder = DecoderWithCache(ours.half(), cache="window")
    options = {"providers": ["cuda"], "max_seq_len": LONGEST}
    result = export(decoder, tmp_path / "x", **options, **decoder.example(fixed_windows=True))
    assert "com.microsoft::GroupQueryAttention" in result.ops
    assert not {"If", "Scan", "Loop"} & set(result.ops)
    assert {layer["slots"] for layer in result.graph["cache"]["layers"]} == {WINDOW}
    free = export(decoder, tmp_path / "y", **options, **decoder.example())
    assert "com.microsoft::GroupQueryAttention" not in free.ops
    assert any("as many slots" in reason for reason in free.graph["passed_over"])


def test_what_is_refused(tmp_path: Path):
    _, ours = models("all windowed")
    with pytest.raises(BadInputError, match="cache must be 'full' or 'window', got 'ring'"):
        DecoderWithCache(ours, cache="ring")
    decoder = DecoderWithCache(ours, cache="window")
    with pytest.raises(BadInputError, match="at least the window of 4 tokens, got 3"):
        decoder.empty_cache(2, window_capacity=3)
    with pytest.raises(BadInputError, match="attention_mask must say how many tokens"):
        decoder(tokens(2, 3), None, decoder.empty_cache(2))
    example = decoder.example()
    example["dynamic_shapes"]["attention_mask"] = {0: "batch", 1: "columns"}
    with pytest.raises(BadInputError, match=r"axis 1 labelled as their sum, such as 'past_seq"):
        export(decoder, tmp_path / "x", max_seq_len=LONGEST, **example)
    for attention in decoder.attentions:
        attention.window = None
    with pytest.raises(BadInputError, match="cache='window' needs layers with a window, and Mist"):
        DecoderWithCache(ours, cache="window")
    assert not (tmp_path / "x").exists()
