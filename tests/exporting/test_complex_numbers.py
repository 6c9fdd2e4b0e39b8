"""Rotations by complex multiplication, however their tables are made, taken and combined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from rope_export import BadInputError, export
from rope_export.artifacts.targets import TARGETS

WIDTH, ROWS = 8, 40
ANGLES = np.outer(np.arange(ROWS), 1.0 / 10000.0 ** (np.arange(0, WIDTH, 2) / WIDTH))


def polar(double: bool = False) -> Tensor:
    angles = torch.from_numpy(ANGLES)
    return torch.polar(torch.ones_like(angles), angles).to(
        torch.complex128 if double else torch.complex64
    )


def pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())


def heads(x: Tensor, turn: Tensor) -> Tensor:
    return torch.view_as_real(pairs(x) * turn).flatten(-2).type_as(x)


class Turning(nn.Module):
    """``how`` turns ``[B, S, WIDTH]`` by tables of all kinds."""

    def __init__(self, how: Callable[..., Tensor]) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("table", polar(), persistent=False)
        self.plain = polar(double=True)  # moves nowhere with the module

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def sliced(self: Turning, x: Tensor) -> Tensor:
    return heads(x, self.table[: x.shape[1]].view(1, x.shape[1], -1))


def gathered(self: Turning, x: Tensor) -> Tensor:
    return heads(x, self.table[torch.arange(x.shape[1])][None])


def computed(_: Turning, x: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(x.shape[1]).float(), torch.from_numpy(ANGLES[1]).float())
    return heads(x, torch.polar(torch.ones_like(angles), angles))


def exponential(_: Turning, x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[1]).float()[:, None] * torch.from_numpy(ANGLES[1]).float()
    return heads(x, torch.exp(1j * angles))


def of_parts(_: Turning, x: Tensor) -> Tensor:
    angles = torch.from_numpy(ANGLES).float()[: x.shape[1]]
    turn = torch.complex(angles.cos(), angles.sin())
    turned = pairs(x) * turn
    return torch.stack((turned.real, turned.imag), -1).flatten(-2)


def backwards(self: Turning, x: Tensor) -> Tensor:
    """The conjugate of a conjugate, and a division by what has length 1."""
    return heads(x, 1 / self.table[: x.shape[1]].conj())


def in_axes(self: Turning, x: Tensor) -> Tensor:
    """As video models have it: split, each axis viewed and expanded, joined."""
    first, second = self.plain.split((1, WIDTH // 2 - 1), dim=1)
    length = x.shape[1]
    parts = first[:length].view(length, 1, -1), second[:length].view(length, 1, -1)
    turn = torch.cat([part.expand(length, 1, -1) for part in parts], -1).reshape(1, length, -1)
    wide = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(wide * turn).flatten(-2).type_as(x)


def stacked(self: Turning, x: Tensor) -> Tensor:
    """Rows stacked, unbound and turned one by one; negated twice."""
    turn = torch.stack([self.table, -self.table]).unbind(0)[1][: x.shape[1]]
    return heads(x, -turn.unsqueeze(0).repeat(x.shape[0], 1, 1))


def in_place(self: Turning, x: Tensor) -> Tensor:
    turned = pairs(x).clone()
    turned *= self.table[: x.shape[1]]
    return torch.view_as_real(turned).flatten(-2)


HOWS = [sliced, gathered, computed, exponential, of_parts, backwards, in_axes, stacked, in_place]


@pytest.mark.parametrize(
    ("how", "target"),
    [*((how, "ort") for how in HOWS), *((in_axes, target) for target in TARGETS[1:])],
)
def test_complex_rotations_are_exported_and_proven(how, target, tmp_path):
    result = export(
        Turning(how).eval(),
        tmp_path / "x",
        kwargs={"x": torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(0))},
        dynamic_shapes={"x": {0: "batch", 1: "sequence"}},
        target=target,
        max_seq_len=ROWS,
        validate=True,
    )
    assert result.report.passed, result.report.to_markdown()
    session = onnxruntime.InferenceSession(str(result.model), providers=["CPUExecutionProvider"])
    for length in (1, 13, ROWS):
        x = np.random.default_rng(length).standard_normal((3, length, WIDTH)).astype(np.float32)
        both = x.astype(np.float64).reshape(3, length, -1, 2)
        turned = (both[..., 0] + 1j * both[..., 1]) * np.exp(1j * ANGLES[:length])
        expected = np.stack([turned.real, turned.imag], -1).reshape(x.shape)
        assert abs(session.run(None, {"x": x})[0] - expected).max() < 2e-5


def spectral(_: Turning, x: Tensor) -> Tensor:
    return torch.linalg.inv(torch.diag_embed(pairs(x))).real


def test_what_has_no_form_is_refused_by_name(tmp_path: Any):
    with pytest.raises(BadInputError, match=r"test_complex_numbers.py:\d+ `return torch.linalg"):
        export(Turning(spectral), tmp_path / "x", kwargs={"x": torch.randn(2, 6, WIDTH)})
