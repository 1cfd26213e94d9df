"""What an operator writes becomes a configuration, or one line that says what to write instead."""

from pathlib import Path

import pytest

from engine.config.access_config import API_KEY_VARIABLE, AccessConfig
from engine.config.command_line import batch_config, serve_config
from engine.config.config import EngineConfig, ServeConfig
from engine.errors import InvalidConfig


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
        model="org/base", served_model_name=("b",), loras={"poet": adapter}, lora_dir=adapter.parent,
        dtype="bfloat16", device="cpu", attention_backend="triton", max_model_len=128, max_num_seqs=3,
        max_num_batched_tokens=99,
        block_size=8, kv_cache_bytes=2 << 30, adapter_bytes=64_000_000, adapter_cache_dir=tmp_path / "cache",
        adapter_patience_s=1.5, progress=False,
    )  # fmt: skip
    expected = ServeConfig(
        engine=engine,
        host="::1",
        port=0,
        access=AccessConfig(api_keys=("sesame",)),
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
    assert config.engine.loras == {"poet": adapter}
    assert (config.engine.lora_dir, config.lora_roots) == (adapter.parent, (adapter.parent,))
    assert config.engine.progress is False


def test_the_key_comes_from_the_environment_unless_the_command_line_has_one(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('api_key = "from-file"')
    environ = {API_KEY_VARIABLE: "from-environment"}
    assert serve_config([], {API_KEY_VARIABLE: ""}).access.api_keys == ()
    assert serve_config(["--config", str(file)], {}).access.api_keys == ("from-file",)
    assert serve_config(["--config", str(file)], environ).access.api_keys == ("from-environment",)
    assert serve_config(["--api-key=from-line"], environ).access.api_keys == ("from-line",)


def test_no_secret_is_shown_by_a_configuration_or_an_error() -> None:
    assert "sesame" not in repr(serve_config(["--api-key", "sesame"], {}))
    with pytest.raises(InvalidConfig) as refusal:
        serve_config(["--api-key", "open sesame"], {})
    assert "sesame" not in str(refusal.value)


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("max-num-seqs", "2.5", "whole number"),
        ("kv-cache-bytes", "lots", "2GiB"),
        ("drain-s", "nan", "from 0 to"),
        ("lora", "poet", "NAME=DIR"),
        ("peer-listen", "node", "HOST:PORT"),
        ("peer-listen", "::1:8", "HOST:PORT"),
        ("peer-listen", "node:99999", "from 0 to 65535"),
        ("peer-token-file", "/no/such/file", "cannot be read"),
        ("config", "/no/such/file", "cannot be read"),
    ],
)
def test_a_text_that_has_no_value_names_the_option_the_text_and_the_remedy(
    option: str, value: str, remedy: str
) -> None:
    with pytest.raises(InvalidConfig) as refusal:
        serve_config([f"--{option}", value], {})
    told = str(refusal.value)
    assert told.startswith(option.replace("-", "_"))
    assert value in told
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
    groups = ("\nmodel:", "\nadapters:", "\nscheduling:", "\nserver:", "\npeers:")
    assert [group for group in groups if group not in told] == []


def test_a_batch_takes_the_engine_s_options_and_its_files() -> None:
    config = batch_config(["-i", "in.jsonl", "-o", "out.jsonl", "--max-num-seqs", "2", "--in-flight", "7"])
    assert (config.input, config.output) == (Path("in.jsonl"), Path("out.jsonl"))
    assert (config.engine.max_num_seqs, config.in_flight) == (2, 7)
    with pytest.raises(InvalidConfig, match="output"):
        batch_config(["-i", "in.jsonl"])
