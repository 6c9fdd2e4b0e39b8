"""RoPE types by name (yarn, llama3, longrope, …): their parameters to frequencies, in float64.

One small function each, in one table; `parameters` checks every field, and none is left over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from rope_export.errors import BadInputError
from rope_export.rope.frequencies import Frequencies, Stretch, Switch, default_inv_freq
from rope_export.rope.parameters import Parameters

Rule = Callable[[int, float, Parameters, "int | None"], Frequencies]


def _default(dim: int, theta: float, p: Parameters, longest: int | None) -> Frequencies:
    del p, longest
    return Frequencies(default_inv_freq(dim, theta))


def _linear(dim: int, theta: float, p: Parameters, longest: int | None) -> Frequencies:
    """Position interpolation: Chen et al., "Extending Context Window …" (2023), equation 4."""
    del longest
    return Frequencies(default_inv_freq(dim, theta) / p.number("factor", at_least=1.0))


def _ntk(dim: int, theta: float, p: Parameters, longest: int | None) -> Frequencies:
    """Static NTK-aware scaling of the base (bloc97, 2023), as rotary-embedding-torch has it."""
    del longest
    factor = p.number("factor", at_least=1.0)
    if dim < 4:
        raise BadInputError(f"scaling of rope_type 'ntk' needs a dim of at least 4, got {dim}")
    return Frequencies(default_inv_freq(dim, theta * factor ** (dim / (dim - 2))))


def _dynamic(dim: int, theta: float, p: Parameters, longest: int | None) -> Frequencies:
    """Dynamic NTK (emozilla, 2023): the base follows the longest sequence of the batch."""
    del longest  # what is served says nothing of what was trained
    trained = p.optional("max_position_embeddings", at_least=1.0)
    length = p.number("original_max_position_embeddings", trained, at_least=1.0)
    factor = p.number("factor", at_least=1.0)
    if length != int(length):
        raise BadInputError(
            f"scaling['original_max_position_embeddings'] must be an integer, got {length:g}"
        )
    if dim < 4:
        raise BadInputError(f"scaling of rope_type 'dynamic' needs a dim of at least 4, got {dim}")
    return Frequencies(default_inv_freq(dim, theta), stretch=Stretch(int(length), factor))


def _original_length(p: Parameters, longest: int | None) -> float:
    """The trained length; without it, the length served, as Hugging Face configurations have it."""
    served = p.optional("max_position_embeddings", at_least=1.0)
    default = served if served is not None else longest
    return p.number(
        "original_max_position_embeddings",
        None if default is None else float(default),
        at_least=1.0,
    )


def _yarn(dim: int, theta: float, p: Parameters, longest: int | None) -> Frequencies:
    """Peng et al., "YaRN" (2023), section 3.2, with DeepSeek's ``mscale`` pair."""
    original = _original_length(p, longest)
    served = p.optional("max_position_embeddings", at_least=1.0)
    factor = p.number("factor", None if served is None else served / original, at_least=1.0)
    beta_fast, beta_slow = p.number("beta_fast", 32.0), p.number("beta_slow", 1.0)
    mscale, all_dim = (p.optional(name, at_least=0.0) for name in ("mscale", "mscale_all_dim"))
    attention_factor = p.optional("attention_factor")
    if beta_fast < beta_slow:
        raise BadInputError(
            f"scaling['beta_fast'] must be at least scaling['beta_slow'], "
            f"got {beta_fast:g} and {beta_slow:g}"
        )
    if theta == 1.0:
        raise BadInputError("scaling of rope_type 'yarn' needs a theta other than 1, got 1.0")

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if attention_factor is None:
        paired = bool(mscale and all_dim)
        attention_factor = (
            magnitude(mscale or 0.0) / magnitude(all_dim or 0.0) if paired else magnitude(1.0)
        )

    def channel(rotations: float) -> float:
        """The channel that turns so often over the trained length."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(beta_fast), channel(beta_slow)
    if p.flag("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    channels = torch.arange(dim // 2, dtype=torch.float64, device="cpu")
    interpolated = ((channels - low) / (high - low)).clamp(0, 1)
    inv_freq = default_inv_freq(dim, theta)
    return Frequencies(
        inv_freq / factor * interpolated + inv_freq * (1 - interpolated), attention_factor
    )


def _llama3(dim: int, theta: float, p: Parameters, longest: int | None) -> Frequencies:
    """Llama 3.1's own: keep short wavelengths, divide long ones, blend between."""
    original = _original_length(p, longest)
    factor = p.number("factor", at_least=1.0)
    low, high = p.number("low_freq_factor"), p.number("high_freq_factor")
    if high <= low:
        raise BadInputError(
            f"scaling['high_freq_factor'] must be above scaling['low_freq_factor'], "
            f"got {high:g} and {low:g}"
        )
    inv_freq = default_inv_freq(dim, theta)
    turns = original * inv_freq / (2 * math.pi)  # over the trained length
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return Frequencies((1 - kept) * inv_freq / factor + kept * inv_freq)


def _longrope(dim: int, theta: float, p: Parameters, longest: int | None) -> Frequencies:
    """Ding et al., "LongRoPE" (2024), as in Phi-3: one factor a pair, in two sets."""
    original = _original_length(p, longest)
    if original != int(original):
        raise BadInputError(
            f"scaling['original_max_position_embeddings'] must be an integer, got {original:g}"
        )
    served = p.optional("max_position_embeddings", at_least=1.0)
    extension = (served if served is not None else longest or original) / original
    factor = p.number("factor", extension)
    attention_factor = p.optional("attention_factor")
    if attention_factor is None:
        extended = factor > 1 and original > 1
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if extended else 1.0
    inv_freq = default_inv_freq(dim, theta)
    short, long = (p.factors(name, dim // 2) for name in ("short_factor", "long_factor"))
    return Frequencies(inv_freq / short, attention_factor, Switch(int(original), inv_freq / long))


def _proportional(dim: int, theta: float, p: Parameters, longest: int | None) -> Frequencies:
    """Gemma's: the whole head is paired, a share of the pairs turns, the rest stands still."""
    del longest
    share = p.number("partial_rotary_factor", 1.0)
    if share > 1:
        raise BadInputError(f"scaling['partial_rotary_factor'] must be at most 1, got {share:g}")
    inv_freq = default_inv_freq(dim, theta) / p.number("factor", 1.0, at_least=1.0)
    turning = int(share * dim // 2)
    return Frequencies(torch.cat((inv_freq[:turning], torch.zeros_like(inv_freq[turning:]))))


def _axial(dim: int, theta: float, p: Parameters, longest: int | None) -> Frequencies:
    """Two axes for vision: half of the pairs by rows, half by columns, with the same frequencies.

    As in Qwen2-VL's vision tower and EVA-02: Fang et al. (2023).
    """
    del p, longest
    if dim % 4:
        raise BadInputError(f"scaling of rope_type 'axial' needs a dim divisible by 4, got {dim}")
    inv_freq = default_inv_freq(dim // 2, theta)
    pairs = len(inv_freq)
    return Frequencies(
        torch.cat((inv_freq, inv_freq)),
        axis_of_pair=(0,) * pairs + (1,) * pairs,
        one_position=False,
    )


def _axis_of_pair(p: Parameters, pairs: int) -> tuple[int, ...] | None:
    """Multimodal RoPE: which of time, height and width turns each pair.

    Sections one after the other (Wang et al., "Qwen2-VL", 2024), or interleaved (Qwen3-VL).
    """
    sections = p.whole_numbers("mrope_section")
    interleaved = p.flag("mrope_interleaved", default=False)
    if sections is None:
        if p.rope_type == "mrope":
            raise BadInputError("scaling of rope_type 'mrope' needs 'mrope_section'")
        return None
    if sum(sections) != pairs:
        raise BadInputError(
            f"scaling['mrope_section'] must add up to {pairs}, the pairs of a dim of {2 * pairs}, "
            f"got {list(sections)}"
        )
    axes = len(sections)
    if not interleaved:
        return tuple(axis for axis, count in enumerate(sections) for _ in range(count))
    turns = [pair % axes if pair < axes * sections[pair % axes] else 0 for pair in range(pairs)]
    if any(turns.count(axis) != count for axis, count in enumerate(sections)):
        raise BadInputError(
            f"scaling['mrope_section'] cannot be interleaved over {pairs} pairs, "
            f"got {list(sections)}"
        )
    return tuple(turns)


ROPE_TYPES: dict[str, Rule] = {
    "axial": _axial,
    "default": _default,
    "dynamic": _dynamic,
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "su": _longrope,  # Phi-3's first name for it
    "mrope": _default,  # the default with sections, as Qwen2-VL's files name it
    "ntk": _ntk,
    "proportional": _proportional,
    "yarn": _yarn,
}


def frequencies(
    dim: int, theta: float, scaling: Mapping[str, Any] | None, longest: int | None
) -> Frequencies:
    """Frequencies of a RoPE type, by a Hugging Face ``rope_parameters`` or ``rope_scaling`` object.

    Args:
        dim: rotated width of a head, even.
        theta: the base; ``scaling["rope_theta"]`` may state the same one.
        scaling: ``{"rope_type": …, …}`` (``"type"`` in older files), or None for the original RoPE.
        longest: longest sequence served, the default of ``original_max_position_embeddings``.

    Raises:
        BadInputError: the type is unknown, or a field is missing, unknown or out of range.
    """
    if scaling is None:
        return Frequencies(default_inv_freq(dim, theta))
    if not isinstance(scaling, Mapping):
        raise BadInputError(f"scaling must be an object with a rope_type, got {scaling!r}")
    names = [scaling[key] for key in ("rope_type", "type") if key in scaling]
    if sorted(map(repr, names)) == ["'default'", "'mrope'"]:  # both, as transformers rewrote it
        names = ["mrope"]
    if not names or any(name != names[0] for name in names):
        got = " and ".join(sorted(map(repr, names))) or "none"
        raise BadInputError(f"scaling must state one rope_type, got {got}")
    rope_type = names[0]
    rule = ROPE_TYPES.get(rope_type) if isinstance(rope_type, str) else None
    if rule is None:
        raise BadInputError(
            f"scaling['rope_type'] must be one of {', '.join(ROPE_TYPES)}, got {rope_type!r}"
        )
    parameters = Parameters(scaling, rope_type)
    stated = parameters.optional("rope_theta")
    if stated is not None and stated != theta:
        raise BadInputError(f"scaling['rope_theta'] and theta differ: {stated:g} and {theta:g}")
    result = rule(dim, theta, parameters, longest)
    if result.axis_of_pair is None:
        result = replace(result, axis_of_pair=_axis_of_pair(parameters, dim // 2))
    parameters.finish()
    return result
