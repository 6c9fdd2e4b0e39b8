"""An onnxruntime that is too old is said to be, never taken for a graph that disagrees."""

from __future__ import annotations

import re
from pathlib import Path

import mutants
import onnx
import onnxruntime
import pytest
from onnx import helper
from rope_export._cli import run

from rope_export import ProviderUnavailableError, export, replay, runtime
from rope_export.artifacts.targets import IR_VERSIONS
from rope_export.runtime import findings, providers, required, session


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """By target: with a cache, so that the ort one has control flow."""
    folder = tmp_path_factory.mktemp("artifacts")
    return {
        target: export(
            mutants.block(max_seq_len=16),
            folder / target,
            target=target,
            cache=True,
            validate=False,
        ).path
        for target in ("ort", "primitive")
    }


def pretend(monkeypatch, version, *, opset=99):
    """An onnxruntime of that version: silent on where nodes run, and for old graphs only."""
    monkeypatch.setattr(onnxruntime, "__version__", version)
    opened = providers.open_session

    class Older:
        def __init__(self, real):
            self.real = real

        def __getattr__(self, name):
            if name == "get_provider_graph_assignment_info":
                raise AttributeError(name)
            return getattr(self.real, name)

    def open_older(model, *rest):
        loaded = onnx.load(model) if isinstance(model, str) else onnx.load_from_string(model)
        if max(each.version for each in loaded.opset_import if not each.domain) > opset:
            raise RuntimeError("ONNX Runtime only *guarantees* support for models stamped with …")
        return Older(opened(model, *rest))

    for module in (providers, session):
        monkeypatch.setattr(module, "open_session", open_older)


def command(*arguments):
    with pytest.raises(SystemExit) as stopped:
        run(list(arguments))
    return stopped.value.code


@pytest.mark.parametrize("version", ["1.15.1", "1.20.1", "1.23.2"])
def test_primitive_graphs_are_proven_where_nobody_says_where_nodes_run(
    artifacts, monkeypatch, version
):
    pretend(monkeypatch, version, opset=20)
    report = replay(artifacts["primitive"], providers=["cpu"])
    assert report.passed
    assert list(report.providers["cpu"].nodes) == ["CPUExecutionProvider"]
    decoder = runtime.Decoder.open(artifacts["primitive"])
    assert decoder.lengths == (0,)


@pytest.mark.parametrize("version", ["1.17.3", "1.20.1", "1.24.4"])
def test_an_artifact_that_needs_a_later_one_is_unavailable(artifacts, monkeypatch, capsys, version):
    pretend(monkeypatch, version)
    assert command("validate", str(artifacts["ort"])) == 3
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert re.search(
        rf"{version} is installed, >=1\.25 is needed: pip install 'onnx\S+>=1\.25'$", line
    )
    with pytest.raises(ProviderUnavailableError, match=r">=1\.25 is needed: pip install"):
        runtime.Decoder.open(artifacts["ort"])


@pytest.mark.parametrize(
    ("softcap", "version", "passes"), [(None, "1.24.4", True), (5.0, "1.26.0", False)]
)
def test_a_soft_cap_of_target_onnx_needs_a_later_one(
    tmp_path, monkeypatch, softcap, version, passes
):
    block = mutants.block(max_seq_len=16, softcap=softcap)
    folder = export(block, tmp_path / "block", target="onnx", validate=False).path
    monkeypatch.setattr(onnxruntime, "__version__", version)
    if passes:
        assert replay(folder).passed
    else:
        with pytest.raises(ProviderUnavailableError, match=r"1\.26\.0 is installed, >=1\.27"):
            replay(folder)


def graph(folder, *, opset=18, ir_version=8, operator="Relu"):
    model = onnx.load_from_string(providers.tiny_model(opset=opset, ir_version=ir_version))
    model.graph.node[0].op_type = operator
    path = folder / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("newer", [{"opset": 60}, {"ir_version": 60}], ids=str)
def test_a_graph_from_the_future_is_unavailable_on_any(tmp_path, newer):
    with pytest.raises(ProviderUnavailableError, match=r"60.*loads opsets up to .*pip install"):
        runtime.Session.open(graph(tmp_path, **newer), "cpu")


def test_an_operator_that_an_old_one_lacks_is_unavailable_and_else_an_error(tmp_path, monkeypatch):
    path = graph(tmp_path, operator="NoSuchOperator")
    with pytest.raises(RuntimeError, match="NoSuchOperator"):
        runtime.Session.open(path, "cpu")
    monkeypatch.setattr(onnxruntime, "__version__", "1.20.1")
    with pytest.raises(ProviderUnavailableError, match=r"NoSuchOperator.*>=1\.24 is needed: pip"):
        runtime.Session.open(path, "cpu")


def test_where_nodes_run_on_cuda_must_be_known(tmp_path, monkeypatch):
    pretend(monkeypatch, "1.20.1")
    monkeypatch.setattr(session, "require", lambda _: None)
    with pytest.raises(ProviderUnavailableError, match="nobody learns which"):
        runtime.Session.open(graph(tmp_path), "cuda")


@pytest.mark.parametrize("target", ["ort", "primitive"])
def test_graphs_have_the_ir_version_of_their_target(artifacts, target):
    model = onnx.load(artifacts[target] / "model.onnx")
    assert model.ir_version == IR_VERSIONS[target]
    if target == "primitive":
        assert {each.domain for each in model.opset_import} == {""}
        assert model.ir_version == helper.find_min_ir_version_for(list(model.opset_import))


def test_what_is_needed_is_what_is_declared():
    declared = Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    assert set(re.findall(r'"onnxruntime(?:-gpu)?>=([\d.]+)', declared)) == {required.DECLARED}


@pytest.mark.parametrize(("version", "lines"), [("1.24.4", 2), ("1.26.0", 1), ("1.31.1", 0)])
def test_doctor_says_what_a_supported_one_does_not_run(version, lines):
    assert len(list(required.limits(version))) == lines
    assert findings.required is required
