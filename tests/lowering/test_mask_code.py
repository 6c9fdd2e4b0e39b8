"""The code of masks, as people write it, runs in every target and means what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from selection import slow_unless
from torch import Tensor, nn
from torch.export import Dim

from rope_export import export
from rope_export.artifacts.targets import TARGETS

BOUNDS = torch.tensor([0, 2, 3, 6])
SPECIAL = torch.tensor([1, 4])


def tail_set(mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask[:, -2:] = True
    return mask


def tail_set_in_numpy(mask: np.ndarray) -> np.ndarray:
    mask = mask.copy()
    mask[:, -2:] = True
    return mask


def both(mask: Any) -> Any:
    return mask[:, None] & mask[:, :, None]


# What a module does with a mask and ids [B, S], and the same in numpy.
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., np.ndarray]]] = {
    "where of three": (
        lambda m, i: torch.where(i > 2, m, ~m),
        lambda m, i: np.where(i > 2, m, ~m),
    ),
    "where true": (
        lambda m, i: torch.where(i > 2, torch.tensor(True), m),
        lambda m, i: (i > 2) | m,
    ),
    "where of two constants": (
        lambda m, _: torch.where(m, torch.tensor(False), torch.tensor(True)),
        lambda m, _: ~m,
    ),
    "where, over axes": (
        lambda m, i: torch.where(m[:, None], (i > 2)[:, :, None], torch.tensor(False)),
        lambda m, i: m[:, None] & (i > 2)[:, :, None],
    ),
    "where of a chosen row": (
        lambda m, i: torch.where(i > 2, m[:1], m),
        lambda m, i: np.where(i > 2, m[:1], m),
    ),
    "filled with true": (lambda m, i: m.masked_fill(i > 2, True), lambda m, i: m | (i > 2)),
    "filled with false": (
        lambda m, i: both(m).masked_fill((i > 2)[:, None], False),
        lambda m, i: both(m) & ~(i > 2)[:, None],
    ),
    "filled in place": (
        lambda m, i: m.clone().masked_fill_(i > 2, False),
        lambda m, i: m & ~(i > 2),
    ),
    "set by slices": (lambda m, _: tail_set(m), lambda m, _: tail_set_in_numpy(m)),
    "sum of booleans": (lambda m, i: m + (i > 2), lambda m, i: m | (i > 2)),
    "product of booleans": (lambda m, i: m * (i > 2), lambda m, i: m & (i > 2)),
    "largest": (lambda m, _: both(m).amax(-1), lambda m, _: both(m).any(-1)),
    "smallest": (lambda m, _: m.amin(-1, keepdim=True), lambda m, _: m.all(-1, keepdims=True)),
    "largest of a row": (lambda m, _: m.max(-1).values, lambda m, _: m.any(-1)),
    "any": (lambda m, _: m.any(-1), lambda m, _: m.any(-1)),
    "all": (lambda m, _: both(m).all(-1), lambda m, _: both(m).all(-1)),
    "larger of two": (lambda m, i: torch.maximum(m, i > 2), lambda m, i: m | (i > 2)),
    "counted": (lambda m, _: m.cumsum(-1) * m, lambda m, _: m.cumsum(-1) * m),
    "before the first": (
        lambda m, _: m.cumprod(-1).bool(),
        lambda m, _: np.logical_and.accumulate(m, -1),
    ),
    "before the first, along rows": (
        lambda _, i: (1 + i.int() % 3).cumprod(0),
        lambda _, i: np.cumprod(1 + i % 3, axis=0),
    ),
    "product of floats": (
        lambda _, i: (1 + i / 8).cumprod(1),
        lambda _, i: np.cumprod(1 + i / 8, axis=1, dtype=np.float32),
    ),
    "special tokens": (
        lambda m, i: torch.isin(i, SPECIAL) & m,
        lambda m, i: np.isin(i, SPECIAL.numpy()) & m,
    ),
    "other tokens": (
        lambda _, i: torch.isin(i, SPECIAL, invert=True),
        lambda _, i: ~np.isin(i, SPECIAL.numpy()),
    ),
    "documents of a packed row": (
        lambda _, i: torch.searchsorted(BOUNDS, i, right=True) - 1,
        lambda _, i: np.searchsorted(BOUNDS.numpy(), i, side="right") - 1,
    ),
    "places in another row": (
        lambda m, i: torch.searchsorted(m.cumsum(-1), i),
        lambda m, i: np.stack(
            [np.searchsorted(row, each) for row, each in zip(m.cumsum(-1), i, strict=True)]
        ),
    ),
    "distance, not below zero": (lambda _, i: F.relu(i - 3), lambda _, i: np.maximum(i - 3, 0)),
    "triangle of a mask": (
        lambda m, _: both(m).tril() | torch.eye(m.shape[1], dtype=torch.bool),
        lambda m, _: np.tril(both(m)) | np.eye(m.shape[1], dtype=bool),
    ),
    "triangle of small integers": (
        lambda m, _: (both(m).to(torch.uint8).tril() & both(m).to(torch.int8).triu()).bool(),
        lambda m, _: np.tril(both(m)) & np.triu(both(m)),
    ),
    "choice of small integers": (
        lambda m, i: torch.where(m, i.short(), -1).long(),
        lambda m, i: np.where(m, i, -1),
    ),
    "padded": (
        lambda m, _: F.pad(m, (1, 2), value=True),
        lambda m, _: np.pad(m, ((0, 0), (1, 2)), constant_values=True),
    ),
    "scattered": (
        lambda m, i: torch.zeros_like(m).scatter(1, i % 3, True),
        lambda m, i: (i[:, None] % 3 == np.arange(m.shape[1])[:, None]).any(-1),
    ),
}
QUICK = ("where of three", "filled with false", "sum of booleans", "largest", "special tokens")


class Masks(nn.Module):
    """Several of them at once; numbers that do not matter keep both inputs in the graph."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def forward(self, mask: Tensor, ids: Tensor) -> Any:
        kept = (mask.sum() + ids.sum()).float()
        return *(CASES[name][0](mask, ids) for name in self.names), kept


def drawn(batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.random.default_rng(length)
    mask = numbers.random((batch, length)) > 0.4
    mask[0] = True
    return mask, numbers.integers(0, 7, (batch, length))


@pytest.mark.parametrize(
    ("names", "target"),
    slow_unless(
        lambda names, target: len(names) < len(CASES) and target != "onnx",
        [(names, target) for names in (QUICK, tuple(CASES)) for target in TARGETS],
    ),
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} cases",
)
def test_the_code_of_masks_runs(tmp_path, names, target):
    axes = {0: "batch", 1: Dim("sequence", min=3, max=40)}
    result = export(
        Masks(list(names)),
        tmp_path / "x",
        args=tuple(map(torch.from_numpy, drawn(2, 5))),
        dynamic_shapes=[axes, axes],
        target=target,
    )
    session = onnxruntime.InferenceSession(str(result.model), providers=["CPUExecutionProvider"])
    inputs = [value.name for value in session.get_inputs()]
    wrong = {}
    for sizes in ((1, 3), (3, 8), (2, 21)):
        mask, ids = drawn(*sizes)
        given = dict(zip(inputs, (mask, ids), strict=True))
        for name, found in zip(names, session.run(None, given)[:-1], strict=True):
            truth = CASES[name][1](mask, ids)
            if found.shape != truth.shape or not np.allclose(found, truth, rtol=1e-5):
                wrong[name, sizes] = found, truth
    assert not wrong
