"""The command line as scripts see it: exit codes, one line of error, nothing half written."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import COMMAND, SMALL, error_line

BLOCK = ("block", *SMALL)


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


@pytest.fixture(scope="module")
def elsewhere(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """What the command says in JSON, and where it ran: in another process, with other hashes."""
    folder = tmp_path_factory.mktemp("elsewhere")
    result = subprocess.run(
        [*COMMAND, *BLOCK, "--json"],
        cwd=folder,
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result, folder


def test_json_is_the_only_thing_on_stdout_and_is_the_report(elsewhere, cli_here):
    result, folder = elsewhere
    document = json.loads(result.stdout)
    assert document.pop("path") == "exported/block"
    assert document == json.loads((folder / "exported/block/report.json").read_text())
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
    replayed = json.loads(cli_here("validate", "exported/block", "--json", cwd=folder).stdout)
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


def test_the_same_command_gives_the_same_bytes(elsewhere, cli_here, tmp_path):
    assert cli_here(*BLOCK).returncode == 0
    assert tree(tmp_path) == tree(elsewhere[1])


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
        pytest.param(signal.SIGTERM, "tracing", "", marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, "tracing", "", marks=pytest.mark.slow),
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


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """As on a full disk, no file of this process may grow beyond 20 kB."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_keeps_the_earlier_artifact_and_nothing_else(
    cli_here, tmp_path, artifact_of_block, request
):
    shutil.copytree(artifact_of_block.path, tmp_path / "exported/block")
    before = tree(tmp_path)
    request.getfixturevalue("small_files_only")
    result = cli_here(*BLOCK)
    assert result.returncode == 2, result.stderr
    assert "nothing was written" in error_line(result)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "arguments", [("validate", "exported/block"), pytest.param(BLOCK, marks=pytest.mark.slow)]
)
def test_a_reader_that_has_gone_is_not_a_failed_comparison(tmp_path, artifact_of_block, arguments):
    if arguments != BLOCK:
        shutil.copytree(artifact_of_block.path, tmp_path / "exported/block")
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end) as gone:
        result = subprocess.run(
            [*COMMAND, *arguments], cwd=tmp_path, stdout=gone, stderr=subprocess.PIPE, check=False
        )
    assert result.returncode == 128 + signal.SIGPIPE
    assert b"Traceback" not in result.stderr
    assert (tmp_path / "exported/block/report.json").exists()


@pytest.mark.slow
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


def test_a_cache_of_integers_is_said_with_what_it_costs(cli_here):
    result = cli_here(*BLOCK, "--cache", "--cache-dtype", "int4", "--target", "primitive")
    assert result.returncode == 0, result.stderr
    # Two heads of sixteen, keys and values.
    assert "cache        int4, 32 bytes a token (in float32 256)" in result.stdout
    assert "loss         the integer cache changes the output by " in result.stdout
    assert "note         the scales of the cache were chosen by random" in result.stdout
    replayed = cli_here("validate", "exported/block", "--json")
    assert replayed.returncode == 0, replayed.stderr
    cases = json.loads(replayed.stdout)["cases"]
    assert all(("loss" in case) == (case["tensor"] == "output") for case in cases)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--cache-dtype", "int8"), "--cache-dtype int8 needs --cache, got it without"),
        (
            ("--cache", "--cache-dtype", "int8", "--dtype", "float16"),
            "--cache-dtype needs float32 weights, got float16",
        ),
        (
            ("--cache", "--cache-dtype", "int4", "--head-dim", "15", "--rotary-dim", "8"),
            "--head-dim must be even with --cache-dtype int4, two channels to a byte, got 15",
        ),
    ],
)
def test_a_cache_of_integers_that_cannot_be_is_refused(cli_here, tmp_path, options, said):
    result = cli_here(*BLOCK, *options)
    assert result.returncode == 2
    assert said in error_line(result)
    assert not (tmp_path / "exported").exists()


def test_no_other_integers_are_offered(cli_here):
    result = cli_here(*BLOCK, "--cache", "--cache-dtype", "int2")
    assert result.returncode == 2
    assert "'int8', 'int4'" in error_line(result)
