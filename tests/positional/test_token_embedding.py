"""Token embeddings are an ordinary embedding, scaled by the root of the width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sinusoidal import ABOVE_0, HALVES, assert_rounded_once

from rope_export.errors import BadInputError
from rope_export.positional.sinusoidal import TokenEmbedding

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
