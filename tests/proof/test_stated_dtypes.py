"""While truth is evaluated in float64, code that asks for dtypes is told those it would have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import modules
import pytest
import torch
import torch.nn.functional as F
from modules import AXES, X, drawn
from torch import Tensor, nn

from rope_export import Attention, RotaryEmbedding, export
from rope_export.proof.full_precision import exactly, widened

ASKED: dict[str, Callable[..., list[Any]]] = {
    "an input, a weight and a product": lambda m, x: [x, m.weight, m(x)],
    "arithmetic": lambda _, x: [x + 1, x * 2.0, -x, x @ x.mT, x.sum(), x.mean(-1), x**2],
    "casts": lambda _, x: [
        x.half(), x.bfloat16(), x.float(), x.double(), x.to(torch.float16),
        x.type(torch.float64), x.half().type_as(x), x.half().to(x), x.long(), x.to(x.device),
    ],
    "halves and floats": lambda _, x: [
        x.half() + x.bfloat16(), x.half() * x, x.half() * torch.tensor(2.0), x.half() + 1,
    ],
    "made anew": lambda _, x: [
        torch.zeros(3), torch.ones(3, dtype=torch.float16), x.new_zeros(3), torch.arange(3),
        torch.arange(3).float(), torch.arange(3) / 2, torch.full((2,), 1.0), torch.empty_like(x),
        torch.linspace(0, 1, 3), torch.rand_like(x, dtype=torch.float64),
    ],
    "functions": lambda _, x: [
        F.softmax(x, -1), F.softmax(x.half(), -1, dtype=torch.float32), F.gelu(x),
        F.layer_norm(x, (4,)), torch.cat((x, x)), torch.stack((x, x)), torch.where(x > 0, x, 0.0),
        torch.einsum("bsd,btd->bst", x, x), F.pad(x, (0, 1)), x.masked_fill(x > 0, -1e4),
    ],
    "several results": lambda _, x: [*x.max(-1), *x.chunk(2, -1), *torch.topk(x, 2), *x.unbind(0)],
    "views": lambda _, x: [x.mT, x[0], x[..., None], x.transpose(1, 2), x.flatten(), x.detach()],
    "complex": lambda _, x: [
        torch.view_as_complex(x.unflatten(-1, (-1, 2))),
        torch.view_as_real(torch.polar(x, x)), torch.polar(x, x).real, torch.polar(x, x).abs(),
        torch.polar(x.double(), x.double()), torch.fft.rfft(x),
    ],
    "booleans": lambda _, x: [x > 0, (x > 0).any(), (x > 0).float(), x.argmax(-1), (x > 0) & True],
    "written in place": lambda _, x: [
        x.clone().add_(1), x.clone().mul_(torch.ones(4, dtype=torch.float64)),
        x.half().copy_(x), x.clone().zero_(),
    ],
}  # fmt: skip


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ASKED)
def test_dtypes_are_those_of_an_ordinary_run(name, dtype):
    module, x = nn.Linear(4, 4).to(dtype), drawn(3, 5, 4).to(dtype)
    ask = ASKED[name]
    try:
        wanted = [(t.dtype, t.type()) for t in ask(module, x)]
    except RuntimeError as error:
        pytest.skip(str(error))  # complex numbers of half precision
    with exactly(module):
        made = ask(module, widened(x))
        assert [(t.dtype, t.type()) for t in made] == wanted


@torch.no_grad()
def test_what_this_package_computes_has_the_dtype_of_its_weights():
    rope = RotaryEmbedding(8, max_seq_len=16)
    attention = Attention(16, 2, rope=rope).half()
    x = drawn(1, 3, 16).half()
    past = attention.empty_cache()
    with exactly(attention):
        output, present = attention(widened(x), past=tuple(widened(t) for t in past))
        assert [t.dtype for t in (output, *present)] == [torch.float16] * 3
        assert rope.rotate_queries_or_keys(widened(drawn(1, 2, 3, 8))).dtype == torch.float32


class Asserting(modules.Given):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        y = self.linear(x)
        if y.dtype not in (torch.float32, torch.float16):
            raise TypeError(f"no kernel for {y.dtype}")
        return y


class Branching(modules.Given):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y * 2 if y.dtype == torch.float32 else y


class Halved(modules.Given):
    def forward(self, x: Tensor) -> Tensor:
        scores = self.linear(x)
        assert scores.dtype == self.linear.weight.dtype
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(scores > 1, least).softmax(-1, dtype=torch.float32)
        assert scores.dtype == torch.float32
        return scores.to(x.dtype)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Asserting, torch.float32),
        (Branching, torch.float32),
        (Halved, torch.float32),
        (Halved, torch.float16),
    ],
)
def test_modules_that_ask_for_dtypes_are_proven(tmp_path, kind, dtype):
    module = kind().to(dtype)
    result = export(
        module, tmp_path / "x", args=(X.to(dtype),), dynamic_shapes={"x": AXES}, validate=True
    )
    assert result.report.passed
