"""Modules that keep something for their next call, or draw random numbers: harmless or refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import modules
import numpy as np
import onnxruntime
import pytest
import torch
from modules import AXES, X, module_of
from torch import Tensor, nn
from torch.nn import functional as F

from rope_export import BadInputError, export

LONGEST = 8


class Static(nn.Module):
    """A key/value cache that the module keeps itself."""

    def __init__(self, write: Callable[..., None], *, buffer: bool) -> None:
        super().__init__()
        self.keys = nn.Linear(4, 4)
        self.write = write
        if buffer:
            self.register_buffer("cache", torch.zeros(1, LONGEST, 4))
        else:
            self.cache = torch.zeros(1, LONGEST, 4)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        self.write(self, position, self.keys(x))
        seen = torch.arange(LONGEST) <= position[:, None]
        return F.scaled_dot_product_attention(x, self.cache, self.cache, attn_mask=seen)


def put(self: Any, at: Tensor, new: Tensor) -> None:
    self.cache[:, at] = new


def copied(self: Any, at: Tensor, new: Tensor) -> None:
    self.cache.index_copy_(1, at, new)


def through_a_view(self: Any, at: Tensor, new: Tensor) -> None:
    self.cache[0].transpose(0, 1)[:, at] = new[0].mT


def assigned(self: Any, at: Tensor, new: Tensor) -> None:
    self.cache = self.cache.index_copy(1, at, new)


def rolled(self: Any, at: Tensor, new: Tensor) -> None:
    del at
    self.cache = torch.cat((self.cache, new), 1)[:, -LONGEST:]


def line_in(function: Callable[..., Any], text: str) -> str:
    lines, first = inspect.getsourcelines(function)
    index = next(i for i, line in enumerate(lines) if text in line)
    return f"{__file__}:{first + index} `{lines[index].strip()}`"


@pytest.mark.parametrize("buffer", [True, False], ids=["buffer", "attribute"])
@pytest.mark.parametrize("write", [put, copied, through_a_view, assigned, rolled])
def test_a_cache_that_the_module_keeps_is_refused_with_the_line_that_writes_it(
    tmp_path, write, buffer
):
    module = Static(write, buffer=buffer).eval()
    example = {"x": torch.randn(1, 3, 4), "position": torch.arange(3)}
    axes = {"x": {1: "s"}, "position": {0: "s"}}
    with pytest.raises(BadInputError) as caught:
        export(module, tmp_path / "x", kwargs=example, dynamic_shapes=axes)
    said = str(caught.value)
    assert said.startswith(f"{line_in(write, 'self.cache')} changes cache, from which results are")
    assert "take cache as an argument and return" in said
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


class Averaging(modules.Given):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.mean.mul_(0.9).add_(y.mean((0, 1)), alpha=0.1)  # for somebody else
        self.calls += 1
        self.last = y * 2
        return self.last + 1


class Replacing(modules.Given):
    """A buffer that is used after it was overwritten keeps nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((4,), 9.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.mean = y.mean((0, 1))
        return y - self.mean


class Sized(modules.Given):
    """The size of a buffer that is written, not its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.table.add_(1)
        return self.linear(x) + torch.ones_like(self.table) * self.table.shape[0]


def averaged(module: Any, x: np.ndarray) -> np.ndarray:
    return linear64(module, x) * 2 + 1


def replaced(module: Any, x: np.ndarray) -> np.ndarray:
    y = linear64(module, x)
    return y - y.mean((0, 1))


def sized(module: Any, x: np.ndarray) -> np.ndarray:
    return linear64(module, x) + 4


def linear64(module: Any, x: np.ndarray) -> np.ndarray:
    weight, bias = (p.detach().double().numpy() for p in module.linear.parameters())
    return x.astype(np.float64) @ weight.T + bias


@pytest.mark.parametrize(
    ("kind", "wanted"), [(Averaging, averaged), (Replacing, replaced), (Sized, sized)]
)
def test_what_is_kept_for_somebody_else_is_no_harm(tmp_path, kind, wanted):
    module = kind()
    result = export(module, tmp_path / "x", args=(X,), dynamic_shapes={"x": AXES}, validate=True)
    assert result.report.passed
    session = onnxruntime.InferenceSession(result.model, providers=["CPUExecutionProvider"])
    x = modules.drawn(1, 7, 4, seed=3).numpy()
    (output,) = session.run(None, {"x": x})
    np.testing.assert_allclose(output, wanted(module, x), rtol=1e-5, atol=1e-5)


def noisy(self: Any, x: Tensor) -> Tensor:
    return self.linear(x) + torch.randn_like(x)


def seeded(self: Any, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return self.linear(x) * torch.rand(4)


def dropping(self: Any, x: Tensor) -> Tensor:
    return F.dropout(self.linear(x), 0.5)


def sampling(self: Any, x: Tensor) -> Tensor:
    return torch.multinomial(self.linear(x).softmax(-1)[0], 1)


def dropping_attention(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)[:, None]
    return F.scaled_dot_product_attention(y, y, y, dropout_p=0.1)


@pytest.mark.parametrize(
    ("forward", "text"),
    [
        (noisy, "randn_like"),
        (seeded, "torch.rand"),
        (dropping, "dropout"),
        (sampling, "multinomial"),
        (dropping_attention, "dropout_p"),
    ],
)
def test_random_numbers_are_refused_with_the_line_that_draws_them(tmp_path, forward, text):
    with pytest.raises(BadInputError) as caught:
        export(module_of(forward), tmp_path / "x", args=(X,))
    assert str(caught.value).startswith(f"{line_in(forward, text)} draws random numbers")


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: F.dropout(self.linear(x), 0.5, training=self.training),
        lambda self, x: F.scaled_dot_product_attention(*[self.linear(x)[:, None]] * 3)[:, 0],
        lambda self, x: self.linear(x) + 0 * torch.rand_like(x).shape[1],
    ],
)
def test_what_could_draw_and_does_not_is_exported(tmp_path, forward):
    result = export(
        module_of(forward), tmp_path / "x", args=(X,), dynamic_shapes={"x": AXES}, validate=True
    )
    assert result.report.passed


class Overwriting(modules.Given):
    def forward(self, x: Tensor) -> Tensor:
        x += 1
        x[:, 0] = 0
        return self.linear(x)


def test_inputs_that_a_module_writes_into_stay_the_callers(tmp_path):
    module, x = Overwriting(), X.clone()
    result = export(module, tmp_path / "x", args=(x,), dynamic_shapes={"x": AXES}, validate=True)
    assert result.report.passed
    assert torch.equal(x, X)
    session = onnxruntime.InferenceSession(result.model, providers=["CPUExecutionProvider"])
    given = modules.drawn(2, 9, 4, seed=5).numpy()
    written = given + 1
    written[:, 0] = 0
    (output,) = session.run(None, {"x": given})
    np.testing.assert_allclose(output, linear64(module, written), rtol=1e-5, atol=1e-5)
