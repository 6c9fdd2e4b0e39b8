"""Which operators are legal where, and why.

This table is the only place that knows the limits of the runtimes' kernels. A *form* is one way
to write an attention block; each target lists its forms from best to plainest, and the first
whose every limit holds on every requested provider is taken. The reasons why better ones were
passed over end up in the report.

Limits were read in onnxruntime 1.31's kernels and checked on its CPU provider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, get_args

from rope_export.errors import BadInputError

if TYPE_CHECKING:
    from rope_export.attention import Attention

TargetName = Literal["ort", "onnx", "primitive"]
TARGETS: tuple[str, ...] = get_args(TargetName)
Provider = Literal["cpu", "cuda"]
PROVIDERS: tuple[str, ...] = get_args(Provider)
DTYPES: tuple[str, ...] = ("float32", "float16", "bfloat16")

OPSETS: dict[str, int] = {"ort": 23, "onnx": 23, "primitive": 18}


@dataclass(frozen=True)
class Situation:
    """What a form is asked to express.

    Attributes:
        provider: where it runs.
        dtype: of weights and activations.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: width of a head.
        rotary_dim: rotated width of a head, 0 without RoPE.
        causal: whether later tokens are hidden.
        tabled: the angles of queries and keys are one cos/sin table indexed by position.
        implied_positions: positions are 0, 1, 2, … in every row.
    """

    provider: str
    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    causal: bool
    tabled: bool
    implied_positions: bool


def situations(
    block: Attention, providers: Iterable[str], *, dtype: str, implied_positions: bool
) -> list[Situation]:
    """Describe ``block`` once for each provider."""
    rope = block.rope
    return [
        Situation(
            provider=provider,
            dtype=dtype,
            num_heads=block.num_heads,
            num_kv_heads=block.num_kv_heads,
            head_dim=block.head_dim,
            rotary_dim=0 if rope is None else rope.dim,
            causal=block.causal,
            tabled=rope is not None and rope.one_table,
            implied_positions=implied_positions,
        )
        for provider in providers
    ]


@dataclass(frozen=True)
class Limit:
    """One condition a form needs, on one provider (None: on all), and why."""

    provider: str | None
    holds: Callable[[Situation], bool]
    reason: str

    def broken_by(self, situation: Situation) -> bool:
        """Whether the situation is outside this limit."""
        if self.provider not in (None, situation.provider):
            return False
        return not self.holds(situation)


@dataclass(frozen=True)
class Form:
    """One way to write the block.

    Attributes:
        attention: operator that attends, as ``domain::name`` ("" domain: standard ONNX).
        rotation: operator that rotates, or None when the attention operator does it itself.
        limits: what must hold.
        score_copies: per provider, how many ``[B, heads, S, S]`` tensors live at once (0: none).
    """

    name: str
    attention: str
    rotation: str | None
    limits: tuple[Limit, ...]
    score_copies: Callable[[Situation], float]


def _dtypes(*names: str) -> Callable[[Situation], bool]:
    return lambda s: s.dtype in names


_ANY_GRAPH = (
    Limit(
        "cpu",
        _dtypes("float32", "float16"),
        "onnxruntime has no bfloat16 kernel for MatMul, RotaryEmbedding or attention on the CPU; "
        "use float32 or float16 there, or make the graph for cuda alone",
    ),
)

_GQA = (
    *_ANY_GRAPH,
    Limit(None, lambda s: s.causal, "GroupQueryAttention is always causal"),
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
        "cuda",
        lambda s: s.head_dim <= 256,
        "GroupQueryAttention on CUDA takes head_dim up to 256, got {head_dim}",
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
        "GroupQueryAttention reads only the first position id of a prompt",
    ),
    Limit(
        None,
        lambda s: s.tabled,
        "rotation inside GroupQueryAttention needs one cos/sin table for all lengths (a "
        "max_seq_len, no xPos, and frequencies that are not learned and do not follow the length)",
    ),
)

_MHA = (
    *_ANY_GRAPH,
    Limit(
        "cpu",
        lambda s: not s.causal,
        "MultiHeadAttention on the CPU provider has a memory-linear kernel only when not causal",
    ),
    Limit(
        "cuda",
        _dtypes("float32", "float16"),
        "MultiHeadAttention has no {dtype} kernel on CUDA (float32 and float16 only)",
    ),
)


_ATTENTION = (
    *_ANY_GRAPH,
    Limit(
        "cpu",
        _dtypes("float32"),
        "Attention on the CPU rounds its {dtype} scores to {dtype}; it is given float32 instead",
    ),
)


def _none(_: Situation) -> float:
    return 0.0


def _attention_copies(s: Situation) -> float:
    if s.provider == "cpu":
        return 2.5
    # CUDA: flash for half precision; float32 with grouped heads is an unfused kernel.
    return 2.5 if s.dtype == "float32" and s.num_heads != s.num_kv_heads else 0.0


def _primitive_copies(_: Situation) -> float:
    return 6.0


_ROTARY = "::RotaryEmbedding"
GQA_ROTATING = Form("gqa_rotating", "com.microsoft::GroupQueryAttention", None, _GQA_ROTATES, _none)
GQA = Form("gqa", "com.microsoft::GroupQueryAttention", _ROTARY, _GQA, _none)
MHA = Form("mha", "com.microsoft::MultiHeadAttention", _ROTARY, _MHA, _none)
ATTENTION = Form("attention", "::Attention", _ROTARY, _ATTENTION, _attention_copies)
ATTENTION_IN_FLOAT32 = Form(
    "attention_in_float32", "::Attention", _ROTARY, _ANY_GRAPH, _attention_copies
)
PRIMITIVE = Form("primitive", "::Softmax", "::Mul", _ANY_GRAPH, _primitive_copies)

FORMS: dict[str, tuple[Form, ...]] = {
    "ort": (GQA_ROTATING, GQA, MHA, ATTENTION, ATTENTION_IN_FLOAT32),
    "onnx": (ATTENTION, ATTENTION_IN_FLOAT32),
    "primitive": (PRIMITIVE,),
}


@dataclass(frozen=True)
class Choice:
    """The form taken, and why the better ones were not.

    Attributes:
        form: the form taken.
        reasons: one line for each better form that was passed over.
        score_copies: ``[B, heads, S, S]`` tensors alive at once, per provider.
    """

    form: Form
    reasons: tuple[str, ...]
    score_copies: dict[str, float]


def broken_limits(form: Form, situations: list[Situation]) -> list[str]:
    """Reasons why ``form`` cannot be used, empty when it can."""
    return [
        limit.reason.format(**asdict(situation))
        for situation in situations
        for limit in form.limits
        if limit.broken_by(situation)
    ]


def choose(target: str, situations: list[Situation]) -> Choice:
    """Choose the best legal form of ``target`` for the same block on one or more providers.

    Raises:
        BadInputError: none is legal; the message says why.
    """
    passed_over: list[str] = []
    for form in FORMS[target]:
        broken = broken_limits(form, situations)
        if not broken:
            copies = {s.provider: form.score_copies(s) for s in situations}
            return Choice(form, tuple(dict.fromkeys(passed_over)), copies)
        passed_over.append(broken[0])
    raise BadInputError(
        f"target {target} with dtype {situations[0].dtype} is not possible for provider "
        f"{' and '.join(s.provider for s in situations)}: {passed_over[-1]}"
    )
