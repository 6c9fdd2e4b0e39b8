"""A training step of one attention block under torch.compile, with our rotation and with others'.

A step is forward and backward, without an optimizer. All blocks are `rope_export.Attention` with
the same weights and differ in the rotation alone. Output, input gradient and the gradient of the
query projection are compared with a float64 evaluation before anything is timed: ours may be as far
off as `rope_export.artifacts.comparison` allows, others as far as if they rounded after every
operation; one that is further is not timed. All live in one process and take turns, in another
order each round. Ratios are medians over the rounds; "of ours" is of ours with the same pairing.
Contenders whose package is missing are left out; flash-attn and liger need CUDA.

transformers and liger get their cosines and sines computed in every step, as a model does; a model
of many layers does so once for all of them.

It also verifies, and exits with 1 where it is not so, that ours compile to one graph without
breaks, to at most two when lengths vary that nothing declared dynamic, and never again while they
are timed; and that compiled they train as close to a training in float64 as eager PyTorch does.

    python benchmarks/train.py
    python benchmarks/train.py --dtype bfloat16 --mode dynamic --only "ours,no rope,transformers"
    python benchmarks/train.py --device cuda --json benchmarks/results/DATE-train-cuda.json

The rotation alone, against the time of copying queries and keys: benchmarks/rotation.py.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from contenders import LENGTHS, OURS, ROTATIONS, Exact, Task, Textbook
from timing import seconds
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rope_export import Attention
from rope_export.artifacts.comparison import Errors, errors_against, tolerance
from rope_export.rope.pairs import Layout
from rope_export.runtime import Machine

Forward = Callable[[Tensor], Tensor]
TRAINING_STEPS = 20
WARM_UP = {"cpu": 1, "cuda": 5}


def replace_rotation(block: Attention, rotation: nn.Module | None) -> Attention:
    """Put ``rotation`` where the block asks for it."""
    block.rope = rotation  # type: ignore[assignment]
    return block


class Contender:
    """A block with one rotation, and what is known of it."""

    def __init__(self, name: str, task: Task) -> None:
        self.name, self.task, self.rotation = name, task, ROTATIONS[name]
        self.block = task.block(self.rotation.layout or "half")
        if self.rotation.layout is None:
            replace_rotation(self.block, None)
        if self.rotation.theirs is not None:
            replace_rotation(self.block, self.rotation.theirs(task))
        self.block.to(task.device)
        self.forward: Forward = self.block
        self.graphs = 0
        self.graphs_of_lengths: int | None = None
        self.error: float | None = None
        self.remark = ""
        self.seconds: list[float] = []

    def compile(self, *, fullgraph: bool = True, backend: str = "inductor") -> None:
        """Make the block that is timed."""
        static = self.task.mode == "static"
        self.graphs = 0
        self.forward = torch.compile(
            with_own_code(self.block),
            fullgraph=fullgraph,
            dynamic=False if static else None,  # None: as the inputs are marked
            backend=backend,
        )

    def step(self, x: Tensor, gradient: Tensor) -> list[Tensor]:
        """Forward and backward, counting the graphs that are compiled for it."""
        before = graphs_compiled()
        results = step(self.forward, self.block, x, gradient)
        self.graphs += graphs_compiled() - before
        return results

    def count_graphs_of_lengths(self) -> None:
        """Compile for lengths that vary and that nothing declares dynamic, without any kernels."""
        torch._dynamo.reset()
        forward = torch.compile(self.block, fullgraph=True, backend="aot_eager")
        before = graphs_compiled()
        for length in self.task.lengths:
            step(forward, self.block, self.task.tokens(length), self.task.gradient(length))
        self.graphs_of_lengths = graphs_compiled() - before


def with_own_code(block: Attention) -> Forward:
    """The block as a function of its own code: what Dynamo learns of one contender stays there."""

    def forward(x: Tensor) -> Tensor:
        output: Tensor = block(x)
        return output

    forward.__code__ = forward.__code__.replace()
    return forward


def graphs_compiled() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def step(forward: Forward, block: Attention, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and of all weights, the query projection's first."""
    output = forward(x)
    weights = [p for p in block.parameters() if p.requires_grad]
    return [output, *torch.autograd.grad(output, [x, *weights], gradient)]


class Judge:
    """Compares contenders with a float64 evaluation of the same block on the same tokens."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.x, self.gradient = task.tokens(task.seq), task.gradient(task.seq)
        if task.mode == "dynamic":
            torch._dynamo.mark_dynamic(self.x, 1)
        self._truths: dict[Layout | None, list[Any]] = {}

    def exact(self, layout: Layout | None, seed: int = 0) -> Attention:
        """The block in float64, on the CPU: its attention keeps no matrix of scores there."""
        block = self.task.block(layout or "half", seed).double()
        assert block.rope is not None
        return replace_rotation(block, None if layout is None else Exact(block.rope.found, layout))

    def errors(self, layout: Layout | None, results: list[Tensor]) -> list[Errors]:
        """Of the output and of the gradients of the input and of the query projection."""
        if layout not in self._truths:
            block, x = self.exact(layout), on_the_host(self.x).requires_grad_()
            truth = step(block, block, x, on_the_host(self.gradient))[:3]
            self._truths[layout] = [t.detach().numpy() for t in truth]
        pairs = zip(self._truths[layout], results[:3], strict=True)
        return [errors_against(truth, on_the_host(result).numpy()) for truth, result in pairs]

    def limits(self, contender: Contender) -> list[Errors]:
        """From the errors of eager PyTorch, with our rotation or, for others, with a coarse one."""
        layout, block = contender.rotation.layout, contender.block
        if contender.rotation.theirs is not None and layout is not None:
            ours = self.task.block(layout).to(self.task.device)
            block = replace_rotation(ours, Textbook(layout))
        eager = self.errors(layout, step(block, block, self.x, self.gradient))
        return [tolerance(error, self.task.dtype, self.task.products) for error in eager]

    def finds_right(self, contender: Contender) -> bool:
        """Let a contender take its first steps, and say whether they are right."""
        for _ in range(2):  # a cache is filled by the first and read by the second
            results = contender.step(self.x, self.gradient)
        errors = self.errors(contender.rotation.layout, results)
        contender.error = max(error.rel for error in errors)
        limits = self.limits(contender)
        return all(error.within(limit) for error, limit in zip(errors, limits, strict=True))


def on_the_host(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)


def enter(contender: Contender, judge: Judge) -> bool:
    """Compile and check; another's rotation may break the graph, and may be left out."""
    for fullgraph in (True,) if contender.rotation.theirs is None else (True, False):
        contender.compile(fullgraph=fullgraph)
        try:
            right = judge.finds_right(contender)
        except Exception as error:
            if contender.rotation.theirs is None:
                raise
            contender.remark = f"does not run: {said_by(error)}"
            continue
        contender.remark = "" if fullgraph else "breaks the graph"
        if not contender.graphs:
            contender.remark = "runs uncompiled"
        if not right:
            contender.remark = f"wrong (error {contender.error:.1g})"
        return right
    return False


def said_by(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"


@dataclass(frozen=True)
class Training:
    """Losses of one training done three times, and the furthest that they come apart."""

    first: float
    last: float
    compiled_from_eager: float
    compiled_from_float64: float
    eager_from_float64: float
    limit: float

    @property
    def agrees(self) -> bool:
        """Whether compiled is as near to float64 as eager PyTorch."""
        return self.compiled_from_float64 <= self.limit

    def __str__(self) -> str:
        return (
            f"{TRAINING_STEPS} steps, loss {self.first:.3g} to {self.last:.3g}; compiled differs "
            f"from eager by {self.compiled_from_eager:.1e}, from float64 by "
            f"{self.compiled_from_float64:.1e} (eager by {self.eager_from_float64:.1e}, "
            f"limit {self.limit:.1e})"
        )


def train(contender: Contender, judge: Judge) -> Training:
    """Train towards the outputs of a block with other weights, compiled, eager and in float64."""
    task, layout = contender.task, contender.rotation.layout
    exact, teacher = judge.exact(layout), judge.exact(layout)
    eager = copy.deepcopy(contender.block)
    x = on_the_host(judge.x)
    with torch.no_grad():
        for weight, other in zip(
            teacher.parameters(), judge.exact(layout, seed=1).parameters(), strict=True
        ):
            weight.add_(other, alpha=0.5)
        target = teacher(x)
    loss = F.mse_loss(exact(x), target)
    slopes = torch.autograd.grad(loss, list(exact.parameters()))
    # A tenth of the step that would, were the loss linear, take it to zero: with larger ones the
    # roundings of the first steps grow from step to step.
    rate = 0.1 * loss.item() / sum(slope.square().sum().item() for slope in slopes)
    truth = losses(exact, exact, x, target, rate)
    target = target.to(task.device)
    by_eager = losses(eager, eager, judge.x, target, rate)
    by_compiled = losses(contender.forward, contender.block, judge.x, target, rate)
    error = furthest(by_eager, truth)
    return Training(
        first=truth[0],
        last=truth[-1],
        compiled_from_eager=furthest(by_compiled, by_eager),
        compiled_from_float64=furthest(by_compiled, truth),
        eager_from_float64=error,
        limit=tolerance(Errors(error, error, 0.0), task.dtype, task.products).rel,
    )


def losses(
    forward: Forward, block: Attention, x: Tensor, target: Tensor, rate: float
) -> list[float]:
    """Losses of gradient descent; the sums of steps are kept in float64, whatever the dtype."""
    taken = []
    weights = list(block.parameters())
    sums = [weight.detach().double() for weight in weights]
    for _ in range(TRAINING_STEPS):
        loss = F.mse_loss(forward(x).double(), target)
        slopes = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for weight, total, slope in zip(weights, sums, slopes, strict=True):
                total.sub_(rate * slope)
                weight.copy_(total)
        taken.append(loss.item())
    return taken


def furthest(losses: list[float], truth: list[float]) -> float:
    """Largest relative difference; what is not a number is infinitely far."""
    return max(
        abs(a - b) / b if np.isfinite(a) else float("inf")
        for a, b in zip(losses, truth, strict=True)
    )


def compete(contenders: list[Contender], judge: Judge, rounds: int) -> None:
    """Take turns."""
    task = judge.task
    shorter = [(task.tokens(n), task.gradient(n)) for n in task.lengths[:-1]]
    warm_up = WARM_UP[task.device]
    for turn in range(warm_up + rounds):
        first = turn % len(contenders)
        for contender in (*contenders[first:], *contenders[:first]):
            if task.mode == "dynamic":  # no two steps in a row have the same length
                contender.step(*shorter[turn % len(shorter)])
            taken, _ = seconds(lambda c=contender: c.step(judge.x, judge.gradient), task.device)  # type: ignore[misc]
            if turn >= warm_up:
                contender.seconds.append(taken)


def ratio(contender: Contender, other: Contender | None) -> float | None:
    """Median over the rounds of what a step took in units of the other's in the same round."""
    if other is None or not (contender.seconds and other.seconds):
        return None
    return statistics.median(a / b for a, b in zip(contender.seconds, other.seconds, strict=True))


def ratios(contender: Contender, others: list[Contender]) -> dict[str, float | None]:
    """Of the block that does not rotate, and of ours."""
    named = {other.name: other for other in others}
    return {
        "of no rope": ratio(contender, named.get("no rope")),
        "of ours": ratio(contender, named.get(contender.rotation.ours)),
    }


def show(contenders: list[Contender]) -> None:
    columns = (("median", 11), ("min", 11), ("of no rope", 12), ("of ours", 9), ("error", 10))
    titles = "".join(f"{title:>{width}}" for title, width in columns)
    click.echo(f"{'':<24}{titles}{'graphs':>8}{f'of {LENGTHS} lengths':>14}")
    for contender in contenders:
        cells = [""] * 5
        if contender.seconds:
            times = statistics.median(contender.seconds), min(contender.seconds)
            parts = ratios(contender, contenders).values()
            cells = [f"{t * 1e3:.4g} ms" for t in times]
            cells += ["" if part is None else f"{part:.3f}x" for part in parts]
            cells += [f"{contender.error:.1e}"]
        line = "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, columns, strict=True))
        of_lengths = contender.graphs_of_lengths
        counts = f"{contender.graphs:>8}{'-' if of_lengths is None else of_lengths:>14}"
        click.echo(f"{contender.name:<24}{line}{counts}  {contender.remark}".rstrip())


def problems(contenders: list[Contender], trainings: dict[str, Training]) -> Iterator[str]:
    """What must not be."""
    for contender in contenders:
        if contender.rotation.theirs is not None:
            continue
        if not contender.seconds:
            yield f"{contender.name}: {contender.remark}"
        elif contender.graphs != 1:
            yield f"{contender.name}: compiled {contender.graphs} times for one graph"
        if contender.graphs_of_lengths is None or contender.graphs_of_lengths > 2:
            yield f"{contender.name}: {contender.graphs_of_lengths} graphs of {LENGTHS} lengths"
    for name, training in trainings.items():
        if not training.agrees:
            yield f"{name}: compiled does not train as eager PyTorch does: {training}"


def attention_kernel(task: Task) -> contextlib.AbstractContextManager[None]:
    """Flash attention, or an error, where CUDA has it."""
    if task.device == "cuda" and task.dtype != "float32":
        return sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    return contextlib.nullcontext()


def kernel_used(task: Task) -> str:
    """The kernel of scaled_dot_product_attention in the block, by the name of its gradient."""
    block = task.block().to(task.device)
    q, k, v = block.heads(task.tokens(task.seq))
    node = type(block.attend(q, k, v, is_causal=True).grad_fn).__name__
    found = re.match(r"ScaledDotProduct(\w+?)Attention", node)
    return found[1].lower() if found else "math"


def present(names: list[str], device: str) -> Iterator[str]:
    """Those that can take part; says why others do not."""
    for name in names:
        rotation = ROTATIONS[name]
        if device not in rotation.devices:
            click.echo(f"{name} left out: needs {' or '.join(rotation.devices)}")
        elif importlib.util.find_spec(rotation.package) is None:
            click.echo(f"{name} left out: {rotation.package} is not installed")
        else:
            yield name


def gather(names: list[str], task: Task) -> list[Contender]:
    """Those that can be made and compiled at all, their graphs counted."""
    contenders = []
    for name in present(names, task.device):
        ours = ROTATIONS[name].theirs is None
        try:
            contender = Contender(name, task)
        except Exception as error:
            if ours:
                raise
            click.echo(f"{name} left out: {said_by(error)}")
            continue
        # Ours that break the graph end the run; of others it is only not known.
        with contextlib.nullcontext() if ours else contextlib.suppress(Exception):
            contender.count_graphs_of_lengths()
        contenders.append(contender)
    torch._dynamo.reset()
    return contenders


def facts(contender: Contender, contenders: list[Contender]) -> dict[str, Any]:
    """What the file of results says of one contender."""
    found: dict[str, Any] = {
        "graphs": contender.graphs,
        "graphs_of_lengths": contender.graphs_of_lengths,
        "rel_error": contender.error,
        "remark": contender.remark,
    }
    if contender.seconds:
        found["median"] = statistics.median(contender.seconds)
        found["min"] = min(contender.seconds)
        found["ratios"] = ratios(contender, contenders)
        found["seconds"] = contender.seconds
    return found


def names_of(_context: click.Context, _parameter: click.Parameter, value: str) -> list[str]:
    names = [name.strip() for name in value.split(",")]
    for name in names:
        if name not in ROTATIONS:
            raise click.BadParameter(f"{name!r} is none of {', '.join(ROTATIONS)}")
    return names


@click.command(help=__doc__, context_settings={"max_content_width": 100, "show_default": True})
@click.option("--device", default="cpu", type=click.Choice(["cpu", "cuda"]))
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="By default float32, and bfloat16 on CUDA.",
)
@click.option("--batch", default=1)
@click.option("--seq", type=int, help="By default 1024, and 4096 on CUDA.")
@click.option("--hidden", default=1024)
@click.option("--heads", default=16)
@click.option("--kv-heads", default=8)
@click.option("--rounds", type=int, help="By default 7, and 50 on CUDA.")
@click.option("--mode", default="static", type=click.Choice(["static", "dynamic"]))
@click.option("--only", default=",".join(ROTATIONS), callback=names_of)
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the results here.")
def main(
    device: str,
    dtype: str | None,
    batch: int,
    seq: int | None,
    hidden: int,
    heads: int,
    kv_heads: int,
    rounds: int | None,
    mode: str,
    only: list[str],
    path: Path | None,
) -> None:
    on_cuda = device == "cuda"
    if on_cuda and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: PyTorch finds no CUDA device here")
    task = Task(
        device=device,
        dtype=dtype or ("bfloat16" if on_cuda else "float32"),
        batch=batch,
        seq=seq or (4096 if on_cuda else 1024),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        mode=mode,
    )
    rounds = rounds or (50 if on_cuda else 7)
    torch.set_float32_matmul_precision("highest")  # no TF32
    with attention_kernel(task):
        kernel = kernel_used(task)
        click.echo(f"{task}, {mode}, attention: {kernel}")
        contenders = gather(only, task)
        judge = Judge(task)
        right = [contender for contender in contenders if enter(contender, judge)]
        if right:
            compete(right, judge, rounds)
        show(contenders)
        trainings = {c.name: train(c, judge) for c in right if c.name in OURS}
    for name, training in trainings.items():
        click.echo(f"training, {name}: {training}")
    if path:
        document = {
            "benchmark": "train",
            "date": date.today().isoformat(),
            "machine": {
                "cpu": Machine.this().cpu,
                "cpus": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "capability": torch.backends.cpu.get_cpu_capability(),
                "platform": platform.platform(),
                "device": torch.cuda.get_device_name() if on_cuda else "cpu",
            },
            "versions": {
                "torch": torch.__version__,
                "python": platform.python_version(),
                **{p: metadata.version(p) for p in {c.rotation.package for c in contenders}},
            },
            "options": {**asdict(task), "rounds": rounds, "only": only},
            "attention": kernel,
            "contenders": {c.name: facts(c, contenders) for c in contenders},
            "training": {name: asdict(training) for name, training in trainings.items()},
        }
        path.write_text(json.dumps(document, indent=1) + "\n")
    found = list(problems(contenders, trainings))
    if found:
        raise click.ClickException("; ".join(found))


if __name__ == "__main__":
    main()
