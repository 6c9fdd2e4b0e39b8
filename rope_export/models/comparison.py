"""What a replaced attention computes, against the module it replaces, in transformers' own code.

The decoder itself is run, with its own masks, position embeddings and caches, on a few random
tokens. Where it calls an attention, loud and quiet random hidden states are put in the place of
those it has, so that every layer is compared by itself; what follows in a layer is not computed.
Windows are compared as windows of a few tokens: which layers have one is seen, its width is read
from the same field by both.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rope_export import runtime
from rope_export.attention.block import Attention, Cache
from rope_export.errors import BadInputError, RopeExportError, first_line
from rope_export.models.decoder_attention import DecoderAttention
from rope_export.models.keywords import cache_keyword, cache_of
from rope_export.models.rehearsal import (
    Run,
    as_it_was,
    called,
    give_config,
    in_float32,
    keep_angles_in_float32,
    listen,
    narrow,
    plainly,
    runs,
)

# How loud the hidden states of each row are, where 1 spreads scores by about `_SPREAD`.
_LOUDNESS, _SPREAD = (1.0, 6.0, 0.03), 3.0
# A row may be off by so much of its norm: what a hidden state off by `_ROUNDING` does to it, times
# `_SLACK`, within these bounds. What is left out of an attention is above.
_LEAST, _MOST, _ROUNDING, _SLACK = 2e-5, 1e-2, 1e-6, 20
# Copies in float32 of all attentions are kept while they are compared within this share of memory.
_COPIES_SHARE = 0.2


@dataclass(frozen=True)
class Pair:
    """An attention of transformers, what replaces it, and the layer that calls it.

    Attributes:
        path: its name in the model.
        theirs: the module that is replaced.
        ours: what replaces it.
        layer: the layer of the decoder it is part of.
    """

    path: str
    theirs: nn.Module
    ours: DecoderAttention
    layer: nn.Module


class Comparison:
    """The attentions of one decoder, before and after.

    Args:
        decoder: of transformers, as it is.
        pairs: every layer's attention.
        longest: positions that are served.
    """

    def __init__(self, decoder: Any, pairs: Sequence[Pair], longest: int) -> None:
        self._decoder = decoder
        self._pairs = pairs
        self._runs = runs(longest)
        self._gains = [_gain(pair.ours) for pair in pairs]
        # By run and layer: what their own code gives in each call, and what a row may be off by.
        self._theirs: list[list[list[Tensor]]] = []
        self._allowed: list[Tensor] = []
        size = 4 * sum(p.numel() for pair in pairs for p in pair.theirs.parameters())
        self._keeps = size < _COPIES_SHARE * runtime.available_memory()
        self._copies: dict[int, Any] = {}

    def by_meaning(self) -> None:
        """Compare what each attention is by its attributes, called as `Attention`.

        Raises:
            BadInputError: one computes something else than the module it is to replace.
        """
        for number, run in enumerate(self._runs):
            self._theirs.append(self._heard(run, "eager", lambda pair: pair.theirs))
            for index, pair in enumerate(self._pairs):
                self._check(number, index, self._meant(run, index, pair.ours))

    def as_called(self, way: str) -> None:
        """Compare what each gives where the decoder calls it, which has them by now.

        Args:
            way: how the decoder is told to make masks.

        Raises:
            BadInputError: one gives something else than the module before it.
        """
        self._copies.clear()  # they are told how masks are made by their config
        for number, run in enumerate(self._runs):
            for index, given in enumerate(self._heard(run, way, lambda pair: pair.ours)):
                self._check(number, index, given)

    def _check(self, number: int, index: int, given: Sequence[Tensor]) -> None:
        pair, run = self._pairs[index], self._runs[number]
        off = self._off(number, index, given)
        if bool((off <= self._allowed[index]).all()):
            return
        what = type(pair.theirs).__name__
        why = self._likely(index)
        raise BadInputError(
            f"{pair.path}: its replacement as family {pair.ours.geometry.family} is off {what} of "
            f"transformers by {float(off.max()):.2g} of its output ({run.name}): {why}"
        )

    def _off(self, number: int, index: int, given: Sequence[Tensor]) -> Tensor:
        """By how much of its norm each row is off, padding left out."""
        ours, theirs = (torch.cat(list(c), 1) for c in (given, self._theirs[number][index]))
        padding = self._runs[number].mask[:, : theirs.shape[1], None] == 0
        ours = ours[:, : theirs.shape[1]]  # without a cache, theirs is called but once
        return _distance(ours.masked_fill(padding, 0), theirs.masked_fill(padding, 0))

    def _likely(self, index: int) -> str:
        """What makes the replacement of a layer what it is not, if one change would do."""
        ours, config = self._pairs[index].ours, self._decoder.config
        for text, variant in _variants(ours, config):
            given = self._meant(self._runs[0], index, variant)
            if bool((self._off(0, index, given) <= self._allowed[index]).all()):
                return f"most likely {text}"
        return (
            "most likely a norm, a gate or a bound that is no field of its config; name a family "
            "whose attention is the same, or keep its own"
        )

    # Running.

    def _in_float32(self, module: nn.Module) -> Any:
        wide = self._copies.get(id(module))
        if wide is None:
            wide = in_float32(module)
            if self._keeps:
                self._copies[id(module)] = wide
        return wide

    def _hidden(self, run: Run, index: int, ours: Attention) -> Tensor:
        """What a layer's attention is given in the place of the decoder's hidden states."""
        generator = torch.Generator().manual_seed(1000 * len(run.name) + index)
        shape = (len(_LOUDNESS), sum(run.steps), ours.hidden_size)
        loudness = torch.tensor(_LOUDNESS)[:, None, None] * self._gains[index]
        return torch.randn(shape, generator=generator) * loudness

    @torch.no_grad()
    def _meant(self, run: Run, index: int, ours: Attention) -> list[Tensor]:
        """Each call of a layer as `Attention` has it."""
        x = self._hidden(run, index, ours).to(ours.device)
        mask = run.mask.to(x.device) if run.padded else None
        given: list[Tensor] = []
        with as_it_was(ours):
            wide = self._in_float32(ours)
            wide.window = narrow(ours.window)
            past: Cache | None = wide.empty_cache(x.shape[0]) if run.cached else None
            for start, stop in run.calls():
                ids = torch.arange(start, stop, device=x.device).expand(x.shape[0], -1)
                if wide.rope is not None and wide.rope.axes > 1:
                    ids = ids.expand(wide.rope.axes, *ids.shape)
                told: dict[str, Any] = {"position_ids": ids}
                told["attention_mask"] = None if mask is None else mask[:, :stop]
                answer: Any = Attention.forward(wide, x[:, start:stop], past=past, **told)
                answer, past = (answer, None) if past is None else answer
                given.append(answer.cpu())
        return given

    @torch.no_grad()
    def _heard(
        self, run: Run, way: str, attention: Callable[[Pair], nn.Module]
    ) -> list[list[Tensor]]:
        """By layer, what its attention gives in each call where the decoder calls it."""
        decoder = self._decoder
        heard: list[list[Tensor]] = [[] for _ in self._pairs]
        noise = not run.cached and not self._allowed
        allowed: dict[int, Tensor] = {}
        places: list[tuple[int, int]] = []  # of the call that is being made

        def hear(index: int, args: Any, kwargs: Any) -> None:
            pair = self._pairs[index]
            module = attention(pair)
            x = self._hidden(run, index, pair.ours)[:, slice(*places[0])].to(pair.ours.device)
            wide = self._in_float32(module)
            heard[index].append(called(wide, x, args, kwargs))
            if noise:
                shaken = x * (1 + _ROUNDING * torch.randn(x.shape).to(x))
                off = _distance(called(wide, shaken, args, kwargs), heard[index][-1])
                allowed[index] = (_SLACK * off).clamp(_LEAST, _MOST)

        with as_it_was(decoder), torch.random.fork_rng([]), plainly():
            torch.manual_seed(0)
            decoder.eval()
            give_config(decoder, decoder, way)
            keep_angles_in_float32(decoder)
            for index, pair in enumerate(self._pairs):
                module = attention(pair)
                if isinstance(module, DecoderAttention):
                    module.window = narrow(module.window)
                listen(pair.layer, module, functools.partial(hear, index))
            count = self._run(run, places)
        for index, pair in enumerate(self._pairs):
            if len(heard[index]) != count:
                raise BadInputError(
                    f"{pair.path} is not called once by each call of {type(decoder).__name__}: its "
                    "replacement cannot be compared with it"
                )
        if noise:
            self._allowed = [allowed[index] for index in range(len(self._pairs))]
        return heard

    def _run(self, run: Run, places: list[tuple[int, int]]) -> int:
        """Run the decoder; how often that was: once where it has no cache."""
        decoder = self._decoder
        device = decoder.get_input_embeddings().weight.device
        count = decoder.get_input_embeddings().weight.shape[0]
        rows = len(_LOUDNESS)
        tokens = torch.randint(count, (rows, sum(run.steps)), device=device)
        mask = run.mask.to(device)
        cache, made = None, 0
        try:
            for start, stop in run.calls():
                if made and cache is None:
                    break
                places[:] = [(start, stop)]
                given = {"input_ids": tokens[:, start:stop], "use_cache": run.cached}
                if run.padded:
                    given["attention_mask"] = mask[:, :stop]
                if cache is not None:
                    given[cache_keyword(decoder)] = cache
                cache = cache_of(decoder(**given, return_dict=True))
                made += 1
        except RopeExportError:
            raise
        except Exception as error:
            raise BadInputError(
                f"{type(decoder).__name__} raises {type(error).__name__} on {tuple(tokens.shape)} "
                f"random tokens, with which its attention is compared: {first_line(error)}"
            ) from error
        return made


@torch.no_grad()
def _gain(ours: Attention) -> float:
    """How loud hidden states must be for scores to spread by `_SPREAD`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, ours.hidden_size, generator=generator).to(ours.device)
    q, k, _ = in_float32(ours).project(x)
    spread = ours.scale * math.sqrt(ours.head_dim)
    spread *= float(q.square().mean().sqrt() * k.square().mean().sqrt())
    gain = math.sqrt(_SPREAD / spread) if spread > 0 and math.isfinite(spread) else 1.0
    return min(max(gain, 1e-3), 1e3)


def _distance(given: Tensor, wanted: Tensor) -> Tensor:
    """By how much of its norm each row is off."""
    norm = wanted.flatten(1).norm(dim=1)
    off = (given - wanted).flatten(1).norm(dim=1)
    share: Tensor = off / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    return share


def _variants(ours: Attention, config: Any) -> Iterator[tuple[str, Attention]]:
    """What may have been misread of a layer, and what it would be then."""

    def with_(**changes: Any) -> Attention:
        made = copy.copy(ours)
        vars(made)["_modules"] = dict(ours._modules)
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    if ours.causal:
        yield "it sees both ways", with_(causal=False)
    stated = getattr(config, "sliding_window", None)
    if ours.window is None and isinstance(stated, int):
        yield f"it has a window (sliding_window {stated})", with_(window=stated)
    if ours.window is not None:
        yield f"it has no window in this layer, not {ours.window}", with_(window=None)
    if ours.rope is not None:
        yield "it has no RoPE in this layer", with_(rope=None)
        rope = copy.copy(ours.rope)
        rope.layout = "half" if rope.layout == "interleaved" else "interleaved"
        yield f"it rotates pairs as {rope.layout}, not {ours.rope.layout}", with_(rope=rope)
    plain = ours.head_dim**-0.5
    for text, scale in (("1", 1.0), ("head_dim ** -0.5", plain)):
        if scale != ours.scale:
            yield f"its scores are scaled by {text}, not {ours.scale:g}", with_(scale=scale)
    if ours.softcap is not None:
        yield f"its scores have no soft cap of {ours.softcap:g}", with_(softcap=None)
