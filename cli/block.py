"""``rope-export block``: export one attention block, then prove it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from . import show
from .options import (
    PROVIDERS_OF_AN_EXPORT,
    JsonObject,
    json_option,
    no_validate_option,
    provider_option,
    seed_option,
    speaking_of_options,
    target_option,
)

# How the library's parameters are called here; error messages are translated with it.
PARAMETERS = {
    "hidden_size": "--hidden",
    "num_heads": "--heads",
    "num_kv_heads": "--kv-heads",
    "head_dim": "--head-dim",
    "max_seq_len": "--seq",
    "rotary_dim": "--rotary-dim",
    "dim": "--rotary-dim",
    "theta": "--theta",
    "scaling": "--scaling",
    "layout": "--layout",
    "target": "--target",
    "dtype": "--dtype",
    "providers": "--provider",
    "provider": "--provider",
    "batch": "--batch",
    "static=True": "--static",
    "position_ids": "--position-ids",
    "value_head_dim": "--value-head-dim",
    "window": "--window",
    "softcap": "--softcap",
    "qk_norm_eps": "--qk-norm-eps",
    "scale": "--scale",
    "cache": "--cache",
    "attention_mask": "--attention-mask",
    "padding='left'": "--padding left",
    "padding": "--padding",
    "causal=False": "--no-causal",
    "layer must": "--layer must",
    "family must": "--family must",
    "name it as family": "name it with --family",
}
# What a checkpoint says of itself.
_OF_A_RANDOM_BLOCK = (
    "hidden", "heads", "kv_heads", "head_dim", "theta", "scaling", "rotary_dim", "layout",
    "value_head_dim", "window", "softcap", "sinks", "qk_norm", "qk_norm_eps", "qkv_bias",
    "out_bias", "scale", "no_causal",
)  # fmt: skip
_DEFAULT_LENGTH = 4096
# Sizes no block has; beyond them a typing error is more likely than a model.
_LONGEST, _WIDEST, _MOST_HEADS, _WIDEST_HEAD, _MOST_ROWS = 2**24, 2**20, 2**14, 2**14, 2**20


@click.command(
    epilog="""\b
Examples:
  rope-export block --seq 4096
  rope-export block --hidden 4096 --heads 32 --kv-heads 8 --theta 500000 --dtype float16
  rope-export block --seq 131072 --theta 500000 --scaling @rope_parameters.json
  rope-export block --cache --window 512 --kv-heads 4 --seq 8192
  rope-export block --from ~/models/Qwen3-8B --layer 3 --cache --dtype float16
  rope-export block --seq 8192 --target onnx --layout interleaved --out exported/standard"""
)
@click.option(
    "--from",
    "checkpoint",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="Take shape, RoPE and weights from a local Hugging Face checkpoint (config.json and "
    "safetensors) instead of the options marked (R).",
)
@click.option(
    "--layer",
    type=click.IntRange(0),
    default=None,
    help="Which layer of the checkpoint.  [default: 0]",
)
@click.option(
    "--family",
    default=None,
    metavar="NAME",
    help="Read the checkpoint as this model_type instead of its own.",
)
@click.option(
    "--seq",
    type=click.IntRange(1, _LONGEST),
    default=None,
    help="Longest sequence served.  [default: 4096, or what a checkpoint states if less]",
)
@click.option(
    "--hidden",
    type=click.IntRange(1, _WIDEST),
    default=1024,
    show_default=True,
    help="(R) Width of the residual stream.",
)
@click.option(
    "--heads",
    type=click.IntRange(1, _MOST_HEADS),
    default=16,
    show_default=True,
    help="(R) Query heads.",
)
@click.option(
    "--kv-heads",
    type=click.IntRange(1, _MOST_HEADS),
    default=None,
    help="(R) Key and value heads: as --heads for multi-head, 1 for multi-query.  "
    "[default: --heads]",
)
@click.option(
    "--head-dim",
    type=click.IntRange(1, _WIDEST_HEAD),
    default=None,
    help="(R) Width of one head.  [default: --hidden / --heads]",
)
@click.option("--theta", type=float, default=None, help="(R) Base of the RoPE.  [default: 10000]")
@click.option(
    "--scaling",
    type=JsonObject(),
    default=None,
    metavar="JSON|@FILE",
    help="(R) Hugging Face rope_parameters or rope_scaling: axial, default, dynamic, linear, "
    "llama3, longrope, mrope, ntk, proportional or yarn, for example "
    '\'{"rope_type": "yarn", "factor": 4}\'.',
)
@click.option(
    "--rotary-dim",
    type=click.IntRange(1, _WIDEST_HEAD),
    default=None,
    help="(R) Rotated part of each head.  [default: --head-dim]",
)
@click.option(
    "--layout",
    type=click.Choice(["half", "interleaved"]),
    default="half",
    show_default=True,
    help="(R) Which channels are rotated together: half as in Llama, interleaved as in GPT-J.",
)
@click.option(
    "--value-head-dim",
    type=click.IntRange(1, _WIDEST_HEAD),
    default=None,
    help="(R) Width of one value head.  [default: --head-dim]",
)
@click.option(
    "--window",
    type=click.IntRange(1, _LONGEST),
    default=None,
    help="(R) Sliding window: a token sees the last N, itself included; with --no-causal those up "
    "to N away.  [default: all]",
)
@click.option("--softcap", type=float, default=None, help="(R) Bound scores by F * tanh(s / F).")
@click.option("--sinks", is_flag=True, help="(R) A learned sink for each head (gpt-oss).")
@click.option(
    "--qk-norm",
    is_flag=True,
    help="(R) RMS norm of query and key heads before the rotation (Qwen3).",
)
@click.option(
    "--qk-norm-eps",
    type=float,
    default=None,
    help="(R) Added to the mean square by --qk-norm.  [default: 1e-06]",
)
@click.option("--qkv-bias", is_flag=True, help="(R) Biases on queries, keys and values.")
@click.option("--out-bias", is_flag=True, help="(R) Bias on the output projection.")
@click.option(
    "--scale",
    type=float,
    default=None,
    help="(R) Factor on the scores.  [default: head dim ** -0.5]",
)
@click.option("--no-causal", is_flag=True, help="(R) Let every token see every other.")
@click.option(
    "--cache",
    is_flag=True,
    help="Keys and values of earlier tokens as inputs and outputs, and an attention mask: one "
    "graph for prefill, chunks and decoding.",
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
@target_option()
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default=None,
    help="Weights and activations.  [default: float32, or as the checkpoint has them]",
)
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
@no_validate_option()
@json_option()
@click.pass_context
@speaking_of_options(PARAMETERS)
def block(
    context: click.Context,
    *,
    checkpoint: Path | None,
    layer: int | None,
    family: str | None,
    seq: int | None,
    hidden: int,
    heads: int,
    kv_heads: int | None,
    head_dim: int | None,
    theta: float | None,
    scaling: dict[str, Any] | None,
    rotary_dim: int | None,
    layout: str,
    value_head_dim: int | None,
    window: int | None,
    softcap: float | None,
    sinks: bool,
    qk_norm: bool,
    qk_norm_eps: float | None,
    qkv_bias: bool,
    out_bias: bool,
    scale: float | None,
    no_causal: bool,
    cache: bool,
    attention_mask: bool,
    padding: str,
    position_ids: bool,
    target: str,
    dtype: str | None,
    providers: tuple[str, ...],
    static: bool,
    batch: int | None,
    seed: int,
    out: Path | None,
    no_validate: bool,
    as_json: bool,
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
    if batch is not None and not static:
        raise click.UsageError(f"--batch {batch} is for static graphs: give --static too")
    if qk_norm_eps is not None and not qk_norm:
        raise click.UsageError(f"--qk-norm-eps {qk_norm_eps:g} is of a norm: give --qk-norm too")
    _check_source(context, checkpoint, layer, family)
    out = out or _default_folder(checkpoint, layer or 0)
    found = None
    if checkpoint is not None:
        from rope_export.pretrained.geometry import layer_at

        found = layer_at(checkpoint, layer or 0, family)
    steps("loading PyTorch")
    from rope_export import artifact
    from rope_export.exporter import export

    artifact.check_destination(out)
    origin = ""
    shape: dict[str, Any]
    if checkpoint is not None and found is not None:
        from rope_export.attention import Attention

        steps(f"reading layer {found.index} of {checkpoint}")
        seq = seq or min(_DEFAULT_LENGTH, found.max_position_embeddings)
        attention = Attention.from_checkpoint(
            checkpoint, found.index, family=family, dtype=dtype, max_seq_len=seq
        )
        origin = f"{'checkpoint':<12} {checkpoint}, {found.summary()}"
        shape = {
            "checkpoint": checkpoint.resolve().name,
            "layer": found.index,
            "family": found.family,
            "max_seq_len": seq,
            "dtype": str(attention.dtype).removeprefix("torch."),
        }
    else:
        from rope_export.synthetic import random_block

        shape = {
            "hidden_size": hidden,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
            "theta": theta,
            "scaling": scaling,
            "rotary_dim": rotary_dim,
            "layout": layout,
            "max_seq_len": seq or _DEFAULT_LENGTH,
            "value_head_dim": value_head_dim,
            "causal": not no_causal,
            "window": window,
            "softcap": softcap,
            "sinks": sinks,
            "qk_norm": qk_norm,
            "qk_norm_eps": 1e-6 if qk_norm_eps is None else qk_norm_eps,
            "qkv_bias": qkv_bias,
            "out_bias": out_bias,
            "scale": scale,
            "dtype": dtype or "float32",
        }
        attention = random_block(seed=seed, **shape)
    interface: dict[str, Any] = {
        "position_ids": position_ids,
        "cache": cache,
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
        max_seq_len=shape["max_seq_len"],
        **interface,
        seed=seed,
        validate=not no_validate,
        validate_on=providers,
        options={
            **shape,
            "target": target,
            "providers": list(providers),
            **interface,
            "seed": seed,
            "validate": not no_validate,
        },
        progress=steps,
    )
    show.finish(result.report, out, as_json=as_json, origin=origin)


def _check_source(
    context: click.Context, checkpoint: Path | None, layer: int | None, family: str | None
) -> None:
    """Refuse options of a random block with a checkpoint, and the other way round."""
    for name, value in (("--layer", layer), ("--family", family)):
        if checkpoint is None and value is not None:
            raise click.UsageError(f"{name} {value} is of a checkpoint: give --from too")
    if checkpoint is None:
        return
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "")
        if parameter.name in _OF_A_RANDOM_BLOCK and given is ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{parameter.opts[0]} is for the checkpoint to say: leave it out with --from"
            )


def _default_folder(checkpoint: Path | None, layer: int) -> Path:
    name = "block" if checkpoint is None else f"{checkpoint.resolve().name}-layer-{layer}"
    return Path("exported") / name
