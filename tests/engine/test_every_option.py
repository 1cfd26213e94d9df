"""No value of any option ends a start in a traceback: it is honoured, or refused in one line that names it."""

import asyncio
import re
from pathlib import Path
from typing import NoReturn

import pytest

from engine import serve
from engine.config.command_line import SERVE_OPTIONS
from engine.config.option_types import FLAG
from engine.serve import USAGE_ERROR, main

ABSURD = ("0", "1", "3", "-1", "2147483648", "9" * 400, "1e308", "nan", "1TiB", "\x00", "é" * 300, "")
STARTS = (
    "0",
    "1",
    "3",
    "2147483648",
    "1TiB",
    "\x00",
    "é" * 300,
)  # what more than a look at the text may judge
SHORT = ("--port", "0", "--no-progress")
SMALL = {"kv-cache-bytes": "1MiB", "adapter-bytes": "4MiB"}
JUDGED_AT_START = (
    *("adapter-bytes", "adapter-cache-dir", "block-size", "host", "kv-cache-bytes", "lora-dir-poll-s"),
    *("max-model-len", "max-num-batched-tokens", "max-num-seqs", "model", "served-model-name"),
    *("tensor-parallel-size", "max-waiting", "drain-s", "adapter-patience-s"),
)


@pytest.fixture(autouse=True)
def stops_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stopped() -> asyncio.Event:
        stop = asyncio.Event()
        stop.set()
        return stop

    monkeypatch.setattr(serve, "stopped_by_signals", stopped)
    monkeypatch.chdir(tmp_path)  # relative paths among the values


def check(arguments: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Start with the arguments: all went well, or one line names the option."""
    try:
        code = main([*SHORT, *arguments])
    except SystemExit as exited:
        code = int(exited.code or 0)
    told = capsys.readouterr().err.strip()
    assert code in (0, USAGE_ERROR), told
    assert code == 0 or (len(told.splitlines()) == 1 and re.search(name.replace("-", "[-_]"), told)), told


@pytest.mark.parametrize("name", [option.name for option in SERVE_OPTIONS if option.has_flag])
def test_a_value_that_its_text_shows_to_be_absurd(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (option,) = [option for option in SERVE_OPTIONS if option.name == name]
    if option.type is FLAG:
        check([f"--{name}=x"], name, capsys)
        return
    for value in ABSURD:
        asks_the_hub = name == "model" and value.isascii() and value.isprintable()
        if not asks_the_hub and (name not in JUDGED_AT_START or value not in STARTS):
            try:
                check(["--max-model-len", "4000000000", f"--{name}={value}"], "", capsys)
            except AssertionError as error:
                raise AssertionError(f"--{name}={value[:20]!r}") from error


@pytest.mark.parametrize("name", JUDGED_AT_START)
def test_a_value_that_only_the_machine_can_judge(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = [f"--{option}={size}" for option, size in SMALL.items() if option != name]
    other = {"host": "host|port", "block-size": "block-size|kv-cache-bytes|max-model-len"}
    for value in STARTS:
        asks_outside = name in ("host", "model") and value.isascii() and value.isprintable()
        if not asks_outside and not (name in SMALL and value == "2147483648"):  # that much may be had
            check([*small, f"--{name}={value}"], other.get(name, name), capsys)


@pytest.mark.parametrize("size", ["1TiB", "999999TiB"])
@pytest.mark.parametrize("name", ["kv-cache-bytes", "adapter-bytes"])
def test_more_memory_than_the_machine_has_is_told_with_both(
    name: str, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SHORT, f"--{name}", size]) == USAGE_ERROR
    told = capsys.readouterr().err
    assert re.search(
        rf"{name.replace('-', '_')}=\d{{13,}} is not accepted: .*\d+ bytes in all.* give less\n$", told
    )


def test_an_answer_of_the_hub_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(model: str, **options: object) -> NoReturn:
        raise OSError("there is no net\nplease look")

    monkeypatch.setattr("huggingface_hub.snapshot_download", absent)
    check(["--model", "org/model"], "org.model", capsys)
