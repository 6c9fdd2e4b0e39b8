"""``rope-export block``: export one attention block, then prove it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from . import show
from .options import JsonObject, json_option, provider_option

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
}
# Sizes no block has; beyond them a typing error is more likely than a model.
_LONGEST, _WIDEST, _MOST_HEADS, _WIDEST_HEAD, _MOST_ROWS = 2**24, 2**20, 2**14, 2**14, 2**20


@click.command(
    epilog="""\b
Examples:
  rope-export block --seq 4096
  rope-export block --hidden 4096 --heads 32 --kv-heads 8 --theta 500000 --dtype float16
  rope-export block --seq 131072 --theta 500000 --scaling @rope_parameters.json
  rope-export block --cache --window 512 --kv-heads 4 --seq 8192
  rope-export block --seq 8192 --target onnx --layout interleaved --out exported/standard"""
)
@click.option(
    "--seq",
    type=click.IntRange(1, _LONGEST),
    default=4096,
    show_default=True,
    help="Longest sequence served.",
)
@click.option(
    "--hidden",
    type=click.IntRange(1, _WIDEST),
    default=1024,
    show_default=True,
    help="Width of the residual stream.",
)
@click.option(
    "--heads",
    type=click.IntRange(1, _MOST_HEADS),
    default=16,
    show_default=True,
    help="Query heads.",
)
@click.option(
    "--kv-heads",
    type=click.IntRange(1, _MOST_HEADS),
    default=None,
    help="Key and value heads: as --heads for multi-head, 1 for multi-query.  [default: --heads]",
)
@click.option(
    "--head-dim",
    type=click.IntRange(1, _WIDEST_HEAD),
    default=None,
    help="Width of one head.  [default: --hidden / --heads]",
)
@click.option("--theta", type=float, default=None, help="Base of the RoPE.  [default: 10000]")
@click.option(
    "--scaling",
    type=JsonObject(),
    default=None,
    metavar="JSON|@FILE",
    help="Hugging Face rope_parameters or rope_scaling: axial, default, dynamic, linear, llama3, "
    "longrope, mrope, ntk, proportional or yarn, for example "
    '\'{"rope_type": "yarn", "factor": 4}\'.',
)
@click.option(
    "--rotary-dim",
    type=click.IntRange(1, _WIDEST_HEAD),
    default=None,
    help="Rotated part of each head.  [default: --head-dim]",
)
@click.option(
    "--layout",
    type=click.Choice(["half", "interleaved"]),
    default="half",
    show_default=True,
    help="Which channels are rotated together: half as in Llama, interleaved as in GPT-J.",
)
@click.option(
    "--value-head-dim",
    type=click.IntRange(1, _WIDEST_HEAD),
    default=None,
    help="Width of one value head.  [default: --head-dim]",
)
@click.option(
    "--window",
    type=click.IntRange(1, _LONGEST),
    default=None,
    help="Sliding window: a token sees the last N, itself included; with --no-causal those up to N "
    "away.  [default: all]",
)
@click.option("--softcap", type=float, default=None, help="Bound scores by F * tanh(s / F).")
@click.option("--sinks", is_flag=True, help="A learned sink for each head (gpt-oss).")
@click.option(
    "--qk-norm", is_flag=True, help="RMS norm of query and key heads before the rotation (Qwen3)."
)
@click.option(
    "--qk-norm-eps",
    type=float,
    default=None,
    help="Added to the mean square by --qk-norm.  [default: 1e-06]",
)
@click.option("--qkv-bias", is_flag=True, help="Biases on queries, keys and values.")
@click.option("--out-bias", is_flag=True, help="Bias on the output projection.")
@click.option(
    "--scale", type=float, default=None, help="Factor on the scores.  [default: head dim ** -0.5]"
)
@click.option("--no-causal", is_flag=True, help="Let every token see every other.")
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
@click.option(
    "--target",
    type=click.Choice(["ort", "onnx", "primitive"]),
    default="ort",
    show_default=True,
    help="Operators: onnxruntime's fused ones, standard ONNX opset 23, or opset 18 arithmetic.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Weights and activations.",
)
@provider_option(
    "Make the graph for this provider and prove it there; repeatable.  [default: cpu, and proven "
    "on CUDA too where it loads and has the operators]"
)
@click.option("--static", is_flag=True, help="One batch and length instead of dynamic ones.")
@click.option(
    "--batch",
    type=click.IntRange(1, _MOST_ROWS),
    default=None,
    help="Rows of a static graph.  [default: 1]",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Random weights and inputs.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("exported/block"),
    show_default=True,
    help="Artifact folder; an earlier artifact there is replaced.",
)
@click.option("--no-validate", is_flag=True, help="Export without running the graph.")
@json_option()
def block(
    *,
    seq: int,
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
    dtype: str,
    providers: tuple[str, ...],
    static: bool,
    batch: int | None,
    seed: int,
    out: Path,
    no_validate: bool,
    as_json: bool,
) -> None:
    """Export an attention block with RoPE to ONNX and prove it equal to PyTorch.

    Random weights are drawn from --seed. The graph is run by onnxruntime at shapes it was never
    traced at and compared with eager PyTorch and with float64 truth.
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
    steps("loading PyTorch")
    from rope_export import artifact
    from rope_export.exporter import export
    from rope_export.synthetic import random_block

    artifact.check_destination(out)
    shape: dict[str, Any] = {
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "theta": theta,
        "scaling": scaling,
        "rotary_dim": rotary_dim,
        "layout": layout,
        "max_seq_len": seq,
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
        "dtype": dtype,
    }
    interface: dict[str, Any] = {
        "position_ids": position_ids,
        "cache": cache,
        "attention_mask": attention_mask,
        "padding": padding,
        "static": static,
        "batch": batch or 1,
    }
    attention = random_block(seed=seed, **shape)
    result = export(
        attention,
        out,
        target=target,
        providers=providers or ("cpu",),
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
    report = result.report
    replayable = any(out.glob("test_data_set_*"))
    then = f"rope-export validate {shlex.quote(str(out))}  (on the machine it is deployed to)"
    show.show(report, out, as_json=as_json, then=then if replayable else "")
    sys.exit(0 if no_validate or report.passed else 1)
