"""``rope-export block``: export one attention block, then prove it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import show
from .options import (
    ONNXRUNTIME,
    PROVIDERS_OF_AN_EXPORT,
    json_option,
    no_validate_option,
    onnxruntime_option,
    provider_option,
    seed_option,
    speaking_of_options,
    target_option,
)
from .source import LONGEST, PARAMETERS, Source, source_options

_MOST_ROWS = 2**20


@click.command(
    epilog="""\b
Examples:
  rope-export block --seq 4096
  rope-export block --hidden 4096 --heads 32 --kv-heads 8 --theta 500000 --dtype float16
  rope-export block --seq 131072 --theta 500000 --scaling @rope_parameters.json
  rope-export block --cache --window 512 --kv-heads 4 --seq 8192
  rope-export block --cache window --window 512 --kv-heads 4 --seq 32768
  rope-export block --cache --cache-dtype int8 --kv-heads 4
  rope-export block --from ~/models/Qwen3-8B --layer 3 --cache --dtype float16
  rope-export block --seq 8192 --target onnx --layout interleaved --out exported/standard"""
)
@click.option(
    "--seq",
    type=click.IntRange(1, LONGEST),
    default=None,
    help="Longest sequence served.  [default: 4096, or what a checkpoint states if less]",
)
@source_options
@click.option(
    "--cache",
    is_flag=False,
    flag_value="full",
    default=None,
    type=click.Choice(["full", "window"]),
    help="Keys and values of earlier tokens as inputs and outputs, and an attention mask: one "
    "graph for prefill, chunks and decoding. 'window' keeps those of --window N only, so that "
    "memory and a token's time do not follow the length; --cache alone keeps all ('full').",
)
@click.option(
    "--cache-dtype",
    type=click.Choice(["int8", "int4"]),
    default=None,
    help="Keys and values in the cache as integers, with scales of random inputs (from Python: of "
    "yours); float32 on the CPU.  [default: as they are computed]",
)
@click.option(
    "--attention-mask",
    is_flag=True,
    help="Take a mask [batch, sequence], 1 for a token and 0 for padding.",
)
@click.option(
    "--padding",
    type=click.Choice(["right", "left"]),
    default="right",
    show_default=True,
    help="Side on which prompts are padded.",
)
@click.option(
    "--position-ids",
    is_flag=True,
    help="Take positions as an input [batch, sequence] instead of 0, 1, 2, …; [axes, batch, "
    "sequence] with mrope and axial.",
)
@target_option(auto=True)
@provider_option(PROVIDERS_OF_AN_EXPORT)
@click.option("--static", is_flag=True, help="One batch and length instead of dynamic ones.")
@click.option(
    "--batch",
    type=click.IntRange(1, _MOST_ROWS),
    default=None,
    help="Rows of a static graph.  [default: 1]",
)
@seed_option("Random weights and inputs.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    help="Artifact folder; an earlier artifact there is replaced.  [default: exported/block, or "
    "exported/NAME-layer-N of a checkpoint]",
)
@onnxruntime_option()
@no_validate_option()
@json_option()
@click.pass_context
@speaking_of_options(PARAMETERS | ONNXRUNTIME)
def block(
    context: click.Context,
    /,
    *,
    seq: int | None,
    cache: str | None,
    cache_dtype: str | None,
    attention_mask: bool,
    padding: str,
    position_ids: bool,
    target: str,
    providers: tuple[str, ...],
    static: bool,
    batch: int | None,
    seed: int,
    out: Path | None,
    onnxruntime: str | None,
    no_validate: bool,
    as_json: bool,
    **of_the_block: Any,
) -> None:
    """Export an attention block with RoPE to ONNX and prove it equal to PyTorch.

    Random weights are drawn from --seed, or read with --from. The graph is run by onnxruntime at
    shapes it was never traced at and compared with eager PyTorch and with float64 truth.
    """
    steps = show.Steps()
    if not no_validate:
        from rope_export import runtime

        for provider in providers:
            runtime.require(provider)
    if onnxruntime is not None:
        from rope_export.runtime import required

        required.chosen(onnxruntime, target, proven=not no_validate)
    if batch is not None and not static:
        raise click.UsageError(f"--batch {batch} is for static graphs: give --static too")
    if target == "auto" and no_validate:
        raise click.UsageError("--target auto keeps what is proven: leave out --no-validate")
    source = Source.read(context, of_the_block)
    out = out or Path("exported") / source.name
    steps("loading PyTorch")
    from rope_export.artifacts.folder import check_destination
    from rope_export.exporting.export import export

    check_destination(out)
    if source.layer is not None:
        steps(f"reading layer {source.layer.index} of {of_the_block['checkpoint']}")
    longest = source.longest(seq)
    widened = source.widened(providers or ("cpu",))
    attention = source.make(longest, seed, dtype="float32" if widened else None)
    shape = source.describe(longest, str(attention.dtype).removeprefix("torch."))
    if cache == "window" and attention.window is None:
        whose = "--window N" if source.layer is None else "a layer that has one (--layer)"
        raise click.UsageError(f"--cache window needs a window: give {whose}")
    interface: dict[str, Any] = {
        "position_ids": position_ids,
        "cache": cache if cache == "window" else cache is not None,
        "cache_dtype": cache_dtype,
        "attention_mask": attention_mask,
        "padding": padding,
        "static": static,
        "batch": batch or 1,
    }
    result = export(
        attention,
        out,
        target=target,
        providers=providers or ("cpu",),
        max_seq_len=longest,
        **interface,
        seed=seed,
        onnxruntime=onnxruntime,
        validate=not no_validate,
        validate_on=providers,
        options={
            **shape,
            "target": target,
            "providers": list(providers),
            **interface,
            "seed": seed,
            "onnxruntime": onnxruntime,
            "validate": not no_validate,
        },
        notes=[widened] if widened else (),
        progress=steps,
    )
    show.finish(result.report, out, as_json=as_json, origin=source.origin())
