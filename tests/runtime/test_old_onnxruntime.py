"""An onnxruntime that is too old is said to be, never taken for a graph that disagrees."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import mutants
import onnx
import onnxruntime
import pytest
from onnx import helper
from rope_export._cli import run

from rope_export import BadInputError, ProviderUnavailableError, export, replay, runtime
from rope_export.artifacts.targets import IR_VERSIONS
from rope_export.runtime import findings, providers, required, session


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """By target: with a cache, so that the ort one has control flow; and one with a soft cap."""
    folder = tmp_path_factory.mktemp("artifacts")

    def made(name, target, softcap=None):
        block = mutants.block(max_seq_len=16, softcap=softcap)
        return export(block, folder / name, target=target, cache=True, validate=False).path

    return {
        "ort": made("ort", "ort"),
        "primitive": made("primitive", "primitive"),
        "capped": made("capped", "onnx", 5.0),
    }


@pytest.fixture
def capped(artifacts, tmp_path):
    """A copy of the one with a soft cap, to be changed."""
    return Path(shutil.copytree(artifacts["capped"], tmp_path / "capped"))


def stated(folder, version):
    """State another version in an artifact, or none, as earlier releases did."""
    config = json.loads((folder / "config.json").read_text())
    del config["graph"]["onnxruntime"]
    if version is not None:
        config["graph"]["onnxruntime"] = version
    (folder / "config.json").write_text(json.dumps(config))


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
    return stopped.value.code or 0


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


@pytest.mark.parametrize(
    ("name", "version", "needed"),
    [
        ("ort", "1.17.3", "1.24"),
        ("ort", "1.23.2", "1.24"),
        ("capped", "1.23.2", "1.27"),
        ("capped", "1.26.1", "1.27"),
    ],
)
def test_an_artifact_that_needs_a_later_one_is_unavailable(
    artifacts, monkeypatch, capsys, name, version, needed
):
    pretend(monkeypatch, version)
    for asking in ("validate", "inspect"):
        assert command(asking, str(artifacts[name])) == 3
        (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
        assert re.search(
            rf"{version} is installed, >={needed} is needed: pip install 'onnx\S+>={needed}'$", line
        )
    with pytest.raises(ProviderUnavailableError, match=rf">={needed} is needed: pip install"):
        runtime.Decoder.open(artifacts[name])


@pytest.mark.parametrize(("name", "version"), [("ort", "1.24.4"), ("capped", "1.27.0")])
def test_an_artifact_runs_from_the_version_on_that_it_states(artifacts, monkeypatch, name, version):
    config = json.loads((artifacts[name] / "config.json").read_text())
    report = json.loads((artifacts[name] / "report.json").read_text())
    assert config["graph"]["onnxruntime"] == report["graph"]["onnxruntime"] == version[:4]
    monkeypatch.setattr(onnxruntime, "__version__", version)
    assert replay(artifacts[name]).passed
    assert command("inspect", str(artifacts[name])) == 0


def test_of_an_artifact_that_states_none_it_is_read_from_the_graph(capped, monkeypatch):
    stated(capped, None)
    assert replay(capped).passed
    monkeypatch.setattr(onnxruntime, "__version__", "1.26.0")
    with pytest.raises(ProviderUnavailableError, match=r"1\.26\.0 is installed, >=1\.27"):
        replay(capped)


def test_what_an_artifact_states_is_taken_at_its_word_if_it_is_a_version(capped):
    stated(capped, "99.1")
    with pytest.raises(ProviderUnavailableError, match=r">=99\.1 is needed"):
        runtime.Decoder.open(capped)
    for nonsense in ("soon", 1.27, "1", ""):
        stated(capped, nonsense)
        with pytest.raises(BadInputError, match=r"config\.json.*onnxruntime"):
            replay(capped)


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


def test_what_a_foreign_graph_asks_for_is_said_where_it_does_not_open(tmp_path, monkeypatch):
    node = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "", "", "last", "total"],
        ["y"],
        domain="com.microsoft",
        num_heads=2,
        kv_num_heads=2,
        causal=0,
    )
    path = graph(tmp_path)
    model = onnx.load(path)
    model.graph.node.append(node)  # of inputs that are not there: opens nowhere
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    with pytest.raises(RuntimeError):
        runtime.Session.open(path, "cpu")
    monkeypatch.setattr(onnxruntime, "__version__", "1.29.0")
    wanted = r"graph has GroupQueryAttention with causal; .* 1\.29\.0 is installed, >=1\.30"
    with pytest.raises(ProviderUnavailableError, match=wanted):
        runtime.Session.open(path, "cpu")


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


@pytest.mark.parametrize(
    ("version", "lacking"),
    [
        ("1.23.2", []),  # too old for all, which is said of the package
        ("1.24.4", ["Scan", "soft cap", "integers (>=1.27)", "sliding_window_cache", "causal"]),
        ("1.26.0", ["soft cap", "integers (>=1.27)", "sliding_window_cache", "causal (>=1.30)"]),
        ("1.29.0", ["causal (>=1.30)"]),
        ("1.31.1", []),
    ],
)
def test_doctor_says_what_a_supported_one_does_not_run(version, lacking):
    lines = list(required.limits(version))
    assert len(lines) == bool(lacking)
    for line in lines:
        assert f"later than {version}:" in line
        assert all(text in line for text in lacking)
        versions = re.findall(r">=1\.(\d\d)", line)
        assert versions == sorted(versions)
        assert min(versions) > version[2:4]
    assert findings.required is required
