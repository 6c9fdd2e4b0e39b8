"""FlexAttention in a graph: what score_mod and mask_mod say, written out in plain operators.

PyTorch compiles them into a kernel of its own; as operators they are functions of a score and of
four indices, which broadcast over the whole grid of scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.attention.flex_attention as flex
from torch import Tensor
from torch.nn import functional as F


@contextmanager
def flex_written_out() -> Iterator[None]:
    """Have calls of ``flex_attention`` compute in plain operators while the context lasts."""
    with ExitStack() as stack:
        for name, value in (
            ("flex_attention_hop", _attend),
            ("_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True),
        ):
            stack.enter_context(mock.patch.object(flex, name, value, create=True))
        yield


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor],
    block_mask: Sequence[Any],
    scale: float,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the operator of the same name.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[B or 1, K, T, D]``, where K divides H.
        value: ``[B or 1, K, T, E]``.
        score_mod: from scores and the indices of batch, head, query and key to scores.
        block_mask: ends with ``mask_mod``, from the same indices to whether a key is seen.
        scale: of the scores.

    Returns:
        the context ``[B, H, S, E]``, the logarithms of the sums ``[B, H, S]``, the largest scores.
    """
    batch, heads, new = query.shape[:3]
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    sizes = batch, heads, new, key.shape[2]
    indices = []
    for axis, size in enumerate(sizes):
        shape = [1] * 4
        shape[axis] = size
        indices.append(torch.arange(size, device=query.device).reshape(shape))
    seen = block_mask[-1](*indices)
    if score_mod is flex._identity:
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen.expand(sizes), scale=scale
        )
        return context, context.new_empty(0), context.new_empty(0)
    working = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(working) @ key.to(working).transpose(-1, -2)) * scale
    scores = score_mod(scores, *indices)
    scores = torch.where(seen, scores, float("-inf"))
    # Counted: a maximum needs cuDNN on CUDA.
    count = (scores != float("-inf")).to(working).sum(-1, keepdim=True)
    weights = torch.where(count == 0, 0.0, scores.softmax(-1))
    context = (weights @ value.to(working)).to(query.dtype)
    return context, scores.logsumexp(-1), scores.amax(-1)


def forget_tables(program: torch.export.ExportedProgram) -> None:
    """Let go of tables of blocks, which nothing but assertions on their dtypes holds any more."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        asserts = node.target is torch.ops.aten._assert_tensor_metadata.default
        if asserts and "flex_attention" in str(node.meta.get("stack_trace")):
            graph.erase_node(node)
    program.graph_module.recompile()
