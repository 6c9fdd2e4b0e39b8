"""The validator passes what is right and fails what is wrong, in every target and dtype."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import mutants
import numpy as np
import onnx
import pytest
import torch
from selection import slow_unless

from rope_export import (
    Attention,
    BadInputError,
    ExportResult,
    RotaryEmbedding,
    export,
    replay,
    validate,
)
from rope_export.artifacts.targets import TARGETS

TARGETS = TARGETS
DTYPES = ("float32", "float16")
# Half precision by default where the operators are onnxruntime's own.
GRAPHS = pytest.mark.parametrize(
    ("target", "dtype"),
    slow_unless(
        lambda target, dtype: dtype == "float32" or target == "ort",
        itertools.product(TARGETS, DTYPES),
    ),
)


def copied(result: ExportResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(result.path, tmp_path / "copy"))


@GRAPHS
def test_a_right_graph_passes(proven_block, target, dtype):
    report = proven_block(target, dtype).report
    assert report.passed
    assert report.providers["cpu"].status == "ok"
    assert set(report.providers["cpu"].nodes) == {"CPUExecutionProvider"}
    again = validate(proven_block(target, dtype), mutants.block(dtype))
    assert again.passed
    assert [c.errors for c in again.cases] == [c.errors for c in report.cases]


@pytest.mark.parametrize("mutate", mutants.GRAPH_MUTANTS, ids=lambda m: m.__name__)
@GRAPHS
def test_a_wrong_graph_fails(proven_block, target, dtype, mutate, tmp_path):
    folder = copied(proven_block(target, dtype), tmp_path)
    model = onnx.load(folder / "model.onnx")
    mutate(model)
    onnx.save(model, folder / "model.onnx")
    report = validate(folder, mutants.block(dtype))
    assert not report.passed
    assert report.providers["cpu"].status == "ok"
    failed = [case for case in report.cases if not case.passed]
    refused = mutate in mutants.REFUSED_BY_THE_RUNTIME
    assert all((case.reason is not None) == refused for case in failed)
    # On the deployment machine the same graph is refused before it runs.
    with pytest.raises(BadInputError, match=r"model\.onnx: altered"):
        replay(folder)


# The graph of a right block and a wrong block differ as much as those of a wrong and a right one.


@pytest.mark.parametrize("mutate", mutants.BLOCK_MUTANTS, ids=lambda m: m.__name__)
@GRAPHS
def test_a_graph_fails_against_a_wrong_block(proven_block, target, dtype, mutate):
    wrong = mutants.mutated(mutants.block(dtype), mutate)
    assert not validate(proven_block(target, dtype), wrong).passed


# Both scalings in every target and in both dtypes, by turns.
SCALED = [
    pytest.param(
        target,
        DTYPES[(i + j) % 2],
        scaling,
        id=f"{target}-{scaling['rope_type']}",
        marks=() if target == "ort" else pytest.mark.slow,
    )
    for i, target in enumerate(TARGETS)
    for j, scaling in enumerate((mutants.YARN, mutants.LONGROPE))
]


@pytest.mark.parametrize(("target", "dtype", "scaling"), SCALED)
def test_the_graph_of_a_scaled_block_fails_against_wrong_ones(target, dtype, scaling, tmp_path):
    right = mutants.block(dtype, scaling=scaling)
    result = export(right, tmp_path / "right", target=target, validate=True)
    assert result.report.passed
    wrongs = [mutate for mutate, its in mutants.SCALING_MUTANTS.items() if its is scaling]
    assert len(wrongs) >= 2
    for mutate in wrongs:
        assert not validate(result, mutants.mutated(right, mutate)).passed, mutate.__name__


# ... and some the other way round, among them those that are lowered in another way.
@pytest.mark.parametrize(
    ("target", "dtype", "mutate"),
    slow_unless(
        lambda _, dtype, mutate: dtype == "float32" and mutate is not mutants.causal_flag_dropped,
        [
            ("ort", "float32", mutants.causal_flag_dropped),
            ("ort", "float16", mutants.half_of_the_width_rotated),
            ("ort", "float32", mutants.switch_one_token_late),
            ("onnx", "float16", mutants.causal_flag_dropped),
            ("onnx", "float32", mutants.layout_flipped),
            ("primitive", "float16", mutants.weights_with_noise),
        ],
    ),
)
def test_the_graph_of_a_wrong_block_fails(target, dtype, mutate, tmp_path):
    right = mutants.block(dtype, scaling=mutants.SCALING_MUTANTS.get(mutate))
    wrong = mutants.mutated(right, mutate)
    result = export(wrong, tmp_path / "wrong", target=target)
    assert not validate(result, right).passed
    assert validate(result, wrong).passed


# What is drawn depends on the seed, not on the target.
@pytest.mark.parametrize(
    ("target", "seed"),
    slow_unless(
        lambda target, seed: (target, seed) == ("ort", 0),
        [("ort", 0), ("ort", 1), ("onnx", 1), ("primitive", 0)],
    ),
)
def test_every_row_of_the_table_is_read_when_positions_are_an_input(target, seed, tmp_path):
    block = mutants.block()
    result = export(block, tmp_path / "block", target=target, position_ids=True, seed=seed)
    right = result.model.read_bytes()
    for row in (3, 17, 46):
        model = onnx.load_from_string(right)
        mutants.change(mutants.table(model, "rope.angles.cos"), zeroed(row))
        onnx.save(model, result.model)
        assert not validate(result, block).passed


def zeroed(row: int):
    def change(table):
        table[row] = 0
        return table

    return change


@pytest.mark.parametrize("target", slow_unless(lambda target: target == "ort", TARGETS))
def test_both_composed_tables_are_read_when_positions_are_an_input(target, tmp_path):
    torch.manual_seed(0)
    block = Attention(32, 2, rope=RotaryEmbedding(16, layout="half"))
    result = export(block, tmp_path / "block", target=target, position_ids=True, max_seq_len=64)
    assert validate(result, block).passed
    original = result.model.read_bytes()
    for row in (4095, 64):
        for name, changed in (("rope.angles.cos", row), ("rope.angles.coarse_sin", row % 8192)):
            model = onnx.load_from_string(original)
            mutants.change(mutants.table(model, name), zeroed(changed))
            onnx.save(model, result.model)
            assert not validate(result, block).passed, (name, row)


def weakened_mask(model: onnx.ModelProto) -> None:
    """Hidden scores pushed down by a hundred only, enough for quiet inputs."""
    (scores,) = [n for n in model.graph.node if n.op_type == "Softmax"]
    (where,) = [n for n in model.graph.node if scores.input[0] in n.output]
    (mask,) = [t for t in model.graph.initializer if t.name in where.input]
    mutants.change(mask, lambda _: np.array(-100.0))


@pytest.mark.parametrize("dtype", slow_unless(lambda dtype: dtype == "float32", DTYPES))
def test_a_mask_too_weak_for_large_scores_fails(proven_block, dtype, tmp_path):
    folder = copied(proven_block("primitive", dtype), tmp_path)
    model = onnx.load(folder / "model.onnx")
    weakened_mask(model)
    onnx.save(model, folder / "model.onnx")
    report = validate(folder, mutants.block(dtype))
    assert [case.name for case in report.cases if not case.passed] == ["loud inputs"]
