"""A Decoder driven call by call, held to its block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rope_export import Attention
from rope_export.runtime import Decoder

Schedule = Sequence[tuple[int, ...]]  # of calls: how many tokens each row is given
# Of a token, relative to a typical one: a few roundings.
LIMIT = {"float32": 3e-6, "float16": 5e-3}


def drawn(block: Attention, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, block.hidden_size, generator=generator)
    return (2 * x).to(block.dtype)


def close(got: np.ndarray, wanted: torch.Tensor) -> None:
    limit = LIMIT[got.dtype.name]
    truth = wanted.double().numpy()
    if truth.size:
        error = np.linalg.norm(got - truth, axis=-1).max()
        assert error <= limit * np.sqrt(np.square(truth).sum(-1).mean())


@torch.no_grad()
def drive(
    decoder: Decoder,
    block: Attention,
    schedule: Schedule,
    padding: str = "right",
    ids: torch.Tensor | None = None,
) -> None:
    """Serve tokens call by call: as the block does on its own cache, and in one full pass."""
    rows = len(schedule[0])
    totals = [sum(of_row) for of_row in zip(*schedule, strict=True)]
    given = drawn(block, rows, max(totals), seed=sum(totals))
    used = [0] * rows
    past = block.empty_cache(rows)
    mask = torch.zeros(rows, 0, dtype=torch.int64)
    answers: list[list[np.ndarray]] = [[] for _ in range(rows)]
    for call, step in enumerate(schedule):
        length = max(step)
        hidden = drawn(block, rows, length, seed=1000 + call)  # stays at padding
        real = torch.zeros(rows, length, dtype=torch.int64)
        step_ids = None if ids is None else torch.zeros(*ids.shape[:-1], length, dtype=torch.int64)
        columns = []
        for row, count in enumerate(step):
            start = 0 if padding == "right" else length - count
            columns.append(slice(start, start + count))
            part = slice(used[row], used[row] + count)
            hidden[row, columns[row]] = given[row, part]
            real[row, columns[row]] = 1
            if ids is not None and step_ids is not None:
                step_ids[..., row, columns[row]] = ids[..., row, part]
            used[row] += count
        positions = None if step_ids is None else step_ids.numpy()
        if set(step) == {1}:
            output = decoder.decode(hidden.numpy(), position_ids=positions)
        elif len(set(step)) == 1:
            output = decoder.prefill(hidden.numpy(), position_ids=positions)
        else:
            output = decoder.prefill(
                hidden.numpy(), attention_mask=real.numpy(), position_ids=positions
            )
        assert decoder.lengths == tuple(used)
        assert output.shape == hidden.shape
        assert output.dtype == decoder.dtype
        mask = torch.cat((mask, real), dim=1)
        eager, past = block(hidden, past=past, attention_mask=mask, position_ids=step_ids)
        for row, part in enumerate(columns):
            close(output[row, part], eager[row, part])
            answers[row].append(output[row, part])
    for row, total in enumerate(totals):
        of_row = None if ids is None else ids[..., row : row + 1, :total]
        whole = block(given[row : row + 1, :total], position_ids=of_row)
        close(np.concatenate(answers[row]), whole[0])
