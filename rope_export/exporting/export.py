"""`export`: from a module to an artifact on disk."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from rope_export import runtime
from rope_export.artifacts.artifact import FORMAT
from rope_export.artifacts.files import CONFIG, MODEL, VECTORS, digests, write_json
from rope_export.artifacts.folder import staged
from rope_export.artifacts.report import Report
from rope_export.artifacts.result import ExportResult
from rope_export.artifacts.targets import TARGETS
from rope_export.artifacts.vectors import Vector, write_vector
from rope_export.artifacts.version import __version__
from rope_export.attention.block import Attention
from rope_export.errors import BadInputError
from rope_export.exporting import graph, stages
from rope_export.exporting.block import BlockRequest
from rope_export.exporting.dynamic_shapes import DynamicShapes
from rope_export.exporting.eager import evaluating
from rope_export.exporting.module import DrawInputs, ModuleRequest
from rope_export.exporting.oldest_runtime import oldest_onnxruntime
from rope_export.exporting.request import Request
from rope_export.exporting.subject import Subject
from rope_export.runtime import cudnn, required
from rope_export.runtime.trial import Progress, Trial, silent

AUTO = "auto"


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
    cache: bool | str = False,
    cache_dtype: str | None = None,
    calibration: Any = None,
    attention_mask: bool = False,
    padding: str = "right",
    static: bool = False,
    batch: int = 1,
    seed: int = 0,
    onnxruntime: str | None = None,
    validate: bool = False,
    validate_on: Sequence[str] = (),
    options: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
    progress: Progress = silent,
) -> ExportResult:
    """Export a module to ONNX, with test vectors, as one folder that appears whole.

    Any module is exported from example inputs. Each `Attention` and `RotaryEmbedding` inside it
    lowers to the operators of the target, ``flex_attention`` is written out, everything else is as
    ``torch.onnx.export`` does it. An `Attention` given without examples is exported as a block,
    whose inputs are known.

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
            generator, it returns arguments by name. Those it leaves out are as the example is: what
            hides in a mask stays where it is, integers are some that occur, other numbers spread as
            they do there.
        output_names: of the outputs that are no cache, in order.
        target: ``"ort"`` (onnxruntime's fused operators), ``"onnx"`` (standard opset 23) or
            ``"primitive"`` (opset 18 arithmetic); of a block also ``"auto"``: every legal lowering
            is proven and timed here, on the first of ``providers`` and at the longest sequence,
            and the fastest is kept.
        providers: the execution providers the graph must be legal on.
        max_seq_len: longest sequence served; given, it is proven, and refused where the module
            serves less (default: the shortest table of a RotaryEmbedding inside, else the largest
            ``max`` of a ``Dim``, or 4096).
        position_ids: of a block, whether positions are a graph input ``[batch, sequence]``.
        cache: of a block, whether keys and values of earlier tokens come in as ``past_key`` and
            ``past_value`` ``[batch, num_kv_heads, past_sequence, width]`` and go out, with the new
            ones, as ``present_key`` and ``present_value``: one graph for prefill, chunks and
            decoding. ``"window"`` keeps those of the block's window only, in ``[batch,
            num_kv_heads, capacity, width]`` of any capacity from the window on (on CUDA the window
            itself); ``attention_mask`` then says how many tokens there were. It is the default
            meaning of True for a block with ``window_cache=True``.
        cache_dtype: of a block with a cache, ``"int8"`` or ``"int4"``: keys and values are stored
            as integers, int8 ``[batch, num_kv_heads, past_sequence, width]`` or uint8 of half the
            width, and attention sees what they come back as; None: as they are computed. Their
            scales are constants of the graph, one for each channel.
        calibration: hidden states ``[tokens, hidden_size]`` or ``[batch, sequence, hidden_size]``
            as the block meets them, by which those scales are chosen: none of their keys and values
            is clipped, at any position (default: random ones, and the report says so).
        attention_mask: of a block, whether ``attention_mask`` ``[batch, total_sequence]`` is an
            input, 1 for a token and 0 for padding; always so with ``cache``.
        padding: ``"right"`` or ``"left"``, the side on which prompts are padded.
        static: of a block, one batch and length instead of dynamic ones.
        batch: of a static block, its rows.
        seed: of the inputs of the test vectors.
        onnxruntime: the oldest onnxruntime that is to run the graph, ``"1.24"`` say (default: the
            one that is installed). Forms that need a later one are passed over, and a module that
            does is refused.
        validate: prove the graph before it takes its place, and keep the report in
            ``ExportResult.report``.
        validate_on: providers that must load for the proof; without any, those the graph was made
            for are run where they load, and CUDA where it loads and has the operators.
        options: the caller's own options, kept in ``config.json``.
        notes: what else the report is to say, in plain words, before the limits of the proof.
        progress: told what is being done.

    Returns:
        where the artifact is and what it holds.

    Raises:
        BadInputError: an argument is not acceptable, no operator is legal, or the module cannot be
            traced; nothing is written.
        ExportError: an axis that was to be dynamic came out narrower; nothing is written.
        ProviderUnavailableError: validation was asked for and a provider does not load, or the
            onnxruntime here is older than the one asked for; nothing is written.
    """
    proven = validate or target == AUTO
    common: dict[str, Any] = {
        "target": target,
        "providers": providers,
        "max_seq_len": max_seq_len,
        "padding": padding,
        "seed": seed,
        "onnxruntime": required.chosen(onnxruntime, target, proven=proven),
    }
    of_a_block: dict[str, Any] = {
        "position_ids": position_ids,
        "cache": cache,
        "cache_dtype": cache_dtype,
        "attention_mask": attention_mask,
        "static": static,
        "batch": batch,
    }
    request: Request
    runners: Sequence[stages.Runner] = ()
    if args is None and kwargs is None:
        if not isinstance(module, Attention) or not _takes_what_a_block_takes(module):
            raise BadInputError(
                f"args must be example inputs of {type(module).__name__}, got None (only an "
                "Attention itself is exported without)"
            )
        first = TARGETS[0] if target == AUTO else target
        request = BlockRequest.checked(
            module, **common | {"target": first}, **of_a_block, calibration=calibration
        )
        if target == AUTO:
            validate = True
            request, runners = stages.racer().race(request, _is_proven, progress)
    else:
        _refuse_what_examples_say(target, of_a_block | {"calibration": calibration})
        request = ModuleRequest.checked(
            module,
            () if args is None else args,
            {} if kwargs is None else kwargs,
            dynamic_shapes,
            inputs,
            output_names,
            **common,
        )
    if validate:
        for provider in validate_on:
            runtime.require(provider)
    return _write(
        Subject(request),
        Path(path),
        options or {},
        validate,
        validate_on,
        progress,
        runners,
        notes,
        for_a_runtime=onnxruntime is not None,
    )


def _refuse_what_examples_say(target: str, of_a_block: Mapping[str, Any]) -> None:
    """Options of an `Attention` exported alone, given beside examples."""
    if target == AUTO:
        raise BadInputError(
            "target auto is of an Attention exported alone, got it with args: name one of "
            f"{', '.join(TARGETS)}"
        )
    defaults = {"batch": 1, "cache_dtype": None, "calibration": None}
    for name, value in of_a_block.items():
        default = defaults.get(name, False)
        if value is not default and (default is None or value != default):
            raise BadInputError(
                f"{name} is of an Attention exported alone, got {name}={_shown(value)} with args: "
                "what a module takes is said by its examples"
            )


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, bool | int | str) else type(value).__name__


def _takes_what_a_block_takes(block: Attention) -> bool:
    """Whether a subclass left the arguments of ``forward`` as they are."""
    try:
        inspect.signature(block.forward).bind(
            None, position_ids=None, past=None, attention_mask=None
        )
    except TypeError:
        return False
    return True


def _is_proven(request: BlockRequest, folder: Path) -> bool:
    result = _write(Subject(request), folder, {}, True, request.providers, silent)
    return result.report.passed


def _write(
    subject: Subject,
    path: Path,
    options: dict[str, Any],
    validate: bool,
    validate_on: Sequence[str],
    progress: Progress,
    runners: Sequence[stages.Runner] = (),
    notes: Sequence[str] = (),
    *,
    for_a_runtime: bool = False,
) -> ExportResult:
    request, prover = subject.request, stages.prover()
    with staged(path) as folder, evaluating(request.module):
        progress(f"tracing and lowering to {request.target}")
        model = subject.graph()
        graph.save(model, folder)
        oldest = oldest_onnxruntime(subject, folder / MODEL, asked=for_a_runtime)
        evidence = prover.evidence(subject, progress)
        described = graph.description(model, folder)
        needs = cudnn.needs(described["ops"]) if "cuda" in request.providers else None
        limits = [] if needs is None else [needs]
        evidence = replace(evidence, notes=[*notes, *limits, *evidence.notes])
        vectors = _store(folder, evidence.trials)
        description = {
            "name": path.name,
            "target": request.target,
            "dtype": request.dtype,
            "providers": list(request.providers),
            "runs_on": subject.runs_on(),
            **subject.facts(model),
            "onnxruntime": oldest,
            "proven": evidence.proven,
            **described,
            **({"race": [runner.to_json() for runner in runners]} if runners else {}),
        }
        config = {
            "format": FORMAT,
            **subject.describe(),
            "options": options,
            "graph": description,
            "notes": evidence.notes,
            "test_vectors": [asdict(vector) for vector in vectors],
            "versions": _versions(),
            "files": digests(folder),
        }
        write_json(folder / CONFIG, config)
        if validate:
            report = prover.prove(subject, folder, evidence, named=validate_on, progress=progress)
        else:
            environment = runtime.environment()
            notes = tuple(evidence.notes)
            report = Report({}, (), description, environment, notes=notes, validated=False)
        report.write(folder)
    return ExportResult(path, description, tuple(evidence.notes), report)


def _store(folder: Path, trials: Sequence[Trial]) -> list[Vector]:
    vectors: list[Vector] = []
    written: dict[int, str] = {}
    for trial in trials:
        if not trial.stored:
            continue
        known = written.get(id(trial.inputs))
        vector = Vector(
            name=trial.name,
            folder=known or f"{VECTORS}{len(written)}",
            batch=trial.batch,
            sequence=trial.sequence,
            past=trial.past,
            bounds={name: expected.bound for name, expected in trial.expected.items()},
            steps=trial.steps,
        )
        if known is None:  # trials in several calls share the vector of one full pass
            write_vector(folder, vector, trial.inputs, trial.outputs)
            written[id(trial.inputs)] = vector.folder
        vectors.append(vector)
    return vectors


def _versions() -> dict[str, str]:
    packages = ("torch", "onnx", "onnxscript", "onnx-ir", "numpy")
    return {"rope_export": __version__, **{p: metadata.version(p) for p in packages}}
