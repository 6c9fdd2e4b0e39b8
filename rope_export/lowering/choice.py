"""`choose`: the best form that is legal on every provider, and why better ones were passed over."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rope_export.errors import BadInputError
from rope_export.lowering import rules
from rope_export.lowering.rules import FORMS, Form, broken_limits, oldest_onnxruntime
from rope_export.lowering.situation import BLOCKS_TO_WIN, PLAIN, Situation


@dataclass(frozen=True)
class Choice:
    """The form taken, and why the better ones were not.

    Attributes:
        form: the form taken.
        reasons: one line for each better form that was passed over.
        score_copies: ``[B, heads, S, T]`` tensors alive at once, per provider.
        padding: the side on which prompts are padded.
        cached: whether past keys and values come in and present ones go out.
        by_rows: whether several new tokens of a batch with a past are one call a row.
        window_block: tokens in a block when long prompts are computed by blocks, or 0.
        query_block: queries in a call when calls that are not causal are computed by blocks, or 0.
        longest_whole: tokens of the longest call that is not computed by those blocks, or 0.
        cut_rows: whether each row of a padded batch is a call of its own, cut to its tokens.
        single: whether one token after a past is a call of its own.
        window_cache: whether the cache holds the window only.
        one_length: whether all rows of a batch must be of one length, without padding.
        repeats_heads: whether keys and values are given once for each query head.
        branches: what the graph decides while it runs, in plain words.
        limits: what the graph cannot do, in plain words.
        onnxruntime: the oldest one in which the form is right, or None: every one.
    """

    form: Form
    reasons: tuple[str, ...]
    score_copies: dict[str, float]
    padding: str = "right"
    cached: bool = False
    by_rows: bool = False
    window_block: int = 0
    query_block: int = 0
    longest_whole: int = 0
    cut_rows: bool = False
    single: bool = False
    window_cache: bool = False
    one_length: bool = False
    repeats_heads: bool = False
    branches: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    onnxruntime: str | None = None


def legal_forms(target: str, situations: list[Situation]) -> list[str]:
    """Names of the forms of ``target`` that run and are right, also where another is faster."""
    situations = _together(situations)
    return [f.name for f in FORMS[target] if not broken_limits(f, situations, to_run=True)]


def _together(situations: list[Situation]) -> list[Situation]:
    if len(situations) == 1:
        return situations
    return [replace(situation, alone=False) for situation in situations]


def choose(target: str, situations: list[Situation], form: str | None = None) -> Choice:
    """Choose the best legal form of ``target`` for the same block on one or more providers.

    Args:
        target: one of `TARGETS`.
        situations: the block, once for each provider.
        form: take the form of this name, one of `legal_forms`, instead of the best.

    Raises:
        BadInputError: none is legal; the message says why.
    """
    situations = _together(situations)
    passed_over: list[str] = []
    for each in FORMS[target]:
        if form is not None and each.name != form:
            continue
        broken = broken_limits(each, situations, to_run=form is not None)
        if not broken:
            return _taken(each, situations, tuple(dict.fromkeys(passed_over)))
        passed_over.append(broken[0])
    raise BadInputError(
        f"target {target} with dtype {situations[0].dtype} is not possible for provider "
        f"{' and '.join(s.provider for s in situations)}: {passed_over[-1]}"
    )


def _taken(form: Form, situations: list[Situation], reasons: tuple[str, ...]) -> Choice:
    one = situations[0]
    on_cpu = any(s.provider == "cpu" for s in situations)
    # Control flow keeps CUDA from capturing a graph, and its kernel computes windows only.
    by_rows = form.packs_rows and one.cache and on_cpu
    # Blocks have a first key that is not the row's: their heads are rotated before.
    rotated_first = form.packs_rows and bool(form.rotation)
    in_blocks = rotated_first and one.causal and all(s.by_blocks for s in situations)
    block = one.window_block if in_blocks else 0
    query_block = one.query_block if rotated_first else 0
    cut_rows = form is rules.MHA and one.mask and one.apart
    # Elsewhere sinks would choose a slower kernel.
    # With a cache of integers the kernel is another, and is as fast as it is.
    single = by_rows and not one.cache_bits and all(s.provider == "cpu" for s in situations)
    branches, limits = [], []
    # Padding counts as tokens, which the next ones take the place of; where tokens make room for
    # each other, that would be too late.
    one_length = form.packs_rows and one.window_cache and not on_cpu
    if by_rows and one.window_cache:
        branches.append(
            "padded tokens, and several new tokens of a batch with a past, run row by row: "
            "GroupQueryAttention takes one row of them, and a cache of the window no padding"
        )
    elif by_rows:
        branches.append(
            "several new tokens of a batch with a past run row by row: GroupQueryAttention takes "
            "one row of them"
        )
    elif form.packs_rows and one.cache:
        limits.append(
            "several new tokens of a batch with a past must be given row by row, or one by one: "
            "GroupQueryAttention takes one row of them, and the control flow that would split "
            "them keeps CUDA from capturing the graph"
        )
    if one_length:
        limits.append(
            "rows of a batch must be of one length, without padding: GroupQueryAttention keeps no "
            "window of padded rows, and the control flow that would split them keeps CUDA from "
            "capturing the graph"
        )
    if single:
        branches.append(
            "a single new token is a call of its own, with its query scaled before: "
            "GroupQueryAttention on the CPU then multiplies by vectors, which is faster"
        )
    if block:
        branches.append(
            f"prompts over {BLOCKS_TO_WIN * block} tokens run in blocks of {block}: "
            "GroupQueryAttention on the CPU computes the whole triangle whatever the window"
        )
    longest_whole = 0
    if query_block:
        longest_whole = BLOCKS_TO_WIN * one.window_block if one.window else query_block
        branches.append(
            f"prompts over {longest_whole} tokens run in blocks of {query_block} queries: "
            "GroupQueryAttention on the CPU keeps the scores of all queries of a call that is not "
            "causal"
        )
    if cut_rows:
        branches.append(
            "rows of a padded batch run one by one, each cut to its tokens: with a mask "
            "MultiHeadAttention on the CPU keeps all scores"
        )
    return Choice(
        form,
        reasons,
        {s.provider: form.score_copies(s) for s in situations},
        padding=one.padding,
        cached=one.cache,
        by_rows=by_rows,
        window_block=block,
        query_block=query_block,
        longest_whole=longest_whole,
        cut_rows=cut_rows,
        single=single,
        window_cache=one.window_cache,
        one_length=one_length,
        repeats_heads=form.attention == rules.ATTENTION.attention
        and any(rules.repeats_heads(s) for s in situations),
        branches=tuple(branches),
        limits=tuple(limits),
        onnxruntime=oldest_onnxruntime(form, situations),
    )


def attending_operator(target: str, provider: str, dtype: str) -> str | None:
    """The operator that attends in a plain block (`PLAIN`), or None where none is legal."""
    try:
        found = choose(target, [replace(PLAIN, provider=provider, dtype=dtype)])
    except BadInputError:
        return None
    return found.form.attention.removeprefix("::")
