"""Graphs made for an onnxruntime that is not the one installed."""

from __future__ import annotations

import json

import mutants
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from rope_export._cli import run

from rope_export import BadInputError, ExportError, ProviderUnavailableError, export
from rope_export.exporting import graph
from rope_export.runtime import schemas

CAPPED = {"max_seq_len": 16, "softcap": 3.0}
HERE = ".".join(onnxruntime.__version__.split(".")[:2])


def operators(folder):
    return {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}


def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("target", "asked", "fused", "needed"),
    [
        ("onnx", None, True, "1.27"),
        ("onnx", "1.27", True, "1.27"),
        ("onnx", "1.26", False, "1.24"),
        ("onnx", "1.24.3", False, "1.24"),
        ("ort", "1.24", True, "1.24"),
        ("primitive", "1.15", False, "1.15"),
        ("primitive", None, False, "1.15"),
    ],
)
def test_what_needs_a_later_one_is_passed_over_and_the_rest_is_proven(
    tmp_path, target, asked, fused, needed
):
    block = mutants.block(**CAPPED)
    result = export(block, tmp_path / "block", target=target, onnxruntime=asked, validate=True)
    assert result.report.passed
    found = operators(result.path) & {"Attention", "GroupQueryAttention"}
    assert bool(found) is fused
    made = config(result.path)
    assert made["graph"]["onnxruntime"] == needed
    assert made["export"]["onnxruntime"] == (HERE if asked is None else asked[:4])
    assert f"runs in onnxruntime {needed} and later" in (result.path / "report.md").read_text()
    passed_over = [text for text in made["graph"]["passed_over"] if "1.27" in text]
    assert bool(passed_over) == (target == "onnx" and not fused)
    for text in passed_over:
        assert text.endswith(f"(before onnxruntime 1.27; the graph is made for {asked[:4]})")


def test_a_graph_is_the_same_whichever_is_asked_for_where_nothing_differs(tmp_path):
    plain = mutants.block(max_seq_len=16)
    bytes_ = {
        (
            export(plain, tmp_path / "block", cache=True, onnxruntime=v).path / "model.onnx"
        ).read_bytes()
        for v in ("1.24", None)
    }
    assert len(bytes_) == 1


class Net(torch.nn.Module):
    """A module that holds an attention with a soft cap."""

    def __init__(self):
        super().__init__()
        self.attend = mutants.block(**CAPPED)

    def forward(self, x):
        return self.attend(x) + x


def test_a_module_is_made_for_it_too(tmp_path):
    given = {"args": (torch.randn(2, 5, mutants.HIDDEN),), "target": "onnx"}
    shapes = {"x": {0: "batch", 1: "sequence"}}
    folder = export(
        Net(), tmp_path / "net", **given, dynamic_shapes=shapes, onnxruntime="1.25", validate=True
    ).path
    assert "Attention" not in operators(folder)
    assert config(folder)["graph"]["onnxruntime"] == "1.24"
    assert config(folder)["export"]["onnxruntime"] == "1.25"


@pytest.mark.parametrize(
    "nonsense", ["", "new", "1", "1.x", "-1.24", "1.24.1.1", " 1.24", "1,24", 1.24, 24, ["1.24"]]
)
def test_nonsense_is_refused_in_one_line(tmp_path, nonsense):
    with pytest.raises(BadInputError) as refused:
        export(mutants.block(**CAPPED), tmp_path / "block", onnxruntime=nonsense)
    assert str(refused.value) == f"onnxruntime must be a version such as '1.24', got {nonsense!r}"
    assert not (tmp_path / "block").exists()


@pytest.mark.parametrize(
    ("target", "version", "instead"),
    [
        ("ort", "1.23", " (target primitive runs there)"),
        ("onnx", "1.15.1", " (target primitive runs there)"),
        ("ort", "1.14", ""),
        ("primitive", "1.14", ""),
        ("auto", "0.9", ""),
    ],
)
def test_one_that_is_too_old_for_the_target_is_refused(tmp_path, target, version, instead):
    oldest = "1.15" if target == "primitive" else "1.24"
    with pytest.raises(BadInputError) as refused:
        export(mutants.block(**CAPPED), tmp_path / "block", target=target, onnxruntime=version)
    assert str(refused.value) == (
        f"onnxruntime must be at least {oldest} with target {target}, got {version}{instead}"
    )


def test_a_later_one_than_here_is_made_for_without_a_proof_alone(tmp_path, monkeypatch):
    block = mutants.block(**CAPPED)
    monkeypatch.setattr(onnxruntime, "__version__", "1.25.1")
    for target in ("onnx", "auto"):
        with pytest.raises(ProviderUnavailableError) as refused:
            export(
                block,
                tmp_path / "block",
                target=target,
                onnxruntime="1.30",
                validate=target != "auto",  # which always proves
            )
        assert "a graph for onnxruntime 1.30 cannot be proven here" in str(refused.value)
        assert "1.25.1 is installed; pip install 'onnxruntime" in str(refused.value)
        assert not (tmp_path / "block").exists()
    # Made for what is here, and for what was asked.
    for asked, needed in ((None, "1.24"), ("1.30", "1.27")):
        folder = export(block, tmp_path / "block", target="onnx", onnxruntime=asked).path
        assert config(folder)["graph"]["onnxruntime"] == needed


def test_what_a_module_brings_itself_is_refused_where_it_is_not_known(tmp_path, monkeypatch):
    saved = graph.save

    def with_a_later_operator(model, folder):
        saved(model, folder)
        proto = onnx.load(folder / "model.onnx")
        proto.graph.node.append(
            helper.make_node("LinearAttention", [], ["_"], domain="com.microsoft")
        )
        proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        onnx.save(proto, folder / "model.onnx")

    monkeypatch.setattr(graph, "save", with_a_later_operator)
    block = mutants.block(**CAPPED)
    with pytest.raises(BadInputError) as refused:
        export(block, tmp_path / "block", target="primitive", onnxruntime="1.24")
    assert str(refused.value) == (
        "onnxruntime must be at least 1.25: the graph of Attention has LinearAttention, got 1.24"
    )
    assert not (tmp_path / "block").exists()
    # Nor is a graph written that the onnxruntime here should know and does not.
    monkeypatch.setattr(schemas, "unknown", lambda nodes: f"no {[*nodes][-1].op_type}")
    with pytest.raises(ExportError, match=r"onnxruntime \S+ has no LinearAttention"):
        export(block, tmp_path / "block", target="primitive")
    assert not (tmp_path / "block").exists()


FACTORY = """
import torch
from rope_export import Attention

def factory():
    return Attention(32, 2, softcap=3.0), {"hidden_states": torch.ones(1, 4, 32)}
"""
COMMANDS = {
    "block": ["--seq", "8", "--hidden", "32", "--heads", "2", "--softcap", "3"],
    "module": ["net.py:factory"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_takes_it(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "net.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)

    def command(*options):
        with pytest.raises(SystemExit) as stopped:
            run([name, *COMMANDS[name], "--target", "onnx", "--out", "made", *options])
        said = capsys.readouterr()
        errors = [line for line in said.err.splitlines() if "error" in line]
        return stopped.value.code or 0, said.out, errors

    code, out, _ = command("--onnxruntime", "1.25")
    assert code == 0
    assert "made for cpu, onnxruntime >=1.24" in out
    assert "passed over  Attention caps the scores of hidden keys too" in out
    assert config(tmp_path / "made")["options"]["onnxruntime"] == "1.25"
    for version, expected, line in (
        ("soon", 2, "--onnxruntime must be a version such as '1.24', got 'soon'"),
        ("1.20", 2, "--onnxruntime must be at least 1.24 with "),
        ("99.0", 3, "a graph for onnxruntime 99.0 cannot be proven here"),
    ):
        code, out, errors = command("--onnxruntime", version, "--out", "none")
        assert (code, out, len(errors)) == (expected, "", 1)
        assert line in errors[0]
        assert not (tmp_path / "none").exists()
    code, out, _ = command("--onnxruntime", "99.0", "--no-validate", "--json")
    assert code == 0
    assert json.loads(out)["graph"]["onnxruntime"] == "1.27"
