"""Running a module itself, in evaluation mode and uncompiled, and saying where it fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rope_export.exporting.blame import in_one_line
from rope_export.exporting.call import Call, Flat, Leaf, check_dtype
from rope_export.exporting.tracing import quiet_torch


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put every part of ``module`` in evaluation mode, and back into its own afterwards.

    Encoders of PyTorch's own are kept from their other implementation, which leaves padded tokens
    out: a graph is made of the plain one, and what it says of padding is compared. Warnings are
    kept back: a module runs many times here, and its owner has seen them.
    """
    training = [part for part in module.modules() if part.training]
    fast = torch.backends.mha.get_fastpath_enabled()
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with quiet_torch():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for part in training:
            part.training = True


def run_eagerly(
    call: Call,
    output_names: Sequence[str] | None,
    tensors: Sequence[Tensor],
    where: str,
    *,
    anew: bool = True,
) -> tuple[list[Leaf], list[Tensor]]:
    """Run the module itself, uncompiled.

    Args:
        call: how it is called.
        output_names: of its results that are no cache, or None.
        tensors: in place of the example's.
        where: the sizes they have, in words.
        anew: whether a copy runs, so that the module stays as it is.

    Returns:
        names of its results, and the results.

    Raises:
        BadInputError: it raises.
    """
    flat = Flat(call.fresh() if anew else call, output_names)
    with (
        in_one_line(f"at {where}"),
        evaluating(flat.module),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
    ):
        # Copies: a module may write into what it is given.
        results = flat(*(tensor.clone() for tensor in tensors))
    for leaf, result in zip(flat.outputs, results, strict=True):
        check_dtype(leaf.name, result)
    return flat.outputs, list(results)
