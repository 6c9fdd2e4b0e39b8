"""Libraries that stand in for CUDA's, made with the machine's C compiler: see device.c.

What they must export is read from onnxruntime's own provider library, so that nothing of NVIDIA's
is here. They are loaded by their full path, in the process of `worker` alone: no loader finds them
by itself, so nothing else ever mistakes them for a GPU.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
CUDNN = "libcudnn.so.9"
_SOURCES = {"cudart": "device.c"} | dict.fromkeys(("cublas", "cublasLt", "cudnn"), "handles.c")
_UNDEFINED = re.compile(
    r"\sUND\s+((?:__)?(?:cuda|cublas|curand|cudnn|cu[A-Z])\w*)(?:@+(\S+))?(?:\s+\(\d+\))?$"
)
# Looked up by name when it is there: the provider runs without cuDNN.
_LOOKED_UP = re.compile(rb"\0(cudnn[A-Z]\w+)(?=\0)")
_DEFINED = re.compile(r"^API .*?\*?\b(\w+)\(", re.MULTILINE)


def why_not(provider: Path) -> str | None:
    """Why the libraries cannot be made here, or None when they can."""
    if not provider.exists():
        return "this onnxruntime has no CUDA provider (onnxruntime-gpu has)"
    for tool in ("cc", "readelf"):
        if shutil.which(tool) is None:
            return f"there is no {tool} (a C compiler and binutils)"
    return None


def build(provider: Path, folder: Path) -> None:
    """Make the libraries that ``provider`` is linked to, of CUDA's, in ``folder``."""
    needed = re.findall(r"\(NEEDED\).*\[(.*?)\]", _readelf(provider, "-d"))
    wanted: dict[str, dict[str, str]] = defaultdict(dict)
    for line in _readelf(provider, "-W", "--dyn-syms").splitlines():
        if found := _UNDEFINED.search(line):
            symbol, version = found.group(1), found.group(2) or ""
            wanted[_library_of(symbol)][symbol] = version
    for name in needed:
        stem = name.removeprefix("lib").split(".so")[0]
        if stem in wanted or stem.startswith(("cu", "nv")):
            _compile(folder, name, stem, wanted.get(stem, {}))
    looked_up = {name.decode() for name in _LOOKED_UP.findall(provider.read_bytes())}
    _compile(folder, CUDNN, "cudnn", dict.fromkeys(looked_up, ""))


def load(folder: Path, *, cudnn: bool) -> ctypes.CDLL:
    """Load the libraries into this process, before onnxruntime looks for CUDA's.

    Args:
        folder: where `build` made them.
        cudnn: whether cuDNN is among them.

    Returns:
        the one of them that counts (the ``fake_cuda_`` functions of device.c).
    """
    loaded = {
        path.name: ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        for path in folder.glob("lib*.so*")
        if cudnn or path.name != CUDNN
    }
    return next(library for name, library in loaded.items() if name.startswith("libcudart"))


def _library_of(symbol: str) -> str:
    for stem in ("cublasLt", "cublas", "curand", "cudnn"):
        if symbol.startswith(stem):
            return stem
    return "cudart" if symbol.startswith(("cuda", "__cuda")) else "cuda"


def _compile(folder: Path, name: str, stem: str, wanted: dict[str, str]) -> None:
    source = (HERE / _SOURCES[stem]).read_text() if stem in _SOURCES else ""
    defined = set(_DEFINED.findall(source))
    others = [f"long {symbol}(void) {{ return 0; }}" for symbol in wanted if symbol not in defined]
    (folder / f"{stem}.c").write_text("\n".join([source, *others, "int fake_cuda_unused;\n"]))
    by_version: dict[str, list[str]] = defaultdict(list)
    for symbol, version in wanted.items():
        by_version[version].append(symbol)
    script = folder / f"{stem}.map"
    script.write_text(
        "".join(
            f"{version} {{ global: {'; '.join(symbols)}; }};\n"
            for version, symbols in by_version.items()
            if version
        )
    )
    subprocess.run(
        [
            *("cc", "-w", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{name}"),
            *([f"-Wl,--version-script={script}"] if script.stat().st_size else []),
            *("-o", str(folder / name), str(folder / f"{stem}.c")),
        ],
        check=True,
        capture_output=True,
        text=True,
    )


def _readelf(library: Path, *options: str) -> str:
    command = ["readelf", *options, str(library)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
