"""``rope-export module``: export a module of the user's own, then prove it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from rope_export.errors import BadInputError

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

_OPTIONS = {
    "dynamic_shapes must": "--dynamic must",
    "dynamic_shapes of": "--dynamic of",
    "max_seq_len": "--seq",
    **ONNXRUNTIME,
}


@click.command(
    epilog="""\b
FACTORY is a function without arguments that returns the module and example inputs:
  def factory():
      model = LanguageModel(); model.load_state_dict(torch.load("model.pt"))
      return model, {"input_ids": torch.randint(0, 50, (2, 16))}
Inputs are a mapping by name or a tuple; dynamic shapes, as of export, may follow. Or it returns a
mapping, whose keys are the arguments of rope_export.export:
  module          what is exported; the only one that must be there, with args or kwargs
  args, kwargs    example inputs, positional and by name
  dynamic_shapes  which axes vary, such as {"input_ids": {0: "batch", 1: "sequence"}}
  inputs          draws inputs of the proof: called with a dict of label sizes, {"batch": 2,
                  "sequence": 7}, and a numpy.random.Generator; returns a dict of arrays or tensors
                  by argument; those it leaves out are drawn from the examples
  output_names    of the outputs that are no cache, in order
Examples:
  rope-export module train.py:factory --dynamic input_ids:0=batch --dynamic input_ids:1=sequence
  rope-export module models.lm:factory --range sequence=1:4096 --target onnx --json"""
)
@click.argument("factory", metavar="FILE.py:FACTORY")
@click.option(
    "--dynamic",
    multiple=True,
    metavar="NAME:AXIS=LABEL",
    help="Let an axis of an input vary; repeatable. A label is a name, or a sum of names such as "
    "past_sequence+sequence. The name of a nested argument stands for all of its tensors.",
)
@click.option(
    "--range",
    "ranges",
    multiple=True,
    metavar="LABEL=MIN:MAX",
    help="Sizes of a label that are served and proven; either may be left out. Repeatable.",
)
@click.option(
    "--seq",
    type=click.IntRange(1, 2**24),
    default=None,
    help="Longest sequence served, cache included.  [default: the shortest table of a "
    "RotaryEmbedding inside, else the largest --range, or 4096]",
)
@click.option(
    "--padding",
    type=click.Choice(["right", "left"]),
    default="right",
    show_default=True,
    help="The side on which an input named attention_mask pads prompts.",
)
@target_option()
@provider_option(PROVIDERS_OF_AN_EXPORT)
@seed_option("Random inputs of the proof.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    help="Artifact folder; an earlier artifact there is replaced.  [default: exported/ and the "
    "name of the factory's file or module]",
)
@onnxruntime_option()
@no_validate_option()
@json_option()
@speaking_of_options(_OPTIONS)
def module(
    *,
    factory: str,
    dynamic: tuple[str, ...],
    ranges: tuple[str, ...],
    seq: int | None,
    padding: str,
    target: str,
    providers: tuple[str, ...],
    seed: int,
    out: Path | None,
    onnxruntime: str | None,
    no_validate: bool,
    as_json: bool,
) -> None:
    """Export any PyTorch module to ONNX and prove it equal to PyTorch.

    Every RotaryEmbedding and Attention of rope-export inside it lowers to the operators of the
    target; everything else as torch.onnx.export does it. The file is run as it stands, and what it
    prints goes to stderr.
    """
    labels = [_label(text) for text in dynamic]
    bounds = dict(_bounds(text) for text in ranges)
    _check_once("--dynamic", dynamic, [text.partition("=")[0] for text in dynamic])
    _check_once("--range", ranges, [text.partition("=")[0] for text in ranges])
    steps = show.Steps()
    if not no_validate:
        from rope_export import runtime

        for provider in providers:
            runtime.require(provider)
    if onnxruntime is not None:
        from rope_export.runtime import required

        required.chosen(onnxruntime, target, proven=not no_validate)
    steps("loading PyTorch")
    from rope_export.artifacts.folder import check_destination
    from rope_export.exporting.export import export

    from .factory import name_of, request_of, spoken_apart

    if out is None:
        out = Path("exported") / name_of(factory)
    check_destination(out)
    with spoken_apart():
        steps(f"running {factory}")
        request = request_of(factory)
        if labels and request.get("dynamic_shapes"):
            raise click.UsageError(
                f"--dynamic {dynamic[0]} and the dynamic shapes that {factory} returns: give one"
            )
        if labels:
            request["dynamic_shapes"] = _shapes(labels, bounds)
        elif bounds:
            raise click.UsageError(f"--range {ranges[0]} is of a label: give --dynamic too")
        try:
            result = export(
                request.pop("module"),
                out,
                **request,
                target=target,
                providers=providers or ("cpu",),
                max_seq_len=seq,
                padding=padding,
                seed=seed,
                onnxruntime=onnxruntime,
                validate=not no_validate,
                validate_on=providers,
                options={
                    "factory": _without_folders(factory),
                    "dynamic": list(dynamic),
                    "ranges": list(ranges),
                    "max_seq_len": seq,
                    "padding": padding,
                    "target": target,
                    "providers": list(providers),
                    "seed": seed,
                    "onnxruntime": onnxruntime,
                    "validate": not no_validate,
                },
                progress=steps,
            )
        except SystemExit as error:
            raise BadInputError(f"{factory}: its module raises SystemExit: {error}") from error
    show.finish(result.report, out, as_json=as_json)


def _check_once(option: str, texts: Sequence[str], keys: list[str]) -> None:
    for index, text in enumerate(texts):
        if keys[index] in keys[:index]:
            raise click.UsageError(f"{option} {text}: {keys[index]} is given twice")


def _label(text: str) -> tuple[str, int, str]:
    """``NAME:AXIS=LABEL``."""
    found = re.fullmatch(r"([^:=]+):(-?\d+)=(.+)", text)
    if found is None:
        raise click.UsageError(
            f"--dynamic {text}: must be NAME:AXIS=LABEL, such as input_ids:1=sequence"
        )
    return found[1], int(found[2]), found[3]


def _bounds(text: str) -> tuple[str, tuple[int | None, int | None]]:
    """``LABEL=MIN:MAX``."""
    found = re.fullmatch(r"([^=]+)=(\d*):(\d*)", text)
    if found is None or not (found[2] or found[3]):
        raise click.UsageError(f"--range {text}: must be LABEL=MIN:MAX, such as sequence=1:4096")
    low, high = (int(part) if part else None for part in (found[2], found[3]))
    if low is not None and high is not None and high < low:
        raise click.UsageError(f"--range {text}: MAX must be at least MIN")
    if high is not None and high == (low or 0):
        raise click.UsageError(f"--range {text}: is one size; leave the axis fixed instead")
    return found[1], (low, high)


def _shapes(
    labels: list[tuple[str, int, str]], bounds: dict[str, tuple[int | None, int | None]]
) -> dict[str, dict[int, Any]]:
    from torch.export import Dim

    shapes: dict[str, dict[int, Any]] = {}
    known = {label for _, _, label in labels}
    for label in bounds:
        if label not in known or not label.isidentifier():
            names = ", ".join(sorted(name for name in known if name.isidentifier()))
            raise BadInputError(f"--range must be of a label of --dynamic ({names}), got {label!r}")
    for name, axis, label in labels:
        given: Any = label
        if label in bounds:
            low, high = bounds[label]
            given = Dim(label, min=low, max=high)
        shapes.setdefault(name, {})[axis] = given
    return shapes


def _without_folders(factory: str) -> str:
    """What was run, without the folders of this machine."""
    where, _, name = factory.rpartition(":")
    return f"{Path(where).name}:{name}"
