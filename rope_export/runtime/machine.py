"""Processor, memory and NVIDIA GPUs of this machine, asked of the system alone."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from rope_export.runtime.providers import available_memory

_CPUINFO = Path("/proc/cpuinfo")
_DRIVER = Path("/proc/driver/nvidia")
_DEVICE = Path("/dev/nvidia0")


@dataclass(frozen=True)
class Machine:
    """This machine.

    Attributes:
        python: version.
        platform: operating system and architecture.
        cpu: model of the processor, as far as known.
        cpus: how many the machine has.
        usable_cpus: how many this process may use.
        memory: bytes of the machine, or None when unknown.
        available_memory: bytes that can still be allocated, or None when unknown.
        gpus: models of the NVIDIA GPUs the driver shows this process.
        driver: version of the NVIDIA driver, or None.
    """

    python: str
    platform: str
    cpu: str
    cpus: int | None
    usable_cpus: int | None
    memory: int | None
    available_memory: int | None
    gpus: tuple[str, ...]
    driver: str | None

    @classmethod
    def this(cls) -> Machine:
        """Look at this machine."""
        memory = available = None
        try:
            import psutil

            memory, available = int(psutil.virtual_memory().total), available_memory()
        except ImportError:
            pass  # a dependency that is missing, which is said with the others
        allowed = getattr(os, "sched_getaffinity", None)
        return cls(
            python=platform.python_version(),
            platform=platform.platform(),
            cpu=_cpu(),
            cpus=os.cpu_count(),
            usable_cpus=len(allowed(0)) if allowed else os.cpu_count(),
            memory=memory,
            available_memory=available,
            gpus=visible_gpus(),
            driver=_driver(),
        )


def visible_gpus() -> tuple[str, ...]:
    """Models of the NVIDIA GPUs the driver shows; none where CUDA_VISIBLE_DEVICES hides them."""
    if gpus_are_hidden():
        return ()
    models = []
    for file in sorted(_DRIVER.glob("gpus/*/information")):
        fields = dict(_fields(file))
        models.append(fields.get("Model", "NVIDIA GPU"))
    return tuple(models) or (("NVIDIA GPU",) if _DEVICE.exists() else ())


def gpus_are_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides every GPU from this process."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "NoDevFiles")


def _cpu() -> str:
    fields = dict(_fields(_CPUINFO))
    return fields.get("model name") or platform.processor() or platform.machine()


def _driver() -> str | None:
    text = " ".join(value for _, value in _fields(_DRIVER / "version"))
    parts = (part for part in text.split() if part.replace(".", "").isdigit() and "." in part)
    return next(parts, None)


def _fields(file: Path) -> list[tuple[str, str]]:
    """Lines of the form ``name: value``; of a name that comes twice the last counts."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    parts = (line.partition(":") for line in lines)
    return [(name.strip(), value.strip()) for name, colon, value in parts if colon]
