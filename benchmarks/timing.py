"""How long a step takes, on the CPU and on CUDA."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable

import torch

# Steps are launched while the device is busy with this, or launching would be timed: about 10 ms.
AHEAD_CYCLES = 20_000_000


# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def hold_memory() -> None:
    """Keep freed memory in the process, as a device's allocator does.

    glibc gives large blocks back at once; the pages of the next ones are then made anew, which
    takes longer than a copy, and differs from run to run.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_MMAP_MAX, 0)
            libc.mallopt(_TRIM_THRESHOLD, _NEVER)


def seconds(step: Callable[[], object], device: str) -> tuple[float, object]:
    """What one step takes, and what it returns; on CUDA without the time it takes to launch it."""
    if device != "cuda":
        start = time.perf_counter()
        result = step()
        return time.perf_counter() - start, result
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD_CYCLES)
    begin.record()
    result = step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, result
