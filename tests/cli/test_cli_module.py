"""`rope-export module`: the user's own function, what it may do, exit codes, one line of error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from commands import COMMAND, Run
from rope_export._cli.factory import name_of, request_of

from rope_export import runtime

USER = """
import os
import subprocess
import sys

import torch
from sibling import WIDTH
from torch import nn

from rope_export import Attention, RotaryEmbedding

print("printed by the file")



class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x)


class Leaving(Plain):
    def forward(self, x):
        sys.exit(7)


class Batched(Plain):
    def forward(self, x):
        return self.linear(x).reshape(2, -1)


def plain():
    torch.manual_seed(0)
    return Plain(), torch.randn(2, 5, 4)


def shouting():
    os.write(1, b"written to the descriptor\\n")
    subprocess.run(["echo", "printed by a child"], check=True)
    print("printed to the real stdout", file=sys.__stdout__)
    return plain()


def with_a_module_that_leaves():
    return Leaving(), torch.randn(2, 5, 4)


def batched():
    return Batched(), torch.randn(2, 5, 4)


def with_argument(path):
    return plain()


class Models:
    @staticmethod
    def small():
        return plain()



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
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("from user import plain\n")
    (package / "models.py").write_text("from package import plain as made\n")
    return tmp_path


def in_python(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND[0], "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"from rope_export._cli import run; run(['module', *{arguments!r}])"
    return in_python(folder, code, **environment)


def error_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("rope-export: error: ")]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0].removeprefix("rope-export: error: ")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def run_here(folder: Path, cli_here: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run the command in this process, and forget the modules that it loads."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield partial(cli_here, "module", cwd=folder)
    for name in {"user", "sibling", "broken", "other", "package", "package.models"} & (
        set(sys.modules) - before
    ):
        del sys.modules[name]


def test_a_file_is_exported_and_proven(folder, run_here):
    result = run_here("user.py:factory", *DYNAMIC, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert "printed by the file" in result.stderr
    assert report["passed"]
    assert report["graph"]["ranges"] == {"batch": [1, None], "sequence": [1, 40]}
    assert {"one token", "longest"} <= {case["name"] for case in report["cases"]}
    artifact = folder / "exported" / "user"
    assert report["path"] == str(artifact.relative_to(folder))
    assert str(folder) not in (artifact / "config.json").read_text()


def test_a_module_is_found_by_its_name(folder, run_here):
    result = run_here("user:with_shapes", "--target=onnx", "--no-validate", "--out=here/x")
    assert result.returncode == 0, result.stderr
    assert "NOT VALIDATED" in result.stdout
    config = json.loads((folder / "here" / "x" / "config.json").read_text())
    assert config["module"]["inputs"] == {"input_ids": ["1", "sequence"]}


def test_a_mapping_says_what_export_is_given(folder, run_here):
    assert run_here("user.py:as_mapping", "--no-validate").returncode == 0
    config = json.loads((folder / "exported" / "user" / "config.json").read_text())
    assert config["module"]["outputs"] == {"scores": ["1", "7", "32"]}


def test_stdout_is_the_report_whatever_is_printed(run_here):
    options = ("--dynamic", "x:0=batch", "--dynamic", "x:-2=length", "--range", "length=2:40")
    result = run_here("user.py:shouting", *options, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["passed"]
    assert report["graph"]["ranges"] == {"batch": [1, None], "length": [2, 40]}
    assert {case["sequence"] for case in report["cases"]} >= {2, 13, 40}
    for said in ("by the file", "to the descriptor", "by a child", "to the real stdout"):
        assert said in result.stderr


@pytest.mark.slow
def test_the_same_bytes_anywhere_replayed_without_torch(folder, run_here, tmp_path_factory):
    other = Path(shutil.copytree(folder, tmp_path_factory.mktemp("other") / "x"))
    given = ("package.models:made", "--target", "primitive", "--dynamic", "x:0=n")
    for result in (run_here(*given), run(other, *given, PYTHONHASHSEED="2")):
        assert result.returncode == 0, result.stderr
    for place in (folder, other):
        assert [path.name for path in (place / "exported").iterdir()] == ["models"]
    made = tree(folder / "exported")
    assert made == tree(other / "exported")
    assert not [name for name, content in made.items() if str(folder).encode() in content]
    options = json.loads(made["models/config.json"])["options"]
    assert options["factory"] == "package.models:made"
    result = in_python(
        folder,
        "import sys; sys.modules['torch'] = None\n"
        "from rope_export._cli import run\n"
        "run(['validate', 'exported/models', '--json'])",
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["passed"]


FACTORIES = {
    "package.models:made": "models",
    "package:plain": "package",
    "user:plain": "user",
    "./user.py:Models.small": "user",
    "package/models.py:made": "models",
}


@pytest.mark.usefixtures("run_here")
def test_where_factories_are_and_what_their_artifacts_are_called(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for name, called in FACTORIES.items():
        request = request_of(name)
        assert name_of(name) == called
        assert type(request["module"]).__name__ == "Plain"
        assert len(request["args"]) == 1


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
        (["user.py:with_argument"], "must be a function without arguments: missing a required"),
        (
            ["user.py:with_a_module_that_leaves"],
            "`sys.exit(7)` raises SystemExit at the example inputs: 7",
        ),
        (["user.py:batched", "--dynamic", "x:0=batch"], "Batched works with size 2 only"),
        (["user.py:plain", "--dynamic", "x:1=2*n", "--range", "2*n=2:8"], "got '2*n'"),
        (["user.py:plain", "--dynamic", "x:0=b", "--range", "b=:1"], "at most 1, and is 2 in"),
        (["user.py:plain", "--out", "."], "is the current folder"),
        (["user.py:plain", "--out", "sibling.py"], "sibling.py: is not a folder"),
        (["user.py:plain", "--out", "package"], "not part of an artifact"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_2(folder, run_here, arguments, says):
    before = tree(folder)
    result = run_here(*arguments)
    assert result.returncode == 2
    assert says in error_line(result.stderr)
    assert result.stdout == ""
    if "--out" in arguments:  # before the file is run
        assert "running" not in result.stderr
    assert tree(folder) == before


USAGE = [
    (["--dynamic", "x:0=b", "--dynamic", "x:0=c"], "--dynamic x:0=c: x:0 is given twice"),
    (["--dynamic", "x:0=b", "--range", "b=1:4", "--range", "b=:5"], "--range b=:5: b is given"),
    (["--dynamic", "x:0=b", "--range", "b=1:1"], "--range b=1:1: is one size"),
    (["--dynamic", "x:0=b", "--range", "b=0:0"], "--range b=0:0: is one size"),
    (["--dynamic", "x:0=b", "--range", "b=-1:3"], "--range b=-1:3: must be LABEL=MIN:MAX"),
    (["--dynamic", "x:0=b", "--range", "b=:"], "--range b=:: must be LABEL=MIN:MAX"),
    (["--dynamic", "x:=b"], "--dynamic x:=b: must be NAME:AXIS=LABEL"),
    (["--dynamic", "x:0="], "--dynamic x:0=: must be NAME:AXIS=LABEL"),
    (["--seq", "0"], "--seq"),
    (["--padding", "top"], "--padding"),
    (["surplus"], "surplus"),
]


@pytest.mark.parametrize(("arguments", "says"), USAGE, ids=lambda v: v[-1] if v else "")
def test_wrong_options_are_refused_before_anything_is_run(folder, arguments, says):
    """Not even PyTorch is loaded, nor is the user's file."""
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxruntime', 'numpy'): sys.modules[name] = None\n"
        "from rope_export._cli import run\n"
        f"run(['module', 'user.py:plain', *{arguments!r}])"
    )
    result = in_python(folder, code)
    assert result.returncode == 2, result.stderr
    assert says in error_line(result.stderr)
    assert result.stdout == ""


def test_a_provider_that_does_not_load_is_exit_3(folder):
    if runtime.unavailable_reason("cuda") is None:
        pytest.skip("CUDA loads here")
    before = tree(folder)
    result = run(folder, "user.py:plain", "--provider", "cuda")
    assert result.returncode == 3, result.stderr
    assert "cuda" in error_line(result.stderr)
    assert "running" not in result.stderr
    assert tree(folder) == before


def test_a_defect_is_exit_1(folder, run_here):
    """A module that is another at one token, which its graph is not."""
    (folder / "other.py").write_text(
        "import torch\n"
        "class Model(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x * 2 if x.shape[1] == 1 else x\n"
        "def factory():\n"
        "    return Model(), torch.randn(2, 5)\n"
    )
    result = run_here("other.py:factory", "--dynamic", "x:1=length")
    assert result.returncode == 1
    assert "FAILED       cpu: one token [2, 1]" in result.stdout
    report = json.loads((folder / "exported" / "other" / "report.json").read_text())
    assert report["passed"] is False


def test_help_names_every_key_that_a_factory_may_return():
    result = subprocess.run(
        [*COMMAND, "module", "--help"], capture_output=True, text=True, check=True
    )
    lines = [line.strip() for line in result.stdout.splitlines()]
    explained = [line.partition("  ")[0].split(", ") for line in lines if "  " in line]
    keys = {key for found in explained for key in found}
    assert {"module", "args", "kwargs", "dynamic_shapes", "inputs", "output_names"} <= keys
    assert "numpy.random.Generator" in result.stdout


def test_help_needs_no_torch(folder):
    check = "import sys; from rope_export._cli.main import main\n"
    check += "try: main(['module', '--help'])\n"
    check += "except SystemExit: assert 'torch' not in sys.modules"
    result = subprocess.run(
        [COMMAND[0], "-c", check], cwd=folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "NAME:AXIS=LABEL" in result.stdout
