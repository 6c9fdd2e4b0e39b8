"""Modules that keep tables between calls: traced as if not called, and left as they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import rotary_embedding_torch
import torch
from torch import Tensor, nn

from rope_export import BadInputError, ExportResult, export

WIDTH, LONGEST = 8, 96
INVERSE = 1.0 / 10000.0 ** (np.arange(0, WIDTH, 2) / WIDTH)


def truth(x: np.ndarray) -> np.ndarray:
    """The rotation of `Keeping`, in float64."""
    angles = np.outer(np.arange(x.shape[1]), np.concatenate([INVERSE, INVERSE]))
    first, second = x[..., : WIDTH // 2], x[..., WIDTH // 2 :]
    return x * np.cos(angles) + np.concatenate([-second, first], -1) * np.sin(angles)


class Keeping(nn.Module):
    """Rotates by tables of its own; the kinds differ in where they are and when they are made."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inverse", torch.from_numpy(INVERSE).float())

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.tables(x.shape[1])
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def tables(self, length: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def made(self, length: Any) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(length).float(), self.inverse)
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()


class OfOneLength(Keeping):
    def __init__(self) -> None:
        super().__init__()
        self.length, self.cos, self.sin = None, None, None

    def tables(self, length: Any) -> tuple[Tensor, Tensor]:
        if length != self.length:
            self.length = length
            self.cos, self.sin = self.made(length)
        return self.cos, self.sin


class Growing(OfOneLength):
    def tables(self, length: Any) -> tuple[Tensor, Tensor]:
        if self.length is None or length > self.length:
            self.length = length
            self.cos, self.sin = self.made(length)
        return self.cos[:length], self.sin[:length]


class GrowingBuffers(Keeping):
    """Made with tables of 16 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.grow(16)

    def grow(self, length: Any) -> None:
        self.length = length
        for name, table in zip(("cos", "sin"), self.made(length), strict=True):
            self.register_buffer(name, table, persistent=False)

    def tables(self, length: Any) -> tuple[Tensor, Tensor]:
        if length > self.length:
            self.grow(length)
        return self.cos[:length], self.sin[:length]


class Holder:
    def __init__(self) -> None:
        self.tables: Any = None


class InAnObject(Keeping):
    def __init__(self) -> None:
        super().__init__()
        self.holder = Holder()

    def tables(self, length: Any) -> tuple[Tensor, Tensor]:
        kept = self.holder.tables
        if kept is None or kept[0].shape[0] < length:
            kept = self.holder.tables = self.made(length)
        return kept[0][:length], kept[1][:length]


class InAList(Keeping):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def tables(self, length: Any) -> tuple[Tensor, Tensor]:
        if not self.kept or self.kept[0].shape[0] != length:
            self.kept[:] = self.made(length)
        return self.kept[0], self.kept[1]


KINDS = [OfOneLength, Growing, GrowingBuffers, InAnObject, InAList]


def exported(module: nn.Module, folder: Any, length: int = 9, **asked: Any) -> ExportResult:
    return export(
        module,
        folder,
        kwargs={"x": torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(0))},
        dynamic_shapes={"x": {0: "batch", 1: "sequence"}},
        validate=True,
        **asked,
    )


def off(result: ExportResult, *lengths: int) -> float:
    """The largest error of a graph at these lengths."""
    session = onnxruntime.InferenceSession(str(result.model), providers=["CPUExecutionProvider"])
    found = []
    for length in lengths:
        x = np.random.default_rng(length).standard_normal((2, length, WIDTH)).astype(np.float32)
        found.append(abs(session.run(None, {"x": x})[0] - truth(x.astype(np.float64))).max())
    return float(max(found))


@pytest.mark.parametrize(
    ("kind", "warm"), [*((kind, warm) for kind in KINDS for warm in (None, 50)), (OfOneLength, 9)]
)
def test_what_a_module_keeps_bounds_no_graph(kind, warm, tmp_path):
    """Whether it was called before, and at which length, makes no difference to the graph."""
    module = kind().eval()
    if warm is not None:
        module(torch.randn(1, warm, WIDTH))
    result = exported(module, tmp_path / "x", max_seq_len=LONGEST)
    assert result.report.passed, result.report.to_markdown()
    assert result.graph["ranges"]["sequence"] == [1, LONGEST]
    assert off(result, 1, 9, 10, 51, LONGEST) < 1e-5
    again = torch.randn(1, 33, WIDTH)  # and PyTorch runs as ever
    assert abs(module(again).double().numpy() - truth(again.double().numpy())).max() < 1e-5


class Behind(nn.Module):
    def __init__(self, keeping: nn.Module) -> None:
        super().__init__()
        self.linear, self.dropout, self.keeping = nn.Linear(WIDTH, WIDTH), nn.Dropout(), keeping

    def forward(self, x: Tensor) -> Tensor:
        return self.keeping(self.dropout(self.linear(x)))


def kept(module: nn.Module) -> dict[str, Any]:
    return {
        f"{path}.{name}": value.clone() if isinstance(value, Tensor) else value
        for path, part in module.named_modules()
        for name, value in {**vars(part), **part._buffers}.items()
        if not name.startswith("_")
    }


@pytest.mark.parametrize("kind", [OfOneLength, GrowingBuffers])
def test_the_module_is_as_it_was(kind, tmp_path):
    module = Behind(kind()).train()
    module.keeping.eval()
    module(torch.randn(2, 5, WIDTH)).sum().backward()
    before, grads = kept(module), [p.grad.clone() for p in module.parameters()]
    random = torch.get_rng_state()
    exported(module, tmp_path / "x", max_seq_len=LONGEST)
    after = kept(module)
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else None
        assert same or value == after[name], name
    assert [part.training for part in module.children()] == [True, True, False]
    assert all(map(torch.equal, grads, [p.grad for p in module.parameters()]))
    assert all(p.requires_grad for p in module.parameters())
    assert torch.equal(random, torch.get_rng_state())


class Rotating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rope = rotary_embedding_torch.RotaryEmbedding(dim=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.rope.rotate_queries_or_keys(x[:, None])[:, 0]


@pytest.mark.parametrize("warm", [None, 20])
def test_rotary_embedding_torch_as_it_comes(warm, tmp_path):
    module = Rotating().eval()
    if warm is not None:
        module(torch.randn(1, warm, WIDTH))
    result = exported(module, tmp_path / "x")
    assert result.report.passed, result.report.to_markdown()
    assert result.graph["ranges"]["sequence"] == [1, 8192]  # its buffer's rows
    session = onnxruntime.InferenceSession(str(result.model), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((1, 40, WIDTH)).astype(np.float32)
    pairs = x.astype(np.float64).reshape(1, 40, WIDTH // 2, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * np.outer(np.arange(40), INVERSE))
    expected = np.stack([turned.real, turned.imag], -1).reshape(x.shape)
    assert abs(session.run(None, {"x": x})[0] - expected).max() < 1e-5


class ByLength(Keeping):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[Any, tuple[Tensor, Tensor]] = {}

    def tables(self, length: Any) -> tuple[Tensor, Tensor]:
        if length not in self.kept:
            self.kept[length] = self.made(length)
        return self.kept[length]


def test_tables_found_by_their_length_are_refused(tmp_path):
    with pytest.raises(BadInputError, match=r"`if length not in self.kept:` keeps .* by a length"):
        exported(ByLength().eval(), tmp_path / "x")


class Counting(nn.Module):
    """Positions go on from where the last call ended."""

    def __init__(self) -> None:
        super().__init__()
        self.begins = 0

    def forward(self, x: Tensor) -> Tensor:
        first, self.begins = self.begins, self.begins + 1
        return x + first


class Averaging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 1))
        return x - self.mean


@pytest.mark.parametrize(("kind", "name"), [(Counting, "begins"), (Averaging, "mean")])
def test_what_results_depend_on_is_refused_by_name(kind, name, tmp_path):
    with pytest.raises(BadInputError, match=rf"\b{name}\b.* a graph keeps nothing"):
        exported(kind().eval(), tmp_path / "x")
    assert not (tmp_path / "x").exists()
