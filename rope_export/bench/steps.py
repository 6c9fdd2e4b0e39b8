"""What each contender does in a process of its own: eager, compiled, exported plainly, and ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rope_export import runtime
from rope_export.bench.turns import Job, Step

if TYPE_CHECKING:
    from rope_export.runtime import Decoder, Session

Array = npt.NDArray[Any]

BY_WINDOW = "ort-window-cache"  # target ort with a cache of the window only
OURS = ("ort", "onnx", "primitive", BY_WINDOW)
INTEGERS = {"ort-int8-cache": "int8", "ort-int4-cache": "int4"}
"""Target ort with a cache of integers: what is exported for them, and what its dtype is."""
GIVEN = "artifact"
BLOCK, TOKENS, FACTS = "block.pt", "tokens.npy", "facts.json"
# Tokens that are compared with float64 truth: the last ones, which have seen the most.
ROWS = 16
_CHUNK = 256


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

    from rope_export.proof.arrays import from_numpy

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
    return torch_step(job, eager_decoding(block, tokens))


def _compiled(job: Job) -> Step:
    import torch

    block, tokens = block_of(job)
    if job.phase == "prefill":
        compiled: Any = torch.compile(block, fullgraph=True)
        compiled(tokens)
        return torch_step(job, lambda: compiled(tokens))
    run = eager_decoding(block, tokens, compiled=True)
    run()
    return torch_step(job, run)


def eager_decoding(block: Any, tokens: Any, *, compiled: bool = False) -> Callable[[], Any]:
    """One token after ``tokens[:, :-1]``: a static cache of just that length, written in place."""
    import torch

    from rope_export.attention.visibility import visible_keys

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
    past = empty
    for chunk in _chunks(tokens[:, :-1]):
        filled = session.run({"hidden_states": tokens[:, chunk], **past})
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
    before = None
    if job.phase == "prefill":
        run = _prefilling(decoder, tokens)
    else:
        run, before = _decoding(decoder, tokens)
    return Step(
        run,
        lambda output: answered(job, np.asarray(output)),
        device_memory(job.provider),
        before=before,
    )


def _chunks(tokens: Array) -> list[slice]:
    """Parts of a prompt that fill a cache, so short that no process keeps memory for all scores."""
    length = tokens.shape[1]
    return [slice(start, min(start + _CHUNK, length)) for start in range(0, length, _CHUNK)]


def _is_captured(job: Job, folder: Path) -> bool:
    """Whether the decoding step can be a CUDA graph."""
    from rope_export.artifacts.artifact import Artifact

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


def _decoding(
    decoder: Decoder, tokens: Array
) -> tuple[Callable[[], Array], Callable[[], None] | None]:
    """One token, and what takes it back where that takes time of its own."""
    past, new = tokens[:, :-1], tokens[:, -1:]
    place = _positions(decoder, len(tokens), past.shape[1], 1)
    one_call = decoder.layout.packs_rows and not decoder.layout.by_rows
    for chunk in [slice(0, past.shape[1])] if one_call else _chunks(past):
        part = past[:, chunk]
        places = _positions(decoder, len(tokens), chunk.start, part.shape[1])
        decoder.prefill(part, position_ids=places)
    state = decoder.state(windows=True)
    if decoder.layout.windows:  # tokens that it pushes out are put back
        return lambda: decoder.decode(new, position_ids=place), lambda: decoder.restore(state)

    def step() -> Array:
        decoder.restore(state)
        return decoder.decode(new, position_ids=place)

    return step, None


STEPS: dict[str, Callable[[Job], Step]] = {
    "eager": _eager,
    "compile": _compiled,
    "plain": _plain,
    **dict.fromkeys((*OURS, *INTEGERS, GIVEN), _ours),
}
