"""`export`: from a module to an artifact on disk."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

import rope_export
from rope_export import artifact, graph, runtime
from rope_export.attention import Attention
from rope_export.errors import BadInputError
from rope_export.lowering import rules
from rope_export.plan import Plan
from rope_export.race import Runner, race
from rope_export.report import Report
from rope_export.subjects.base import Subject, evaluating
from rope_export.subjects.block import BlockSubject
from rope_export.subjects.module import ModuleSubject
from rope_export.subjects.request import DrawInputs, DynamicShapes, ModuleRequest
from rope_export.trial import Progress, Trial, silent
from rope_export.validator import prove

AUTO = "auto"


@dataclass(frozen=True)
class ExportResult:
    """What was exported.

    Attributes:
        path: the artifact's folder.
        graph: target, operators, form chosen and why, as the report has it.
        notes: limits of the stored vectors and of the proof, in plain words.
        report: the proof; ``report.validated`` is False if it was not asked for.
    """

    path: Path
    graph: dict[str, Any]
    notes: tuple[str, ...]
    report: Report

    @property
    def ops(self) -> dict[str, int]:
        """Operators of the graph and how often each occurs, as ``domain::name``."""
        return dict(self.graph["ops"])

    @property
    def model(self) -> Path:
        """The ONNX file."""
        return self.path / artifact.MODEL


def export(
    module: nn.Module,
    path: str | Path,
    *,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: DynamicShapes | None = None,
    inputs: DrawInputs | None = None,
    output_names: Sequence[str] | None = None,
    target: str = "ort",
    providers: Sequence[str] = ("cpu",),
    max_seq_len: int | None = None,
    position_ids: bool = False,
    cache: bool = False,
    attention_mask: bool = False,
    padding: str = "right",
    static: bool = False,
    batch: int = 1,
    seed: int = 0,
    validate: bool = False,
    validate_on: Sequence[str] = (),
    options: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> ExportResult:
    """Export a module to ONNX, with test vectors, as one folder that appears whole.

    Any module is exported from example inputs. Each `Attention` and `RotaryEmbedding` inside it
    lowers to the operators of the target, everything else as ``torch.onnx.export`` does it. An
    `Attention` given without examples is exported as a block, whose inputs are known.

    Graph inputs are named after the arguments, nested ones as ``state.0``. Lists of (key, value)
    pairs, however named, are ``past_key_values.N.key`` and ``past_key_values.N.value``, and in
    outputs ``present.N.key`` and ``present.N.value``. A result that is one tensor is ``output``;
    the entries of a dictionary keep their names.

    Args:
        module: what to export, in the dtype of its weights.
        path: the artifact's folder; an earlier artifact there is replaced.
        args: example inputs of ``module``, positional.
        kwargs: example inputs by name.
        dynamic_shapes: which axes vary, by argument name (or in the order of the arguments), as in
            ``torch.export``: ``{"input_ids": {0: "batch", 1: "sequence"}}``. A label may be a text,
            ``torch.export.Dim(name, min=, max=)``, or a sum such as ``"past_sequence+sequence"``;
            a mapping of axes given for a nested argument holds for all of its tensors.
        inputs: draws inputs for the proof: called with the sizes of the labels and a NumPy
            generator, it returns arguments by name, those it leaves out are drawn from the
            examples (numbers spread as they are there, integers from those that occur).
        output_names: of the outputs that are no cache, in order.
        target: ``"ort"`` (onnxruntime's fused operators), ``"onnx"`` (standard opset 23) or
            ``"primitive"`` (opset 18 arithmetic); of a block also ``"auto"``: every legal lowering
            is proven and timed here, on the first of ``providers`` and at the longest sequence,
            and the fastest is kept.
        providers: the execution providers the graph must be legal on.
        max_seq_len: longest sequence served (default: the shortest table of a RotaryEmbedding
            inside, else the largest ``max`` of a ``Dim``, or 4096).
        position_ids: of a block, whether positions are a graph input ``[batch, sequence]``.
        cache: of a block, whether keys and values of earlier tokens come in as ``past_key`` and
            ``past_value`` ``[batch, num_kv_heads, past_sequence, width]`` and go out, with the new
            ones, as ``present_key`` and ``present_value``: one graph for prefill, chunks and
            decoding.
        attention_mask: of a block, whether ``attention_mask`` ``[batch, total_sequence]`` is an
            input, 1 for a token and 0 for padding; always so with ``cache``.
        padding: ``"right"`` or ``"left"``, the side on which prompts are padded.
        static: of a block, one batch and length instead of dynamic ones.
        batch: of a static block, its rows.
        seed: of the inputs of the test vectors.
        validate: prove the graph before it takes its place, and keep the report in
            ``ExportResult.report``.
        validate_on: providers that must load for the proof; without any, those the graph was made
            for are run where they load, and CUDA where it loads and has the operators.
        options: the caller's own options, kept in ``config.json``.
        progress: told what is being done.

    Returns:
        where the artifact is and what it holds.

    Raises:
        BadInputError: an argument is not acceptable, no operator is legal, or the module cannot be
            traced; nothing is written.
        ExportError: an axis that was to be dynamic came out narrower; nothing is written.
        ProviderUnavailableError: validation was asked for and a provider does not load; nothing is
            written.
    """
    common: dict[str, Any] = {
        "target": target,
        "providers": providers,
        "max_seq_len": max_seq_len,
        "padding": padding,
        "seed": seed,
    }
    of_a_block: dict[str, Any] = {
        "position_ids": position_ids,
        "cache": cache,
        "attention_mask": attention_mask,
        "static": static,
        "batch": batch,
    }
    subject: Subject
    runners: list[Runner] = []
    first = rules.TARGETS[0] if target == AUTO else target
    if args is None and kwargs is None:
        if not isinstance(module, Attention) or not _takes_what_a_block_takes(module):
            raise BadInputError(
                f"args must be example inputs of {type(module).__name__}, got None (only an "
                "Attention itself is exported without)"
            )
        plan = Plan.checked(module, **common | {"target": first}, **of_a_block)
        if target == AUTO:
            validate = True
            plan, runners = race(module, plan, partial(_is_proven, module), progress)
        subject = BlockSubject(module, plan)
    else:
        if target == AUTO:
            raise BadInputError(
                "target auto is of an Attention exported alone, got it with args: name one of "
                f"{', '.join(rules.TARGETS)}"
            )
        defaults = {"static": False, "batch": 1}
        for name, value in of_a_block.items():
            if value != defaults.get(name, False):
                raise BadInputError(
                    f"{name} is of an Attention exported alone, got {name}={value!r} with args: "
                    "what a module takes is said by its examples"
                )
        request = ModuleRequest.checked(
            module,
            () if args is None else args,
            {} if kwargs is None else kwargs,
            dynamic_shapes,
            inputs,
            output_names,
            **common,
        )
        subject = ModuleSubject(request)
    if validate:
        for provider in validate_on:
            runtime.require(provider)
    return _write(
        subject, Path(path), options or {}, validate, tuple(validate_on), progress, runners
    )


def _is_proven(block: Attention, plan: Plan, folder: Path) -> bool:
    return _write(BlockSubject(block, plan), folder, {}, True, plan.providers, silent).report.passed


def _takes_what_a_block_takes(block: Attention) -> bool:
    """Whether a subclass left the arguments of ``forward`` as they are."""
    try:
        inspect.signature(block.forward).bind(
            None, position_ids=None, past=None, attention_mask=None
        )
    except TypeError:
        return False
    return True


def _write(
    subject: Subject,
    path: Path,
    options: dict[str, Any],
    validate: bool,
    validate_on: tuple[str, ...],
    progress: Progress,
    runners: Sequence[Runner] = (),
) -> ExportResult:
    with artifact.staged(path) as folder, evaluating(subject.module):
        progress(f"tracing and lowering to {subject.target}")
        built = subject.build()
        graph.save(built.model, folder)
        trials, notes = subject.trials(progress)
        vectors = _store(folder, trials)
        description = {
            "name": path.name,
            "target": subject.target,
            "dtype": subject.dtype,
            "providers": list(subject.providers),
            "runs_on": subject.runs_on(),
            **built.facts,
            **graph.description(built.model, folder),
            **({"race": [runner.to_json() for runner in runners]} if runners else {}),
        }
        config = {
            "format": artifact.FORMAT,
            **subject.describe(),
            "options": options,
            "graph": description,
            "notes": notes,
            "test_vectors": [asdict(vector) for vector in vectors],
            "versions": _versions(),
            "files": artifact.digests(folder),
        }
        artifact.write_json(folder / artifact.CONFIG, config)
        if validate:
            report = prove(subject, folder, trials, named=validate_on, progress=progress)
        else:
            environment = runtime.environment()
            report = Report({}, (), description, environment, notes=tuple(notes), validated=False)
        report.write(folder)
    return ExportResult(path, description, tuple(notes), report)


def _store(folder: Path, trials: list[Trial]) -> list[artifact.Vector]:
    vectors: list[artifact.Vector] = []
    written: dict[int, str] = {}
    for trial in trials:
        if not trial.stored:
            continue
        known = written.get(id(trial.inputs))
        vector = artifact.Vector(
            name=trial.name,
            folder=known or f"{artifact.VECTORS}{len(written)}",
            batch=trial.batch,
            sequence=trial.sequence,
            past=trial.past,
            bounds={name: expected.bound for name, expected in trial.expected.items()},
            steps=trial.steps,
        )
        if known is None:  # trials in several calls share the vector of one full pass
            artifact.write_vector(folder, vector, trial.inputs, trial.outputs)
            written[id(trial.inputs)] = vector.folder
        vectors.append(vector)
    return vectors


def _versions() -> dict[str, str]:
    packages = ("torch", "onnx", "onnxscript", "onnx-ir", "numpy")
    return {"rope_export": rope_export.__version__, **{p: metadata.version(p) for p in packages}}
