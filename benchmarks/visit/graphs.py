"""Graphs on a provider: where their nodes go, and whether a captured decoding step is right."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rope_export import Attention
from rope_export.artifacts.comparison import errors_against
from rope_export.artifacts.files import MODEL
from rope_export.attention.random_block import random_block
from rope_export.attention.random_inputs import draw
from rope_export.exporting.block import BlockRequest
from rope_export.exporting.graph import save
from rope_export.exporting.subject import Subject
from rope_export.proof.arrays import to_numpy
from rope_export.runtime import CacheLayout, Decoder, Session
from rope_export.runtime.token_places import Array
from visit.findings import Facts, said

LARGE: dict[str, Any] = {"hidden_size": 2048, "num_heads": 32, "num_kv_heads": 8}
TINY: dict[str, Any] = {"hidden_size": 128, "num_heads": 8, "num_kv_heads": 4}
_CAPTURING = {"enable_cuda_graph": "1"}
_NEW, _SHORTER = 20, 7


def block_of(dtype: str, longest: int, tiny: bool) -> Attention:
    """A block that is worth timing."""
    return random_block(**(TINY if tiny else LARGE), dtype=dtype, max_seq_len=longest)


def tokens_for(block: Attention, batch: int, length: int) -> Tensor:
    """Random hidden states, where the block is."""
    return draw(np.random.default_rng(0), block, batch, length, 1.0).to(block.device)


def asked(
    block: Attention, providers: Sequence[str], *, target: str = "ort", **options: Any
) -> BlockRequest:
    """What is exported, with the options of `rope_export.export` for blocks."""
    plain = {"max_seq_len": None, "position_ids": False, "static": False, "batch": 1, "seed": 0}
    return BlockRequest.checked(block, target=target, providers=providers, **plain | options)


def graph(
    block: Attention, folder: str | Path, providers: Sequence[str], **options: Any
) -> tuple[Path, CacheLayout | None]:
    """The graph of a block alone: test vectors of long sequences take longer than a visit.

    Args:
        block: the block.
        folder: where the graph goes.
        providers: it is made for.
        options: as of `asked`.
    """
    subject = Subject(asked(block, providers, **options))
    save(subject.graph(), Path(folder))
    return Path(folder) / MODEL, subject.interface.layout


def opened(model: Path, provider: str, *, captured: bool = False) -> Session:
    """A session, from which CUDA graphs can be captured if asked for."""
    return Session.open(model, provider, provider_options=_CAPTURING if captured else None)


def placement(session: Session) -> dict[str, dict[str, int]]:
    """Operators by the execution provider that really has them."""
    found: dict[str, Counter[str]] = {}
    for part in session.raw.get_provider_graph_assignment_info():
        name = part.ep_name.removesuffix("ExecutionProvider")
        found.setdefault(name, Counter()).update(node.op_type for node in part.get_nodes())
    return {name: dict(operators) for name, operators in found.items()}


def capturable(model: Path) -> bool | str:
    """Whether onnxruntime would capture the graph, or what it says against it."""
    try:
        opened(model, "cuda", captured=True)
    except RuntimeError as error:
        return said(error)
    return True


def default(provider: str, tiny: bool) -> Iterator[Facts]:
    """Where the nodes of the default block go, with a cache and without, in every dtype."""
    for dtype in ("float32", "float16", *(["bfloat16"] if provider == "cuda" else [])):
        block = random_block(
            hidden_size=1024, num_heads=16, dtype=dtype, max_seq_len=64 if tiny else 4096
        )
        for cache in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                session = opened(graph(block, folder, [provider], cache=cache)[0], provider)
            yield {
                "dtype": dtype,
                "cache": cache,
                "misplaced": session.misplaced,
                "placement": placement(session),
            }


def ways_of(provider: str) -> dict[str, bool]:
    """Ways of decoding, and whether the step is captured."""
    return {"plain": False, "captured": True} if provider == "cuda" else {"plain": False}


def capture(provider: str, dtype: str, tiny: bool) -> Iterator[Facts]:
    """Decode rows of different lengths, captured and not, and compare with eager PyTorch."""
    torch.set_grad_enabled(False)
    length = 40 if tiny else 700
    block = block_of(dtype, 2 * length, tiny)
    tokens = to_numpy(tokens_for(block, 2, length + _NEW))
    mask = np.ones((2, length), np.int64)
    mask[1, length - _SHORTER :] = 0
    with tempfile.TemporaryDirectory() as folder:
        model, layout = graph(block, folder, [provider], cache=True)
        assert layout is not None
        wanted = _eagerly(block.to(provider), length)
        for name, captured in ways_of(provider).items():
            try:
                session = opened(model, provider, captured=captured)
                decoder = Decoder(session, layout, batch=2, cuda_graph=captured)
                prompt = decoder.prefill(tokens[:, :length], attention_mask=mask)
                steps = [
                    decoder.decode(tokens[:, place : place + 1])
                    for place in range(length, length + _NEW)
                ]
                got = [
                    np.concatenate((prompt[row, : mask[row].sum()], *(s[row] for s in steps)))
                    for row in range(2)
                ]
                yield {"way": name, **_off(wanted, got)}
            except Exception as error:
                yield {"way": name, "error": said(error)}


def _eagerly(block: Attention, length: int) -> list[Array]:
    """What eager PyTorch makes of either row, the second without its padding."""
    first, second = tokens_for(block, 2, length + _NEW).split(1)
    second = torch.cat((second[:, : length - _SHORTER], second[:, length:]), dim=1)
    return [block(row)[0].double().cpu().numpy() for row in (first, second)]


def _off(wanted: list[Array], got: list[Array]) -> Facts:
    """Errors of both rows: of the prompt, the step that is captured, its first and last replay."""
    parts = {
        "prompt": slice(None, -_NEW),
        "first": slice(-_NEW, 1 - _NEW),
        "second": slice(1 - _NEW, 2 - _NEW),
        "last": slice(-1, None),
    }
    return {
        name: [errors_against(w[part], g[part]).rel for w, g in zip(wanted, got, strict=True)]
        for name, part in parts.items()
    }
