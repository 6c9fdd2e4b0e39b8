"""`rope-export validate` names what is damaged in an artifact, whatever it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import error_line

from rope_export.artifacts.artifact import FORMAT


def damage_missing(folder: Path) -> str:
    (folder / "model.onnx").unlink()
    return "model.onnx: missing"


def damage_truncated(folder: Path) -> str:
    file = folder / "model.onnx"
    file.write_bytes(file.read_bytes()[:-100])
    return "model.onnx: altered or truncated"


def damage_vector(folder: Path) -> str:
    file = folder / "test_data_set_1/output_0.pb"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return "test_data_set_1/output_0.pb: altered or truncated"


def damage_config(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return "config.json: not readable JSON"


def damage_config_type(folder: Path) -> str:
    (folder / "config.json").write_text("[]")
    return "config.json: must hold a JSON object, got list"


def damage_config_content(folder: Path) -> str:
    (folder / "config.json").write_text('{"format": 1, "files": {}}')
    return "config.json: not an artifact's configuration"


def damage_format(folder: Path) -> str:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"format": 99}))
    return f"format 99, this version reads {FORMAT}"


def edit(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


def damage_notes(folder: Path) -> str:
    edit(folder, notes=None)
    return "'notes' is NoneType, not list"


def damage_graph(folder: Path) -> str:
    edit(folder, graph=5)
    return "'graph' is int, not dict"


def damage_tolerance(folder: Path) -> str:
    vectors = json.loads((folder / "config.json").read_text())["test_vectors"]
    vectors[0]["bounds"]["output"]["tolerance"]["rel"] = 0
    edit(folder, test_vectors=vectors)
    return "must be finite, above 0"


def damage_batch(folder: Path) -> str:
    vectors = json.loads((folder / "config.json").read_text())["test_vectors"]
    vectors[0]["batch"] = 0
    edit(folder, test_vectors=vectors)
    return "batch of test_data_set_0 is 0"


def damage_vector_folder(folder: Path) -> str:
    vectors = json.loads((folder / "config.json").read_text())["test_vectors"]
    vectors[0]["folder"] = "../elsewhere"
    edit(folder, test_vectors=vectors)
    return "unexpected test vector '../elsewhere'"


def damage_files_outside(folder: Path) -> str:
    edit(folder, files={"/etc/passwd": "0"})
    return "unexpected file '/etc/passwd'"


def damage_foreign_file(folder: Path) -> str:
    shutil.copy(folder / "test_data_set_1/input_0.pb", folder / "test_data_set_1/input_9.pb")
    return "test_data_set_1/input_9.pb: not part of the artifact"


def damage_vector_shape(folder: Path) -> str:
    """Another case's output, with its checksum brought along."""
    file = folder / "test_data_set_1/output_0.pb"
    shutil.copy(folder / "test_data_set_2/output_0.pb", file)
    files = json.loads((folder / "config.json").read_text())["files"]
    files["test_data_set_1/output_0.pb"] = files["test_data_set_2/output_0.pb"]
    edit(folder, files=files)
    return "test_data_set_1: holds no vector of 1 x 13 tokens"


def damage_all(folder: Path) -> str:
    shutil.rmtree(folder)
    return "does not exist"


@pytest.mark.parametrize(
    "damage",
    [
        damage_missing,
        damage_truncated,
        damage_vector,
        damage_config,
        damage_config_type,
        damage_config_content,
        damage_format,
        damage_notes,
        damage_graph,
        damage_tolerance,
        damage_batch,
        damage_vector_folder,
        damage_files_outside,
        damage_foreign_file,
        damage_vector_shape,
        damage_all,
    ],
)
def test_a_damaged_artifact_is_named_and_exit_2(cli_here, tmp_path, artifact_of_block, damage):
    folder = Path(shutil.copytree(artifact_of_block.path, tmp_path / "block"))
    expected = damage(folder)
    result = cli_here("validate", "block")
    assert result.returncode == 2
    assert expected in error_line(result)


def test_a_graph_that_differs_from_its_vectors_is_exit_1(cli_here, tmp_path, artifact_of_block):
    """A model exchanged together with its checksum: only running it can tell."""
    import hashlib

    import mutants
    import onnx

    folder = Path(shutil.copytree(artifact_of_block.path, tmp_path / "block"))
    model = onnx.load(folder / "model.onnx")
    mutants.sine_negated(model)
    onnx.save(model, folder / "model.onnx")
    config = json.loads((folder / "config.json").read_text())
    config["files"]["model.onnx"] = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))
    result = cli_here("validate", "block")
    assert result.returncode == 1
    assert "FAILED" in result.stdout
    assert json.loads(cli_here("validate", "block", "--json").stdout)["passed"] is False
