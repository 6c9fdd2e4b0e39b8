"""What the Decoder does not serve it refuses in one line, and stays as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import mutants
import numpy as np
import pytest

from rope_export import BadInputError, ProviderUnavailableError, runtime
from rope_export.runtime import Decoder

CAPACITY, HIDDEN = mutants.LONGEST, mutants.HIDDEN


def tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, length, HIDDEN), dtype=np.float32)


@pytest.fixture(scope="module")
def decoder(exports) -> Decoder:
    _, folder = exports.get("ort", variant="varied", padding="right")
    decoder = Decoder.open(folder, batch=2)
    decoder.prefill(tokens(2, 4))
    return decoder


# What is refused: in one line that says what, which value and what would be right


def refusal(call, *arguments: object, **options: object) -> str:
    with pytest.raises(BadInputError) as raised:
        call(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("hidden", "says"),
    [
        (tokens(2, 3)[0], r"\[2, S, 64\] with at least one token, got \[3, 64\]"),
        (tokens(3, 3), r"\[2, S, 64\] with at least one token, got \[3, 3, 64\]"),
        (tokens(2, 3)[..., :63], r"\[2, S, 64\] with at least one token, got \[2, 3, 63\]"),
        (tokens(2, 3)[:, :0], r"\[2, S, 64\] with at least one token, got \[2, 0, 64\]"),
        (1.0, r"\[2, S, 64\] with at least one token, got \[\]"),
        (tokens(2, 1).astype(np.float64), "float32 as the graph is, got float64"),
        (tokens(2, 1).astype(np.float16), "float32 as the graph is, got float16"),
        (tokens(2, 1).astype(np.int64), "float32 as the graph is, got int64"),
    ],
)
@pytest.mark.parametrize("method", ["prefill", "decode"])
def test_hidden_states_that_do_not_fit(decoder, method, hidden, says):
    with pytest.raises(BadInputError, match=f"^hidden_states must be .*{says}"):
        getattr(decoder, method)(hidden)
    assert decoder.lengths == (4, 4)


def test_decode_takes_one_token(decoder):
    says = refusal(decoder.decode, tokens(2, 3))
    assert "[2, 1, 64]; got [2, 3, 64] (prefill takes several)" in says
    assert decoder.lengths == (4, 4)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        ([[1, 1, 1]], r"must be \[2, 3\] of 0 and 1, got \[1, 3\]"),
        ([[1, 1], [1, 1]], r"must be \[2, 3\] of 0 and 1, got \[2, 2\]"),
        ([[1] * 7, [1] * 7], r"must be \[2, 3\] of 0 and 1, got \[2, 7\]"),
        ([[1, 1, 1], [1, 1, 7]], "must be .* of 0 and 1, got .*7"),
        ([[1, 1, 1], [1, 1, -1]], "must be .* of 0 and 1, got .*-1"),
        ([[1, 1, 1], [1, 1, 0.5]], r"must be .* of 0 and 1, got .*0\.5"),
        ([[1, 1, 1], [0, 1, 1]], "must have its padding on the right, .* row 1 has it elsewhere"),
        ([[1, 0, 1], [1, 1, 1]], "must have its padding on the right, .* row 0 has it elsewhere"),
    ],
)
def test_masks_that_do_not_fit(decoder, mask, says):
    with pytest.raises(BadInputError, match=f"^attention_mask {says}"):
        decoder.prefill(tokens(2, 3), attention_mask=mask)
    assert decoder.lengths == (4, 4)


def test_padding_is_on_the_side_that_was_exported(exports):
    for target in ("ort", "onnx"):
        _, folder = exports.get(target, variant="varied", padding="left")
        decoder = Decoder.open(folder, batch=2)
        says = refusal(decoder.prefill, tokens(2, 3), attention_mask=[[1, 1, 1], [1, 1, 0]])
        assert "its padding on the left, as the graph was exported; row 1" in says
        assert decoder.lengths == (0, 0)


def test_positions_that_do_not_fit(decoder, exports):
    says = refusal(decoder.prefill, tokens(2, 2), position_ids=[[4, 5], [4, 5]])
    assert says == "the graph takes no position_ids: they are implied, got some"
    _, folder = exports.get("ort", padding="left", position_ids=True)
    given = Decoder.open(folder, batch=2)
    for call, length in ((given.prefill, 2), (given.decode, 1)):
        says = refusal(call, tokens(2, length))
        assert says == "the graph needs position_ids, got None"
        wanted = f"position_ids must be integers [2, {length}], got "
        for ids, got in (
            ([0] * length, f"[{length}] of int64"),
            ([[0] * length], f"[1, {length}] of int64"),
            ([[0] * 3] * 2, "[2, 3] of int64"),
            ([[0.0] * length] * 2, f"[2, {length}] of float64"),
            ([[True] * length] * 2, f"[2, {length}] of bool"),
        ):
            assert refusal(call, tokens(2, length), position_ids=ids) == wanted + got
    assert given.lengths == (0, 0)


@pytest.mark.parametrize("what", ["hidden_states", "attention_mask", "position_ids"])
def test_rows_that_make_no_array(exports, what):
    _, folder = exports.get("ort", padding="left", position_ids=True)
    decoder = Decoder.open(folder, batch=2)
    inputs = {
        "hidden_states": tokens(2, 2),
        "attention_mask": [[1, 1], [1, 1]],
        "position_ids": [[0, 1], [0, 1]],
    } | {what: [[1], [1, 1]]}
    says = refusal(decoder.prefill, inputs.pop("hidden_states"), **inputs)
    assert says.startswith(f"{what} must be ")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch": 0}, "batch must be .*, got 0"),
        ({"batch": -3}, "batch must be .*, got -3"),
        ({"batch": 1.5}, r"batch must be .*, got 1\.5"),
        ({"capacity": 0}, "capacity must be an integer above 0, got 0"),
        ({"capacity": 49}, "capacity must be from 1 to the 48 tokens .*, got 49"),
        ({"capacity": 4.5}, r"capacity must be .*, got 4\.5"),
        ({"cuda_graph": True}, "cuda_graph=True is not possible: provider cpu has none"),
    ],
)
def test_arguments_that_are_out_of_range(exports, options, says):
    _, folder = exports.get("ort", variant="varied", padding="right")
    with pytest.raises(BadInputError, match=says):
        Decoder.open(folder, **options)


@pytest.mark.parametrize(
    ("target", "dtype", "options", "why"),
    [
        ("ort", "float32", {"padding": "right"}, "the graph has control flow, for the CPU"),
        ("onnx", "float32", {"padding": "left"}, "the cache of this target grows with each step"),
    ],
)
def test_steps_that_cuda_cannot_capture(exports, target, dtype, options, why):
    """Said before the provider is looked for."""
    _, folder = exports.get(target, dtype, variant="varied", **options)
    says = refusal(Decoder.open, folder, provider="cuda", cuda_graph=True)
    assert says.startswith(f"cuda_graph=True is not possible: {why}")


def test_a_provider_that_does_not_load(exports, monkeypatch):
    _, folder = exports.get("ort", variant="varied", padding="right")
    monkeypatch.setattr(runtime.providers, "unavailable_reason", lambda _: "no library")
    with pytest.raises(ProviderUnavailableError) as raised:
        Decoder.open(folder, provider="cuda")
    assert str(raised.value) == "provider cuda cannot be used here: no library"


@pytest.mark.skipif(runtime.unavailable_reason("cuda") is None, reason="it loads here")
def test_cuda_here(exports):
    _, folder = exports.get("ort", variant="varied", padding="right")
    with pytest.raises(ProviderUnavailableError, match="provider cuda cannot be used here: "):
        Decoder.open(folder, provider="cuda")


def test_a_provider_nobody_knows(exports):
    _, folder = exports.get("ort", variant="varied", padding="right")
    with pytest.raises(
        (BadInputError, ProviderUnavailableError), match=r"one of cpu, cuda, got 'tpu'"
    ):
        Decoder.open(folder, provider="tpu")


def test_an_artifact_without_a_cache(artifact_of_block, tmp_path):
    says = refusal(Decoder.open, artifact_of_block.path)
    assert says.endswith("the graph has no cache that a Decoder can drive; export it with one")
    assert "does not exist" in refusal(Decoder.open, tmp_path / "nothing")


def test_an_altered_artifact(exports, tmp_path):
    _, folder = exports.get("ort", variant="varied", padding="right")
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    model = copy / "model.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    assert "model.onnx: altered or truncated" in refusal(Decoder.open, copy)
    model.unlink()
    assert "model.onnx: missing" in refusal(Decoder.open, copy)
