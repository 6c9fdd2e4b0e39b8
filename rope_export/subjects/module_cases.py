"""The cases a module is proven on: sizes it was not traced at, inputs, truth, and eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rope_export import runtime
from rope_export.attention import Attention
from rope_export.cases import refuse_foreign, with_widest
from rope_export.draws import from_numpy, to_numpy
from rope_export.errors import BadInputError, RopeExportError
from rope_export.exact import Kept, exactly
from rope_export.lowering import rules
from rope_export.places import (
    Array,
    Places,
    cache_places,
    calls_of,
    given_places,
    new_places,
)
from rope_export.reference import Semantics
from rope_export.rotary import RotaryEmbedding
from rope_export.runtime.layout import MASK
from rope_export.sensitivity import defects_of
from rope_export.shapes import FOLLOWS_LENGTH, STORED_BYTES
from rope_export.subjects.call import Flat, check_dtype
from rope_export.subjects.inputs import Inputs, shown
from rope_export.subjects.labels import size_of
from rope_export.subjects.planner import BATCH_LABELS, Planner, Sizes
from rope_export.subjects.request import ModuleRequest
from rope_export.subjects.signature import POSITIONS, Signature
from rope_export.tracing import blamed
from rope_export.trial import Expected, Judged, Progress, Trial, rows_of

_WEIGHTS_SHARE = 0.3
_SENSITIVITY_LENGTH = 64
# A module called several times may be so far off one full pass, in float64.
_CONSISTENT = 1e-6


class Cases:
    """Everything a proof of a module runs.

    Args:
        request: the module, its example, and how it was exported.
        signature: what its graph takes and gives.
        choices: the forms its attentions took.

    Attributes:
        packs_rows: whether caches that go out have each row's tokens from the first slot on.
        layout: how a `Decoder` drives the graph, or None.
    """

    def __init__(
        self, request: ModuleRequest, signature: Signature, choices: Sequence[rules.Choice]
    ) -> None:
        self._request = request
        self._signature = signature
        self._choices = choices
        self._inputs = Inputs(request, signature)
        caching = [choice for choice in choices if choice.form.packs_rows]
        mixed = 0 < len(caching) < len(choices)
        self.packs_rows = bool(caching) and not mixed
        by_rows = not caching or all(choice.by_rows for choice in caching)
        self._notes: list[str] = list(
            dict.fromkeys(limit for choice in choices for limit in choice.limits)
        )
        if mixed and signature.layers:
            self._notes.append(
                "layers keep their caches in different orders: a Decoder serves rows of one length "
                "only"
            )
        self.layout = signature.layout(
            capacity=request.longest,
            packs_rows=self.packs_rows,
            by_rows=by_rows,
            padding=request.padding,
            ragged=not mixed,
        )
        if self.packs_rows and signature.reads_past and self.layout is not None:
            self._notes.append(
                "the module computes with the length of its past (a shape of past_key_values): the "
                "cache grows with each step instead of staying in one buffer, and a Decoder serves "
                "rows of one length only; take positions from attention_mask to change that"
            )
        self._sensitivity: dict[str, float] | None = None

    def layout_json(self) -> dict[str, Any]:
        """The layout as ``config.json`` has it."""
        assert self.layout is not None
        return asdict(self.layout)

    def trials(self, progress: Progress) -> tuple[list[Trial], list[str]]:
        """Draw inputs, evaluate truth and eager PyTorch.

        Returns:
            the trials, and what they leave out, in plain words.

        Raises:
            BadInputError: the module does not run at a size it is to serve, or computes something
                that rounding does not explain.
        """
        notes = list(self._notes)
        constants = self._request.call.constants
        if constants:
            fixed = ", ".join(f"{name}={value!r}" for name, value in constants.items())
            notes.append(f"fixed in the graph, as in the example: {fixed}")
        self._refuse_random()
        planned, cut = self._planner().planned()
        notes += cut
        trials: list[Trial] = []
        widest: dict[tuple[str, bool], float] = {}
        left = STORED_BYTES
        not_stored = []
        for index, case in enumerate(planned):
            at = f" ({shown(case.sizes)})" if case.sizes else ""
            progress(f"float64 truth and eager PyTorch: {case.name}{at}")
            rng = np.random.default_rng([self._request.seed, index])
            made = self._in_calls(case, rng, notes) if case.steps else self._single(case, rng)
            refuse_foreign(made, self._request.dtype, type(self._request.module).__name__)
            for name, expected in made.expected.items():
                row = expected.bound.tolerance.row
                widest[name, False] = max(widest.get((name, False), 0.0), row)
            size = sum(a.nbytes for part in (made.inputs, made.outputs) for a in part.values())
            if made.outputs and size > left:
                not_stored.append(made.name)
                made = replace(made, outputs={})
            elif made.outputs:
                left -= size
            trials.append(made)
        if not_stored:
            notes.append(
                f"{', '.join(not_stored)}: proven at export but not stored as test vectors (64 MiB "
                "in all)"
            )
        notes += self._blind_spots(trials)
        return [with_widest(trial, widest, loud=False, deep=True) for trial in trials], notes

    def _planner(self) -> Planner:
        return Planner(
            self._signature,
            self._choices,
            self.layout,
            longest=self._request.longest,
            heads=max((m.num_heads for m in _attentions(self._request.module)), default=0),
            operations=self._operations,
        )

    def _operations(self, sizes: Mapping[str, int]) -> float:
        tensors = self._tensors(self._inputs.draw(sizes, np.random.default_rng(0), ()))
        with FlopCounterMode(display=False) as counter:
            self._exact(tensors)
        return float(counter.get_total_flops())

    def sensitivity(self) -> dict[str, float]:
        """Relative change of the truth under typical defects, of the first output."""
        if self._sensitivity is None:
            self._sensitivity = self._sensitivities()
        return self._sensitivity

    def _tensors(self, inputs: Mapping[str, Array]) -> list[Tensor]:
        device = self._device
        return [
            from_numpy(np.asarray(inputs[n], order="C")).to(device)
            for n in self._request.call.names
        ]

    @cached_property
    def _device(self) -> torch.device:
        return self._request.call.tensors[0].device

    # Truth and eager PyTorch.

    def _exact(
        self,
        tensors: Sequence[Tensor],
        alter: Callable[[Semantics], Semantics] | None = None,
        *,
        mirrored: bool = False,
    ) -> dict[str, Array]:
        request = self._request
        wide = [t.double() if t.is_floating_point() else t for t in tensors]
        flat = Flat(request.call, request.output_names)
        with exactly(request.module, alter, mirrored=mirrored, kept=self._wide_weights):
            results = flat(*wide)
        return {
            leaf.name: to_numpy(r.detach().cpu().contiguous())
            for leaf, r in zip(flat.outputs, results, strict=True)
        }

    def _eager(self, tensors: Sequence[Tensor], where: str) -> dict[str, Array]:
        request = self._request
        leaves, results = run_eagerly(request, tensors, where)
        return {
            leaf.name: to_numpy(r.detach().cpu().contiguous())
            for leaf, r in zip(leaves, results, strict=True)
        }

    def _single(self, case: Sizes, rng: np.random.Generator) -> Trial:
        """One call."""
        inputs = self._inputs.draw(case.sizes, rng, case.lengths)
        where = shown(case.sizes) or "its size"
        tensors = self._tensors(inputs)
        eager = self._eager(tensors, where)
        truth = self._exact(tensors)
        mask = inputs[MASK] if self._signature.masked else None
        expected, outputs = {}, {}
        for name, kind in self._signature.kinds.items():
            at = columns = self._places(kind, mask, case)
            if kind == "cache" and mask is not None and self.packs_rows:
                at = cache_places(mask, packs_rows=True)
            judged = Judged(kind, at, eager[name].shape)
            part = self._judge(
                judged,
                rows_of(truth[name], columns, kind),
                rows_of(eager[name], columns, kind),
                eager[name].dtype.name,
            )
            if part is None:
                raise BadInputError(
                    f"{type(self._request.module).__name__} must give finite numbers: eager "
                    f"PyTorch itself does not, in {name} at {where}"
                )
            expected[name] = part
            outputs[name] = _placed(part, eager[name])
        rows, length = self._shape_of(inputs)
        past = 0
        if self._signature.past is not None:
            past = size_of(self._signature.past, case.sizes)
        return Trial(
            name=case.name,
            batch=rows,
            sequence=length,
            past=past,
            inputs=inputs,
            expected=expected,
            outputs=outputs,
        )

    def _refuse_random(self) -> None:
        tensors = self._request.call.tensors
        first, second = (self._eager(tensors, "the example inputs") for _ in range(2))
        for name, array in first.items():
            if not np.array_equal(array, second[name], equal_nan=array.dtype.kind == "f"):
                raise BadInputError(
                    f"{type(self._request.module).__name__} must give the same numbers for the "
                    f"same inputs, and {name} of two runs differs: look for random numbers and "
                    "dropout that is always on"
                )

    def _judge(self, judged: Judged, truth: Array, eager: Array, dtype: str) -> Expected | None:
        return judged.expected(truth, eager, dtype, self._products, rounding=self._request.dtype)

    @cached_property
    def _wide_weights(self) -> Kept | None:
        """Weights in float64 while the proof lasts, where there is memory for them."""
        size = 8 * sum(p.numel() for p in self._request.module.parameters())
        return {} if size < _WEIGHTS_SHARE * runtime.available_memory() else None

    @cached_property
    def _products(self) -> int:
        """Length of the longest sum of products."""
        return max(
            (p.numel() // p.shape[0] for p in self._request.module.parameters() if p.ndim > 1),
            default=1,
        )

    def _places(self, kind: str, mask: Array | None, case: Sizes) -> Places | None:
        if mask is None or kind == "whole":
            return None
        if kind == "cache":
            return cache_places(mask, packs_rows=False)
        return new_places(mask, self._signature.new_tokens(case.sizes))

    def _shape_of(self, inputs: Mapping[str, Array]) -> tuple[int, int]:
        first = inputs[self._signature.tokens].shape
        return (first[0] if first else 1), (first[1] if len(first) > 1 else 1)

    def _in_calls(self, case: Sizes, rng: np.random.Generator, notes: list[str]) -> Trial:
        """A full pass in several calls with a cache between them."""
        layout = self.layout
        assert layout is not None
        inputs = self._inputs.draw(case.sizes, rng, ())
        tokens, ids = inputs[layout.tokens], inputs.get(POSITIONS)
        at = given_places(case.steps)
        full = self._exact(self._tensors(inputs))[layout.output]
        truth = np.zeros_like(full)
        eager: Array = np.zeros(0)
        empty = [inputs[name][:, :, :0] for name, *_ in layout.names()]
        pasts = {"truth": empty, "eager": empty}
        mask = np.zeros((tokens.shape[0], 0), dtype=np.int64)
        for call in calls_of(tokens, ids, case.steps, layout.padding):
            mask = np.concatenate((mask, call.mask), axis=1)
            now: dict[str, Array] = {layout.tokens: call.tokens}
            if layout.mask:
                now[MASK] = mask.astype(inputs[MASK].dtype)
            if call.position_ids is not None:
                now[POSITIONS] = call.position_ids
            for kind in pasts:
                for (name, *_), past in zip(layout.names(), pasts[kind], strict=True):
                    now[name] = past
                tensors = self._tensors(now)
                if kind == "truth":
                    given = self._exact(tensors)
                else:
                    given = self._eager(tensors, "several calls")
                answer = given[layout.output]
                if kind == "eager" and not eager.size:
                    eager = np.zeros(full.shape, answer.dtype)
                (truth if kind == "truth" else eager)[call.of_pass] = answer[call.at]
                pasts[kind] = [given[present] for _, present, *_ in layout.names()]
        judged = Judged("tokens", at, full.shape)
        part = self._judge(
            judged, rows_of(truth, at, "tokens"), rows_of(eager, at, "tokens"), eager.dtype.name
        )
        if part is None:
            raise BadInputError("eager PyTorch gives no finite numbers when called several times")
        whole = rows_of(full, at, "tokens")
        norm = max(float(np.linalg.norm(whole)), 1e-300)
        off = float(np.linalg.norm(whole - part.truth)) / norm
        moves = any(
            part.found.beyond or part.found.stretch
            for part in self._request.module.modules()
            if isinstance(part, RotaryEmbedding)
        )
        text = (
            FOLLOWS_LENGTH
            if moves
            else "the module itself, in PyTorch, is off one full pass when it is called several "
            f"times with its cache (by {off:.1e}, '{case.name}'): check its positions and masks"
        )
        if off > _CONSISTENT and not any(note[:30] == text[:30] for note in notes):
            notes.append(text)
        rows, length = self._shape_of(inputs)
        return Trial(
            name=case.name,
            batch=rows,
            sequence=length,
            past=0,
            inputs=inputs,
            expected={layout.output: part},
            outputs={layout.output: _placed(part, eager)},
            steps=case.steps,
        )

    # What the proof would see.

    def _sensitivities(self) -> dict[str, float]:
        signature, module = self._signature, self._request.module
        sizes = {
            label: signature.within(label, 1 if label in BATCH_LABELS else 2)
            for label in signature.free
        }
        if signature.sequence in signature.free:
            sizes[str(signature.sequence)] = signature.within(
                str(signature.sequence), _SENSITIVITY_LENGTH
            )
        if signature.past in signature.free:
            before = 0 if signature.sequence in signature.free else _SENSITIVITY_LENGTH
            sizes[str(signature.past)] = signature.within(str(signature.past), before)
        rng = np.random.default_rng([self._request.seed, 1 << 21])
        tensors = self._tensors(self._inputs.draw(sizes, rng, ()))
        length = self._signature.new_tokens(sizes) if signature.sequence or signature.masked else 0
        name = next((n for n, kind in signature.kinds.items() if kind != "cache"), None)
        if name is None:
            return {}
        truth = self._exact(tensors)[name]
        if truth.dtype.kind != "f":
            return {}

        def change(altered: dict[str, Array]) -> float:
            return float(
                np.linalg.norm(altered[name] - truth) / max(float(np.linalg.norm(truth)), 1e-300)
            )

        names: dict[str, None] = {}
        for attention in _attentions(module):
            names |= dict.fromkeys(defects_of(Semantics.of(attention), length))
        found = {}
        for defect in names:

            def alter(meaning: Semantics, defect: str = defect) -> Semantics:
                return defects_of(meaning, length).get(defect, meaning)

            found[defect] = change(self._exact(tensors, alter))
        if not names and any(isinstance(m, RotaryEmbedding) for m in module.modules()):
            found["sine negated"] = change(self._exact(tensors, mirrored=True))
        return found

    def _blind_spots(self, trials: Sequence[Trial]) -> list[str]:
        """Defects that these inputs and weights would hide."""
        name = next((n for n, kind in self._signature.kinds.items() if kind != "cache"), None)
        bounds = [t.expected[name].bound for t in trials if name in t.expected]
        if name is None or not bounds:
            return []
        allowed = max(bound.tolerance.rel for bound in bounds)
        hidden = {n: v for n, v in self.sensitivity().items() if v < 2 * allowed}
        if not hidden:
            return []
        listed = ", ".join(f"{n} ({v:.0e})" for n, v in hidden.items())
        return [
            f"with these weights and inputs some defects would hardly change {name} and could hide "
            f"within the tolerance of {allowed:.0e}: {listed}"
        ]


def run_eagerly(
    request: ModuleRequest, tensors: Sequence[Tensor], where: str
) -> tuple[list[Any], list[Tensor]]:
    """Run the module itself, uncompiled.

    Returns:
        names of its results, and the results.

    Raises:
        BadInputError: it raises.
    """
    flat = Flat(request.call, request.output_names)
    was_training = [part for part in request.module.modules() if part.training]
    request.module.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            results = flat(*tensors)
    except RopeExportError:
        raise
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        raise BadInputError(
            f"{blamed(error)} raises {type(error).__name__} at {where}: {first}"
        ) from error
    finally:
        for part in was_training:
            part.training = True
    for leaf, result in zip(flat.outputs, results, strict=True):
        check_dtype(leaf.name, result)
    return flat.outputs, list(results)


def _attentions(module: nn.Module) -> list[Attention]:
    return [part for part in module.modules() if isinstance(part, Attention)]


def _placed(part: Expected, like: Array) -> Array:
    """The whole output with truth at the places compared, and zeros elsewhere."""
    if part.at is None:
        whole: Array = part.truth.reshape(like.shape).astype(like.dtype)
        return whole
    whole = np.zeros(like.shape, like.dtype)
    row, place = part.at
    values = part.truth.astype(like.dtype)
    if part.kind == "tokens":
        whole[row, place] = values.reshape(len(row), *like.shape[2:])
    else:
        whole[row, :, place] = values.reshape(len(row), like.shape[1], like.shape[3])
    return whole
