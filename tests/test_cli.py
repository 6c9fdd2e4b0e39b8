"""The command line as scripts see it: exit codes, one line of error, nothing half written.

What is about processes runs in one of its own, the rest in this one, which has loaded PyTorch.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import COMMAND, SMALL

from rope_export.artifact import FORMAT

BLOCK = ("block", *SMALL)


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in result.stderr.splitlines() if line.startswith("rope-export: error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_block_then_validate(cli_here, tmp_path):
    result = cli_here(*BLOCK)
    assert result.returncode == 0, result.stderr
    assert "PASSED: 7 comparisons" in result.stdout
    assert "com.microsoft::GroupQueryAttention" in result.stdout
    assert "rope-export validate exported/block" in result.stdout
    assert " s  cpu: longest [1, 48]" in result.stderr
    files = {p.name for p in (tmp_path / "exported/block").iterdir()}
    vectors = {f"test_data_set_{k}" for k in range(7)}
    assert files == {"model.onnx", "config.json", "report.json", "report.md"} | vectors
    replayed = cli_here("validate", "exported/block")
    assert replayed.returncode == 0, replayed.stderr
    assert "PASSED: 7 comparisons" in replayed.stdout


def test_json_is_the_only_thing_on_stdout_and_is_the_report(cli, cli_here, tmp_path):
    result = cli(*BLOCK, "--json")
    document = json.loads(result.stdout)
    assert document.pop("path") == "exported/block"
    assert document == json.loads((tmp_path / "exported/block/report.json").read_text())
    assert document["passed"] is True
    assert document["providers"]["cpu"]["status"] == "ok"
    assert document["providers"]["cpu"]["nodes"] == {"CPUExecutionProvider": 10}
    assert document["graph"]["ops"]["com.microsoft::GroupQueryAttention"] == 1
    shapes = {(c["batch"], c["sequence"]) for c in document["cases"]}
    assert shapes == {(1, 1), (1, 13), (2, 7), (3, 33), (5, 32), (1, 25), (1, 48)}
    for case in document["cases"]:
        assert case["rel_error"] <= case["tolerance"]
        assert case["past"] == 0
    assert document["environment"]["tf32"] is False
    replayed = json.loads(cli_here("validate", "exported/block", "--json").stdout)
    assert replayed["passed"] is True
    assert len(replayed["cases"]) == len(document["cases"])


def test_scaling_from_the_line_and_from_a_file(cli_here, tmp_path):
    text = '{"rope_type": "yarn", "factor": 4, "rope_theta": 500.0, "partial_rotary_factor": 0.5}'
    (tmp_path / "rope.json").write_text(text)
    for number, argument in enumerate((text, "@rope.json")):
        out = f"out-{number}"
        result = cli_here(*BLOCK, "--head-dim", "32", "--scaling", argument, "--out", out)
        assert result.returncode == 0, result.stderr
        rope = json.loads((tmp_path / out / "config.json").read_text())["block"]["rope"]
        assert rope["dim"] == 16
        assert rope["theta"] == 500.0
        assert rope["attention_factor"] == pytest.approx(0.1 * math.log(4) + 1)
        assert rope["scaling"] == json.loads(text)
    assert tree(tmp_path / "out-0") == {
        name: data.replace(b"out-1", b"out-0") for name, data in tree(tmp_path / "out-1").items()
    }


def test_the_same_command_gives_the_same_bytes(cli, cli_here, tmp_path):
    """In another process, with other hashes."""
    here, there = (tmp_path / name for name in ("here", "there"))
    for folder in (here, there):
        folder.mkdir()
    assert cli_here(*BLOCK, cwd=here).returncode == 0
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    assert cli(*BLOCK, cwd=there, env=environment).returncode == 0
    assert tree(here) == tree(there)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--seq", "0"), ("--seq", "0")),
        (("--hidden", "-4"), ("--hidden", "-4")),
        (("--hidden", "1.5"), ("--hidden", "1.5")),
        (("--heads", "16", "--kv-heads", "3", "--hidden", "64"), ("--kv-heads", "16 and 3")),
        (("--hidden", "100", "--heads", "16", "--kv-heads", "16"), ("--hidden", "100 and 16")),
        (("--head-dim", "15"), ("--head-dim", "15")),
        (("--rotary-dim", "7"), ("--rotary-dim", "7")),
        (("--rotary-dim", "32"), ("--rotary-dim", "32 and 16")),
        (("--theta", "nan"), ("--theta", "nan")),
        (("--theta", "inf"), ("--theta", "inf")),
        (("--theta", "0"), ("--theta", "0.0")),
        (("--theta=-1",), ("--theta", "-1.0")),
        (("--dtype", "int8"), ("--dtype", "int8", "float16")),
        (("--dtype", "bfloat16"), ("--dtype bfloat16", "no bfloat16 kernel", "cuda alone")),
        (("--provider", "tpu"), ("--provider", "tpu", "cuda")),
        (("--target", "tflite"), ("--target", "tflite", "primitive")),
        (("--scaling", "{"), ("--scaling", "'{' is not JSON")),
        (("--scaling", "[1]"), ("--scaling", "'[1]' is not a JSON object")),
        (("--scaling", "@nowhere.json"), ("--scaling", "@nowhere.json", "No such file")),
        (("--scaling", '{"rope_type": "warp"}'), ("--scaling['rope_type']", "yarn", "'warp'")),
        (("--scaling", '{"rope_type": "linear"}'), ("--scaling", "'linear' needs 'factor'")),
        (
            ("--scaling", '{"rope_type": "default", "rope_theta": 5}', "--theta", "6"),
            ("--scaling['rope_theta']", "--theta", "5 and 6"),
        ),
        (
            ("--scaling", '{"rope_type": "default", "partial_rotary_factor": 2}'),
            ("--scaling['partial_rotary_factor']", "2"),
        ),
        (("--layout", "mixed"), ("--layout", "mixed", "interleaved")),
        (("--batch", "2"), ("--batch 2", "--static")),
        (("--hidden", "1048576", "--heads", "16384", "--kv-heads", "1"), ("--hidden", "GiB")),
        (("--out", "a-file"), ("a-file", "not a folder")),
        (("--out", "a-file/below"), ("a-file/below", "not a folder")),
        (("--out", "."), ("is the current folder",)),
        (("--out", "/proc/nowhere"), ("/proc/nowhere", "cannot be written")),
        (("--no-such-option",), ("--no-such-option",)),
        (("surplus",), ("surplus",)),
    ],
)
def test_bad_input_is_one_line_and_exit_2(cli_here, tmp_path, arguments, says):
    (tmp_path / "a-file").write_text("precious")
    result = cli_here(*BLOCK, *arguments)
    assert result.returncode == 2, result.stderr
    line = error_line(result)
    for part in says:
        assert part in line
    assert result.stdout == ""
    assert tree(tmp_path) == {"a-file": b"precious"}


def test_a_provider_that_does_not_load_is_exit_3(
    cli_here, tmp_path, artifact_of_block, without_cuda
):
    result = cli_here(*BLOCK, "--provider", "cuda")
    assert result.returncode == 3
    assert without_cuda in error_line(result)
    assert tree(tmp_path) == {}
    replayed = cli_here("validate", str(artifact_of_block.path), "--provider", "cuda")
    assert replayed.returncode == 3
    assert without_cuda in error_line(replayed)


@pytest.mark.usefixtures("without_cuda")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_graph_for_cuda_can_be_made_without_cuda(cli_here, tmp_path, dtype):
    result = cli_here(*BLOCK, "--provider", "cuda", "--dtype", dtype, "--no-validate")
    assert result.returncode == 0, result.stderr
    assert "NOT VALIDATED" in result.stdout
    report = json.loads((tmp_path / "exported/block/report.json").read_text())
    assert report["passed"] is False
    assert report["validated"] is False
    assert report["graph"]["providers"] == ["cuda"]
    assert report["graph"]["ops"]["com.microsoft::GroupQueryAttention"] == 1
    replayed = cli_here("validate", "exported/block")
    if (
        dtype == "float16"
    ):  # the same operator exists on the CPU: CUDA is unavailable, the CPU proves
        assert replayed.returncode == 0, replayed.stderr
        assert "unavailable: onnxruntime" in replayed.stdout
    else:
        assert replayed.returncode == 3
        assert "no bfloat16 kernel" in error_line(replayed)


# A native call like a kernel's, deaf to signals, which would go on for minutes.
ENDLESS_KERNEL = """
import hashlib
import onnxruntime
def run(*_, **__):
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
onnxruntime.InferenceSession.run = run
onnxruntime.InferenceSession.run_with_iobinding = run
"""


@pytest.mark.parametrize(
    ("signum", "during", "before_it"),
    [
        (signal.SIGTERM, "tracing", ""),
        (signal.SIGHUP, "tracing", ""),
        (signal.SIGINT, "cpu: one token", ENDLESS_KERNEL),
    ],
    ids=["SIGTERM", "SIGHUP", "SIGINT in a kernel"],
)
def test_an_interruption_keeps_the_earlier_artifact_and_nothing_else(
    tmp_path, artifact_of_block, signum, during, before_it
):
    shutil.copytree(artifact_of_block.path, tmp_path / "exported/block")
    before = tree(tmp_path)
    process = subprocess.Popen(
        [*COMMAND[:2], before_it + COMMAND[2], *BLOCK],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # These tests may run where it is ignored: under nohup, or in the background of a script.
        preexec_fn=lambda: signal.signal(signum, signal.SIG_DFL),
    )
    try:
        assert process.stderr is not None
        assert any(during in line for line in process.stderr)
        time.sleep(0.5)  # into it
        process.send_signal(signum)
        started = time.monotonic()
        _, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signum
    assert "interrupted; nothing was written" in rest
    assert time.monotonic() - started < 30
    assert tree(tmp_path) == before


def test_a_full_disk_keeps_the_earlier_artifact_and_nothing_else(cli, tmp_path, artifact_of_block):
    shutil.copytree(artifact_of_block.path, tmp_path / "exported/block")
    before = tree(tmp_path)

    def small_files_only() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    result = cli(*BLOCK, preexec_fn=small_files_only)
    assert result.returncode == 2, result.stderr
    assert "nothing was written" in error_line(result)
    assert tree(tmp_path) == before


def test_a_reader_that_has_gone_is_not_a_failed_comparison(tmp_path):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end) as gone:
        result = subprocess.run(
            [*COMMAND, *BLOCK], cwd=tmp_path, stdout=gone, stderr=subprocess.PIPE, check=False
        )
    assert result.returncode == 128 + signal.SIGPIPE
    assert b"Traceback" not in result.stderr
    assert (tmp_path / "exported/block/report.json").exists()


def test_output_that_cannot_be_printed_says_where_the_artifact_is(cli, tmp_path):
    with Path("/dev/full").open("w") as full:
        result = cli(*BLOCK, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 2
    assert "No space left on device; the artifact is at exported/block" in error_line(result)
    assert (tmp_path / "exported/block/report.json").exists()


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("..", "is the current folder, or above it"),
        (os.fsdecode(b"\xff"), "no valid text in this locale"),
    ],
)
def test_destinations_that_cannot_be(cli_here, out, says):
    result = cli_here(*BLOCK, "--out", out)
    assert result.returncode == 2
    assert says in error_line(result)


def test_an_artifact_is_no_place_for_another(cli_here, tmp_path, artifact_of_block):
    shutil.copytree(artifact_of_block.path, tmp_path / "exported/block")
    before = tree(tmp_path)
    assert "is an artifact itself" in error_line(cli_here(*BLOCK, "--out", "exported/block/inner"))
    assert "current folder" in error_line(
        cli_here(*BLOCK, "--out", ".", cwd=tmp_path / "exported/block")
    )
    assert tree(tmp_path) == before


def test_the_effective_options_are_kept(cli_here, tmp_path):
    assert cli_here(*BLOCK, "--theta", "500", "--seed", "4").returncode == 0
    config = json.loads((tmp_path / "exported/block/config.json").read_text())
    assert config["options"]["theta"] == 500
    assert config["options"]["seed"] == 4
    assert config["options"]["target"] == "ort"
    assert {"rope_export", "torch", "onnx", "onnxscript"} <= config["versions"].keys()


def test_an_earlier_artifact_is_replaced_whole(cli_here, tmp_path, artifact_of_block):
    shutil.copytree(artifact_of_block.path, tmp_path / "exported/block")
    assert cli_here(*BLOCK, "--static").returncode == 0
    names = {p.name for p in (tmp_path / "exported/block").iterdir()}
    assert {n for n in names if n.startswith("test_data")} == {
        f"test_data_set_{k}" for k in range(3)
    }
    assert [p.name for p in (tmp_path / "exported").iterdir()] == ["block"]


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


def test_validate_needs_no_torch(tmp_path, artifact_of_block):
    code = (
        "import sys; sys.modules['torch'] = None\n"  # any import of torch now fails
        "from rope_export._cli import run\n"
        f"run(['validate', {str(artifact_of_block.path)!r}, '--json'])"
    )
    command = [COMMAND[0], "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["environment"]["torch"] is None


@pytest.mark.parametrize("arguments", [("--help",), ("block", "--help"), ("validate", "--help")])
def test_help_answers_without_heavy_imports(tmp_path, arguments):
    code = (
        "import sys\n"
        "heavy = ('torch', 'onnx', 'onnxruntime', 'numpy')\n"
        "for name in heavy: sys.modules[name] = None\n"
        "from rope_export._cli import run\n"
        f"run({list(arguments)!r})"
    )
    command = [COMMAND[0], "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Usage: rope-export" in result.stdout
    if arguments != ("--help",):
        assert "Example" in result.stdout


def test_no_command_shows_the_help(cli_here):
    result = cli_here()
    assert result.returncode == 2
    assert "Commands:" in result.stderr


@pytest.fixture
def without_cuda() -> str:
    """Why CUDA is unavailable here; on a machine with CUDA these tests have nothing to say."""
    from rope_export import runtime

    reason = runtime.unavailable_reason("cuda")
    assert reason is not None, "run the tests of missing CUDA on a machine without it"
    return " ".join(reason.split())
