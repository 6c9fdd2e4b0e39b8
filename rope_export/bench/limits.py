"""What a machine can do: a large product, and a large copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from rope_export.bench.turns import Job, Step

MATMUL, COPY = "matmul", "copy"
_WIDTHS = {"cpu": 2048, "cuda": 8192}
_COPIED_BYTES = 2**28


def matmul_flops(provider: str) -> int:
    """Floating-point operations of the product."""
    return 2 * _WIDTHS[provider] ** 3


def copied_bytes() -> int:
    """Bytes the copy reads and writes."""
    return 2 * _COPIED_BYTES


def _matmul(job: Job) -> Step:
    import torch

    width = _WIDTHS[job.provider]
    a, b = (torch.randn(width, width, device=job.provider).to(_dtype(job)) for _ in range(2))
    return _timed(job, lambda: a @ b)


def _copy(job: Job) -> Step:
    import torch

    dtype = _dtype(job)
    source = torch.ones(_COPIED_BYTES // dtype.itemsize, dtype=dtype, device=job.provider)
    target = torch.empty_like(source)
    return _timed(job, lambda: target.copy_(source))


def _timed(job: Job, run: object) -> Step:
    import torch

    assert callable(run)

    def step() -> None:
        run()
        if job.provider == "cuda":
            torch.cuda.synchronize()

    return Step(step, lambda _: np.zeros(0))


def _dtype(job: Job) -> Any:
    """That of the block, but for processors, which multiply in float32."""
    import torch

    if job.provider == "cpu":
        return torch.float32
    return getattr(torch, json.loads((Path(job.folder) / "facts.json").read_text())["dtype"])


STEPS = {MATMUL: _matmul, COPY: _copy}
