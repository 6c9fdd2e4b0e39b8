"""`bench`: contenders are compared before they are timed, and what they cost is counted right."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mutants
import numpy as np
import onnx
import pytest
import render
import torch

from rope_export import BadInputError, bench, export, runtime
from rope_export.attention.random_block import random_block
from rope_export.attention.visibility import visible_keys
from rope_export.bench import block as bench_block
from rope_export.bench import peers, plot, steps, work
from rope_export.bench.results import Measurement, Results, shown
from rope_export.bench.turns import Job

LENGTHS = (33,)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same block with and without a cache."""
    root = tmp_path_factory.mktemp("artifacts")
    for name, cache in (("right", False), ("right-cache", True)):
        export(mutants.block(), root / name, cache=cache)
    return {name: root / name for name in ("right", "right-cache")}


@pytest.fixture(scope="module")
def results(artifacts: dict[str, Path]) -> Results:
    """Eager PyTorch, a right graph, one with a negated sine, and one that does not load."""
    wrong, broken = (artifacts["right"].parent / name for name in ("wrong", "broken"))
    for folder in (wrong, broken):
        shutil.copytree(artifacts["right"], folder)
    model = onnx.load(wrong / "model.onnx")
    mutants.sine_negated(model)
    onnx.save(model, wrong / "model.onnx")
    (broken / "model.onnx").write_bytes(b"no graph")
    return bench.measure(
        mutants.block(),
        LENGTHS,
        contenders=("eager", "right", "wrong", "broken"),
        batch=2,
        rounds=3,
        given={**artifacts, "wrong": wrong, "broken": broken},
        command="rope-export bench",
    )


def of(results: Results, phase: str, length: int) -> dict[str, Measurement]:
    return {m.contender: m for m in results.of(phase, length)}


@pytest.mark.slow
def test_right_graphs_are_timed_and_wrong_ones_found(results):
    assert results.cases() == [(p, n) for n in LENGTHS for p in ("prefill", "decode")]
    for phase, length in results.cases():
        found = of(results, phase, length)
        for name in ("eager", "right"):
            assert len(found[name].seconds) == 3
            assert min(found[name].seconds) > 0
            assert found[name].rel_error < 2e-6
            assert not found[name].wrong
        assert found["eager"].allowed_error is None
        assert found["eager"].ratio_to(found["eager"]) == 1
    for length in LENGTHS:
        found = of(results, "prefill", length)
        assert found["wrong"].wrong
        assert found["wrong"].rel_error > 0.01
        assert "Protobuf parsing failed" in found["broken"].failed
        assert of(results, "decode", length)["wrong"].failed == "exported without a cache"
    assert not results.passed


@pytest.mark.slow
def test_results_are_kept_and_shown(results):
    document = json.loads(json.dumps(results.to_json(), allow_nan=False))
    assert document["passed"] is False
    assert Results.from_json(document) == results
    assert document["environment"]["cpu"]
    assert results.limits["matmul_flops"] > 1e8
    assert results.limits["copy_bytes"] > 1e8
    text = "\n".join(results.table())
    assert "prefill, 33 tokens" in text
    assert "WRONG (allowed " in text
    assert "1.00x" in text
    gone = replace(
        results, measurements=tuple(replace(m, failed="not here") for m in results.measurements)
    )
    assert gone.table()[-4:] == [
        f"{name:<24} not here" for name in ("eager", "right", "wrong", "broken")
    ]
    rows = render.of_block(document, "decode", "33")
    assert len([row for row in rows if row.startswith("| right | ")]) == 1
    assert "| wrong | exported without a cache | | | | | |" in rows


def test_a_ratio_is_that_of_steps_in_one_round():
    slow_then_fast = Measurement("prefill", 8, "a", (4.0, 1.0, 2.0))
    other = Measurement("prefill", 8, "b", (2.0, 0.5, 4.0))
    assert slow_then_fast.ratio_to(other) == 2.0
    assert (shown(2.5e9, "B/s"), shown(12, "FLOP/s")) == ("2.5 GB/s", "12 FLOP/s")


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("causal", [True, False])
def test_work_is_counted_as_the_masks_have_it(causal, window):
    length = 12
    block = mutants.block(causal=causal, window=window)
    order = torch.arange(length)
    visible = visible_keys(order, order, causal=causal, window=window)
    seen = length * length if visible is None else int(visible.expand(length, length).sum())
    assert work.pairs(block, "prefill", length) == seen
    weights = 64 * (64 + 2 * 32 + 64)
    assert work.flops(block, "prefill", length, 3) == 3 * 2 * (
        length * weights + seen * 4 * (16 + 16)
    )
    if causal:
        last = int(visible[-1].sum())
        assert work.pairs(block, "decode", length) == last
        moved = weights + 2 * 3 * 64 + 3 * last * 2 * (16 + 16)
        assert work.least_bytes(block, "decode", length, 3) == 4 * moved


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lengths": (1,)}, "lengths must be from 2 to the 48 tokens the block serves, got 1"),
        ({"lengths": (49,)}, "got 49"),
        ({"phases": ("train",)}, "phases must be some of prefill, decode, got 'train'"),
        ({"phases": ()}, "got none"),
        ({"contenders": ("eagre",)}, "contenders must be some of eager, .*got 'eagre'"),
    ],
)
def test_arguments_out_of_range(change, says):
    given = {"lengths": (8,)} | change
    with pytest.raises(BadInputError, match=says):
        bench.measure(mutants.block(), **given)


def test_a_state_is_gone_back_to(artifacts):
    decoder = runtime.Decoder.open(artifacts["right-cache"])
    x = np.random.default_rng(0).standard_normal((1, 7, mutants.HIDDEN)).astype(np.float32)
    decoder.prefill(x[:, :5])
    state = decoder.state()
    first = decoder.decode(x[:, 5:6])
    decoder.decode(x[:, 6:7])
    decoder.restore(state)
    assert decoder.lengths == (5,)
    np.testing.assert_array_equal(decoder.decode(x[:, 5:6]), first)


# --- peers ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cache_of_the_window_is_timed_at_one_place(tmp_path):
    """A token that was pushed out is put back before the next step, which gives the same."""
    block = mutants.block(window=5)
    export(block, tmp_path / "ort-window-cache-cache", cache="window")
    length = mutants.LONGEST
    bench_block._store(block, tmp_path, 2, length, 0)
    answers = {}
    for phase in ("prefill", "decode"):
        step = steps.STEPS["ort-window-cache"](
            Job("ort-window-cache", phase, length, "cpu", str(tmp_path))
        )
        for _ in range(3):
            if step.before is not None:
                step.before()
            answers[phase] = step.answer(step.run())[:, -1]
            np.testing.assert_allclose(answers[phase], answers["prefill"], rtol=0, atol=1e-5)
    x = np.load(tmp_path / steps.TOKENS)
    with torch.no_grad():
        whole = block(torch.from_numpy(x))[:, -1]
    np.testing.assert_allclose(answers["decode"], whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_peers_compute_the_same_block(layout):
    """Each has a pairing of its own: weights are put in its order."""
    names = ("rotary-embedding-torch", "transformers", "transformers-onnx")
    block = mutants.block(layout=layout)
    found = bench.measure(
        block, (33,), phases=("prefill",), contenders=names, rounds=1, limits=False
    )
    for measured in found.measurements:
        assert measured.failed is None, measured
        assert measured.rel_error < 1e-5
        assert measured.allowed_error is None  # shown, not judged


@pytest.mark.slow
def test_a_cache_of_transformers_decodes_the_same_token():
    block = mutants.block()
    found = bench.measure(
        block, (33,), phases=("decode",), contenders=("transformers",), rounds=2, limits=False
    )
    (measured,) = found.measurements
    assert measured.failed is None
    assert measured.rel_error < 1e-5


def test_the_error_of_integers_in_the_cache_is_shown_and_not_judged():
    """In both phases by the graph with a cache, which serves prompts too."""
    found = bench.measure(
        mutants.block(), (33,), contenders=("ort-int8-cache",), rounds=1, limits=False
    )
    assert [m.phase for m in found.measurements] == ["prefill", "decode"]
    for measured in found.measurements:
        assert measured.failed is None
        assert 1e-4 < measured.rel_error < 0.1
        assert measured.allowed_error is None
    assert found.passed


@pytest.mark.slow
def test_blocks_with_integers_in_their_caches_race_by_their_graphs(tmp_path):
    block = mutants.block()
    report = export(block, tmp_path / "x", target="auto", cache=True, cache_dtype="int8").report
    assert report.passed
    timed = [runner for runner in report.graph["race"] if runner["out"] is None]
    # Of target onnx there is nothing that ort has not.
    assert {runner["target"] for runner in timed} == {"ort", "primitive"}


@pytest.mark.parametrize(
    ("variant", "says"),
    [
        ({"window": 8}, "a window"),
        ({"softcap": 20.0}, "a soft cap"),
        ({"sinks": True}, "sinks"),
        ({"qk_norm": True}, "norms of queries and keys"),
        ({"causal": False}, "no causal order"),
        ({"qkv_bias": True}, "biases"),
        ({"scale": 0.3}, "a scale of its own"),
        ({"rotary_dim": 8}, "a partial rotation"),
        ({"scaling": {"rope_type": "linear", "factor": 4}}, "a RoPE that is scaled or learned"),
        ({"scaling": {"rope_type": "yarn", "factor": 4}}, "a RoPE that is scaled or learned"),
    ],
)
def test_blocks_that_peers_spell_otherwise_are_left_out_with_a_word(tmp_path, variant, says):
    why = peers.prepare("transformers", "prefill", mutants.block(**variant), tmp_path, "cpu")
    assert why == f"compared here for plain blocks only, and this one has {says}"
    assert list(tmp_path.iterdir()) == []


def test_peers_that_cannot_run_here_say_why(tmp_path, monkeypatch):
    block = mutants.block(theta=500.0)  # a plain one
    assert peers._special(block) is None
    for name in ("rotary-embedding-torch", "torchtune"):
        why = peers.prepare(name, "decode", block, tmp_path, "cpu")
        missing = f"not installed: pip install {peers.PEERS[name].install}"
        assert why in ("measured here at prefill only", missing)
    monkeypatch.setitem(peers.PEERS, "liger", replace(peers.PEERS["liger"], package="torch"))
    assert peers.prepare("liger", "prefill", block, tmp_path, "cpu") == "runs on CUDA only"
    monkeypatch.setitem(peers.PEERS, "liger", replace(peers.PEERS["liger"], package="no_such"))
    why = peers.prepare("liger", "prefill", block, tmp_path, "cpu")
    assert why == "not installed: pip install liger-kernel"


# --- the command ----------------------------------------------------------------------------

SHAPE = ("--hidden", "64", "--heads", "4", "--kv-heads", "2", "--head-dim", "16")


@pytest.mark.slow
def test_the_command_measures_an_artifact_and_draws(cli_here, tmp_path):
    exported = ("--onnxruntime", "1.24", "--no-validate", "--out", "made")
    made = cli_here("block", *SHAPE, "--seq", "48", *exported)
    assert made.returncode == 0, made.stderr
    options = ("--artifact", "made", "--only", "eager,artifact", "--rounds", "2", "--seq", "8,40")
    result = cli_here("bench", *options, "--phase", "prefill", "--plot", "drawn.png", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    found = {(m["contender"], m["length"]) for m in document["measurements"]}
    assert found == {(name, length) for name in ("eager", "artifact") for length in (8, 40)}
    assert document["passed"] is True
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
    model = onnx.load(tmp_path / "made" / "model.onnx")
    mutants.sine_negated(model)
    onnx.save(model, tmp_path / "made" / "model.onnx")
    altered = cli_here("bench", *options)
    assert altered.returncode == 2
    assert "altered or truncated" in altered.stderr


@pytest.mark.slow
def test_wrong_numbers_are_exit_1_and_a_line(cli_here, results, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *_, **__: results)
    result = cli_here("bench", *SHAPE, "--seq", "8")
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1].startswith("FAILED: a graph gave numbers")
    assert "WRONG" in result.stdout


def test_what_the_command_refuses(cli_here, tmp_path):
    (tmp_path / "taken").mkdir()
    refused = {
        ("--seq", "1,8"): "'1,8' is not a list of lengths from 2",
        ("--seq", "many"): "'many' is not a list of lengths",
        ("--only", "eager,fastest"): "--only must be some of eager, compile",
        ("--plot", "drawn.txt"): "--plot must be a .png, .svg, .pdf file, got 'drawn.txt'",
        ("--plot", "no/such/drawn.png"): "--plot must be in a folder that exists",
        ("--artifact", "taken"): "config.json: missing",
        ("--artifact", "taken", "--heads", "2"): "--heads is for the artifact to say",
        ("--heads", "3"): "--hidden",
        ("--rounds", "0"): "--rounds",
    }
    for options, says in refused.items():
        result = cli_here("bench", *options)
        assert result.returncode == 2, (options, result.stderr)
        lines = [x for x in result.stderr.splitlines() if x.startswith("rope-export: error: ")]
        assert len(lines) == 1, result.stderr
        assert says in lines[0]
        assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_an_artifact_serves_no_longer_sequences_and_modules_have_no_block(cli_here, artifacts):
    result = cli_here("bench", "--artifact", str(artifacts["right"]), "--seq", "8")
    assert result.returncode == 2
    assert "does not say how to make its block" in result.stderr
    exported = ("--onnxruntime", "1.24", "--no-validate", "--out", "made")
    made = cli_here("block", *SHAPE, "--seq", "48", *exported)
    assert made.returncode == 0
    result = cli_here("bench", "--artifact", "made", "--seq", "8,64")
    assert result.returncode == 2
    assert "--seq must be at most the 48 tokens that made serves, got 64" in result.stderr


def test_matplotlib_is_asked_for_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BadInputError, match=r"plot needs matplotlib.*pip install matplotlib"):
        plot.check(tmp_path / "drawn.png")


def test_blocks_of_all_kinds_can_be_named():
    block = random_block(hidden_size=32, num_heads=2, max_seq_len=8, window=4, sinks=True)
    assert bench.block._title(block) == (
        "hidden 32, 2 query and 2 key/value heads of 16, RoPE half, window 4, sinks"
    )
