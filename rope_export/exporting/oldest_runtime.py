"""The oldest onnxruntime a finished graph runs in: what the rules say, and what is in the graph."""

from __future__ import annotations

from pathlib import Path

import onnx

from rope_export.errors import BadInputError, ExportError
from rope_export.exporting.subject import Subject
from rope_export.inspection import since
from rope_export.runtime import providers, required, schemas


def oldest_onnxruntime(subject: Subject, model: Path, *, asked: bool) -> str:
    """Find the oldest onnxruntime in which a graph runs and is right.

    Args:
        subject: what was exported.
        model: its graph.
        asked: whether the caller said which onnxruntime it is for.

    Returns:
        major and minor number.

    Raises:
        BadInputError: the module has something that the one asked for lacks.
        ExportError: the onnxruntime here should know all of the graph and does not.
    """
    request = subject.request
    proto = onnx.load(model, load_external_data=False)
    needs = since.of_model(proto)
    # The rules know also what no node shows, and the graph what is none of theirs.
    of_rules = [choice.onnxruntime for choice in subject.interface.choices]
    oldest = since.latest(
        (required.OLDEST[request.target], *filter(None, of_rules), *(n.version for n in needs))
    )
    if asked and since.is_older(request.onnxruntime, oldest):
        what = f" has {needs[0].what}" if needs and needs[0].version == oldest else ""
        raise BadInputError(
            f"onnxruntime must be at least {oldest}: the graph of "
            f"{type(request.module).__name__}{what}, got {request.onnxruntime}"
        )
    here = providers.onnxruntime_module().__version__
    if not since.is_older(here, oldest):
        lacking = schemas.unknown(since.every_node(proto))
        if lacking is not None:
            raise ExportError(f"onnxruntime {here} has {lacking}: the graph cannot run in it")
    return oldest
