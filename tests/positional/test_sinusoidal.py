"""The original Transformer's positions against float64, transformers and PyTorch's tutorial."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sinusoidal import (
    ABOVE_0,
    CALLS,
    EVEN,
    HALVES,
    assert_added,
    assert_rounded_once,
    encoding,
    normal,
    truth,
)
from torch import Tensor
from transformers.models.distilbert.modeling_distilbert import create_sinusoidal_embeddings
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from rope_export.errors import BadInputError
from rope_export.positional.sinusoidal import SinusoidalPositionalEncoding, TokenEmbedding

# The table


@pytest.mark.parametrize(
    ("d_model", "max_len"), [(2, 64), (6, 3000), (8, 1), (512, 5000), (30, 100_000)]
)
def test_the_table_is_float64_rounded_once(d_model: int, max_len: int) -> None:
    table = encoding(d_model, max_len).encoding
    assert table.dtype == torch.float32
    assert_rounded_once(table, truth(range(max_len), d_model))


def test_the_default_is_five_thousand_positions_and_a_tenth_of_dropout() -> None:
    module = SinusoidalPositionalEncoding(16)
    assert (module.encoding.shape, module.dropout.p) == ((5000, 16), 0.1)


@pytest.mark.parametrize("position", [0, 1, 7, 4999])
@pytest.mark.parametrize("pair", [0, 1, 17, 255])
def test_spots_by_hand(position: int, pair: int) -> None:
    angle = position / math.pow(10000.0, 2 * pair / 512)
    row = SinusoidalPositionalEncoding(512).encoding[position]
    assert row[2 * pair].item() == pytest.approx(math.sin(angle), rel=0, abs=6e-8)
    assert row[2 * pair + 1].item() == pytest.approx(math.cos(angle), rel=0, abs=6e-8)


def test_the_table_is_that_of_distilbert_and_xlm() -> None:
    theirs = torch.empty(200, 24)
    create_sinusoidal_embeddings(200, 24, out=theirs)
    torch.testing.assert_close(encoding(24, 200).encoding, theirs, rtol=0, atol=6e-8)


def test_the_table_is_that_of_marian_with_its_channels_interleaved() -> None:
    theirs = MarianSinusoidalPositionalEmbedding(200, 24).create_weight()  # sines, then cosines
    interleaved = theirs.unflatten(1, (2, 12)).transpose(1, 2).flatten(1)
    torch.testing.assert_close(encoding(24, 200).encoding, interleaved, rtol=0, atol=6e-8)


def as_complex(table: Tensor) -> np.ndarray:
    sines, cosines = table.double().numpy()[:, 0::2], table.double().numpy()[:, 1::2]
    return cosines + 1j * sines


@pytest.mark.parametrize("distance", [1, 5, 300])
def test_a_distance_is_one_rotation_wherever_it_starts(distance: int) -> None:
    """The paper's reason: PE(p + k) is a linear function of PE(p)."""
    rows = as_complex(encoding(32, 1000).encoding)
    turns = rows[distance] / rows[0]
    np.testing.assert_allclose(rows[distance:], rows[:-distance] * turns, rtol=0, atol=3e-7)


def test_wavelengths_are_a_geometric_progression_from_two_pi() -> None:
    wavelengths = 2 * np.pi / np.angle(as_complex(encoding(64, 2).encoding)[1])
    assert wavelengths[0] == pytest.approx(2 * np.pi, rel=1e-6)
    np.testing.assert_allclose(wavelengths[1:] / wavelengths[:-1], 10000 ** (2 / 64), rtol=1e-6)


# The sum

POSITIONS = {
    "none": ({}, np.arange(6)),
    "zero": ({"offset": 0}, np.arange(6)),
    "int": ({"offset": 50}, np.arange(50, 56)),
    "last": ({"offset": 58}, np.arange(58, 64)),
    "numpy": ({"offset": np.int64(9)}, np.arange(9, 15)),
    "tensor": ({"offset": torch.tensor(50)}, np.arange(50, 56)),
    "int32 tensor": ({"offset": torch.tensor(58, dtype=torch.int32)}, np.arange(58, 64)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(6, 8), (2, 6, 8), (3, 2, 6, 8)], ids=str)
@pytest.mark.parametrize(("arguments", "positions"), POSITIONS.values(), ids=POSITIONS)
def test_every_way_to_give_positions(
    dtype: torch.dtype, shape: tuple[int, ...], arguments: dict[str, Any], positions: np.ndarray
) -> None:
    x = normal(*shape, dtype=dtype)
    assert_added(encoding()(x, **arguments), x, positions)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("convert", [False, True], ids=["float32 module", "converted module"])
def test_half_precision_is_rounded_once(dtype: torch.dtype, convert: bool) -> None:
    module = encoding(512)
    x = normal(2, 64, 512, dtype=dtype)
    assert_added((module.to(dtype) if convert else module)(x), x, range(64))


def test_one_token_after_another_is_the_sequence() -> None:
    module, x = encoding(), normal(2, 64, 8)
    for wrap in (int, torch.tensor):
        steps = [module(x[:, n : n + 1], offset=wrap(n)) for n in range(64)]
        assert torch.equal(torch.cat(steps, dim=1), module(x))


def test_a_sequence_of_no_tokens_is_served() -> None:
    assert encoding()(torch.zeros(2, 0, 8), offset=64).shape == (2, 0, 8)


def test_gradients_pass_unchanged() -> None:
    x = normal(2, 6, 8).requires_grad_()
    given = normal(2, 6, 8, seed=1)
    encoding()(x).backward(given)
    assert x.grad is not None
    assert torch.equal(x.grad, given)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_dropout_is_of_the_sum_and_in_training_only(dtype: torch.dtype) -> None:
    module, x = SinusoidalPositionalEncoding(16, 500, 0.25).train(), normal(20, 500, 16)
    x = x.to(dtype)
    torch.manual_seed(0)
    dropped = module(x)
    torch.manual_seed(0)
    kept = F.dropout(torch.ones(20, 500, 16), 0.25).numpy() > 0
    assert 0.74 < kept.mean() < 0.76  # 160 000 draws: nine standard deviations
    assert not dropped[torch.from_numpy(~kept)].any()
    exact = np.where(kept, x.double().numpy() + truth(range(500), 16), 0) / 0.75
    tolerance = {"rtol": 2e-7, "atol": 6e-7}
    if dtype in HALVES:  # one rounding, after the scale
        tolerance = {"rtol": torch.finfo(dtype).eps / 2, "atol": 1e-6}
    np.testing.assert_allclose(dropped.double().numpy(), exact, **tolerance)
    assert_added(module.eval()(x), x, range(500))


def test_without_dropout_training_is_exact() -> None:
    x = normal(2, 6, 8)
    assert_added(encoding(dropout=np.float64(0)).train()(x), x, range(6))


# State

CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda module: module,
    "bfloat16": lambda module: module.to(torch.bfloat16),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "half and back": lambda module: module.half().float(),
    "bfloat16 in a parent": lambda module: torch.nn.Sequential(module).bfloat16()[0],
    "deepcopy": copy.deepcopy,
    "deepcopy of half": lambda module: copy.deepcopy(module.half()),
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "through meta": lambda module: module.to("meta").to_empty(device="cpu"),
    "bfloat16 on meta": lambda module: module.to("meta").bfloat16().to_empty(device="cpu"),
    "deepcopy on meta": lambda module: copy.deepcopy(module.to("meta")).to_empty(device="cpu"),
    "to_empty where it is": lambda module: module.to_empty(device="cpu"),
    "reset_parameters": lambda module: module.reset_parameters() or module,
    "overwritten, then reset": lambda module: (
        module.encoding.zero_(),
        module.reset_parameters(),
        module,
    )[-1],
}


def assert_exact(module: SinusoidalPositionalEncoding) -> None:
    assert module.encoding.dtype == torch.float32
    assert_rounded_once(module.encoding, truth(range(64), 8))
    x = normal(2, 9, 8)
    assert_added(module(x, offset=55), x, range(55, 64))


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_the_table_stays_exact(convert: Callable[[Any], Any]) -> None:
    assert_exact(convert(encoding()))


@pytest.mark.parametrize("convert", [CONVERSIONS["nothing"], CONVERSIONS["half"]])
def test_a_module_made_on_meta_has_its_table_once_it_has_a_device(
    convert: Callable[[Any], Any],
) -> None:
    with torch.device("meta"):
        module = convert(encoding())
    assert module.encoding.is_meta
    assert_exact(module.to_empty(device="cpu"))


def test_a_model_made_on_meta_works_after_its_weights_were_assigned() -> None:
    def model() -> torch.nn.Sequential:
        return torch.nn.Sequential(TokenEmbedding(11, 8), encoding()).eval()

    original = model()
    with torch.device("meta"):
        assigned = model()
    assigned.load_state_dict(original.state_dict(), assign=True)
    assert_exact(assigned[1])
    tokens = torch.arange(10)[None]
    assert torch.equal(assigned(tokens), original(tokens))


def test_the_state_dict_is_empty_and_loads() -> None:
    module = encoding()
    assert dict(module.state_dict()) == {}
    assert list(dict(module.named_buffers())) == ["encoding"]
    module.load_state_dict({}, strict=True)
    assert_exact(module)


class Tutorial(torch.nn.Module):
    """PyTorch's "Language Modeling with nn.Transformer", the class as it was published."""

    def __init__(self, d_model: int, dropout: float = 0.1, max_len: int = 5000) -> None:
        super().__init__()
        self.dropout = torch.nn.Dropout(p=dropout)
        position = torch.arange(max_len).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        pe = torch.zeros(max_len, 1, d_model)
        pe[:, 0, 0::2] = torch.sin(position * div_term)
        pe[:, 0, 1::2] = torch.cos(position * div_term)
        self.register_buffer("pe", pe)

    def forward(self, x: Tensor) -> Tensor:
        """``[S, B, d_model]``."""
        return self.dropout(x + self.pe[: x.size(0)])


@pytest.mark.parametrize("prefix", ["", "1."])
@pytest.mark.parametrize("shape", [(-1, 8), (1, -1, 8), (-1, 1, 8)], ids=str)
@pytest.mark.parametrize("length", [64, 5000, 1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_checkpoint_of_the_tutorial_loads_and_changes_nothing(
    prefix: str, shape: tuple[int, ...], length: int, dtype: torch.dtype
) -> None:
    module, theirs = encoding(), Tutorial(8, max_len=length).eval()
    state = {prefix + "pe": theirs.state_dict()["pe"].to(dtype).reshape(shape)}
    holder = torch.nn.Sequential(torch.nn.Identity(), module) if prefix else module
    keys = holder.load_state_dict(state, strict=True)
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    assert list(state) == [prefix + "pe"]
    assert_exact(module)
    x = normal(3, min(length, 64), 8)
    expected = theirs(x.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-4)


EXACT = torch.from_numpy(truth(range(64), 8)).float()
OTHER_TABLES = {
    "learned": normal(64, 8),
    "sines first": torch.cat((EXACT[:, 0::2], EXACT[:, 1::2]), dim=1),
    "one row off": EXACT.roll(1, 0),
    "last row wrong": torch.cat((EXACT[:-1], EXACT[:1])),
    "not a number": EXACT.clone().fill_(math.nan),
    "other width": torch.from_numpy(truth(range(64), 6)).float(),
    "batches": EXACT.expand(2, 64, 8),
    "four axes": EXACT[None, None],
    "flat": EXACT.flatten(),
}


@pytest.mark.parametrize("pe", OTHER_TABLES.values(), ids=OTHER_TABLES)
@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_with_another_table_is_refused(pe: Tensor, strict: bool) -> None:
    holder = torch.nn.Sequential(encoding())
    with pytest.raises(RuntimeError, match=r"0\.pe must be this encoding, \[length, 8\]"):
        holder.load_state_dict({"0.pe": pe}, strict=strict)


def test_other_unexpected_keys_are_still_refused() -> None:
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"per"'):
        encoding().load_state_dict({"pe": EXACT, "per": EXACT})


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(CALLS, 2)))
def test_no_call_depends_on_an_earlier_one(first: str, second: str) -> None:
    module = encoding()
    CALLS[first](module)
    fresh, again = CALLS[second](encoding()), CALLS[second](module)
    assert torch.equal(again, fresh)
    assert again.dtype == fresh.dtype


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_changes_neither_module_nor_input(
    call: Callable[[SinusoidalPositionalEncoding], Tensor],
) -> None:
    module, x = encoding(), normal(2, 6, 8)
    before = pickle.dumps(module)
    call(module)
    module(x)
    assert pickle.dumps(module) == before
    assert module.encoding._version == 0
    assert torch.equal(x, normal(2, 6, 8))


BAD_CONSTRUCTIONS = [
    ({"d_model": 63}, f"d_model {EVEN} 63"),
    ({"d_model": 0}, f"d_model {EVEN} 0"),
    ({"d_model": -2}, f"d_model {EVEN} -2"),
    ({"d_model": 8.0}, rf"d_model {EVEN} 8\.0"),
    ({"d_model": True}, f"d_model {EVEN} True"),
    ({"d_model": "8"}, f"d_model {EVEN} '8'"),
    ({"max_len": 0}, f"max_len {ABOVE_0} 0"),
    ({"max_len": -5}, f"max_len {ABOVE_0} -5"),
    ({"max_len": 0.1}, rf"max_len {ABOVE_0} 0\.1"),
    ({"max_len": True}, f"max_len {ABOVE_0} True"),
    ({"max_len": None}, f"max_len {ABOVE_0} None"),
    ({"dropout": 1}, r"dropout must be a number in \[0, 1\), got 1"),
    ({"dropout": -0.1}, r"dropout must be a number in \[0, 1\), got -0\.1"),
    ({"dropout": math.nan}, r"dropout must be a number in \[0, 1\), got nan"),
    ({"dropout": False}, r"dropout must be a number in \[0, 1\), got False"),
    ({"dropout": "0.1"}, r"dropout must be a number in \[0, 1\), got '0\.1'"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD_CONSTRUCTIONS, ids=[message for _, message in BAD_CONSTRUCTIONS]
)
def test_a_bad_argument_is_named_with_its_value(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=f"^{message}$"):
        SinusoidalPositionalEncoding(**({"d_model": 8} | arguments))


RANGE, OFFSET = "positions must lie in 0 … 63, got", "offset must be an integer or a 0-d"
BAD_CALLS = [
    ((5, 8), {"offset": 60}, f"^{RANGE} 60 … 64; raise max_len$"),
    ((5, 8), {"offset": 64}, f"^{RANGE} 64 … 68; raise max_len$"),
    ((5, 8), {"offset": -1}, f"^{RANGE} -1 … 3; "),
    ((5, 8), {"offset": torch.tensor(60)}, f"^{RANGE} 60 … 64; raise max_len$"),
    ((5, 8), {"offset": torch.tensor(-5)}, f"^{RANGE} -5 … -1; "),
    ((5, 8), {"offset": 2**70}, f"^{RANGE} {2**70} … {2**70 + 4}; "),
    ((65, 8), {}, f"^{RANGE} 0 … 64; raise max_len$"),
    ((5, 8), {"offset": 1.0}, rf"^{OFFSET} .*got 1\.0$"),
    ((5, 8), {"offset": True}, f"^{OFFSET} .*got True$"),
    ((5, 8), {"offset": torch.tensor(1.5)}, rf"^{OFFSET} .*got torch\.float32 of shape \(\)$"),
    ((5, 8), {"offset": torch.tensor(True)}, rf"^{OFFSET} .*got torch\.bool of shape \(\)$"),
    ((5, 8), {"offset": torch.arange(5)}, rf"^{OFFSET} .*got torch\.int64 of shape \(5,\)$"),
    ((5, 7), {}, r"^x must be .*\[\.\.\., S, 8\], got torch\.float32 of shape \(2, 5, 7\)$"),
    ((5, 1), {}, r"^x must be .*\[\.\.\., S, 8\], got torch\.float32 of shape \(2, 5, 1\)$"),
]


@pytest.mark.parametrize(
    ("shape", "arguments", "message"), BAD_CALLS, ids=[message for *_, message in BAD_CALLS]
)
def test_calls_that_do_not_fit_are_refused(
    shape: tuple[int, ...], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        encoding()(torch.zeros(2, *shape), **arguments)


@pytest.mark.parametrize(
    "x", [torch.zeros(8), torch.zeros(5, 8).int(), torch.zeros(5, 8, dtype=torch.complex64)]
)
def test_inputs_that_are_no_embeddings_are_refused(x: Tensor) -> None:
    with pytest.raises(BadInputError, match=r"^x must be floating point"):
        encoding()(x)
