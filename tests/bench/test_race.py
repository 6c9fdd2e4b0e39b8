"""`target="auto"`: what is legal races, what is proven may win, and the report shows it."""

from __future__ import annotations

import json

import mutants
import pytest
from modules import X, module_of

from rope_export import BadInputError, ExportError, export, replay, runtime
from rope_export.bench import race
from rope_export.bench.results import Measurement, Results
from rope_export.exporting import export as exporter
from rope_export.exporting.block import BlockRequest
from rope_export.lowering import rules
from rope_export.lowering.choice import choose, legal_forms


def plan_of(block, **options):
    given = {"position_ids": False, "static": False, "batch": 1, "seed": 0, "max_seq_len": None}
    return BlockRequest.checked(block, **given | {"target": "ort", "providers": ["cpu"]} | options)


def timed_as(seconds, **failed):
    """A `bench.measure` in which every form takes what it is told to."""

    def measure(_block, lengths, *, phases, contenders, **_):
        assert set(contenders) <= set(seconds) | set(failed)
        made = tuple(
            Measurement(phase, lengths[0], name, failed=failed[name])
            if name in failed
            else Measurement(phase, lengths[0], name, (seconds[name][phase],) * 3)
            for phase in phases
            for name in contenders
        )
        return Results("", {}, "cpu", "float32", 1, {}, made, {})

    return measure


def both(prefill, decode=1.0):
    return {"prefill": prefill, "decode": decode}


@pytest.mark.parametrize("cache", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_fastest_of_what_is_proven_is_kept(tmp_path, monkeypatch, cache):
    block = mutants.block()
    forms = [runner.form for runner in race.candidates(plan_of(block, cache=cache))]
    assert {"gqa_rotating", "gqa", "attention", "primitive"} <= set(forms)
    seconds = {form: both(5.0) for form in forms}
    seconds["gqa"], seconds["attention"] = both(3.0, 3.0), both(4.0, 0.5)
    seconds["gqa_rotating"] = both(0.1, 0.1)
    monkeypatch.setattr(race, "measure", timed_as(seconds, primitive="killed"))
    # That a form which is not proven is found is for the proof's own tests.
    monkeypatch.setattr(exporter, "_is_proven", lambda p, _: p.form != "gqa_rotating")
    result = export(block, tmp_path / "x", target="auto", cache=cache)
    # With a cache, the prompt and the token count alike: 4 x 0.5 is less than 3 x 3.
    won = "attention" if cache else "gqa"
    assert result.report.passed
    runners = {runner["form"]: runner for runner in result.graph["race"]}
    assert list(runners) == forms
    assert [form for form, runner in runners.items() if runner["won"]] == [won]
    assert runners["gqa_rotating"]["out"] == "its graph was not proven"
    assert runners["primitive"]["out"] == "killed"
    assert runners["gqa"]["milliseconds"]["prefill"] == 3000
    plan = json.loads((result.path / "config.json").read_text())["export"]
    assert (plan["target"], plan["form"]) == ("ort", won)
    operator = "Attention" if cache else "com.microsoft::GroupQueryAttention"
    assert operator in result.ops
    text = result.report.to_markdown()
    assert "## Race" in text
    assert f"**ort, {won}**" in text
    assert replay(result.path).passed


@pytest.mark.slow
def test_a_race_on_this_machine(cli_here, tmp_path, monkeypatch):
    monkeypatch.setattr(race, "ROUNDS", 1)
    narrow = ("--hidden", "40", "--heads", "4", "--head-dim", "10", "--seq", "12")  # few are legal
    result = cli_here("block", *narrow, "--target", "auto", "--out", "x")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("race ")]
    assert len(lines) == 4
    assert sum(line.endswith("<- kept") for line in lines) == 1
    report = json.loads((tmp_path / "x" / "report.json").read_text())
    times = {r["form"]: r["milliseconds"]["prefill"] for r in report["graph"]["race"]}
    assert set(times) == {"attention", "attention_in_float32", "decomposed", "primitive"}
    (won,) = [r["form"] for r in report["graph"]["race"] if r["won"]]
    assert times[won] == min(times.values())


def test_what_does_not_fit_in_memory_does_not_start(monkeypatch):
    block = mutants.block()
    forms = [runner.form for runner in race.candidates(plan_of(block))]
    monkeypatch.setattr(race, "measure", timed_as({form: both(1.0) for form in forms}))
    monkeypatch.setattr(race.runtime, "available_memory", lambda: 100_000)
    monkeypatch.setattr(exporter, "_is_proven", lambda *_: True)
    plan, runners = race.race(plan_of(block), lambda *_: True, lambda _: None)
    assert plan.form == "gqa_rotating"
    out = {runner.form: runner.out for runner in runners}
    assert out["gqa"] is None
    assert "its scores take about 0 GiB at 48 tokens" in out["attention"]


def test_without_a_lowering_that_is_proven_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "_is_proven", lambda *_: False)
    with pytest.raises(ExportError, match=r"no lowering .*gqa: its graph was not proven"):
        export(mutants.block(), tmp_path / "x", target="auto")
    assert list(tmp_path.iterdir()) == []


def test_forms_that_are_slower_are_legal_and_right(tmp_path):
    """A window long enough for blocks: the whole triangle is taken when it is asked for."""
    block = mutants.block(window=8, max_seq_len=700)
    situations = plan_of(block).situations(["cpu"])
    assert choose("ort", situations).form is rules.GQA
    assert choose("ort", situations).window_block == 128
    forced = choose("ort", situations, "gqa_rotating")
    assert (forced.form, forced.window_block) == (rules.GQA_ROTATING, 0)
    assert "gqa_rotating" in legal_forms("ort", situations)
    assert "mha" not in legal_forms("ort", situations)
    plan = plan_of(block, form="gqa_rotating")
    assert exporter._is_proven(plan, tmp_path / "x")


def test_what_auto_is_not_for(tmp_path, cli_here):
    with pytest.raises(BadInputError, match="target auto is of an Attention exported alone"):
        export(module_of(lambda self, x: self.linear(x)), tmp_path / "x", args=(X,), target="auto")
    axes = ("--scaling", '{"rope_type": "mrope", "mrope_section": [2, 3, 3]}', "--position-ids")
    shape = ("--hidden", "64", "--heads", "4")
    for wrong in (("--seq", "1"), axes):
        result = cli_here("block", *shape, *wrong, "--target", "auto")
        assert result.returncode == 2, result.stderr
        assert "auto times sequences of 2 tokens and more with one axis" in result.stderr
    result = cli_here("bench", *shape, "--seq", "8", "--scaling", '{"rope_type": "axial"}')
    assert result.returncode == 2
    assert "--scaling must give a token one position to be timed" in result.stderr
    result = cli_here("block", "--target", "auto", "--no-validate")
    assert result.returncode == 2
    assert "leave out --no-validate" in result.stderr
    assert cli_here("module", "x.py:y", "--target", "auto").returncode == 2
    if runtime.unavailable_reason("cuda") is not None:
        result = cli_here("block", "--target", "auto", "--provider", "cuda")
        assert result.returncode == 3
    assert list(tmp_path.iterdir()) == []
