"""`rope-export module`: the user's own function, exit codes, and one line of error."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import COMMAND
from rope_export._cli import run as run_command

USER = """
import sys

import torch
from sibling import WIDTH
from torch import nn

from rope_export import Attention, RotaryEmbedding

print("from the user's file")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        rope = RotaryEmbedding(16, layout="half", max_seq_len=40)
        self.embedding = nn.Embedding(11, WIDTH)
        self.attention = Attention(WIDTH, 2, rope=rope)

    def forward(self, input_ids):
        return {"logits": self.attention(self.embedding(input_ids))}


class Choosing(Model):
    def forward(self, input_ids):
        if input_ids.sum() > 5:
            return self.embedding(input_ids)
        return -self.embedding(input_ids)


def ids():
    return torch.randint(0, 11, (1, 7))


def factory():
    torch.manual_seed(0)
    return Model(), {"input_ids": ids()}


def with_shapes():
    return Model(), (ids(),), {"input_ids": {1: "sequence"}}


def as_mapping():
    return {"module": Model(), "args": (ids(),), "output_names": ["scores"]}


def choosing():
    return Choosing(), ids()


def raising():
    raise RuntimeError("no weights here")


def leaving():
    sys.exit("bye")


def alone():
    return Model()


def none():
    return None


def of_text():
    return "model", ids()


def unknown_key():
    return {"module": Model(), "arguments": (ids(),)}


number = 3

if __name__ == "__main__":
    raise SystemExit("this must not run")
"""
DYNAMIC = ("--dynamic", "input_ids:0=batch", "--dynamic", "input_ids:1=sequence")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "sibling.py").write_text("WIDTH = 32\n")
    (tmp_path / "broken.py").write_text("def factory(:\n")
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "module", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def run_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Run the command in this process, which has loaded PyTorch; the exit code."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def run_here(*arguments: str) -> int:
        with pytest.raises(SystemExit) as stopped:
            run_command(["module", *arguments])
        assert isinstance(stopped.value.code, int)
        return stopped.value.code

    yield run_here
    for name in {"user", "sibling", "broken"} & (set(sys.modules) - before):
        del sys.modules[name]


def test_a_file_is_exported_and_proven(folder):
    result = run(folder, "user.py:factory", *DYNAMIC, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)  # what the file prints is not on stdout
    assert "from the user's file" in result.stderr
    assert report["passed"]
    assert report["graph"]["ranges"] == {"batch": [1, None], "sequence": [1, 40]}
    assert {"one token", "longest"} <= {case["name"] for case in report["cases"]}
    artifact = folder / "exported" / "user"
    assert report["path"] == str(artifact.relative_to(folder))
    assert str(folder) not in (artifact / "config.json").read_text()
    replayed = subprocess.run(
        [*COMMAND, "validate", str(artifact)], capture_output=True, text=True, check=False
    )
    assert replayed.returncode == 0, replayed.stderr


def test_a_module_is_found_by_its_name(folder):
    result = run(folder, "user:with_shapes", "--target=onnx", "--no-validate", "--out=here/x")
    assert result.returncode == 0, result.stderr
    assert "NOT VALIDATED" in result.stdout
    config = json.loads((folder / "here" / "x" / "config.json").read_text())
    assert config["module"]["inputs"] == {"input_ids": ["1", "sequence"]}


def test_a_mapping_says_what_export_is_given(folder):
    result = run(folder, "user.py:as_mapping", "--no-validate")
    assert result.returncode == 0, result.stderr
    config = json.loads((folder / "exported" / "user" / "config.json").read_text())
    assert config["module"]["outputs"] == {"scores": ["1", "7", "32"]}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["user.py"], "must be FILE.py:FACTORY or package.module:FACTORY"),
        (["missing.py:factory"], "missing.py: does not exist"),
        (["no.such.module:factory"], "raises ModuleNotFoundError: No module named 'no'"),
        (["broken.py:factory"], "broken.py:1 raises SyntaxError"),
        (["user.py:nothing"], "has no 'nothing'; it has "),
        (["user.py:number"], "must be a function without arguments, got int"),
        (["user.py:raising"], "raises RuntimeError: no weights here"),
        (["user.py:leaving"], "raises SystemExit: bye"),
        (["user.py:alone"], "must return (module, example inputs)"),
        (["user.py:none"], "got NoneType"),
        (["user.py:of_text"], "must return a torch.nn.Module first, got str"),
        (["user.py:unknown_key"], "got a mapping with 'arguments'"),
        (["user.py:choosing", *DYNAMIC], "`if input_ids.sum() > 5:` depends on the values"),
        (["user.py:factory", "--dynamic", "input_ids=batch"], "must be NAME:AXIS=LABEL"),
        (["user.py:factory", "--dynamic", "ids:0=batch"], "--dynamic must name inputs of Model"),
        (["user.py:factory", "--dynamic", "input_ids:2=batch"], "one of its 2 axes, got 2"),
        (["user.py:factory", "--dynamic", "input_ids:0=b-"], "--dynamic must label an axis with"),
        (["user.py:factory", "--range", "sequence=1:9"], "give --dynamic too"),
        (["user.py:factory", *DYNAMIC, "--range", "rows=1:9"], "--range must be of a label"),
        (["user.py:factory", *DYNAMIC, "--range", "batch=9:1"], "MAX must be at least MIN"),
        (["user.py:factory", *DYNAMIC, "--range", "batch"], "must be LABEL=MIN:MAX"),
        (["user.py:with_shapes", *DYNAMIC], "give one"),
        (["user.py:factory", *DYNAMIC, "--seq", "41"], "--seq must be at most the 40 positions"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_2(folder, run_here, capfd, arguments, says):
    before = sorted(folder.iterdir())
    assert run_here(*arguments) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("rope-export: error: ")]
    assert len(lines) == 1, err
    assert says in lines[0]
    assert "Traceback" not in err
    assert out == ""
    after = [path for path in sorted(folder.iterdir()) if path.name != "__pycache__"]
    assert after == before


def test_a_defect_is_exit_1(folder):
    """A module that is another at one token, which its graph is not."""
    (folder / "other.py").write_text(
        "import torch\n"
        "class Model(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x * 2 if x.shape[1] == 1 else x\n"
        "def factory():\n"
        "    return Model(), torch.randn(2, 5)\n"
    )
    result = run(folder, "other.py:factory", "--dynamic", "x:1=length")
    assert result.returncode == 1, result.stderr
    assert "FAILED       cpu: one token [2, 1]" in result.stdout
    report = json.loads((folder / "exported" / "other" / "report.json").read_text())
    assert report["passed"] is False


def test_help_needs_no_torch(folder):
    check = "import sys; from rope_export._cli.main import main\n"
    check += "try: main(['module', '--help'])\n"
    check += "except SystemExit: assert 'torch' not in sys.modules"
    result = subprocess.run(
        [COMMAND[0], "-c", check], cwd=folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "NAME:AXIS=LABEL" in result.stdout
