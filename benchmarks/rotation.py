"""Rotating q and k: every formulation we tried, beside Hugging Face's and others' code.

The bound is `q.clone(), k.clone()`: nothing that reads and writes both can be faster. All
contenders live in one process, which keeps its memory, and take turns, so that a noisy machine is
noisy for all; what counts is the ratio to the bound. Each is compared with a float64 rotation,
forward and backward, before it is timed, and one that is wrong ends the run.

    python benchmarks/rotation.py --dtype bfloat16 --layout interleaved
    python benchmarks/rotation.py --strides transposed --mode dynamic --only rotate_pairs,module
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from timing import hold_memory, seconds
from torch import Tensor, nn

from rope_export import RotaryEmbedding
from rope_export.rope.pairs import Layout, rotate_pairs

Turn = Callable[[Tensor, Tensor, Tensor, Layout], Tensor]
Pair = tuple[Tensor, Tensor]
LOW = (torch.float16, torch.bfloat16)


def wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in LOW else x


def split(x: Tensor, layout: Layout) -> Pair:
    first, second = x.unflatten(-1, (2, -1) if layout == "half" else (-1, 2)).unbind(
        -2 if layout == "half" else -1
    )
    return first, second


def join(first: Tensor, second: Tensor, layout: Layout) -> Tensor:
    return torch.stack((first, second), -2 if layout == "half" else -1).flatten(-2)


def current(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    """What the library does."""
    return rotate_pairs(x, cos, sin, layout=layout)


def round_last(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    """Join in float32, then round: Inductor writes the joined float32 to memory and reads it."""
    a, b = split(wide(x), layout)
    return join(a * cos - b * sin, b * cos + a * sin, layout).to(x.dtype)


def round_first(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    """Round both halves, then join: one pass; only loads and stores of every second are scalar."""
    a, b = split(wide(x), layout)
    return join((a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), layout)


def flip(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    """The swapped tensor times a sine with signs: one output, but a reversed index."""
    t, axis = wide(x), -2 if layout == "half" else -1
    swapped: Tensor = (
        t.unflatten(-1, (2, -1) if layout == "half" else (-1, 2)).flip(axis).flatten(-2)
    )
    return (t * join(cos, cos, layout) + swapped * join(-sin, sin, layout)).to(x.dtype)


def roll(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    """As flip, the half layout only; the index has a remainder in it."""
    t = wide(x)
    swapped = t.roll(cos.shape[-1], -1)
    return (t * join(cos, cos, layout) + swapped * join(-sin, sin, layout)).to(x.dtype)


def turn_complex(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    """One product of complex numbers; Inductor leaves it to eager."""
    if layout == "half":
        product = torch.complex(*map(wide, split(x, layout))) * torch.complex(cos, sin)
        return torch.cat((product.real, product.imag), -1).to(x.dtype)
    pairs = torch.view_as_complex(wide(x).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


def packed(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:  # noqa: ARG001
    """A bfloat16 pair as the halves of one int32, so that every load and store is contiguous.

    The view passes through float32 because Inductor's AVX2 load of int32 stalls on a detour
    through the stack, and its load of float32 does not.
    """
    word = x.contiguous().view(torch.float32).view(torch.int32)
    a, b = (word << 16).view(torch.float32), (word & -65536).view(torch.float32)
    low, high = (
        bits + (0x7FFF + ((bits >> 16) & 1))  # to the nearest, ties to even
        for bits in ((a * cos - b * sin).view(torch.int32), (b * cos + a * sin).view(torch.int32))
    )
    return (((low >> 16) & 0xFFFF) | (high & -65536)).view(x.dtype)


def in_place(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, rows: int = 0) -> Tensor:
    """Eager: half the passes and no page of memory twice; `rows` at a time, or all."""
    out = torch.empty_like(x)
    for block in zip(*(t.split(rows or x.shape[-2], -2) for t in (x, out, cos, sin)), strict=True):
        (a, b), (p, q), c, s = split(block[0], layout), split(block[1], layout), *block[2:]
        if x.dtype in LOW:
            a, b = a.float(), b.float()
            p.copy_((a * c).addcmul_(b, s, value=-1))
            q.copy_(b.mul_(c).addcmul_(a, s))
        else:
            torch.mul(a, c, out=p).addcmul_(b, s, value=-1)
            torch.mul(b, c, out=q).addcmul_(a, s)
    return out


def in_place_blocks(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    """Temporaries of 8 MiB, which malloc keeps instead of returning their pages."""
    return in_place(x, cos, sin, layout, max(1, (1 << 22) * x.shape[-2] // x.numel()))


class Opposite(torch.autograd.Function):
    """Any formulation, with the rotation by the opposite angle as its backward."""

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, turn: Turn) -> Tensor:
        """Rotate."""
        return turn(x, cos, sin, layout)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        """Keep the tables."""
        _, cos, sin, ctx.layout, ctx.turn = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Rotate back."""
        cos, sin = ctx.saved_tensors
        return apply_opposite(gradients[0], cos, -sin, ctx.layout, ctx.turn), None, None, None, None


def apply_opposite(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, turn: Turn) -> Tensor:
    turned: Tensor = Opposite.apply(x, cos, sin, layout, turn)  # type: ignore[no-untyped-call]
    return turned


def opposite(turn: Turn) -> Turn:
    """Rotate in the order of memory, so that `[B, S, H, D]` seen as `[B, H, S, D]` stays dense."""

    def in_order(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        if x.is_contiguous():
            return apply_opposite(x, cos, sin, layout, turn)
        tables = cos.unsqueeze(1), sin.unsqueeze(1)
        return apply_opposite(x.transpose(1, 2), *tables, layout, turn).transpose(1, 2)

    return in_order


FORMULATIONS: dict[str, Turn] = {
    "rotate_pairs": current,
    "round_last": round_last,
    "round_first": round_first,
    "round_first+opposite": opposite(round_first),
    "packed+opposite": opposite(packed),
    "in_place+opposite": partial(apply_opposite, turn=in_place),
    "in_place_blocks+opposite": partial(apply_opposite, turn=in_place_blocks),
    "flip": flip,
    "roll": roll,
    "complex": turn_complex,
}
NAMES = (*FORMULATIONS, "module", "transformers", "rotary-embedding-torch")


@dataclass(frozen=True)
class Case:
    """One table of results."""

    layout: Layout
    dtype: torch.dtype
    strides: str
    mode: str

    def takes(self, name: str) -> bool:
        """Whether the contender can be asked to do this."""
        if name.startswith("in_place"):
            return self.mode == "eager"
        if name.startswith("packed"):
            return (self.layout, self.dtype) == ("interleaved", torch.bfloat16)
        if name in ("roll", "transformers"):
            return self.layout == "half"
        if name == "rotary-embedding-torch":  # counts positions in the input's dtype: wrong in LOW
            return self.layout == "interleaved" and self.dtype not in LOW
        return True

    def __str__(self) -> str:
        return f"{self.layout}, {str(self.dtype)[6:]}, {self.strides}, {self.mode}"


class Contender(nn.Module):
    """q and k by one formulation, the tables held as a model holds them."""

    cos: Tensor
    sin: Tensor

    def __init__(self, name: str, tables: Pair, width: int, case: Case) -> None:
        super().__init__()
        self.name, self.case, (cos, sin) = name, case, tables
        if name == "transformers":  # as LlamaRotaryEmbedding returns them
            from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

            self.apply_to: Callable[..., Pair] = apply_rotary_pos_emb
            cos, sin = (torch.cat((t, t), -1)[None].to(case.dtype) for t in tables)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        length = len(tables[0])
        if name == "module":
            self.rope = RotaryEmbedding(width, layout=case.layout, max_seq_len=length)
        if name == "rotary-embedding-torch":
            from rotary_embedding_torch import (  # type: ignore[import-untyped]
                RotaryEmbedding as OtherRotary,
            )

            self.other = OtherRotary(dim=width, cache_max_seq_len=length)
        self.to(cos.device)

    def forward(self, q: Tensor, k: Tensor) -> Pair:
        """Rotate both."""
        if self.name == "module":
            return self.rope.rotate(q, k)
        if self.name == "rotary-embedding-torch":
            return self.other.rotate_queries_or_keys(q), self.other.rotate_queries_or_keys(k)
        cos, sin = (t[..., : q.shape[-2], :] for t in (self.cos, self.sin))
        if self.name == "transformers":
            return self.apply_to(q, k, cos, sin)
        turn = FORMULATIONS[self.name]
        return turn(q, cos, sin, self.case.layout), turn(k, cos, sin, self.case.layout)


def random(shape: tuple[int, ...], case: Case, device: str) -> Tensor:
    b, h, s, d = shape
    if case.strides == "contiguous":
        return torch.randn(shape, device=device).to(case.dtype)
    return torch.randn(b, s, h, d, device=device).to(case.dtype).transpose(1, 2)


def tables_of(length: int, width: int, device: str) -> Pair:
    """Cosines and sines in float64."""
    inverse = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), inverse).to(device)
    return angles.cos(), angles.sin()


def check(name: str, got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Raise if a result is off by more than a rounding; others may round as they go."""
    unit = torch.finfo(dtype).eps
    error = (got.double() - want).abs()
    if name in ("transformers", "rotary-embedding-torch"):  # own angles in float32, own roundings
        wrong = error > max(8 * unit, 4e-3) * want.abs().max()
    else:
        wrong = error > unit * want.abs() + 1e-6
    if got.dtype != dtype or bool(wrong.any()):
        raise click.ClickException(f"{name} is wrong: off by {error.max():.1e}, {got.dtype}")


def measure(
    case: Case, shape: tuple[int, ...], names: list[str], rounds: int, device: str
) -> dict[str, dict[str, list[float]]]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    exact = tables_of(shape[-2], shape[-1], device)
    tables = exact[0].float(), exact[1].float()
    q, k, *grads = (random(shape, case, device) for _ in range(4))
    with torch.no_grad():
        wants = [
            round_last(q.double(), *exact, case.layout),
            round_last(grads[1].double(), exact[0], -exact[1], case.layout),
        ]
    # Compiled dynamically, AOTAutograd copies transposed gradients before the graph runs.
    leaves = q.requires_grad_(), k.requires_grad_()
    steps: dict[str, Callable[[Tensor, Tensor], Pair]] = {}
    for name in filter(case.takes, names):
        step: Any = Contender(name, tables, shape[-1], case)
        if case.mode != "eager":
            step = torch.compile(step, fullgraph=True, dynamic=case.mode == "dynamic")
        try:
            for _ in range(2):  # a cache is filled by the first and read by the second
                turned = step(*leaves)
                got = [turned[0].detach(), torch.autograd.grad(turned, leaves, grads)[1]]
        except torch._dynamo.exc.TorchDynamoException as error:
            click.echo(f"{name} does not compile: {str(error).splitlines()[0]}")
            continue
        for have, want in zip(got, wants, strict=True):
            check(name, have, want, case.dtype)
        steps[name] = step
    del wants
    taken: dict[str, dict[str, list[float]]] = {
        name: {"forward": [], "backward": []} for name in ("bound", *steps)
    }
    for _ in range(rounds):
        bound, _copies = seconds(lambda: (q.detach().clone(), k.detach().clone()), device)
        del _copies
        for way in ("forward", "backward"):
            taken["bound"][way].append(bound)
        for name, step in steps.items():
            forward, out = seconds(lambda step=step: step(*leaves), device)  # type: ignore[misc]
            backward, _grads = seconds(
                lambda out=out: torch.autograd.grad(out, leaves, grads),  # type: ignore[misc]
                device,
            )
            del out, _grads
            taken[name]["forward"].append(forward)
            taken[name]["backward"].append(backward)
    return taken


def show(case: Case, taken: dict[str, dict[str, list[float]]]) -> None:
    bound = taken["bound"]["forward"]
    click.echo(f"\n{case}: bound {statistics.median(bound) * 1e3:.1f} ms")
    click.echo(f"{'':<28}{'forward':>9}{'least':>8}{'backward':>10}{'least':>8}")
    for name, ways in taken.items():
        cells = [
            f"{of(times) / of(bound):.2f}x"
            for times in ways.values()
            for of in (statistics.median, min)
        ]
        click.echo(f"{name:<28}{cells[0]:>9}{cells[1]:>8}{cells[2]:>10}{cells[3]:>8}")


@click.command(help=__doc__, context_settings={"max_content_width": 100})
@click.option("--rounds", default=15, show_default=True)
@click.option("--shape", default="1,32,4096,128", show_default=True, help="B,H,S,D of q and of k.")
@click.option(
    "--dtype", default="float32,bfloat16", show_default=True, help="Also float16, float64."
)
@click.option("--layout", default="half,interleaved", show_default=True)
@click.option("--strides", default="contiguous,transposed", show_default=True)
@click.option(
    "--mode", default="eager,static,dynamic", show_default=True, help="The last two compiled."
)
@click.option("--only", default=",".join(NAMES), show_default=True)
@click.option("--threads", type=int, help="PyTorch's threads.")
@click.option("--device", default="cpu", type=click.Choice(["cpu", "cuda"]))
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the results here.")
def main(
    rounds: int,
    shape: str,
    dtype: str,
    layout: str,
    strides: str,
    mode: str,
    only: str,
    threads: int | None,
    device: str,
    path: Path | None,
) -> None:
    warnings.filterwarnings("ignore", message=".*complex operators.*")
    torch._dynamo.config.recompile_limit = len(NAMES) + 8  # one code object, many contenders
    if threads:
        torch.set_num_threads(threads)
    hold_memory()
    names = only.split(",")
    size = tuple(int(n) for n in shape.split(","))
    results = {}
    for options in itertools.product(*(t.split(",") for t in (layout, dtype, strides, mode))):
        case = Case(options[0], getattr(torch, options[1]), *options[2:])  # type: ignore[arg-type]
        results[str(case)] = measure(case, size, names, rounds, device)
        show(case, results[str(case)])
    if path:
        document = {
            "benchmark": "rotation",
            "date": date.today().isoformat(),
            "machine": {
                "cpus": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "capability": torch.backends.cpu.get_cpu_capability(),
                "platform": platform.platform(),
                "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            },
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "shape": size,
            "only": None if names == list(NAMES) else only,
            "seconds": results,
        }
        path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
