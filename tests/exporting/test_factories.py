"""Tensors made with as many elements as an input has: dynamic, and of the dtype PyTorch gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from rope_export import export

FACTORIES: dict[str, tuple[Callable[..., Tensor], Callable[[int], np.ndarray]]] = {
    "linspace": (lambda n: torch.linspace(-1, 1, n), lambda n: np.linspace(-1, 1, n)),
    "linspace by name": (
        lambda n: torch.linspace(start=3.0, end=0.5, steps=n, dtype=torch.float64).float(),
        lambda n: np.linspace(3.0, 0.5, n),
    ),
    "logspace": (lambda n: torch.logspace(0, 2, n, base=2.0), lambda n: 2 ** np.linspace(0, 2, n)),
    "centres of pixels": (
        lambda n: torch.arange(0.5, n) / n,
        lambda n: np.arange(0.5, n) / n,
    ),
    "fractions": (lambda n: torch.arange(n) / (n + 1), lambda n: np.arange(n) / (n + 1)),
    "backwards": (lambda n: torch.arange(n - 1, -1, -1), lambda n: np.arange(n)[::-1]),
    "half": (lambda n: torch.arange(n, dtype=torch.float16), lambda n: np.arange(n)),
    "full": (lambda n: torch.full((n,), 1 / n), lambda n: np.full(n, 1 / n)),
}


class Adding(nn.Module):
    def __init__(self, factory: Callable[..., Tensor]) -> None:
        super().__init__()
        self.factory = factory

    def forward(self, x: Tensor) -> Tensor:
        return x + self.factory(x.shape[1])


@pytest.mark.parametrize("name", FACTORIES)
def test_factories_stay_dynamic(name, tmp_path):
    factory, truth = FACTORIES[name]
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    labels = {"x": {0: "batch", 1: "n"}}
    module = Adding(factory)
    result = export(module, tmp_path / "x", args=(x,), dynamic_shapes=labels, validate=True)
    assert result.report.passed, result.report.to_markdown()
    session = onnxruntime.InferenceSession(str(result.model), providers=["CPUExecutionProvider"])
    for n in (1, 2, 7, 100):
        found = session.run(None, {"x": np.zeros((1, n), np.float32)})[0][0]
        assert abs(found - truth(n)).max() < 1e-6 * max(1, abs(truth(n)).max())
