"""The caller's example is proven, and other inputs are as it is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rope_export import BadInputError, ExportResult, export, validate
from rope_export.proof.examples import Likeness

LOW = {
    "infinite": -math.inf,
    "finfo.min": torch.finfo(torch.float32).min,
    "-1e9": -1e9,
    "-1e4": -1e4,
}


def drawn(name: str, example: Tensor, *shape: int, rows: bool = True, seed: int = 0) -> np.ndarray:
    return Likeness(name, example, rows=rows).draw(shape, np.random.default_rng(seed))


def visible(queries: int, keys: int | None = None) -> Tensor:
    keys = queries if keys is None else keys
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def additive(seen: Tensor, low: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, low)


@pytest.mark.parametrize("low", LOW.values(), ids=LOW)
@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (3, 1, 9, 9), (2, 1, 3, 8), (1, 1, 1, 5)])
def test_a_triangle_stays_one(low, shape):
    mask = drawn("mask", additive(visible(6)[None, None], low), *shape)
    assert np.array_equal(mask, np.broadcast_to(additive(visible(*shape[-2:]), low), shape))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["mask", "key_padding_mask"])
def test_padding_stays_on_its_side_and_hides_no_whole_row(name, side):
    example = torch.arange(8)[None] < torch.tensor([[8], [3]])
    example = example.flip(1) if side == "left" else example
    example = ~example if "pad" in name else example
    for length in (1, 2, 5, 13):
        mask = drawn(name, example, 6, length, rows=False, seed=length)
        seen = ~mask if "pad" in name else mask
        seen = seen[:, ::-1] if side == "left" else seen
        assert seen[:, 0].all()
        assert (seen == np.minimum.accumulate(seen, axis=1)).all()  # nothing seen behind padding
        assert length < 2 or not seen.all()


def test_padding_behind_a_triangle_stays_behind_one():
    real = torch.arange(7)[None, None, None] < torch.tensor([7, 4])[:, None, None, None]
    mask = drawn("mask", additive(visible(7) & real, -math.inf), 4, 1, 10, 10)
    seen = mask == 0
    assert not seen[..., ~visible(10).numpy()].any()
    ends = seen[:, 0, -1].sum(-1)
    assert (seen[:, 0] == (visible(10).numpy() & (np.arange(10) < ends[:, None, None]))).all()
    assert set(ends[[0, 2]]) == {10}
    assert (ends[[1, 3]] < 10).all()


def test_windows_keep_their_width():
    near = (torch.arange(6)[:, None] - torch.arange(6)).abs() < 3
    seen = drawn("mask", near & visible(6), 11, 11)
    distance = np.arange(11)[:, None] - np.arange(11)
    assert np.array_equal(seen, (distance >= 0) & (distance < 3))


def test_documents_stay_apart():
    document = torch.tensor([0, 0, 0, 1, 1, 1])
    seen = drawn("mask", (document[:, None] == document)[None], 1, 10, 10)[0]
    assert np.array_equal(seen, np.kron(np.eye(2), np.ones((5, 5))).astype(bool))


def test_numbers_between_are_drawn_and_what_hides_is_not():
    bias = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.3 + 5
    mask = drawn("bias", bias.masked_fill(~visible(6), -math.inf), 2, 40, 40)
    hidden = ~visible(40).numpy()
    assert (mask[:, hidden] == -math.inf).all()
    rest = mask[:, ~hidden]
    assert np.isfinite(rest).all()
    assert abs(rest.mean() - 5) < 0.2
    assert abs(rest.std() - 0.3) < 0.1


@pytest.mark.parametrize(
    ("name", "example", "says"),
    [
        ("mask", torch.ones(2, 5, dtype=torch.bool), "mask is all True in the example: padding is"),
        ("mask", torch.ones(2, 5), "mask is 1 everywhere in the example: padding is not proven"),
        ("offset", torch.tensor(3), "offset is 3 in the example: other values are not proven"),
        ("ids", torch.zeros(2, 5, dtype=torch.int64), "ids is 0 everywhere in the example"),
        ("x", torch.zeros(2, 5), "every other case has normally distributed numbers"),
    ],
)
def test_what_never_varies_is_said_and_not_invented(name, example, says):
    found = Likeness(name, example, rows=False)
    assert says in str(found.note())
    shape = (3, *example.shape[1:]) if example.ndim else ()
    numbers = found.draw(shape, np.random.default_rng(0))
    assert (numbers == example.flatten()[0].item()).all() == (name != "x")


# --- whole proofs -------------------------------------------------------------------------------


class Masked(nn.Module):
    """Attention by a mask that is an input."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def of_masked(folder: Any, mask: Tensor, target: str = "ort", **asked: Any) -> ExportResult:
    x = torch.randn(mask.shape[0], 1, mask.shape[-1], 8, generator=torch.Generator().manual_seed(0))
    x = x.half() if mask.dtype is torch.float16 else x
    labels = {"x": {0: "batch", 2: "n"}, "mask": {0: "batch", 2: "n", 3: "n"}}
    return export(
        Masked().eval(),
        folder,
        kwargs={"x": x, "mask": mask},
        dynamic_shapes=labels,
        target=target,
        validate=True,
        **asked,
    )


@pytest.mark.parametrize(
    ("low", "dtype", "target"),
    [
        (-math.inf, torch.float32, "primitive"),
        (torch.finfo(torch.float32).min, torch.float32, "ort"),
        (-1e4, torch.float16, "ort"),
        (torch.finfo(torch.float16).min, torch.float16, "primitive"),
    ],
)
def test_masks_in_use_are_proven(low, dtype, target, tmp_path):
    real = torch.arange(9)[None, None, None] < torch.tensor([9, 5])[:, None, None, None]
    mask = additive(visible(9) & real, low, dtype)
    result = of_masked(tmp_path / "x", mask, target)
    assert result.report.passed, result.report.to_markdown()
    assert "the example" in {case.name for case in result.report.cases}
    stored = onnxruntime.InferenceSession(str(result.model), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((1, 1, 20, 8))
    x = x.astype(np.float32 if dtype is torch.float32 else np.float16)
    seen = visible(20).numpy()
    scores = np.where(seen, (x @ x.swapaxes(-1, -2)).astype(np.float64) / math.sqrt(8), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ x.astype(np.float64)
    given = additive(visible(20)[None, None], low, dtype).numpy()
    off = abs(stored.run(None, {"x": x, "mask": given})[0] - expected).max()
    assert off < (1e-5 if dtype is torch.float32 else 1e-2)


class Clamped(nn.Module):
    """Differs from `Free` where a mask is very low, and nowhere else."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + mask.clamp(min=-50.0)


class Free(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + mask.clamp(min=-100.0)


class Doubling(nn.Module):
    """Doubles a 7, which only the example has."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(x == 7, x * (2 if self.training_free else 1), x) + mask

    training_free = True


class Single(Doubling):
    training_free = False


@pytest.mark.parametrize(("right", "wrong"), [(Clamped, Free), (Doubling, Single)])
def test_what_only_the_example_shows_is_seen(right, wrong, tmp_path):
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    x[0, 1] = 7.0
    given = {"x": x, "mask": torch.zeros(2, 5).masked_fill(torch.eye(2, 5) > 0, -math.inf)}
    if right is Doubling:
        given["mask"] = torch.randn(2, 5)
    labels = {"x": {1: "n"}, "mask": {1: "n"}}
    result = export(right(), tmp_path / "x", kwargs=given, dynamic_shapes=labels, validate=True)
    assert result.report.passed
    report = validate(result, wrong(), kwargs=given)
    assert "the example" in {case.name for case in report.cases if not case.passed}


class ByHand(nn.Module):
    """A softmax that sees nothing is NaN in PyTorch."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (x @ x.mT).masked_fill(~mask, -math.inf).softmax(-1) @ x


class Mending(ByHand):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask).nan_to_num()


@pytest.mark.parametrize("target", ["ort", "primitive"])
def test_rows_that_see_nothing_are_what_they_are_in_pytorch(target, tmp_path):
    x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    given = {"x": x, "mask": torch.ones(2, 8, 8, dtype=torch.bool).tril(-1)}
    labels = {"x": {0: "batch", 1: "n"}, "mask": {0: "batch", 1: "n", 2: "n"}}
    asked: dict[str, Any] = {"kwargs": given, "dynamic_shapes": labels, "target": target}
    result = export(ByHand(), tmp_path / "x", **asked, validate=True)
    assert result.report.passed, result.report.to_markdown()
    assert "output is NaN in PyTorch too" in " ".join(result.report.notes)
    mended = validate(result, Mending(), kwargs=given)
    assert "the example" in {case.name for case in mended.cases if not case.passed}


def test_what_is_never_a_number_is_refused(tmp_path):
    x = torch.full((2, 5), math.nan)
    with pytest.raises(BadInputError, match="must give finite numbers"):
        export(nn.Tanh(), tmp_path / "x", args=(x,))


class Lengths(nn.Module):
    """Rows of different lengths; an index past the end raises."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        last = x.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, x.shape[2]))
        return x + last


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 4)

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        return x + self.table(torch.arange(x.shape[1]) + offset)


class Ignoring(nn.Module):
    """A padding mask of any name, by arithmetic that gives NaN where a whole row is hidden."""

    def forward(self, x: Tensor, ignored_pad: Tensor) -> Tensor:
        scores = (x @ x.mT).masked_fill(ignored_pad[:, None], -math.inf)
        return scores.softmax(-1) @ x


PADDED = torch.arange(6)[None] >= torch.tensor([[6], [4]])
PLAUSIBLE = {
    "lengths": (Lengths, {"lengths": torch.tensor([6, 2])}, {"lengths": {0: "b"}}),
    "short lengths": (Lengths, {"lengths": torch.tensor([4, 2])}, {"lengths": {0: "b"}}),
    "an offset": (Shifted, {"offset": torch.tensor(3)}, {}),
    "padding": (Ignoring, {"ignored_pad": PADDED}, {"ignored_pad": {0: "b", 1: "n"}}),
}


@pytest.mark.parametrize("name", PLAUSIBLE)
def test_nothing_is_refused_for_inputs_that_the_proof_made_up(name, tmp_path):
    kind, given, labels = PLAUSIBLE[name]
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    result = export(
        kind(),
        tmp_path / "x",
        kwargs={"x": x, **given},
        dynamic_shapes={"x": {0: "b", 1: torch.export.Dim("n", max=16)}, **labels}
        if name != "padding"
        else {"x": {0: "b", 1: "n"}, **labels},
        validate=True,
    )
    assert result.report.passed, result.report.to_markdown()
    assert len(result.report.cases) > 3


class Choosing(nn.Module):
    """Takes the rows of a table that a number of 10 and more names."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 4)

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        far = torch.arange(x.shape[1]).max() // 29  # of 30 tokens
        return x + self.table(kind + 5 * far)


def test_a_refusal_of_what_was_drawn_says_so(tmp_path):
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    given = {"x": x, "kind": torch.tensor([[10], [11]])}
    labels = {"x": {1: torch.export.Dim("n", max=30)}}
    with pytest.raises(BadInputError) as refused:
        export(Choosing(), tmp_path / "x", kwargs=given, dynamic_shapes=labels)
    said = str(refused.value)
    assert "raises IndexError at n 30: index out of range" in said
    assert "the proof drew kind 1" in said
    assert "inputs= (the factory's key 'inputs') draws others" in said
