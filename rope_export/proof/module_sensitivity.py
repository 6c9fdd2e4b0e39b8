"""What typical defects of a module's attentions and rotations would have shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from rope_export.attention.block import Attention
from rope_export.exporting.signature import Signature
from rope_export.proof.module_sizes import BATCH_LABELS
from rope_export.proof.reference import Semantics
from rope_export.proof.sensitivity import defects_of
from rope_export.rope.embedding import RotaryEmbedding
from rope_export.runtime.token_places import Array
from rope_export.runtime.trial import Trial

SENSITIVE_LENGTH = 64
Exact = Callable[..., dict[str, Array]]
"""Truth at given sizes, of a module with a defect of `full_precision.exactly`."""


def few_rows(signature: Signature, length: int) -> dict[str, int]:
    """Sizes of few rows of ``length`` tokens."""
    sizes = {
        label: signature.within(label, 1 if label in BATCH_LABELS else 2)
        for label in signature.free
    }
    new, past = signature.sequence, signature.past
    if new in signature.free:
        sizes[str(new)] = signature.within(str(new), length)
    if past in signature.free:
        before = 0 if new in signature.free else SENSITIVE_LENGTH
        sizes[str(past)] = signature.within(str(past), before)
    return sizes


def sensitivities(
    module: nn.Module, signature: Signature, sizes: Mapping[str, int], exact: Exact
) -> dict[str, float]:
    """Relative change of the first output that is no cache under typical defects.

    Args:
        module: what is proven.
        signature: what its graph takes and gives.
        sizes: of the labels.
        exact: evaluates truth there.
    """
    turns = any(isinstance(part, RotaryEmbedding) for part in module.modules())
    attentions = [part for part in module.modules() if isinstance(part, Attention)]
    name = next((n for n, kind in signature.kinds.items() if kind != "cache"), None)
    if name is None or not (attentions or turns):
        return {}
    truth = np.nan_to_num(exact(sizes)[name])
    if truth.dtype.kind != "f":
        return {}

    def change(**defect: Any) -> float:
        altered = np.nan_to_num(exact(sizes, **defect)[name])
        return float(np.linalg.norm(altered - truth) / max(float(np.linalg.norm(truth)), 1e-300))

    length = signature.new_tokens(sizes) if signature.sequence or signature.masked else 0
    names: dict[str, None] = {}
    for attention in attentions:
        names |= dict.fromkeys(defects_of(Semantics.of(attention), length))
    found = {}
    for defect in names:

        def alter(meaning: Semantics, defect: str = defect) -> Semantics:
            return defects_of(meaning, length).get(defect, meaning)

        found[defect] = change(alter=alter)
    if not names:
        mirrored = [change(mirrored=where) for where in ("angles", "rotation")]
        if any(mirrored):  # else the module turns by angles of its own
            found["sine negated"] = max(mirrored)
    return found


def blind_spots(
    signature: Signature, trials: Sequence[Trial], sensitivity: Callable[[], dict[str, float]]
) -> list[str]:
    """Defects that these inputs and weights would hide, in plain words."""
    name = next((n for n, kind in signature.kinds.items() if kind != "cache"), None)
    bounds = [t.expected[name].bound for t in trials if name in t.expected]
    if name is None or not bounds:
        return []
    allowed = max(bound.tolerance.rel for bound in bounds)
    hidden = {n: v for n, v in sensitivity().items() if v < 2 * allowed}
    if not hidden:
        return []
    listed = ", ".join(f"{n} ({v:.0e})" for n, v in hidden.items())
    return [
        f"with these weights and inputs some defects would hardly change {name} and could hide "
        f"within the tolerance of {allowed:.0e}: {listed}"
    ]
