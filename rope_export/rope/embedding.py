"""`RotaryEmbedding`: says which frequencies, chooses positions; `angles` and `rotation` compute."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rope_export import dispatch
from rope_export.checks import positive_integer
from rope_export.errors import BadInputError
from rope_export.rope import arguments
from rope_export.rope.angles import Angles, keeping_values
from rope_export.rope.frequencies import FreqsFor, Frequencies
from rope_export.rope.grids import angles_of_grid, coordinates
from rope_export.rope.heads import axis_of_sequence, check_same_length
from rope_export.rope.pairs import LAYOUTS, Layout
from rope_export.rope.positions import check_offset, check_position_ids
from rope_export.rope.rotation import (
    apply_rotary_emb,
    over_heads,
    repeat_for_pairs,
    rotate_sequence,
)
from rope_export.rope.stored_frequencies import placed_as, same_frequencies, unrounded
from rope_export.rope.xpos import Turns, XPos, scaled


class SupportsToDict(Protocol):
    """A configuration object, as those of transformers."""

    def to_dict(self) -> dict[str, Any]:
        """Its content."""
        ...


class RotaryEmbedding(nn.Module):
    """Rotary position embedding whose graph holds no data-dependent control flow.

    The arguments up to ``cache_max_seq_len``, the methods and the numbers are those of
    rotary-embedding-torch 0.9.1. Cosines and sines are computed in float64 and rounded once to
    float32; no cast of the module (``.to(torch.bfloat16)``) touches them, and nothing is cached or
    mutated in a forward pass, so no call depends on an earlier one.

    With ``max_seq_len`` the angles are one table of that many rows and longer sequences are
    refused. Without it every position below 2^25 is served by composing two tabled rotations
    (error below 1e-6), at the price of a second gather. Learned frequencies, and those that follow
    the length of the sequence, are multiplied out in float64 for each call.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).

    Args:
        dim: rotated width of each head, even. Heads may be wider: the rest passes through.
        custom_freqs: ``[r / 2]`` frequencies in radians per position, instead of all below.
        freqs_for: ``"lang"`` for the series of RoFormer, ``"pixel"`` for coordinates from -1 to 1,
            ``"constant"`` for frequencies of 1.
        theta: the base of the geometric series of frequencies (default ``scaling["rope_theta"]``,
            or 10000).
        max_freq: the highest frequency of ``"pixel"``.
        num_freqs: how many frequencies ``"constant"`` has.
        learned_freq: make the frequencies a parameter.
        use_xpos: scale queries and keys by position as `XPos` does.
        xpos_scale_base: positions over which xPos decays once.
        interpolate_factor: positions are divided by it (position interpolation).
        theta_rescale_factor: NTK-aware rescaling of the base.
        seq_before_head_dim: inputs are ``[B, S, H, D]`` rather than ``[B, H, S, D]``.
        cache_if_possible: accepted for compatibility; nothing is ever cached in a forward pass.
        cache_max_seq_len: likewise.
        layout: ``"interleaved"`` (pairs ``2i, 2i+1``; RoFormer, GPT-J, rotary-embedding-torch)
            or ``"half"`` (pairs ``i, i + dim/2``; Llama, GPT-NeoX).
        scaling: a Hugging Face ``rope_parameters`` or ``rope_scaling`` object, one of
            `rope_types.ROPE_TYPES`, or None for the original RoPE.
        max_seq_len: rows of the table, or None for any length.

    Raises:
        BadInputError: an argument is out of range, or two contradict each other; the message names
            them and their values.
    """

    freqs: Tensor
    apply_rotary_emb = staticmethod(apply_rotary_emb)

    def __init__(
        self,
        dim: int,
        custom_freqs: Tensor | None = None,
        freqs_for: FreqsFor = "lang",
        theta: float | None = None,
        max_freq: float = 10,
        num_freqs: int = 1,
        learned_freq: bool = False,
        use_xpos: bool = False,
        xpos_scale_base: float = 512,
        interpolate_factor: float = 1.0,
        theta_rescale_factor: float = 1.0,
        seq_before_head_dim: bool = False,
        cache_if_possible: bool = True,
        cache_max_seq_len: int = 8192,
        *,
        layout: Layout = "interleaved",
        scaling: Mapping[str, Any] | None = None,
        max_seq_len: int | None = None,
    ) -> None:
        super().__init__()
        dim = positive_integer("dim", dim, even=True)
        if layout not in LAYOUTS:
            raise BadInputError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        if max_seq_len is not None:
            max_seq_len = positive_integer("max_seq_len", max_seq_len)
        chosen = arguments.choose(
            dim,
            theta,
            custom_freqs=custom_freqs,
            freqs_for=freqs_for,
            max_freq=max_freq,
            num_freqs=num_freqs,
            interpolate_factor=interpolate_factor,
            theta_rescale_factor=theta_rescale_factor,
            scaling=scaling,
            max_seq_len=max_seq_len,
        )
        freqs, found = chosen.freqs, chosen.found
        if learned_freq and (found.beyond or found.stretch):
            raise BadInputError(
                "learned_freq=True needs a rope_type whose frequencies do not depend on the "
                f"length, got {scaling}"
            )
        if use_xpos and found.axes > 1:
            raise BadInputError(f"use_xpos=True needs one axis of positions, got scaling {scaling}")
        self.dim = 2 * len(freqs)
        self.theta = chosen.theta
        self.freqs_for = freqs_for
        self.learned_freq = learned_freq
        self.use_xpos = use_xpos
        self.interpolate_factor = interpolate_factor
        self.cache_if_possible = cache_if_possible
        self.cache_max_seq_len = positive_integer("cache_max_seq_len", cache_max_seq_len)
        self.seq_before_head_dim = seq_before_head_dim
        self.default_seq_dim = -3 if seq_before_head_dim else -2
        self.layout: Layout = layout
        self.scaling = None if scaling is None else dict(scaling)
        self.max_seq_len = max_seq_len
        # Plain float64, not buffers: what `reset_parameters` goes back to.
        self._freqs, self._found = freqs, found
        start = torch.empty(len(freqs), dtype=torch.float32)
        if learned_freq:
            self.freqs = nn.Parameter(start)
        else:
            self.register_buffer("freqs", start)
        device = self.freqs.device
        self.angles = Angles(
            found,
            max_seq_len,
            learned=learned_freq,
            interpolate_factor=interpolate_factor,
            device=device,
        )
        self.xpos = None
        if use_xpos:
            self.xpos = XPos(
                self.dim, xpos_scale_base, max_seq_len, interpolate_factor, device=device
            )
        self._fill_freqs()

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | str | Path | SupportsToDict,
        layer: int = 0,
        *,
        family: str | None = None,
        max_seq_len: int | None = None,
    ) -> RotaryEmbedding | None:
        """Build the RoPE of one layer of a Hugging Face model: layout, width, base and scaling.

        Args:
            config: content of its ``config.json``, the folder that holds one, or transformers'
                configuration object.
            layer: which layer, from 0.
            family: a row of `rope_export.pretrained.families`, instead of that of ``model_type``.
            max_seq_len: positions served (default: ``max_position_embeddings``).

        Returns:
            the RoPE, or None where the layer has none (SmolLM3, EXAONE 4, Command R7B).

        Raises:
            BadInputError: the family, the layer or a field is missing or of no use.
        """
        # Convenience, against the floors: a class is made by its class method, and only those who
        # have a configuration need what reads one.
        from rope_export.pretrained.geometry import layer_at, layer_of

        if isinstance(config, str | Path):
            found = layer_at(config, layer, family, rope_only=True)
        else:
            content = config if isinstance(config, Mapping) else config.to_dict()
            found = layer_of(content, layer, family, rope_only=True)
        if found.rope is None:
            return None
        return found.rope.embedding(max_seq_len or found.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Where the frequencies are."""
        return self.freqs.device

    @property
    def inv_freq(self) -> Tensor:
        """Inverse frequencies ``[r / 2]`` in radians per position, float64 on the host.

        Of a ``rope_type`` that moves, those of short sequences.
        """
        if self.learned_freq:
            return self.freqs.detach().to("cpu", torch.float64) / self.interpolate_factor
        return self._found.inv_freq

    @property
    def found(self) -> Frequencies:
        """Everything the RoPE type comes down to, with `inv_freq` as it is now."""
        return replace(
            self._found,
            inv_freq=self.inv_freq,
            beyond=self.angles.switch,
            stretch=self.angles.stretch,
        )

    @property
    def attention_factor(self) -> float:
        """What multiplies rotated pairs."""
        return self._found.attention_factor

    @property
    def axes(self) -> int:
        """How many positions a token has: 1, or as many as ``position_ids`` has leading rows."""
        return self._found.axes

    @property
    def positions(self) -> int:
        """How many positions are served: ``0 … positions - 1``."""
        served = self.angles.positions
        return served if self.xpos is None else min(served, self.xpos.positions())

    @property
    def scale_base(self) -> float:
        """Positions over which xPos decays once."""
        return self._xpos("scale_base").scale_base

    @property
    def scale(self) -> Tensor:
        """Decay of each pair under xPos over ``scale_base`` positions, ``[r / 2]`` float32."""
        return self._xpos("scale").log_decay.exp().to(torch.float32)

    def _xpos(self, name: str) -> XPos:
        if self.xpos is None:
            raise BadInputError(f"{name} needs use_xpos=True, got False")
        return self.xpos

    @property
    def one_table(self) -> bool:
        """Whether queries and keys are turned by one table ``angles.cos``, ``angles.sin``."""
        return self.angles.tabled and self.xpos is None

    def extra_repr(self) -> str:
        """One line for ``print(module)``."""
        shown = [f"dim={self.dim}, theta={self.theta}, layout={self.layout!r}"]
        for name, default in (
            ("freqs_for", "lang"),
            ("learned_freq", False),
            ("use_xpos", False),
            ("interpolate_factor", 1.0),
            ("seq_before_head_dim", False),
            ("scaling", None),
            ("max_seq_len", None),
        ):
            value = getattr(self, name)
            if value != default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)

    def reset_parameters(self) -> None:
        """Rebuild ``freqs`` and the tables on the module's device (shapes only on ``meta``)."""
        self._fill_freqs()
        self._rebuild_tables()

    def _fill_freqs(self) -> None:
        if not self.freqs.is_meta:
            with torch.no_grad():
                self.freqs.copy_(placed_as(self.freqs, self._freqs))

    def _rebuild_tables(self) -> None:
        self.angles.rebuild(self._found, self.freqs.device)
        if self.xpos is not None:
            self.xpos.rebuild(self.freqs.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        was_meta = self.freqs.is_meta
        super()._apply(keeping_values(fn), recurse)  # type: ignore[no-untyped-call]
        if was_meta:
            self.reset_parameters()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.freqs.is_meta:
            return
        given = state_dict.get(prefix + "freqs")
        # No table depends on learned frequencies, which may be sharded.
        differs = (
            not self.learned_freq and given is not None and not same_frequencies(given, self._freqs)
        )
        if self.freqs.dtype != torch.float32:  # assigned
            self.freqs.data = self.freqs.data.to(torch.float32)
        if differs and given is not None:
            # Another base, or frequencies that were trained: they are the truth now.
            self._freqs, self.theta = self._taken(given, prefix)
            inv_freq = self._freqs / self.interpolate_factor
            self._found = replace(self._found, inv_freq=inv_freq, beyond=None, stretch=None)
        if given is not None and not self.learned_freq:
            self.freqs.copy_(self._freqs)  # theirs may be rounded to half precision
        if differs or self.angles.tau.is_meta:
            self._rebuild_tables()

    def _taken(self, given: Tensor, prefix: str) -> tuple[Tensor, float | None]:
        """Frequencies that others stored, exact where that can be told, and their base."""
        found = unrounded(given, freqs_for=self.freqs_for)
        if found is not None and found.freqs is not None:
            return found.freqs, found.value if found.name == "theta" else None
        if found is not None:
            warnings.warn(
                f"{prefix}freqs are taken as they are: {found.doubt}; give the module the "
                f"{found.name} of the checkpoint to have exact ones",
                stacklevel=5,
            )
        return self.freqs.detach().to("cpu", torch.float64), None

    def cos_sin(self, position_ids: Tensor) -> Turns:
        """Cosines and sines of the given positions, without xPos's scale.

        Args:
            position_ids: integers ``[S]``, ``[B, S]`` or, with several axes, ``[axes, B, S]``;
                for a `rope_type` of vision also ``[axes, S]``.

        Returns:
            twice ``[..., S, r / 2]`` float32.

        Raises:
            BadInputError: a position is beyond the tables. On CUDA, and compiled, an assertion of
                the device stops instead, or, where frequencies move and there is no table, the
                result is NaN; in an exported graph it is NaN always.
        """
        return self._cos_sin(position_ids, None)

    def _cos_sin(self, position_ids: Tensor, limit: int | None) -> Turns:
        axes_lead = self.axes > 1 and position_ids.ndim > (2 if self._found.one_position else 1)
        truth = dispatch.truth()
        if truth is not None:
            return truth.cos_sin(self.found, position_ids, axes_lead=axes_lead)
        learned = self.freqs if self.learned_freq else None
        try:
            cos, sin = self.angles(position_ids, learned, axes_lead=axes_lead, limit=limit)
        except IndexError as error:
            raise BadInputError(
                f"position_ids must lie in 0 … {(limit or self.angles.positions) - 1}, "
                f"got {int(position_ids.min())} … {int(position_ids.max())}; raise max_seq_len"
            ) from error
        return cos, sin

    def turns(self, position_ids: Tensor) -> tuple[Turns, Turns]:
        """By what queries and by what keys are multiplied: `cos_sin`, times xPos's scale.

        Args:
            position_ids: as of `cos_sin`.

        Returns:
            cosines and sines for queries, and for keys; the same tensors without xPos.
        """
        if self.xpos is None:
            cos, sin = self.cos_sin(position_ids)
            return (cos, sin), (cos, sin)
        narrower = self.positions < self.angles.positions
        cos, sin = self._cos_sin(position_ids, self.positions if narrower else None)
        return scaled(cos, sin, self.xpos(position_ids))

    def implied_positions(self, seq_len: int, offset: int | Tensor = 0) -> Tensor:
        """Positions ``offset … offset + seq_len - 1`` as int64 ``[seq_len]``.

        Raises:
            BadInputError: they reach beyond the last position served, or ``offset`` is not an
                integer, or a token needs a position on each axis.
        """
        if not self._found.one_position:
            raise BadInputError(
                f"position_ids [{self.axes}, B, S] must be given: tokens have {self.axes} axes"
            )
        return self._implied(seq_len, offset, self.positions)

    def _implied(self, seq_len: int, offset: int | Tensor, served: int) -> Tensor:
        check_offset(offset)
        last = seq_len if isinstance(offset, Tensor) else seq_len + offset
        negative = not isinstance(offset, Tensor) and offset < 0
        if last > served or negative:
            hint = "" if negative else "; raise max_seq_len"
            first, last = int(offset), int(last) - 1
            raise BadInputError(
                f"positions must lie in 0 … {served - 1}, got {first} … {last}{hint}"
            )
        return torch.arange(seq_len, device=self.device) + offset

    def rotate(
        self,
        q: Tensor,
        k: Tensor,
        *,
        position_ids: Tensor | None = None,
        offset: int | Tensor = 0,
        seq_dim: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys by their positions.

        With xPos the origin of the scales depends on no length, so keys may be rotated once and
        cached.

        Args:
            q: ``[B, H, S, D]`` with ``D >= dim``.
            k: ``[B, H_kv, S, D]``.
            position_ids: ``[S]`` or ``[B, S]`` integers; implied as ``offset … offset + S - 1``.
                With several axes, ``[axes, B, S]``.
            offset: position of the first token when ``position_ids`` is not given, as an int or
                a 0-d integer tensor.
            seq_dim: the axis of the sequence (default -2, or -3 with ``seq_before_head_dim``).

        Returns:
            rotated ``q`` and ``k``, same shapes and dtypes.

        Raises:
            BadInputError: a shape, dtype or position does not fit.
        """
        q_axis, k_axis = self._axes_of_same_length(q, k, seq_dim)
        length = q.shape[q_axis]
        if position_ids is None:
            self._check_scaled_range(q, length, offset)
            position_ids = self.implied_positions(length, offset)
        else:
            batch = q.shape[0] if q.ndim == 4 else None
            check_position_ids(position_ids, self._found, batch=batch, length=length)
        for_q, for_k = self.turns(position_ids)
        return self._rotate(q, for_q, q_axis), self._rotate(k, for_k, k_axis)

    def rotate_queries_or_keys(
        self,
        t: Tensor,
        seq_dim: int | None = None,
        offset: int | Tensor = 0,
        scale: float | Tensor | None = None,
    ) -> Tensor:
        """Rotate one tensor by its implied positions.

        Args:
            t: ``[..., S, D]`` with ``D >= dim``.
            seq_dim: the axis of the sequence (default -2, or -3 with ``seq_before_head_dim``).
            offset: position of the first token, as an int or a 0-d integer tensor.
            scale: multiplies the rotated channels: a number, ``[S, dim]`` as from `get_scale`, or
                anything that broadcasts against them.

        Returns:
            the rotated tensor, same shape and dtype.

        Raises:
            BadInputError: a shape or position does not fit, or xPos has no scale to apply.
        """
        if self.use_xpos and scale is None:
            raise BadInputError(
                "rotate_queries_or_keys needs a scale with use_xpos=True, got None; queries and "
                "keys are scaled differently: use rotate or rotate_queries_and_keys"
            )
        seq_dim = self._seq_dim(t, seq_dim, "t")
        turns = self.cos_sin(self._implied(t.shape[seq_dim], offset, self.angles.positions))
        if scale is None:
            return self._rotate(t, turns, seq_dim)
        turned = self._rotate(t if t.dtype == torch.float64 else t.float(), turns, seq_dim)
        if isinstance(scale, Tensor) and scale.ndim == 2:
            scale = over_heads(scale, t.ndim, seq_dim)
        scaled = turned[..., : self.dim] * scale
        return torch.cat((scaled, turned[..., self.dim :]), dim=-1).to(t.dtype)

    def rotate_queries_and_keys(
        self, q: Tensor, k: Tensor, seq_dim: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys of a whole sequence, positions from 0.

        With xPos the numbers are those of rotary-embedding-torch: its origin is the middle of the
        sequence, so these keys must not be cached for a longer one (`rotate` is for that). Scores
        are the same as those of `rotate`.

        Args:
            q: ``[..., S, D]``.
            k: as ``q``.
            seq_dim: the axis of the sequence (default -2, or -3 with ``seq_before_head_dim``).

        Returns:
            rotated ``q`` and ``k``, same shapes and dtypes.
        """
        q_axis, k_axis = self._axes_of_same_length(q, k, seq_dim)
        length = q.shape[q_axis]
        served = self.angles.positions
        if self.xpos is not None:  # the origin is in the middle: it reaches twice as far
            served = min(served, 2 * self.xpos.reach())
        positions = self._implied(length, 0, served)
        cos, sin = self.cos_sin(positions)
        for_q = for_k = (cos, sin)
        if self.xpos is not None:
            for_q, for_k = scaled(cos, sin, self.xpos(positions, middle=length // 2))
        return self._rotate(q, for_q, q_axis), self._rotate(k, for_k, k_axis)

    def rotate_queries_with_cached_keys(
        self, q: Tensor, k: Tensor, seq_dim: int | None = None, offset: int | Tensor = 0
    ) -> tuple[Tensor, Tensor]:
        """Rotate the last queries of a sequence and all of its keys, which were cached unrotated.

        Keys take positions from 0, queries the last ones of the keys, plus ``offset``.
        rotary-embedding-torch gives xPos's queries and keys different origins here, so that its
        scores depend on how many queries there are. Here both have the origin of `rotate`, which
        depends on no length: every step gives the numbers of the full pass.

        Args:
            q: ``[..., S_q, D]``.
            k: ``[..., S_k, D]`` with ``S_k >= S_q``.
            seq_dim: the axis of the sequence (default -2, or -3 with ``seq_before_head_dim``).
            offset: added to the positions of the queries.

        Returns:
            rotated ``q`` and ``k``, same shapes and dtypes.
        """
        axis, k_axis = self._seq_dim(q, seq_dim, "q"), self._seq_dim(k, seq_dim, "k")
        q_len, k_len = q.shape[axis], k.shape[k_axis]
        if not torch.compiler.is_compiling() and q_len > k_len:
            raise BadInputError(f"q must be no longer than k, got {q_len} and {k_len} tokens")
        self._check_scaled_range(k, k_len, 0)
        for_q, _ = self.turns(self.implied_positions(q_len, k_len - q_len + offset))
        _, for_k = self.turns(self.implied_positions(k_len))
        return self._rotate(q, for_q, axis), self._rotate(k, for_k, k_axis)

    def get_seq_pos(
        self,
        seq_len: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        offset: int | Tensor = 0,
    ) -> Tensor:
        """Positions ``[seq_len]``, divided by ``interpolate_factor``; exact before any rounding.

        Args:
            seq_len: how many.
            device: where (default: the module's).
            dtype: of the result (default float32).
            offset: the first position.
        """
        steps = torch.arange(seq_len, device=self.device if device is None else device) + offset
        return (steps.double() / self.interpolate_factor).to(dtype or torch.float32)

    def get_scale(self, t: Tensor, seq_len: int | None = None, offset: int | Tensor = 0) -> Tensor:
        """Scales of xPos as rotary-embedding-torch has them: 1 in the middle of ``t``.

        Args:
            t: ``[S]`` positions, as from `get_seq_pos`.
            seq_len: accepted for compatibility; the result depends on ``t`` alone.
            offset: likewise.

        Returns:
            ``[S, dim]`` float32, one value a channel.
        """
        del seq_len, offset
        xpos = self._xpos("get_scale")
        scale = xpos(t.double() * xpos.interpolation, middle=t.shape[0] // 2)
        return repeat_for_pairs(scale, layout=self.layout)

    def get_axial_freqs(
        self, *dims: int, offsets: Sequence[float | Tensor] | Tensor | None = None
    ) -> Tensor:
        """Angles of a grid, for `apply_rotary_emb`: each axis turns channels of its own.

        Args:
            dims: the size of each axis. Coordinates are ``0 … size - 1``, or with
                ``freqs_for="pixel"`` from -1 to 1. In a graph whose shapes are dynamic the grid
                is, too.
            offsets: added to the coordinates of each axis: numbers, sizes of tensors or 0-d
                tensors, or one tensor of them all; with more axes than one they lead the result.

        Returns:
            ``[*dims, len(dims) * r]`` float32, in radians.

        Raises:
            BadInputError: there are not as many ``offsets`` as axes.
        """
        places = coordinates(dims, offsets, pixels=self.freqs_for == "pixel", device=self.device)
        return angles_of_grid([self._angles(place) for place in places], layout=self.layout)

    def forward(self, t: Tensor, seq_len: int | None = None, offset: int | Tensor = 0) -> Tensor:
        """Angles of positions, for `apply_rotary_emb`.

        Args:
            t: positions of any shape, integers or fractions, after interpolation (`get_seq_pos`).
            seq_len: accepted for compatibility; the result depends on ``t`` alone.
            offset: likewise.

        Returns:
            ``[*t.shape, r]`` float32 in radians, one value a channel. Float32 angles lose digits
            as positions grow; the methods that rotate do not go through them.
        """
        del seq_len, offset
        return repeat_for_pairs(self._angles(t), layout=self.layout)

    def _angles(self, t: Tensor) -> Tensor:
        if self.angles.inv_freq is None:
            freqs = self.freqs.double()
        else:
            freqs = self.angles.inv_freq * self.angles.interpolation
        return (t.double().unsqueeze(-1) * freqs).to(torch.float32)

    def _rotate(self, x: Tensor, turns: Turns, seq_dim: int) -> Tensor:
        target = dispatch.computer()
        rotate = rotate_sequence if target is None else target.rotate
        return rotate(x, *turns, layout=self.layout, seq_dim=seq_dim)

    def _check_scaled_range(self, x: Tensor, length: int, offset: int | Tensor) -> None:
        if self.xpos is None or x.dtype != torch.float16 or isinstance(offset, Tensor):
            return
        served = self.xpos.positions(torch.float16)
        if length + offset > served:
            raise BadInputError(
                f"xPos serves positions 0 … {served - 1} in float16, got … {length + offset - 1}: "
                "beyond, the scales of keys are infinite; give max_seq_len, which puts the origin "
                "in the middle, or use bfloat16"
            )

    def _seq_dim(self, x: Tensor, seq_dim: int | None, name: str) -> int:
        return axis_of_sequence(x, seq_dim, name, dim=self.dim, default=self.default_seq_dim)

    def _axes_of_same_length(self, q: Tensor, k: Tensor, seq_dim: int | None) -> tuple[int, int]:
        q_axis, k_axis = self._seq_dim(q, seq_dim, "q"), self._seq_dim(k, seq_dim, "k")
        check_same_length(q, k, q_axis, k_axis)
        return q_axis, k_axis
