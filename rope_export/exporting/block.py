"""`BlockRequest`: an attention block as a module whose inputs are known."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import nn

from rope_export.artifacts.cache_layout import MASK, PADDINGS, WINDOW
from rope_export.artifacts.targets import DTYPES
from rope_export.attention.adapters import refuse_what_weights_do_not_say
from rope_export.attention.block import Attention
from rope_export.attention.cache_rounding import CacheRounding
from rope_export.attention.calibration import calibrated, with_rounded_cache
from rope_export.errors import BadInputError
from rope_export.exporting.request import DEFAULT_LONGEST, Entry, checked_providers
from rope_export.exporting.signature import Axes, Signature
from rope_export.exporting.tracing import check_ranges
from rope_export.inspection import since
from rope_export.lowering import situation
from rope_export.lowering.choice import Choice, choose
from rope_export.lowering.target import Target
from rope_export.runtime.trial import OUTPUT, PRESENTS

# None of the shapes a block is proven at.
TRACED_BATCH, TRACED_LENGTH, TRACED_PAST = 2, 6, 5
TRACED_SLACK = 8
# onnxruntime indexes batches with 32 bits.
_MAX_BATCH = 2**31 - 1
_LEAST_RANGE = 16
_INTEGERS = ("position_ids", MASK)


@dataclass(frozen=True)
class BlockRequest:
    """A block, for where it is exported, and over which shapes.

    Attributes:
        block: what is exported.
        target: one of `targets.TARGETS`.
        providers: providers the graph must be legal on.
        dtype: of weights and activations.
        longest: longest sequence served.
        position_ids: whether positions are a graph input.
        static: one batch and length instead of dynamic ones.
        batch: rows of a static graph.
        seed: of the inputs of the proof.
        cache: whether past keys and values come in and present ones go out; ``"window"``: those of
            the window only.
        attention_mask: whether a mask comes in, as it always does with ``cache``.
        padding: the side on which prompts are padded.
        form: name of the form taken, or None: the best one that is legal.
        onnxruntime: the oldest one the graph is to run in.
        cache_dtype: of the integers that keys and values are stored as, or None: they are not.
        calibration: what the scales of a cache of integers were chosen by, "given" or "random"
            inputs, or None: it holds numbers.
    """

    block: Attention
    target: str
    providers: tuple[str, ...]
    dtype: str
    longest: int
    position_ids: bool
    static: bool
    batch: int
    seed: int
    cache: bool | str = False
    attention_mask: bool = False
    padding: str = "right"
    form: str | None = None
    onnxruntime: str = since.NEWEST
    cache_dtype: str | None = None
    calibration: str | None = None

    graph_name = "attention"
    learned = ()

    @classmethod
    def checked(
        cls,
        block: Attention,
        *,
        target: str,
        providers: Sequence[str],
        max_seq_len: int | None,
        position_ids: bool,
        static: bool,
        batch: int,
        seed: int,
        cache: bool | str = False,
        attention_mask: bool = False,
        padding: str = "right",
        form: str | None = None,
        onnxruntime: str = since.NEWEST,
        cache_dtype: str | None = None,
        calibration: Any = None,
    ) -> BlockRequest:
        """Check a request against the block, and give its cache scales where it holds integers.

        Raises:
            BadInputError: an argument is not acceptable.
        """
        chosen = checked_providers(target, providers)
        refuse_what_weights_do_not_say(block)
        weights = {n: p for n, p in block.named_parameters() if not n.startswith("rope.")}
        dtypes = {str(p.dtype).removeprefix("torch.") for p in weights.values()}
        if len(dtypes) != 1 or not dtypes <= set(DTYPES):
            raise BadInputError(
                f"all weights must share one dtype of {', '.join(DTYPES)}, "
                f"got {', '.join(sorted(dtypes))}"
            )
        served = None if block.rope is None else block.rope.max_seq_len
        longest = (served or DEFAULT_LONGEST) if max_seq_len is None else max_seq_len
        if longest < 1:
            raise BadInputError(f"max_seq_len must be at least 1, got {longest}")
        if block.rope is not None and longest > block.rope.positions:
            raise BadInputError(
                f"max_seq_len must be at most the {block.rope.positions} positions of the block's "
                f"RotaryEmbedding, got {longest}"
            )
        if batch < 1:
            raise BadInputError(f"batch must be at least 1, got {batch}")
        if batch != 1 and not static:
            raise BadInputError(
                f"batch is for static graphs: pass static=True too, got batch={batch}"
            )
        if position_ids and block.rope is None:
            raise BadInputError("position_ids needs a block with a RotaryEmbedding, got rope=None")
        if not position_ids and block.rope is not None and not block.rope.found.one_position:
            raise BadInputError(
                f"position_ids must be an input: tokens have {block.rope.axes} axes with scaling "
                f"{block.rope.scaling}"
            )
        if cache not in (True, False, WINDOW):
            raise BadInputError(f"cache must be True, False or {WINDOW!r}, got {cache!r}")
        if cache and not block.causal:
            raise BadInputError(
                "cache needs causal attention: an earlier token would have to see later ones, "
                "got causal=False"
            )
        if cache and static:
            raise BadInputError(
                "cache needs dynamic lengths, one graph for prefill and decode: got static=True"
            )
        if cache and longest < 2:
            raise BadInputError(f"max_seq_len must be at least 2 with cache, got {longest}")
        if padding not in PADDINGS:
            raise BadInputError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
        if padding == "left" and not (cache or attention_mask):
            raise BadInputError(
                "padding needs cache or attention_mask, got padding='left' without either"
            )
        if cache and block.window_cache:  # as it was built
            cache = WINDOW
        if cache == WINDOW and block.window is None:
            raise BadInputError(f"cache={WINDOW!r} needs a block with a window, got window=None")
        block = _keeping(block, cache)
        rounding: CacheRounding | None = None
        if cache_dtype is not None:
            if not cache:
                raise BadInputError(f"cache_dtype {cache_dtype} needs cache, got it without")
            rounding = calibrated(block, cache_dtype, calibration, seed=seed)
        elif calibration is not None:
            raise BadInputError("calibration needs cache_dtype, got it without")
        request = cls(
            block if rounding is None else with_rounded_cache(block, rounding),
            target,
            chosen,
            dtypes.pop(),
            longest,
            position_ids,
            static,
            batch,
            seed,
            cache,
            attention_mask or bool(cache),
            padding,
            form,
            onnxruntime,
            cache_dtype,
            None if rounding is None else "random" if calibration is None else "given",
        )
        request.choose()
        return request

    def to_json(self) -> dict[str, Any]:
        """The request as ``config.json`` has it: all but the block."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "block"}
        rounding = self.block.cache_rounding
        return content | {"cache_rounding": None if rounding is None else rounding.to_json()}

    @classmethod
    def from_json(cls, content: dict[str, Any], block: Attention) -> BlockRequest:
        """Read a request back from ``config.json``, for the block as it was then."""
        block = _keeping(block, content["cache"])
        content = {**content, "providers": tuple(content["providers"])}
        rounding = content.pop("cache_rounding", None)
        if rounding is not None:
            block = with_rounded_cache(block, CacheRounding.from_json(rounding))
        return cls(block, **content)

    @property
    def module(self) -> nn.Module:
        """What is exported."""
        return self.block

    # Which operators.

    def situations(self, providers: Sequence[str]) -> list[situation.Situation]:
        """Describe the block to the rules, once for each of ``providers``."""
        return situation.situations(
            self.block,
            providers,
            dtype=self.dtype,
            implied_positions=not self.position_ids,
            longest=self.longest,
            cache=bool(self.cache),
            mask=self.attention_mask,
            padding=self.padding,
            slots=(self.capacity or 0) if self.window else None,
            onnxruntime=self.onnxruntime,
        )

    def choose(self) -> Choice:
        """Choose the form.

        Raises:
            BadInputError: the target has none that is legal.
        """
        return choose(self.target, self.situations(self.providers), self.form)

    # What goes in and comes out.

    @property
    def window(self) -> int:
        """The window, where the cache holds no more; else 0."""
        return (self.block.window or 0) if self.cache == WINDOW else 0

    @property
    def capacity(self) -> int | None:
        """Slots of a cache of the window, where the graph has one size of it."""
        return self.window if self.window and "cuda" in self.providers else None

    def known(self) -> tuple[Signature, tuple[Choice, ...]]:
        """What the graph takes and gives, and how it attends: known before it is traced."""
        return self.signature, (self.choose(),)

    @cached_property
    def signature(self) -> Signature:
        """What the graph takes and gives."""
        inputs, outputs = self.axes()
        dynamic = {axis for axes in inputs.values() for axis in axes if isinstance(axis, str)}
        length = inputs["hidden_states"][1]
        rounding = self.block.cache_rounding
        return Signature(
            inputs,
            outputs,
            {label: range_ for label, range_ in self.ranges().items() if label in dynamic},
            sequence=length if isinstance(length, str) else None,
            past="past_sequence" if self.cache else None,
            kinds={OUTPUT: "tokens", **dict.fromkeys(PRESENTS if self.cache else (), "cache")},
            layers=(0,) if self.cache else (),
            new=length,
            masked=self.attention_mask,
            past_name="past_{kind}",
            present_name="present_{kind}",
            windows={0: self.window} if self.window else {},
            cache_dtype=None if rounding is None else rounding.dtype,
        )

    def axes(self) -> tuple[Axes, Axes]:
        """Axes of every graph input and output, dynamic ones by name, in order."""
        block = self.block
        batch: str | int = self.batch if self.static else "batch"
        length: str | int = self.longest if self.static or self.longest == 1 else "sequence"
        lead = [block.rope.axes] if block.rope is not None and block.rope.axes > 1 else []
        inputs: Axes = {"hidden_states": [batch, length, block.hidden_size]}
        outputs: Axes = {OUTPUT: [batch, length, block.hidden_size]}
        if self.position_ids:
            inputs["position_ids"] = [*lead, batch, length]
        if self.cache:
            rounding = block.cache_rounding
            earlier: str | int = "past_sequence"
            now: str | int = "total_sequence"
            if self.window:
                earlier = now = self.capacity or "capacity"
            for name, width in (("key", block.head_dim), ("value", block.value_head_dim)):
                heads = block.num_kv_heads
                width = width if rounding is None else rounding.stored_width(width)
                inputs[f"past_{name}"] = [batch, heads, earlier, width]
                outputs[f"present_{name}"] = [batch, heads, now, width]
        if self.attention_mask:
            inputs[MASK] = [batch, "total_sequence" if self.cache else length]
        return inputs, outputs

    def ranges(self) -> dict[str, tuple[int, int]]:
        """The smallest and largest size of every dynamic axis."""
        # The tracer takes no range as narrow as that of a very small cache.
        longest = max(self.longest, _LEAST_RANGE) if self.cache else self.longest
        return {
            "batch": (1, _MAX_BATCH),
            "sequence": (1, longest),
            "past_sequence": (0, longest - 1),
            "total_sequence": (1, longest),
            "capacity": (self.window, max(longest, 2 * self.window)),
        }

    # How it is traced.

    def entries(self, served: Mapping[str, int]) -> Iterator[Entry]:
        """The block, tensors of the sizes it is traced at, and the ranges of their axes."""
        del served  # it serves what was asked
        length = TRACED_LENGTH if self.cache else min(TRACED_LENGTH, self.longest)
        past = TRACED_PAST if self.cache else 0
        sizes = {"batch": TRACED_BATCH, "sequence": length, "past_sequence": past}
        sizes["total_sequence"] = length + past
        sizes["capacity"] = self.window + TRACED_SLACK
        dims = {
            name: torch.export.Dim(name, min=low, max=high)
            for name, (low, high) in self.ranges().items()
            if low < high
        }
        tensors: dict[str, Any] = {}
        shapes: dict[str, Any] = {}
        for name, axes in self.signature.inputs.items():
            shape = [sizes[axis] if isinstance(axis, str) else axis for axis in axes]
            kind = torch.int64 if name in _INTEGERS else self.block.dtype
            if name.startswith("past_") and self.block.cache_rounding is not None:
                kind = self.block.cache_rounding.storage
            fill = torch.ones if name == MASK else torch.zeros
            tensors[name] = fill(shape, dtype=kind, device=self.block.device)
            shapes[name] = {i: dims[axis] for i, axis in enumerate(axes) if isinstance(axis, str)}
        hidden_states = tensors.pop("hidden_states")
        yield Entry(self.block, (hidden_states,), _with_past(tensors), _with_past(shapes))

    def signature_of(
        self, program: torch.export.ExportedProgram, entry: Entry, target: Target
    ) -> Signature:
        """Check that a trace kept every axis as wide as it was asked for.

        Raises:
            ExportError: one came out fixed or with a narrower range.
        """
        del entry, target  # known beforehand
        ranges = self.ranges()
        check_ranges(
            program,
            {
                name: {i: ranges[axis] for i, axis in enumerate(axes) if isinstance(axis, str)}
                for name, axes in self.signature.inputs.items()
            },
        )
        return self.signature

    def narrowed(self, error: Exception) -> Exception:
        """What is raised when the tracer narrows an axis: of this package's own module, a bug."""
        return error

    def describe(self, signature: Signature) -> dict[str, Any]:
        """Block and request, as ``config.json`` has them."""
        del signature
        content = self.to_json()
        rounding = content.pop("cache_rounding")
        described = {"block": describe_block(self.block), "export": content}
        return described if rounding is None else {**described, "cache_rounding": rounding}


def _keeping(block: Attention, cache: bool | str) -> Attention:
    """The block with a cache as it is asked for: itself, or sharing all it has."""
    if block.window_cache == (cache == WINDOW):
        return block
    other = copy.copy(block)
    other.window_cache = cache == WINDOW
    return other


def _with_past(by_name: dict[str, Any]) -> dict[str, Any]:
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
