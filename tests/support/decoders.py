"""Decoders of transformers, as they were and with our attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from caches import cache_in, caching
from checkpoints import CASES, LONGEST, _model_class, randomise
from torch import Tensor, nn

from rope_export.models.replacement import replace_attention

TOKENS = 24


@cache
def _built(name: str) -> nn.Module:
    case = CASES[name]
    torch.manual_seed(0)
    model = _model_class(case).from_config(case.config(), attn_implementation="eager")
    randomise(model)
    return model.eval()


def original(name: str) -> Any:
    """A model nobody else has."""
    return copy.deepcopy(_built(name))


def replaced(name: str) -> Any:
    model = original(name)
    assert replace_attention(model, max_seq_len=LONGEST)
    return model


def tokens(length: int = TOKENS, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, 32, (batch, length), generator=generator)


def deviation(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max() / expected.abs().max())


def assert_close(actual: Tensor, expected: Tensor, within: float = 1e-5) -> None:
    assert deviation(actual, expected) <= within


@torch.no_grad()
def whole(model: Any, mask: Tensor | None) -> Tensor:
    result = model(input_ids=tokens(), attention_mask=mask, use_cache=False)[0]
    return result if mask is None else result[mask.bool()]


@torch.no_grad()
def served(model: Any, steps: tuple[int, ...]) -> Iterator[Tensor]:
    past, end = None, 0
    for count in steps:
        given = tokens(sum(steps))[:, end : end + count]
        result = model(input_ids=given, use_cache=True, **caching(model, past))
        past, end = cache_in(result), end + count
        yield result[0]
