"""`export`: from an attention block to an artifact on disk."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch._dynamo.exc import UserError

import rope_export
from rope_export import artifact, graph, runtime
from rope_export.attention import Attention
from rope_export.errors import ExportError
from rope_export.lowering import lowering_to, rules
from rope_export.lowering.target import Target
from rope_export.plan import Plan
from rope_export.report import Report
from rope_export.shapes import TRACED_BATCH, TRACED_LENGTH, TRACED_PAST
from rope_export.trial import OUTPUT, Progress, Trial, silent
from rope_export.validator import make_trials, prove

if TYPE_CHECKING:
    import onnx_ir as ir

# onnxruntime indexes batches with 32 bits.
_MAX_BATCH = 2**31 - 1
_LEAST_RANGE = 16
_INTEGERS = ("position_ids", "attention_mask")
_T = TypeVar("_T")


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
    block: Attention,
    path: str | Path,
    *,
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
    """Export an attention block to ONNX, with test vectors, as one folder that appears whole.

    Args:
        block: what to export; its dtype is the graph's.
        path: the artifact's folder; an earlier artifact there is replaced.
        target: ``"ort"`` (onnxruntime's fused operators), ``"onnx"`` (standard opset 23) or
            ``"primitive"`` (opset 18 arithmetic).
        providers: the execution providers the graph must be legal on.
        max_seq_len: longest sequence served (default: the table of ``block.rope``, or 4096).
        position_ids: whether positions are a graph input ``[batch, sequence]``.
        cache: whether keys and values of earlier tokens come in as ``past_key`` and ``past_value``
            ``[batch, num_kv_heads, past_sequence, width]`` and go out, with the new ones, as
            ``present_key`` and ``present_value``: one graph for prefill, chunks and decoding.
        attention_mask: whether ``attention_mask`` ``[batch, total_sequence]`` is an input, 1 for a
            token and 0 for padding; always so with ``cache``.
        padding: ``"right"`` or ``"left"``, the side on which prompts are padded.
        static: one batch and length instead of dynamic ones.
        batch: rows of a static graph.
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
        BadInputError: an argument is not acceptable, or no operator is legal; nothing is written.
        ExportError: an axis that was to be dynamic came out narrower; nothing is written.
        ProviderUnavailableError: validation was asked for and a provider does not load; nothing is
            written.
    """
    plan = Plan.checked(
        block,
        target=target,
        providers=providers,
        max_seq_len=max_seq_len,
        position_ids=position_ids,
        cache=cache,
        attention_mask=attention_mask,
        padding=padding,
        static=static,
        batch=batch,
        seed=seed,
    )
    if validate:
        for provider in validate_on:
            runtime.require(provider)
    was_training = block.training
    block.eval()
    try:
        with artifact.staged(Path(path)) as folder:
            progress(f"tracing and lowering to {target}")
            model, choice = build_model(block, plan)
            graph.save(model, folder)
            trials, notes = make_trials(block, plan, progress)
            vectors = _store(folder, trials)
            description = {
                "name": Path(path).name,
                "target": plan.target,
                "dtype": plan.dtype,
                "providers": list(plan.providers),
                "runs_on": plan.runs_on(block),
                "attention": choice.form.attention.removeprefix("::"),
                "rotation": rotation_name(choice),
                "passed_over": list(choice.reasons),
                "branches": list(choice.branches),
                "cache": cache_layout(block, plan, choice) if plan.cache else None,
                **graph.description(model, folder),
            }
            config = {
                "format": artifact.FORMAT,
                "block": describe_block(block),
                "export": plan.to_json(),
                "options": options or {},
                "graph": description,
                "notes": notes,
                "test_vectors": [asdict(vector) for vector in vectors],
                "versions": _versions(),
                "files": artifact.digests(folder),
            }
            artifact.write_json(folder / artifact.CONFIG, config)
            if validate:
                report = prove(block, folder, plan, trials, named=validate_on, progress=progress)
            else:
                environment = runtime.environment()
                report = Report(
                    {}, (), description, environment, notes=tuple(notes), validated=False
                )
            report.write(folder)
    finally:
        block.train(was_training)
    return ExportResult(Path(path), description, tuple(notes), report)


def build_model(block: Attention, plan: Plan) -> tuple[ir.Model, rules.Choice]:
    """Trace, check the axes, lower and tidy.

    Raises:
        ExportError: an axis that was to be dynamic came out fixed or with a narrower range.
    """
    target = Target(plan.target, plan.providers, plan.longest, plan.padding)
    inputs, outputs = interface(block, plan)
    length = TRACED_LENGTH if plan.cache else min(TRACED_LENGTH, plan.longest)
    sizes = {"batch": TRACED_BATCH, "sequence": length}
    sizes |= {"past_sequence": TRACED_PAST, "total_sequence": sizes["sequence"] + TRACED_PAST}
    if not plan.cache:
        sizes["total_sequence"] = sizes["sequence"]
    # The tracer takes no range as narrow as that of a very small cache.
    longest = max(plan.longest, _LEAST_RANGE) if plan.cache else plan.longest
    ranges = {
        "batch": (1, _MAX_BATCH),
        "sequence": (1, longest),
        "past_sequence": (0, longest - 1),
        "total_sequence": (1, longest),
    }
    dims = {
        name: torch.export.Dim(name, min=low, max=high)
        for name, (low, high) in ranges.items()
        if low < high
    }
    examples, dynamic, largest = {}, {}, {}
    for name, axes in inputs.items():
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in axes]
        kind = torch.int64 if name in _INTEGERS else block.dtype
        examples[name] = torch.zeros(shape, dtype=kind, device=block.device)
        named = {index: axis for index, axis in enumerate(axes) if isinstance(axis, str)}
        dynamic[name] = {index: dims[axis] for index, axis in named.items()}
        largest[name] = {index: ranges[axis] for index, axis in named.items()}
    if plan.attention_mask:
        examples["attention_mask"].fill_(1)
    hidden_states = examples.pop("hidden_states")
    with _quiet_torch(), torch.no_grad(), lowering_to(target):
        try:
            program = torch.export.export(
                block,
                (hidden_states,),
                _with_past(examples),
                dynamic_shapes=_with_past(dynamic),
                strict=False,
            )
        except UserError as error:
            raise ExportError(
                f"torch.export narrowed an axis: {str(error).splitlines()[0]}"
            ) from error
        check_ranges(program, largest)
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=rules.OPSETS[plan.target],
            optimize=False,
            verbose=False,
        )
    assert converted is not None  # dynamo=True without a file
    model: ir.Model = converted.model
    graph.tidy(model, inputs, outputs)
    (choice,) = target.choices
    return model, choice


def interface(
    block: Attention, plan: Plan
) -> tuple[dict[str, list[str | int]], dict[str, list[str | int]]]:
    """Axes of every graph input and output, dynamic ones by name, in order."""
    batch: str | int = plan.batch if plan.static else "batch"
    length: str | int = plan.longest if plan.static or plan.longest == 1 else "sequence"
    lead = [block.rope.axes] if block.rope is not None and block.rope.axes > 1 else []
    inputs: dict[str, list[str | int]] = {"hidden_states": [batch, length, block.hidden_size]}
    outputs: dict[str, list[str | int]] = {OUTPUT: [batch, length, block.hidden_size]}
    if plan.position_ids:
        inputs["position_ids"] = [*lead, batch, length]
    if plan.cache:
        for name, width in (("key", block.head_dim), ("value", block.value_head_dim)):
            heads = block.num_kv_heads
            inputs[f"past_{name}"] = [batch, heads, "past_sequence", width]
            outputs[f"present_{name}"] = [batch, heads, "total_sequence", width]
    if plan.attention_mask:
        inputs["attention_mask"] = [batch, "total_sequence" if plan.cache else length]
    return inputs, outputs


def _with_past(by_name: dict[str, _T]) -> dict[str, Any]:
    """Graph inputs as arguments of the block: ``past`` is a pair."""
    given: dict[str, Any] = {}
    for name, value in by_name.items():
        if name == "past_value":
            continue
        if name == "past_key":
            given["past"] = (value, by_name["past_value"])
        else:
            given[name] = value
    return given


def check_ranges(
    program: torch.export.ExportedProgram, asked: dict[str, dict[int, tuple[int, int]]]
) -> None:
    """Check that every axis asked to be dynamic still takes every size asked for.

    Args:
        program: the traced program.
        asked: for every input, in order, the smallest and largest size of every dynamic axis.

    Raises:
        ExportError: an axis came out fixed or with a narrower range.
    """
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    given = dict(zip(asked, nodes[len(nodes) - len(asked) :], strict=True))
    for name, by_axis in asked.items():
        for axis, (least, largest) in by_axis.items():
            size = given[name].meta["val"].shape[axis]
            if not isinstance(size, torch.SymInt):
                raise ExportError(f"axis {axis} of {name} was to be dynamic and came out as {size}")
            served = program.range_constraints[size.node.expr]
            if served.lower > least or served.upper < largest:
                raise ExportError(
                    f"axis {axis} of {name} was to serve {least} … {largest} "
                    f"and came out as {served.lower} … {served.upper}"
                )


def cache_layout(block: Attention, plan: Plan, choice: rules.Choice) -> dict[str, Any]:
    """How the graph keeps its cache, as `runtime.CacheLayout` has it."""
    layout = runtime.CacheLayout(
        num_kv_heads=block.num_kv_heads,
        head_dim=block.head_dim,
        value_head_dim=block.value_head_dim,
        capacity=plan.longest,
        packs_rows=choice.form.packs_rows,
        by_rows=choice.by_rows,
        padding=plan.padding,
        position_axes=block.rope.axes if plan.position_ids and block.rope is not None else 0,
    )
    return asdict(layout)


def rotation_name(choice: rules.Choice) -> str:
    """Where the rotation happens, as the report has it."""
    if choice.form.rotation is None:
        return f"inside {choice.form.attention}"
    return choice.form.rotation.removeprefix("::")


def describe_block(block: Attention) -> dict[str, Any]:
    """Shape, variant and RoPE of a block, as ``config.json`` has them."""
    rope = block.rope
    return {
        "hidden_size": block.hidden_size,
        "num_heads": block.num_heads,
        "num_kv_heads": block.num_kv_heads,
        "head_dim": block.head_dim,
        "value_head_dim": block.value_head_dim,
        "causal": block.causal,
        "window": block.window,
        "softcap": block.softcap,
        "sinks": block.sinks is not None,
        "qk_norm": None if block.q_norm is None else asdict(block.q_norm.spec),
        "latent": None if block.latent is None else asdict(block.latent.spec),
        "scale": block.scale,
        "qkv_bias": block.latent is None and block.q_proj.bias is not None,
        "out_bias": block.o_proj.bias is not None,
        "rope": None
        if rope is None
        else {
            "dim": rope.dim,
            # Loaded or trained frequencies have no base; they are listed instead.
            "theta": None if rope.learned_freq else rope.theta,
            "inv_freq": rope.inv_freq.tolist() if rope.theta is None or rope.learned_freq else None,
            "learned_freq": rope.learned_freq,
            "layout": rope.layout,
            "scaling": rope.scaling,
            "attention_factor": rope.attention_factor,
            "xpos_scale_base": None if rope.xpos is None else rope.xpos.scale_base,
            "interpolate_factor": rope.interpolate_factor,
            "max_seq_len": rope.max_seq_len,
        },
    }


def _store(folder: Path, trials: list[Trial]) -> list[artifact.Vector]:
    vectors: list[artifact.Vector] = []
    written: dict[int, str] = {}
    for trial in trials:
        if not trial.stored:
            continue
        known = written.get(id(trial.inputs["hidden_states"]))
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
            written[id(trial.inputs["hidden_states"])] = vector.folder
        vectors.append(vector)
    return vectors


def _versions() -> dict[str, str]:
    packages = ("torch", "onnx", "onnxscript", "onnx-ir", "numpy")
    return {"rope_export": rope_export.__version__, **{p: metadata.version(p) for p in packages}}


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Silence the exporter's chatter (missing torchvision, deprecations); errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
