"""``rope-export validate``: replay an artifact on the machine it is deployed to."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from . import show
from .options import json_option, provider_option


@click.command(
    epilog="""\b
Example:
  rope-export validate exported/block --provider cpu"""
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@provider_option(
    "Run on this provider, which must load; repeatable. Without it: the providers the graph was "
    "made for, and CUDA where it loads and has the operators."
)
@json_option()
def validate(folder: Path, providers: tuple[str, ...], as_json: bool) -> None:
    """Replay the test vectors of the artifact DIR with onnxruntime, without PyTorch.

    Checks first that no file has changed since the export, and that onnxruntime is not too old for
    the graph (exit code 3). Writes nothing.
    """
    from rope_export.runtime.replay import replay

    report = replay(folder, providers=providers, progress=show.Steps())
    show.show(report, folder, as_json=as_json)
    sys.exit(0 if report.passed else 1)
