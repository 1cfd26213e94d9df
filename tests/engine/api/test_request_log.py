"""What clients did is written down: administration always, requests if wanted; and nobody can forge a line."""

import asyncio
import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from engine.api.keys import AccessRules
from engine.metrics.log_queue import AUDIT, LogQueue
from engine.metrics.request_log import RequestLog
from tests.engine.api.session import HI, TOKENIZER, session
from tests.fakes.engine_client import FakeClient

LOAD, UNLOAD, COMPLETIONS = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/completions"
COMPLETION = {"model": "poet", "prompt": "hi", "max_tokens": 3}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


async def test_each_act_of_administration_is_told_with_who_and_how_it_ended(tmp_path: Path) -> None:
    file, rules = tmp_path / "audit", AccessRules(["ask"], ["admin"])
    async with session(rules=rules, log=RequestLog(file)) as api:
        for key, name in (("admin", "poet"), ("admin", "poet"), ("ask", "x"), ("wrong", "x")):
            headers = {"Authorization": f"Bearer {key}", "X-Request-Id": f"of-{key}"}
            await api.post(UNLOAD, {"lora_name": name}, headers=headers)
        await api.post(COMPLETIONS, COMPLETION, headers=headers)
    told = lines(file)
    assert [(line["status"], line["outcome"], line["adapter"]) for line in told] == [
        (200, "done", "poet"),
        (404, "model_not_found", "poet"),
        (403, "admin_key_required", None),
        (401, "invalid_api_key", None),
    ]
    assert {line["action"] for line in told} == {UNLOAD}
    assert told[0]["key"] == told[1]["key"] == "8c6976e5"  # the first of SHA-256("admin")
    assert (told[0]["peer"], told[0]["request_id"], told[3]["key"]) == ("127.0.0.1", "of-admin", None)
    assert told[0]["time"].endswith("+00:00")
    assert "Bearer" not in file.read_text()


async def test_without_a_file_the_audit_goes_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with session() as api:
        await api.post(UNLOAD, {"lora_name": "poet"})
    (told,) = [record.getMessage() for record in caplog.records if record.name == "engine.audit"]
    assert json.loads(told)["outcome"] == "done"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_access_line_tells_what_a_request_cost(stream: bool, tmp_path: Path) -> None:
    file = tmp_path / "access"
    async with session(log=RequestLog(access="json", access_file=file)) as api:
        await api.post(COMPLETIONS, COMPLETION | {"stream": stream}, headers={"X-Request-Id": "mine"})
        await api.post(COMPLETIONS, {})
        await api.send("GET", "/nowhere?secret=1")
    whole, bad, nowhere = lines(file)
    expected = {
        "request_id": "mine", "method": "POST", "path": COMPLETIONS, "status": 200, "model": "poet",
        "prompt_tokens": 3, "output_tokens": 3, "client_gone": False, "key": None, "peer": "127.0.0.1",
    }  # fmt: skip
    assert {name: whole[name] for name in expected} == expected
    assert 0 <= whole["ttft_s"] <= whole["duration_s"]
    assert (bad["status"], bad["model"], bad["ttft_s"]) == (400, None, None)
    assert (nowhere["status"], nowhere["path"]) == (404, "/nowhere")


async def test_a_client_that_left_is_told_of(tmp_path: Path) -> None:
    file = tmp_path / "access"
    async with session(log=RequestLog(access="json", access_file=file)) as api:
        api.engine.gate.clear()
        request = asyncio.create_task(api.post("/v1/chat/completions", {"model": "base", "messages": HI}))
        await api.engine.gate_reached.wait()
        request.cancel()
        await api.engine.abort_seen.wait()
        while not file.read_text():
            await asyncio.sleep(0)
    (line,) = lines(file)
    assert (line["client_gone"], line["status"], line["model"]) == (True, 0, "base")


@pytest.mark.parametrize("text", ["a\nb", "\u2028", "\x1b[31m", "\ud800", "x" * 5000, 'a" status="200'])
async def test_a_client_s_text_stays_within_its_line(text: str, tmp_path: Path) -> None:
    audit, access = tmp_path / "audit", tmp_path / "access"
    async with session(log=RequestLog(audit, "text", access)) as api:
        await api.send("POST", UNLOAD, data=json.dumps({"lora_name": text}))
        await api.send("GET", "/x%0Aforged")
    for file, count in ((audit, 1), (access, 2)):
        told = file.read_bytes().decode("ascii").splitlines()
        assert len(told) == count
        assert all(line.isprintable() and len(line) < 1000 for line in told)


async def test_a_file_that_was_moved_is_opened_anew_and_one_that_cannot_be_disturbs_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    file = folder / "access"
    file.write_text("kept\n")
    log = RequestLog(access="text", access_file=file)
    async with session(log=log) as api:
        await api.send("GET", "/health")
        assert log.flush()
        file.rename(tmp_path / "access.1")
        await api.send("GET", "/version")
        assert log.flush()
        folder.rename(tmp_path / "gone")
        assert [(await api.send("GET", "/health")).status for _ in range(3)] == [200] * 3
    assert (tmp_path / "access.1").read_text().startswith("kept\n")
    assert len((tmp_path / "access.1").read_text().splitlines()) == 2
    assert 'path="/version"' in (tmp_path / "gone" / "access").read_text()
    assert sum("cannot be written" in record.message for record in caplog.records) == 1


async def test_an_audit_line_that_its_file_does_not_take_is_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    async with session(log=RequestLog(folder / "audit")) as api:
        folder.rename(tmp_path / "gone")
        (tmp_path / "logs").write_text("no folder")
        for name in ("poet", "other"):
            await api.post(UNLOAD, {"lora_name": name})
    told = [record.message for record in caplog.records if "cannot be written" in record.message]
    assert ['"adapter": "poet"' in told[0], '"adapter": "other"' in told[1]] == [True, True]


class Hung(logging.Handler):
    """A log that hangs until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.moves = threading.Event(), threading.Event()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.reached.set()
        assert self.moves.wait(60)
        self.lines.append(record.getMessage())


def test_a_log_that_hangs_loses_lines_beyond_its_queue_and_says_how_many() -> None:
    hung = Hung()
    lines = LogQueue(hung, most_lines=2)
    log = logging.Logger("a")
    log.addHandler(lines.entry)
    log.warning("first")
    assert hung.reached.wait(60)
    for number in range(5):
        log.warning("line %d", number)
    assert lines.lost == 3
    assert not lines.close(0.01)
    hung.moves.set()
    assert lines.flush(60)
    log.warning("last")
    assert lines.close(60)
    assert [line for line in hung.lines if not line.startswith("3 lines of this log were left out")] == [
        "first", "line 0", "line 1", "last",
    ]  # fmt: skip
    assert len(hung.lines) == 5


async def test_with_an_audit_log_that_hangs_nothing_is_changed_and_other_requests_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung, log = Hung(), RequestLog(tmp_path / "audit", "text", tmp_path / "access", audit_s=0.1)
    monkeypatch.setattr(log, "_audit_lines", LogQueue(hung))
    monkeypatch.setattr(log._audit, "handlers", [log._audit_lines.entry])
    async with session(log=log) as api:
        assert (await api.post(UNLOAD, {"lora_name": "poet"})).status == 200  # it was not known to hang
        refused = await api.post(UNLOAD, {"lora_name": "other"})
        assert (refused.status, refused.error["code"], refused.headers["Retry-After"]) == (503, "busy", "5")
        assert "nothing was changed" in refused.error["message"]
        assert (await api.post(COMPLETIONS, COMPLETION | {"model": "base"})).status == 200
        hung.moves.set()
        assert log.flush(60)
        assert (await api.post(UNLOAD, {"lora_name": "nobody"})).status == 404
    assert [json.loads(line)["status"] for line in hung.lines] == [200, 503, 404]


def test_an_audit_line_waits_for_a_place_in_a_log_that_hangs() -> None:
    hung = Hung()
    lines = LogQueue(hung, most_lines=1)
    log = logging.Logger(AUDIT)
    log.addHandler(lines.entry)
    writes = threading.Thread(target=lambda: [log.warning("%d", number) for number in range(4)])
    writes.start()
    assert hung.reached.wait(60)
    hung.moves.set()
    writes.join(60)
    assert lines.close(60)
    assert (hung.lines, lines.lost) == (["0", "1", "2", "3"], 0)


def test_lines_that_were_lost_are_counted_for_prometheus() -> None:
    client = FakeClient(TOKENIZER)
    client.telemetry.watch_lost_lines(lambda: {"access": 3, "audit": 0})
    told = client.telemetry.render(client.stats()).decode()
    assert 'loraserve_log_lines_lost_total{log="access"} 3.0' in told
