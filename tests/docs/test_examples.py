"""The examples run as their README says, on the embedded model, and print what the adapters answer."""

import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from engine import batch
from scheduler.sim.planner import command
from tests.docs.pages import ROOT, read_page
from tests.e2e.peer_server import Server, serving

EXAMPLES = ROOT / "examples"
LONGEST_S = 240


def run(program: Path) -> str:
    """What a program prints, run at the project's root with this environment's `python`."""
    bin_folder = str(Path(sys.executable).parent)
    path = os.pathsep.join([bin_folder, os.environ.get("PATH", os.defpath)])
    environment = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [program], cwd=ROOT, env=environment, timeout=LONGEST_S, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def run_here(program: Path, *arguments: str, patch: pytest.MonkeyPatch) -> str:
    """What a program of Python prints, run in this process, which has imported its libraries."""
    patch.setattr(sys, "argv", [str(program), *arguments])
    with redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(program), run_name="__main__")
    return printed.getvalue()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that speaks HTTP and gRPC."""
    with serving(tmp_path_factory.mktemp("server"), "--grpc-port", "0") as started:
        yield started


@pytest.mark.slow
def test_two_adapters_and_the_base_answer_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = run_here(EXAMPLES / "two_adapters.py", patch=monkeypatch)
    assert printed.splitlines() == ["reverse: nedrag", "upper: GARDEN", "base: garden"]


@pytest.mark.slow
def test_every_line_of_the_batch_is_answered_by_its_adapter(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    assert batch.main(["-i", str(EXAMPLES / "batch.jsonl"), "-o", str(results), "--no-progress"]) == 0
    answers = {
        result["custom_id"]: result["response"]["body"]["choices"][0]["message"]["content"]
        for result in map(json.loads, results.read_text().splitlines())
    }
    assert answers == {"reversed": "nedrag", "capitals": "GARDEN", "next": "1042", "base": "garden"}


@pytest.mark.slow
def test_the_trace_is_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--adapters", "20", "--slo-ttft", "2", "--slo-tbt", "0.1", "--policies", "ours"]
    assert command.main(["plan", "--trace", str(EXAMPLES / "trace.csv"), *asked]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nodes needed: 1"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="two_nodes.sh asks with curl")
def test_the_second_of_two_nodes_answers_for_the_adapter_that_it_pulled() -> None:
    printed = run(EXAMPLES / "two_nodes.sh")
    assert printed.splitlines() == [
        "the second node, pulling: nedrag",
        "the second node, alone: tenalp",
    ]


@pytest.mark.slow
def test_the_client_lists_the_models_and_prints_whole_and_streamed_answers(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = run_here(EXAMPLES / "openai_client.py", server.url, patch=monkeypatch)
    models, *answers = printed.splitlines()
    assert {"demo", "reverse", "upper"} <= set(models.removeprefix("models:").split())
    assert answers == ["reverse: nedrag", "upper: GARDEN"]


@pytest.mark.slow
def test_the_grpc_client_lists_the_adapters_and_prints_answers_and_a_refusal(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = run_here(EXAMPLES / "grpc_client.py", server.rpc_address, patch=monkeypatch)
    adapters, *answers = printed.splitlines()
    assert {"reverse", "upper"} <= set(adapters.removeprefix("adapters:").split())
    assert answers == ["reverse: nedrag", "upper: GARDEN", "nobody: NOT_FOUND"]


@pytest.mark.slow
def test_the_readmes_python_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [block for block in read_page("README.md").blocks if block.startswith("from engine import LLM")]
    assert len(blocks) == 1
    program, _, _ = blocks[0].partition("\n\n")
    assert program.endswith("# nedrag, then garden")
    (tmp_path / "readme.py").write_text(program)
    assert run_here(tmp_path / "readme.py", patch=monkeypatch).split() == ["nedrag", "garden"]


def test_every_example_is_in_the_readme_and_tested_here() -> None:
    readme, tests = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    names = {file.name for file in EXAMPLES.iterdir() if file.is_file()} - {"README.md"}
    assert {name for name in names if name not in readme or name not in tests} == set()
