"""One block in eager PyTorch, compiled, exported plainly, and as each of our targets."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rope_export import runtime
from rope_export.bench.limits import COPY, MATMUL, copied_bytes, matmul_flops
from rope_export.bench.results import Measurement, Results
from rope_export.bench.steps import (
    BLOCK,
    BY_WINDOW,
    FACTS,
    INTEGERS,
    OURS,
    ROWS,
    TOKENS,
    eager_decoding,
)
from rope_export.bench.turns import Contender, Job, TurnError, at_a_time
from rope_export.errors import BadInputError, RopeExportError

if TYPE_CHECKING:
    from rope_export.attention.block import Attention

Array = npt.NDArray[Any]
Progress = Callable[[str], None]

PHASES = ("prefill", "decode")
CONTENDERS = ("eager", "compile", "plain", "ort", "onnx", "primitive")
_HOPELESS = 1e9  # what JSON can say of an infinite error


def measure(
    block: Attention,
    lengths: Sequence[int],
    *,
    phases: Sequence[str] = PHASES,
    contenders: Sequence[str] = CONTENDERS,
    provider: str = "cpu",
    batch: int = 1,
    rounds: int = 7,
    seed: int = 0,
    given: Mapping[str, Path] | None = None,
    describe: Mapping[str, Any] | None = None,
    command: str = "",
    limits: bool = True,
    progress: Progress = lambda _: None,
) -> Results:
    """Time a block as PyTorch and as graphs, each contender in a process of its own, in turns.

    Every contender's answer is compared with float64 truth before it is timed.

    Args:
        block: what is measured.
        lengths: of sequences, in tokens; the block must serve them.
        phases: ``"prefill"``: all tokens are new; ``"decode"``: all but the last are in the cache.
        contenders: some of `CONTENDERS`, of ``ort-window-cache`` (target ``ort``, with a cache of
            the window only), of ``ort-int8-cache`` and ``ort-int4-cache``, of ``peers.NAMES``
            and of those given. What a cache of integers changes in the answer is shown as its error
            and is not judged.
        provider: where everything runs: ``"cpu"`` or ``"cuda"``.
        batch: rows.
        rounds: steps timed of each contender, after one that warms it up.
        seed: of the inputs.
        given: artifacts that are not to be made anew, by contender and, with a cache, by
            ``"NAME-cache"``.
        describe: the block in numbers, for the results.
        command: that does it again, for the results.
        limits: measure what the machine can do, too.
        progress: told what is being done.

    Raises:
        BadInputError: a length is longer than the block serves, or a name is unknown.
        ProviderUnavailableError: the provider does not load.
    """
    from rope_export.bench import peers

    given = given or {}
    if block.window_cache:  # for PyTorch it is the same block, and targets are told
        block = copy.copy(block)
        block.window_cache = False
    held = {n.removesuffix("-cache"): not _holds_integers(folder) for n, folder in given.items()}
    own = [n for n in (*OURS, *held) if held.get(n, True)]
    others = [name.removesuffix("-cache") for name in given]
    known = dict.fromkeys((*CONTENDERS, BY_WINDOW, *INTEGERS, *peers.NAMES, *others))
    _check(block, lengths, phases, tuple(known), contenders)
    runtime.require(provider)
    longest = max(lengths)
    dtype = str(block.dtype).removeprefix("torch.")
    with TemporaryDirectory() as root:
        folder = Path(root)
        _store(block, folder, batch, longest, seed)
        reached = _limits(folder, provider, rounds, progress) if limits else {}
        failures: dict[tuple[str, str], str] = {}
        for name in contenders:
            for phase in phases:
                progress(f"preparing {name}, {phase}")
                why = _prepared(name, phase, block, folder, provider, given)
                if why is not None:
                    failures[name, phase] = why
        measured: list[Measurement] = []
        for length in lengths:
            for phase in phases:
                jobs = [Job(name, phase, length, provider, root) for name in contenders]
                measured += _compete(block, jobs, failures, own, batch, rounds, progress)
    return Results(
        title=_title(block),
        shape=dict(describe or {}),
        provider=provider,
        dtype=dtype,
        batch=batch,
        limits=reached,
        measurements=tuple(measured),
        environment=_environment(),
        command=command,
    )


def _title(block: Attention) -> str:
    """A block in words."""
    rope = block.rope
    parts = [
        f"hidden {block.hidden_size}",
        f"{block.num_heads} query and {block.num_kv_heads} key/value heads of {block.head_dim}",
        "no RoPE" if rope is None else f"RoPE {rope.layout}",
    ]
    for name, value in (("window", block.window), ("soft cap", block.softcap)):
        parts += [] if value is None else [f"{name} {value:g}"]
    flags = {
        "sinks": block.sinks is not None,
        "norms of queries and keys": block.q_norm is not None,
        "latent": block.latent is not None,
        "not causal": not block.causal,
    }
    return ", ".join([*parts, *(name for name, is_so in flags.items() if is_so)])


def _environment() -> dict[str, Any]:
    machine = runtime.Machine.this()
    return {**runtime.environment(), "cpu": machine.cpu, "gpus": list(machine.gpus)}


def _check(
    block: Attention,
    lengths: Sequence[int],
    phases: Sequence[str],
    known: Sequence[str],
    contenders: Sequence[str],
) -> None:
    rope = block.rope
    if rope is not None and not rope.found.one_position:
        raise BadInputError(
            f"scaling must give a token one position to be timed, got {rope.scaling}: its tokens "
            f"have {rope.axes} axes of positions"
        )
    serves = None if rope is None else rope.positions
    for length in lengths:
        if length < 2 or (serves is not None and length > serves):
            raise BadInputError(
                f"lengths must be from 2 to the {serves} tokens the block serves, got {length}"
            )
    for name, allowed, asked in (("phases", PHASES, phases), ("contenders", known, contenders)):
        wrong = [each for each in asked if each not in allowed]
        if wrong or not asked:
            raise BadInputError(
                f"{name} must be some of {', '.join(allowed)}, got "
                f"{repr(wrong[0]) if wrong else 'none'}"
            )


def _store(block: Attention, folder: Path, batch: int, longest: int, seed: int) -> None:
    import torch

    from rope_export.attention.random_inputs import draw, input_gain

    torch.save(block, folder / BLOCK)
    rng = np.random.default_rng(seed)
    tokens = draw(rng, block, batch, longest, input_gain(block, seed))
    np.save(folder / TOKENS, tokens.float().numpy())
    facts = {"dtype": str(block.dtype).removeprefix("torch."), "batch": batch, "longest": longest}
    (folder / FACTS).write_text(json.dumps(facts))


def _limits(folder: Path, provider: str, rounds: int, progress: Progress) -> dict[str, float]:
    progress("what this machine can do: a large product and a large copy")
    best = {}
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(Contender(Job(name, "", 0, provider, str(folder))))
            for name in (MATMUL, COPY)
        }
        for contender in running.values():
            contender.loaded()
        for _ in range(2):
            for contender in running.values():
                contender.seconds()
        for name, contender in running.items():
            best[name] = min(contender.seconds() for _ in range(rounds))
    return {
        "matmul_flops": matmul_flops(provider) / best[MATMUL],
        "copy_bytes": copied_bytes() / best[COPY],
    }


def _prepared(
    name: str,
    phase: str,
    block: Attention,
    folder: Path,
    provider: str,
    given: Mapping[str, Path],
) -> str | None:
    """Write what a contender needs; why it cannot run, or None."""
    from rope_export.bench import peers
    from rope_export.exporting.export import export

    cached = f"{name}-cache"
    key = cached if phase == "decode" else name
    if name in given or cached in given:
        # A graph with a cache serves prompts, too.
        key = cached if cached in given else name
        if phase == "decode" and key == name:
            return "exported without a cache"
        if not (folder / key).exists():
            (folder / key).symlink_to(given[key].resolve())
        return None
    try:
        if name == BY_WINDOW:  # of which a prompt is served as well
            key = cached
            if not (folder / key).exists():
                export(block, folder / key, target="ort", providers=[provider], cache="window")
        elif name in OURS:
            export(block, folder / key, target=name, providers=[provider], cache=phase == "decode")
        elif name in INTEGERS:  # one graph, for prompts too
            if not (folder / cached).exists():
                integers: dict[str, Any] = {
                    "cache": True,
                    "cache_dtype": INTEGERS[name],
                    "providers": [provider],
                }
                export(block, folder / cached, **integers)
        elif name == "plain":
            _export_plainly(block, folder / key, cache=phase == "decode")
        elif name in peers.NAMES:
            return peers.prepare(name, phase, block, folder, provider)
    except Exception as error:
        if isinstance(error, RopeExportError):
            return str(error)
        return f"cannot be exported: {_first_line(error)}"
    return None


def _holds_integers(folder: Path) -> bool:
    """Whether an artifact's cache does: its answers are then not those of the block itself."""
    from rope_export.artifacts.artifact import Artifact

    layout = Artifact.read(folder, verify=False).cache
    return layout is not None and layout.dtype is not None


def _export_plainly(block: Attention, folder: Path, *, cache: bool) -> None:
    """What ``torch.onnx.export`` makes of the same block at its default opset."""
    import torch

    from rope_export.exporting.tracing import quiet_torch

    folder.mkdir()
    tokens = torch.zeros(2, 6, block.hidden_size, dtype=block.dtype)
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    shapes: dict[str, Any] = {"hidden_states": {0: batch, 1: torch.export.Dim.DYNAMIC}}
    kwargs: dict[str, Any] = {}
    if cache:
        kwargs["past"] = tuple(
            torch.zeros(2, block.num_kv_heads, 5, width, dtype=block.dtype)
            for width in (block.head_dim, block.value_head_dim)
        )
        shapes["past"] = ({0: batch, 2: torch.export.Dim.DYNAMIC},) * 2
    with quiet_torch(), torch.no_grad():
        torch.onnx.export(
            block,
            (tokens,),
            folder / "model.onnx",
            kwargs=kwargs,
            input_names=["hidden_states", *(["past_key", "past_value"] if cache else [])],
            output_names=["output", *(["present_key", "present_value"] if cache else [])],
            dynamo=True,
            dynamic_shapes=shapes,
            verbose=False,
        )


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def _compete(
    block: Attention,
    jobs: Sequence[Job],
    failures: Mapping[tuple[str, str], str],
    own: Sequence[str],
    batch: int,
    rounds: int,
    progress: Progress,
) -> list[Measurement]:
    """Run the contenders of one phase at one length."""
    from rope_export.bench import work

    phase, length = jobs[0].phase, jobs[0].length
    failed = {job.contender: failures.get((job.contender, phase)) for job in jobs}
    peaks: dict[str, int] = {}
    answers: dict[str, Array] = {}
    seconds: dict[str, list[float]] = {}
    with ExitStack() as stack:
        running: dict[str, Contender] = {}
        waiting = [job for job in jobs if failed[job.contender] is None]
        while waiting:
            some, waiting = waiting[: at_a_time()], waiting[at_a_time() :]
            started = {job.contender: stack.enter_context(Contender(job)) for job in some}
            for name, contender in started.items():
                progress(f"{phase} {length}: loading {name}")
                failed[name] = _failure(contender.loaded)
                if failed[name] is None:
                    running[name] = contender
        for name, contender in list(running.items()):
            progress(f"{phase} {length}: first step of {name}")
            try:
                peaks[name], answers[name] = contender.first()
                seconds[name] = []
            except TurnError as error:
                failed[name] = str(error)
                del running[name]
        progress(f"{phase} {length}: float64 truth")
        errors = _errors(block, Path(jobs[0].folder), phase, length, answers)
        for turn in range(rounds + 1):
            progress(f"{phase} {length}: round {turn} of {rounds}")
            for name, contender in list(running.items()):
                try:
                    taken = contender.seconds()
                except TurnError as error:
                    failed[name] = str(error)
                    del running[name]
                    continue
                if turn:  # the first warms up
                    seconds[name].append(taken)
    flops = work.flops(block, phase, length, batch)
    least_bytes = work.least_bytes(block, phase, length, batch)
    measured = []
    for job in jobs:
        name = job.contender
        if failed[name] is not None:
            measured.append(Measurement(phase, length, name, failed=failed[name]))
            continue
        off, allowed = errors[name]
        measured.append(
            Measurement(
                phase,
                length,
                name,
                tuple(seconds[name]),
                peaks[name],
                off,
                allowed if name in own else None,
                flops,
                least_bytes,
            )
        )
    return measured


def _failure(act: Callable[[], None]) -> str | None:
    try:
        act()
    except TurnError as error:
        return str(error)
    return None


def _errors(
    block: Attention, folder: Path, phase: str, length: int, answers: Mapping[str, Array]
) -> dict[str, tuple[float, float]]:
    """Error of every answer against float64 truth, and what one of ours may be off by."""
    import torch

    from rope_export.artifacts.comparison import errors_against, tolerance
    from rope_export.proof.reference import attention_truth

    tokens = torch.from_numpy(np.load(folder / TOKENS)[:, :length]).to(block.dtype)
    rows = torch.arange(max(0, length - ROWS) if phase == "prefill" else length - 1, length)
    with torch.no_grad():
        truth = attention_truth(block, tokens, rows=rows).numpy()
        run = eager_decoding(block, tokens)
        eager = run() if phase == "decode" else block(tokens)[:, rows]
    found = errors_against(truth, eager.double().numpy())
    dtype = str(block.dtype).removeprefix("torch.")
    allowed = tolerance(found, dtype, max(block.hidden_size, block.o_proj.in_features)).rel
    return {
        name: (
            min(errors_against(truth, answer).rel, _HOPELESS)
            if answer.shape == truth.shape
            else _HOPELESS,
            allowed,
        )
        for name, answer in answers.items()
    }
