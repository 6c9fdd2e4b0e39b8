"""Which machine this is, and whether the provider runs on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from datetime import date

import onnxruntime
import torch

import rope_export
from rope_export import runtime
from visit.findings import Facts


def look(provider: str) -> Iterator[Facts]:
    """Versions, processors, and why the provider cannot be used."""
    found = {
        "unavailable": runtime.unavailable_reason(provider),
        "date": date.today().isoformat(),
        **runtime.environment(),
        **asdict(runtime.Machine.this()),
        "rope_export": rope_export.__version__,
        "onnxruntime_build": onnxruntime.get_build_info(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["capability"] = torch.cuda.get_device_capability()
        found["gpu_memory"] = torch.cuda.mem_get_info()
    yield found
