"""Which line of a module's own fixed or narrowed a size, told after the trace."""

from __future__ import annotations

import inspect

import modules
import pytest
import torch
from modules import AXES, X
from torch import Tensor
from torch.export import Dim

from rope_export import BadInputError, export
from rope_export.exporting.guards import guards_of, narrowed_by
from rope_export.exporting.tracing import trace
from rope_export.lowering.target import Target


class Reshaping(modules.Given):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).reshape(3, -1)  # fixes b


class Expanding(modules.Given):
    def forward(self, x: Tensor) -> Tensor:
        bias = torch.ones(1, 5, 1)
        return self.linear(x) * bias.expand(-1, 5, 4)  # fixes s


class Sliced(modules.Given):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(64, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[:5]  # fixes s


class Counting(modules.Given):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * int(x.shape[1])  # fixes s


class Deep(modules.Given):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(4, 4), Counting())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Short(modules.Given):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 16:  # narrows s
            return x
        return self.linear(x)


class Related(modules.Given):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.shape[1] == x.shape[0] + 2 else x  # narrows s


class Odd(modules.Given):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.shape[1] % 2 else x  # assumed


def line_of(kind: type, comment: str) -> str:
    """Where a comment stands, as messages have it."""
    lines, first = inspect.getsourcelines(kind)
    index = next(i for i, line in enumerate(lines) if comment in line)
    return f"{__file__}:{first + index} `{lines[index].strip()}`"


@pytest.mark.parametrize(
    ("kind", "axis", "label", "size", "where"),
    [
        (Reshaping, 0, "b", 3, Reshaping),
        (Expanding, 1, "s", 5, Expanding),
        (Sliced, 1, "s", 5, Sliced),
        (Counting, 1, "s", 5, Counting),
        (Deep, 1, "s", 5, Counting),
    ],
)
def test_an_axis_with_one_size_is_refused_with_the_line_that_fixed_it(
    tmp_path, kind, axis, label, size, where
):
    with pytest.raises(BadInputError) as caught:
        export(kind(), tmp_path / "x", args=(X,), dynamic_shapes={"x": AXES})
    said = str(caught.value)
    assert said.startswith(f"axis {axis} of x was to be dynamic ({label}) and {kind.__name__} ")
    assert f"works with size {size} only, by {line_of(where, '# fixes')}: " in said
    assert f"such as x.shape[{axis}]" in said
    assert not list(tmp_path.iterdir())


def traced(module: torch.nn.Module) -> torch.export.ExportedProgram:
    axes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    return trace(module, (X,), {}, (axes,), Target("onnx", ("cpu",), 64))


@pytest.mark.parametrize("kind", [Short, Related])
def test_a_range_is_narrowed_by_a_line(kind):
    program = traced(kind())
    size = next(n for n in program.graph.nodes if n.name == "x").meta["val"].shape
    assert narrowed_by(program, size[1]) == line_of(kind, "# narrows")
    assert narrowed_by(program, size[1].node.expr) == line_of(kind, "# narrows")
    if kind is Short:
        assert narrowed_by(program, size[0]) is None
        assert narrowed_by(program, 3) is None


def test_what_no_range_says_is_known_with_its_line():
    ((guard, line),) = guards_of(traced(Odd()))
    assert line == line_of(Odd, "# assumed")
    assert "Mod" in str(guard)
    assert guards_of(traced(torch.nn.Linear(4, 4))) == []
