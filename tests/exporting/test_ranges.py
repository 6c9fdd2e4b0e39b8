"""What is asked of sizes is served, or refused with the number that came out and the line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from rope_export import BadInputError, ExportResult, RotaryEmbedding, export

ROWS = 12


class Learned(nn.Module):
    """Positions are rows of a table."""

    def __init__(self, *, gathered: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, 4)
        self.gathered = gathered

    def forward(self, x: Tensor) -> Tensor:
        if self.gathered:
            return x + self.table(torch.arange(x.shape[1]))
        return x + self.table.weight[: x.shape[1]]  # as many as there are


class Rotated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rope = RotaryEmbedding(4, max_seq_len=ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return self.rope.rotate_queries_or_keys(x[:, None])[:, 0]


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > ROWS:
            return x[:, :ROWS]
        return x * 2


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.unflatten(1, (-1, 4)).mean(2))


def exported(module: nn.Module, folder: Any, label: Any, size: int = 6, **asked: Any) -> Any:
    x = torch.randn(2, size, 4, generator=torch.Generator().manual_seed(0))
    labels = {"x": {0: "batch", 1: label}}
    return export(
        module.eval(), folder, kwargs={"x": x}, dynamic_shapes=labels, validate=True, **asked
    )


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (Learned, "return x + self.table.weight[: x.shape[1]]"),
        (Rotated, "return self.rope.rotate_queries_or_keys(x[:, None])[:, 0]"),
        (Branching, "if x.shape[1] > ROWS:"),
    ],
)
@pytest.mark.parametrize(
    ("label", "asked"),
    [(Dim("n", max=40), {}), (Dim("n", min=3, max=40), {}), ("n", {"max_seq_len": 40})],
)
def test_less_than_was_asked_is_refused(make, line, label, asked, tmp_path):
    with pytest.raises(BadInputError) as refused:
        exported(make(), tmp_path / "x", label, **asked)
    said = str(refused.value)
    if make is Rotated and asked:
        assert "max_seq_len must be at most the 12 positions" in said
    else:
        assert "n was to serve sizes up to 40 and came out as at most 12" in said
        assert f"`{line}" in said
        assert f"{__file__}:" in said
    assert not (tmp_path / "x").exists()


def test_a_table_that_ends_without_a_trace_is_refused_where_it_ends(tmp_path):
    """No size is compared in the module: that 40 is too many is found by calling it."""
    with pytest.raises(BadInputError, match=r"raises IndexError at batch 1, n 13"):
        exported(Learned(gathered=True), tmp_path / "x", Dim("n", max=40))


def served(result: ExportResult, label: str) -> tuple[Any, Any]:
    assert result.report.passed, result.report.to_markdown()
    return result.graph["ranges"][label], result.graph["proven"][label]


@pytest.mark.parametrize("make", [Learned, Rotated, Branching])
def test_what_nobody_asked_for_is_said(make, tmp_path):
    result = exported(make(), tmp_path / "x", "n")
    assert served(result, "n") == ([1, ROWS], [1, ROWS])
    assert f"- sizes: batch 1 and more (proven 1 … 5), n 1 … {ROWS} (proven 1 … {ROWS})" in (
        result.report.to_markdown()
    )


def test_a_label_that_nothing_bounds(tmp_path):
    result = exported(Grouped(), tmp_path / "x", "4*groups", size=8)
    range_, proven = served(result, "groups")
    assert range_ == [1, None]
    said = (
        "groups has no stated maximum: no line of the module bounds it, and it is proven up to "
        f"{proven[1]} "
    )
    assert any(note.startswith(said) for note in result.report.notes)


@pytest.mark.parametrize(("asked", "most"), [(4 * Dim("groups", max=10), 10), ("4*groups", None)])
def test_multiples_of_a_label(asked, most, tmp_path):
    result = exported(Grouped(), tmp_path / "x", asked, size=8)
    range_, proven = served(result, "groups")
    assert range_ == [1, most]
    assert most is None or proven == [1, most]
    assert {case.sequence % 4 for case in result.report.cases} == {0}


def test_sizes_that_only_multiples_have_are_refused_with_what_to_write(tmp_path):
    with pytest.raises(BadInputError, match=r"n may be any size: .* a label such as '8\*n'"):
        exported(Grouped(), tmp_path / "x", "n", size=8)


class Differing(nn.Module):
    """Of one token there is no difference: an output without numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x.diff(dim=1)


def test_outputs_may_be_empty(tmp_path):
    result = exported(Differing(), tmp_path / "x", "n")
    assert result.report.passed, result.report.to_markdown()


class Square(nn.Module):
    """Reads the sequence twice: S x S."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x


@pytest.mark.parametrize("asked", [{"max_seq_len": 70}, {}])
def test_a_longest_sequence_that_is_asked_for_is_proven(asked, tmp_path):
    """Of a module with no attention of this package, too."""
    result = exported(Square(), tmp_path / "x", "n", **asked)
    range_, proven = served(result, "n")
    assert range_ == [1, asked.get("max_seq_len")]
    assert proven[1] == asked.get("max_seq_len", 32)
