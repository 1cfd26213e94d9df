"""Options: what an operator writes becomes a configuration, or one line that says what to write instead."""

from pathlib import Path

import pytest

from engine.config.config import PEER_TOKEN_VARIABLE, EngineConfig, PeerConfig, ServeConfig
from engine.config.options import API_KEY_VARIABLE, batch_config, serve_config
from engine.errors import InvalidConfig
from transport.base import Address


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters" / "poet"
    folder.mkdir(parents=True)
    return folder


def test_nothing_given_is_every_default() -> None:
    assert serve_config([], {}) == ServeConfig()


def test_the_command_line_fills_every_field(adapter: Path, tmp_path: Path) -> None:
    arguments = [
        *("--model", "org/base", "--served-model-name", "b", "--dtype", "bfloat16", "--device", "cpu"),
        *("--attention-backend", "triton"),
        *("--max-model-len", "128", "--lora", f"poet={adapter}", "--lora-dir", str(adapter.parent)),
        *("--adapter-bytes", "64MB", "--adapter-cache-dir", str(tmp_path / "cache"), "--no-progress"),
        *("--adapter-patience-s", "1.5", "--max-num-seqs", "3", "--max-num-batched-tokens", "99"),
        *("--kv-cache-bytes", "2GiB", "--block-size", "8", "--host", "::1", "--port", "0"),
        *(
            "--api-key",
            "sesame",
            "--log-level",
            "debug",
            "--max-waiting",
            "5",
            "--drain-s",
            "0",
            "--lora-root",
            str(tmp_path),
        ),
    ]
    engine = EngineConfig(
        model="org/base", served_model_name="b", loras=(("poet", adapter),), lora_dir=adapter.parent,
        dtype="bfloat16", device="cpu", attention_backend="triton", max_model_len=128, max_num_seqs=3,
        max_num_batched_tokens=99,
        block_size=8, kv_cache_bytes=2 << 30, adapter_bytes=64_000_000, adapter_cache_dir=tmp_path / "cache",
        adapter_patience_s=1.5, progress=False,
    )  # fmt: skip
    expected = ServeConfig(
        engine=engine,
        host="::1",
        port=0,
        api_key="sesame",
        log_level="debug",
        max_waiting=5,
        drain_s=0.0,
        lora_roots=(tmp_path,),
    )
    assert serve_config(arguments, {}) == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("1048576", 1 << 20), ("2GiB", 2 << 30), ("512MiB", 512 << 20), ("1.5KiB", 1536), ("3 kb", 3000),
        ("1g", 10**9), ("7B", 7), ("1TiB", 1 << 40),
    ],
)  # fmt: skip
def test_sizes_are_read_with_their_units(written: str, expected: int) -> None:
    assert serve_config(["--kv-cache-bytes", written], {}).engine.kv_cache_bytes == expected


def test_a_file_gives_the_same_fields_and_the_command_line_wins(adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(
        'max_num_seqs = 4\nport = 9\nkv_cache_bytes = "1MiB"\nlora_dir = "adapters"\nprogress = false\n'
        'lora_root = ["adapters"]\n[lora]\npoet = "adapters/poet"\n'
    )
    config = serve_config(["--config", str(file), "--port", "10"], {})
    assert (config.port, config.engine.max_num_seqs, config.engine.kv_cache_bytes) == (10, 4, 1 << 20)
    assert config.engine.loras == (("poet", adapter),)
    assert (config.engine.lora_dir, config.lora_roots) == (adapter.parent, (adapter.parent,))
    assert config.engine.progress is False


def test_the_key_comes_from_the_environment_unless_the_command_line_has_one(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('api_key = "from-file"')
    environ = {API_KEY_VARIABLE: "from-environment"}
    assert serve_config([], {API_KEY_VARIABLE: ""}).api_key is None
    assert serve_config(["--config", str(file)], {}).api_key == "from-file"
    assert serve_config(["--config", str(file)], environ).api_key == "from-environment"
    assert serve_config(["--api-key=from-line"], environ).api_key == "from-line"


def test_no_secret_is_shown_by_a_configuration_or_an_error() -> None:
    assert "sesame" not in repr(serve_config(["--api-key", "sesame"], {}))
    with pytest.raises(InvalidConfig) as refusal:
        serve_config(["--api-key", "open sesame"], {})
    assert "sesame" not in str(refusal.value)


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
        *("--peer-token-file", str(token), "--peer-door", "stream", "--peer-bandwidth", "1MB"),
        *("--peer-pulls", "3", *tls(pem), "--peer-tls-name", "node", "--no-peer-plain"),
    ]
    assert serve_config(arguments, environ).engine.sharing == PeerConfig(
        peers=(Address("10.0.0.1", 7), Address("::1", 8)), listen=Address("node.example", 0),
        token="from-file-from-file", token_file=token, door="stream", bandwidth_bytes_per_s=1_000_000, pulls=3,
        tls_authority=pem["ca"], tls_cert=pem["cert"], tls_key=pem["key"], tls_name="node",
    )  # fmt: skip
    bare = serve_config(["--peer", "127.0.0.1:1", "--peer-plain"], environ)
    assert bare.engine.sharing == PeerConfig(
        peers=(Address("127.0.0.1", 1),), token="from-environment", plain=True
    )
    assert "from-environment" not in repr(bare)
    assert not serve_config([], {PEER_TOKEN_VARIABLE: "unused"}).engine.sharing.on


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
        (["--peer-door", "ucx"], "peer_door='ucx'"),
        (["--peer-tls-ca", "a.pem"], "peer_tls_ca='a.pem'"),
        (["--peer-plain"], "peer_plain=True"),
        (["--peer-pulls", "3"], "peer_pulls='3'"),
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
    arguments = ["--no-peer-plain", "--peer-door", "auto"]
    assert serve_config(arguments, {PEER_TOKEN_VARIABLE: "unused"}).engine.sharing.on is False


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("port", "65536", "from 0 to 65535"),
        ("port", "http", "whole number"),
        ("max-num-seqs", "0", "from 1"),
        ("max-num-seqs", "2.5", "whole number"),
        ("kv-cache-bytes", "lots", "2GiB"),
        ("kv-cache-bytes", "0", "2GiB"),
        ("drain-s", "-1", "0 or more"),
        ("drain-s", "nan", "0 or more"),
        ("dtype", "float16", "auto, float32, bfloat16"),
        ("device", "tpu", "auto, cpu, cuda"),
        ("lora", "poet", "NAME=DIR"),
        ("lora", "poet=/no/such/folder", "no such folder"),
        ("lora-dir", "/no/such/folder", "no such folder"),
        ("host", " ", "not empty"),
        ("peer-listen", "node", "HOST:PORT"),
        ("peer-listen", "::1:8", "HOST:PORT"),
        ("peer-listen", "node:99999", "from 0 to 65535"),
        ("peer-token-file", "/no/such/file", "cannot be read"),
        ("peer-pulls", "5", "from 1 to 4"),
        ("peer-door", "rpc", "auto, ucx, stream"),
        ("config", "/no/such/file", "cannot be read"),
    ],
)
def test_a_bad_value_names_the_option_the_value_and_the_remedy(option: str, value: str, remedy: str) -> None:
    with pytest.raises(InvalidConfig) as refusal:
        serve_config([f"--{option}", value], {})
    told = str(refusal.value)
    assert told.startswith(option.replace("-", "_"))
    assert value.partition("=")[0] in told
    assert remedy in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("max_num_seq = 4", "did you mean max_num_seqs?"),
        ("zzz = 4", "unknown key 'zzz'"),
        ("port = true", "port=True"),
        ('port = "x"', "port='x'"),
        ("progress = 1", "give true or false"),
        ('lora = "poet=here"', "give a list"),
        ("port = ", "cannot be read"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(content: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(content)
    with pytest.raises(InvalidConfig) as refusal:
        serve_config(["--config", str(file)], {})
    assert told in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("arguments", [["--port", "1", "--nonsense"], ["--max-num", "4"], ["stray"]])
def test_an_unknown_flag_exits_with_two_and_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        serve_config(arguments, {})
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert arguments[-1] in told or arguments[0] in told
    assert told.count("\n") == 1


def test_help_groups_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        serve_config(["--help"], {})
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert [
        group for group in ("\nmodel:", "\nadapters:", "\nscheduling:", "\nserver:") if group not in told
    ] == []


def test_a_batch_takes_the_engine_s_options_and_its_files() -> None:
    config = batch_config(["-i", "in.jsonl", "-o", "out.jsonl", "--max-num-seqs", "2", "--in-flight", "7"])
    assert (config.input, config.output) == (Path("in.jsonl"), Path("out.jsonl"))
    assert (config.engine.max_num_seqs, config.in_flight) == (2, 7)
    with pytest.raises(InvalidConfig, match="output"):
        batch_config(["-i", "in.jsonl"])
