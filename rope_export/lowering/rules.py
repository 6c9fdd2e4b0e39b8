"""Which operators are legal where, and why.

This table is the only place that knows the limits of the runtimes' kernels. A *form* is one way
to write an attention block; each target lists its forms from best to plainest, and the first
whose every limit holds on every requested provider is taken. The reasons why better ones were
passed over end up in the report.

Limits were read in onnxruntime 1.31's kernels and checked on its CPU provider; where CUDA's differ,
`kernels` says how that is known. A graph can be made for an older onnxruntime: a limit that not
every one has says since when it is gone (`Limit.since`), of what was tried with each of them
(`inspection.since`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace

from rope_export.inspection import since
from rope_export.inspection.since import Feature
from rope_export.lowering.situation import BLOCKS_TO_WIN, PLAIN, Situation

# From here on the CPU's GroupQueryAttention needs no memory for scores: measured with each.
_MEMORY_LINEAR = "1.28"


@dataclass(frozen=True)
class Limit:
    """One condition a form needs, on one provider (None: on all), and why.

    Attributes:
        provider: where it counts.
        holds: whether a situation fulfils it.
        reason: what is said when it does not, with the situation's fields.
        runs: the form would run and be right all the same, only slower.
        since: what an onnxruntime must have not to have this limit, or None: all have it.
    """

    provider: str | None
    holds: Callable[[Situation], bool]
    reason: str
    runs: bool = False
    since: Feature | None = None

    def broken_by(self, situation: Situation) -> bool:
        """Whether the situation is outside this limit."""
        lifted = self.since is not None and not since.is_older(
            situation.onnxruntime, self.since.version
        )
        return self._met_by(situation) and not lifted

    def needs(self, situation: Situation) -> str | None:
        """The oldest onnxruntime in which this limit does not break, or None: any."""
        return self.since.version if self.since and self._met_by(situation) else None

    def why(self, situation: Situation) -> str:
        """The reason, with the values of a situation that breaks it."""
        asked = " and ".join(
            name
            for name, needed in (
                ("a past", situation.cache),
                ("padding", situation.mask),
                ("a window", situation.window),
            )
            if needed
        )
        said = self.reason.format(
            **asdict(situation),
            window_block=situation.window_block,
            query_block=situation.query_block,
            integer_step=situation.integer_step,
            long_prompt=BLOCKS_TO_WIN * situation.window_block,
            what_is_masked=asked,
        )
        if self.since is None:
            return said
        return (
            f"{said} (before onnxruntime {self.since.version}; the graph is made for "
            f"{situation.onnxruntime})"
        )

    def _met_by(self, situation: Situation) -> bool:
        counts = self.provider in (None, situation.provider)
        return counts and not self.holds(situation)


@dataclass(frozen=True)
class Form:
    """One way to write the block.

    Attributes:
        attention: operator that attends, as ``domain::name`` ("" domain: standard ONNX).
        rotation: operator that rotates, or None when the attention operator does it itself.
        limits: what must hold.
        score_copies: per provider, how many ``[B, heads, S, S]`` tensors live at once (0: none).
        packs_rows: the present has each row's tokens from its first slot, without padding in
            between; else it has the columns of the mask.
    """

    name: str
    attention: str
    rotation: str | None
    limits: tuple[Limit, ...]
    score_copies: Callable[[Situation], float]
    packs_rows: bool = False


def _dtypes(*names: str) -> Callable[[Situation], bool]:
    return lambda s: s.dtype in names


ANY_GRAPH = (
    Limit(
        "cpu",
        _dtypes("float32", "float16"),
        "onnxruntime has no bfloat16 kernel for MatMul, RotaryEmbedding or attention on the CPU; "
        "use float32 or float16 there, or make the graph for cuda alone",
    ),
    Limit(
        None,
        lambda s: not s.cache_bits or s.dtype == "float32",
        "cache_dtype needs float32 weights, got {dtype}: its keys are not known to a step of the "
        "integers, so that nothing could say which is right",
    ),
)


def lacking(dtype: str, providers: Iterable[str]) -> list[str]:
    """Those of ``providers`` that have no kernels of ``dtype``, whatever a graph is made of."""
    there = [replace(PLAIN, provider=provider, dtype=dtype) for provider in providers]
    return [s.provider for s in there if any(limit.broken_by(s) for limit in ANY_GRAPH)]


_GQA = (
    *ANY_GRAPH,
    Limit(
        None,
        lambda s: s.causal,
        "GroupQueryAttention is always causal",
        since=since.BIDIRECTIONAL,
    ),
    Limit(
        None,
        lambda s: s.causal or not s.cache,
        "GroupQueryAttention is made for a past only in causal order",
    ),
    Limit(
        "cuda",
        lambda s: s.causal or not s.mask,
        "GroupQueryAttention on CUDA attends to the padding of a call that is not causal",
    ),
    Limit(
        None,
        lambda s: s.causal or not s.window or bool(s.query_block),
        "GroupQueryAttention takes a window only in causal order; without it, blocks of queries "
        "with the keys they see are made on the CPU alone, for prompts over {long_prompt} tokens",
    ),
    Limit(
        "cpu",
        lambda s: not s.apart or bool(s.window) or s.softcap or s.sinks,
        "MultiHeadAttention is faster than GroupQueryAttention on the CPU when not causal, and "
        "keeps no scores",
        runs=True,
    ),
    Limit(
        None,
        lambda s: not s.window_cache,
        "GroupQueryAttention has no cache of the window only",
        since=since.WINDOW_CACHE,
    ),
    Limit(
        None,
        lambda s: not s.cache_bits,
        "GroupQueryAttention has no cache of integers",
        since=since.INTEGER_CACHE,
    ),
    Limit(
        "cuda",
        _dtypes("float16", "bfloat16"),
        "GroupQueryAttention has no {dtype} kernel on CUDA (float16 and bfloat16 only)",
    ),
    Limit(
        None,
        lambda s: s.head_dim % 8 == 0,
        "GroupQueryAttention needs head_dim to be a multiple of 8, got {head_dim}",
    ),
    Limit(
        None,
        lambda s: s.value_head_dim == s.head_dim,
        "GroupQueryAttention needs value heads as wide as key heads, got {value_head_dim} and "
        "{head_dim}",
    ),
    Limit(
        None,
        lambda s: not s.integer_step or s.head_dim % s.integer_step == 0,
        "GroupQueryAttention with a cache of the window needs head_dim to be a multiple of "
        "{integer_step} for integers of {cache_bits} bits, got {head_dim}",
    ),
    Limit(
        "cuda",
        lambda s: s.head_dim <= 512,
        "GroupQueryAttention on CUDA takes head_dim up to 512, got {head_dim}",
    ),
    Limit(
        "cuda",
        lambda s: not s.window_cache or s.slots == s.window,
        "GroupQueryAttention on CUDA keeps a window in as many slots as that, a fixed number",
    ),
)

_GQA_ROTATES = (
    *_GQA,
    Limit(None, lambda s: s.rotary_dim > 0, "there is no rotation to fuse"),
    Limit(
        None,
        lambda s: s.head_dim % 16 == 0,
        "rotation inside GroupQueryAttention needs head_dim to be a multiple of 16, got {head_dim}",
    ),
    Limit(
        None,
        lambda s: s.rotary_dim % 16 == 0,
        "rotation inside GroupQueryAttention needs a rotated width that is a multiple of 16, "
        "got {rotary_dim}",
    ),
    Limit(
        None,
        lambda s: s.implied_positions,
        "GroupQueryAttention reads only the first position id of a prompt; heads are rotated first",
    ),
    Limit(
        None,
        lambda s: s.tabled,
        "rotation inside GroupQueryAttention needs one cos/sin table for all lengths (a "
        "max_seq_len, no xPos, and frequencies that are not learned and do not follow the length)",
    ),
    Limit(
        None,
        lambda s: not s.query_block,
        "without causal order, GroupQueryAttention on the CPU keeps the scores of all queries of a "
        "call; blocks of {query_block} queries are rotated first",
        runs=True,
    ),
    Limit(
        None,
        lambda s: s.causal or not s.window,
        "GroupQueryAttention takes a window only in causal order",
    ),
    Limit(
        None,
        lambda s: not s.by_blocks,
        "with a window, GroupQueryAttention on the CPU still computes the whole triangle; prompts "
        "over {long_prompt} tokens run in blocks of {window_block} instead, rotated first",
        runs=True,
    ),
)

_MHA = (
    *ANY_GRAPH,
    Limit(
        None,
        lambda s: not s.cache and not s.window and (s.apart or not s.mask),
        "MultiHeadAttention would need a mask of its own making for {what_is_masked}; Attention "
        "takes one mask for all heads",
    ),
    Limit(None, lambda s: not s.softcap, "MultiHeadAttention has no soft cap"),
    Limit(None, lambda s: not s.sinks, "MultiHeadAttention has no sinks"),
    Limit(
        "cpu",
        lambda s: not s.causal,
        "MultiHeadAttention on the CPU provider has a memory-linear kernel only when not causal",
    ),
    Limit(
        "cuda",
        lambda s: not s.alone,
        "MultiHeadAttention on CUDA needs cuDNN, and computes all scores of fewer than 256 float32 "
        "tokens; Attention does neither",
        runs=True,
    ),
)


_ATTENTION_IN_FLOAT32 = (
    *ANY_GRAPH,
    Limit(None, lambda s: not s.sinks, "Attention has no sinks"),
    Limit(
        None,
        lambda s: not (s.softcap and s.hides_keys),
        "Attention caps the scores of hidden keys too, which then count",
        since=since.SOFTCAP_BEHIND_MASK,
    ),
)

_ATTENTION = (
    *_ATTENTION_IN_FLOAT32,
    Limit(
        "cpu",
        _dtypes("float32"),
        "Attention on the CPU rounds its {dtype} scores to {dtype}; it is given float32 instead",
    ),
)


def _gqa_copies(s: Situation) -> float:
    if s.provider != "cpu":
        return 0.0
    if s.dtype != "float32":  # attended in float32
        return 2.0
    plain = s.causal and not s.softcap and not s.sinks
    return 0.0 if plain and not since.is_older(s.onnxruntime, _MEMORY_LINEAR) else 1.0


def _copies_but_in_blocks(s: Situation) -> float:
    return 0.0 if s.by_blocks or s.query_block else _gqa_copies(s)


def _mha_copies(_: Situation) -> float:
    return 0.0


def _attention_is_masked(s: Situation) -> bool:
    return s.cache or s.mask or s.window > 0


def repeats_heads(s: Situation) -> bool:
    """Whether `Attention` is given keys and values for every query head.

    On CUDA, float32 with grouped heads takes an unfused kernel, and with as many heads of each the
    memory-efficient one. With a mask either may be unfused, and a cache has the grouped heads.
    """
    grouped = s.num_heads != s.num_kv_heads
    return s.provider == "cuda" and s.dtype == "float32" and grouped and not _attention_is_masked(s)


def _attention_copies(s: Situation) -> float:
    if s.provider == "cpu":
        return 2.5
    # CUDA: flash for half precision, memory-efficient for float32. With a mask neither, unless
    # there are a multiple of four keys; nor for odd widths, nor in half precision for values of
    # another width than keys.
    fused = s.head_dim % 8 == 0 and s.value_head_dim % 8 == 0 and not _attention_is_masked(s)
    fused = fused and (s.dtype == "float32" or s.value_head_dim == s.head_dim)
    return 0.0 if fused else 2.5


def _primitive_copies(_: Situation) -> float:
    return 6.0


_ROTARY = "::RotaryEmbedding"
GQA_ROTATING = Form(
    "gqa_rotating",
    "com.microsoft::GroupQueryAttention",
    None,
    _GQA_ROTATES,
    _gqa_copies,
    packs_rows=True,
)
GQA = Form(
    "gqa",
    "com.microsoft::GroupQueryAttention",
    _ROTARY,
    _GQA,
    _copies_but_in_blocks,
    packs_rows=True,
)
MHA = Form("mha", "com.microsoft::MultiHeadAttention", _ROTARY, _MHA, _mha_copies)
ATTENTION = Form("attention", "::Attention", _ROTARY, _ATTENTION, _attention_copies)
ATTENTION_IN_FLOAT32 = Form(
    "attention_in_float32", "::Attention", _ROTARY, _ATTENTION_IN_FLOAT32, _attention_copies
)
DECOMPOSED = Form("decomposed", "::Softmax", _ROTARY, ANY_GRAPH, _primitive_copies)
PRIMITIVE = Form("primitive", "::Softmax", "::Mul", ANY_GRAPH, _primitive_copies)

FORMS: dict[str, tuple[Form, ...]] = {
    "ort": (GQA_ROTATING, GQA, MHA, ATTENTION, ATTENTION_IN_FLOAT32, DECOMPOSED),
    "onnx": (ATTENTION, ATTENTION_IN_FLOAT32, DECOMPOSED),
    "primitive": (PRIMITIVE,),
}


def broken_limits(form: Form, situations: list[Situation], *, to_run: bool = False) -> list[str]:
    """Reasons why ``form`` is not to be used, or with ``to_run`` cannot be; empty when it is."""
    return [
        limit.why(situation)
        for situation in situations
        for limit in form.limits
        if limit.broken_by(situation) and not (to_run and limit.runs)
    ]


def oldest_onnxruntime(form: Form, situations: list[Situation]) -> str | None:
    """The oldest onnxruntime in which ``form`` is right, as far as it is asked for; None: any."""
    needed = [limit.needs(s) for s in situations for limit in form.limits]
    return max(filter(None, needed), key=since.parts, default=None)
