"""Truth of a decoder by transformers' own code, beside that of what replaced its attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rope_export.errors import BadInputError, RopeExportError, first_line
from rope_export.models.decoder_attention import DecoderAttention
from rope_export.models.decoder_with_cache import DecoderWithCache
from rope_export.models.keywords import cache_keyword, cache_of
from rope_export.models.own_code import own_code
from rope_export.models.rehearsal import ROWS, Run, as_it_was, give_config, narrow, runs
from rope_export.proof.full_precision import Kept, exactly

# Two evaluations in float64 of the same attention, in another order, over many layers.
_SAME = 1e-8


def agreement_notes(module: nn.Module, longest: int, kept: Kept | None) -> list[str]:
    """Compare every decoder of transformers in a module with its own code, in float64.

    Both are run on a few tokens, whole, padded, and in calls with a cache, which for its own code
    is transformers' own, as are masks and angles: evaluated in float64, frequencies are not rounded
    there either. Longer windows are compared as windows of a few tokens.

    Args:
        module: whatever is proven.
        longest: positions that are served.
        kept: weights in float64, as `exactly` takes them.

    Returns:
        what was compared, in words; nothing for a module without replaced attention.

    Raises:
        BadInputError: the logits (or last hidden states) differ, or its own code does not run.
    """
    notes = []
    for decoder in _decoders(module):
        off, classes, tokens = 0.0, [""], 0
        for run in runs(longest):
            ours, theirs, classes = _both(decoder, run, kept)
            tokens = max(tokens, sum(run.steps))
            norm = max(float(theirs.norm()), 1e-300)
            off = max(off, float((ours - theirs).norm()) / norm)
            if not off <= _SAME:
                raise BadInputError(
                    f"{type(decoder.model).__name__} computes something else by transformers' own "
                    f"{', '.join(classes)} with its present weights and config: off by {off:.2g} "
                    f"in float64 ({run.name}); replace attention after the last change to it"
                )
        notes.append(
            f"by transformers' own code ({', '.join(classes)} with the present weights, its masks "
            f"and its cache) the float64 truth of {type(decoder.model).__name__} is the same "
            f"within {_SAME:.0e}: {ROWS} rows of up to {tokens} tokens, whole, padded, and in "
            "calls with a cache"
        )
    return notes


def _decoders(module: nn.Module) -> list[DecoderWithCache]:
    """Decoders as they are exported, or as they would be."""
    found = [part for part in module.modules() if isinstance(part, DecoderWithCache)]
    if found or not any(isinstance(part, DecoderAttention) for part in module.modules()):
        return found
    whole = next((m for m in module.modules() if hasattr(m, "get_decoder")), None)
    return [] if whole is None else [DecoderWithCache(whole)]


def _both(
    decoder: DecoderWithCache, run: Run, kept: Kept | None
) -> tuple[Tensor, Tensor, list[str]]:
    """What ours and their own code give at the tokens of a run, and the classes of the latter."""
    model: Any = decoder.model
    generator = torch.Generator().manual_seed(len(run.name))
    count = model.get_input_embeddings().num_embeddings
    device = decoder.attentions[0].device
    tokens = torch.randint(count, (ROWS, sum(run.steps)), generator=generator).to(device)
    mask = run.mask.to(device)
    axes = max(a.rope.axes if a.rope is not None else 1 for a in decoder.attentions)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    ids = places.expand(axes, *places.shape) if axes > 1 else places
    with as_it_was(decoder):
        decoder.eval()
        give_config(model, model.get_decoder(), "eager")
        for attention in decoder.attentions:
            attention.window = narrow(attention.window)
        with exactly(decoder, kept=kept):
            given, past = [], decoder.empty_cache(ROWS) if run.cached else None
            for start, stop in run.calls():
                told = {"position_ids": ids[..., start:stop]} if axes > 1 else {}
                answer: Any = decoder(tokens[:, start:stop], mask[:, :stop], past, **told)
                answer, past = (answer, None) if past is None else answer
                given.append(answer)
        with exactly(decoder, kept=kept), own_code(model) as classes:
            own, cache = [], None
            for start, stop in run.calls():
                arguments: dict[str, Any] = {"use_cache": run.cached}
                if run.padded or run.cached:
                    arguments["attention_mask"] = mask[:, :stop]
                if run.padded or axes > 1:
                    arguments["position_ids"] = ids[..., start:stop]
                if cache is not None:
                    arguments[cache_keyword(model)] = cache
                try:
                    result = model(tokens[:, start:stop], return_dict=True, **arguments)
                except RopeExportError:
                    raise
                except Exception as error:
                    raise BadInputError(
                        f"{type(model).__name__} raises {type(error).__name__} with transformers' "
                        f"own attention, with which it is compared: {first_line(error)}"
                    ) from error
                cache = cache_of(result)
                own.append(result["logits"] if "logits" in result else result["last_hidden_state"])
    real = mask.bool()
    ours, theirs = (torch.cat(parts, 1)[real].double() for parts in (given, own))
    return ours, theirs, classes
