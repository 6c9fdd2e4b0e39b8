"""`Attention`: the block around RoPE, written for one graph in training and for lowering."""

from __future__ import annotations

from pathlib import Path
from typing import overload

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from rope_export import dispatch
from rope_export.attention.cache_rounding import CacheRounding
from rope_export.attention.latent import LatentProjection
from rope_export.attention.norm import Norm
from rope_export.attention.specs import Latent, QKNorm
from rope_export.attention.tokens import Tokens
from rope_export.attention.visibility import token_order, visible_keys
from rope_export.attention.window_cache import WindowCall, check_capacity
from rope_export.attention.written_out import attend_explicitly
from rope_export.checks import finite_number, positive_integer
from rope_export.errors import BadInputError
from rope_export.rope.embedding import RotaryEmbedding

Cache = tuple[Tensor, Tensor]
_MASK_DTYPES = (torch.bool, torch.int32, torch.int64)


class Attention(nn.Module):
    """Self-attention with rotary positions: multi-head, grouped-query or multi-query.

    Eager and compiled, it is ``F.scaled_dot_product_attention`` between four linear layers: one
    graph under ``torch.compile(fullgraph=True)``. Inside `rope_export.export` the same module
    lowers to the operators of the chosen target. With a soft cap or sinks, which PyTorch's fused
    kernels lack, the scores are written out and take memory quadratic in the length.

    Args:
        hidden_size: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of ``num_heads``: equal to it for multi-head,
            1 for multi-query attention (default ``num_heads``).
        head_dim: width of one query or key head (default ``hidden_size // num_heads``).
        value_head_dim: width of one value head (default ``head_dim``).
        rope: the rotary embedding applied to queries and keys, or None for no positions.
        causal: whether a token sees only itself and earlier tokens.
        window: sliding window: a causal token sees the last ``window`` tokens, itself included;
            without ``causal`` those up to ``window`` away on either side (as in transformers).
        softcap: scores ``s`` become ``softcap * tanh(s / softcap)`` (Gemma 2).
        sinks: a learned score for each head that takes part in the softmax and adds nothing
            (gpt-oss).
        qk_norm: True for an RMS norm with a learned weight on each query and key head, before the
            rotation (Qwen3), or another `QKNorm`.
        qk_norm_eps: added to the mean square where ``qk_norm`` is True, above 0.
        latent: keys, values and perhaps queries go through latents of these ranks (DeepSeek-V2);
            needs ``rope``, whose width every head shares, and as many key heads as query heads.
        qkv_bias: biases on the query, key and value projections.
        out_bias: bias on the output projection.
        scale: factor on the scores (default ``head_dim ** -0.5``).
        window_cache: whether a past holds no more than the window (and what there is room for
            beside it), instead of all tokens; needs ``window``, and says nothing to training.

    Raises:
        BadInputError: an argument is out of range; the message names it and its value.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        rope: RotaryEmbedding | None = None,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        qk_norm: bool | QKNorm = False,
        qk_norm_eps: float = 1e-6,
        latent: Latent | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        scale: float | None = None,
        window_cache: bool = False,
    ) -> None:
        super().__init__()
        hidden_size = positive_integer("hidden_size", hidden_size)
        num_heads = positive_integer("num_heads", num_heads)
        num_kv_heads = positive_integer(
            "num_kv_heads", num_heads if num_kv_heads is None else num_kv_heads
        )
        if num_heads % num_kv_heads:
            raise BadInputError(
                f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
            )
        if head_dim is None:
            if hidden_size % num_heads:
                raise BadInputError(
                    f"hidden_size must be a multiple of num_heads when head_dim is not given, "
                    f"got {hidden_size} and {num_heads}"
                )
            head_dim = hidden_size // num_heads
        head_dim = positive_integer("head_dim", head_dim)
        if rope is not None and rope.dim > head_dim:
            raise BadInputError(
                f"rotary_dim must be at most head_dim, got {rope.dim} and {head_dim}"
            )
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.value_head_dim = positive_integer(
            "value_head_dim", head_dim if value_head_dim is None else value_head_dim
        )
        self.causal = causal
        self.window = None if window is None else positive_integer("window", window)
        self.softcap = None if softcap is None else finite_number("softcap", softcap)
        self.scale = head_dim**-0.5 if scale is None else finite_number("scale", scale)
        self.rope = rope
        self.latent: LatentProjection | None = None
        if latent is None:
            self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=qkv_bias)
            self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
            self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.value_head_dim, bias=qkv_bias)
        else:
            self.latent = self._latent_projection(latent, qkv_bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * self.value_head_dim, hidden_size, bias=out_bias)
        eps = finite_number("qk_norm_eps", qk_norm_eps)
        norm = QKNorm(eps=eps) if qk_norm is True else qk_norm or None
        self.q_norm = Norm(norm, num_heads, head_dim) if norm else None
        self.k_norm = Norm(norm, num_kv_heads, head_dim) if norm else None
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sinks else None
        # Set where the cache holds integers (`calibration.with_rounded_cache`).
        self.cache_rounding: CacheRounding | None = None
        self.window_cache = window_cache
        if window_cache:
            self.check_window_cache()

    def check_window_cache(self) -> None:
        """Check that a cache may hold the window only.

        Raises:
            BadInputError: there is no window, or tokens see later ones.
        """
        if self.window is None:
            raise BadInputError(
                "a cache of the window needs attention with a window, got window=None"
            )
        if not self.causal:
            raise BadInputError("a cache of the window needs causal attention, got causal=False")

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        layer: int = 0,
        *,
        family: str | None = None,
        dtype: str | torch.dtype | None = None,
        max_seq_len: int | None = None,
    ) -> Attention:
        """Build the attention of one layer of a local Hugging Face checkpoint, with its weights.

        ``config.json`` says what the attention is, by the table of families
        (`rope_export.pretrained.families`), and only that layer's tensors are read, from
        safetensors. transformers is not needed, and nothing is unpickled.

        Args:
            path: the checkpoint's folder.
            layer: which layer, from 0.
            family: a row of the table, instead of that of ``model_type``.
            dtype: float32, float16 or bfloat16, by name or torch's (default: as stored, the widest
                where tensors differ). onnxruntime has no bfloat16 on the CPU: ``"float32"`` holds
                bfloat16 weights exactly.
            max_seq_len: positions served (default: ``max_position_embeddings``).

        Raises:
            BadInputError: the folder, a file, the family, the layer or a tensor is missing, broken,
                quantised, or not what the configuration says; the message names it.
        """
        # Convenience, against the floors: a class is made by its class method, and only those who
        # have a checkpoint need what reads one.
        from rope_export.pretrained.weights import load_attention

        return load_attention(path, layer, family=family, dtype=dtype, max_seq_len=max_seq_len)

    def _latent_projection(self, latent: Latent, *, qkv_bias: bool) -> LatentProjection:
        if self.rope is None or self.rope.dim >= self.head_dim:
            raise BadInputError(
                "latent needs a rope that rotates part of each head, got "
                f"{None if self.rope is None else self.rope.dim} of head_dim {self.head_dim}"
            )
        if self.num_kv_heads != self.num_heads:
            raise BadInputError(
                f"latent needs num_kv_heads equal to num_heads, got {self.num_kv_heads} and "
                f"{self.num_heads}"
            )
        if qkv_bias:
            raise BadInputError("latent has a bias of its own, got qkv_bias=True")
        return LatentProjection(
            latent,
            self.hidden_size,
            self.num_heads,
            rotary_dim=self.rope.dim,
            head_dim=self.head_dim,
            value_head_dim=self.value_head_dim,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.o_proj.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.o_proj.weight.device

    def extra_repr(self) -> str:
        """One line for ``print(module)``."""
        parts = [
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, causal={self.causal}, scale={self.scale:g}"
        ]
        if self.value_head_dim != self.head_dim:
            parts.append(f"value_head_dim={self.value_head_dim}")
        parts += [
            f"{name}={value:g}"
            for name, value in (("window", self.window), ("softcap", self.softcap))
            if value is not None
        ]
        parts += [
            f"{name}=True"
            for name, there in (
                ("sinks", self.sinks is not None),
                ("window_cache", self.window_cache),
            )
            if there
        ]
        return ", ".join(parts)

    def empty_cache(
        self, batch: int = 1, *, capacity: int | None = None, window_cache: bool | None = None
    ) -> Cache:
        """A past of no tokens, to begin with: ``[batch, num_kv_heads, 0, head_dim]`` twice.

        With ``window_cache`` (default: as built) there are ``capacity`` slots instead of 0: the
        window (default) or more. Keys then move every ``capacity - window + 1`` tokens instead of
        with each.

        Raises:
            BadInputError: the capacity is less than the window, or there is no window cache.
        """
        slots = 0
        if self._by_window(window_cache):
            assert self.window is not None
            slots = self.window if capacity is None else positive_integer("capacity", capacity)
            check_capacity("capacity", slots, self.window)
        elif capacity is not None:
            raise BadInputError(
                f"capacity is of a cache of the window (window_cache=True), got {capacity}"
            )
        dtype, *widths = self._stored()
        key, value = (
            torch.zeros(batch, self.num_kv_heads, slots, width, dtype=dtype, device=self.device)
            for width in widths
        )
        return key, value

    def _stored(self) -> tuple[torch.dtype, int, int]:
        """Dtype of a cache, and widths of its keys and values."""
        rounding = self.cache_rounding
        if rounding is None:
            return self.dtype, self.head_dim, self.value_head_dim
        key, value = (rounding.stored_width(w) for w in (self.head_dim, self.value_head_dim))
        return rounding.storage, key, value

    @overload
    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_ids: Tensor | None = None,
        offset: int | Tensor = 0,
        past: None = None,
        attention_mask: Tensor | None = None,
        window_cache: bool | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_ids: Tensor | None = None,
        offset: int | Tensor = 0,
        past: Cache,
        attention_mask: Tensor | None = None,
        window_cache: bool | None = None,
    ) -> tuple[Tensor, Cache]: ...

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_ids: Tensor | None = None,
        offset: int | Tensor = 0,
        past: Cache | None = None,
        attention_mask: Tensor | None = None,
        window_cache: bool | None = None,
    ) -> Tensor | tuple[Tensor, Cache]:
        """Attend within one batch of sequences, or to their cached past as well.

        Args:
            hidden_states: ``[B, S, hidden_size]``, the new tokens.
            position_ids: ``[S]`` or ``[B, S]`` integers for the rotation (``[axes, B, S]`` for a
                RoPE with several); implied as the tokens' places in their rows, from ``offset``.
                The causal order and the window stay those of the sequence.
            offset: added to implied positions, as an int or a 0-d integer tensor.
            past: rotated keys ``[B, num_kv_heads, P, head_dim]`` and values
                ``[B, num_kv_heads, P, value_head_dim]`` of earlier tokens, as an earlier call or
                `empty_cache` returned them. With ``window_cache``, ``P`` is its capacity, and the
                mask must say how many tokens there were.
            attention_mask: ``[B, P + S]``, 1 for a real token and 0 for padding, past first. A
                token's place in its row is the number of ones before it. Outputs at padded
                positions are unspecified. With ``window_cache`` ``[B, T]`` of the whole sequence.
            window_cache: whether ``past`` holds the window only (default: as built).

        Returns:
            ``[B, S, hidden_size]``; with ``past`` also the cache of ``P + S`` tokens, or of the
            latest ones in as many slots as ``past`` has.

        Raises:
            BadInputError: a shape or dtype does not fit.
        """
        target = dispatch.computer()
        if target is not None:
            tokens = Tokens(
                hidden_states,
                position_ids,
                offset,
                past,
                attention_mask,
                past is not None and self._by_window(window_cache),
            )
            context, kept = target.attend(self, tokens)
            lowered: Tensor = self.o_proj(context)
            return lowered if kept is None else (lowered, kept)
        by_window = past is not None and self._by_window(window_cache)
        self.check_inputs(hidden_states, past, attention_mask, by_window=by_window)
        if past is not None and by_window:
            assert attention_mask is not None  # checked
            return self._with_window_cache(
                hidden_states, past, attention_mask, position_ids=position_ids, offset=offset
            )
        earlier = 0 if past is None else past[0].shape[-2]
        length = hidden_states.shape[1]
        order = real = None
        if attention_mask is not None:
            order, real = token_order(attention_mask), attention_mask != 0
            if position_ids is None:
                position_ids = order[:, earlier:] + offset
        elif past is not None:
            offset = offset + earlier
        q, k, v = self.heads(hidden_states, position_ids=position_ids, offset=offset)
        present: Cache | None = None
        if past is not None:
            if self.cache_rounding is not None:
                k, v = self.cache_rounding.encode(k, v)
            present = torch.cat((past[0], k), dim=-2), torch.cat((past[1], v), dim=-2)
            k, v = present
            if self.cache_rounding is not None:
                k, v = self.cache_rounding.decode(k, v)
        if order is None and past is None and self.window is None:
            output = self.merge(self.attend(q, k, v, is_causal=self.causal))
        else:
            if order is None:
                order = torch.arange(earlier + length, device=q.device)
            visible = visible_keys(
                order[..., earlier:], order, causal=self.causal, window=self.window, real=real
            )
            output = self.merge(self.attend(q, k, v, visible=visible))
        return output if present is None else (output, present)

    def _with_window_cache(
        self,
        hidden_states: Tensor,
        past: Cache,
        attention_mask: Tensor,
        *,
        position_ids: Tensor | None,
        offset: int | Tensor,
    ) -> tuple[Tensor, Cache]:
        new = attention_mask[:, attention_mask.shape[1] - hidden_states.shape[1] :]
        if position_ids is None:
            position_ids = token_order(attention_mask)[:, -hidden_states.shape[1] :] + offset
        q, k, v = self.heads(hidden_states, position_ids=position_ids)
        assert self.window is not None
        call = WindowCall.of(attention_mask, new, window=self.window, capacity=past[0].shape[-2])
        rounding = self.cache_rounding
        if rounding is not None:
            k, v = rounding.encode(k, v)
        k = torch.cat((call.cleared(past[0]), k), dim=-2)
        v = torch.cat((call.cleared(past[1]), v), dim=-2)
        present = call.kept(k), call.kept(v)
        if rounding is not None:
            k, v = rounding.decode(k, v)
        output = self.merge(self.attend(q, k, v, visible=call.visible))
        return output, present

    def _by_window(self, asked: bool | None) -> bool:
        by_window = self.window_cache if asked is None else asked
        if by_window:
            self.check_window_cache()
        return by_window

    def check_inputs(
        self,
        hidden_states: Tensor,
        past: Cache | None,
        attention_mask: Tensor | None,
        *,
        by_window: bool = False,
    ) -> None:
        """Check the shapes and dtypes of a past and a mask against those of the new tokens.

        With ``by_window`` the past holds the window only.

        Raises:
            BadInputError: one does not fit.
        """
        batch, length = hidden_states.shape[:2]
        earlier = 0
        if past is not None:
            earlier = past[0].shape[-2]
            dtype, *widths = self._stored()
            dtype = hidden_states.dtype if self.cache_rounding is None else dtype
            for name, given, width in zip(("keys", "values"), past, widths, strict=True):
                wanted = (batch, self.num_kv_heads, earlier, width)
                if tuple(given.shape) != wanted or given.dtype != dtype:
                    raise BadInputError(
                        f"past must hold {name} {wanted} of {dtype}, "
                        f"got {tuple(given.shape)} of {given.dtype}"
                    )
        if by_window:
            assert self.window is not None
            check_capacity("the slots of past", earlier, self.window)
            if attention_mask is None:
                raise BadInputError(
                    "attention_mask must say how many tokens there were before a past that holds "
                    "the window only, got None"
                )
        if attention_mask is not None:
            shape = tuple(attention_mask.shape)
            columns = f"{earlier + length}"
            fits = shape == (batch, earlier + length)
            if by_window:  # of which the cache is a part
                columns, fits = f"{length} or more", shape[:1] == (batch,) and len(shape) == 2
                fits = fits and shape[1] >= length
            if not fits or attention_mask.dtype not in _MASK_DTYPES:
                raise BadInputError(
                    f"attention_mask must be ({batch}, {columns}) of bool, int32 or int64 (past "
                    f"and new tokens), got {shape} of {attention_mask.dtype}"
                )

    def project(
        self, hidden_states: Tensor, *, widened: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project, and normalise queries and keys; with ``widened``, in float32 from there on.

        Returns:
            queries ``[B, S, num_heads * head_dim]``, keys ``[B, S, num_kv_heads * head_dim]`` and
            values ``[B, S, num_kv_heads * value_head_dim]``, not yet rotated.
        """
        if self.latent is not None:
            q, k, v = self.latent(hidden_states)
        else:
            q, k, v = (p(hidden_states) for p in (self.q_proj, self.k_proj, self.v_proj))
        if widened:
            q, k, v = q.float(), k.float(), v.float()
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def heads(
        self,
        hidden_states: Tensor,
        *,
        position_ids: Tensor | None = None,
        offset: int | Tensor = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project, normalise and rotate: ``[B, S, hidden_size]`` to queries, keys and values.

        Returns:
            ``[B, num_heads, S, head_dim]``, ``[B, num_kv_heads, S, head_dim]`` and
            ``[B, num_kv_heads, S, value_head_dim]``; queries and keys are rotated.
        """
        # By width, not by count: under tensor parallelism the heads here are fewer.
        widths = (self.head_dim, self.head_dim, self.value_head_dim)
        q, k, v = (
            rearrange(x, "b s (h d) -> b h s d", d=width)
            for x, width in zip(self.project(hidden_states), widths, strict=True)
        )
        if self.rope is not None:
            q, k = self.rope.rotate(q, k, position_ids=position_ids, offset=offset, seq_dim=-2)
        return q, k, v

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        is_causal: bool = False,
        visible: Tensor | None = None,
    ) -> Tensor:
        """Attention of projected heads, as `heads` returns them, with cap and sinks.

        Args:
            q: ``[B, num_heads, S, head_dim]``.
            k: ``[B, num_kv_heads, T, head_dim]``.
            v: ``[B, num_kv_heads, T, value_head_dim]``.
            is_causal: whether key ``j`` is hidden from query ``i < j``.
            visible: which keys each query sees, bool ``[S, T]`` or ``[B, S, T]``; or numbers of
                that shape and the dtype of ``q``, which are added to the scores.
        """
        if self.softcap is not None or self.sinks is not None:
            if is_causal:
                token = torch.arange(k.shape[-2], device=q.device)
                visible = visible_keys(token[: q.shape[-2]], token, causal=True, window=None)
            merged = attend_explicitly(
                q,
                k,
                v,
                scale=self.scale,
                visible=visible,
                softcap=self.softcap,
                sinks=self.sinks,
            )
            context: Tensor = rearrange(merged, "b s (h d) -> b h s d", h=self.num_heads)
            return context
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=visible if visible is None or visible.ndim == 2 else visible.unsqueeze(1),
            is_causal=is_causal,
            scale=self.scale,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )

    def merge(self, context: Tensor) -> Tensor:
        """Output projection of ``[B, num_heads, S, value_head_dim]``: ``[B, S, hidden_size]``."""
        output: Tensor = self.o_proj(rearrange(context, "b h s d -> b s (h d)"))
        return output

    @property
    def packs(self) -> bool:
        """Whether nothing stands between the projections and the rotation."""
        return self.latent is None and self.q_norm is None

    def packed_projection(self, hidden_states: Tensor) -> Tensor:
        """Queries, keys and values in one product: ``[B, S, heads * width]`` side by side."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        weight = torch.cat(tuple(p.weight for p in projections))
        biases = tuple(p.bias for p in projections if p.bias is not None)
        return F.linear(hidden_states, weight, torch.cat(biases) if biases else None)
