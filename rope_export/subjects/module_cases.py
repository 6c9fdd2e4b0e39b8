"""The cases a module is proven on: sizes it was not traced at, inputs, truth, and eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from rope_export.sensitivity import defects_of
from rope_export.shapes import STORED_BYTES
from rope_export.subjects.call import Flat, check_dtype
from rope_export.subjects.labels import is_name, size_of
from rope_export.subjects.request import ModuleRequest
from rope_export.subjects.signature import MASK, POSITIONS, Signature
from rope_export.tracing import blamed
from rope_export.trial import Expected, Judged, Progress, Trial, rows_of

# Beyond so many operations (about a minute of float64 here) a length is not proven.
_TRUTH_FLOPS = 4e12
_MEMORY_SHARE = 0.6
_WEIGHTS_SHARE = 0.3
_SENSITIVITY_LENGTH = 64
_BATCH_LABELS = ("batch", "rows")


@dataclass(frozen=True)
class Sizes:
    """One case before its numbers.

    Attributes:
        name: what it covers.
        sizes: of every label that stands for itself.
        lengths: new tokens of each row that are no padding; empty when none is.
        steps: when not empty, the case is one full pass that is run in several calls: how many
            tokens each row is given in each.
    """

    name: str
    sizes: Mapping[str, int]
    lengths: tuple[int, ...] = ()
    steps: tuple[tuple[int, ...], ...] = ()


class Cases:
    """Everything a proof of a module runs.

    Args:
        request: the module, its example, and how it was exported.
        signature: what its graph takes and gives.
        choices: the forms its attentions took.
    """

    def __init__(
        self, request: ModuleRequest, signature: Signature, choices: Sequence[rules.Choice]
    ) -> None:
        self._request = request
        self._signature = signature
        self._choices = choices
        caching = [choice for choice in choices if choice.form.packs_rows]
        mixed = 0 < len(caching) < len(choices)
        self._packs = bool(caching) and not mixed
        self._by_rows = not caching or all(choice.by_rows for choice in caching)
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
            packs_rows=self._packs,
            by_rows=self._by_rows,
            padding=request.padding,
            ragged=not mixed,
        )
        if self._packs and signature.reads_past and self.layout is not None:
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
        planned, cut = self._planned()
        notes += cut
        trials: list[Trial] = []
        widest: dict[tuple[str, bool], float] = {}
        left = STORED_BYTES
        not_stored = []
        for index, case in enumerate(planned):
            shown = _shown(case.sizes)
            progress(
                f"float64 truth and eager PyTorch: {case.name}" + (f" ({shown})" if shown else "")
            )
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

    def sensitivity(self) -> dict[str, float]:
        """Relative change of the truth under typical defects, of the first output."""
        if self._sensitivity is None:
            self._sensitivity = self._sensitivities()
        return self._sensitivity

    # Sizes.

    def _planned(self) -> tuple[list[Sizes], list[str]]:
        signature = self._signature
        free, notes = signature.free, []
        new, past = signature.sequence, signature.past
        new = new if new in free else None
        past = past if past in free else None
        others = [label for label in free if label not in (new, past)]
        longest: dict[str, int] = {}
        for label in free:
            high = free[label][1]
            if high is None and label not in _BATCH_LABELS:
                notes.append(
                    f"{label} has no stated maximum and is proven at a few small sizes "
                    f"(torch.export.Dim({label!r}, max=N) or --range {label}=1:N states one)"
                )
            elif high is not None and label != past and label not in _BATCH_LABELS:
                fits, why = self._affordable(label, high)
                longest[label] = fits
                if fits < high:
                    notes.append(f"proven only up to {label} {fits} of {high}: {why}")

        def sizes(batch: int, length: int, before: int = 0) -> dict[str, int]:
            chosen = {}
            for index, label in enumerate(others):
                chosen[label] = self._within(label, batch + 2 * index if batch > 1 else 1)
            if new is not None:
                chosen[new] = self._within(new, length)
            if past is not None:
                chosen[past] = self._within(past, before)
            return {label: chosen[label] for label in free}

        if not free:
            return [Sizes("fixed", {}), Sizes("fixed again", {}), *self._padded(sizes)], notes
        planned = [
            Sizes("smallest" if new is None else "one token", sizes(1, 1)),
            Sizes("odd sizes" if new is None else "odd length", sizes(3 if new is None else 1, 13)),
            Sizes("larger sizes" if new is None else "batch of five", sizes(5, 32)),
            Sizes("two rows", sizes(2, 7)),
        ]
        for label, high in longest.items():
            name = "longest" if label == new else f"longest {label}"
            planned.append(Sizes(name, sizes(1, 1) | {label: high}))
        planned += self._padded(sizes)
        if past is not None:
            planned += self._after_a_past(sizes)
        distinct = {
            (tuple(case.sizes.items()), case.lengths, case.steps): case
            for case in reversed(planned)
        }
        served = [case for case in reversed(distinct.values()) if self._serves(case)]
        return served, notes

    def _within(self, label: str, size: int) -> int:
        low, high = self._signature.free[label]
        return max(low, size if high is None else min(size, high))

    def _serves(self, case: Sizes) -> bool:
        """Whether no sequence is over the longest, and no axis below nothing."""
        signature = self._signature
        fits = all(size_of(text, case.sizes) <= self._request.longest for text in signature.lengths)
        axes = [axis for of_input in signature.inputs.values() for axis in of_input]
        return fits and all(size_of(axis, case.sizes) >= 0 for axis in axes)

    def _padded(self, sizes: Callable[..., dict[str, int]]) -> list[Sizes]:
        """Rows of different lengths, where there is a mask to say so."""
        signature = self._signature
        if not signature.masked or (signature.layers and signature.past is None):
            return []
        chosen = sizes(4, 13)
        length = self._length(chosen)
        rows = size_of(signature.inputs[MASK][0], chosen)
        if length < 2:
            return []
        lengths = tuple(max(1, n) for n in (length, 1, length // 2, length - 1))
        lengths = tuple(lengths[row % 4] for row in range(rows))
        if all(n == length for n in lengths):
            lengths = (length - 1,) * rows
        return [Sizes("rows of different lengths", chosen, lengths=lengths)]

    def _after_a_past(self, sizes: Callable[..., dict[str, int]]) -> list[Sizes]:
        longest = self._request.longest
        ends = self._signature.free[str(self._signature.past)][1]
        longest = min(longest, (longest if ends is None else ends) + 1)
        new = self._signature.new
        fewest = new if isinstance(new, int) else 1
        planned = [
            Sizes("decode after one", sizes(2, 1, 1)),
            Sizes("decode", sizes(2, 1, 16)),
            Sizes("decode at capacity", sizes(1, 1, max(0, longest - fewest))),
        ]
        if self._signature.sequence not in self._signature.free:
            return planned
        planned += [
            Sizes("chunk", sizes(1, 5, 9)),
            Sizes("chunk up to capacity", sizes(1, 3, max(0, longest - 3))),
        ]
        if self._by_rows:
            planned.append(Sizes("chunk of a batch", sizes(3, 4, 9)))
        if self.layout is None:
            return planned
        rows, length = 3, min(24, longest)
        chosen = sizes(rows, length)
        if length < 8 or chosen[str(self._signature.sequence)] != length:
            return planned
        rows = size_of(self._signature.inputs[self._signature.tokens][0], chosen)
        third = length // 3
        chunks = [third, third] if self._by_rows or rows == 1 else [third]
        even = [(n,) * rows for n in [*chunks, *[1] * min(6, length - sum(chunks))]]
        planned.append(Sizes("prefill and decode", chosen, steps=tuple(even)))
        if self.layout.ragged and rows > 1:
            ragged = [tuple((third, 1, third // 2 + 1)[row % 3] for row in range(rows))]
            ragged += [(1,) * rows] * min(6, length - third)
            name = "prefill and decode, rows of different lengths"
            planned.append(Sizes(name, chosen, steps=tuple(ragged)))
        return planned

    def _affordable(self, label: str, high: int) -> tuple[int, str]:
        """The largest size up to ``high`` whose truth is affordable here, and why not more."""
        base = {name: low for name, (low, _) in self._signature.free.items()}
        near, far = (self._within(label, size) for size in (64, 128))
        if high <= far or near == far:
            return high, ""
        less, more = (self._operations(base | {label: size}) for size in (near, far))
        # Operations as a line and a square through two points.
        square = max(0.0, (more / far - less / near) / (far - near))
        line = max(0.0, less / near - square * near)
        copies = max((max(c.score_copies.values()) for c in self._choices), default=0.0)
        heads = max((m.num_heads for m in _attentions(self._request.module)), default=0)
        available = _MEMORY_SHARE * runtime.available_memory()
        width = sum(self._elements(base | {label: far})) / far

        def fits(size: int) -> str:
            if line * size + square * size**2 > _TRUTH_FLOPS:
                return "float64 truth for more would take too long"
            needed = 4 * copies * heads * size**2 + 24 * width * size
            if needed > available:
                return f"more would need over {available / 2**30:.1f} GiB"
            return ""

        size, why = high, fits(high)
        while size > far and fits(size):
            size //= 2
        return size, why

    def _operations(self, sizes: Mapping[str, int]) -> float:
        tensors = self._tensors(self._draw(sizes, np.random.default_rng(0), ()))
        with FlopCounterMode(display=False) as counter:
            self._exact(tensors)
        return float(counter.get_total_flops())

    def _elements(self, sizes: Mapping[str, int]) -> list[int]:
        axes = [*self._signature.inputs.values()]
        for of_output in self._signature.outputs.values():
            try:
                [size_of(axis, sizes) for axis in of_output]
            except (KeyError, BadInputError):
                continue
            axes.append(of_output)
        return [int(np.prod([size_of(axis, sizes) for axis in each])) for each in axes]

    def _length(self, sizes: Mapping[str, int]) -> int:
        """New tokens in a row."""
        new = self._signature.new
        return size_of(self._signature.inputs[MASK][1] if new is None else new, sizes)

    # Inputs.

    def _draw(
        self, sizes: Mapping[str, int], rng: np.random.Generator, lengths: tuple[int, ...]
    ) -> dict[str, Array]:
        """Inputs of given sizes by name."""
        signature, call = self._signature, self._request.call
        given = self._given(sizes, rng)
        drawn: dict[str, Array] = {}
        for leaf, example in zip(call.leaves, call.tensors, strict=True):
            axes = signature.inputs[leaf.name]
            shape = tuple(size_of(axis, sizes) for axis in axes)
            if leaf.name in given:
                drawn[leaf.name] = _fitting(leaf.name, given[leaf.name], shape, example)
            elif leaf.name == MASK and signature.masked:
                new = self._length(sizes) if lengths else 0
                drawn[leaf.name] = self._mask(shape, lengths, new, example)
            else:
                start = 0
                if signature.past is not None:
                    start = size_of(signature.past, sizes)
                drawn[leaf.name] = _like(example, shape, rng, start)
        return drawn

    def _given(self, sizes: Mapping[str, int], rng: np.random.Generator) -> dict[str, Tensor]:
        """What the caller's own function draws."""
        request = self._request
        if request.inputs is None:
            return {}
        known = dict(sizes)
        for _, _, asked in request.asked():
            if is_name(asked.label) and asked.label not in known:
                axes = self._signature.inputs
                known |= {
                    label.label: size_of(axes[name][axis], sizes)
                    for name, axis, label in request.asked()
                    if label.label == asked.label
                }
        try:
            got = request.inputs(known, rng)
        except Exception as error:
            raise BadInputError(
                f"inputs must draw inputs of every size: {blamed(error)} raises "
                f"{type(error).__name__} at {_shown(known)}: {error}"
            ) from error
        if not isinstance(got, Mapping):
            raise BadInputError(f"inputs must return arguments by name, got {type(got).__name__}")
        arguments = dict(request.call.arguments)
        unknown = [name for name in got if name not in arguments]
        if unknown:
            raise BadInputError(
                f"inputs must return arguments of the example ({', '.join(arguments)}), got "
                f"{unknown[0]!r}"
            )
        found: dict[str, Tensor] = {}
        for name, value in got.items():
            names = [leaf.name for leaf in request.call.leaves if leaf.argument == name]
            parts = torch.utils._pytree.tree_leaves(value)
            parts = [from_numpy(p.copy()) if isinstance(p, np.ndarray) else p for p in parts]
            tensors = [part for part in parts if isinstance(part, Tensor)]
            if len(names) != len(tensors):
                raise BadInputError(
                    f"inputs must return {name} with {len(names)} tensors, got {len(tensors)}"
                )
            found |= dict(zip(names, tensors, strict=True))
        return found

    def _mask(
        self, shape: tuple[int, ...], lengths: tuple[int, ...], new: int, example: Tensor
    ) -> Array:
        mask = np.ones(shape, dtype=np.int64)
        for row, length in enumerate(lengths):
            pad = new - length
            if pad and self._request.padding == "left":
                mask[row, shape[1] - new : shape[1] - length] = 0
            elif pad:
                mask[row, shape[1] - pad :] = 0
        kind: Array = mask.astype(to_numpy(example.detach().cpu()[:0]).dtype)
        return kind

    def _tensors(self, inputs: Mapping[str, Array]) -> list[Tensor]:
        device = self._device
        return [
            from_numpy(np.ascontiguousarray(inputs[n])).to(device) for n in self._request.call.names
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
        inputs = self._draw(case.sizes, rng, case.lengths)
        where = _shown(case.sizes) or "its size"
        tensors = self._tensors(inputs)
        eager = self._eager(tensors, where)
        truth = self._exact(tensors)
        mask = inputs[MASK] if self._signature.masked else None
        expected, outputs = {}, {}
        for name, kind in self._signature.kinds.items():
            at = columns = self._places(kind, mask, case)
            if kind == "cache" and mask is not None and self._packs:
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
        return new_places(mask, self._length(case.sizes))

    def _shape_of(self, inputs: Mapping[str, Array]) -> tuple[int, int]:
        first = inputs[self._signature.tokens].shape
        return (first[0] if first else 1), (first[1] if len(first) > 1 else 1)

    def _in_calls(self, case: Sizes, rng: np.random.Generator, notes: list[str]) -> Trial:
        """A full pass in several calls with a cache between them."""
        layout = self.layout
        assert layout is not None
        inputs = self._draw(case.sizes, rng, ())
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
        text = (
            f"the module itself, in PyTorch, is off one full pass by {off:.1e} when it is called "
            "several times with its cache: check its positions and masks, unless its frequencies "
            "follow the length"
        )
        if off > 1e-6 and not any(note.startswith("the module itself") for note in notes):
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
            label: self._within(label, 1 if label in _BATCH_LABELS else 2)
            for label in signature.free
        }
        if signature.sequence in signature.free:
            sizes[str(signature.sequence)] = self._within(
                str(signature.sequence), _SENSITIVITY_LENGTH
            )
        if signature.past in signature.free:
            before = 0 if signature.sequence in signature.free else _SENSITIVITY_LENGTH
            sizes[str(signature.past)] = self._within(str(signature.past), before)
        rng = np.random.default_rng([self._request.seed, 1 << 21])
        tensors = self._tensors(self._draw(sizes, rng, ()))
        length = self._length(sizes) if signature.sequence or signature.masked else 0
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


def _shown(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{label} {size}" for label, size in sizes.items())


def _attentions(module: nn.Module) -> list[Attention]:
    return [part for part in module.modules() if isinstance(part, Attention)]


def _like(example: Tensor, shape: tuple[int, ...], rng: np.random.Generator, start: int) -> Array:
    """Values as the example has them: its spread, or its integers."""
    sample = example.detach().cpu()
    if sample.is_floating_point():
        values = sample.double().flatten()
        spread = float(values.std()) if values.numel() > 1 else 0.0
        usable = spread > 0 and np.isfinite(spread)
        mean = float(values.mean()) if usable else 0.0
        normal = rng.standard_normal(shape) * (spread if usable else 1.0) + mean
        return to_numpy(torch.as_tensor(normal).to(sample.dtype))
    array = to_numpy(sample)
    if _counts(array):
        first = start if start else (int(array.reshape(-1)[0]) if array.size else 0)
        ids: Array = np.broadcast_to(np.arange(shape[-1]) + first, shape).astype(array.dtype)
        return ids
    if not array.size:
        return np.zeros(shape, dtype=array.dtype)
    drawn: Array = rng.choice(array.reshape(-1), size=shape)
    return drawn.astype(array.dtype)


def _counts(array: Array) -> bool:
    """Whether every row counts up by one, as positions do."""
    if array.ndim == 0 or array.shape[-1] < 2 or array.dtype.kind != "i":
        return False
    return bool((np.diff(array, axis=-1) == 1).all())


def _fitting(name: str, given: Tensor, shape: tuple[int, ...], example: Tensor) -> Array:
    if tuple(given.shape) != shape or given.dtype != example.dtype:
        raise BadInputError(
            f"inputs must give {name} as {list(shape)} of {example.dtype}, got "
            f"{list(given.shape)} of {given.dtype}"
        )
    return to_numpy(given.detach().cpu().contiguous())


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
