"""The cases a module is proven on: sizes it was not traced at, inputs, truth, and eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rope_export import runtime
from rope_export.artifacts.cache_layout import KINDS, MASK
from rope_export.attention.block import Attention
from rope_export.errors import BadInputError
from rope_export.exporting.blame import in_one_line
from rope_export.exporting.call import Flat
from rope_export.exporting.eager import run_eagerly
from rope_export.exporting.labels import size_of
from rope_export.exporting.module import ModuleRequest
from rope_export.exporting.signature import POSITIONS
from rope_export.exporting.subject import Interface
from rope_export.proof.arrays import from_numpy, to_numpy
from rope_export.proof.full_precision import Kept, exactly, widened
from rope_export.proof.limits import FOLLOWS_LENGTH
from rope_export.proof.module_inputs import Inputs, shown
from rope_export.proof.module_sensitivity import (
    SENSITIVE_LENGTH,
    blind_spots,
    few_rows,
    sensitivities,
)
from rope_export.proof.module_sizes import BATCH_LABELS, Planner, Sizes
from rope_export.proof.module_state import refuse_what_a_graph_cannot_keep
from rope_export.proof.own_code import agreement_notes
from rope_export.proof.reference import Semantics
from rope_export.rope.embedding import RotaryEmbedding
from rope_export.runtime.token_places import (
    Array,
    Places,
    cache_places,
    calls_of,
    given_places,
    new_places,
)
from rope_export.runtime.trial import Expected, Judged, Trial, rows_of

_WEIGHTS_SHARE = 0.3
# A proof of numbers that are no numbers would prove nothing.
_MOSTLY = 0.5
# A module called several times may be so far off one full pass, in float64.
_CONSISTENT = 1e-6


class ModuleCases:
    """Everything a proof of a module runs.

    Args:
        request: the module, its example, and how it was exported.
        interface: of its graph.
    """

    deep = True

    def __init__(self, request: ModuleRequest, interface: Interface) -> None:
        self._request = request
        self._interface = interface
        self._signature = interface.signature
        self._inputs = Inputs(request, interface.signature)
        self._inconsistent: list[str] = []
        self._sensitivity: dict[str, float] | None = None
        self._drew = 0
        self._undefined: dict[str, str] = {}
        self._proven_length = SENSITIVE_LENGTH
        self.what = type(request.module).__name__

    def planned(self) -> tuple[list[Sizes], list[str]]:
        """Sizes, none of them the ones it was traced at.

        Raises:
            BadInputError: the module gives other numbers each time.
        """
        notes = list(self._interface.notes)
        constants = self._request.call.constants
        if constants:
            fixed = ", ".join(f"{name}={value!r}" for name, value in constants.items())
            notes.append(f"fixed in the graph, as in the example: {fixed}")
        self._refuse_other_padding()
        notes += agreement_notes(self._request.module, self._request.longest, self._wide_weights)
        planned, cut = self._planner().planned()
        if self._signature.sequence in self._signature.free:
            self._proven_length = max(case.sizes[self._signature.sequence] for case in planned)
        others = [
            partial(self._drawn_tensors, case.sizes, case.lengths)
            for case in _of_different_sizes(planned)
        ]
        refuse_what_a_graph_cannot_keep(self._request, others)
        notes += [note for each in self._inputs.likenesses.values() if (note := each.note())]
        return planned, notes + cut

    def at(self, case: Sizes) -> str:
        """Sizes of the labels."""
        return f" ({shown(case.sizes)})" if case.sizes else ""

    def trial(self, case: Sizes, rng: np.random.Generator, made: Sequence[Trial]) -> Trial:
        """Draw inputs, and evaluate truth and eager PyTorch on them.

        Raises:
            BadInputError: the module does not run there, or gives no finite numbers.
        """
        del made  # every case draws its own
        return self._in_calls(case, rng) if case.steps else self._single(case, rng)

    def notes(self, trials: Sequence[Trial]) -> list[str]:
        """What differs between calls, which trials are not stored, and what would hide."""
        notes = [*self._inconsistent]
        notes += [
            f"{name} is NaN in PyTorch too where nothing is seen (first in '{case}'): the graph "
            "must be NaN there, and only there"
            for name, case in self._undefined.items()
        ]
        not_stored = [trial.name for trial in trials if not trial.stored]
        if not_stored:
            notes.append(
                f"{', '.join(not_stored)}: proven at export but not stored as test vectors (64 MiB "
                "in all)"
            )
        return notes + blind_spots(self._signature, trials, self.sensitivity)

    def _planner(self) -> Planner:
        return Planner(
            self._signature,
            self._interface.choices,
            self._interface.layout,
            longest=self._request.longest,
            heads=max((m.num_heads for m in _attentions(self._request.module)), default=0),
            operations=self._operations,
            example=self._request.labelled.sizes,
        )

    def _drawn_tensors(
        self, sizes: Mapping[str, int], lengths: tuple[int, ...] = ()
    ) -> list[Tensor]:
        rng = np.random.default_rng(0)
        return self._tensors(self._inputs.draw(sizes, rng, lengths, varied=False, within=True))

    def _operations(self, sizes: Mapping[str, int]) -> float:
        tensors = self._drawn_tensors(sizes)
        with FlopCounterMode(display=False) as counter:
            self._exact(tensors)
        return float(counter.get_total_flops())

    def sensitivity(self) -> dict[str, float]:
        """Relative change of the truth under typical defects, of the first output."""
        if self._sensitivity is None:
            self._sensitivity = sensitivities(
                self._request.module, self._signature, self._sizes_of_sensitivity(), self._exact_at
            )
        return self._sensitivity

    def _sizes_of_sensitivity(self) -> dict[str, int]:
        return few_rows(self._signature, min(SENSITIVE_LENGTH, self._proven_length))

    def _exact_at(self, sizes: Mapping[str, int], **defect: Any) -> dict[str, Array]:
        rng = np.random.default_rng([self._request.seed, 1 << 21])
        return self._exact(self._tensors(self._inputs.draw(sizes, rng, ())), **defect)

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
        mirrored: str | None = None,
        where: str = "the sizes of a proof",
    ) -> dict[str, Array]:
        request = self._request
        wide = [widened(tensor) for tensor in tensors]
        flat = Flat(request.call.fresh(), request.output_names)
        with (
            in_one_line(f"at {where}, where all its operators compute in float64, as truth needs"),
            exactly(flat.module, alter, mirrored=mirrored, kept=self._wide_weights),
        ):
            results = flat(*wide)
        return {
            leaf.name: to_numpy(r.detach().cpu().contiguous())
            for leaf, r in zip(flat.outputs, results, strict=True)
        }

    def _eager(self, tensors: Sequence[Tensor], where: str) -> dict[str, Array]:
        request = self._request
        leaves, results = run_eagerly(request.call, request.output_names, tensors, where)
        return {
            leaf.name: to_numpy(r.detach().cpu().contiguous())
            for leaf, r in zip(leaves, results, strict=True)
        }

    def _single(self, case: Sizes, rng: np.random.Generator) -> Trial:
        """One call: by the caller's own inputs, or by inputs drawn as those are.

        What is drawn may be what no caller would give; where the module refuses it, a more careful
        draw is tried before its refusal is taken for an answer.
        """
        if case.given or self._request.inputs is not None:
            return self._called(case, self._drawn(case, rng))
        inputs = self._drawn(case, rng, varied=self._drew % 2 == 1)
        self._drew += 1
        try:
            return self._called(case, inputs)
        except BadInputError as refusal:
            for other in self._careful(case):
                try:
                    return self._called(other, self._drawn(other, rng, varied=False, within=True))
                except BadInputError:
                    continue
            raise BadInputError(f"{refusal}{self._hint(case, inputs)}") from refusal

    def _careful(self, case: Sizes) -> list[Sizes]:
        """The case again, and the longest sequence less what a single number may shift it by."""
        label = self._signature.sequence
        shift = self._inputs.shift
        if label is None or not 0 < shift < case.sizes.get(label, 0):
            return [case]
        fewer = {**case.sizes, label: case.sizes[label] - shift}
        return [case, replace(case, sizes=fewer)]

    def _hint(self, case: Sizes, inputs: Mapping[str, Array]) -> str:
        """What of a failed case was the proof's own choice, and how to choose otherwise."""
        hints = []
        drawn = self._inputs.drawn_in_words(inputs)
        if drawn:
            hints.append(
                f"the proof drew {drawn} there: inputs= (the factory's key 'inputs') draws others"
            )
        example = self._request.labelled.sizes
        unstated = [
            label
            for label, size in case.sizes.items()
            if self._signature.free[label][1] is None
            and size != example[label]
            and label not in BATCH_LABELS
        ]
        if unstated:
            hints.append(
                f"{' and '.join(unstated)} may be any size: "
                f"torch.export.Dim({unstated[-1]!r}, min=, max=) or --range says which, and a "
                f"label such as '8*{unstated[-1]}' says of which only multiples"
            )
        return "".join(f"; {hint}" for hint in hints)

    def _drawn(
        self, case: Sizes, rng: np.random.Generator, *, varied: bool = True, within: bool = False
    ) -> dict[str, Array]:
        if case.given:
            return self._inputs.example()
        return self._inputs.draw(case.sizes, rng, case.lengths, varied=varied, within=within)

    def _called(self, case: Sizes, inputs: dict[str, Array]) -> Trial:
        where = shown(case.sizes) or "its size"
        tensors = self._tensors(inputs)
        eager = self._eager(tensors, where)
        truth = self._exact(tensors, where=where)
        mask = inputs[MASK] if self._signature.masked else None
        expected, outputs = {}, {}
        windows = self._signature.windowed()
        for name, kind in self._signature.kinds.items():
            at = columns = self._places(kind, mask, case)
            window = windows.get(name, 0)
            if window and mask is not None:
                slots = eager[name].shape[2]
                at = cache_places(mask, packs_rows=True, window=window, capacity=slots)
                columns = at
            elif kind == "cache" and mask is not None and self._interface.packs_rows:
                at = cache_places(mask, packs_rows=True)
            judged = Judged(kind, at, eager[name].shape)
            part = self._judge(
                judged,
                rows_of(truth[name], columns, kind),
                rows_of(eager[name], columns, kind),
                eager[name].dtype.name,
            )
            undefined = 0.0 if part is None else float(np.isnan(part.truth).mean())
            if part is None or (case.given and undefined > _MOSTLY):
                raise BadInputError(
                    f"{type(self._request.module).__name__} must give finite numbers: eager "
                    f"PyTorch itself does not, in {name} at {where}"
                )
            if undefined:
                self._undefined.setdefault(name, case.name)
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

    def _refuse_other_padding(self) -> None:
        """Graphs of our attention are made for one side."""
        side = self._inputs.padded_side
        if side is not None and self._interface.choices and side != self._request.padding:
            raise BadInputError(
                f"{MASK} pads on the {side} in the example, and the graph is made for padding on "
                f"the {self._request.padding}: give padding={side!r} (--padding {side})"
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

    def _in_calls(self, case: Sizes, rng: np.random.Generator) -> Trial:
        """A full pass in several calls with a cache between them."""
        layout = self._interface.layout
        assert layout is not None
        inputs = self._inputs.draw(case.sizes, rng, ())
        tokens, ids = inputs[layout.tokens], inputs.get(POSITIONS)
        at = given_places(case.steps)
        full = self._exact(self._tensors(inputs))[layout.output]
        truth = np.zeros_like(full)
        eager: Array = np.zeros(0)
        # Slots of a window are there from the beginning, and nothing in them is a token.
        windows = [layer.window for layer in layout.layers for _ in KINDS]
        empty = [
            inputs[name] if window else inputs[name][:, :, :0]
            for (name, *_), window in zip(layout.names(), windows, strict=True)
        ]
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
        if off > _CONSISTENT and not self._inconsistent:
            self._inconsistent.append(text)
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


def _of_different_sizes(planned: Sequence[Sizes]) -> list[Sizes]:
    """Two cases to call a module with before it is called with its example again."""
    drawn = [case for case in planned if not case.given and not case.steps]
    return [*drawn[-1:], *drawn[:1]]


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
