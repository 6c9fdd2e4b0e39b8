"""Which onnxruntime a graph needs, and the one line said where the one here is older.

Artifacts state it; of those that do not, and of any other graph, it is read from the graph.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from rope_export.artifacts.artifact import Artifact
from rope_export.errors import BadInputError, ProviderUnavailableError, first_line
from rope_export.inspection import since
from rope_export.runtime import packages
from rope_export.runtime.onnxruntime_build import Onnxruntime
from rope_export.runtime.providers import onnxruntime_module

DECLARED = "1.24"  # as in pyproject.toml: what export needs, and graphs of which nothing is known
# By target, the oldest that every kind of graph was replayed with, whatever it asks for.
OLDEST = {"ort": DECLARED, "onnx": DECLARED, "primitive": "1.15"}


def check(artifact: Artifact) -> None:
    """Check that the onnxruntime here is new enough for an artifact.

    Raises:
        ProviderUnavailableError: it is not.
    """
    graph = artifact.config["graph"]
    needed = graph.get("onnxruntime") or of_graph(artifact.model, graph["target"])
    if _is_older(needed):
        raise ProviderUnavailableError(f"this graph cannot run here: {_older(needed)}")


def of_graph(model: Path, target: str) -> str:
    """The oldest onnxruntime that runs a graph of a target and is right."""
    needed = OLDEST.get(target, DECLARED)
    # A graph that is damaged is for onnxruntime to refuse, in its words.
    return since.latest([needed, *(need.version for need in asked_for(model))])


def asked_for(model: Path) -> tuple[since.Need, ...]:
    """What a graph asks for that not every onnxruntime has; nothing of a file that is none."""
    import onnx

    try:
        return since.of_model(onnx.load(model, load_external_data=False))
    except Exception:
        return ()


def chosen(version: str | None, target: str, *, proven: bool) -> str:
    """The onnxruntime that a graph is to be made for, as major and minor number.

    Args:
        version: what was asked for, or None: the one that is installed.
        target: of the graph.
        proven: whether it is to be proven here.

    Raises:
        BadInputError: it is no version, or older than any that graphs of this target run in.
        ProviderUnavailableError: it is later than the one here, so that nothing can be proven.
    """
    oldest = OLDEST.get(target, DECLARED)
    here = _here()
    if version is None:
        return _minor(since.latest([oldest, here]))
    if not isinstance(version, str) or not re.fullmatch(r"\d{1,4}\.\d{1,4}(\.\d{1,4})?", version):
        raise BadInputError(f"onnxruntime must be a version such as {DECLARED!r}, got {version!r}")
    if since.is_older(version, oldest):
        others = [name for name, least in OLDEST.items() if not since.is_older(version, least)]
        instead = f" (target {' or '.join(others)} runs there)" if others else ""
        raise BadInputError(
            f"onnxruntime must be at least {oldest} with target {target}, got {version}{instead}"
        )
    if proven and since.is_older(here, version):
        name = _distribution()
        raise ProviderUnavailableError(
            f"a graph for onnxruntime {version} cannot be proven here: {name} {here} is installed; "
            f"pip install '{name}>={_minor(version)}', or export without a proof (--no-validate)"
        )
    return _minor(version)


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
    later = [need for need in since.of_model(proto) if _is_older(need.version)]
    if later:
        return f"the graph has {later[0].what}; {_older(later[0].version)}"
    if _is_older(DECLARED):
        return f"the graph does not load ({first_line(error)}); {_older(DECLARED)}"
    return None


def limits(version: str) -> Iterator[str]:
    """What graphs may ask for that an onnxruntime lacks with which export works, in one line."""
    if since.is_older(version, DECLARED):
        return
    lacking = [f for f in since.OURS if since.is_older(version, f.version)]
    lacking.sort(key=lambda feature: since.parts(feature.version))
    if lacking:
        listed = ", ".join(f"{feature.what} (>={feature.version})" for feature in lacking)
        yield f"graphs that have one of these need an onnxruntime later than {version}: {listed}"


def _is_older(needed: str) -> bool:
    return since.is_older(_here(), needed)


def _here() -> str:
    """The version that is installed; not imported for it."""
    stated = packages.providing(packages.ONNXRUNTIME) if _is_only_installed() else {}
    versions = [version for version in stated.values() if since.parts(version)]
    return versions[0] if versions else str(onnxruntime_module().__version__)


def _is_only_installed() -> bool:
    name = packages.ONNXRUNTIME
    return name not in sys.modules and packages.importable(name)


def _minor(version: str) -> str:
    return ".".join(str(number) for number in since.parts(version))


def _distribution() -> str:
    return next(iter(packages.providing(packages.ONNXRUNTIME)), packages.ONNXRUNTIME)


def _older(needed: str) -> str:
    name, here = _distribution(), _here()
    if not _is_older(needed):
        return f"{name} {here} is installed, a later one is needed: pip install --upgrade {name}"
    return f"{name} {here} is installed, >={needed} is needed: pip install '{name}>={needed}'"
