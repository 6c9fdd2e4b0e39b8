"""What typical defects would have shown on the inputs of a proof."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from rope_export.artifacts.comparison import errors_against
from rope_export.attention.block import Attention
from rope_export.attention.random_inputs import draw, input_gain
from rope_export.proof.reference import Semantics, attention_truth


def sensitivities(block: Attention, *, length: int, seed: int) -> dict[str, float]:
    """Relative change of the truth under typical defects: what the proof would have seen."""
    x = draw(np.random.default_rng([seed, 1 << 21]), block, 1, length, input_gain(block, seed))
    truth = attention_truth(block, x).numpy()
    return {
        name: errors_against(truth, attention_truth(block, x, semantics=defect).numpy()).rel
        for name, defect in defects_of(Semantics.of(block), length).items()
    }


def defects_of(meaning: Semantics, length: int) -> dict[str, Semantics]:
    """Typical defects that attention of some meaning could have.

    Args:
        meaning: of the attention as it should be.
        length: of the sequence on which they are to show.
    """
    defects: dict[str, Semantics] = {
        "score scale 2 % off": replace(meaning, scale=meaning.scale * 1.02)
    }
    found = meaning.found
    if found is not None:
        other = "interleaved" if meaning.layout == "half" else "half"
        moving = found.beyond or found.stretch
        if moving is not None and length > moving.length:
            fixed = replace(found, beyond=None, stretch=None)
            defects["length ignored"] = replace(meaning, found=fixed)
        mirrored = replace(found, inv_freq=-found.inv_freq, beyond=None)
        defects["sine negated"] = replace(meaning, found=mirrored)
        defects["queries one position late"] = replace(meaning, query_shift=1)
        if found.attention_factor != 1:
            plain = replace(found, attention_factor=1.0)
            defects["attention factor dropped"] = replace(meaning, found=plain)
        if len(found.inv_freq) > 1:
            defects["other pairing"] = replace(meaning, layout=other)
        if meaning.decay is not None:
            defects["xPos dropped"] = replace(meaning, decay=None)
    defects["causal mask flipped"] = replace(meaning, causal=not meaning.causal)
    if meaning.window is not None:
        defects["window one token wider"] = replace(meaning, window=meaning.window + 1)
    if meaning.softcap is not None:
        defects["soft cap dropped"] = replace(meaning, softcap=None)
    if meaning.sinks is not None:
        defects["sinks dropped"] = replace(meaning, sinks=None)
    if meaning.norm_eps is not None:
        defects["query and key norms dropped"] = replace(meaning, norm_eps=None)
    rounding = meaning.rounding
    if rounding is not None:
        keys, values = rounding.scales
        off, rolled = (1.02 * keys, 1.02 * values), (keys.roll(1, -1), values.roll(1, -1))
        defects["cache scales 2 % off"] = _scaled(meaning, off)
        if meaning.num_kv_heads * keys.shape[-1] > 1:
            defects["cache scales of the channel before"] = _scaled(meaning, rolled)
        if keys.shape == values.shape:
            defects["cache scales exchanged"] = _scaled(meaning, (values, keys))
    if meaning.num_kv_heads > 1:
        defects["value heads rolled"] = replace(meaning, value_roll=1)
    return defects


def _scaled(meaning: Semantics, scales: tuple[Tensor, Tensor]) -> Semantics:
    """Integers that are right, taken for what they would be with other scales."""
    assert meaning.rounding is not None
    return replace(meaning, rounding=replace(meaning.rounding, read_by=scales))
