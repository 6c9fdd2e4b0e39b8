"""Rotating pairs of channels: one meaning, written once for each who runs it.

`rotate_pairs` is what all of the package calls. Which formulation is fast depends on who
generates the code: benchmarks/rotation.py keeps the measurements behind every choice here.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

Layout = Literal["half", "interleaved"]
LAYOUTS: tuple[str, ...] = get_args(Layout)

_NARROW = (torch.float16, torch.bfloat16)
# Elements turned at a time in eager PyTorch: temporaries of 8 MiB, whose memory the allocator
# keeps instead of returning its pages to the system and zeroing new ones.
_BLOCK = 1 << 22
# Elements up to which plain arithmetic is faster than an autograd function of its own: measured.
_SMALL = 1 << 16


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, *, layout: Layout) -> Tensor:
    """Rotate the first ``r`` channels of every head and pass the rest through.

    The arithmetic is float32 for narrower inputs; the result returns in the input's dtype.
    ``layout="half"`` pairs channel ``i`` with ``i + r/2`` (Llama, GPT-NeoX),
    ``"interleaved"`` pairs ``2i`` with ``2i + 1`` (RoFormer, GPT-J). The gradient is the rotation
    by the opposite angle; nothing but the angles is kept for it.

    Args:
        x: ``[..., D]`` with ``D >= r``.
        cos: ``[..., r / 2]``, broadcastable against ``x`` without its last axis.
        sin: as ``cos``.
        layout: which channels form a pair.

    Returns:
        a tensor shaped and typed like ``x``.
    """
    # What trains the angles, and graphs to be read by others, get the plain arithmetic.
    plain = cos.requires_grad or sin.requires_grad or torch.compiler.is_exporting()
    if plain or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return _arithmetic(x, cos, sin, layout)
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        turned: Tensor = _in_graph(x, cos, sin, layout)
    elif x.numel() <= _SMALL and not (x.requires_grad and torch.is_grad_enabled()):
        turned = _in_one(x, cos, sin, layout)  # decoding: calls cost more than memory
    else:
        turned = _Eager.apply(x, cos, sin, layout)  # type: ignore[no-untyped-call]
    return turned


# Below Dynamo, which cannot tell the offset of an input in memory.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _in_graph(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    turned: Tensor = _Compiled.apply(x, cos, sin, layout)  # type: ignore[no-untyped-call]
    return turned


def split_pairs(x: Tensor, half: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """First and second channels of the first ``half`` pairs."""
    if layout == "half":
        return x[..., :half], x[..., half : 2 * half]
    first, second = x[..., : 2 * half].unflatten(-1, (half, 2)).unbind(-1)
    return first, second


def join_pairs(first: Tensor, second: Tensor, layout: Layout) -> Tensor:
    """The opposite of `split_pairs`."""
    if layout == "half":
        return torch.cat((first, second), dim=-1)
    return torch.stack((first, second), dim=-1).flatten(-2)


def _arithmetic(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    half = cos.shape[-1]
    a, b = split_pairs(x, half, layout)
    if x.dtype in _NARROW:
        a, b = a.float(), b.float()
    # Rounded before they are joined: what Inductor joins, it writes to memory in between.
    turned = (a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)
    if x.shape[-1] == 2 * half:
        return join_pairs(*turned, layout)
    parts = turned if layout == "half" else (join_pairs(*turned, layout),)
    return torch.cat((*parts, x[..., 2 * half :]), dim=-1)


def _in_words(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved bfloat16 pairs as the halves of int32 words: every load and store is contiguous.

    The view passes through float32 because Inductor's loads of int32 take a detour on AVX2.
    """
    word = x.view(torch.float32).view(torch.int32)
    a, b = (word << 16).view(torch.float32), (word & -65536).view(torch.float32)
    low, high = (_rounded_up(t.view(torch.int32)) for t in (a * cos - b * sin, b * cos + a * sin))
    return (((low >> 16) & 0xFFFF) | (high & -65536)).view(x.dtype)


def _rounded_up(bits: Tensor) -> Tensor:
    """Bits of float32 whose upper half is the nearest bfloat16, ties to even."""
    return bits + (0x7FFF + ((bits >> 16) & 1))


def _in_memory_order(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    """For a compiler: ``[B, S, H, D]`` seen as ``[B, H, S, D]`` is turned as it lies."""
    if x.ndim == 4 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
        cos, sin = (
            t if t.ndim < 2 else t.unsqueeze(-2) if t.ndim == 2 else t.transpose(-3, -2)
            for t in (cos, sin)
        )
        return _in_memory_order(x.transpose(1, 2), cos, sin, layout).transpose(1, 2)
    words = (
        layout == "interleaved"
        and x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.shape[-1] == 2 * cos.shape[-1]
        and x.is_contiguous()
        and x.storage_offset() % 2 == 0  # a view of wider elements must start at one
    )
    return _in_words(x, cos, sin) if words else _arithmetic(x, cos, sin, layout)


def _in_one(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    """The numbers of `_in_blocks`, in fewer calls."""
    half = cos.shape[-1]
    a, b = split_pairs(x, half, layout)
    if x.dtype in _NARROW:
        a, b = a.float(), b.float()
    first = torch.addcmul(a * cos, b, sin, value=-1)
    turned = join_pairs(first, torch.addcmul(b * cos, a, sin), layout).to(x.dtype)
    return turned if x.shape[-1] == 2 * half else torch.cat((turned, x[..., 2 * half :]), dim=-1)


def _in_blocks(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    """For eager PyTorch: half the passes over memory, narrow dtypes a block of tokens at a time."""
    if x.ndim < 2 or x.numel() == 0:
        return _arithmetic(x, cos, sin, layout)
    half, length = cos.shape[-1], x.shape[-2]
    out = torch.empty_like(x)
    if x.shape[-1] > 2 * half:
        out[..., 2 * half :] = x[..., 2 * half :]
    narrow = x.dtype in _NARROW  # these need float32 temporaries
    rows = max(1, _BLOCK * length // x.numel()) if narrow else length
    cos, sin = (t.expand(*t.shape[:-2], length, half) for t in (cos, sin))
    blocks = (t.split(rows, dim=-2) for t in (x, out, cos, sin))
    for x_block, out_block, c, s in zip(*blocks, strict=True):
        (a, b), (p, q) = (split_pairs(t, half, layout) for t in (x_block, out_block))
        if narrow:
            a, b = a.float(), b.float()
            p.copy_((a * c).addcmul_(b, s, value=-1))
            q.copy_(b.mul_(c).addcmul_(a, s))
        else:
            torch.mul(a, c, out=p).addcmul_(b, s, value=-1)
            torch.mul(b, c, out=q).addcmul_(a, s)
    return out


class _Compiled(torch.autograd.Function):
    """The rotation for compilers, and for devices other than the CPU."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        """Rotate."""
        return _in_memory_order(x, cos, sin, layout)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the angles."""
        del output
        _, cos, sin, ctx.layout = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Rotate back."""
        cos, sin = ctx.saved_tensors
        turned = _Compiled.apply(gradients[0], cos, -sin, ctx.layout)  # type: ignore[no-untyped-call]
        return turned, None, None, None


class _Eager(torch.autograd.Function):
    """The rotation for eager PyTorch on the CPU."""

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        """Rotate."""
        return _in_blocks(x, cos, sin, layout)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the angles."""
        del output
        _, cos, sin, ctx.layout = inputs
        ctx.save_for_backward(cos, sin)
        ctx.save_for_forward(cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Rotate back."""
        cos, sin = ctx.saved_tensors
        turned = _Eager.apply(gradients[0], cos, -sin, ctx.layout)  # type: ignore[no-untyped-call]
        return turned, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """Rotate the tangent: a rotation is linear."""
        cos, sin = ctx.saved_tensors
        turned: Tensor = _Eager.apply(tangents[0], cos, sin, ctx.layout)  # type: ignore[no-untyped-call]
        return turned

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, cos: Tensor, sin: Tensor, layout: Layout
    ) -> tuple[Tensor, int]:
        """Rotate along a mapped axis, by plain arithmetic."""
        del info
        turn = torch.vmap(lambda x, cos, sin: _arithmetic(x, cos, sin, layout), in_dims[:3])
        return turn(x, cos, sin), 0
