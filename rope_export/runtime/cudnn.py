"""Which operators need cuDNN on CUDA, and whether it is here.

onnxruntime 1.31 loads cuDNN when it is there, and runs without: then the operators below fail when
they are run, not when the session opens. Each of them was run on its CUDA provider without cuDNN.
Left out are those that need it for some shapes only (ReduceMean, ReduceSumSquare and ReduceLogSum
along other axes than the last): they fail in onnxruntime's own words.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterable

from rope_export.errors import ProviderUnavailableError
from rope_export.runtime import packages

LIBRARY = "libcudnn.so.9"
_REDUCTIONS = ("L1", "L2", "LogSumExp", "Max", "Min", "Prod")
_POOLS = ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool")
NEEDED_BY = frozenset(
    {
        *(f"Reduce{kind}" for kind in _REDUCTIONS),
        *_POOLS,
        *("BatchNormalization", "Conv", "ConvTranspose", "Einsum"),
        *("InstanceNormalization", "LRN", "LSTM", "RNN"),
        *("com.microsoft::Attention", "com.microsoft::MultiHeadAttention"),
    }
)


def needing(operators: Iterable[str]) -> list[str]:
    """Those of ``operators`` (``domain::name``, or the standard's name) that need cuDNN on CUDA."""
    found = NEEDED_BY.intersection(operator.removeprefix("::") for operator in operators)
    return sorted(name.rpartition("::")[2] for name in found)


def needs(operators: Iterable[str]) -> str | None:
    """What is said of a graph for CUDA that needs cuDNN, or None."""
    found = needing(operators)
    if not found:
        return None
    return f"on CUDA this graph needs cuDNN 9 ({', '.join(found)})"


@functools.cache
def is_missing() -> bool:
    """Whether the loader does not find it; to be asked after CUDA's libraries are loaded."""
    if sys.platform != "linux":  # there nobody asks the loader
        return False
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return True
    return False


def remedy() -> str:
    """The command that brings it."""
    name, version = next(iter(packages.providing(packages.ONNXRUNTIME).items()), ("", ""))
    if "cudnn" in packages.extras_of(name):
        return f"pip install '{name}[cudnn]=={version}'"
    return "install cuDNN 9"


def require(operators: Iterable[str]) -> None:
    """Check that what runs on CUDA has the cuDNN it needs.

    Raises:
        ProviderUnavailableError: it has not.
    """
    found = needing(operators)
    if found and is_missing():
        raise ProviderUnavailableError(
            f"provider cuda cannot be used here: {', '.join(found)} of this graph needs cuDNN "
            f"there, and {LIBRARY} does not load: {remedy()}"
        )
