"""The artifact folder: whole or absent, in ONNX's own test layout, capped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import mutants
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from rope_export import BadInputError, export
from rope_export.artifacts import folder as artifact_folder
from rope_export.artifacts.folder import staged
from rope_export.proof import block_shapes as shapes


def test_vectors_replay_with_plain_onnx(proven_block):
    """Any runtime's own tools can read them: here ONNX's loader and reference evaluator."""
    result = proven_block("onnx")
    evaluator = ReferenceEvaluator(str(result.model))
    folders = sorted(result.path.glob("test_data_set_*"))
    assert len(folders) == 7
    for folder in folders:
        tensors = {}
        for kind in ("input", "output"):
            tensor = onnx.TensorProto()
            tensor.ParseFromString((folder / f"{kind}_0.pb").read_bytes())
            tensors[tensor.name] = numpy_helper.to_array(tensor)
        (output,) = evaluator.run(None, {"hidden_states": tensors["hidden_states"]})
        distance = np.linalg.norm(output - tensors["output"])
        assert distance < 1e-4 * np.linalg.norm(tensors["output"])


def test_vectors_cover_the_shapes_promised(artifact_of_block):
    config = json.loads((artifact_of_block.path / "config.json").read_text())
    shapes = [(v["batch"], v["sequence"]) for v in config["test_vectors"]]
    assert (1, 1) in shapes
    assert (1, mutants.LONGEST) in shapes
    assert any(batch > 1 for batch, _ in shapes)
    assert any(length % 2 and length > 1 for _, length in shapes)


def test_the_longest_vector_shrinks_to_the_cap_but_is_proven(tmp_path, monkeypatch):
    assert shapes.STORED_BYTES == 64 * 2**20
    cap = shapes.STORED_BYTES // 8
    monkeypatch.setattr(shapes, "STORED_BYTES", cap)
    block = mutants.block(hidden_size=512, num_heads=1, num_kv_heads=1, max_seq_len=2500)
    result = export(block, tmp_path / "wide", validate=True)
    stored = sum(file.stat().st_size for file in result.path.glob("test_data_set_*/*"))
    assert 0.9 * cap < stored < 1.01 * cap
    proven = {case.sequence for case in result.report.cases}
    assert 2500 in proven
    assert any("longest [1, 2500] is proven at export but not stored" in n for n in result.notes)
    lengths = {onnx_length(f) for f in result.path.glob("test_data_set_*/input_0.pb")}
    assert 2500 not in lengths
    assert max(lengths) == max(proven - {2500})


def onnx_length(file: Path) -> int:
    tensor = onnx.TensorProto()
    tensor.ParseFromString(file.read_bytes())
    return tensor.dims[1]


def test_large_weights_lie_beside_the_graph_and_are_guarded(tmp_path, monkeypatch):
    from rope_export import replay
    from rope_export.exporting import graph

    monkeypatch.setattr(graph, "_EXTERNAL_BYTES", 1000)
    result = export(mutants.block(), tmp_path / "block", validate=True)
    assert result.report.passed
    data = result.path / "model.onnx.data"
    assert data.stat().st_size > 30_000
    moved = (tmp_path / "block").rename(tmp_path / "elsewhere")
    assert replay(moved).passed
    (moved / "model.onnx.data").write_bytes(data.name.encode())
    with pytest.raises(BadInputError, match=r"model\.onnx\.data: altered or truncated"):
        replay(moved)


def test_files_are_readable_by_others(artifact_of_block):
    umask = os.umask(0)
    os.umask(umask)
    assert artifact_of_block.path.stat().st_mode & 0o777 == 0o777 & ~umask


def write(target: Path, text: str, stop: type[BaseException] | None = None) -> None:
    with pytest.raises(stop) if stop else nullcontext(), staged(target) as folder:
        (folder / "model.onnx").write_text(text)
        if stop:
            raise stop


def test_staging_removes_itself_on_error_and_keeps_what_was_there(tmp_path):
    target = tmp_path / "new" / "deep" / "artifact"
    write(target, "half", stop=ZeroDivisionError)
    assert list(tmp_path.iterdir()) == []
    write(target, "first")
    write(target, "second", stop=KeyboardInterrupt)
    assert (target / "model.onnx").read_text() == "first"
    assert [p.name for p in target.parent.iterdir()] == ["artifact"]


def test_staging_without_an_atomic_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact_folder, "_exchange", lambda *_: False)
    target = tmp_path / "artifact"
    for text in ("first", "second"):
        write(target, text)
        assert (target / "model.onnx").read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


def test_a_folder_with_other_things_is_never_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(BadInputError, match=r"holds 'notes\.txt'"), staged(tmp_path):
        pass
    assert (tmp_path / "notes.txt").read_text() == "precious"


def test_the_folder_of_the_command_line_is_no_top_level_package(tmp_path):
    code = (
        "from importlib.util import find_spec; "
        "print(find_spec('cli'), find_spec('rope_export._cli').name)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["None", "rope_export._cli"]
