"""``rope-export bench``: what a block costs in PyTorch and in onnxruntime on this machine."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import show
from .options import json_option, seed_option, speaking_of_options
from .source import LONGEST, PARAMETERS, Source, source_options

if TYPE_CHECKING:
    from rope_export.attention.block import Attention
    from rope_export.bench import Results

_CONTENDERS = ("eager", "compile", "plain", "ort", "onnx", "primitive")
_OF_INTEGERS = ("ort-int8-cache", "ort-int4-cache")
_BY_WINDOW = "ort-window-cache"
_OF_AN_ARTIFACT = ("eager", "compile", "plain", "artifact")
_NAMES = PARAMETERS | {
    "lengths": "--seq",
    "contenders": "--only",
    "phases": "--phase",
    "plot": "--plot",
    "rounds": "--rounds",
}


class Lengths(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Lengths in tokens, separated by commas."""

    name = "N,N,…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Parse, or fail with what was given."""
        if isinstance(value, tuple):
            return value
        try:
            lengths = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            lengths = ()
        if not lengths or not all(2 <= length <= LONGEST for length in lengths):
            self.fail(f"{value!r} is not a list of lengths from 2 to {LONGEST}", param, ctx)
        return tuple(sorted(set(lengths)))


@click.command(
    epilog="""\b
Examples:
  rope-export bench --kv-heads 8
  rope-export bench --seq 128,1024,4096,16384 --only eager,ort --plot bench.png
  rope-export bench --from ~/models/Qwen3-8B --seq 4096 --phase decode --json > bench.json
  rope-export bench --artifact exported/block --peers"""
)
@click.option(
    "--seq",
    "lengths",
    type=Lengths(),
    default="128,1024,4096",
    show_default=True,
    help="Lengths of sequences, in tokens.",
)
@click.option(
    "--artifact",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="Measure the graph of this artifact of rope-export block (with --from, of that layer) "
    "instead of exporting every target.",
)
@source_options
@click.option(
    "--phase",
    "phases",
    type=click.Choice(["prefill", "decode"]),
    multiple=True,
    help="A prompt of N tokens, or the last of N tokens with the others in the cache; repeatable."
    "  [default: both]",
)
@click.option(
    "--only",
    default=None,
    metavar="NAME,NAME,…",
    help=f"Contenders, of {', '.join(_CONTENDERS)}, {_BY_WINDOW} (of blocks with a window), "
    f"{', '.join(_OF_INTEGERS)} (their error is what the integers cost, and not judged) and the "
    f"peers.  [default: {', '.join(_CONTENDERS)}, and with a window {_BY_WINDOW}]",
)
@click.option(
    "--peers",
    is_flag=True,
    help="Other libraries too, where they are installed: rotary-embedding-torch, transformers "
    "(and its ONNX exporter), onnxruntime-genai's builder, torchtune, flash-attn, Liger.",
)
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where everything runs; it must load.",
)
@click.option("--batch", type=click.IntRange(1, 2**20), default=1, show_default=True, help="Rows.")
@click.option(
    "--rounds",
    type=click.IntRange(1, 10_000),
    default=7,
    show_default=True,
    help="Steps timed of each contender; they take turns.",
)
@seed_option("Random weights and inputs.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE.png",
    help="Draw latency and memory over length (needs matplotlib: the extra rope-export[plot]).",
)
@json_option()
@click.pass_context
@speaking_of_options(_NAMES)
def bench(
    context: click.Context,
    /,
    *,
    lengths: tuple[int, ...],
    artifact: Path | None,
    phases: tuple[str, ...],
    only: str | None,
    peers: bool,
    provider: str,
    batch: int,
    rounds: int,
    seed: int,
    plot: Path | None,
    as_json: bool,
    **of_the_block: Any,
) -> None:
    """Time an attention block in PyTorch and in onnxruntime, side by side.

    Every contender runs in a process of its own and is compared with float64 truth before it is
    timed; then they take turns, so that noise is everybody's. Exit code 1: a graph of ours gave
    wrong numbers.
    """
    from rope_export import runtime

    runtime.require(provider)
    if plot is not None:
        from rope_export.bench.plot import check

        check(plot)
    source = Source.read(context, of_the_block)
    if artifact is not None:
        _refuse_shape(context, of_the_block)
    names = _contenders(only, artifact, peers=peers)
    from rope_export import bench as measuring

    given: dict[str, Path] = {}
    if artifact is not None:
        block, given = _of_artifact(artifact, source, max(lengths))
    else:
        widened = source.widened([provider])
        if widened:
            click.echo(f"note: {widened}", err=True)
        block = source.make(max(lengths), seed, dtype="float32" if widened else None)
    if only is None and artifact is None and block.window is not None and block.causal:
        names = (*names, _BY_WINDOW)
    dtype = str(block.dtype).removeprefix("torch.")
    chosen = phases or measuring.PHASES
    cases = len(lengths) * len(chosen)
    steps = 1 + len(names) * len(chosen) + cases * (2 * len(names) + rounds + 2)
    with click.progressbar(
        length=steps, file=sys.stderr, item_show_func=lambda m: m or "", show_eta=False
    ) as bar:
        results = measuring.measure(
            block,
            lengths,
            phases=chosen,
            contenders=names,
            provider=provider,
            batch=batch,
            rounds=rounds,
            seed=seed,
            given=given,
            describe=source.describe(max(lengths), dtype),
            command=shlex.join(["rope-export", *sys.argv[1:]]),
            progress=lambda message: bar.update(1, message),
        )
        bar.finish()
    if plot is not None:
        from rope_export.bench.plot import draw

        draw(results, plot)
    with show.to_stdout():
        _print(results, plot, as_json=as_json)
    sys.exit(0 if results.passed else 1)


def _contenders(only: str | None, artifact: Path | None, *, peers: bool) -> tuple[str, ...]:
    names: tuple[str, ...] = _CONTENDERS if artifact is None else _OF_AN_ARTIFACT
    if only is not None:
        names = tuple(dict.fromkeys(name.strip() for name in only.split(",")))
    if peers:
        from rope_export.bench.peers import NAMES

        names = (*names, *(name for name in NAMES if name not in names))
    return names


def _refuse_shape(context: click.Context, values: dict[str, Any]) -> None:
    """An artifact says itself what its block is; only its checkpoint must be given again."""
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name)
        if (
            name in values
            and name not in ("checkpoint", "layer", "family")
            and given is click.core.ParameterSource.COMMANDLINE
        ):
            raise click.UsageError(
                f"{parameter.opts[0]} is for the artifact to say: leave it out with --artifact",
                context,
            )


def _of_artifact(folder: Path, source: Source, longest: int) -> tuple[Attention, dict[str, Path]]:
    """The block an artifact was made of, and where its graph is."""
    from rope_export.artifacts.artifact import Artifact
    from rope_export.attention.random_block import block_of_artifact
    from rope_export.errors import BadInputError

    found = Artifact.read(folder, verify=True)
    options = found.config.get("options") or {}
    if source.layer is not None:
        served = int(options.get("max_seq_len", longest))
        block = source.make(served, 0, dtype=options.get("dtype"))
    else:
        block = block_of_artifact(folder)
    serves = found.config["export"]["longest"]
    if longest > serves:
        raise BadInputError(
            f"lengths must be at most the {serves} tokens that {folder} serves, got {longest}"
        )
    cached = found.config["graph"]["cache"] is not None
    given = {"artifact-cache": folder} if cached else {"artifact": folder}
    return block, given


def _print(results: Results, plot: Path | None, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(results.to_json(), indent=1, allow_nan=False))
        return
    machine, reached = results.environment, results.limits
    from rope_export.bench.results import shown

    click.echo(f"block        {results.title}, {results.dtype}, batch {results.batch}")
    click.echo(
        f"machine      {results.provider}: {machine['cpu']}, {machine['cpus']} cores"
        f"{''.join(', ' + name for name in machine['gpus'])}; torch {machine['torch']}, "
        f"onnxruntime {machine['onnxruntime']}"
    )
    click.echo(
        f"limits       {shown(reached['matmul_flops'], 'FLOP/s')} in a large product, "
        f"{shown(reached['copy_bytes'], 'B/s')} read and written in a large copy"
    )
    click.echo()
    for line in results.table():
        click.echo(line)
    if plot is not None:
        click.echo(f"\nplot         {plot}")
    if not results.passed:
        click.echo("\nFAILED: a graph gave numbers that eager PyTorch's own error does not explain")
