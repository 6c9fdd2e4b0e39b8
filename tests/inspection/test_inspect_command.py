"""`rope-export inspect` on files, artifacts and checkpoints: rows, JSON, one line of error."""

from __future__ import annotations

import json
from collections.abc import Iterator

import onnx
import pytest
from inspected import GQA, rotating
from onnx import TensorProto, helper
from rope_export._cli import main as commands
from rope_export._cli.inspect import inspect

from rope_export.inspection.report import inspect_model

# --- the command ----------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys) -> Iterator[object]:
    """Run ``rope-export inspect`` in this process: exit code, stdout, stderr."""
    monkeypatch.setitem(commands.main.commands, "inspect", inspect)

    def run(*arguments: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as stopped:
            commands.run(["inspect", *map(str, arguments)])
        said = capsys.readouterr()
        return stopped.value.code or 0, said.out, said.err

    return run


def test_the_command_on_a_file(command, tmp_path):
    path = rotating(tmp_path)
    code, out, err = command(path)
    assert (code, err) == (0, "")
    lines = {line[:12].strip(): line[13:] for line in out.splitlines()}
    assert lines["format"] == "ONNX IR 10, opset 18, com.microsoft 1"
    assert lines["input"] == "positions int64 [sequence]"
    assert lines["rotation"].startswith("arithmetic, half, 8 channels of a head: tables constant_")
    assert lines["rotation"].endswith("positions from positions")
    assert lines["positions"] == "up to 32 tokens"
    assert (lines["attention"], lines["cache"]) == ("none found", "none")
    code, out, err = command(path, "--json")
    document = json.loads(out)
    assert (code, err, document["kind"]) == (0, "", "model")
    assert document["path"] == str(path)
    assert document["model"] == json.loads(json.dumps(inspect_model(path).to_json()))


def test_the_command_on_an_artifact(command, artifact_of_block):
    folder = artifact_of_block.path
    code, out, err = command(folder)
    assert (code, err) == (0, "")
    assert "block        hidden_size 64, num_heads 4" in out
    assert "  rope       dim 16, theta 10000.0, layout half" in out
    assert f"rotation     {GQA}, half, 16 channels" in out
    assert "positions    up to 48 tokens" in out
    assert [line for line in out.splitlines() if line.startswith("onnxruntime")] == [
        "onnxruntime  >=1.24"
    ]
    cases = json.loads((folder / "report.json").read_text())["cases"]
    assert f"PASSED: {len(cases)} comparisons" in out
    code, out, _ = command(folder, "--json")
    document = json.loads(out)
    assert (code, document["kind"], document["passed"]) == (0, "artifact", True)
    assert document["block"]["num_kv_heads"] == 2
    assert document["model"]["longest"] == 48


def test_the_command_on_a_checkpoint(command, tmp_path):
    kinds = ("sliding", "sliding", "full", "sliding", "full")
    config = {
        "model_type": "gemma2",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 5,
        "max_position_embeddings": 128,
        "sliding_window": 32,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 50.0,
        "rope_theta": 10000.0,
        "layer_types": [f"{kind}_attention" for kind in kinds],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, err = command(tmp_path)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"checkpoint   {tmp_path}  (5 layers)"
    assert lines[1].startswith("every layer  family gemma2, hidden_size 64, num_heads 4, num_kv_")
    assert "  rope       dim 16, theta 10000.0, layout half" in lines
    assert lines[-2:] == ["layers       0-1, 3: window 32", "layers       2, 4: no window"]
    code, out, _ = command(tmp_path, "--json")
    document = json.loads(out)
    assert (code, document["kind"]) == (0, "checkpoint")
    assert [layer["window"] for layer in document["layers"]] == [32, 32, None, 32, None]
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    code, out, err = command(tmp_path)
    assert (code, out) == (2, "")
    assert f"error: {tmp_path / 'config.json'}: model_type" in err
    assert "no-such-model" in err


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("nowhere", None, ("does not exist", "give an ONNX file")),
        ("empty.onnx", b"", ("is empty",)),
        ("text.onnx", b"import torch\n", ("not an ONNX model",)),
        ("prose.onnx", b"The quick brown fox jumps over it. " * 40, ("not an ONNX model",)),
        ("zeros.onnx", bytes(4096), ("not an ONNX model",)),
        ("noise.onnx", bytes(range(256)) * 8, ("not an ONNX model",)),
        ("pointer.onnx", b"version https://git-lfs.github.com/spec/v1\n", ("git lfs pull",)),
        ("model.ort", b"\x08\0\0\0ORTM" + bytes(64), ("onnxruntime's own format",)),
        ("folder/x.txt", b"", ("no artifact or checkpoint", "config.json")),
        ("folder/model.onnx", b"", ("config.json", "for its graph give", "model.onnx")),
        ("folder/config.json", b"{", ("config.json", "not readable JSON")),
        ("folder/config.json", b"\xff\xfe", ("config.json", "not readable JSON")),
        ("folder/config.json", b"[" * 100000, ("config.json", "not readable JSON")),
        ("folder/config.json", b"[1]", ("config.json", "JSON object", "list")),
        ("folder/config.json", b"{}", ("'format'", "'model_type'")),
        ("folder/config.json", b'{"format": 99}', ("config.json", "99")),
    ],
)
def test_bad_input_is_one_line_and_exit_2(command, tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    given = path.parent if name.startswith("folder/") else path
    code, out, err = command(given)
    assert (code, out) == (2, "")
    assert err.startswith("rope-export: error: ")
    assert err.count("\n") == 1
    for part in (str(given), *says):
        assert part in err


def test_a_truncated_model_is_bad_input(command, tmp_path):
    path = rotating(tmp_path)
    content = path.read_bytes()
    for length in (1, 2, 100, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:length])
        code, out, err = command(path)
        assert (code, out) == (2, "")
        assert "truncated" in err


def test_the_command_says_which_onnxruntime_a_foreign_graph_needs(command, tmp_path):
    names = ["q", "k", "v", "", "", "last", "total"]
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        ["y"],
        domain="com.microsoft",
        num_heads=2,
        kv_num_heads=1,
        causal=0,
    )
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 32])
        for name in (*filter(None, names), "y")
    ]
    model = helper.make_model(
        helper.make_graph([node], "foreign", values[:-1], values[-1:]),
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)],
        ir_version=8,
    )
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    code, out, _ = command(path)
    assert code == 0
    assert "onnxruntime  >=1.30: GroupQueryAttention with causal\n" in out
    code, out, _ = command(path, "--json")
    document = json.loads(out)["model"]
    assert document["onnxruntime"] == "1.30"
    assert [need["version"] for need in document["needs"]] == ["1.30", "1.18"]
