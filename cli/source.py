"""What a block is made of: the options that say so, and the block itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from .options import JsonObject

if TYPE_CHECKING:
    from rope_export.attention.block import Attention
    from rope_export.pretrained.layer import Layer

F = TypeVar("F", bound=Callable[..., Any])

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
    "cache_dtype": "--cache-dtype",
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
DEFAULT_LENGTH = 4096
# Sizes no block has; beyond them a typing error is more likely than a model.
LONGEST, _WIDEST, _MOST_HEADS, _WIDEST_HEAD = 2**24, 2**20, 2**14, 2**14
# Of those, what the library calls otherwise.
_PARAMETERS = {"hidden": "hidden_size", "heads": "num_heads", "kv_heads": "num_kv_heads"}
_OPTIONS = (
    click.option(
        "--from",
        "checkpoint",
        type=click.Path(path_type=Path),
        default=None,
        metavar="DIR",
        help="Take shape, RoPE and weights from a local Hugging Face checkpoint (config.json and "
        "safetensors) instead of the options marked (R).",
    ),
    click.option(
        "--layer",
        type=click.IntRange(0),
        default=None,
        help="Which layer of the checkpoint.  [default: 0]",
    ),
    click.option(
        "--family",
        default=None,
        metavar="NAME",
        help="Read the checkpoint as this model_type instead of its own.",
    ),
    click.option(
        "--hidden",
        type=click.IntRange(1, _WIDEST),
        default=1024,
        show_default=True,
        help="(R) Width of the residual stream.",
    ),
    click.option(
        "--heads",
        type=click.IntRange(1, _MOST_HEADS),
        default=16,
        show_default=True,
        help="(R) Query heads.",
    ),
    click.option(
        "--kv-heads",
        type=click.IntRange(1, _MOST_HEADS),
        default=None,
        help="(R) Key and value heads: as --heads for multi-head, 1 for multi-query.  "
        "[default: --heads]",
    ),
    click.option(
        "--head-dim",
        type=click.IntRange(1, _WIDEST_HEAD),
        default=None,
        help="(R) Width of one head.  [default: --hidden / --heads]",
    ),
    click.option(
        "--theta", type=float, default=None, help="(R) Base of the RoPE.  [default: 10000]"
    ),
    click.option(
        "--scaling",
        type=JsonObject(),
        default=None,
        metavar="JSON|@FILE",
        help="(R) Hugging Face rope_parameters or rope_scaling: axial, default, dynamic, linear, "
        "llama3, longrope, mrope, ntk, proportional or yarn, for example "
        '\'{"rope_type": "yarn", "factor": 4}\'.',
    ),
    click.option(
        "--rotary-dim",
        type=click.IntRange(1, _WIDEST_HEAD),
        default=None,
        help="(R) Rotated part of each head.  [default: --head-dim]",
    ),
    click.option(
        "--layout",
        type=click.Choice(["half", "interleaved"]),
        default="half",
        show_default=True,
        help="(R) Which channels are rotated together: half as in Llama, interleaved as in GPT-J.",
    ),
    click.option(
        "--value-head-dim",
        type=click.IntRange(1, _WIDEST_HEAD),
        default=None,
        help="(R) Width of one value head.  [default: --head-dim]",
    ),
    click.option(
        "--window",
        type=click.IntRange(1, LONGEST),
        default=None,
        help="(R) Sliding window: a token sees the last N, itself included; with --no-causal those "
        "up to N away.  [default: all]",
    ),
    click.option(
        "--softcap", type=float, default=None, help="(R) Bound scores by F * tanh(s / F)."
    ),
    click.option("--sinks", is_flag=True, help="(R) A learned sink for each head (gpt-oss)."),
    click.option(
        "--qk-norm",
        is_flag=True,
        help="(R) RMS norm of query and key heads before the rotation (Qwen3).",
    ),
    click.option(
        "--qk-norm-eps",
        type=float,
        default=None,
        help="(R) Added to the mean square by --qk-norm.  [default: 1e-06]",
    ),
    click.option("--qkv-bias", is_flag=True, help="(R) Biases on queries, keys and values."),
    click.option("--out-bias", is_flag=True, help="(R) Bias on the output projection."),
    click.option(
        "--scale",
        type=float,
        default=None,
        help="(R) Factor on the scores.  [default: head dim ** -0.5]",
    ),
    click.option("--no-causal", is_flag=True, help="(R) Let every token see every other."),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float16", "bfloat16"]),
        default=None,
        help="Weights and activations.  [default: float32, or as the checkpoint has them; its "
        "bfloat16 weights become float32, exactly, where a provider has no bfloat16]",
    ),
)


def source_options(command: F) -> F:
    """Add the options that say what a block is; the command gets them by name."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class Source:
    """Where a block comes from: a checkpoint's layer, or random weights.

    Attributes:
        values: the options of `source_options`, by name.
        layer: what the checkpoint says of its layer.
    """

    values: dict[str, Any]
    layer: Layer | None

    @classmethod
    def read(cls, context: click.Context, values: dict[str, Any]) -> Source:
        """Check the options against each other, and read the checkpoint's configuration.

        Raises:
            click.UsageError: an option is not for this source.
            BadInputError: the checkpoint is none, or has no such layer.
        """
        epsilon, checkpoint = values["qk_norm_eps"], values["checkpoint"]
        if epsilon is not None and not values["qk_norm"]:
            raise click.UsageError(
                f"--qk-norm-eps {epsilon:g} is of a norm: give --qk-norm too", context
            )
        _check(context, values)
        found = None
        if checkpoint is not None:
            from rope_export.pretrained.geometry import layer_at

            found = layer_at(checkpoint, values["layer"] or 0, values["family"])
        return cls(values, found)

    @property
    def name(self) -> str:
        """Of its artifact."""
        checkpoint = self.values["checkpoint"]
        if checkpoint is None:
            return "block"
        return f"{checkpoint.resolve().name}-layer-{self.values['layer'] or 0}"

    def longest(self, seq: int | None) -> int:
        """Longest sequence served, where ``--seq`` says nothing."""
        if seq is not None:
            return seq
        if self.layer is not None:
            return min(DEFAULT_LENGTH, self.layer.max_position_embeddings)
        return DEFAULT_LENGTH

    def describe(self, longest: int, dtype: str) -> dict[str, Any]:
        """What makes the same block again, as an artifact keeps it."""
        values = self.values
        if self.layer is not None:
            return {
                "checkpoint": values["checkpoint"].resolve().name,
                "layer": self.layer.index,
                "family": self.layer.family,
                "max_seq_len": longest,
                "dtype": dtype,
            }
        renamed = {_PARAMETERS.get(name, name): values[name] for name in _OF_A_RANDOM_BLOCK}
        del renamed["no_causal"]
        return {
            **renamed,
            "max_seq_len": longest,
            "causal": not values["no_causal"],
            "qk_norm_eps": 1e-6 if values["qk_norm_eps"] is None else values["qk_norm_eps"],
            "dtype": dtype,
        }

    def widened(self, providers: Sequence[str]) -> str | None:
        """What to say where a checkpoint's weights must be widened to float32, else None.

        Raises:
            BadInputError: the weights are not what the configuration says.
        """
        if self.layer is None or self.values["dtype"] is not None:
            return None
        from rope_export.lowering import rules
        from rope_export.pretrained.weights import stored_dtype

        stored = stored_dtype(
            self.values["checkpoint"], self.layer.index, family=self.values["family"]
        )
        stored_as = str(stored).removeprefix("torch.")
        without = rules.lacking(stored_as, providers) if stored_as == "bfloat16" else []
        if not without:
            return None
        return (
            f"the checkpoint's weights are {stored_as} and were widened to float32, exactly: "
            f"onnxruntime has no {stored_as} kernels on {', '.join(without)}"
        )

    def make(self, longest: int, seed: int, *, dtype: str | None = None) -> Attention:
        """The block, for sequences of up to ``longest`` tokens.

        Args:
            longest: positions served.
            seed: of random weights.
            dtype: of the weights, where ``--dtype`` does not say it.

        Raises:
            BadInputError: an option is out of range, or the weights do not fit it or the machine.
        """
        dtype = self.values["dtype"] or dtype
        if self.layer is not None:
            from rope_export.attention.block import Attention

            return Attention.from_checkpoint(
                self.values["checkpoint"],
                self.layer.index,
                family=self.values["family"],
                dtype=dtype,
                max_seq_len=longest,
            )
        from rope_export.attention.random_block import random_block

        return random_block(seed=seed, **self.describe(longest, dtype or "float32"))

    def origin(self) -> str:
        """What the user is told of a checkpoint."""
        if self.layer is None:
            return ""
        return f"{'checkpoint':<12} {self.values['checkpoint']}, {self.layer.summary()}"


def _check(context: click.Context, values: dict[str, Any]) -> None:
    """Refuse options of a random block with a checkpoint, and the other way round."""
    if values["checkpoint"] is None:
        for name in ("layer", "family"):
            if values[name] is not None:
                raise click.UsageError(
                    f"--{name} {values[name]} is of a checkpoint: give --from too", context
                )
        return
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "")
        if parameter.name in _OF_A_RANDOM_BLOCK and given is ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{parameter.opts[0]} is for the checkpoint to say: leave it out with --from",
                context,
            )
