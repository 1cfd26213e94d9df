"""Certificates for a cluster: made by one command, or one line that says why not."""

import ssl
from pathlib import Path

import pytest

from scripts.certificates import DAYS, USAGE_ERROR, main


def test_the_files_that_are_named_work_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "new"), "node.example", "10.0.0.5", "::1", "node_1", "*.example.org"]) == 0
    authority, certificate, key = capsys.readouterr().out.split()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_verify_locations(authority)
    context.load_cert_chain(certificate, key)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == USAGE_ERROR
    told = capsys.readouterr().err
    assert told.startswith("python -m scripts.certificates: ")
    assert told.count("\n") == 1
    return told


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(folder) in refusal([str(folder), "node"], capsys)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "authority.key").mkdir()
    assert "authority.key" in refusal([str(tmp_path), "node"], capsys)


@pytest.mark.parametrize("host", ["node:7000", "a b", "", "node,DNS:other", "https://node", "-node", "n\n"])
def test_a_bad_host_is_named_and_nothing_is_written(
    host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert repr(host) in refusal(["--", str(tmp_path / "new"), host], capsys)
    assert not (tmp_path / "new").exists()


def test_a_missing_openssl_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "openssl program is not on the PATH" in refusal([str(tmp_path), "node"], capsys)


def test_help_describes_the_arguments_and_how_long_they_last(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert f"{DAYS} days" in told
    assert "by which peers dial the node" in told
    assert "where the files are written" in told
