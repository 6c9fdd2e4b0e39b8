"""PyTorch as it is here, absent included, and what it and the environment say of TF32."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rope_export.errors import first_line
from rope_export.runtime.packages import version_of

OVERRIDE = "NVIDIA_TF32_OVERRIDE"


def torch_module() -> Any:
    """PyTorch, where it is installed: nothing in this room depends on it."""
    return importlib.import_module("torch")


@dataclass(frozen=True)
class Device:
    """A GPU as PyTorch sees it.

    Attributes:
        name: its model.
        compute_capability: such as ``9.0``.
    """

    name: str
    compute_capability: str


@dataclass(frozen=True)
class Tf32:
    """Whether float32 products may be rounded to TF32 on CUDA.

    Attributes:
        sessions: of onnxruntime, as this package opens them: never.
        matmul: of PyTorch; None without it, or where it does not tell.
        cudnn: convolutions of PyTorch, likewise.
        matmul_precision: ``torch.get_float32_matmul_precision()``, likewise.
        override: the environment's NVIDIA_TF32_OVERRIDE, or None: 0 forbids it to every NVIDIA
            library, 1 forces it on them, whatever programs ask for.
    """

    sessions: bool
    matmul: bool | None
    cudnn: bool | None
    matmul_precision: str | None
    override: str | None


@dataclass(frozen=True)
class PyTorch:
    """PyTorch as it is here.

    Attributes:
        version: None when it is not installed.
        reason: why it does not import, or None.
        cuda: the CUDA version it was built for, or None.
        devices: what ``torch.cuda`` sees.
        remarks: what it warned of while it looked for devices.
    """

    version: str | None
    reason: str | None = None
    cuda: str | None = None
    devices: tuple[Device, ...] = ()
    remarks: tuple[str, ...] = ()

    @classmethod
    def here(cls) -> PyTorch:
        """Import PyTorch and look."""
        try:
            torch = torch_module()
        except ModuleNotFoundError as error:
            if error.name == "torch":
                return cls(None)
            return cls(version_of("torch") or "unknown", reason=first_line(error))
        except Exception as error:  # a library that does not load, a package half removed
            return cls(version_of("torch") or "unknown", reason=first_line(error))
        devices, remarks = _devices(torch)
        return cls(str(torch.__version__), None, torch.version.cuda, devices, remarks)

    @property
    def usable(self) -> bool:
        """Whether it is there and imports."""
        return self.version is not None and self.reason is None


def tf32(torch_is_usable: bool) -> Tf32:
    """What is set, without changing it."""
    override = os.environ.get(OVERRIDE)
    if not torch_is_usable:
        return Tf32(False, None, None, None, override)
    torch = torch_module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Tf32(
            sessions=False,
            matmul=_allowed(
                lambda: torch.backends.cuda.matmul.allow_tf32,
                lambda: torch.backends.cuda.matmul.fp32_precision,
            ),
            cudnn=_allowed(
                lambda: torch.backends.cudnn.allow_tf32,
                lambda: torch.backends.cudnn.conv.fp32_precision,
            ),
            matmul_precision=_told(torch.get_float32_matmul_precision),
            override=override,
        )


def _devices(torch: Any) -> tuple[tuple[Device, ...], tuple[str, ...]]:
    """What ``torch.cuda`` sees, and what it complains of."""
    found, complaints = [], []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
                major, minor = torch.cuda.get_device_capability(index)
                found.append(Device(torch.cuda.get_device_name(index), f"{major}.{minor}"))
        except RuntimeError as error:
            complaints.append(first_line(error))
    complaints += [" ".join(str(each.message).split()) for each in warned]
    return tuple(found), tuple(dict.fromkeys(complaints))


def _allowed(older: Callable[[], bool], newer: Callable[[], str]) -> bool | None:
    """A setting by the older name, or by the newer: once that was set, reading the older raises."""
    allowed = _told(older)
    if allowed is not None:
        return bool(allowed)
    precision = _told(newer)
    return None if precision is None else bool(precision == "tf32")


def _told(getter: Callable[[], Any]) -> Any:
    try:
        return getter()
    except (RuntimeError, AttributeError):
        return None
