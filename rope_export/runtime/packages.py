"""What is installed: versions, who provides a module, and whether declared ranges are kept."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

OURSELVES = "rope-export"
# Without PyTorch a machine only runs what was exported elsewhere; these are then not missed.
OF_EXPORT_ALONE = ("torch", "onnxscript", "onnx-ir", "einops", "safetensors")
# Built under several names, all of one module: any of them will do, two break each other.
ONNXRUNTIME = "onnxruntime"


@dataclass(frozen=True)
class Dependency:
    """What this package declares to need, and what is there.

    Attributes:
        name: of the distribution, as declared.
        wanted: versions that will do, such as ``>=2.11``; "" for any.
        installed: the version that is there, or None.
        found: the name under which it was looked for: of onnxruntime, that of the build here.
        state: ``ok``, ``missing`` (its module is not there), or ``outside`` of the versions wanted.
    """

    name: str
    wanted: str
    installed: str | None
    found: str
    state: Literal["ok", "missing", "outside"]

    @property
    def fix(self) -> str:
        """The command that puts it right."""
        if self.state == "missing" and self.installed is not None:
            return f"pip install --force-reinstall --no-deps {self.found}=={self.installed}"
        wanted = f"'{self.found}{self.wanted}'" if self.wanted else self.found
        return f"pip install {wanted}"


def version_of(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def version_here(name: str) -> str | None:
    """Version of an installed distribution whose module is there, or None."""
    return version_of(name) if importable(name) else None


def providing(module: str) -> dict[str, str]:
    """Distributions that say they provide a top-level module, with their versions."""
    names = metadata.packages_distributions().get(module, [])
    found = {canonical(name): name for name in names if name}
    return {name: version_of(name) or "unknown" for name in sorted(found.values())}


def canonical(name: str) -> str:
    """One spelling for each distribution: ``Flash_Attn`` is ``flash-attn``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def extras_of(name: str) -> tuple[str, ...]:
    """Extras of an installed distribution."""
    try:
        return tuple(metadata.metadata(name).get_all("Provides-Extra") or ())
    except metadata.PackageNotFoundError:
        return ()


def dependencies() -> tuple[Dependency, ...] | None:
    """Every dependency this package declares for this platform, checked; None if not installed.

    Raises:
        ModuleNotFoundError: ``packaging``, which compares versions, is missing.
    """
    from packaging.requirements import Requirement

    try:
        declared = metadata.requires(OURSELVES) or []
    except metadata.PackageNotFoundError:
        return None
    requirements = [Requirement(text) for text in declared]
    return tuple(
        _checked(each.name, str(each.specifier))
        for each in requirements
        if each.marker is None or each.marker.evaluate({"extra": ""})
    )


def _checked(name: str, wanted: str) -> Dependency:
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    found = name
    if name.startswith(ONNXRUNTIME):
        there = providing(ONNXRUNTIME)
        found = name if name in there else next(iter(there), name)
    installed = version_of(found)
    if version_here(found) is None or installed is None:
        return Dependency(name, wanted, installed, found, "missing")
    try:
        kept = SpecifierSet(wanted).contains(installed, prereleases=True)
    except InvalidVersion:
        kept = False
    return Dependency(name, wanted, installed, found, "ok" if kept else "outside")


def importable(name: str) -> bool:
    """Whether the module of a distribution is there; nothing is imported."""
    module = ONNXRUNTIME if name.startswith(ONNXRUNTIME) else canonical(name).replace("-", "_")
    return importlib.util.find_spec(module) is not None
