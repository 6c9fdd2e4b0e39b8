"""The ``freqs`` of a state dict: whether they are those expected, and where they are placed."""

from __future__ import annotations

import torch
from torch import Tensor


def placed_as(like: Tensor, values: Tensor) -> Tensor:
    """``values``, distributed as ``like`` is where it is sharded (FSDP2)."""
    if type(like.data) is Tensor:
        return values
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like.data, DTensor):
        return values
    values = values.to(like.device, like.dtype)
    return distribute_tensor(values, like.data.device_mesh, like.data.placements)


def same_frequencies(given: Tensor, freqs: Tensor) -> bool:
    """Whether stored frequencies are these, as far as the dtype they were stored in can say."""
    kept = given.detach().to("cpu")
    if kept.dtype in (torch.float16, torch.bfloat16):
        limits = torch.finfo(kept.dtype)
        rounding = limits.eps / 2 + 2e-6  # and what float32 formulas differ by
        atol = limits.tiny * limits.eps
        return torch.allclose(kept.double(), freqs, rtol=rounding, atol=atol)
    return torch.equal(kept.float(), freqs.float())
