"""The original Transformer's input against float64, transformers and PyTorch's tutorial."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, RuntimeException
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers.models.distilbert.modeling_distilbert import create_sinusoidal_embeddings
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from rope_export.errors import BadInputError
from rope_export.sinusoidal import SinusoidalPositionalEncoding, TokenEmbedding

HALVES = [torch.float16, torch.bfloat16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def truth(positions: Any, d_model: int) -> np.ndarray:
    """Section 3.5 in float64, channel by channel: ``[len(positions), d_model]``."""
    result = np.empty((len(positions), d_model))
    for channel in range(d_model):
        angles = np.asarray(positions) / 10000 ** ((channel - channel % 2) / d_model)
        result[:, channel] = np.cos(angles) if channel % 2 else np.sin(angles)
    return result


def encoding(d_model: int = 8, max_len: int = 64, **others: Any) -> SinusoidalPositionalEncoding:
    return SinusoidalPositionalEncoding(d_model, max_len, **others).eval()


def assert_rounded_once(actual: Tensor | np.ndarray, exact: np.ndarray) -> None:
    """Each element is exact but for one rounding to its dtype, and float64's (or float32's) own."""
    actual = torch.as_tensor(actual)
    values = actual.double().numpy()
    # Half the distance between neighbours, at the exact value's power of two.
    half = torch.finfo(actual.dtype).eps * 2.0 ** (np.frexp(exact)[1] - 2)
    slack = 1e-10 if actual.dtype == torch.float32 else 1e-6
    assert values.shape == exact.shape
    assert (np.abs(values - exact) <= half + slack).all()


def assert_added(actual: Any, x: Tensor, positions: Any, atol: float = 6e-7) -> None:
    """``x`` plus the truth, every element, in the dtype of ``x``."""
    actual = torch.as_tensor(actual)
    assert actual.dtype == x.dtype
    exact = x.double().numpy() + truth(positions, x.shape[-1])
    if x.dtype in HALVES:
        assert_rounded_once(actual, exact)
    else:
        np.testing.assert_allclose(actual.double().numpy(), exact, rtol=0, atol=atol)


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


CALLS: dict[str, Callable[[SinusoidalPositionalEncoding], Tensor]] = {
    "float32": lambda module: module(normal(2, 6, 8)),
    "bfloat16": lambda module: module(normal(2, 6, 8).bfloat16()),
    "float64": lambda module: module(normal(2, 6, 8).double()),
    "long": lambda module: module(normal(1, 64, 8)),
    "offset": lambda module: module(normal(2, 6, 8), offset=40),
    "tensor offset": lambda module: module(normal(2, 6, 8), offset=torch.tensor(40)),
    "inference mode": torch.inference_mode()(lambda module: module(normal(2, 7, 8))),
}


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


# Refusals

EVEN, ABOVE_0 = "must be a positive even integer, got", "must be an integer above 0, got"
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


# Token embeddings


@pytest.mark.parametrize("d_model", [1, 6, 512])
@pytest.mark.parametrize("tokens", [torch.int32, torch.int64])
def test_embeddings_are_scaled_by_the_root_of_the_width(d_model: int, tokens: torch.dtype) -> None:
    module, ids = TokenEmbedding(30, d_model), torch.arange(30).reshape(3, 10)
    exact = module.embedding.weight.detach().double().numpy()[ids.numpy()] * np.sqrt(d_model)
    assert module.embedding.weight.dtype == torch.float32
    np.testing.assert_allclose(module(ids.to(tokens)).detach(), exact, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_embeddings_are_scaled_and_rounded_once(dtype: torch.dtype) -> None:
    module = TokenEmbedding(300, 500).to(dtype)
    weight = module.embedding.weight.detach().double().numpy()
    actual = module(torch.arange(300)).detach()
    assert actual.dtype == dtype
    assert_rounded_once(actual, weight * np.sqrt(500))


def test_float64_embeddings_stay_float64() -> None:
    module = TokenEmbedding(30, 6).double()
    exact = module.embedding.weight.detach().numpy() * np.sqrt(6)
    np.testing.assert_allclose(module(torch.arange(30)).detach().numpy(), exact, rtol=4e-16)


def reset_every_submodule(module: TokenEmbedding) -> TokenEmbedding:
    """What trainers do after ``to_empty``."""
    module = module.to("meta").to_empty(device="cpu")
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    return module


@pytest.mark.parametrize("build", [lambda module: module, reset_every_submodule])
@pytest.mark.parametrize("padding_idx", [None, 0, 7, -1])
def test_embeddings_start_with_unit_variance_and_padding_with_zeros(
    build: Callable[[TokenEmbedding], TokenEmbedding], padding_idx: int | None
) -> None:
    torch.manual_seed(0)
    module = build(TokenEmbedding(2000, 64, padding_idx=padding_idx))
    out = module(torch.arange(2000)).detach()
    used = torch.ones(2000, dtype=torch.bool)
    if padding_idx is not None:
        used[padding_idx] = False
        assert not out[padding_idx].any()
    # 128 000 draws: the standard deviation is known to 0.002, the mean to 0.003.
    assert out[used].std().item() == pytest.approx(1, abs=0.01)
    assert out[used].mean().item() == pytest.approx(0, abs=0.015)
    assert module.embedding.weight[used].std().item() == pytest.approx(1 / 8, abs=0.00125)


def test_padding_is_not_trained() -> None:
    module = TokenEmbedding(5, 4, padding_idx=2)
    module(torch.tensor([[1, 2, 2, 4]])).sum().backward()
    expected = torch.zeros(5, 4)
    expected[[1, 4]] = 2.0  # the root of the width
    assert torch.equal(module.embedding.weight.grad, expected)


def test_the_weights_are_those_of_an_ordinary_embedding() -> None:
    module, other = TokenEmbedding(30, 16), torch.nn.Embedding(30, 16)
    assert list(module.state_dict()) == ["embedding.weight"]
    module.load_state_dict({"embedding.weight": other.weight})
    ids = torch.arange(30)
    torch.testing.assert_close(module(ids), other(ids) * 4, rtol=0, atol=0)


BAD_EMBEDDINGS = [
    ({"vocab_size": 0}, f"vocab_size {ABOVE_0} 0"),
    ({"vocab_size": 3.0}, rf"vocab_size {ABOVE_0} 3\.0"),
    ({"vocab_size": True}, f"vocab_size {ABOVE_0} True"),
    ({"d_model": 0}, f"d_model {ABOVE_0} 0"),
    ({"d_model": "4"}, f"d_model {ABOVE_0} '4'"),
    ({"padding_idx": 5}, "padding_idx must lie in -5 … 4, got 5"),
    ({"padding_idx": -6}, "padding_idx must lie in -5 … 4, got -6"),
    ({"padding_idx": 1.0}, r"padding_idx must lie in -5 … 4, got 1\.0"),
    ({"padding_idx": False}, "padding_idx must lie in -5 … 4, got False"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD_EMBEDDINGS, ids=[message for _, message in BAD_EMBEDDINGS]
)
def test_a_bad_embedding_is_named_with_its_value(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=f"^{message}$"):
        TokenEmbedding(**({"vocab_size": 5, "d_model": 4} | arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8], ids=str)
def test_tokens_that_are_no_integers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(BadInputError, match=f"^tokens must be int32 or int64, got {dtype}$"):
        TokenEmbedding(5, 4)(torch.zeros(1, 2, dtype=dtype))


@pytest.mark.parametrize("token", [-1, 5])
def test_tokens_out_of_range_raise(token: int) -> None:
    with pytest.raises(IndexError):
        TokenEmbedding(5, 4)(torch.tensor([[token]]))


# Compilers and exporters


class Input(torch.nn.Module):
    """What stands before the first layer: tokens become vectors with positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = TokenEmbedding(50, 8), encoding()

    def forward(self, tokens: Tensor, offset: Tensor | int = 0) -> Tensor:
        return self.positions(self.tokens(tokens), offset=offset)


def assert_input(actual: Any, module: Input, tokens: Tensor, positions: Any) -> None:
    """Exact but for the roundings of the embedding and of the sum."""
    weight = module.tokens.embedding.weight.detach()
    actual = torch.as_tensor(actual)
    assert actual.dtype == weight.dtype
    embedded = weight.double().numpy()[tokens.numpy()] * np.sqrt(8)
    exact = embedded + truth(positions, 8)
    eps = torch.finfo(weight.dtype).eps
    bound = (np.abs(embedded) + np.abs(exact)) * eps / 2 + 6e-7
    assert actual.shape == exact.shape
    assert (np.abs(actual.detach().double().numpy() - exact) <= bound).all()


def token_ids(batch: int, length: int) -> Tensor:
    drawn = np.random.default_rng(length).integers(0, 50, (batch, length))
    return torch.from_numpy(drawn)


@pytest.fixture
def counter() -> Iterator[CompileCounter]:
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


LENGTHS = (7, 2, 33, 16, 5, 64, 3, 21, 48, 10)


@pytest.mark.parametrize("offset", [None, 0, torch.tensor(0)], ids=["none", "int", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ten_lengths_compile_to_at_most_two_full_graphs(
    counter: CompileCounter, offset: int | Tensor | None, dtype: torch.dtype
) -> None:
    compiled = torch.compile(encoding(), fullgraph=True, backend=counter)
    for length in LENGTHS:
        x = normal(2, length, 8, seed=length, dtype=dtype)
        actual = compiled(x) if offset is None else compiled(x, offset=offset)
        assert_added(actual, x, range(length))
    assert 1 <= counter.frame_count <= 2


def test_tokens_of_ten_lengths_compile_to_at_most_two_full_graphs(counter: CompileCounter) -> None:
    module = Input().eval()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for length in LENGTHS:
        tokens = token_ids(2, length)
        assert_input(compiled(tokens), module, tokens, range(length))
    assert 1 <= counter.frame_count <= 2


def test_training_compiles_to_at_most_two_full_graphs_that_drop(counter: CompileCounter) -> None:
    module = encoding(dropout=0.5).train()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for length in LENGTHS:
        x = normal(40, length, 8, seed=length)
        actual = compiled(x).double().numpy()
        exact = 2 * (x.double().numpy() + truth(range(length), 8))
        dropped = actual == 0
        assert 0.3 < dropped.mean() < 0.7
        np.testing.assert_allclose(actual[~dropped], exact[~dropped], rtol=0, atol=2e-6)
    assert 1 <= counter.frame_count <= 2


@pytest.mark.parametrize(("wrap", "graphs"), [(torch.tensor, 1), (int, 2)])
def test_decoding_one_token_after_another_compiles_once(
    counter: CompileCounter, wrap: Callable[[int], Any], graphs: int
) -> None:
    compiled = torch.compile(encoding(), fullgraph=True, backend=counter)
    x = normal(2, 1, 8)
    for offset in (9, 10, 11, 12, 40, 63):
        assert_added(compiled(x, offset=wrap(offset)), x, [offset])
    assert counter.frame_count == graphs


@pytest.mark.parametrize(("length", "offset"), [(65, 0), (5, 60), (5, -1)])
def test_a_length_out_of_range_names_itself_while_it_is_compiled(
    counter: CompileCounter, length: int, offset: int
) -> None:
    compiled = torch.compile(encoding(), fullgraph=True, backend=counter)
    for known in range(2, 8):  # sizes and offsets are symbols by now
        compiled(normal(2, known, 8), offset=known)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="BadInputError") as caught:
        compiled(normal(2, length, 8), offset=offset)
    found = f"positions must lie in 0 … 63, got {offset} … {offset + length - 1}; raise max_len"
    assert found in str(caught.value)


BATCH, LENGTH = torch.export.Dim("batch", max=64), torch.export.Dim("length", min=1, max=64)
DYNAMIC = torch.export.Dim.DYNAMIC
# None of these is the shape traced.
OTHER_SHAPES = [(1, 1), (3, 64), (1, 17), (5, 2), (64, 63)]


def warmed() -> SinusoidalPositionalEncoding:
    module = encoding()
    for call in CALLS.values():  # nothing of these may end up in the graph
        call(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("module", [encoding, warmed])
def test_torch_export_serves_shapes_it_never_saw(
    dtype: torch.dtype, module: Callable[[], SinusoidalPositionalEncoding]
) -> None:
    program = torch.export.export(
        module(), (normal(2, 6, 8, dtype=dtype),), dynamic_shapes=({0: BATCH, 1: LENGTH},)
    )
    for batch, length in OTHER_SHAPES:
        x = normal(batch, length, 8, dtype=dtype)
        assert_added(program.module()(x), x, range(length))


def test_torch_export_takes_a_dynamic_int_as_offset() -> None:
    program = torch.export.export(
        encoding(),
        (normal(2, 6, 8),),
        {"offset": 3},
        dynamic_shapes={"x": {0: BATCH, 1: torch.export.Dim.AUTO}, "offset": DYNAMIC},
    )
    for length, offset in [(2, 62), (17, 30), (62, 2)]:
        x = normal(3, length, 8)
        assert_added(program.module()(x, offset=offset), x, range(offset, offset + length))


def test_torch_export_of_a_too_long_example_says_so() -> None:
    with pytest.raises(BadInputError, match="got 0 … 64; raise max_len"):
        torch.export.export(encoding(), (normal(2, 65, 8),))


def test_torch_export_of_an_axis_that_would_be_too_long_is_refused() -> None:
    longer = torch.export.Dim("length", min=1, max=65)
    with pytest.raises(torch._dynamo.exc.UserError, match="max=64"):
        torch.export.export(encoding(), (normal(2, 6, 8),), dynamic_shapes=({1: longer},))


OFFSETS = [-(2**63), -7, -1, 0, 3, 58, 60, 63, 64, 2**40, 2**63 - 1]


def assert_served_or_nan(actual: Any, x: Tensor, offset: int) -> None:
    """Positions in range are right, and every channel of the others is NaN."""
    actual, positions = torch.as_tensor(actual), [offset + n for n in range(x.shape[-2])]
    inside = [n for n, position in enumerate(positions) if 0 <= position < 64]
    outside = [n for n in range(len(positions)) if n not in inside]
    assert actual.shape == x.shape
    assert actual[:, outside].isnan().all()
    assert_added(actual[:, inside], x[:, inside], [positions[n] for n in inside])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_in_graphs_positions_out_of_range_are_nan(
    counter: CompileCounter, dtype: torch.dtype
) -> None:
    module, x = encoding(), normal(2, 6, 8, dtype=dtype)
    program = torch.export.export(
        module,
        (x,),
        {"offset": torch.tensor(3)},
        dynamic_shapes={"x": {0: BATCH, 1: LENGTH}, "offset": None},
    )
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for offset in OFFSETS:
        for graph in (program.module(), compiled):
            assert_served_or_nan(graph(x, offset=torch.tensor(offset)), x, offset)


def test_offsets_that_only_an_accelerator_knows_raise_nothing() -> None:
    """Fake tensors stand for them: what they hold cannot be read."""
    with torch._subclasses.FakeTensorMode():
        x, offset = torch.zeros(2, 6, 8), torch.tensor(64)
        module = encoding()
        assert isinstance(offset, torch._subclasses.FakeTensor)
        assert module(x, offset=offset).shape == (2, 6, 8)


def session_of(
    module: torch.nn.Module, arguments: tuple[Any, ...], dynamic_shapes: Any
) -> Callable[..., np.ndarray]:
    """Export as anybody would, and run in onnxruntime."""
    program = torch.onnx.export(
        module, arguments, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False
    )
    assert program is not None
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [node.name for node in session.get_inputs()]

    def run(*inputs: Tensor) -> np.ndarray:
        feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return np.asarray(session.run(None, feeds)[0])

    return run


# torch's exporter copies its own deprecated LeafSpec.
LEAF_SPEC = pytest.mark.filterwarnings(
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
)


@LEAF_SPEC
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_plain_onnx_export_serves_shapes_it_never_saw(dtype: torch.dtype) -> None:
    axes = ({0: BATCH, 1: LENGTH},)
    run = session_of(warmed(), (normal(2, 6, 8, dtype=dtype),), axes)
    for batch, length in OTHER_SHAPES:
        x = normal(batch, length, 8, dtype=dtype)
        assert_added(run(x), x, range(length))
    with pytest.raises((Fail, RuntimeException), match="broadcast"):
        run(normal(1, 65, 8, dtype=dtype))


@LEAF_SPEC
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_plain_onnx_export_of_tokens_and_an_offset(dtype: torch.dtype) -> None:
    module = Input().to(dtype).eval()
    axes = ({0: BATCH, 1: LENGTH}, None)
    run = session_of(module, (token_ids(2, 6), torch.tensor(3)), axes)
    for batch, length in OTHER_SHAPES:
        tokens = token_ids(batch, length)
        for offset in {0, 64 - length}:
            positions = range(offset, offset + length)
            assert_input(run(tokens, torch.tensor(offset)), module, tokens, positions)


@LEAF_SPEC
@pytest.mark.parametrize("tokens", [torch.int32, torch.int64], ids=str)
def test_plain_onnx_export_of_half_precision_embeddings_rounds_once(tokens: torch.dtype) -> None:
    module = TokenEmbedding(200, 12, padding_idx=1).half().eval()  # 12: its root is no float16
    run = session_of(module, (token_ids(2, 6).to(tokens),), ({0: BATCH, 1: LENGTH},))
    exact = module.embedding.weight.detach().double().numpy() * np.sqrt(12)
    for every in (torch.arange(200).reshape(4, 50), torch.arange(200).reshape(10, 20)):
        assert_rounded_once(run(every.to(tokens)), exact[every.numpy()])


@LEAF_SPEC
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_in_onnxruntime_positions_out_of_range_are_nan(dtype: torch.dtype) -> None:
    class Offset(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = encoding()

        def forward(self, x: Tensor, offset: Tensor) -> Tensor:
            return self.positions(x, offset=offset)

    x = normal(2, 6, 8, dtype=dtype)
    run = session_of(Offset().eval(), (x[:, :4], torch.tensor(3)), ({1: LENGTH}, None))
    for offset in OFFSETS:
        assert_served_or_nan(run(x, torch.tensor(offset)), x, offset)
