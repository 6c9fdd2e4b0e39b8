"""``F.scaled_dot_product_attention`` of a module's own means in every target what PyTorch says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from selection import slow_unless
from torch import Tensor, nn

from rope_export import export
from rope_export.artifacts.targets import TARGETS

sdpa = F.scaled_dot_product_attention
HEADS, WIDTH, VALUE_WIDTH = 6, 8, 4
LOWEST = torch.finfo(torch.float32).min


def attend(q, k, v, mask=None, *, causal=False, scale=None, groups=False):
    """Attention in float64, written out; a row that sees nothing is zero."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    if groups:
        k, v = (np.repeat(x, q.shape[-3] // x.shape[-3], axis=-3) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    if causal:
        rows, columns = np.indices(scores.shape[-2:])
        scores = np.where(columns <= rows, scores, -np.inf)
    best = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(best), 0, best))
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total == 0, 1, total) @ v


def of_heads(mask):
    """As diffusers makes a mask: its axis of queries is a quotient in the graph."""
    rows = mask[:, 0, :1]
    if isinstance(mask, np.ndarray):
        return np.repeat(rows[:, None], HEADS, axis=1)
    wide = rows.repeat_interleave(HEADS, dim=0)
    return wide.view(mask.shape[0], HEADS, -1, mask.shape[-1])


def in_windows(x):
    """``[B, 6, …]`` as two windows of three heads."""
    return x.reshape(x.shape[0], 2, 3, *x.shape[2:])


class Given(NamedTuple):
    """Tensors or arrays, sliced alike.

    q: ``[B, 6, S, 8]``; k: ``[B, 6, T, 8]``; v: ``[B, 6, T, 4]``; keep: which keys each query sees,
    bool ``[B, 1, S, T]``; bias: what is added to scores, ``[B, 6, S, T]``.
    """

    q: Any
    k: Any
    v: Any
    keep: Any
    bias: Any


# Arguments of PyTorch's function and of ours.
CASES: dict[str, tuple[Callable[[Given], tuple[Any, ...]], dict[str, Any]]] = {
    "nothing hidden": (lambda g: (g.q, g.k, g.v), {}),
    "its own scale": (lambda g: (g.q, g.k, g.v), {"scale": 0.7}),
    "scale below zero": (lambda g: (g.q, g.k, g.v), {"scale": -0.3}),
    "scale of zero": (lambda g: (g.q, g.k, g.v, g.keep), {"scale": 0.0}),
    "triangle": (lambda g: (g.q, g.k, g.v), {"causal": True}),
    "triangle of a square": (lambda g: (g.k, g.k, g.v), {"causal": True}),
    "bool of rows": (lambda g: (g.q, g.k, g.v, g.keep), {}),
    "bool of all rows": (lambda g: (g.q, g.k, g.v, g.keep[:1]), {}),
    "bool of two axes": (lambda g: (g.q, g.k, g.v, g.keep[0, 0]), {}),
    "bool of three axes": (lambda g: (g.q, g.k, g.v, g.keep[0]), {}),
    "bool for all queries": (lambda g: (g.q, g.k, g.v, g.keep[:, :, :1]), {}),
    "bool for all keys": (lambda g: (g.q, g.k, g.v, g.keep[:1, :, :, :1]), {}),
    "bool for all": (lambda g: (g.q, g.k, g.v, g.keep[:, :, :1, :1]), {}),
    "bias": (lambda g: (g.q, g.k, g.v, g.bias), {}),
    "bias of heads": (lambda g: (g.q, g.k, g.v, g.bias[0]), {}),
    "bias of queries and keys": (lambda g: (g.q, g.k, g.v, g.bias[0, 0]), {}),
    "bias of keys": (lambda g: (g.q, g.k, g.v, g.bias[0, 0, :1]), {"scale": 0.5}),
    "bias of heads and keys": (lambda g: (g.q, g.k, g.v, g.bias[0, :, :1]), {}),
    "bias of queries": (lambda g: (g.q, g.k, g.v, g.bias[..., :1]), {}),
    "one head": (lambda g: (g.q[:, 0], g.k[:, 0], g.v[:, 0]), {}),
    "one head, masked": (lambda g: (g.q[:, 0], g.k[:, 0], g.v[:, 0], g.keep[:, 0]), {}),
    "one head, bias of all rows": (
        lambda g: (g.q[:, 0], g.k[:, 0], g.v[:, 0], g.bias[0, 0]),
        {},
    ),
    "one head, triangle": (lambda g: (g.q[:, 0], g.k[:, 0], g.v[:, 0]), {"causal": 1}),
    "two axes": (lambda g: (g.q[0, 0], g.k[0, 0], g.v[0, 0], g.bias[0, 0]), {}),
    "windows": (lambda g: (*map(in_windows, (g.q, g.k, g.v)),), {}),
    "windows, masked": (
        lambda g: (*map(in_windows, (g.q, g.k, g.v)), g.keep[:, None]),
        {},
    ),
    "windows, each with a bias": (
        lambda g: (*map(in_windows, (g.q, g.k, g.v, g.bias)),),
        {},
    ),
    "windows, bias of heads": (
        lambda g: (*map(in_windows, (g.q, g.k, g.v)), g.bias[0, :3]),
        {},
    ),
    "windows, bias of windows": (
        lambda g: (*map(in_windows, (g.q, g.k, g.v)), in_windows(g.bias)[0, :, :1, :1]),
        {},
    ),
    "windows, triangle": (lambda g: (*map(in_windows, (g.q, g.k, g.v)),), {"causal": 1}),
    "grouped": (lambda g: (g.q, g.k[:, :2], g.v[:, :2], g.bias), {"groups": True}),
    "grouped, one group": (lambda g: (g.q, g.k[:, :1], g.v[:, :1]), {"groups": True}),
    "grouped, as many": (lambda g: (g.q, g.k, g.v, g.keep), {"groups": True, "scale": 0.9}),
    "grouped, triangle": (
        lambda g: (g.q, g.k[:, :3], g.v[:, :3]),
        {"groups": True, "causal": True},
    ),
    "grouped, keys and values apart": (
        lambda g: (g.q, g.k[:, :3], g.v[:, :2], g.bias),
        {"groups": True},
    ),
    "grouped, three axes": (
        lambda g: (g.q[0], g.k[0, :2], g.v[0, :2], g.bias[0]),
        {"groups": True},
    ),
    "grouped windows": (
        lambda g: (
            in_windows(g.q),
            in_windows(g.k)[:, :, :1],
            in_windows(g.v)[:, :, :1],
            in_windows(g.bias),
        ),
        {"groups": True},
    ),
    "one head of keys": (lambda g: (g.q, g.k[:, :1], g.v[:, :1], g.bias), {}),
    "one head of keys, all of values": (lambda g: (g.q, g.k[:, :1], g.v), {}),
    "one head of queries": (lambda g: (g.q[:, :1], g.k, g.v, g.bias), {}),
    "keys for all rows": (lambda g: (g.q, g.k[:1], g.v[:1], g.bias), {}),
    "bool of unknown queries": (lambda g: (g.q, g.k, g.v, of_heads(g.keep)), {}),
    "bias of unknown queries": (lambda g: (g.q, g.k, g.v, of_heads(g.bias)), {}),
    "keys of fewer axes": (lambda g: (g.q, g.k[0], g.v[0], g.keep), {}),
}


QUICK = [
    "scale below zero",
    "triangle",
    "bool for all queries",
    "bias of unknown queries",
    "windows, masked",
    "grouped",
    "keys for all rows",
]


class Attending(nn.Module):
    """Several cases on the same tensors."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor) -> Any:
        results = []
        for name in self.names:
            arrange, how = CASES[name]
            *heads, mask = (*arrange(Given(q, k, v, keep, bias)), None)[:4]
            results.append(
                sdpa(
                    *heads,
                    attn_mask=mask,
                    is_causal=bool(how.get("causal")),
                    scale=how.get("scale"),
                    enable_gqa=bool(how.get("groups")),
                )
            )
        return results


def drawn(batch: int, queries: int, keys: int) -> Given:
    """Rows that see everything, something, nothing, and all of it equally little."""
    numbers = np.random.default_rng(queries)
    shapes = ((queries, WIDTH), (keys, WIDTH), (keys, VALUE_WIDTH), (queries, keys))
    q, k, v, bias = (numbers.standard_normal((batch, HEADS, *s)).astype(np.float32) for s in shapes)
    keep = numbers.random((batch, 1, queries, keys)) > 0.3
    keep[0, :, 0] = False
    keep[-1, :, -1] = True
    bias[numbers.random(bias.shape) > 0.7] = -np.inf
    bias[0, 0, 0] = -np.inf
    bias[-1, 1, -1] = LOWEST
    bias[-1, 2, -1, ::2] = LOWEST
    bias[0, 3] = np.where(bias[0, 3] < 0, LOWEST, -np.inf)
    return Given(q, k, v, keep, bias)


def dynamic() -> dict[str, Any]:
    query, key = {0: "batch", 2: "queries"}, {0: "batch", 2: "keys"}
    both = query | {3: "keys"}
    return {"q": query, "k": key, "v": key, "keep": both, "bias": both}


def exported(names: list[str], target: str, folder: Any, **options: Any) -> Any:
    given = dict(zip(dynamic(), map(torch.from_numpy, drawn(2, 5, 7)), strict=True))
    module = Attending(names)
    return export(module, folder, kwargs=given, dynamic_shapes=dynamic(), target=target, **options)


def ran(result: Any, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(result.model), providers=["CPUExecutionProvider"])
    return session.run(None, given)


@pytest.mark.parametrize(
    ("names", "target"),
    [
        *((QUICK, target) for target in ("ort", "primitive")),
        *(pytest.param(list(CASES), target, marks=pytest.mark.slow) for target in TARGETS),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} cases",
)
def test_every_meaning_in_every_target(tmp_path, names, target):
    result = exported(names, target, tmp_path / "x")
    operators = result.graph["ops"]
    assert operators.get("Attention", 0) == (0 if target == "primitive" else len(names))
    assert operators.get("Softmax", 0) == (len(names) if target == "primitive" else 0)
    wrong = {}
    for sizes in ((1, 1, 9), (3, 8, 2), (2, 6, 11), (2, 4, 4)):
        given = drawn(*sizes)
        got = ran(result, dict(zip(dynamic(), given, strict=True)))
        for name, found in zip(names, got, strict=True):
            arrange, how = CASES[name]
            truth = attend(*arrange(given), **how)
            if found.shape != truth.shape or not np.abs(found - truth).max() < 2e-6:
                wrong[name, sizes] = found.shape, truth.shape
    assert not wrong


class InHalf(nn.Module):
    """Half-precision heads, with masks that hide, that add little and that add much."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor) -> Any:
        wide = sdpa(q, k, v, attn_mask=bias.float())
        return sdpa(q, k, v, attn_mask=keep), sdpa(q, k, v, attn_mask=bias), wide


@pytest.mark.parametrize("target", ["ort", "primitive"])
def test_half_precision_heads_attend_in_float32(tmp_path, target):
    def drawn_in_half(*sizes: int) -> Given:
        q, k, v, keep, bias = drawn(*sizes)
        bias[0, 4, 0] = -1e4  # swallows the scores where they are half-precision numbers
        halves = (x.astype(np.float16) for x in (q, k, v))
        return Given(*halves, keep, np.maximum(bias, -1e4).astype(np.float16))

    given = dict(zip(dynamic(), map(torch.from_numpy, drawn_in_half(2, 5, 7)), strict=True))
    result = export(InHalf(), tmp_path / "x", kwargs=given, dynamic_shapes=dynamic(), target=target)
    q, k, v, keep, bias = arrays = drawn_in_half(3, 4, 9)
    truths = (attend(q, k, v, keep), *[attend(q, k, v, bias.astype(np.float64))] * 2)
    for found, truth in zip(
        ran(result, dict(zip(given, arrays, strict=True))), truths, strict=True
    ):
        assert found.dtype == np.float16
        assert np.abs(found - truth).max() < 2e-3


class Cross(nn.Module):
    """Cross attention with the mask code of diffusers' attention processors."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(16, 16)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            t.view(batch, -1, 2, 8).transpose(1, 2)
            for t in (self.q(x), *self.kv(context).chunk(2, -1))
        )
        bias = ((1 - mask) * -10000.0).unsqueeze(1).repeat_interleave(2, dim=0)
        bias = bias.view(batch, 2, -1, bias.shape[-1])
        attended = sdpa(q, k, v, attn_mask=bias)
        return self.o(attended.transpose(1, 2).reshape(batch, length, width))


@pytest.mark.parametrize("target", slow_unless(lambda target: target == "ort", TARGETS))
def test_a_mask_whose_axis_of_queries_is_computed_is_proven(tmp_path, target):
    torch.manual_seed(0)
    text = {0: "batch", 1: "text"}
    result = export(
        Cross(),
        tmp_path / "x",
        kwargs={
            "x": torch.randn(2, 5, 16),
            "context": torch.randn(2, 3, 16),
            "mask": torch.ones(2, 3),
        },
        dynamic_shapes={"x": {0: "batch", 1: "sequence"}, "context": text, "mask": text},
        target=target,
        validate=True,
    )
    assert result.report.passed, result.report.to_markdown()
