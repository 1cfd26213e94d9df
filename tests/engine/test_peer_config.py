"""What an operator says of peers is trusted and meant for somebody, or it is refused with the options that help."""

from pathlib import Path

import pytest

from engine.config.command_line import serve_config
from engine.config.peer_config import PEER_TOKEN_VARIABLE, PeerConfig, trust
from engine.errors import InvalidConfig
from transport.base import Address


@pytest.fixture
def pem(tmp_path: Path) -> dict[str, Path]:
    files = {option: tmp_path / f"{option}.pem" for option in ("ca", "cert", "key")}
    for file in files.values():
        file.touch()
    return files


def tls(files: dict[str, Path]) -> list[str]:
    return [text for option, file in files.items() for text in (f"--peer-tls-{option}", str(file))]


def test_peers_are_described_on_the_command_line(tmp_path: Path, pem: dict[str, Path]) -> None:
    token = tmp_path / "token"
    token.write_text("from-file-from-file\n")
    environ = {PEER_TOKEN_VARIABLE: "from-environment"}
    arguments = [
        *("--peer", "10.0.0.1:7", "--peer", "[::1]:8", "--peer-listen", "node.example:0"),
        *("--peer-token-file", str(token), "--peer-path", "stream", "--peer-bandwidth", "1MB"),
        *("--peer-pulls", "3", *tls(pem), "--peer-tls-name", "node", "--no-peer-plain"),
    ]
    config = serve_config(arguments, environ).engine.peers
    assert trust(config).token == "from-file-from-file"
    assert config == PeerConfig(
        addresses=(Address("10.0.0.1", 7), Address("::1", 8)), listen=Address("node.example", 0),
        token_file=token, path="stream", bandwidth_bytes_per_s=1_000_000, pulls=3,
        tls_authority=pem["ca"], tls_cert=pem["cert"], tls_key=pem["key"], tls_name="node",
    )  # fmt: skip
    bare = serve_config(["--peer", "127.0.0.1:1", "--peer-plain"], environ)
    assert bare.engine.peers == PeerConfig(
        addresses=(Address("127.0.0.1", 1),), token="from-environment", plain=True
    )
    assert "from-environment" not in repr(bare)
    assert trust(bare.engine.peers).token == "from-environment"
    assert not serve_config([], {PEER_TOKEN_VARIABLE: "unused"}).engine.peers.enabled


@pytest.mark.parametrize("option", ["peer", "peer-listen"])
def test_plain_peers_beyond_this_machine_are_refused_with_the_options_that_help(option: str) -> None:
    with pytest.raises(InvalidConfig) as refusal:
        serve_config([f"--{option}", "10.0.0.5:7000", "--peer-plain"], {PEER_TOKEN_VARIABLE: "x" * 16})
    told = str(refusal.value)
    assert told.startswith(f"{option.replace('-', '_')}='10.0.0.5:7000' is not accepted")
    assert "--peer-tls-ca, --peer-tls-cert, --peer-tls-key" in told


def test_the_tls_file_that_is_missing_is_named_with_the_remedy(pem: dict[str, Path]) -> None:
    base, environ = ["--peer", "10.0.0.5:7000"], {PEER_TOKEN_VARIABLE: "x" * 16}
    for option, file in pem.items():
        rest = {other: where for other, where in pem.items() if other != option}
        with pytest.raises(InvalidConfig, match=f"^peer_tls_{option}=None .*give all of --peer-tls-ca"):
            serve_config([*base, *tls(rest)], environ)
        gone = file.with_name("gone.pem")
        with pytest.raises(InvalidConfig, match=rf"^peer_tls_{option}='{gone}' .*\(No such file.*give a PEM"):
            serve_config([*base, *tls(pem | {option: gone})], environ)


def test_a_short_token_is_refused_by_where_it_came_from(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("sesame")
    base = ["--peer", "127.0.0.1:1", "--peer-plain"]
    with pytest.raises(InvalidConfig, match=f"^peer_token_file='{token}' .*at least 16") as of_file:
        serve_config([*base, "--peer-token-file", str(token)], {})
    with pytest.raises(
        InvalidConfig, match=f"^{PEER_TOKEN_VARIABLE}='.hidden.' .*at least 16"
    ) as of_variable:
        serve_config(base, {PEER_TOKEN_VARIABLE: "sesame"})
    assert "sesame" not in f"{of_file.value}{of_variable.value}"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--peer-path", "ucx"], "peer_path='ucx'"),
        (["--peer-tls-ca", "a.pem"], "peer_tls_ca='a.pem'"),
        (["--peer-plain"], "peer_plain=True"),
        (["--peer-pulls", "3"], "peer_pulls=3"),
    ],
)
def test_what_is_said_of_peers_is_refused_where_there_are_none(arguments: list[str], told: str) -> None:
    with pytest.raises(InvalidConfig) as refusal:
        serve_config(arguments, {})
    assert str(refusal.value).startswith(told)
    assert "give --peer or --peer-listen" in str(refusal.value)


def test_a_token_file_without_peers_is_refused_by_its_path_and_in_a_file_too(tmp_path: Path) -> None:
    token, config = tmp_path / "token", tmp_path / "serve.toml"
    token.write_text("sesame")
    config.write_text('peer_token_file = "token"')
    for arguments in (["--peer-token-file", str(token)], ["--config", str(config)]):
        with pytest.raises(InvalidConfig, match=r"peer_token_file='.*token'.*--peer-listen") as refusal:
            serve_config(arguments, {})
        assert "sesame" not in str(refusal.value)


def test_what_changes_nothing_may_be_said_without_peers() -> None:
    arguments = ["--no-peer-plain", "--peer-path", "auto"]
    assert serve_config(arguments, {PEER_TOKEN_VARIABLE: "unused"}).engine.peers.enabled is False


def test_a_token_that_no_header_may_carry_is_refused_by_its_file(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("open sesame and sixteen more")
    with pytest.raises(InvalidConfig, match=r"^peer_token_file=.*printable ASCII without spaces") as refusal:
        PeerConfig(listen=Address("127.0.0.1", 0), plain=True, token_file=token)
    assert "sesame" not in str(refusal.value)


def test_peers_that_cannot_be_trusted_are_refused_in_python_too() -> None:
    with pytest.raises(InvalidConfig, match=r"^peer_token_file=None .*or set LORASERVE_PEER_TOKEN"):
        PeerConfig(listen=Address("127.0.0.1", 0), plain=True)
    with pytest.raises(InvalidConfig, match=r"^peer_pulls=3 .*give --peer or --peer-listen"):
        PeerConfig(pulls=3)
