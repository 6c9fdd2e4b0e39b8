"""Which onnxruntime a graph needs, and the one line said where the one here is older.

Every kind of artifact was replayed with the CPU builds of onnxruntime 1.15 to 1.31; the numbers
below are the oldest that open it and agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rope_export.artifacts.artifact import Artifact
from rope_export.errors import ProviderUnavailableError, first_line
from rope_export.runtime import packages
from rope_export.runtime.onnxruntime_build import Onnxruntime
from rope_export.runtime.providers import onnxruntime_module

DECLARED = "1.24"  # as in pyproject.toml: what export needs, and graphs of which nothing is known
OLDEST = {"ort": DECLARED, "onnx": DECLARED, "primitive": "1.15"}
# Before, Scan wanted shapes of what its body gives, and found none.
WITH_CONTROL_FLOW = "1.25"
# Before, it was applied to scores before the mask hid them: silently wrong numbers.
WITH_SOFTCAP = "1.27"
_NEWEST = WITH_SOFTCAP
_BODIES = frozenset({"If", "Loop", "Scan"})


def check(artifact: Artifact) -> None:
    """Check that the onnxruntime here is new enough for an artifact.

    Raises:
        ProviderUnavailableError: it is not.
    """
    target = artifact.config["graph"]["target"]
    needed = OLDEST.get(target, DECLARED)
    # A graph that is damaged is for onnxruntime to refuse, in its words.
    if target != "primitive" and _is_older(_NEWEST) and artifact.model.is_file():
        import onnx

        try:
            nodes = onnx.load(artifact.model, load_external_data=False).graph.node
        except Exception:
            nodes = []
        needed = max((needed, *map(_needed_by, nodes)), key=_parts)
    if _is_older(needed):
        raise ProviderUnavailableError(f"this graph cannot run here: {_older(needed)}")


def why_not(model: Path, error: BaseException) -> str | None:
    """Why a graph that did not open cannot be opened by the onnxruntime here.

    Args:
        model: the file.
        error: what opening it raised.

    Returns:
        one line, or None: this one should have opened it.
    """
    import onnx

    try:
        proto = onnx.load(model, load_external_data=False)
    except Exception:
        return None
    opset = max((each.version for each in proto.opset_import if not each.domain), default=1)
    too_new = Onnxruntime.here().too_new(opset, proto.ir_version)
    if too_new is not None:
        return f"the graph is {too_new}; {_older(DECLARED)}"
    if _is_older(DECLARED):
        return f"the graph does not load ({first_line(error)}); {_older(DECLARED)}"
    return None


def limits(version: str) -> Iterator[str]:
    """What an onnxruntime that export works with does not run, one line each."""
    if not _parts(DECLARED) <= _parts(version) < _parts(_NEWEST):
        return
    for what, needed in (
        ("control flow (target ort with a cache)", WITH_CONTROL_FLOW),
        ("target onnx with a soft cap", WITH_SOFTCAP),
    ):
        if _parts(version) < _parts(needed):
            yield f"{what} needs onnxruntime >={needed}, {version} is installed"


def _needed_by(node: Any) -> str:
    if node.op_type in _BODIES:
        return WITH_CONTROL_FLOW
    softcap = [each.f for each in node.attribute if each.name == "softcap"]
    fused = node.op_type == "Attention" and not node.domain
    return WITH_SOFTCAP if fused and any(softcap) else "0"


def _is_older(needed: str) -> bool:
    return _parts(onnxruntime_module().__version__) < _parts(needed)


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _older(needed: str) -> str:
    name = next(iter(packages.providing(packages.ONNXRUNTIME)), packages.ONNXRUNTIME)
    here = onnxruntime_module().__version__
    if not _is_older(needed):
        return f"{name} {here} is installed, a later one is needed: pip install --upgrade {name}"
    return f"{name} {here} is installed, >={needed} is needed: pip install '{name}>={needed}'"
