"""The onnxruntime that is here: which build, what it loads, and why a provider does not."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from rope_export.artifacts.targets import ENDPOINTS
from rope_export.errors import first_line
from rope_export.runtime import cudnn, packages, providers
from rope_export.runtime.libraries import missing_libraries

_DRIVER_LIBRARY = "libcuda.so.1"
# Tried from the first to the last; far beyond what any release loads.
_OPSETS, _IR_VERSIONS = range(7, 64), range(3, 64)


@dataclass(frozen=True)
class Onnxruntime:
    """The module ``onnxruntime``, and who brought it.

    Attributes:
        version: what the module says of itself, or None when it does not import.
        reason: why it does not, or None.
        distributions: those that provide it, with their versions; two break each other.
        cuda: the CUDA version it was built for, or None.
        highest_opset: the latest version of ai.onnx that it loads, or None when nothing opens.
        highest_ir_version: likewise of the format.
    """

    version: str | None
    reason: str | None
    distributions: dict[str, str]
    cuda: str | None
    highest_opset: int | None
    highest_ir_version: int | None

    @classmethod
    def here(cls) -> Onnxruntime:
        """Import it, and open graphs until one is too new."""
        distributions = packages.providing(packages.ONNXRUNTIME)
        try:
            module = providers.onnxruntime_module()
            version, _ = str(module.__version__), module.InferenceSession
        except Exception as error:  # a library that does not load, a package half removed
            return cls(None, first_line(error), distributions, None, None, None)
        return cls(
            version,
            None,
            distributions,
            _cuda_version(),
            _highest(_OPSETS, lambda opset: providers.tiny_model(opset=opset)),
            _highest(_IR_VERSIONS, lambda version: providers.tiny_model(ir_version=version)),
        )

    def too_new(self, opset: int, ir_version: int) -> str | None:
        """That graphs of this opset and IR version are not loaded, in plain words, or None."""
        highest, highest_ir = self.highest_opset, self.highest_ir_version
        if highest is None or highest_ir is None or (opset <= highest and ir_version <= highest_ir):
            return None
        return (
            f"opset {opset} in IR version {ir_version}, and onnxruntime {self.version} loads "
            f"opsets up to {highest} and IR versions up to {highest_ir}"
        )


@dataclass(frozen=True)
class Provider:
    """An execution provider, tried.

    Attributes:
        loads: whether a session on it opens and stays on it.
        reason: why not, or None.
        missing: libraries that the loader does not find, as far as known.
        remedy: what to do about it, or None.
        cudnn: of CUDA that loads, whether cuDNN does; else None.
    """

    loads: bool
    reason: str | None = None
    missing: tuple[str, ...] = ()
    remedy: str | None = None
    cudnn: bool | None = None

    @property
    def why(self) -> str:
        """Why it does not load, and what to do, in one line."""
        return "; ".join(part for part in (self.reason, self.remedy) if part)

    @classmethod
    def tried(cls, name: str, build: Onnxruntime) -> Provider:
        """Load ``name``."""
        if build.version is None:
            what = "does not import" if build.distributions else "is not installed"
            return cls(False, f"onnxruntime {what}: {build.reason}")
        try:
            if name == "cpu":
                with providers.quiet():
                    providers.open_session(providers.tiny_model(), name)
                return cls(True)
            reason = providers.unavailable_reason(name)
        except Exception as error:  # onnx is missing, of which the graph is made, or worse
            return cls(False, first_line(error))
        if reason is None:
            return cls(True, cudnn=not cudnn.is_missing())
        built_in = providers.onnxruntime_module().get_available_providers()
        if ENDPOINTS[name] not in built_in:
            return cls(False, reason, (), _with_gpu(build))
        missing = missing_libraries(providers.library_folder() / providers.CUDA_LIBRARY)
        if not missing:
            return cls(False, reason, (), "see what nvidia-smi says, and CUDA_VISIBLE_DEVICES")
        many = "is missing" if len(missing) == 1 else "are missing"
        return cls(False, f"{', '.join(missing)} {many}", missing, _with_libraries(missing, build))


def _cuda_version() -> str | None:
    try:
        info = importlib.import_module("onnxruntime.capi.build_and_package_info")
    except ImportError:
        return None
    return str(getattr(info, "cuda_version", "")) or None


def _highest(numbers: range, model: Callable[[int], bytes]) -> int | None:
    """The last number, counted up, whose graph opens."""
    highest = None
    with providers.quiet():
        for number in numbers:
            try:
                providers.open_session(model(number), "cpu")
            except Exception:
                break
            highest = number
    return highest


def _with_gpu(build: Onnxruntime) -> str:
    install = "pip install onnxruntime-gpu"
    names = " ".join(build.distributions)
    return f"pip uninstall -y {names} && {install}" if names else install


def _with_libraries(missing: tuple[str, ...], build: Onnxruntime) -> str:
    """What brings the missing libraries: the driver one of them, packages the others."""
    remedies = []
    if set(missing) - {_DRIVER_LIBRARY}:
        remedies.append(_of_packages(build))
    if _DRIVER_LIBRARY in missing:
        remedies.append(f"{_DRIVER_LIBRARY} comes with the NVIDIA driver, not with pip")
    return "; ".join(remedies)


def _of_packages(build: Onnxruntime) -> str:
    name, version = next(iter(build.distributions.items()), ("", ""))
    extras = [extra for extra in ("cuda", "cudnn") if extra in packages.extras_of(name)]
    if not extras:
        return f"install the libraries of CUDA {build.cuda or 12} and cuDNN 9"
    return f"pip install '{name}[{','.join(extras)}]=={version}'"
