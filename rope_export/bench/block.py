"""One block in eager PyTorch, compiled, exported plainly, and as each of our targets."""

from __future__ import annotations

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
from rope_export.bench.turns import Contender, Job, Step, TurnError, at_a_time
from rope_export.errors import BadInputError, RopeExportError

if TYPE_CHECKING:
    from rope_export.attention import Attention
    from rope_export.runtime import Decoder, Session

Array = npt.NDArray[Any]
Progress = Callable[[str], None]

PHASES = ("prefill", "decode")
CONTENDERS = ("eager", "compile", "plain", "ort", "onnx", "primitive")
OURS = ("ort", "onnx", "primitive")
GIVEN = "artifact"
BLOCK, TOKENS, FACTS = "block.pt", "tokens.npy", "facts.json"
# Tokens that are compared with float64 truth: the last ones, which have seen the most.
ROWS = 16
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
        contenders: some of `CONTENDERS`, of ``peers.NAMES`` and of those given.
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
    own = (*OURS, *(name.removesuffix("-cache") for name in given))
    known = dict.fromkeys((*CONTENDERS, *peers.NAMES, *own))
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

    from rope_export.draws import draw, input_gain

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
    from rope_export.exporter import export

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
        if name in OURS:
            export(block, folder / key, target=name, providers=[provider], cache=phase == "decode")
        elif name == "plain":
            _export_plainly(block, folder / key, cache=phase == "decode")
        elif name in peers.NAMES:
            return peers.prepare(name, phase, block, folder, provider)
    except Exception as error:
        if isinstance(error, RopeExportError):
            return str(error)
        return f"cannot be exported: {_first_line(error)}"
    return None


def _export_plainly(block: Attention, folder: Path, *, cache: bool) -> None:
    """What ``torch.onnx.export`` makes of the same block at its default opset."""
    import torch

    from rope_export.tracing import quiet_torch

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

    from rope_export.comparison import errors_against, tolerance
    from rope_export.reference import attention_truth

    tokens = torch.from_numpy(np.load(folder / TOKENS)[:, :length]).to(block.dtype)
    rows = torch.arange(max(0, length - ROWS) if phase == "prefill" else length - 1, length)
    with torch.no_grad():
        truth = attention_truth(block, tokens, rows=rows).numpy()
        run = _eager_decoding(block, tokens)
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


# What runs in the process of a contender.


def facts_of(job: Job) -> dict[str, Any]:
    """Dtype, batch and longest length of what is measured."""
    content: dict[str, Any] = json.loads((Path(job.folder) / FACTS).read_text())
    return content


def tokens_of(job: Job) -> Array:
    """Hidden states ``[batch, length, hidden]`` of a job, in the dtype of the block."""
    dtype = facts_of(job)["dtype"]
    if dtype == "bfloat16":
        import ml_dtypes

        kind: Any = ml_dtypes.bfloat16
    else:
        kind = np.dtype(dtype)
    tokens: Array = np.load(Path(job.folder) / TOKENS, mmap_mode="r")[:, : job.length].astype(kind)
    return tokens


def answered(job: Job, output: Array) -> Array:
    """The tokens that are compared, of an output ``[batch, tokens, width]``."""
    rows = min(ROWS, job.length) if job.phase == "prefill" else 1
    return np.asarray(output[:, -rows:], dtype=np.float64)


def block_of(job: Job) -> tuple[Any, Any]:
    """The block and its tokens, where the job runs."""
    import torch

    from rope_export.draws import from_numpy

    torch.set_grad_enabled(False)
    block = torch.load(Path(job.folder) / BLOCK, weights_only=False).to(job.provider).eval()
    return block, from_numpy(tokens_of(job)).to(job.provider)


def _array(output: Any) -> Array:
    array: Array = output.double().cpu().numpy()
    return array


def torch_step(job: Job, run: Callable[[], Any]) -> Step:
    """A step of PyTorch: over when the device is done."""
    import torch

    if job.provider != "cuda":
        return Step(run, lambda output: answered(job, _array(output)))

    def step() -> Any:
        output = run()
        torch.cuda.synchronize()
        return output

    torch.cuda.reset_peak_memory_stats()
    return Step(
        step,
        lambda output: answered(job, _array(output)),
        torch.cuda.max_memory_allocated,
    )


def _eager(job: Job) -> Step:
    block, tokens = block_of(job)
    if job.phase == "prefill":
        return torch_step(job, lambda: block(tokens))
    return torch_step(job, _eager_decoding(block, tokens))


def _compiled(job: Job) -> Step:
    import torch

    block, tokens = block_of(job)
    if job.phase == "prefill":
        compiled: Any = torch.compile(block, fullgraph=True)
        compiled(tokens)
        return torch_step(job, lambda: compiled(tokens))
    run = _eager_decoding(block, tokens, compiled=True)
    run()
    return torch_step(job, run)


def _eager_decoding(block: Any, tokens: Any, *, compiled: bool = False) -> Callable[[], Any]:
    """One token after ``tokens[:, :-1]``: a static cache of just that length, written in place."""
    import torch

    from rope_export.scores import visible_keys

    past, new = tokens.shape[1] - 1, tokens[:, -1:]
    _, cache = block(tokens[:, :-1], past=block.empty_cache(tokens.shape[0]))
    buffers = [torch.cat((t, torch.zeros_like(t[:, :, :1])), dim=2) for t in cache]
    place = torch.tensor([past], device=tokens.device)
    visible = None
    if block.window is not None:
        order = torch.arange(past + 1, device=tokens.device)
        visible = visible_keys(order[past:], order, causal=block.causal, window=block.window)

    def step() -> Any:
        q, *rotated = block.heads(new, offset=past)
        for buffer, fresh in zip(buffers, rotated, strict=True):
            buffer.index_copy_(2, place, fresh)
        return block.merge(block.attend(q, *buffers, visible=visible))

    if not compiled:
        return step
    # On CUDA with its own graph capture: the step is short, and launching it would be timed.
    mode = "reduce-overhead" if tokens.is_cuda else None
    run: Callable[[], Any] = torch.compile(step, fullgraph=True, mode=mode)
    return run


def session_step(job: Job, session: Session, inputs: Mapping[str, Array], output: str) -> Step:
    """A graph on inputs that are where it runs; its results stay there."""
    binding = session.raw.io_binding()
    kept = [runtime.on_device(array, job.provider) for array in inputs.values()]
    for name, value in zip(inputs, kept, strict=True):
        binding.bind_ortvalue_input(name, value)
    index = session.output_names.index(output)

    def step() -> Any:
        for name in session.output_names:
            binding.bind_output(name, job.provider)
        session.raw.run_with_iobinding(binding)
        return binding.get_outputs()[index]

    def answer(value: Any) -> Array:
        return answered(job, runtime.from_ort(value))

    return Step(step, answer, device_memory(job.provider), kept=(inputs, kept))


def device_memory(provider: str) -> Callable[[], int] | None:
    """Counts the bytes in use on the device, by all processes; None on the CPU."""
    if provider != "cuda":
        return None
    import torch

    def in_use() -> int:
        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    return in_use


def opened(job: Job, folder: Path) -> Session:
    """The graph in a folder, really on its provider."""
    session = runtime.Session.open(folder / "model.onnx", job.provider)
    session.require_placed()
    return session


def _plain(job: Job) -> Step:
    tokens = tokens_of(job)
    folder = Path(job.folder)
    if job.phase == "prefill":
        session = opened(job, folder / job.contender)
        return session_step(job, session, {session.input_names[0]: tokens}, "output")
    session = opened(job, folder / f"{job.contender}-cache")
    shapes = {value.name: value.shape for value in session.raw.get_inputs()}
    empty = {
        name: np.zeros((len(tokens), shapes[name][1], 0, shapes[name][3]), tokens.dtype)
        for name in ("past_key", "past_value")
    }
    filled = session.run({"hidden_states": tokens[:, :-1], **empty})
    past = {f"past_{kind}": filled[f"present_{kind}"] for kind in ("key", "value")}
    return session_step(job, session, {"hidden_states": tokens[:, -1:], **past}, "output")


def _ours(job: Job) -> Step:
    folder, tokens = Path(job.folder), tokens_of(job)
    if job.phase == "prefill" and (folder / job.contender).exists():
        session = opened(job, folder / job.contender)
        places = np.broadcast_to(np.arange(job.length), tokens.shape[:2])
        inputs = {
            "hidden_states": tokens,
            "position_ids": places,
            "attention_mask": np.ones_like(places),
        }
        asked = {name: inputs[name] for name in session.input_names}
        return session_step(job, session, asked, "output")
    decoder = runtime.Decoder.open(
        folder / f"{job.contender}-cache",
        provider=job.provider,
        batch=len(tokens),
        capacity=job.length,
        cuda_graph=_is_captured(job, folder / f"{job.contender}-cache"),
    )
    run = _prefilling(decoder, tokens) if job.phase == "prefill" else _decoding(decoder, tokens)
    return Step(run, lambda output: answered(job, np.asarray(output)), device_memory(job.provider))


def _is_captured(job: Job, folder: Path) -> bool:
    """Whether the decoding step can be a CUDA graph."""
    from rope_export.artifact import Artifact

    layout = Artifact.read(folder, verify=False).cache
    shared = layout is not None and layout.packs_rows and not layout.by_rows
    return job.provider == "cuda" and job.phase == "decode" and shared


def _positions(decoder: Decoder, batch: int, first: int, count: int) -> Array | None:
    axes = decoder.layout.position_axes
    if not axes:
        return None
    places = np.arange(first, first + count)
    return np.broadcast_to(places, (*([axes] if axes > 1 else []), batch, count))


def _prefilling(decoder: Decoder, tokens: Array) -> Callable[[], Array]:
    """A prompt into an empty cache."""
    places = _positions(decoder, len(tokens), 0, tokens.shape[1])

    def step() -> Array:
        decoder.reset()
        return decoder.prefill(tokens, position_ids=places)

    return step


def _decoding(decoder: Decoder, tokens: Array) -> Callable[[], Array]:
    """One token at the same place, as often as it is called."""
    past, new = tokens[:, :-1], tokens[:, -1:]
    before = _positions(decoder, len(tokens), 0, past.shape[1])
    place = _positions(decoder, len(tokens), past.shape[1], 1)
    decoder.prefill(past, position_ids=before)
    state = decoder.state()

    def step() -> Array:
        decoder.restore(state)
        return decoder.decode(new, position_ids=place)

    return step


STEPS: dict[str, Callable[[Job], Step]] = {
    "eager": _eager,
    "compile": _compiled,
    "plain": _plain,
    **dict.fromkeys((*OURS, GIVEN), _ours),
}
