"""What prefill and decode take on the device, beside eager and compiled PyTorch."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rope_export import Attention, runtime
from rope_export.artifacts.comparison import errors_against
from rope_export.bench.steps import answered, eager_decoding, session_step, torch_step
from rope_export.bench.turns import Job, Step
from rope_export.proof.arrays import to_numpy
from rope_export.runtime import CacheLayout, Decoder, Session
from visit.findings import Facts, said
from visit.graphs import block_of, graph, opened, placement, tokens_for, ways_of

_WARM_UP, _FEWEST, _MOST = 3, 5, 300
_KERNELS, _NAME = 14, 110
_NO_FOLDER = ""
# Of PyTorch's attention; "chosen": by PyTorch.
_ATTENTION: dict[str, dict[str, SDPBackend | None]] = {
    "cpu": {"chosen": None},
    "cuda": {
        "chosen": None,
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    },
}
Contenders = dict[str, Callable[[], Step]]


def prefill(
    provider: str, dtype: str, lengths: list[int], seconds: float, tiny: bool
) -> Iterator[Facts]:
    """A prompt, and its answers, that stay on the device."""
    torch.set_grad_enabled(False)
    block = block_of(dtype, max(lengths), tiny)
    with tempfile.TemporaryDirectory() as folder:
        session = opened(graph(block, folder, [provider])[0], provider)
    yield {"placement": placement(session), "misplaced": session.misplaced}
    block.to(provider)
    for length in lengths:
        job = Job("", "prefill", length, provider, _NO_FOLDER)
        yield from _timed(job, _of_prompts(job, block, session), seconds)


def _of_prompts(job: Job, block: Attention, session: Session) -> Contenders:
    tokens = tokens_for(block, 1, job.length)
    inputs = {"hidden_states": to_numpy(tokens.cpu())}

    def eager(backend: SDPBackend | None) -> Step:
        return torch_step(job, _attending(backend, lambda: block(tokens)))

    def compiled(backend: SDPBackend | None) -> Step:
        torch._dynamo.reset()
        forward: Any = torch.compile(block, fullgraph=True, dynamic=False)
        return torch_step(job, _attending(backend, lambda: forward(tokens)))

    backends = _ATTENTION[job.provider]
    return {
        **{f"eager, {name}": partial(eager, backend) for name, backend in backends.items()},
        "ort": lambda: session_step(job, session, inputs, "output"),
        "compile": lambda: compiled(backends.get("flash")),
    }


def _attending(backend: SDPBackend | None, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A run whose attention is done by one of PyTorch's kernels, or by the one it chooses."""

    def step() -> Tensor:
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            return run()

    return step


def decode(
    provider: str, dtype: str, lengths: list[int], seconds: float, tiny: bool
) -> Iterator[Facts]:
    """One token after a past, with and without a CUDA graph."""
    torch.set_grad_enabled(False)
    block = block_of(dtype, max(lengths), tiny)
    with tempfile.TemporaryDirectory() as folder:
        model, layout = graph(block, folder, [provider], cache=True)
        assert layout is not None
        block.to(provider)
        for length in lengths:
            job = Job("", "decode", length, provider, _NO_FOLDER)
            yield from _timed(job, _of_tokens(job, block, model, layout), seconds)


def _of_tokens(job: Job, block: Attention, model: Path, layout: CacheLayout) -> Contenders:
    tokens = tokens_for(block, 1, job.length)

    def compiled() -> Step:
        torch._dynamo.reset()
        return torch_step(job, eager_decoding(block, tokens, compiled=True))

    contenders: Contenders = {
        "eager": lambda: torch_step(job, eager_decoding(block, tokens)),
        "compile": compiled,
    }
    for name, captured in ways_of(job.provider).items():
        ours = _Decoding(job, model, layout, tokens, captured)
        contenders[f"decoder, {name}"] = ours.by_decoder
        contenders[f"run, {name}"] = ours.by_run
    return contenders


class _Decoding:
    """The same token again and again, after a past that is in the cache."""

    def __init__(
        self, job: Job, model: Path, layout: CacheLayout, tokens: Tensor, captured: bool
    ) -> None:
        self._job, self._model, self._layout, self._captured = job, model, layout, captured
        self._tokens = to_numpy(tokens.cpu())

    @cached_property
    def _decoder(self) -> Decoder:
        session = opened(self._model, self._job.provider, captured=self._captured)
        decoder = Decoder(
            session, self._layout, capacity=self._job.length, cuda_graph=self._captured
        )
        decoder.prefill(self._tokens[:, :-1])
        return decoder

    def by_decoder(self) -> Step:
        """Through `Decoder`, which takes and gives arrays."""
        decoder, state = self._decoder, self._decoder.state()

        def step() -> Any:
            decoder.restore(state)
            return decoder.decode(self._tokens[:, -1:])

        return Step(step, lambda output: answered(self._job, np.asarray(output)))

    def by_run(self) -> Step:
        """The run alone, all bound: what an engine pays whose tokens are where the graph runs."""
        decoder = self._decoder
        held: Any = decoder._captured or decoder._step
        options = held._options if self._captured else None

        def answer(_: object) -> Any:
            return answered(
                self._job, runtime.from_ort(held._output) if self._captured else held._answer
            )

        return Step(lambda: decoder.session.raw.run_with_iobinding(held._binding, options), answer)


def _timed(job: Job, contenders: Contenders, seconds: float) -> Iterator[Facts]:
    """Time one after the other; the first one's answer is what the others' are compared with."""
    wanted = None
    for name, ready in contenders.items():
        found: Facts = {"contender": name, "length": job.length}
        try:
            step = ready()
            answer = step.answer(step.run())
            wanted = answer if wanted is None else wanted
            found["off"] = errors_against(wanted, answer).rel
            found |= _milliseconds(step.run, seconds)
            if job.provider == "cuda":
                found["kernels"] = _kernels(step.run)
        except Exception as error:
            found["error"] = said(error)
        yield found


def _milliseconds(run: Callable[[], object], seconds: float) -> Facts:
    """Of a step that returns when its result is there, without the first ones."""
    for _ in range(_WARM_UP):
        run()
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while len(taken) < _FEWEST or (time.perf_counter() < until and len(taken) < _MOST):
        start = time.perf_counter()
        run()
        taken.append((time.perf_counter() - start) * 1e3)
    return {"ms": statistics.median(taken), "least_ms": min(taken), "rounds": len(taken)}


def _kernels(run: Callable[[], object]) -> list[tuple[str, int, float]]:
    """Kernels on the device of a step, onnxruntime's too: name, calls, microseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
    return [(e.key[:_NAME], e.count, round(e.device_time_total, 1)) for e in events[:_KERNELS]]
