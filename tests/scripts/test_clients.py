"""The suite of clients, without any of them: its catalogue, its programs' syntax, its rows and its page."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from scripts.clients.__main__ import PAGE, ROWS, main, run_program, summary, try_client
from scripts.clients.catalogue import CLIENTS, PROGRAMS, Client, clients_named
from scripts.clients.environments import ClientMissing, Environment, prepared, torch_pin
from scripts.clients.page import latest, page
from scripts.clients.probe import Probe, expect
from scripts.results import Row, read_rows

CLIENT = CLIENTS[0]


def _row(client: str = CLIENT.name, skipped: str = "", **outcomes: str) -> Row:
    tried = [{"what": what, "outcome": outcome, "why": "so"} for what, outcome in outcomes.items()]
    return {"started": "now", "client": client, "version": "1.0", "skipped": skipped, "tried": tried}


def test_the_page_is_what_the_rows_say() -> None:
    assert PAGE.read_text() == page(read_rows(ROWS)), "run: python -m scripts.clients --page"


def test_the_rows_are_of_the_releases_in_the_catalogue() -> None:
    rows = {row["client"]: row for row in read_rows(ROWS)}
    wanted = {client.name: client.version for client in CLIENTS if client.version}
    assert {name: rows[name]["version"] for name in wanted if name in rows} == wanted
    assert {client.name for client in CLIENTS} <= set(rows), "run: python -m scripts.clients"


def test_no_client_fails_in_the_rows() -> None:
    fails = [
        (row["client"], attempt)
        for row in latest(read_rows(ROWS))
        for attempt in row["tried"]
        if attempt["outcome"] == "fails"
    ]
    assert fails == []


def test_every_program_is_syntactically_right_and_belongs_to_a_client() -> None:
    programs = {path.name: path for path in PROGRAMS.iterdir() if path.suffix in (".py", ".mjs")}
    del programs["__init__.py"]
    assert {client.program for client in CLIENTS} == set(programs)
    for name, path in programs.items():
        if path.suffix == ".py":
            compile(path.read_text(), name, "exec")


def test_every_package_is_pinned() -> None:
    files = [PROGRAMS.parent / client.requirements for client in CLIENTS if client.requirements]
    packages = [each for client in CLIENTS for each in client.packages]
    packages += [line for file in files for line in file.read_text().splitlines()]
    loose = [each for each in packages if "==" not in each and "@" not in each]
    assert loose == []
    assert all(client.packages for client in CLIENTS if client.installer != "system")


def test_clients_are_chosen_by_name() -> None:
    assert clients_named([]) == CLIENTS
    assert clients_named([CLIENT.name]) == (CLIENT,)
    with pytest.raises(ValueError, match="no client is called 'gone': give some of openai-python"):
        clients_named(["gone"])


def test_a_version_is_what_is_pinned() -> None:
    assert Client("a", "A", "a.py", ("a[x]==1.2", "b==3")).version == "1.2"
    assert Client("a", "A", "a.mjs", ("@scope/a@1.2",), "npm").version == "1.2"
    assert Client("a", "A", "a.py", installer="system", commands=("a",)).version == ""


def test_the_page_takes_the_last_row_of_a_client() -> None:
    rows = [_row(plain="fails"), _row("of a client that is gone"), _row(plain="ok")]
    assert latest(rows) == [rows[2]]


def test_the_page_has_a_column_for_each_common_attempt_and_names_the_others() -> None:
    text = page([_row(plain="ok", stream="limit", tools="limit", models="ok")])
    assert f"| {CLIENT.title} | 1.0 | ok | no | – | – | – | – | – | – |" in text
    assert f"\n- so: {CLIENT.title}, {CLIENT.title}.\n" in text
    assert f"- {CLIENT.title}: models." in text


def test_the_page_names_the_attempt_that_fails() -> None:
    assert f"\n- so: {CLIENT.title} (stop).\n" in page([_row(stop="fails")])


def test_the_page_says_what_was_not_tried() -> None:
    text = page([_row(skipped="node is not on PATH")])
    assert f"- {CLIENT.title}: node is not on PATH." in text
    assert "| 1.0 |" not in text


def test_a_summary_tells_what_fails_and_why() -> None:
    lines = summary(_row(plain="ok", tools="limit")).splitlines()
    assert lines == [f"{CLIENT.name} 1.0: ok: plain", "    tools: limit: so"]
    assert summary(_row(skipped="gone")) == f"{CLIENT.name} 1.0: skipped: gone"


def test_an_attempt_is_recorded_however_it_ends() -> None:
    probe = Probe("http://127.0.0.1:1", "key")
    with probe.tries("equal"):
        expect(1, 1)
    with probe.tries("unequal at http://127.0.0.1:1/v1"):
        expect("http://127.0.0.1:1/v1", 2)
    with probe.meets_limit("refused", "not there", KeyError):
        raise KeyError
    with probe.meets_limit("refused otherwise", "not there", KeyError):
        raise ValueError("no")
    with probe.meets_limit("taken", "not there", KeyError):
        pass
    outcomes = [(each.outcome, each.why) for each in probe.attempts]
    assert outcomes == [
        ("ok", ""),
        ("fails", "AssertionError: 'http://SERVER/v1' instead of 2"),
        ("limit", "not there"),
        ("fails", "ValueError: no"),
        ("fails", "was not refused, though: not there"),
    ]


REPORTS = """import json, pathlib, sys
print("said", flush=True)
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.write_text(json.dumps({"version": "2", "tried": sys.argv[1:5]}))"""


def _program(text: str) -> Environment:
    return Environment((sys.executable, "-c", text), {})


def test_a_program_is_given_the_server_and_its_report_is_read(tmp_path: Path) -> None:
    report = asyncio.run(run_program(_program(REPORTS), "http://a:1", tmp_path / "logs" / "a.txt"))
    assert report["version"] == "2"
    assert report["tried"] == ["--url", "http://a:1", "--key", "a-key-of-the-clients"]
    assert (tmp_path / "logs" / "a.txt").read_text() == "said\n"


def test_a_program_that_ends_without_a_report_fails(tmp_path: Path) -> None:
    report = asyncio.run(run_program(_program("raise SystemExit(3)"), "http://a:1", tmp_path / "a.txt"))
    assert [each["outcome"] for each in report["tried"]] == ["fails"]


def test_a_client_that_the_system_lacks_is_skipped_with_the_reason(tmp_path: Path) -> None:
    client = Client("a", "A", "a.py", installer="system", commands=("no-such-command",))
    row = asyncio.run(try_client(client, "http://a:1", tmp_path))
    assert row["skipped"] == "no-such-command is not on PATH"
    assert row["tried"] == []


@pytest.fixture
def pip_calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record what the installer would run."""
    calls: list[list[str]] = []
    monkeypatch.setattr("scripts.clients.environments._run", lambda command: calls.append(list(command)))
    monkeypatch.setattr("shutil.rmtree", lambda folder, ignore_errors: None)
    return calls


def _installs(folder: Path, pip_calls: list[list[str]], client: Client) -> list[list[str]]:
    """Prepare a client, and select the packages of every call of pip."""
    pip_calls.clear()
    (folder / client.name).mkdir(exist_ok=True)
    prepared(client, folder)
    return [call[6:] for call in pip_calls if "pip" in call]


def test_a_client_is_installed_once_and_anew_when_its_release_changes(
    tmp_path: Path, pip_calls: list[list[str]]
) -> None:
    old, new = Client("a", "A", "a.py", ("a==1",)), Client("a", "A", "a.py", ("a==2",))
    assert _installs(tmp_path, pip_calls, old) == [["a==1"]]
    assert _installs(tmp_path, pip_calls, old) == []
    assert _installs(tmp_path, pip_calls, new) == [["a==2"]]


def test_a_client_that_needs_torch_gets_the_release_that_the_project_pins(
    tmp_path: Path, pip_calls: list[list[str]]
) -> None:
    client = Client("a", "A", "a.py", ("a==1",), needs_torch=True)
    assert _installs(tmp_path, pip_calls, client) == [[torch_pin()], ["a==1", torch_pin()]]


def test_a_bare_client_is_installed_without_what_it_depends_on(
    tmp_path: Path, pip_calls: list[list[str]]
) -> None:
    client = Client("a", "A", "a.py", ("a==1", "b==2"), bare=True)
    assert _installs(tmp_path, pip_calls, client) == [["--no-deps", "a==1"], ["b==2"]]


def test_an_environment_has_no_keys_of_whoever_runs_it(
    tmp_path: Path, pip_calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere")
    (tmp_path / "a").mkdir()
    variables = prepared(Client("a", "A", "a.py", ("a==1",)), tmp_path).variables
    assert not [name for name in variables if name.startswith("OPENAI")]
    assert variables["PATH"].startswith(f"{tmp_path}/a/bin:")


def test_an_installation_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: list[str]) -> None:
        raise ClientMissing("it cannot be installed: no such release")

    monkeypatch.setattr("scripts.clients.environments._run", fails)
    row = asyncio.run(try_client(Client("a", "A", "a.py", ("a==1",)), "http://a:1", tmp_path))
    assert row["skipped"] == "it cannot be installed: no such release"


def test_the_list_names_every_client(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [c.name for c in CLIENTS]


def test_the_page_is_written_from_a_rows_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, written = tmp_path / "rows.jsonl", tmp_path / "page.md"
    rows.write_text(json.dumps(_row(plain="ok")) + "\n")
    monkeypatch.setattr("scripts.clients.__main__.PAGE", written)
    assert main(["--page", "--rows", str(rows)]) == 0
    assert written.read_text() == page(read_rows(rows))
