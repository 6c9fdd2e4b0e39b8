"""`rope-export module` runs the user's own code: where it finds it, and what that may do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import COMMAND

USER = """
import os
import subprocess
import sys

import torch
from torch import nn

print("printed by the file")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x)


class Leaving(Model):
    def forward(self, x):
        sys.exit(7)


class Batched(Model):
    def forward(self, x):
        return self.linear(x).reshape(2, -1)


def factory():
    torch.manual_seed(0)
    return Model(), torch.randn(2, 5, 4)


def shouting():
    os.write(1, b"written to the descriptor\\n")
    subprocess.run(["echo", "printed by a child"], check=True)
    print("printed to the real stdout", file=sys.__stdout__)
    return factory()


def leaving():
    return Leaving(), torch.randn(2, 5, 4)


def batched():
    return Batched(), torch.randn(2, 5, 4)


def with_argument(path):
    return factory()


class Models:
    @staticmethod
    def small():
        return factory()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "user.py").write_text(USER)
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("from user import factory\n")
    (package / "models.py").write_text("from package import factory as made\n")
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


# Commands one after the other in one process, since loading PyTorch takes longer than they do.
MANY = """
import contextlib, io, json
from rope_export._cli import run
for arguments in {cases!r}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run(["module", *arguments])
        except SystemExit as left:
            code = left.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def error_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("rope-export: error: ")]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0].removeprefix("rope-export: error: ")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_stdout_is_the_report_whatever_is_printed(folder):
    options = ("--dynamic", "x:0=batch", "--dynamic", "x:-2=length", "--range", "length=2:40")
    result = run(folder, "user.py:shouting", *options, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["passed"]
    assert report["graph"]["ranges"] == {"batch": [1, None], "length": [2, 40]}
    assert {case["sequence"] for case in report["cases"]} >= {2, 13, 40}
    for said in ("by the file", "to the descriptor", "by a child", "to the real stdout"):
        assert said in result.stderr


def test_the_same_bytes_anywhere_replayed_without_torch(folder, tmp_path_factory):
    other = Path(shutil.copytree(folder, tmp_path_factory.mktemp("other") / "x"))
    for place, seed in ((folder, "1"), (other, "2")):
        options = ("--target", "primitive", "--dynamic", "x:0=n")
        result = run(place, "package.models:made", *options, PYTHONHASHSEED=seed)
        assert result.returncode == 0, result.stderr
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
    "package:factory": "package",
    "user:factory": "user",
    "./user.py:Models.small": "user",
    "package/models.py:made": "models",
}


def test_where_factories_are_and_what_their_artifacts_are_called(folder):
    code = (
        "from rope_export._cli.factory import name_of, request_of\n"
        f"for name in {list(FACTORIES)!r}:\n"
        "    request = request_of(name)\n"
        "    print(name, name_of(name), type(request['module']).__name__, len(request['args']))"
    )
    result = in_python(folder, code)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if not line.startswith("printed")]
    assert lines == [f"{name} {called} Model 1" for name, called in FACTORIES.items()]


def test_what_the_user_is_told(folder):
    (folder / "taken").write_text("precious")
    told = {
        ("user.py:with_argument",): "must be a function without arguments: missing a required",
        ("user.py:leaving",): "its module raises SystemExit: 7",
        ("user.py:batched", "--dynamic", "x:0=batch"): "Batched works with size 2 only",
        ("user.py:factory", "--dynamic", "x:1=2*n", "--range", "2*n=2:8"): "got '2*n'",
        ("user.py:factory", "--dynamic", "x:0=b", "--range", "b=:1"): "at most 1, and is 2 in",
        ("user.py:factory", "--out", "."): "is the current folder",
        ("user.py:factory", "--out", "taken"): "taken: is not a folder",
        ("user.py:factory", "--out", "package"): "not part of an artifact",
    }
    before = tree(folder)
    result = in_python(folder, MANY.format(cases=list(told)))
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    for (arguments, says), (code, out, err) in zip(told.items(), answers, strict=True):
        assert code == 2, err
        assert says in error_line(err)
        assert out == ""
        if "--out" in arguments:  # before the file is run
            assert "running" not in err
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
        f"run(['module', 'user.py:factory', *{arguments!r}])"
    )
    result = in_python(folder, code)
    assert result.returncode == 2, result.stderr
    assert says in error_line(result.stderr)
    assert result.stdout == ""


def test_a_provider_that_does_not_load_is_exit_3(folder):
    from rope_export import runtime

    if runtime.unavailable_reason("cuda") is None:
        pytest.skip("CUDA loads here")
    before = tree(folder)
    result = run(folder, "user.py:factory", "--provider", "cuda")
    assert result.returncode == 3, result.stderr
    assert "cuda" in error_line(result.stderr)
    assert "running" not in result.stderr
    assert tree(folder) == before
