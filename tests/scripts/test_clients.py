"""The suite of clients, without any of them: its catalogue, its programs' syntax, its rows and its page."""

import asyncio
import json
import re
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from scripts.bench.serving.server import ServerFailed
from scripts.clients.__main__ import PAGE, ROWS, main, run_program, summary, try_client
from scripts.clients.catalogue import CLIENTS, PROGRAMS, Client, clients_named
from scripts.clients.environments import ClientMissing, Environment, prepared, torch_pin
from scripts.clients.page import latest, page
from scripts.clients.probe import Probe, expect
from scripts.clients.servers import ServerAddress, server_for_clients, wait_for_answer
from scripts.results import Row, read_rows

CLIENT = CLIENTS[0]
SERVER = ServerAddress("http://a:1", "a:2")


def _row(client: str = CLIENT.name, skipped: str = "", **outcomes: str) -> Row:
    tried = [{"what": what, "outcome": outcome, "why": "so"} for what, outcome in outcomes.items()]
    return {"started": "now", "client": client, "version": "1.0", "skipped": skipped, "tried": tried}


def _through_a_router(row: Row) -> Row:
    return {**row, "nodes": 2}


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


def test_a_row_of_a_cluster_takes_no_place_of_one_servers() -> None:
    through = [_through_a_router(_row(plain=outcome)) for outcome in ("fails", "limit")]
    one = {**_row(plain="ok"), "nodes": 0}
    assert latest([through[0], one, through[1]]) == [one, through[1]]


def test_the_page_has_a_part_for_the_router() -> None:
    router, rest = "## The router of a cluster", "ok | – | – | – | – | – | – | – |"
    alone = page([_row(plain="ok", models="ok")])
    assert router not in alone
    both = page([_row(plain="ok", models="ok"), _through_a_router(_row(plain="ok", n="ok"))])
    one, _, cluster = both.partition(router)
    for text, other in ((one, "models"), (cluster, "n")):
        assert f"| {CLIENT.title} | 1.0 | {rest}" in text
        assert f"- {CLIENT.title}: {other}." in text


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
out.write_text(json.dumps({"version": "2", "tried": sys.argv[1:7]}))"""


def _program(text: str) -> Environment:
    return Environment((sys.executable, "-c", text), {})


def test_a_program_is_given_the_server_and_its_report_is_read(tmp_path: Path) -> None:
    report = asyncio.run(run_program(_program(REPORTS), SERVER, tmp_path / "logs" / "a.txt"))
    assert report["version"] == "2"
    assert report["tried"] == ["--url", "http://a:1", "--key", "a-key-of-the-clients", "--rpc", "a:2"]
    assert (tmp_path / "logs" / "a.txt").read_text() == "said\n"


def test_a_program_that_ends_without_a_report_fails(tmp_path: Path) -> None:
    report = asyncio.run(run_program(_program("raise SystemExit(3)"), SERVER, tmp_path / "a.txt"))
    assert [each["outcome"] for each in report["tried"]] == ["fails"]


def test_a_client_that_the_system_lacks_is_skipped_with_the_reason(tmp_path: Path) -> None:
    client = Client("a", "A", "a.py", installer="system", commands=("no-such-command",))
    row = asyncio.run(try_client(client, SERVER, 2, tmp_path))
    assert row["skipped"] == "no-such-command is not on PATH"
    assert (row["nodes"], row["tried"]) == (2, [])


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
    row = asyncio.run(try_client(Client("a", "A", "a.py", ("a==1",)), SERVER, 0, tmp_path))
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


LINES = {
    0: """\
ready at http://127.0.0.1:3 and grpc://127.0.0.1:4: demo with 8 adapters
""",
    2: """\
coordinator ready at 127.0.0.1:1
ready at http://127.0.0.1:3 and grpc://127.0.0.1:4: demo with 8 adapters
router ready at http://127.0.0.1:5 and grpc://127.0.0.1:6: demo
""",
}


@pytest.mark.parametrize(("nodes", "ports"), [(0, (3, 4)), (2, (5, 6))])
def test_clients_ask_one_server_or_a_clusters_router_and_never_a_node_of_it(
    nodes: int, ports: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, ...]] = []

    @asynccontextmanager
    async def launched(
        arguments: tuple[str, ...], cwd: Path, timeout_s: float, pattern: re.Pattern[bytes], stop_s: float
    ) -> AsyncGenerator[re.Match[bytes], None]:
        started.append(arguments)
        found = [pattern.search(line) for line in LINES[nodes].encode().splitlines()]
        yield next(each for each in found if each)

    async def address() -> ServerAddress:
        async with server_for_clients(nodes, Path()) as found:
            return found

    monkeypatch.setattr("scripts.clients.servers.launched", launched)
    monkeypatch.setattr("scripts.clients.servers.wait_for_answer", lambda url, timeout_s: None)
    http, rpc = (f"127.0.0.1:{port}" for port in ports)
    assert asyncio.run(address()) == ServerAddress(f"http://{http}", rpc)
    assert ("--nodes" in started[0]) == bool(nodes)


def test_a_server_whose_adapters_do_not_answer_is_not_tried() -> None:
    with pytest.raises(ServerFailed, match="no adapter was answered after 0 s"):
        wait_for_answer("http://127.0.0.1:1", 0)


def test_a_server_that_does_not_start_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @asynccontextmanager
    async def fails(nodes: int, root: Path) -> AsyncGenerator[ServerAddress, None]:
        raise ServerFailed(f"none of {nodes} nodes is ready")
        yield SERVER

    monkeypatch.setattr("scripts.clients.__main__.server_for_clients", fails)
    with pytest.raises(SystemExit) as ended:
        main(["--nodes", "3", CLIENT.name])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "python -m scripts.clients: none of 3 nodes is ready\n"
