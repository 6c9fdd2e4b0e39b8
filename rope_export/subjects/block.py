"""A block on its own as the subject of an export: interface, graph, cases, description."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from rope_export import graph, runtime, shapes
from rope_export.attention import Attention
from rope_export.cases import make_cases
from rope_export.errors import BadInputError
from rope_export.lowering import rules
from rope_export.lowering.target import Target
from rope_export.plan import Plan
from rope_export.sensitivity import sensitivities
from rope_export.shapes import TRACED_BATCH, TRACED_LENGTH, TRACED_PAST
from rope_export.single import Interface
from rope_export.subjects.base import Built, evaluating, rotation_name
from rope_export.tracing import check_ranges, convert, trace
from rope_export.trial import OUTPUT, PRESENTS, Progress, Trial

if TYPE_CHECKING:
    import onnx_ir as ir

# onnxruntime indexes batches with 32 bits.
_MAX_BATCH = 2**31 - 1
_LEAST_RANGE = 16
_INTEGERS = ("position_ids", "attention_mask")
_MEMORY_SHARE = 0.8
_SENSITIVITY_LENGTH = 64
# A switch further out is proven like any other, but what ignoring it would do is not worked out.
_FAR_SWITCH = 2048
_T = TypeVar("_T")


class BlockSubject:
    """An attention block, exported as it is: what it takes is known.

    Args:
        block: what is exported.
        plan: how.
    """

    def __init__(self, block: Attention, plan: Plan) -> None:
        self.module = block
        self.target = plan.target
        self.dtype = plan.dtype
        self.providers = plan.providers
        self._plan = plan

    def build(self) -> Built:
        """Trace, check the axes, lower and tidy."""
        model, choice = build_model(self.module, self._plan)
        plan = self._plan
        facts = {
            "attention": choice.form.attention.removeprefix("::"),
            "rotation": rotation_name(choice),
            "passed_over": list(choice.reasons),
            "branches": list(choice.branches),
            "tokens": "hidden_states",
            "padding_mask": "attention_mask" if plan.attention_mask else None,
            "packs_rows": plan.cache and choice.form.packs_rows,
            "cache": cache_layout(self.module, plan, choice) if plan.cache else None,
            "outputs": {OUTPUT: "tokens", **dict.fromkeys(PRESENTS if plan.cache else (), "cache")},
        }
        return Built(model, facts)

    def runs_on(self) -> dict[str, str | None]:
        """For every provider, why it lacks the graph's operators, or None."""
        return self._plan.runs_on(self.module)

    def trials(self, progress: Progress) -> tuple[list[Trial], list[str]]:
        """Cases, and what they leave out, in plain words."""
        return make_trials(self.module, self._plan, progress)

    def describe(self) -> dict[str, Any]:
        """Block and plan, as ``config.json`` has them."""
        return {"block": describe_block(self.module), "export": self._plan.to_json()}

    def sensitivity(self) -> dict[str, float]:
        """What typical defects would have shown."""
        switch = shapes.turning_point(self.module) or 0
        past_switch = switch if switch <= _FAR_SWITCH else 0
        length = min(_SENSITIVITY_LENGTH + past_switch, self._plan.longest)
        return sensitivities(self.module, length=length, seed=self._plan.seed)


def build_model(block: Attention, plan: Plan) -> tuple[ir.Model, rules.Choice]:
    """Trace, check the axes, lower and tidy.

    Raises:
        ExportError: an axis that was to be dynamic came out fixed or with a narrower range.
    """
    target = Target(plan.target, plan.providers, plan.longest, plan.padding, plan.form)
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
    program = trace(block, (hidden_states,), _with_past(examples), _with_past(dynamic), target)
    check_ranges(program, largest)
    model = convert(program, plan.target)
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


def cache_layout(block: Attention, plan: Plan, choice: rules.Choice) -> dict[str, Any]:
    """How the graph keeps its cache, as `runtime.CacheLayout` has it."""
    layer = runtime.LayerCache(block.num_kv_heads, block.head_dim, block.value_head_dim)
    layout = runtime.CacheLayout(
        layers=(layer,),
        capacity=plan.longest,
        packs_rows=choice.form.packs_rows,
        by_rows=choice.by_rows,
        padding=plan.padding,
        position_axes=block.rope.axes if plan.position_ids and block.rope is not None else 0,
    )
    return asdict(layout)


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


def make_trials(block: Attention, plan: Plan, progress: Progress) -> tuple[list[Trial], list[str]]:
    """Choose shapes this machine can run, draw inputs, evaluate truth and eager.

    Returns:
        the trials, and what they leave out, in plain words.

    Raises:
        BadInputError: a static graph does not fit in memory.
    """
    choice = plan.choose(block)
    longest, notes = _longest_that_fits(block, plan)
    notes += choice.limits
    if plan.cache and shapes.turning_point(block) is not None:
        notes.append(shapes.FOLLOWS_LENGTH)
    planned = shapes.plan_shapes(
        block,
        longest=longest,
        batch=plan.batch,
        static=plan.static,
        with_positions=plan.position_ids,
        cache=plan.cache,
        mask=plan.attention_mask,
        by_rows=choice.by_rows or not choice.form.packs_rows,
    )
    interface = Interface(
        positions=block.rope.positions if plan.position_ids and block.rope else None,
        cache=plan.cache,
        mask=plan.attention_mask,
        padding=plan.padding,
        packs_rows=choice.form.packs_rows,
    )
    with evaluating(block):
        trials = make_cases(block, planned, seed=plan.seed, interface=interface, progress=progress)
    for trial in trials:
        compared = len(trial.expected[OUTPUT].truth)
        padded = "attention_mask" in trial.inputs and not trial.inputs["attention_mask"].all()
        if compared < trial.batch * trial.sequence and not padded and not trial.steps:
            notes.append(
                f"{trial.name} [{trial.batch}, {trial.sequence}] is compared on "
                f"{compared} of its {trial.batch * trial.sequence} tokens (the first, the last and "
                "random runs): float64 truth for all of them would take too long"
            )
        if not trial.stored and not padded:
            stored = max((t.sequence for t in trials if t.stored), default=0)
            longest_stored = f"the longest stored has {stored} tokens" if stored else "none fits"
            notes.append(
                f"{trial.name} [{trial.batch}, {trial.sequence}] is proven at export but not "
                f"stored as a test vector (64 MiB in all); {longest_stored}"
            )
    return trials, notes


def _longest_that_fits(block: Attention, plan: Plan) -> tuple[int, list[str]]:
    """The longest sequence this machine has memory to prove, and a note when that is not all."""
    copies = max(plan.choose(block).score_copies.values())
    heads = block.num_heads + 3 * block.num_kv_heads
    # Inputs, outputs, float64 truth, and projected heads in both precisions.
    per_token = plan.batch * (28 * block.hidden_size + 16 * heads * block.head_dim)
    per_pair = plan.batch * copies * 4 * block.num_heads
    available = runtime.available_memory()
    usable = _MEMORY_SHARE * available
    if per_token * plan.longest + per_pair * plan.longest**2 <= usable:
        return plan.longest, []
    if per_pair:
        root = (per_token**2 + 4 * per_pair * usable) ** 0.5
        fitting = int((root - per_token) / (2 * per_pair))
    else:
        fitting = int(usable / per_token)
    scores = f"target {plan.target} holds the scores of all token pairs; " if per_pair else ""
    needed = (
        f"{scores}{plan.batch} x {plan.longest} tokens take about "
        f"{_gib(per_token * plan.longest + per_pair * plan.longest**2)}, and "
        f"{_gib(available)} are free here"
    )
    if plan.static or fitting < 1:
        shape = f"batch {plan.batch}, max_seq_len {plan.longest}"
        raise BadInputError(f"{shape} does not fit in memory: {needed}")
    return fitting, [f"proven only up to length {fitting} of {plan.longest}: {needed}"]


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
