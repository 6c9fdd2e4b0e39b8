"""The validator proves caches of the window, and finds what is wrong with one in every target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mutants
import pytest
import torch

from rope_export import Attention, BadInputError, export, replay, validate
from rope_export.artifacts.targets import TARGETS
from rope_export.attention.window_cache import WindowCall
from rope_export.exporting.block import BlockRequest
from rope_export.exporting.stages import Evidence
from rope_export.exporting.subject import Subject
from rope_export.inspection.report import inspect_model
from rope_export.lowering import new_tokens, ops
from rope_export.proof import validator
from rope_export.runtime.trial import Progress

WINDOW, LONGEST = 3, 40


@pytest.fixture(scope="module", autouse=True)
def truth_worked_out_once() -> Iterator[None]:
    known: dict[BlockRequest, Evidence] = {}
    make = validator.evidence

    def remembered(subject: Subject, progress: Progress) -> Evidence:
        request = subject.request
        assert isinstance(request, BlockRequest)
        if request not in known:
            known[request] = make(subject, progress)
        return known[request]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validator, "evidence", remembered)
        yield


@pytest.fixture(scope="module")
def block() -> Attention:
    """Built to keep the window, so that every export is of this very object."""
    made = mutants.block(window=WINDOW, max_seq_len=LONGEST)
    made.window_cache = True
    return made


@pytest.mark.parametrize("target", TARGETS)
def test_a_right_graph_passes_and_replays(block, target, tmp_path):
    result = export(block, tmp_path / "x", target=target, cache="window", validate=True)
    assert result.report.passed, result.report.to_markdown()
    assert replay(result.path).passed
    cases = result.report.cases
    assert max(case.past for case in cases) > 10 * WINDOW
    names = {case.name for case in cases}
    assert {"decode, windows on", "chunk longer than the window", "padded chunk"} <= names
    assert {"chunks and tokens", "chunks and tokens, rows of different lengths"} <= names
    for case in cases:  # what a cache holds of each row, and no more
        if case.tensor != "output":
            assert case.tokens <= case.batch * (case.past + case.sequence)
    stored = result.path / "test_data_set_0"
    assert stored.is_dir()


# Each is patched in where a target is lowered to: onnx and primitive by arithmetic, ort by the
# operator.


def by_arithmetic(change: Callable[..., WindowCall]) -> dict[str, Any]:
    def window_call(tokens: Any, window: int) -> WindowCall:
        mask = tokens.attention_mask
        given = {"window": window, "capacity": tokens.past[0].shape[2]}
        return change(mask, new_tokens.last(tokens, mask), **given)

    return {"window_call": window_call}


def off_by(difference: int) -> Callable[..., WindowCall]:
    def change(mask: torch.Tensor, new: torch.Tensor, *, window: int, capacity: int) -> WindowCall:
        return WindowCall.of(mask, new, window=window + difference, capacity=capacity)

    return change


def shifted(mask: torch.Tensor, new: torch.Tensor, **given: int) -> WindowCall:
    call = WindowCall.of(mask, new, **given)
    return replace(call, source=(call.source - 1).clamp(min=0))


def longer(mask: torch.Tensor, new: torch.Tensor, **given: int) -> WindowCall:
    return WindowCall.of(torch.cat((torch.ones_like(mask[:, :1]), mask), 1), new, **given)


def shorter(mask: torch.Tensor, new: torch.Tensor, **given: int) -> WindowCall:
    return WindowCall.of(mask * (torch.arange(mask.shape[1]) > 0), new, **given)


def by_operator(**changes: Callable[[Any], Any]) -> dict[str, Any]:
    emit = ops.group_query_attention

    def group_query_attention(*given: Any, **named: Any) -> Any:
        back = changes.get("present")
        altered = {name: change(named[name]) for name, change in changes.items() if name in named}
        context, *present = emit(*given, **{**named, **altered})
        return context, *(present if back is None else map(back, present))

    return {"group_query_attention": group_query_attention}


def one_slot_on(present: torch.Tensor) -> torch.Tensor:
    slot = (torch.arange(present.shape[2]) - 1).clamp(min=0)
    return present.index_select(2, slot)


DEFECTS = {
    "evicted one too early": (
        lambda: by_arithmetic(off_by(-1)),
        lambda: by_operator(window=lambda w: w - 1),
    ),
    "evicted one too late": (
        lambda: by_arithmetic(off_by(1)),
        lambda: by_operator(window=lambda w: w + 1),
    ),
    "layout shifted by a slot": (
        lambda: by_arithmetic(shifted),
        lambda: by_operator(present=one_slot_on),
    ),
    "lengths one more": (
        lambda: by_arithmetic(longer),
        lambda: by_operator(last_index=lambda last: last + 1),
    ),
    "lengths one less": (
        lambda: by_arithmetic(shorter),
        lambda: by_operator(last_index=lambda last: last - 1),
    ),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", DEFECTS)
def test_a_cache_that_goes_wrong_fails(block, target, name, tmp_path, monkeypatch):
    in_arithmetic, in_operator = DEFECTS[name]
    defect = in_operator if target == "ort" else in_arithmetic
    with monkeypatch.context() as patch:
        for function, altered in defect().items():
            patch.setattr(ops if target == "ort" else new_tokens, function, altered)
        result = export(block, tmp_path / "x", target=target, cache="window")
    report = validate(result, block)
    assert not report.passed
    assert report.providers["cpu"].status == "ok"
    failed = {(case.name, case.tensor) for case in report.cases if not case.passed}
    if name != "layout shifted by a slot":
        assert {tensor for _, tensor in failed} >= {"output"}


# What is refused


def test_what_keeps_no_window(tmp_path: Path):
    folder = tmp_path / "x"
    with pytest.raises(BadInputError, match="cache='window' needs a block with a window"):
        export(mutants.block(), folder, cache="window")
    with pytest.raises(BadInputError, match="cache must be True, False or 'window', got 'ring'"):
        export(mutants.block(window=4), folder, cache="ring")
    with pytest.raises(BadInputError, match="cache needs dynamic lengths"):
        export(mutants.block(window=4), folder, cache="window", static=True)
    with pytest.raises(BadInputError, match="cache needs causal attention"):
        export(mutants.block(window=4, causal=False), folder, cache="window")
    assert not folder.exists()


def test_the_command_line(cli_here, tmp_path):
    shape = ("--hidden", "32", "--heads", "2", "--seq", "16", "--no-validate")
    none = cli_here("block", *shape, "--cache", "window", "--out", "x")
    assert none.returncode == 2
    assert "error: --cache window needs a window: give --window N" in none.stderr.splitlines()[-1]
    assert not (tmp_path / "x").exists()
    other = cli_here("block", *shape, "--cache", "ring", "--out", "x")
    assert other.returncode == 2
    assert "'ring' is not one of 'full', 'window'" in other.stderr
    made = cli_here("block", *shape, "--window", "4", "--cache", "window", "--out", "x")
    assert made.returncode == 0, made.stderr
    report = inspect_model(tmp_path / "x" / "model.onnx")
    assert {(use.window, use.window_cache) for use in report.attention} == {(4, True)}
    assert report.cache is not None
    assert list(report.cache.axes or ()) == ["batch", 2, "capacity", 16]
